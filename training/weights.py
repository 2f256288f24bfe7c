"""Weights in and out of the stages: layouts, complete loading or an error, and a record of what made a file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from datasets.index import Sample, describe, fingerprint
from datasets.origins import origin
from models.encoder import JointEncoder
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, plain
from models.transformer import Attention
from models.unet import UNetDecoder
from objectives.learners import Learner
from training import loading
from utils import files
from utils.config import commit, to_dict
from utils.distributed import rank
from utils.errors import UserError
from utils.tensors import Stored

MADE_BY = {
    "resnet_pretrained": "ssl_swav2D.py or ssl_deepcluster2D.py",
    "trans_pretrained": "mask_swav.py or mask_deepcluster.py",
}
TRANSFORMER = ("projection", "transformer")  # parts of a `JointEncoder` beside its ResNet


def check(config: Any) -> None:
    """Raises UserError, before any long work, for weights that cannot be loaded, and results that cannot be written."""
    given = check_sources(config)
    results = targets(config)
    if len(set(results)) < len(results):
        raise UserError(f"checkpoint_name: {results[0].name} would be overwritten by its own record; end it in .pth")
    for option, path in given.items():
        if os.path.realpath(path) in map(os.path.realpath, results):
            raise UserError(f"checkpoint_name: {results[0].name} would overwrite {option} {path}; choose another name")
    for result in results:
        if result.is_dir():
            raise UserError(f"checkpoint_name: {result} is a folder; choose another name")
    above = next(folder for folder in results[0].absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"pretrained_path: {above} is no folder that can be written to; choose another")


def check_sources(config: Any) -> dict[str, Path]:
    """Option -> weights to start from. Raises UserError where they do not fit by their names and shapes."""
    given = {option: path for option in MADE_BY if (path := chosen(config, option))}
    if path := given.get("resnet_pretrained"):
        with loading.reading(path) as state:
            loading.network_in(state, path, config.arch)
    if path := given.get("trans_pretrained"):
        with loading.reading(path) as state:
            if not loading.below(state, "transformer."):
                made_by = MADE_BY["trans_pretrained"]
                raise UserError(f"{path}: holds no transformer over slices; name a file of {made_by}")
    return given


def targets(config: Any) -> list[Path]:
    """The files that `save` writes: weights and their records."""
    path = Path(config.pretrained_path) / config.checkpoint_name
    weights = [path, *[encoder_of(path)] * (config.stage == 3)]
    return [file for path in weights for file in (path, path.with_suffix(".json"))]


def encoder_of(path: Path) -> Path:
    """Of a file of stage 3, the one beside it that holds the ResNet alone."""
    return path.with_name(f"{path.stem}_encoder.pth")


def chosen(config: Any, option: str) -> Path | None:
    """The weights file that an option names; None for `none`. Raises UserError where there is no such file."""
    name = getattr(config, option, "none")
    path = Path(config.pretrained_path) / name
    if name == "none":
        return None
    if (option, name) == ("resnet_pretrained", "imagenet"):
        return loading.imagenet(config.arch)
    if not path.exists():
        raise UserError(
            f"{path}: no such weights file; run {MADE_BY[option]} first, or copy one there, or pass --{option} none to "
            "go on with random weights"
        )
    return path


def load_backbone(resnet: GreyResNet, config: Any) -> None:
    """Load `resnet_pretrained`: see `loading.load_resnet`, or `imagenet`.

    The name `none` loads nothing and says so where a stage builds on pre-trained weights.
    """
    if path := chosen(config, "resnet_pretrained"):
        loading.load_resnet(resnet, path)
    elif config.stage > 1:
        _say_random("slice encoder (ResNet)", "resnet_pretrained")


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
    with loading.reading(path) as state:
        for part in TRANSFORMER:
            loading.load(getattr(encoder, part), loading.below(state, f"{part}."), path, f" {part}.")
        ours = encoder.resnet.conv1.weight.detach().cpu()
        theirs = loading.in_grey(encoder.resnet, loading.below(state, "encoder.")).get("conv1.weight")
        rounding = torch.finfo(torch.float16).eps * float(ours.abs().max())
        same = theirs and theirs.shape == ours.shape
        if not (same and torch.allclose(theirs.read().float(), ours, rtol=0, atol=rounding)) and rank() == 0:
            warnings.warn(f"{path} was trained on another ResNet than the one loaded here", stacklevel=2)


def load_mask_head(learner: nn.Module, config: Any) -> None:
    """Load stage 2's mask token and decoder into a learner that goes on predicting masked slices."""
    if path := chosen(config, "trans_pretrained"):
        load_head(learner, path)


def load_head(learner: nn.Module, path: Path) -> None:
    """A file's mask token and decoder of masked slices. UserError where it has none."""
    with loading.reading(path) as state:
        loading.load(learner.decoder, loading.below(state, "decoder."), path, " decoder.")
        token = {name: value for name, value in state.items() if name == "mask_token"}
        loading.load(nn.ParameterDict({"mask_token": learner.mask_token}), token, path, " ")


def load_unet(decoder: UNetDecoder, path: Path) -> bool:
    """L_recon's decoder for another output: all but its head, f_inter's part where this one has it. False: no such."""
    with loading.reading(path) as everything:
        state = loading.below(everything, "unet.")
        parts = [part for part in ("blocks", "from_inter") if getattr(decoder, part) is not None]
        for part in parts if state else ():
            loading.load(getattr(decoder, part), loading.below(state, f"{part}."), path, f" unet.{part}.")
    return bool(state)


def joint_state(encoder: JointEncoder) -> dict[str, Tensor]:
    """Prefixes `encoder.` (torchvision layout), `projection.` and `transformer.`."""
    state = {f"encoder.{key}": value for key, value in encoder.resnet.torchvision_state().items()}
    for part in TRANSFORMER:
        state |= {f"{part}.{key}": plain(value) for key, value in getattr(encoder, part).state_dict().items()}
    return state


def save(learner: Learner, path: Path, record: dict[str, Any]) -> None:
    """The weights that a stage makes, and what made them beside them.

    Stage 1: flat torchvision state dict without `fc`.  Stage 2: `joint_state` with `mask_token` and `decoder.`.
    Stage 3: `joint_state`, with `unet.` where L_recon was on; beside it `*_encoder.pth`, the flat ResNet to copy
    downstream.
    """
    resnet = learner.resnet.torchvision_state()
    if learner.stage == 1:
        _save({path: resnet}, record)
        return
    state = joint_state(learner.encoder)
    if learner.stage == 2:
        state["mask_token"] = plain(learner.mask_token)
        state |= {f"decoder.{key}": plain(value) for key, value in learner.decoder.state_dict().items()}
    if getattr(learner, "unet", None) is not None:
        state |= {f"unet.{key}": plain(value) for key, value in learner.unet.state_dict().items()}
    _save({path: state} | ({encoder_of(path): resnet} if learner.stage == 3 else {}), record)


def load_joint(path: Path, dropout: float = 0.1) -> JointEncoder:
    """The encoder of a stage 2 or stage 3 file; architecture and attention come from the `.json` beside it."""
    with loading.reading(path, "run mask_*.py or ssl_*3D.py first") as state:
        about = path.with_suffix(".json")
        if not (record := loading.read_record(path)):
            raise UserError(f"{about}: missing; it should say the arch, d_model and layers of {path.name}")
        made_by = {"attention": "deformable"} | record["config"]  # files of before there was a choice do not say
        layers = len({name.split(".")[2] for name in state if name.startswith("transformer.layers.")})
        width = state["projection.weight"].shape[0] if "projection.weight" in state else 0
        if (made_by.get("d_model"), made_by.get("layers")) != (width, layers):
            raise UserError(
                f"{about}: is of other weights than {path.name}, which holds d_model {width} and layers {layers}; copy "
                "both files again, or name a file of mask_*.py or ssl_*3D.py"
            )
        if (attention := made_by["attention"]) not in get_args(Attention):
            raise UserError(f"{about}: attention {attention!r} is none of {', '.join(get_args(Attention))}")
        build = partial(JointEncoder, made_by["arch"], width, layers, dropout, attention=attention)
        with torch.device("meta"):
            _parts(build(), state, path, loading.require_fit)  # before anything of these sizes is made
        encoder = build()
        _parts(encoder, state, path, loading.load)
    return encoder


def _parts(encoder: JointEncoder, state: Mapping[str, Stored], path: Path, do: Callable[..., Any]) -> None:
    """Do something with each part of an encoder and its tensors."""
    do(encoder.resnet, loading.in_grey(encoder.resnet, loading.below(state, "encoder.")), path, " encoder.")
    for part in TRANSFORMER:
        do(getattr(encoder, part), loading.below(state, f"{part}."), path, f" {part}.")


def record(config: Any, samples: list[Sample], result: dict[str, float]) -> dict[str, Any]:
    """What stands in the `.json` beside a weights file: what made it, from which data, and what input it expects."""
    return {
        "config": to_dict(config),
        "data": {
            "summary": describe(samples).splitlines(),
            "fingerprint": fingerprint(samples),
            "files": [origin(sample.path) for sample in samples],  # name, sha256, patient
        },
        "last_epoch": result,
        "input": {"range": [0, 1], "grey_mean": GREY_MEAN, "grey_std": GREY_STD},
        "commit": commit(),
        "torch": torch.__version__,
    }


def _say_random(what: str, option: str) -> None:
    if rank() == 0:
        why = f"{option} is none; {MADE_BY[option]} make pre-trained ones"
        print(f"{'!' * 20}\nWARNING: {what} start from RANDOM weights ({why})\n{'!' * 20}", flush=True)


def encoded(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as torch.save writes it (.pth)."""
    file = io.BytesIO()
    torch.save({key: value.contiguous() for key, value in state.items()}, file)
    return file.getvalue()


def _save(states: Mapping[Path, dict[str, Tensor]], record: dict[str, Any]) -> None:
    """Files and their records, all or none."""
    if rank() != 0:
        return
    contents = {path: encoded(state) for path, state in states.items()}
    records = {
        path.with_suffix(".json"): json.dumps({**record, "sha256": hashlib.sha256(data).hexdigest()}, indent=2) + "\n"
        for path, data in contents.items()
    }
    files.write_together(contents | {path: text.encode() for path, text in records.items()}, last=records)
    for path in contents:
        print(f"wrote {path}", flush=True)
