"""What report.py and inspect_data.py are made of. Training never imports it."""
