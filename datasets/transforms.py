"""Image transforms of whole batches, with parameters of their own for every sample.

Pure functions of a batch x [B, D, H, W] (B samples, D slices, H x W pixels; images have D = 1) and of parameter
tensors whose first axis is the sample. x is float32 with 0 as background; results are not clamped. Parameters may
stay on the CPU: they are small, and choosing the samples to work on then costs no wait for the device. A sample
whose parameter is neutral (named in each docstring) comes out bit for bit as it went in, at no cost.

Where a `mask` [B, D] is taken, it is True for real slices, which come first; real slices then do not depend on how
many padded ones follow. None means that all slices are real.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BIAS_ORDER = 3
# Exponents (slice, row, column) of the terms of a polynomial of order 3 in three variables: 20 of them.
BIAS_EXPONENTS = [
    (i, j, k) for i in range(BIAS_ORDER + 1) for j in range(BIAS_ORDER + 1 - i) for k in range(BIAS_ORDER + 1 - i - j)
]


def resample(x: Tensor, theta: Tensor, height: int, width: int) -> Tensor:
    """Affine resampling, linear, one in-plane transform per sample for all its slices; zeros outside.

    x: [B, D, S, S].  theta: [B, 2, 3], from output to input (x, y) as in torch.nn.functional.affine_grid with
    align_corners=False: -1 and 1 are the outer edges of the picture.  Returns [B, D, height, width].

    A window of whole pixels, mirrored or not, is copied and not interpolated, so it is exact. A sample that shrinks by
    2 or more along an axis is interpolated at several points of every output pixel, no closer than an input pixel, and
    their mean taken: this keeps fine detail from turning into false patterns, and, unlike a blur before sampling, it
    reads nothing outside the window. For whole factors without rotation it is the mean over the pixel's area.
    """
    groups = defaultdict(list)
    for sample, matrix in enumerate(theta.tolist()):
        window = _whole_pixel_window(matrix, x.shape[-2:], (height, width))
        groups[window or _points(matrix, x.shape[-2:], (height, width))].append(sample)
    if len(groups) == 1 and len(next(iter(groups))) == 2:  # nothing to copy, all alike: the usual case
        return _interpolate(x, theta, height, width, *next(iter(groups)))
    out = x.new_empty(*x.shape[:2], height, width)
    for key, samples in groups.items():
        rows = torch.tensor(samples)
        there = rows.to(x.device)
        if len(key) == 3:
            top, left, mirrored = key
            out[there] = x[there, :, top : top + height, left : left + width].flip(mirrored)
        else:
            out[there] = _interpolate(x[there], theta[rows.to(theta.device)], height, width, *key)
    return out


def _interpolate(x: Tensor, theta: Tensor, height: int, width: int, down: int, across: int) -> Tensor:
    """Bilinear at down x across points of every output pixel, averaged."""
    size = [len(x), 1, height * down, width * across]
    grid = F.affine_grid(theta.float().to(x.device), size, align_corners=False)
    out = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(out, (down, across)) if down * across > 1 else out


def _points(matrix: list[list[float]], canvas: tuple[int, int], output: tuple[int, int]) -> tuple[int, int]:
    """How many points per output pixel, along its rows and columns, are an input pixel or more apart."""
    (xx, xy, _), (yx, yy, _) = matrix
    down = math.hypot(xy * canvas[1], yy * canvas[0]) / output[0]
    across = math.hypot(xx * canvas[1], yx * canvas[0]) / output[1]
    return max(1, int(down + 1e-3)), max(1, int(across + 1e-3))


def _whole_pixel_window(
    matrix: list[list[float]], canvas: tuple[int, int], output: tuple[int, int]
) -> tuple[int, int, tuple[int, ...]] | None:
    """(top, left, axes of [..., H, W] to mirror), if this is all that theta does; None otherwise."""
    (xx, xy, x0), (yx, yy, y0) = matrix
    top, left = ((y0 + 1) * canvas[0] - output[0]) / 2, ((x0 + 1) * canvas[1] - output[1]) / 2
    errors = (
        abs(yy) * canvas[0] - output[0],
        abs(xx) * canvas[1] - output[1],
        yx * canvas[0],
        xy * canvas[1],
        top - round(top),
        left - round(left),
    )
    if max(map(abs, errors)) > 1e-3:  # pixels; theta in float32 carries about 1e-5
        return None
    top, left = round(top), round(left)
    if not (0 <= top <= canvas[0] - output[0] and 0 <= left <= canvas[1] - output[1]):
        return None
    return top, left, (-2,) * (yy < 0) + (-1,) * (xx < 0)


def blur(x: Tensor, std: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gaussian blur; std [B, 3] in voxels along slices, rows and columns, 0 (neutral) leaves an axis alone.

    Weights are normalised over the real voxels along the axis, so borders do not darken. Padded slices come out
    zero where the slice axis is blurred.
    """
    for axis in range(3):
        real = _real(x, mask, axis)
        x = _mix(x, axis, _gaussian_rows, std[:, axis] > 0, std[:, axis].float(), real)
    return x


def anisotropy(x: Tensor, factor: Tensor, mask: Tensor | None = None) -> Tensor:
    """Look of a coarser sampling; factor [B, 3] >= 1 along slices, rows and columns, 1 (neutral) leaves it alone.

    Voxels 0, f, 2f, ... (rounded to whole voxels) and the last real one are kept, and those between two kept ones
    are interpolated linearly. Padded slices come out zero where the slice axis is chosen.
    """
    for axis in range(3):
        real = _real(x, mask, axis)
        x = _mix(x, axis, _coarse_rows, factor[:, axis] > 1, factor[:, axis].float(), real)
    return x


def bias_field(x: Tensor, coefficients: Tensor, mask: Tensor | None = None) -> Tensor:
    """Smooth change of brightness, as of a receive coil: x * exp(polynomial of order 3 in the coordinates).

    coefficients: [B, 20] in the order of BIAS_EXPONENTS, all 0 is neutral.  Coordinates run from -1 at the first
    voxel of an axis to 1 at the last, along the slice axis from the first to the last real slice.
    """
    real = _real(x, mask, 0)

    def multiply(x: Tensor, coefficients: Tensor, real: Tensor) -> Tensor:
        depth, height, width = x.shape[1:]
        steps = (real.sum(1, keepdim=True) - 1).clamp_min(0)  # between the real slices
        slices = torch.arange(depth, device=x.device) * 2 / steps.clamp_min(1) - 1
        # One slice alone lies in the middle; padded slices stay bounded, as 0 * exp(a large number) is nan.
        slices = torch.where(steps > 0, slices, 0.0).clamp(-1, 1)
        by_slice, by_row, by_column = (_powers(c) for c in (slices, _coordinates(height, x), _coordinates(width, x)))
        cube = x.new_zeros(len(x), *3 * (BIAS_ORDER + 1,))
        i, j, k = torch.tensor(BIAS_EXPONENTS).T
        cube[:, i, j, k] = coefficients
        field = (by_slice @ cube.flatten(2)).unflatten(2, cube.shape[2:])  # [B, D, 4, 4] for rows and columns
        return x * torch.exp(by_row @ field @ by_column.T)

    return _apply(multiply, (coefficients != 0).any(1), x, coefficients.float(), real)


def gamma(x: Tensor, log_gamma: Tensor) -> Tensor:
    """x ** exp(log_gamma), log_gamma [B], 0 is neutral; x must not be negative."""
    return _apply(lambda x, g: x ** torch.exp(g)[:, None, None, None], log_gamma != 0, x, log_gamma.float())


def jitter(x: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Brightness times 1 + brightness, then distance to the sample's mean times 1 + contrast; both [B], 0 neutral.

    The result is clamped to 0..1, as a power may follow.
    """

    def change(x: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
        x = x * (1 + brightness)[:, None, None, None]
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + (x - mean) * (1 + contrast)[:, None, None, None]).clamp(0, 1)

    return _apply(change, (brightness != 0) | (contrast != 0), x, brightness.float(), contrast.float())


def noise(x: Tensor, std: Tensor, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
    """Adds Gaussian noise to the real slices; std [B], 0 is neutral; seeds [B] int64, one random stream per sample.

    The same seed gives other numbers on another kind of device.
    """
    counts = [x.shape[1]] * len(x) if mask is None else mask.sum(1).tolist()
    chosen = [b for b, s in enumerate(std.tolist()) if s > 0]
    if not chosen:
        return x
    x = x.clone()
    for b in chosen:
        generator = torch.Generator(x.device).manual_seed(int(seeds[b]))
        # Of the real slices only: how a generator fills a tensor depends on the tensor's size.
        real = x[b, : counts[b]]
        real += float(std[b]) * torch.randn(real.shape, generator=generator, device=x.device)
    return x


def _real(x: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """Which positions along an axis (0 slices, 1 rows, 2 columns) are real: [B, n] float, 0 or 1."""
    if axis == 0 and mask is not None:
        return mask.to(x)
    return x.new_ones(len(x), x.shape[axis + 1])


def _apply(function: Callable[..., Tensor], chosen: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
    """x with function(x, *parameters) in place of the samples where chosen [B] is True."""
    rows = chosen.nonzero().flatten()
    if len(rows) == 0:
        return x
    if len(rows) == len(x):
        return function(x, *(p.to(x.device) for p in parameters))
    there = rows.to(x.device)
    picked = (p[rows.to(p.device)].to(x.device) for p in parameters)
    return x.index_copy(0, there, function(x[there], *picked))


def _mix(
    x: Tensor, axis: int, matrices: Callable[..., Tensor], chosen: Tensor, parameter: Tensor, real: Tensor
) -> Tensor:
    """The chosen samples' voxels along an axis (0 slices, 1 rows, 2 columns) mixed by one matrix per sample.

    matrices(parameter [B], real [B, n]) -> [B, n, n], a row of weights per voxel of the result.
    """

    def multiply(x: Tensor, parameter: Tensor, real: Tensor) -> Tensor:
        m = matrices(parameter, real)
        if axis == 0:
            return (m @ x.flatten(2)).reshape(x.shape)
        if axis == 1:
            return m[:, None] @ x
        return (x.flatten(1, 2) @ m.mT).reshape(x.shape)

    return _apply(multiply, chosen, x, parameter, real)


def _gaussian_rows(std: Tensor, real: Tensor) -> Tensor:
    """Weights of a Gaussian blur: std [B] and real [B, n] -> [B, n, n]."""
    position = torch.arange(real.shape[1], device=real.device, dtype=torch.float32)
    distance = (position[:, None] - position) / std.clamp_min(1e-3)[:, None, None]
    weight = torch.exp(-distance.square() / 2) * real[:, None, :]
    # A padded slice may be out of reach of every real one, and its row sums to 0.
    return weight / weight.sum(-1, keepdim=True).clamp_min(1e-30) * real[:, :, None]


def _coarse_rows(factor: Tensor, real: Tensor) -> Tensor:
    """Weights of linear interpolation between kept voxels: factor [B] and real [B, n] -> [B, n, n]."""
    size = real.shape[1]
    position = torch.arange(size, device=real.device, dtype=torch.float32)
    last = (real.sum(1, keepdim=True) - 1).clamp_min(0)
    kept = torch.round(position * factor[:, None])[:, None, :]  # [B, 1, n] candidates, those past the end too
    below = torch.where(kept <= position[:, None], kept, 0.0).amax(-1)  # [B, n] nearest kept on either side
    above = torch.where(kept >= position[:, None], kept, float(size)).amin(-1)
    below, above = torch.minimum(below, last), torch.minimum(above, last)
    share = ((position - below) / (above - below).clamp_min(1)).clamp(0, 1)[..., None]
    rows = (position == below[..., None]) * (1 - share) + (position == above[..., None]) * share
    return rows * real[:, :, None]


def _coordinates(size: int, x: Tensor) -> Tensor:
    """[size] coordinates from -1 to 1; a single voxel is in the middle."""
    return torch.linspace(-1, 1, size, device=x.device) if size > 1 else x.new_zeros(1)


def _powers(coordinates: Tensor) -> Tensor:
    """[..., n] -> [..., n, 4]: powers 0 to 3."""
    return torch.stack([coordinates**p for p in range(BIAS_ORDER + 1)], dim=-1)
