"""Modules from tensors to tensors.

Letters used in shapes: B volumes or images on one process, V views, D slices, H W pixels, d = d_model, K prototypes.
"""
