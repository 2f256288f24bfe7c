"""Augmented views of volumes and crops of images, made on the training device on whole batches.

Parameters are drawn on the CPU, per sample and view, from `seeding.stream(seed, epoch, index, view)`; the pixels are
then worked on where the batch is (`transforms`), and nothing waits for the device. On a CPU, what comes out for a
sample is the same bit for bit whatever the batch it is in and the number of threads; a GPU may round differently.
Intensities are 0 to 1 with 0 as background, before and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from datasets import transforms
from utils.seeding import SHARED, stream

Policy = Literal["paper", "strong"]
Pair = tuple[float, float]
Draws = dict[str, ndarray]  # parameters of one view of a batch, a row per sample
PAPER_TRANSFORMS = ("flip", "affine", "anisotropy", "blur", "noise", "bias_field", "gamma")
PAPER_WINDOW = 0.8  # side of the window of policy `paper` over that of the canvas
CROP_ASPECT = (3 / 4, 4 / 3)  # window's width over height, relative to the output's


@dataclass(frozen=True)
class Ranges:
    """Limits (low, high) of uniform draws, TorchIO's where it has the transform, and probabilities (`*_p`)."""

    scale: Pair = (0.9, 1.1)  # magnification, drawn per in-plane axis
    degrees: Pair = (-10.0, 10.0)  # in-plane rotation
    downsampling: Pair = (1.5, 5.0)  # anisotropy: voxels per kept voxel along one axis of three
    blur_std: Pair = (0.0, 2.0)  # voxels, drawn per axis
    noise_std: Pair = (0.0, 0.25)  # intensities, of which 1 is the whole range
    bias: Pair = (-0.5, 0.5)  # each of the 20 coefficients of the log field
    log_gamma: Pair = (-0.3, 0.3)  # natural logarithm of the exponent
    crop_area: Pair = (0.4, 1.0)  # of the content's bounding box; MultiCrop takes its own scales
    jitter: Pair = (-0.4, 0.4)  # MultiCrop: relative change of brightness, and of contrast
    crop_blur_std: Pair = (0.1, 2.0)  # MultiCrop: pixels of a 224-pixel crop, scaled with the crop
    flip_p: float = 0.5  # each axis that the policy flips
    anisotropy_p: float = 0.25
    blur_p: float = 0.5
    bias_p: float = 0.5  # volumes
    crop_bias_p: float = 0.3  # MultiCrop
    gamma_p: float = 0.8
    noise_p: float = 0.5
    jitter_p: float = 0.8


RANGES: dict[str, Ranges] = {
    "paper": Ranges(),
    # Noise comes on top of five other transforms here, and std 0.25 would drown what they leave.
    "strong": Ranges(noise_std=(0.0, 0.1)),
}


class Uniforms:
    """Uniform random numbers of one view of a batch, each sample's from its own stream; a call hands out the next."""

    COUNT = 64  # per sample and view

    def __init__(self, seed: int, epoch: int, index: Sequence[int], view: int):
        self.numbers = np.stack([stream(seed, epoch, i, view).random(self.COUNT) for i in index])
        self.used = 0

    def __call__(self, low: float | ndarray, high: float, size: int | None = None) -> ndarray:
        """[B], or [B, size], numbers from low to high.  Raises IndexError where COUNT is too small."""
        taken = self.numbers[:, self.used : self.used + (size or 1)]
        if taken.shape[1] < (size or 1):
            raise IndexError(f"more than {self.COUNT} random numbers asked for: raise Uniforms.COUNT")
        self.used += taken.shape[1]
        numbers = low + (high - low) * taken
        return numbers if size else numbers[:, 0]

    def chance(self, probability: float) -> ndarray:
        """[B] bool, True with this probability."""
        return self(0, 1) < probability


class VolumeViews:
    """Random views of volumes, all slices of a view under one in-plane transform.

    Unlike TorchIO's, geometry stays in-plane, because slices at the same position of two views are a positive pair:
    turning or mirroring a volume through its slices would pair different anatomy.

    `paper`: the centred window of 0.8 canvas sides, which is a plain crop where that is the size of a view, under
    exactly one of PAPER_TRANSFORMS; the views of a sample take turns in an order of its own, so the first seven come
    from different ones.  `strong`: a random resized crop with rotation, scale and flips in one resampling pass, then
    at random anisotropy, blur, bias field, gamma and noise, in this order.

    height, width: of the views, in pixels.  ranges: instead of those of the policy.
    """

    def __init__(self, height: int, width: int, policy: Policy, seed: int, ranges: Ranges | None = None):
        self.height, self.width, self.policy, self.seed = height, width, policy, seed
        self.ranges = ranges or RANGES[policy]

    @torch.no_grad()
    def __call__(
        self, volumes: Tensor, mask: Tensor, extents: Tensor, index: Tensor, epoch: int, views: int = 2
    ) -> Tensor:
        """Views 1 to `views` of a batch: [views, B, D, H, W] float32, 0 to 1, padded slices exactly 0.

        volumes: [B, D, S, S] floats 0 to 1.  mask: [B, D] bool, True for real slices, which come first.
        extents: [B, 2] height and width in pixels of the content, centred on the canvas (its first row is
        (S - height) // 2).  index: [B] global sample indices.  All but volumes belong on the CPU.
        """
        B, D, S, _ = volumes.shape
        length = mask.sum(1).cpu()
        out = volumes.new_empty(views, B, D, self.height, self.width, dtype=torch.float32)
        drawn = self.draws(S, extents.double().numpy(), length.numpy(), index.tolist(), epoch, views)
        for view, draws in zip(out, drawn, strict=True):
            _transform(volumes, draws, view, length)
        return out

    def draws(
        self, canvas: int, content: ndarray, slices: ndarray, index: Sequence[int], epoch: int, views: int = 2
    ) -> Iterator[Draws]:
        """The parameters of views 1 to `views`, by name: a pure function of the arguments.

        canvas: S.  content: [B, 2] the extents.  slices: [B] real slices.  index: B global sample indices.
        """
        kinds = len(PAPER_TRANSFORMS)
        # Each sample goes through all transforms in an order of its own before one comes again.
        orders = np.stack([stream(self.seed, epoch, i, SHARED).permutation(kinds) for i in index])
        for view in range(1, views + 1):
            u = Uniforms(self.seed, epoch, index, view)
            if self.policy == "paper":
                yield self._draw_paper(u, orders[:, (view - 1) % kinds], canvas, slices)
            else:
                yield self._draw_strong(u, canvas, content, slices)

    def _draw_paper(self, u: Uniforms, kind: ndarray, canvas: int, slices: ndarray) -> Draws:
        r, chosen = self.ranges, {name: kind == k for k, name in enumerate(PAPER_TRANSFORMS)}
        which = u(1, 4).astype(int)  # one bit per axis: 1 rows, 2 columns, 3 both
        flips = np.stack((which & 1, which & 2), axis=1).astype(bool) & chosen["flip"][:, None]
        scale = _only(chosen["affine"], u(*r.scale, size=2), 1.0)
        degrees = _only(chosen["affine"], u(*r.degrees))
        side = max(1, round(PAPER_WINDOW * canvas))
        centre = np.full((len(kind), 2), (canvas - side) // 2 + side / 2)  # whole pixels, also in an odd margin
        return {
            "theta": window_theta(canvas, centre, side / scale, degrees, flips),
            **_draw_intensities(u, r, chosen),
            "downsampling": _draw_downsampling(u, r, chosen["anisotropy"], slices),
            "blur_std": _only(chosen["blur"], u(*r.blur_std, size=3)),
        }

    def _draw_strong(self, u: Uniforms, canvas: int, content: ndarray, slices: ndarray) -> Draws:
        r, output = self.ranges, (self.height, self.width)
        flips = u(0, 1, size=2) < r.flip_p
        degrees, scale = u(*r.degrees), u(*r.scale, size=2)
        chosen = {"bias_field": u.chance(r.bias_p), "gamma": u.chance(r.gamma_p), "noise": u.chance(r.noise_p)}
        return {
            "theta": crop_theta(u, canvas, content, output, r.crop_area, scale, degrees, flips),
            **_draw_intensities(u, r, chosen),
            "downsampling": _draw_downsampling(u, r, u.chance(r.anisotropy_p), slices),
            "blur_std": _only(u.chance(r.blur_p), u(*r.blur_std, size=3)),
        }


class MultiCrop:
    """Random resized crops of images, of several kinds (SwAV: two large and several small ones).

    Every crop lies inside the content where its shape allows.  `paper`: crop, horizontal flip, brightness and
    contrast, blur, as in SwAV for grey images.  `strong`: also rotation, vertical flip, bias field, gamma and noise;
    a rotated crop may show background at its corners where the content is too small for it.

    sizes: (height, width) in pixels per kind.  counts: crops per kind.  scales: (low, high) per kind, the share of
    the content's bounding box that a crop covers.
    """

    def __init__(self, sizes: Sequence[Pair], counts: Sequence[int], scales: Sequence[Pair], policy: Policy, seed: int):
        self.sizes, self.counts, self.scales = sizes, counts, scales
        self.policy, self.seed, self.ranges = policy, seed, RANGES[policy]

    @torch.no_grad()
    def __call__(self, images: Tensor, extents: Tensor, index: Tensor, epoch: int) -> list[Tensor]:
        """Crops 1 to sum(counts) of a batch of images: one [count, B, H, W] float32, 0 to 1, per kind.

        images: [B, S, S] floats 0 to 1.  extents, index: as in VolumeViews, on the CPU.
        """
        B, S, _ = images.shape
        kinds, draws = [], self.draws(S, extents.double().numpy(), index.tolist(), epoch)
        for size, count in zip(self.sizes, self.counts, strict=True):
            crops = images.new_empty(count, B, 1, *size, dtype=torch.float32)
            for crop in crops:
                _transform(images[:, None], next(draws), crop)
            kinds.append(crops[:, :, 0])
        return kinds

    def draws(self, canvas: int, content: ndarray, index: Sequence[int], epoch: int) -> Iterator[Draws]:
        """The parameters of crops 1 to sum(counts), as `VolumeViews.draws` gives those of views."""
        kinds = [k for k, count in enumerate(self.counts) for _ in range(count)]
        for view, k in enumerate(kinds, start=1):
            u = Uniforms(self.seed, epoch, index, view)
            yield self._draw(u, canvas, content, self.sizes[k], self.scales[k])

    def _draw(self, u: Uniforms, canvas: int, content: ndarray, size: tuple[int, int], area: Pair) -> Draws:
        r, strong = self.ranges, self.policy == "strong"
        flips = u(0, 1, size=2) < (r.flip_p * strong, r.flip_p)
        degrees = u(*r.degrees) * strong
        jittered = u.chance(r.jitter_p)
        probabilities = {"bias_field": r.crop_bias_p, "gamma": r.gamma_p, "noise": r.noise_p}
        chosen = {name: u.chance(p * strong) for name, p in probabilities.items()}
        std = _only(u.chance(r.blur_p), u(*r.crop_blur_std)) * math.sqrt(size[0] * size[1]) / 224
        return {
            "theta": crop_theta(u, canvas, content, size, area, np.ones_like(content), degrees, flips),
            **_draw_intensities(u, r, chosen),
            "blur_std": np.stack((np.zeros_like(std), std, std), axis=1),
            "brightness": _only(jittered, u(*r.jitter)),
            "contrast": _only(jittered, u(*r.jitter)),
        }


def crop_theta(
    u: Uniforms,
    canvas: int,
    content: ndarray,
    output: Pair,
    area: Pair,
    scale: ndarray,
    degrees: ndarray,
    flips: ndarray,
) -> ndarray:
    """theta [B, 2, 3] of a random window of each sample's content, resized to `output` (height, width).

    The window covers a share `area` of the content [B, 2] (height, width), is shrunk by `scale` [B, 2]
    (magnification of rows and columns), and then made smaller in both directions alike until it fits into the
    content. Its place is uniform among those where it, and all that interpolation reads for it, lies in the content;
    where rotation leaves no such place, it is in the middle.
    """
    content = content.clip(1, canvas)
    sides = np.array(output, dtype=float)
    ratio = np.exp(u(*np.log(CROP_ASPECT))) * output[1] / output[0]
    pixels = u(*area) * content.prod(1)
    window = np.sqrt(np.stack((pixels / ratio, pixels * ratio), axis=1)) / scale
    # Enlarging reads up to half an input pixel beyond the window: the outermost samples stand window / output / 2
    # inside it, but the content's outermost pixel centres 1/2 inside the content.
    largest = np.where(content >= sides, content, (content - 1) * sides / np.maximum(sides - 1, 1))
    window = window * (largest / window).min(1, keepdims=True).clip(max=1)
    c, s = np.abs(np.cos(np.radians(degrees))), np.abs(np.sin(np.radians(degrees)))
    turned = np.stack((c * window[:, 0] + s * window[:, 1], s * window[:, 0] + c * window[:, 1]), axis=1)
    room = (content - turned - (1 - window / sides).clip(min=0)).clip(min=0)
    middle = (canvas - content) // 2 + content / 2
    return window_theta(canvas, middle + room * u(-0.5, 0.5, size=2), window, degrees, flips)


def window_theta(canvas: int, centre: ndarray, window: ndarray, degrees: ndarray, flips: ndarray) -> ndarray:
    """theta [B, 2, 3] for `transforms.resample` that shows a window of a canvas x canvas picture.

    centre, window: [B, 2] (row, column) of the window's centre and its sides, in pixels from the canvas' top left
    corner.  degrees: [B] rotation.  flips: [B, 2] bool, whether rows and columns are mirrored.
    """
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rows, columns = (np.where(flips, -window, window) / canvas).T
    y, x = (2 * centre / canvas - 1).T
    return np.stack((c * columns, -s * rows, x, s * columns, c * rows, y), axis=1).reshape(-1, 2, 3)


def _only(chosen: ndarray, values: ndarray, neutral: float = 0.0) -> ndarray:
    """Values [B] or [B, n] of the chosen samples [B], neutral ones of the others."""
    return np.where(chosen if values.ndim == 1 else chosen[:, None], values, neutral)


def _draw_intensities(u: Uniforms, r: Ranges, chosen: Draws) -> Draws:
    """Bias field, gamma and noise for the chosen samples, neutral for the others."""
    return {
        "bias": _only(chosen["bias_field"], u(*r.bias, size=len(transforms.BIAS_EXPONENTS))),
        "log_gamma": _only(chosen["gamma"], u(*r.log_gamma)),
        "noise_std": _only(chosen["noise"], u(*r.noise_std)),
        "noise_seed": u(0, 2**53).astype(np.int64),
    }


def _draw_downsampling(u: Uniforms, r: Ranges, chosen: ndarray, slices: ndarray) -> ndarray:
    """[B, 3] factors, for the chosen samples one of them above 1, but not that of a single slice's axis."""
    axis = u(np.where(slices > 1, 0, 1)[:, None], 3, size=1).astype(int)  # [B, 1]
    factor = u(*r.downsampling)
    return np.where(chosen[:, None] & (axis == np.arange(3)), factor[:, None], 1.0)


def _transform(
    x: Tensor, draws: dict[str, np.ndarray], out: Tensor, length: Tensor | None = None, together: int | None = None
) -> None:
    """Transforms [B, D, S, S] into out [B, D, H, W], each sample by its own draws: 0..1, padded slices 0.

    together: samples at once; None: on a CPU one, which stays in its cache, else all.
    """
    together = together or (1 if x.device.type == "cpu" else len(x))
    parameters = {name: torch.from_numpy(values) for name, values in draws.items()}
    for first in range(0, len(x), together):
        rows = slice(first, first + together)
        p = {name: values[rows] for name, values in parameters.items()}
        real = None if length is None else length[rows]
        y = transforms.resample(x[rows], p["theta"], *out.shape[-2:])
        if "downsampling" in p:
            y = transforms.anisotropy(y, p["downsampling"], real)
        y = transforms.only_real(transforms.blur(y, p["blur_std"], real), real)
        y = transforms.bias_field(y, p["bias"], real)
        if "brightness" in p:
            y = transforms.jitter(y, p["brightness"], p["contrast"])
        y = transforms.gamma(y, p["log_gamma"])
        y = transforms.only_real(transforms.noise(y, p["noise_std"], p["noise_seed"]), real)
        torch.clamp(y, 0, 1, out=out[rows])
