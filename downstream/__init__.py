"""What pre-training is worth: segmentation, classification, detection and probes, from any weights."""
