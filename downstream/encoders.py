"""The encoder that a downstream task starts from, by the name or the file of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torchvision

from models.encoder import JointEncoder
from models.resnet import GreyResNet
from training.weights import load_joint, load_resnet
from utils.errors import UserError
from utils.options import ARCHITECTURES

NAMED = ("random", "imagenet")
REMEDY = (
    "give a ResNet file (of ssl_*2D.py, *_encoder.pth, torchvision, SwAV, DeepCluster-v2, VISSL), a file of "
    "mask_*.py or ssl_*3D.py, random, or imagenet"
)


def load_encoder(weights: str, arch: str | None = None, seed: int = 0) -> GreyResNet:
    """f_intra, the slice encoder.

    weights: `random`; `imagenet` (torchvision's, if they lie in torch's cache: nothing is downloaded); or the path of
    a ResNet in any layout of `training.weights.load_resnet` or of a stage 2 or 3 file.
    arch: a torchvision ResNet; None: what the `.json` beside the file says, else resnet50.
    seed: of random weights. Torch's global random state is left as it was.
    Raises UserError where the weights are missing or are those of another arch.
    """
    arch = choose_arch(weights, arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = GreyResNet(arch)
    if weights == "random":
        return encoder
    path = _imagenet_file(arch) if weights == "imagenet" else Path(weights)
    try:
        load_resnet(encoder, path, REMEDY)
    except UserError as error:
        raise UserError(f"{error} (loaded as {arch}; another one is chosen with --arch)") from None
    return encoder


def load_joint_encoder(
    weights: str, arch: str | None = None, seed: int = 0, d_model: int = 640, layers: int = 4
) -> JointEncoder:
    """f_intra, the slice projection and f_inter, from a stage 2 or 3 file or `random`.

    arch, d_model, layers: of random weights; a file's own stand in the `.json` beside it. seed: of random weights.
    Raises UserError where the file holds no transformer, or arch is given and is not the file's.
    """
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
    if weights in NAMED:
        return weights
    path = _existing(weights)
    return f"{path.stem}@{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def has_transformer(weights: str) -> bool:
    """Whether these are weights of stage 2 or 3, which `load_joint_encoder` takes; `load_encoder` has read them."""
    if weights in NAMED:
        return False
    return any(key.startswith("transformer.") for key in torch.load(weights, map_location="cpu", weights_only=True))


def choose_arch(weights: str, arch: str | None) -> str:
    """`arch`, or what the `.json` beside the weights says, or resnet50. UserError where the first two differ."""
    made_with = None if weights in NAMED else _recorded_arch(_existing(weights))
    if arch and made_with and arch != made_with:
        raise UserError(f"arch: {arch} was asked for, but {weights} was made with {made_with}; leave --arch out")
    return arch or made_with or "resnet50"


def _recorded_arch(path: Path) -> str | None:
    """What the `.json` beside a weights file says; None where there is none."""
    about = path.with_suffix(".json")
    if not about.is_file():
        return None
    try:
        arch = json.loads(about.read_text(encoding="utf-8"))["config"]["arch"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{about}: damaged; it should say the arch of {path.name}, or be removed") from None
    if arch not in ARCHITECTURES:
        raise UserError(f"{about}: arch {arch!r} is not one of {', '.join(ARCHITECTURES)}")
    return arch


def _existing(weights: str) -> Path:
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"weights: {weights}: no such file; {REMEDY}")
    return path


def _imagenet_file(arch: str) -> Path:
    """torchvision's file in torch's cache, its newest recipe first."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    names = [recipe.url.rsplit("/", 1)[-1] for recipe in torchvision.models.get_model_weights(arch)]
    for name in reversed(names):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"weights: imagenet: {folder} holds none of {', '.join(names)}, and nothing is downloaded here; fetch one with "
        f"torchvision.models.{arch}(weights='DEFAULT'), or give --weights another file"
    )
