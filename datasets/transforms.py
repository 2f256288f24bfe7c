"""Image transforms of whole batches, with parameters of their own for every sample.

Pure functions of a batch x [B, D, H, W] (B samples, D slices, H x W pixels; images have D = 1) and of parameter
tensors whose first axis is the sample. x is float32 with 0 as background; results are not clamped. A sample whose
parameter is neutral (named in each docstring) comes out bit for bit as it went in, at no cost.

Parameters stay on the CPU: which samples to work on is then known without waiting for the device, and nothing here
reads from it. Matrix products are avoided, as their rounding depends on the number of threads.

`length` [B] is the number of real slices of each sample, which come first; None: all. They do not depend on padded
slices, in which anything may stand afterwards (`only_real` clears them).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

BIAS_ORDER = 3
# Exponents (slice, row, column) of the terms of a polynomial of order 3 in three variables: 20 of them.
BIAS_EXPONENTS = [
    (i, j, k) for i in range(BIAS_ORDER + 1) for j in range(BIAS_ORDER + 1 - i) for k in range(BIAS_ORDER + 1 - i - j)
]
BLUR_REACH = 4.0  # standard deviations after which the kernel is cut off, as scipy.ndimage and TorchIO do
SLICES, ROWS, COLUMNS = 1, 2, 3  # axes of a batch


def upload(values: Tensor, device: torch.device) -> Tensor:
    """CPU values on the device, without waiting for it: a copy from ordinary memory would."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def resample(x: Tensor, theta: Tensor, height: int, width: int) -> Tensor:
    """Affine resampling, linear, one in-plane transform per sample for all its slices; zeros outside.

    x: [B, D, S, S], any floating type.  theta: [B, 2, 3] on the CPU, from output to input (x, y) as in
    torch.nn.functional.affine_grid with align_corners=False: -1 and 1 are the outer edges of the picture.
    Returns [B, D, height, width] float32.

    A window of whole pixels, mirrored or not, is copied exactly. A sample that shrinks by 2 or more along an axis is
    the mean of several points of every output pixel: against aliasing, and nothing outside the window is read.
    """
    groups = defaultdict(list)  # samples that the same operations serve
    for sample, matrix in enumerate(theta.tolist()):
        groups[_plan(matrix, x.shape[-1], height, width)].append(sample)
    if len(groups) == 1:
        return _resample_alike(x, theta, height, width, *groups)
    out = x.new_empty(*x.shape[:2], height, width, dtype=torch.float32)
    for plan, samples in groups.items():
        rows = torch.tensor(samples)
        there = upload(rows, x.device)
        out.index_copy_(0, there, _resample_alike(x.index_select(0, there), theta[rows], height, width, plan))
    return out


def _plan(matrix: list[list[float]], S: int, height: int, width: int) -> tuple:
    """(top, left, axes to mirror) of a window of whole pixels where theta is no more than that, else (down, across).

    The latter is how many points per output pixel, along its rows and columns, are an input pixel or more apart.
    """
    (xx, xy, x0), (yx, yy, y0) = matrix
    top, left = ((y0 + 1) * S - height) / 2, ((x0 + 1) * S - width) / 2
    errors = (abs(yy) * S - height, abs(xx) * S - width, yx * S, xy * S, top - round(top), left - round(left))
    inside = 0 <= round(top) <= S - height and 0 <= round(left) <= S - width
    if inside and max(map(abs, errors)) <= 1e-3:  # pixels; theta in float32 carries about 1e-5
        return round(top), round(left), (-2,) * (yy < 0) + (-1,) * (xx < 0)
    down, across = math.hypot(xy * S, yy * S) / height, math.hypot(xx * S, yx * S) / width
    return max(1, int(down + 1e-3)), max(1, int(across + 1e-3))


def _resample_alike(x: Tensor, theta: Tensor, height: int, width: int, plan: tuple) -> Tensor:
    """`resample` of samples of one plan."""
    if len(plan) == 3:
        top, left, mirrored = plan
        window = x[:, :, top : top + height, left : left + width]
        return (window.flip(mirrored) if mirrored else window).float()
    down, across = plan
    grid = _grid(upload(theta.float(), x.device), height * down, width * across)
    out = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(out, (down, across)) if down * across > 1 else out


def _grid(theta: Tensor, height: int, width: int) -> Tensor:
    """affine_grid without its matrix product: [B, 2, 3] -> [B, height, width, 2]."""
    columns = (2 * torch.arange(width, device=theta.device) + 1) / width - 1
    rows = ((2 * torch.arange(height, device=theta.device) + 1) / height - 1)[:, None]
    xx, xy, x0, yx, yy, y0 = theta.flatten(1).T[:, :, None, None]
    return torch.stack((columns * xx + rows * xy + x0, columns * yx + rows * yy + y0), dim=-1)


def blur(x: Tensor, std: Tensor, length: Tensor | None = None) -> Tensor:
    """Gaussian blur; std [B, 3] in voxels along slices, rows and columns, 0 (neutral) leaves an axis alone.

    Defined as in scipy.ndimage, and so in TorchIO: the kernel ends after 4 standard deviations, and what lies beyond
    the first and the last real voxel mirrors what lies before.
    """
    return _by_axis(_blur_axis, lambda std: _blur_radius(std) > 0, x, std, length)


def _blur_radius(std: Tensor) -> Tensor:
    return (BLUR_REACH * std + 0.5).long()


def _blur_axis(x: Tensor, std: Tensor, size: Tensor, axis: int) -> Tensor:
    """Samples of std [B] > 0 and `size` [B] real voxels along an axis."""
    radii = _blur_radius(std)
    radius, voxels = int(radii.max()), x.shape[axis]
    taps = torch.arange(-radius, radius + 1)
    weights = torch.exp(-(taps / std[:, None]).square() / 2) * (taps.abs() <= radii[:, None])
    weights = upload((weights / weights.sum(1, keepdim=True)).float(), x.device)
    place = torch.arange(-radius, voxels + radius) % (2 * size[:, None])
    mirrored = torch.minimum(place, 2 * size[:, None] - 1 - place)
    if int(size.min()) == voxels:  # all real: only the ends need looking up
        ends = (_take(x, axis, mirrored[:, :radius]), _take(x, axis, mirrored[:, -radius:]))
        wide = torch.cat((ends[0], x, ends[1]), dim=axis)
    else:
        wide = _take(x, axis, mirrored)
    shifted = (wide.narrow(axis, k, voxels) for k in range(2 * radius + 1))
    weights = weights.T[:, :, None, None, None]
    out = next(shifted) * weights[0]
    for weight, values in zip(weights[1:], shifted, strict=True):
        out.addcmul_(values, weight)
    return out


def anisotropy(x: Tensor, factor: Tensor, length: Tensor | None = None) -> Tensor:
    """Look of a coarser sampling; factor [B, 3] >= 1 along slices, rows and columns, 1 (neutral) leaves it alone.

    As in TorchIO: floor(n / factor) coarse voxels, centred on the n real ones, take the value of the nearest voxel,
    and are interpolated linearly. Departs: voxels beyond the coarse ones repeat the outermost, where TorchIO has 0.
    """
    return _by_axis(_coarsen_axis, lambda factor: factor > 1, x, factor, length)


def _coarsen_axis(x: Tensor, factor: Tensor, size: Tensor, axis: int) -> Tensor:
    """Samples of factor [B] > 1 and `size` [B] real voxels along an axis."""
    factor, size = factor[:, None], size[:, None]
    last = (size / factor).floor().clamp_min(1) - 1
    first_centre = (size - 1) / 2 - last / 2 * factor
    place = (torch.arange(x.shape[axis]) - first_centre) / factor  # of every voxel, in coarse ones
    below = place.floor().clamp_min(0).minimum(last)
    above = (below + 1).minimum(last)
    share = upload((place - below).clamp(0, 1).float(), x.device)
    low, high = (_take(x, axis, (first_centre + k * factor + 0.5).long()) for k in (below, above))
    return low.lerp_(high, share.view(len(x), *(-1 if a == axis else 1 for a in (SLICES, ROWS, COLUMNS))))


def bias_field(x: Tensor, coefficients: Tensor, length: Tensor | None = None) -> Tensor:
    """Smooth change of brightness, as of a receive coil: x * exp(polynomial of order 3 in the coordinates).

    coefficients: [B, 20] in the order of BIAS_EXPONENTS, all 0 is neutral.  Coordinates run from -1 at the first
    voxel of an axis to 1 at the last, along the slice axis from the first to the last real slice. Departs from TorchIO:
    the field, which may reach several times 1, is scaled so that a sample's mean stays what it was; padded slices must
    be zero for that.
    """
    return _apply(_multiply_field, (coefficients != 0).any(1), x, coefficients, _sizes(x, SLICES, length))


def _multiply_field(x: Tensor, coefficients: Tensor, size: Tensor) -> Tensor:
    cube = torch.zeros(len(x), *3 * (BIAS_ORDER + 1,))
    i, j, k = torch.tensor(BIAS_EXPONENTS).T
    cube[:, i, j, k] = coefficients.float()
    # Those of padded slices are bounded, as 0 * exp(a large number) is nan.
    slices, rows, columns = (
        torch.where(n > 1, 2 * torch.arange(voxels) / (n - 1).clamp_min(1) - 1, 0.0).clamp(-1, 1).float()
        for n, voxels in zip((size[:, None], *map(torch.tensor, x.shape[2:])), x.shape[1:], strict=True)
    )
    # Small tensors, hence on the CPU: powers of the row and the column times slices.
    by_slice = _polynomial(cube[..., None].unbind(1), slices[:, None, None])  # [B, 4, 4, D]
    field = _polynomial(upload(by_slice[..., None], x.device).unbind(1), upload(rows, x.device))  # [B, 4, D, H]
    field = _polynomial(field[..., None].unbind(1), upload(columns, x.device)).exp_().mul_(x)  # [B, D, H, W]
    return field.mul_(_mean(x) / _mean(field).clamp_min(1e-12))


def _polynomial(coefficients: tuple[Tensor, ...], t: Tensor) -> Tensor:
    """Sum of coefficients[k] * t**k, Horner's scheme."""
    value = coefficients[-1] * t
    for c in coefficients[-2:0:-1]:
        value.add_(c).mul_(t)
    return value.add_(coefficients[0])


def gamma(x: Tensor, log_gamma: Tensor) -> Tensor:
    """x ** exp(log_gamma), log_gamma [B], 0 is neutral; x must not be negative."""

    def power(x: Tensor, log_gamma: Tensor) -> Tensor:
        # Three times as fast as pow; exp(-inf) is 0, so 0 stays 0.
        return x.log().mul_(_per_sample(log_gamma.exp(), x)).exp_()

    return _apply(power, log_gamma != 0, x, log_gamma.double())


def jitter(x: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Brightness times 1 + brightness, then distance to the sample's mean times 1 + contrast; both [B], 0 neutral.

    The result is clamped to 0..1, as a power may follow.
    """

    def change(x: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
        x = x * _per_sample(1 + brightness, x)
        mean = _mean(x)
        return x.sub_(mean).mul_(_per_sample(1 + contrast, x)).add_(mean).clamp_(0, 1)

    return _apply(change, (brightness != 0) | (contrast != 0), x, brightness, contrast)


def noise(x: Tensor, std: Tensor, seeds: Tensor) -> Tensor:
    """Adds Gaussian noise; std [B], 0 is neutral; seeds [B] int64, of which `normal` makes each sample's noise."""

    def add(x: Tensor, std: Tensor, seeds: Tensor) -> Tensor:
        return torch.addcmul(x, normal(seeds, *x.shape[1:], x.device), _per_sample(std, x))

    return _apply(add, std > 0, x, std, seeds)


def normal(seeds: Tensor, slices: int, height: int, width: int, device: torch.device) -> Tensor:
    """[B, slices, height, width] standard normal numbers; each a function of its sample's seed and its place alone.

    seeds: [B] int64 on the CPU.  A hash of (seed, slice, pixel) gives 64 random bits for two pixels, and Box-Muller
    two normal numbers from them. Devices agree up to the rounding of their logarithm, sine and cosine.
    """
    pairs = -(-height * width // 2)
    by_slice = _scramble(seeds[:, None] + GOLDEN * torch.arange(1, slices + 1))
    by_pixel = _scramble(GOLDEN * torch.arange(1, pairs + 1, device=device))
    bits = _scramble(upload(by_slice, device)[:, :, None] + by_pixel).view(torch.int32)
    low, high = bits[..., 0::2], bits[..., 1::2]  # high: 31 bits, see _scramble
    radius = high.float().add_(1).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = low.float().mul_(math.pi * 2.0**-31)
    values = torch.cat((angle.cos().mul_(radius), angle.sin_().mul_(radius)), dim=2)
    return values[..., : height * width].unflatten(2, (height, width))


# The increment and the finaliser of SplitMix64 (Steele, Lea, Flood 2014), as int64.
GOLDEN, MIX_1, MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _scramble(z: Tensor) -> Tensor:
    """Each int64 to one that looks random, in place. Shifts keep the sign here, so the highest bit comes out 0."""
    z.bitwise_xor_(z >> 30).mul_(MIX_1)
    z.bitwise_xor_(z >> 27).mul_(MIX_2)
    return z.bitwise_xor_(z >> 31)


def _apply(function: Callable[..., Tensor], chosen: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
    """x with function(x, *parameters) in place of the samples where chosen [B] is True."""
    rows = chosen.nonzero().flatten()
    if len(rows) == 0:
        return x
    if len(rows) == len(x):
        return function(x, *parameters)
    there = upload(rows, x.device)
    return x.index_copy(0, there, function(x.index_select(0, there), *(p[rows] for p in parameters)))


def _by_axis(function: Callable, chosen: Callable, x: Tensor, values: Tensor, length: Tensor | None) -> Tensor:
    """x after function(x, value [B], real voxels [B], axis=) along each axis, of samples whose values are chosen."""
    for axis in (SLICES, ROWS, COLUMNS):
        along = values[:, axis - 1].double()
        x = _apply(partial(function, axis=axis), chosen(along), x, along, _sizes(x, axis, length))
    return x


def _take(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Each sample's voxels at index [B, n] along an axis."""
    index = upload(index, x.device)
    if axis == COLUMNS:
        return x.gather(axis, index[:, None, None].expand(-1, *x.shape[1:3], -1))
    samples, slices = (torch.arange(n, device=x.device) for n in x.shape[:2])  # faster than gather along these axes
    if axis == SLICES:
        return x[samples[:, None], index]
    return x[samples[:, None, None], slices[:, None], index[:, None]]


def _sizes(x: Tensor, axis: int, length: Tensor | None) -> Tensor:
    """[B] real voxels along an axis, at least one."""
    if axis == SLICES and length is not None:
        return length.clamp_min(1)
    return torch.full((len(x),), x.shape[axis])


def only_real(x: Tensor, length: Tensor | None) -> Tensor:
    """x with zeros in padded slices."""
    if length is None or int(length.min()) == x.shape[SLICES]:
        return x
    real = torch.arange(x.shape[SLICES]) < length[:, None]
    return x * upload(real[:, :, None, None], x.device)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1] float32 on the device of x."""
    return upload(values.float()[:, None, None, None], x.device)


def _mean(x: Tensor) -> Tensor:
    """[B, 1, 1, 1]; axis by axis, as the rounding of a sum over all depends on the number of threads."""
    return x.mean(COLUMNS, keepdim=True).mean(ROWS, keepdim=True).mean(SLICES, keepdim=True)
