"""Weights in and out of the stages: layouts, complete loading or an error, and a record of what made a file."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, fold_grey
from utils import checkpoint
from utils.config import to_dict
from utils.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "classy_state_dict", "base_model", "trunk")


def load_backbone(resnet: GreyResNet, path: Path, how_to_get: str) -> None:
    """Load a ResNet from any known layout: torchvision, official SwAV / DeepCluster-v2, VISSL trunk, or this project's.

    Heads and prototypes in the file are left out and counted. Raises UserError when the file is missing (with
    `how_to_get`), unreadable, or any backbone tensor is absent or has another shape.
    """
    state = _strip(_unwrap(_read(path, how_to_get)))
    own = resnet.state_dict()
    stem = state.get("conv1.weight")
    if stem is not None and stem.dim() == 4 and stem.shape[1] == 3:
        state["conv1.weight"] = fold_grey(stem)
    _load(resnet, state, path, ignore={k for k in own if k.endswith("num_batches_tracked")})


def load_part(module: nn.Module, path: Path, prefix: str, how_to_get: str) -> None:
    """Load the tensors below `prefix` of a stage 2 or stage 3 file into a module; all of them must be there."""
    state = _read(path, how_to_get)
    part = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    _load(module, part, path, label=prefix)


def read_flat(path: Path, how_to_get: str) -> dict[str, Tensor]:
    """A flat state dict as this project writes it."""
    return _read(path, how_to_get)


def save_resnet(resnet: GreyResNet, path: Path, about: dict[str, Any]) -> None:
    """Flat torchvision state dict without `fc`, and what made it beside it."""
    _save(resnet.torchvision_state(), path, about)


def joint_state(encoder: JointEncoder) -> dict[str, Tensor]:
    """Prefixes `encoder.` (torchvision layout), `projection.` and `transformer.`."""
    state = {f"encoder.{key}": value for key, value in encoder.encoder.torchvision_state().items()}
    for part in ("projection", "transformer"):
        tensors = getattr(encoder, part).state_dict()
        state |= {f"{part}.{key}": value.detach().cpu().clone() for key, value in tensors.items()}
    return state


def save_masked(learner: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """Stage 2: the joint encoder with `mask_token` and `decoder.`."""
    state = joint_state(learner.encoder)
    state["mask_token"] = learner.mask_token.detach().cpu().clone()
    state |= {f"decoder.{key}": value.detach().cpu().clone() for key, value in learner.decoder.state_dict().items()}
    _save(state, path, about)


def save_joint(encoder: JointEncoder, path: Path, about: dict[str, Any]) -> None:
    """Stage 3: the joint encoder, and beside it `*_encoder.pth`, the flat torchvision ResNet to copy downstream."""
    _save(joint_state(encoder), path, about)
    _save(encoder.encoder.torchvision_state(), path.with_name(f"{path.stem}_encoder.pth"), about)


def describe_run(config: Any, data: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What stands in the `.json` beside a weights file."""
    return {
        "config": to_dict(config),
        "data": data,
        "result": result,
        "input": {"range": [0, 1], "grey_mean": GREY_MEAN, "grey_std": GREY_STD},
        "commit": _commit(),
        "torch": torch.__version__,
    }


def _read(path: Path, how_to_get: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; {how_to_get}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as tensors only ({reason}). If it holds other Python objects and you trust its "
            "source, re-save its state dict: torch.save(torch.load(f, weights_only=False)['state_dict'], f)"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return state


def _unwrap(state: dict[str, Any]) -> dict[str, Any]:
    """Follow the dictionaries that trainers wrap around a state dict."""
    while not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    return state


def _strip(state: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors only, without the prefix under which the ResNet stands."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    stems = [key for key in tensors if key.endswith("conv1.weight") and ".layer" not in f".{key}"]
    prefix = stems[0].removesuffix("conv1.weight") if stems else ""
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def _load(
    module: nn.Module, state: dict[str, Tensor], path: Path, ignore: set[str] | None = None, label: str = ""
) -> None:
    own = module.state_dict()
    missing = [key for key in own if key not in state and key not in (ignore or set())]
    unexpected = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    matched = sum(key in state for key in own) - len(wrong)
    named = f" ({_some(unexpected)})" if unexpected else ""
    line = f"{path} {label}: matched {matched}, missing {len(missing)}, unexpected {len(unexpected)}{named}"
    if missing or wrong:
        found = [f"{k} is {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in wrong]
        detail = "; ".join([f"missing {_some(missing)}"] * bool(missing) + [_some(found)] * bool(found))
        raise UserError(f"{line}, wrong shape {len(wrong)}: {detail}. Were arch and d_model the same when it was made?")
    module.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    print(line, flush=True)


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _save(state: dict[str, Tensor], path: Path, about: dict[str, Any]) -> None:
    checkpoint.write({key: value.contiguous() for key, value in state.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({**about, "sha256": digest}, indent=2) + "\n")


def _commit() -> str:
    """The repository's commit, `unknown` outside git; `+changes` when the working tree differs from it."""
    root = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+changes" if changed else "")
