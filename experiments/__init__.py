"""What pre-training is worth: runs described in YAML files, executed in order, and summarised."""
