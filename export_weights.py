"""Write trained weights in the layout of another library, with a model card.

    python export_weights.py --weights weights/swav3D.pth --format timm --dest exports
    python export_weights.py --weights weights/swav3D.pth --format all --dest exports
    python export_weights.py --weights weights/swav3D.pth --half true --one_file true     # small, to pass on

torchvision, timm, smp (segmentation_models_pytorch), monai2d and monai3d are state dicts of a plain ResNet, as `.pth`
and `.safetensors`; joint is slice encoder and transformer together through torch.export (`.pt2`); onnx is the slice
encoder. Beside each stands a card for people (`.md`) and for programs (`.json`): input, checksums, what made the
weights, the lines that load them, and what not to expect. docs/EXPORTS.md has these lines for every library.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jinja2 import StrictUndefined, Template
from torch import Tensor, nn

from downstream.encoders import has_transformer, load_encoder, load_joint_encoder
from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, plain, pooled
from training.loading import read_record
from training.weights import encoded as weights_file
from utils import config as options
from utils import files
from utils.errors import UserError


@dataclass
class Config:
    weights: str
    """file of ssl_*2D.py, mask_*.py or ssl_*3D.py, with the .json that stands beside it"""
    format: Literal["torchvision", "timm", "smp", "monai2d", "monai3d", "joint", "onnx", "all"] = "torchvision"
    """library that shall load the weights; all: every format that these weights can have"""
    dest: str = "exports"
    """folder that receives <name>_<format>.* and the cards"""
    arch: str | None = None
    """ResNet of the weights; null: as their .json says"""
    channels: Literal[0, 1, 3] = 0
    """input channels of a plain ResNet; 3 expects the grey image three times; 0: 1 for MONAI, 3 for the others"""
    inflation: Literal["centre", "mean"] = "centre"
    """2D kernels to 3D: in the middle of the depth, or spread over it (docs/EXPORTS.md)"""
    half: bool = False
    """state dicts in half precision, <name>_<format>_fp16.*: half the size, converted as they are loaded"""
    one_file: bool = False
    """of a state dict only the file that the card's lines load, instead of .pth and .safetensors"""


class Format(NamedTuple):
    """A library, the shape of its input, and the lines that load a file; `card_of` fills in the {names}."""

    library: str
    shape: str
    use: tuple[str, ...]
    channels: int = 3  # what the library's users expect
    has_wide: bool = True  # wide_resnet*


GREY_STEM = "resnet.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)"
MONAI = (
    "resnet = monai.networks.nets.{arch}(spatial_dims={dims}, n_input_channels={channels}, conv1_t_stride=2, "
    "bias_downsample=False, feed_forward=False)",
    'resnet.load_state_dict(torch.load("{file}.pth", weights_only=True))',
)
TORCHVISION = ("resnet = torchvision.models.{arch}()", "resnet.fc = torch.nn.Identity()", MONAI[-1])
TIMM = (
    'resnet = timm.create_model("{arch}", num_classes=0, in_chans={channels}, checkpoint_path="{file}.safetensors")',
)
SMP = (
    'unet = segmentation_models_pytorch.Unet("{arch}", encoder_weights=None, in_channels={channels})',
    'unet.encoder.load_state_dict(torch.load("{file}.pth", weights_only=True))',
)
JOINT = (
    'model = torch.export.load("{file}.pt2").module()',
    "embedding = model(volumes, mask)  # [B, D, H, W], [B, D] True for real slices -> [B, {width}]",
)
ONNX = (
    'session = onnxruntime.InferenceSession("{file}.onnx")',
    '(features,) = session.run(["features"], {{"images": images}})  # float32 [N, 1, H, W] -> [N, {width}]',
)
FORMATS = {
    "torchvision": Format("torchvision", "[N, {channels}, H, W]", TORCHVISION),
    "timm": Format("timm", "[N, {channels}, H, W]", TIMM),
    "smp": Format("segmentation_models_pytorch", "[N, {channels}, H, W]", SMP, has_wide=False),
    "monai2d": Format("monai", "[N, {channels}, H, W]", MONAI, channels=1, has_wide=False),
    "monai3d": Format("monai", "[N, {channels}, D, H, W]", MONAI, channels=1, has_wide=False),
    "joint": Format("torch", "[B, D, H, W]", JOINT, channels=1),
    "onnx": Format("onnxruntime", "[N, 1, H, W]", ONNX, channels=1),
}
PROGRAMS = ("joint", "onnx")  # which normalise and compute by themselves

CARD = Path(__file__).parent / "reporting/templates/card.md"


class Source(NamedTuple):
    """What is exported: a file, the `.json` beside it, and the networks in it, in eval mode."""

    path: Path
    record: dict[str, Any]
    encoder: GreyResNet
    joint: JointEncoder | None  # where the file holds a transformer; `encoder` is part of it


def main(cfg: Config) -> None:
    source = read(cfg.weights, cfg.arch)
    for name in FORMATS if cfg.format == "all" else [cfg.format]:
        if not (reason := impossible(name, source, cfg.half)):
            write(name, source, cfg)
        elif cfg.format == "all":
            print(f"{name}: left out; {reason}", flush=True)
        else:
            raise UserError(f"format: {reason}")


def write(name: str, source: Source, cfg: Config) -> None:
    """The files of a format and their cards, all or none; a card that is there is of no other files."""
    stem = Path(cfg.dest, f"{source.path.stem}_{name}{'_fp16' * cfg.half}")
    channels = FORMATS[name].channels if name in PROGRAMS else cfg.channels or FORMATS[name].channels
    contents = {Path(f"{stem}{suffix}"): data for suffix, data in encoded(name, source, channels, cfg).items()}
    if os.path.realpath(source.path) in map(os.path.realpath, contents):
        raise UserError(f"dest: {source.path} itself would be overwritten; choose another folder")
    checksums = {path.name: hashlib.sha256(data).hexdigest() for path, data in contents.items()}
    card = card_of(name, source, stem.name, channels, checksums, cfg)
    imports = [m for m in dict.fromkeys(("torch", card["library"])) if any(f"{m}." in line for line in card["use"])]
    template = Template(CARD.read_text(encoding="utf-8"), undefined=StrictUndefined, trim_blocks=True)
    text = template.render(card, file=stem.name, imports=imports)
    cards = {Path(f"{stem}.md"): text.encode(), Path(f"{stem}.json"): (json.dumps(card, indent=2) + "\n").encode()}
    files.write_together(contents | cards, last=cards)
    print(f"wrote {', '.join(map(str, contents))}", flush=True)


def read(weights: str, arch: str | None = None) -> Source:
    """The networks in a weights file of this project. Raises UserError where the file or its `.json` is not right."""
    path, about = Path(weights), Path(weights).with_suffix(".json")
    for file in (path, about):
        if not file.is_file():
            raise UserError(
                f"weights: {file}: missing; name a file of ssl_*2D.py, mask_*.py or ssl_*3D.py with the .json that "
                "was written beside it: a model card must say what made the weights"
            )
    record = read_record(path)
    try:
        checksum, *_ = record["sha256"], record["data"]["summary"], record["commit"]
    except (KeyError, TypeError):
        raise UserError(f"{about}: damaged; it should hold sha256, config, data and commit. Copy it again") from None
    if checksum != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(f"{about}: is of other weights than {path.name} (sha256 differs); copy both files again")
    joint = load_joint_encoder(weights, arch).eval() if has_transformer(weights) else None
    return Source(path, record, joint.resnet if joint else load_encoder(weights, arch).eval(), joint)


def impossible(name: str, source: Source, half: bool) -> str | None:
    """Why these weights do not have this format."""
    arch = source.record["config"]["arch"]
    if name == "joint" and source.joint is None:
        return f"{source.path} holds a ResNet alone; joint needs a file of mask_*.py or ssl_*3D.py"
    if half and name in PROGRAMS:
        return f"{name} is a program, which would compute in half precision too; leave --half out"
    if arch.startswith("wide") and not FORMATS[name].has_wide:
        return f"{FORMATS[name].library} has no {arch}; torchvision and timm have"
    return None


def encoded(name: str, source: Source, channels: int, cfg: Config) -> dict[str, bytes]:
    """Suffix -> content of every file of a format."""
    if name == "joint":
        return {".pt2": program_file(source.joint)}
    if name == "onnx":
        return {".onnx": onnx_file(source.encoder)}
    from safetensors.torch import save

    state = plain_state(source.encoder, channels)
    if name == "monai3d":
        state = inflate(state, cfg.inflation)
    if cfg.half:
        state = halved(state)
    both = {".pth": weights_file(state), ".safetensors": save(state, metadata={"format": "pt"})}
    loaded = "".join(FORMATS[name].use)
    return {suffix: data for suffix, data in both.items() if not cfg.one_file or f"{{file}}{suffix}" in loaded}


def card_of(
    name: str, source: Source, file: str, channels: int, checksums: dict[str, str], cfg: Config
) -> dict[str, Any]:
    """The card for programs. It keeps the record's keys, so this project's loaders read an exported `.pth` too.

    Paths are left out: a card is passed on, and they tell nothing but how somebody's disk is organised.
    """
    form, config = FORMATS[name], source.record["config"]
    width = source.joint.projection.out_features if name == "joint" else source.encoder.num_features
    filled = {"arch": config["arch"], "channels": channels, "dims": 3 if name == "monai3d" else 2}
    use = [line.format(file=file, width=width, **filled) for line in form.use]
    if name == "torchvision" and channels == 1:
        use.insert(1, GREY_STEM)
    outside = f"outside: give (grey - {GREY_MEAN}) / {GREY_STD}" + ", the same in each channel" * (channels == 3)
    card = {
        "format": name,
        "library": form.library,
        "arch": config["arch"],
        "dtype": "float16" if cfg.half else "float32",
        "use": use,
        "files": checksums,
        "source": {"file": source.path.name, "sha256": source.record["sha256"]},
        "input": {
            "shape": form.shape.format(channels=channels),
            "range": [0, 1],
            "grey_mean": GREY_MEAN,
            "grey_std": GREY_STD,
            "normalise": "inside: give grey values in 0..1" if name in PROGRAMS else outside,
        },
        **({"inflation": cfg.inflation} if name == "monai3d" else {}),
    }
    card |= {key: value for key, value in source.record.items() if key not in card and key != "sha256"}
    return card | {"config": {key: value for key, value in config.items() if not key.endswith("_path")}}


# ---- networks in other layouts


def plain_state(encoder: GreyResNet, channels: int) -> dict[str, Tensor]:
    """State dict of the ResNet without `fc` in torchvision's names, with a stem for 1 or 3 equal channels.

    A plain ResNet does not normalise: it gives the encoder's features for (grey - GREY_MEAN) / GREY_STD.
    torchvision, timm, segmentation_models_pytorch and MONAI (2D) share these names and shapes.
    """
    state = encoder.torchvision_state()
    if channels == 1:
        state["conv1.weight"] = plain(encoder.conv1.weight)
    return {name: value.contiguous() for name, value in state.items()}


def inflate(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """2D convolutions [O, I, k, k] -> 3D ones [O, I, k, k, k], the first k along depth; everything else as it is.

    centre: the middle depth gets the 2D kernel, the others 0. A volume that is constant along depth gives the 2D
    response everywhere, and every slice is seen alone until training fills the zeros.
    mean: each depth gets the 2D kernel / k (I3D, Carreira and Zisserman 2017). The 2D response then holds only where
    zero padding along depth is out of sight: not in volumes of usual depth.
    """

    def deep(weight: Tensor) -> Tensor:
        k = weight.shape[-1]
        if how == "mean":
            return (weight / k).unsqueeze(2).repeat(1, 1, k, 1, 1)
        return F.pad(weight.unsqueeze(2), (0, 0, 0, 0, k // 2, k - 1 - k // 2))

    return {name: deep(value) if value.dim() == 4 else value for name, value in state.items()}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors as float16, everything else as it is. Raises UserError naming tensors that do not fit."""
    small = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if broken := [name for name, value in small.items() if value.is_floating_point() and not value.isfinite().all()]:
        largest = max(float(state[name].abs().max()) for name in broken)
        raise UserError(
            f"half: {', '.join(broken[:3])}{', ...' * (len(broken) > 3)} hold values up to {largest:g}, which half "
            f"precision cannot (at most {torch.finfo(torch.float16).max:g}); leave --half out"
        )
    return small


class VolumeEmbedding(nn.Module):
    """`JointEncoder` as one function with plain shapes, for tracing.

    forward: volumes [B, D, H, W] in 0..1 and mask [B, D] (True for real slices, which come first) -> [B, d], unit
    length. Padded slices pass through the ResNet and are dropped after it, which gives the same result in eval mode.
    """

    def __init__(self, joint: JointEncoder) -> None:
        super().__init__()
        self.joint = joint

    def forward(self, volumes: Tensor, mask: Tensor) -> Tensor:
        _, embedded = self.joint.slices(volumes.flatten(0, 1).unsqueeze(1))
        tokens = embedded.unflatten(0, mask.shape) * mask.unsqueeze(-1)
        return self.joint.holistic(tokens, mask)


class EncoderOutputs(nn.Module):
    """`GreyResNet`: images [N, 1, H, W] in 0..1 -> pooled features [N, C4] and its four maps."""

    def __init__(self, encoder: GreyResNet) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        stages = self.encoder(images)
        return pooled(stages), *stages


def program_file(joint: JointEncoder) -> bytes:
    """`VolumeEmbedding` through torch.export (.pt2): any batch, D from 5, H and W from 33 (torch fixes sizes of 1)."""
    volumes, mask = torch.rand(2, 9, 64, 64), torch.ones(2, 9, dtype=torch.bool)
    any_size = torch.export.Dim.AUTO
    shapes = {"volumes": dict.fromkeys(range(4), any_size), "mask": dict.fromkeys(range(2), any_size)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(VolumeEmbedding(joint).eval(), (volumes, mask), dynamic_shapes=shapes), file)
    return file.getvalue()


def onnx_file(encoder: GreyResNet) -> bytes:
    """`EncoderOutputs` as ONNX: input `images`, outputs `features` and `stage1` to `stage4`, any batch and size."""
    stages = [f"stage{i}" for i in range(1, 5)]
    spatial = {0: "batch", 2: "height", 3: "width"}
    sizes = {"images": spatial, "features": {0: "batch"}} | dict.fromkeys(stages, spatial)
    names = {"input_names": ["images"], "output_names": ["features", *stages], "dynamic_axes": sizes}
    example, file = torch.rand(2, 1, 64, 64), io.BytesIO()
    with warnings.catch_warnings():
        # The newer exporter needs onnxscript; this one writes the same graph for a ResNet.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(EncoderOutputs(encoder).eval(), (example,), file, dynamo=False, **names)
    return file.getvalue()


if __name__ == "__main__":
    options.main(main, Config, __doc__)
