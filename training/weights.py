"""Weights in and out of the stages: layouts, complete loading or an error, and a record of what made a file."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.index import Sample, describe, fingerprint
from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, fold_grey, plain
from models.unet import UNetDecoder
from objectives.learners import Learner
from utils import checkpoint, files
from utils.config import commit, to_dict
from utils.distributed import rank
from utils.errors import UserError

MADE_BY = {
    "resnet_pretrained": "ssl_swav2D.py or ssl_deepcluster2D.py",
    "trans_pretrained": "mask_swav.py or mask_deepcluster.py",
}
WRAPPERS = ("state_dict", "model_state_dict", "model", "classy_state_dict", "base_model", "trunk")


def chosen(config: Any, option: str) -> Path | None:
    """The weights file that an option names; None for `none`. Raises UserError where there is no such file."""
    name = getattr(config, option, "none")
    path = Path(config.pretrained_path) / name
    if name == "none":
        return None
    if not path.is_file():
        raise UserError(
            f"{path}: no such weights file; run {MADE_BY[option]} first, or copy one there, or pass --{option} none to "
            "go on with random weights"
        )
    return path


def load_backbone(resnet: GreyResNet, config: Any) -> None:
    """Load `resnet_pretrained` from any known layout: torchvision, SwAV, DeepCluster-v2, VISSL, or ours.

    Heads and prototypes in the file are left out and counted. The name `none` loads nothing and says so where a stage
    builds on pre-trained weights. Raises UserError when the file is missing, unreadable, or any backbone tensor is
    absent or has another shape.
    """
    if path := chosen(config, "resnet_pretrained"):
        load_resnet(resnet, path)
    elif config.stage > 1:
        _say_random("slice encoder (ResNet)", "resnet_pretrained")


def load_resnet(resnet: GreyResNet, path: Path, remedy: str = "") -> None:
    """A ResNet from a file of any known layout. Raises UserError; remedy: what to do where there is no such file."""
    _load_grey(resnet, _unwrap(_read(path, remedy)), path)


def load_transformer(encoder: JointEncoder, config: Any) -> None:
    """Load `trans_pretrained`: stage 2's slice projection and transformer; the name `none` loads nothing and says so.

    Warns when stage 2 was trained on another ResNet than the one in `encoder`: its embeddings would mean nothing to
    this transformer. It is the same where no weight of the stems differs by more than 2^-10 of the largest, which is
    what storing either file in half precision may change. Raises UserError as `load_backbone` does.
    """
    path = chosen(config, "trans_pretrained")
    if not path:
        _say_random("projection and transformer", "trans_pretrained")
        return
    state = _read(path)
    _load_parts(encoder, state, path)
    ours = encoder.resnet.conv1.weight.detach().cpu()
    theirs = _below(state, "encoder.").get("conv1.weight")
    rounding = torch.finfo(torch.float16).eps * float(ours.abs().max())
    if theirs is None or not torch.allclose(fold_grey(theirs.float()), ours, rtol=0, atol=rounding):
        warnings.warn(f"{path} was trained on another ResNet than the one loaded here", stacklevel=2)


def load_mask_head(learner: nn.Module, config: Any) -> None:
    """Load stage 2's mask token and decoder into a learner that goes on predicting masked slices."""
    if path := chosen(config, "trans_pretrained"):
        state = _read(path)
        _load(learner.decoder, _below(state, "decoder."), path, " decoder.")
        with torch.no_grad():
            learner.mask_token.copy_(state["mask_token"])


def load_unet(decoder: UNetDecoder, path: Path) -> bool:
    """L_recon's decoder for another output: all but its head, f_inter's part where this one has it. False: no such."""
    state = _below(_read(path), "unet.")
    own = {f"{part}." for part in ("blocks", "from_inter") if getattr(decoder, part) is not None}
    for part in sorted(own) if state else ():
        _load(getattr(decoder, part[:-1]), _below(state, part), path, f" unet.{part}")
    return bool(state)


def joint_state(encoder: JointEncoder) -> dict[str, Tensor]:
    """Prefixes `encoder.` (torchvision layout), `projection.` and `transformer.`."""
    state = {f"encoder.{key}": value for key, value in encoder.resnet.torchvision_state().items()}
    for part in ("projection", "transformer"):
        state |= {f"{part}.{key}": plain(value) for key, value in getattr(encoder, part).state_dict().items()}
    return state


def save(learner: Learner, path: Path, record: dict[str, Any]) -> None:
    """The weights that a stage makes, and what made them beside them.

    Stage 1: flat torchvision state dict without `fc`.  Stage 2: `joint_state` with `mask_token` and `decoder.`.
    Stage 3: `joint_state`, with `unet.` where L_recon was on; beside it `*_encoder.pth`, the flat ResNet to copy
    downstream.
    """
    if learner.stage == 1:
        _save(learner.resnet.torchvision_state(), path, record)
        return
    state = joint_state(learner.encoder)
    if learner.stage == 2:
        state["mask_token"] = plain(learner.mask_token)
        state |= {f"decoder.{key}": plain(value) for key, value in learner.decoder.state_dict().items()}
    if getattr(learner, "unet", None) is not None:
        state |= {f"unet.{key}": plain(value) for key, value in learner.unet.state_dict().items()}
    _save(state, path, record)
    if learner.stage == 3:
        _save(learner.resnet.torchvision_state(), path.with_name(f"{path.stem}_encoder.pth"), record)


def load_joint(path: Path, dropout: float = 0.1) -> JointEncoder:
    """The encoder of a stage 2 or stage 3 file; architecture and width come from the `.json` beside it."""
    about = path.with_suffix(".json")
    try:
        made_by = json.loads(about.read_text())["config"]
        arch, d_model, layers = made_by["arch"], made_by["d_model"], made_by["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{about}: missing or damaged; it should say the arch, d_model and layers of {path.name}"
        ) from None
    attention = made_by.get("attention", "deformable")  # files of before there was a choice do not say
    encoder = JointEncoder(arch, d_model, layers, dropout, attention=attention)
    state = _read(path, "run mask_*.py or ssl_*3D.py first")
    _load_grey(encoder.resnet, _below(state, "encoder."), path, label=" encoder.")
    _load_parts(encoder, state, path)
    return encoder


def record(config: Any, samples: list[Sample], result: dict[str, float]) -> dict[str, Any]:
    """What stands in the `.json` beside a weights file: what made it, from which data, and what input it expects."""
    return {
        "config": to_dict(config),
        "data": {"summary": describe(samples).splitlines(), "fingerprint": fingerprint(samples)},
        "last_epoch": result,
        "input": {"range": [0, 1], "grey_mean": GREY_MEAN, "grey_std": GREY_STD},
        "commit": commit(),
        "torch": torch.__version__,
    }


def _say_random(what: str, option: str) -> None:
    if rank() == 0:
        why = f"{option} is none; {MADE_BY[option]} make pre-trained ones"
        print(f"{'!' * 20}\nWARNING: {what} start from RANDOM weights ({why})\n{'!' * 20}", flush=True)


def _below(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _read(path: Path, remedy: str = "") -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; {remedy}")
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


def _unwrap(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in the dictionaries that trainers wrap around them, without the prefix of the ResNet's names."""
    while not any(key.endswith("conv1.weight") for key in state):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    stems = [key for key in tensors if key.endswith("conv1.weight") and ".layer" not in f".{key}"]
    prefix = stems[0].removesuffix("conv1.weight") if stems else ""
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def _load_grey(resnet: GreyResNet, state: dict[str, Tensor], path: Path, label: str = "") -> None:
    """Load a stem for colour as one for grey; counters of BatchNorm's batches may be missing, as in old files."""
    stem = state.get("conv1.weight")
    if stem is not None and stem.dim() == 4 and stem.shape[1] == 3:
        state["conv1.weight"] = fold_grey(stem)
    _load(resnet, state, path, label)


def _load_parts(encoder: JointEncoder, state: dict[str, Tensor], path: Path) -> None:
    for part in ("projection", "transformer"):
        _load(getattr(encoder, part), _below(state, f"{part}."), path, f" {part}.")


def _load(module: nn.Module, state: dict[str, Tensor], path: Path, label: str) -> None:
    """All of a module, from a file that may hold other things beside it, which are counted."""
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    parts = {key.split(".")[0] for key in own}
    both = [key for key in own if key in state]
    wrong = [key for key in both if state[key].shape != own[key].shape]
    line = f"{path}{label}: matched {len(both) - len(wrong)}, missing {len(missing)}, unexpected {len(unexpected)}"
    problems = (
        [f"{key} is missing" for key in missing]
        + [f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}" for key in wrong]
        + [f"{key} has no place" for key in unexpected if key.split(".")[0] in parts]
    )
    if problems:
        raise UserError(f"{line}; {_some(problems)}. Were arch, d_model and layers the same when it was made?")
    if broken := [key for key in both if state[key].is_floating_point() and not state[key].isfinite().all()]:
        raise UserError(f"{path}: {_some(broken)} hold NaN or Inf; what made this file went wrong, take another")
    module.load_state_dict({key: state[key] for key in both}, strict=False)
    if rank() == 0:
        print(f"{line} ({_some(unexpected)})" if unexpected else line, flush=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _save(state: dict[str, Tensor], path: Path, record: dict[str, Any]) -> None:
    if rank() != 0:
        return
    checkpoint.write({key: value.contiguous() for key, value in state.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files.write_text(json.dumps({**record, "sha256": digest}, indent=2) + "\n", path.with_suffix(".json"))
    print(f"wrote {path}", flush=True)
