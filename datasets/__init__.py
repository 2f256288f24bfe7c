"""Files to tensors: the sample index, the slice store, samplers, augmentation and generated phantoms."""
