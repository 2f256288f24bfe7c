"""Plumbing that the science does not see: configuration, processes, precision, optimiser, checkpoints, loop."""
