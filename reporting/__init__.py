"""What report.py is made of. Training never imports it."""
