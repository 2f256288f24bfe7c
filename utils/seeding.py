"""Every random number of a sample is a pure function of (seed, epoch, index, view)."""

from __future__ import annotations

import numpy as np

SHARED = 0  # the "view" for draws that all views of a sample share; views count from 1
FILLING = 2**20  # the "epoch" of the pass that fills a memory bank before the first epoch

# What a stream is for: two purposes of one view never share random numbers.
AUGMENTATION, WINDOW, MASKED_SLICES, INTRA_SLICES, SHUFFLE, KMEANS, DROPOUT, SHUFFLE_DATASET, HIDDEN = range(9)


def stream(seed: int, epoch: int, index: int, view: int, purpose: int = AUGMENTATION) -> np.random.Generator:
    """Random numbers of one view of one sample, whatever the workers, ranks and interruptions.

    All arguments are non-negative integers; `index` is the global sample index over all data sets.
    """
    return np.random.default_rng((seed, epoch, index, view, purpose))
