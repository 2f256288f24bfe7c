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
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from downstream.encoders import has_transformer, load_encoder, load_joint_encoder
from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet
from training import exports
from utils import checkpoint
from utils import config as options
from utils.errors import UserError


@dataclass
class Config:
    weights: str
    """a file of ssl_*2D.py, mask_*.py or ssl_*3D.py, with the .json that stands beside it"""
    format: Literal["torchvision", "timm", "smp", "monai2d", "monai3d", "joint", "onnx", "all"] = "torchvision"
    """who shall load them; all: every format that these weights can have"""
    dest: str = "exports"
    """folder that receives <name>_<format>.* and the cards"""
    arch: str | None = None
    """ResNet of the weights; null: as their .json says"""
    channels: Literal[0, 1, 3] = 0
    """input channels of a plain ResNet; 3 expects the grey image three times; 0: 1 for MONAI, 3 for the others"""
    inflation: exports.Inflation = "centre"
    """2D kernels to 3D: in the middle of the depth, or spread over it (docs/EXPORTS.md)"""
    half: bool = False
    """state dicts in half precision, <name>_<format>_fp16.*: half the size, converted as they are loaded"""
    one_file: bool = False
    """of a state dict only the file that the card's lines load, instead of .pth and .safetensors"""


@dataclass(frozen=True)
class Target:
    """A library and the lines that load its file, in which {names} are filled in by `describe`."""

    library: str
    use: tuple[str, ...]
    channels: int = 3  # what the library's users expect
    dims: int = 2
    lacks_wide: bool = False  # no wide_resnet* there


HALF = (
    "Values are half precision (float16). `load_state_dict` into a float32 network, as above, converts them, and the "
    "network computes in float32; only `assign=True` would leave it in float16."
)
GREY_STEM = "resnet.conv1 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)"
MONAI_RESNET = (
    "resnet = monai.networks.nets.{arch}(spatial_dims={dims}, n_input_channels={channels}, conv1_t_stride=2, "
    "bias_downsample=False, feed_forward=False)"
)
LOAD_RESNET = 'resnet.load_state_dict(torch.load("{file}.pth", weights_only=True))'
PLAIN = {
    "torchvision": Target(
        "torchvision",
        ("resnet = torchvision.models.{arch}()", "resnet.fc = torch.nn.Identity()", LOAD_RESNET),
    ),
    "timm": Target(
        "timm",
        (
            'resnet = timm.create_model("{arch}", num_classes=0, in_chans={channels}, '
            'checkpoint_path="{file}.safetensors")',
        ),
    ),
    "smp": Target(
        "segmentation_models_pytorch",
        (
            'unet = segmentation_models_pytorch.Unet("{arch}", encoder_weights=None, in_channels={channels})',
            'unet.encoder.load_state_dict(torch.load("{file}.pth", weights_only=True))',
        ),
        lacks_wide=True,
    ),
    "monai2d": Target("monai", (MONAI_RESNET, LOAD_RESNET), channels=1, lacks_wide=True),
    "monai3d": Target("monai", (MONAI_RESNET, LOAD_RESNET), channels=1, dims=3, lacks_wide=True),
}
WHOLE = {
    "joint": Target(
        "torch",
        (
            'model = torch.export.load("{file}.pt2").module()',
            "embedding = model(volumes, mask)  # [B, D, H, W], [B, D] True for real slices -> [B, {width}]",
        ),
        channels=1,
    ),
    "onnx": Target(
        "onnxruntime",
        (
            'session = onnxruntime.InferenceSession("{file}.onnx")',
            '(features,) = session.run(["features"], {{"images": images}})  # float32 [N, 1, H, W] -> [N, {width}]',
        ),
        channels=1,
    ),
}
TARGETS = PLAIN | WHOLE


@dataclass(frozen=True)
class Source:
    """What is exported: a file, what stands in the `.json` beside it, and the networks in it, in eval mode."""

    path: Path
    record: dict[str, Any]
    encoder: GreyResNet
    joint: JointEncoder | None  # where the file holds a transformer; `encoder` is part of it

    @property
    def arch(self) -> str:
        return self.record["config"]["arch"]


def main(cfg: Config) -> None:
    source = read(cfg.weights, cfg.arch)
    dest = Path(cfg.dest)
    for name in TARGETS if cfg.format == "all" else [cfg.format]:
        reason = _cannot(name, source, cfg.half)
        if reason and cfg.format != "all":
            raise UserError(f"format: {reason}")
        if reason:
            print(f"{name}: left out; {reason}", flush=True)
            continue
        channels = (cfg.channels or TARGETS[name].channels) if name in PLAIN else 1
        file = dest / f"{source.path.stem}_{name}{'_fp16' * cfg.half}"
        try:
            dest.mkdir(parents=True, exist_ok=True)
            files = write(name, source, file, channels, cfg.inflation, cfg.half, cfg.one_file)
            write_card(describe(name, source, files, channels, cfg.inflation, cfg.half), file)
        except OSError as error:
            raise UserError(f"dest: {file} cannot be written ({error.strerror}); choose another folder") from None
        print(f"wrote {', '.join(map(str, files))}", flush=True)


def read(weights: str, arch: str | None = None) -> Source:
    """The networks in a weights file of this project. Raises UserError where the file or its `.json` is not right."""
    path = Path(weights)
    record = read_record(path)
    if has_transformer(weights):
        joint = load_joint_encoder(weights, arch).eval()
        return Source(path, record, joint.encoder, joint)
    return Source(path, record, load_encoder(weights, arch).eval(), None)


def read_record(path: Path) -> dict[str, Any]:
    """The `.json` beside a weights file. Raises UserError where it is missing, damaged or of other weights."""
    about = path.with_suffix(".json")
    if not path.is_file():
        raise UserError(f"weights: {path}: no such file; train one with ssl_*2D.py, mask_*.py or ssl_*3D.py")
    if not about.is_file():
        raise UserError(
            f"{about}: missing, so {path.name} was not written by this project's scripts, or was copied without it; "
            "a model card must say what made the weights. Copy both files"
        )
    try:
        record = json.loads(about.read_text(encoding="utf-8"))
        checksum, _ = record["sha256"], record["config"]["arch"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{about}: damaged; it should hold sha256 and config with arch. Copy it again") from None
    if checksum != _sha256(path):
        raise UserError(f"{about}: is of other weights than {path.name} (sha256 differs); copy both files again")
    return record


def write(
    name: str,
    source: Source,
    file: Path,
    channels: int,
    inflation: exports.Inflation,
    half: bool = False,
    one_file: bool = False,
) -> list[Path]:
    """Write one format to `file` and its suffixes; returns the files."""
    if name == "joint":
        exports.write_program(source.joint, file.with_name(f"{file.name}.pt2"))
        return [file.with_name(f"{file.name}.pt2")]
    if name == "onnx":
        exports.write_onnx(source.encoder, file.with_name(f"{file.name}.onnx"))
        return [file.with_name(f"{file.name}.onnx")]
    from safetensors.torch import save

    state = exports.plain_state(source.encoder, channels)
    if TARGETS[name].dims == 3:
        state = exports.inflate(state, inflation)
    if half:
        state = exports.halved(state)
    loaded = "".join(TARGETS[name].use)
    suffixes = [suffix for suffix in (".pth", ".safetensors") if not one_file or f"{{file}}{suffix}" in loaded]
    files = [file.with_name(file.name + suffix) for suffix in suffixes]
    for path in files:
        if path.suffix == ".pth":
            checkpoint.write(state, path)
        else:  # not with save_file, which leaves it readable for its owner alone
            path.write_bytes(save(state, metadata={"format": "pt"}))
    return files


def describe(
    name: str, source: Source, files: list[Path], channels: int, inflation: str, half: bool = False
) -> dict[str, Any]:
    """The card's content. It keeps the record's keys, so this project's loaders read an exported `.pth` too.

    Paths are left out: a card is passed on, and they tell nothing but how somebody's disk is organised.
    """
    target = TARGETS[name]
    width = source.joint.projection.out_features if name == "joint" else source.encoder.num_features
    filled = {"arch": source.arch, "channels": channels, "dims": target.dims, "file": files[0].stem, "width": width}
    use = [line.format(**filled) for line in target.use]
    if name == "torchvision" and channels == 1:
        use.insert(1, GREY_STEM)
    shape = {"joint": "[B, D, H, W]", "onnx": "[N, 1, H, W]", "monai3d": f"[N, {channels}, D, H, W]"}
    outside = f"outside: give (grey - {GREY_MEAN}) / {GREY_STD}" + ", the same in each channel" * (channels == 3)
    card = {
        "format": name,
        "library": target.library,
        "arch": source.arch,
        "dtype": "float16" if half else "float32",
        "use": use,
        "files": {file.name: _sha256(file) for file in files},
        "source": {"file": source.path.name, "sha256": source.record["sha256"]},
        "input": {
            "shape": shape.get(name, f"[N, {channels}, H, W]"),
            "range": [0, 1],
            "grey_mean": GREY_MEAN,
            "grey_std": GREY_STD,
            "normalise": "inside: give grey values in 0..1" if name in WHOLE else outside,
        },
        "licence": _licence(source.record),
        "not_to_expect": _limits(name, source),
    }
    if target.dims == 3:
        card["inflation"] = inflation
    config = {key: value for key, value in source.record["config"].items() if not key.endswith("_path")}
    return card | {k: v for k, v in source.record.items() if k not in (*card, "sha256")} | {"config": config}


def _licence(record: dict[str, Any]) -> str:
    starts = [record["config"].get(key) for key in ("resnet_pretrained", "trans_pretrained")]
    before = [name for name in starts if name and name != "none"]
    return (
        "The project's code is under the MIT licence. Weights are bound by the terms of the data they learned from"
        + (f" and of the weights they started from ({', '.join(before)})" if before else "")
        + "; see the data below before you pass them on."
    )


def _limits(name: str, source: Source) -> list[str]:
    limits = [
        "A diagnosis. Nothing here was tested on patients' outcomes and no output is a finding; fine-tune, and "
        "validate on your own patients, before anything depends on it.",
        "Knowledge of anything but the data named in this card: other organs, modalities, scanners and populations "
        "were not seen, nor was colour.",
        "Features that serve as they are: they were learned without labels, by telling images apart. Fine-tune them.",
        "A gain on every task: compare with random and ImageNet weights on yours (python -m downstream.compare).",
    ]
    if name in PLAIN and "d_model" in source.record["config"]:  # of stages 2 and 3
        limits.append("Relations between slices: the transformer over slices is not in this file, the ResNet alone is.")
    return limits


def write_card(card: dict[str, Any], file: Path) -> None:
    """The card for programs, <file>.json, and for people, <file>.md."""
    file.with_name(f"{file.name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    config = "\n".join(f"{key}: {json.dumps(value)}" for key, value in card["config"].items())
    data = card.get("data", {})
    imports = [name for name in ("torch", card["library"]) if any(f"{name}." in line for line in card["use"])]
    lines = [
        f"# {file.name}",
        "",
        f"{card['arch']}, self-supervised on medical images and volumes, for {card['library']} ({card['format']}).",
        "",
        "```python",
        f"import {', '.join(dict.fromkeys(imports))}",
        "",
        *card["use"],
        "```",
        "",
        f"Input: {card['input']['shape']} in 0..1 (0 and 1: the 0.5th and 99.5th percentile, or an intensity window). "
        f"Normalisation is {card['input']['normalise']}.",
        *([f"Kernels are inflated along D ({card['inflation']})."] if "inflation" in card else []),
        *([HALF] if card["dtype"] == "float16" else []),
        "",
        "| file | sha256 |",
        "|---|---|",
        *(f"| {name} | {digest} |" for name, digest in card["files"].items()),
        f"| made from {card['source']['file']} | {card['source']['sha256']} |",
        "",
        f"Licence: {card['licence']}",
        "",
        "## Trained on",
        "",
        f"Commit {card.get('commit', 'unknown')}, torch {card.get('torch', 'unknown')}. Data "
        f"(fingerprint {str(data.get('fingerprint', 'unknown'))[:12]}):",
        "",
        "```",
        *data.get("summary", ["unknown"]),
        "```",
        "",
        "Configuration:",
        "",
        "```yaml",
        config,
        "```",
        "",
        "## What not to expect",
        "",
        *(f"- {limit}" for limit in card["not_to_expect"]),
    ]
    file.with_name(f"{file.name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cannot(name: str, source: Source, half: bool = False) -> str | None:
    """Why these weights do not have this format."""
    if name == "joint" and source.joint is None:
        return f"{source.path} holds a ResNet alone; joint needs a file of mask_*.py or ssl_*3D.py"
    if half and name in WHOLE:
        return f"{name} is a program, which would compute in half precision too; leave --half out"
    if TARGETS[name].lacks_wide and source.arch.startswith("wide"):
        return f"{TARGETS[name].library} has no {source.arch}; torchvision and timm have"
    return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    options.main(main, Config, __doc__)
