"""Other voxels over the same extent: intensities linearly, label maps by the nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from conversion.volume import BadFile, Volume


def resampled(view: Volume, spacing_mm: Sequence[float]) -> Volume:
    """Over the same extent with other voxels, linearly along each axis, averaging where voxels grow."""
    if not any(spacing_mm):
        return view
    if view.affine is None:
        raise BadFile("does not say its spacing, so it cannot be resampled; leave --spacing_mm out")
    import torch
    import torch.nn.functional as F

    old = view.array.shape[:3]
    axes = zip(old, view.spacing_mm, spacing_mm, strict=True)
    new = tuple(max(1, round(n * mm / wanted)) if wanted else n for n, mm, wanted in axes)

    def linear(channel: np.ndarray) -> np.ndarray:
        slices = torch.from_numpy(np.ascontiguousarray(channel.transpose(2, 0, 1), dtype=np.float32))[:, None]
        slices = F.interpolate(slices, size=new[:2], mode="bilinear", antialias=True)
        lines = slices.reshape(1, 1, old[2], -1)  # along the third axis
        lines = F.interpolate(lines, size=(new[2], lines.shape[3]), mode="bilinear", antialias=True).numpy()
        lines = np.rint(lines) if channel.dtype.kind in "iu" else lines
        return lines.reshape(new[2], *new[:2]).transpose(1, 2, 0).astype(channel.dtype)

    channels = [linear(channel) for channel in view.channels]
    array = channels[0] if view.array.ndim == 3 else np.stack(channels, axis=3)
    ratio = np.array(old) / new
    larger = np.diag([*ratio, 1.0])
    larger[:3, 3] = (ratio - 1) / 2  # the first voxel's centre moves with its size
    return replace(view, array=array, affine=view.affine @ larger)


def nearest(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """With other voxels over the same extent, whose centres are those of `resampled`."""
    if label.shape == shape:
        return label
    axes = zip(shape, label.shape, strict=True)
    return label[np.ix_(*(np.minimum(((np.arange(n) + 0.5) * old / n).astype(int), old - 1) for n, old in axes))]
