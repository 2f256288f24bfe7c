"""The encoder that a downstream task starts from, by the name or the file of its weights."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.encoder import JointEncoder
from models.resnet import GreyResNet
from training import loading
from training.weights import load_joint
from utils.errors import UserError

NAMED = ("random", "imagenet")
REMEDY = (
    "give a ResNet file (of ssl_*2D.py, *_encoder.pth, or from elsewhere: docs/EXPORTS.md), a file of mask_*.py or "
    "ssl_*3D.py, random, or imagenet"
)


def load_encoder(weights: str, arch: str | None = None, seed: int = 0) -> GreyResNet:
    """f_intra, the slice encoder.  arch: see `choose_arch`.

    weights: `random`, of a seed; `imagenet` (torchvision's, if they lie in torch's cache: nothing is downloaded); or a
    file in any layout of `training.layouts`. Raises UserError where they are missing or do not fit.
    """
    arch = choose_arch(weights, arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = GreyResNet(arch)
    if weights != "random":
        loading.load_resnet(encoder, loading.imagenet(arch) if weights == "imagenet" else Path(weights), REMEDY)
    return encoder


def load_joint_encoder(
    weights: str, arch: str | None = None, seed: int = 0, d_model: int = 640, layers: int = 4
) -> JointEncoder:
    """f_intra, the slice projection and f_inter, from a stage 2 or 3 file, or `random` of these sizes and this seed."""
    arch = choose_arch(weights, arch)
    if weights == "imagenet":
        raise UserError("weights: imagenet has no transformer over slices; give a file of mask_*.py or ssl_*3D.py")
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return JointEncoder(arch, d_model, layers)
    return load_joint(Path(weights))


def describe_weights(weights: str) -> str:
    """A short label for tables: `random`, `imagenet`, or the file's name and the start of its sha256."""
    return weights if weights in NAMED else f"{_existing(weights).stem}@{content_of(weights)[:8]}"


def has_transformer(weights: str) -> bool:
    """Whether these are weights of stage 2 or 3, which `load_joint_encoder` takes."""
    if weights in NAMED:
        return False
    with loading.reading(_existing(weights)) as state:
        return bool(loading.below(state, "transformer."))


def choose_arch(weights: str, arch: str | None) -> str:
    """`arch`, or what the `.json` beside the weights says, or resnet50. UserError where the first two differ."""
    record = None if weights in NAMED else loading.read_record(_existing(weights))
    made_with = record and record["config"]["arch"]
    if arch and made_with and arch != made_with:
        raise UserError(f"arch: {arch} was asked for, but {weights} was made with {made_with}; leave --arch out")
    return arch or made_with or "resnet50"


def grey(pixels: np.ndarray, low: float, high: float, size: tuple[int, int]) -> Tensor:
    """What an encoder sees of [H, W] intensities: [h, w] float16 in 0..1, linear between the limits, resized."""
    scaled = (np.ascontiguousarray(pixels, np.float64) - low) / (high - low)
    images = torch.from_numpy(scaled.clip(0, 1)).float()[None, None]
    return F.interpolate(images, size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1).half()


def content_of(value: Any) -> Any:
    """sha256 (hex) of the content for the name of a file, remembered until that changes; else the value itself."""
    if not isinstance(value, str) or not Path(value).is_file():
        return value
    status = Path(value).stat()
    return _digest(value, status.st_mtime_ns, status.st_size)


@functools.cache
def _digest(file: str, _modified: int, _size: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _existing(weights: str) -> Path:
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"weights: {weights}: no such file; {REMEDY}")
    return path
