"""Files to tensors: the sample index, the slice store, samplers, loaders and augmentation."""
