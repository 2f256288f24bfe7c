"""From a file to a network: all of its tensors or an error that says what the file is."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, fold_grey, wide
from training import layouts
from utils import tensors
from utils.distributed import rank
from utils.errors import UserError
from utils.files import read_json
from utils.options import ARCHITECTURES
from utils.tensors import Stored

RECORD_BYTES = 2**26  # of which a file that was trained on takes about 80


def imagenet(arch: str) -> Path:
    """torchvision's file of its default recipe, in torch's cache. Raises UserError where it is not there."""
    file = Path(torchvision.models.get_model_weights(arch).DEFAULT.url).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        fetch = f"fetch it with torchvision.models.{arch}(weights='DEFAULT'), or copy it there"
        raise UserError(f"weights: imagenet: {path} is not there, and nothing is downloaded here; {fetch}")
    return path


def load_resnet(resnet: GreyResNet, path: Path, remedy: str = "") -> None:
    """A ResNet from a file of any known layout (`training.layouts`), which may hold other things, too: see `LAYOUTS`.

    Of several networks the one is taken that its authors evaluate, and the others are named. Raises UserError when the
    file is missing (remedy: what to do then), unreadable, of another network, or any tensor of the ResNet is absent,
    misshapen or not finite. Warns where nothing says which intensities a stem for grey images was made for.
    """
    with reading(path, remedy) as state:
        network, others = network_in(state, path, resnet.arch)
        for_grey = network["conv1.weight"].shape[1] == 1  # a network of a known kind has a stem
        if for_grey and not read_record(path) and rank() == 0:
            warnings.warn(
                f"{path}: its stem takes one channel, and no .json beside it says which intensities it was made for; "
                f"here it gets (grey - {GREY_MEAN}) / {GREY_STD} of grey values in 0..1",
                stacklevel=2,
            )
        load(resnet, in_grey(resnet, network), path, others=others)


def read_record(path: Path) -> dict[str, Any] | None:
    """The `.json` beside a weights file, which says at least `arch` in `config`; None where there is none.

    Raises UserError where it does not say it.
    """
    about = path.with_suffix(".json")
    if not about.is_file() or about == path:
        return None
    try:
        if about.stat().st_size > RECORD_BYTES:
            raise ValueError
        record = read_json(about)
        if record["config"]["arch"] in ARCHITECTURES:
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{about}: damaged; it should say the arch of {path.name}: copy it again, or remove it")


def below(state: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """Those of these names, without the prefix."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


@contextlib.contextmanager
def reading(path: Path, remedy: str = "") -> Iterator[dict[str, Stored]]:
    """All tensors of a file by their full names, to be read in the block."""
    if not path.exists() and remedy:
        raise UserError(f"{path}: no such weights file; {remedy}")
    with tensors.opened(path) as content:
        try:
            state = tensors.flat(content)
        except ValueError as error:
            raise UserError(f"{path}: {error}; save the one that is wanted in a file of its own") from None
        if not state:
            raise UserError(f"{path}: holds no tensors; name a file of weights")
        yield state


def network_in(state: Mapping[str, Stored], path: Path, arch: str) -> tuple[layouts.Network, str]:
    """The ResNet of a file, and what is to be said where it holds several."""
    found = layouts.networks(state)
    if not found:
        raise UserError(f"{path}: holds {layouts.other(state)} ({_some(list(state))}); take the weights of a ResNet")
    taken = layouts.choose(found, arch)
    kind = layouts.kind(found[taken])
    if kind != arch and kind in ARCHITECTURES:
        about = read_record(path)
        remedy = f"{path.with_suffix('.json').name} says otherwise: copy both again" if about else f"add --arch {kind}"
        raise UserError(f"{path}: holds a {kind}, to be loaded as a {arch}; {remedy}")
    if kind != arch:
        raise UserError(f"{path}: holds {kind}, to be loaded as a {arch}; take one of {', '.join(ARCHITECTURES)}")
    names = {prefix: prefix.rstrip(".") or "the names without a prefix" for prefix in found}
    others = sorted(name for prefix, name in names.items() if prefix != taken)
    return found[taken], f"; taken: {names[taken]}, also there: {_some(others)}" * bool(others)


def in_grey(resnet: GreyResNet, network: layouts.Network) -> layouts.Network:
    """A stem for colour becomes one for grey."""
    stem, ours = network.get("conv1.weight"), tuple(resnet.conv1.weight.shape)
    if stem is None or stem.shape != (ours[0], 3, *ours[2:]):
        return network
    return network | {"conv1.weight": Stored(ours, lambda: fold_grey(wide(stem.read())))}


def require_fit(module: nn.Module, state: Mapping[str, Stored], path: Path, label: str = "") -> str:
    """What a file holds of a module and beside it, in a line. Raises UserError where tensors are missing or misshapen.

    Counters of BatchNorm's batches may be missing, as in old files.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    parts = {key.split(".")[0] for key in own}
    both = [key for key in own if key in state]
    wrong = [key for key in both if state[key].shape != tuple(own[key].shape)]
    line = f"{path}{label}: matched {len(both) - len(wrong)}, missing {len(missing)}, unexpected {len(unexpected)}"
    problems = (
        [f"{key} is missing" for key in missing]
        + [f"{key} is {state[key].shape} instead of {tuple(own[key].shape)}" for key in wrong]
        + [f"{key} has no place" for key in unexpected if key.split(".")[0] in parts]
    )
    if problems:
        raise UserError(f"{line}; {_some(problems)}. Were arch, d_model and layers the same when it was made?")
    return line + f" ({_some(unexpected)})" * bool(unexpected)


def load(module: nn.Module, state: Mapping[str, Stored], path: Path, label: str = "", others: str = "") -> None:
    """All of a module, from a file that may hold other things beside it. Raises UserError as `require_fit` does.

    Also where values are whole numbers, NaN or Inf. Nothing is read before all shapes are right.
    """
    line, own = require_fit(module, state, path, label), module.state_dict()
    values = {key: state[key].read() for key in own if key in state}
    if whole := [key for key, value in values.items() if own[key].is_floating_point() > value.is_floating_point()]:
        raise UserError(f"{path}: {_some(whole)} hold {values[whole[0]].dtype}, a quantised network; take the original")
    values = {key: value.to(own[key].dtype) for key, value in values.items()}
    if broken := [key for key, value in values.items() if not value.isfinite().all()]:
        raise UserError(f"{path}: {_some(broken)} hold NaN or Inf; what made this file went wrong, take another")
    module.load_state_dict(values, strict=False)
    if rank() == 0:
        print(line + others, flush=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
