"""When a run may go on from a checkpoint, and where in its data it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from utils.config import to_dict
from utils.distributed import Run
from utils.errors import UserError


@dataclass
class Progress:
    """Where a run is, as far as it is not in weights, optimiser and objectives."""

    epoch: int = 0
    seen: int = 0  # samples of this epoch that all processes together have seen
    counted: int = 0  # those of them that entered `sums`: not those of skipped updates
    sums: dict[str, float] = field(default_factory=dict)  # of the losses of this epoch, times samples
    last: dict[str, float] = field(default_factory=dict)  # the means of the epoch before
    bad_steps: int = 0  # skipped updates of this epoch
    bad_in_a_row: int = 0

    def applied(self, means: dict[str, float], samples: int) -> None:
        """An update of so many samples was made."""
        self.bad_in_a_row, self.counted = 0, self.counted + samples
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * samples

    def means(self) -> dict[str, float]:
        """Of the losses of this epoch."""
        return {name: value / self.counted for name, value in self.sums.items()}

    def next_epoch(self) -> None:
        self.last = self.means()
        self.epoch, self.seen, self.counted, self.bad_steps, self.sums = self.epoch + 1, 0, 0, 0, {}


def check_same_run(state: dict[str, Any], config: Any, run: Run, data: str, folder: Path) -> str:
    """Raises UserError unless the run may go on with these options; what is said of another number of processes.

    Options whose field says `may_change` are free. Another number of processes is welcome, with the same batch on each
    or with the same global batch.  data: fingerprint of the files.
    """
    old, new = state["config"], to_dict(config)
    fixed = [f.name for f in dataclasses.fields(config) if not f.metadata.get("may_change")]
    changed = [f"{name}: {old.get(name)} -> {new[name]}" for name in fixed if old.get(name) != new[name]]
    before, now = (old["batch_size"], state["processes"]), (config.batch_size, run.world_size)
    batches = f"{before[0] * before[1]} -> {now[0] * now[1]}"
    if before[0] != now[0] and before[0] * before[1] != now[0] * now[1]:
        changed.append(f"batch_size: {before[0]} -> {now[0]} (x processes: {batches})")
    if state["data"] != data:
        changed.append("the files below data_path")
    if (state["epoch"], state["seen"]) > (config.epochs, 0):
        begun = state["epoch"] + (state["seen"] > 0)
        raise UserError(f"epochs: {folder} has begun {begun} epochs already, more than {config.epochs}")
    if changed:
        raise UserError(
            f"dump_path: {folder} holds a run made with other options ({'; '.join(changed)}); "
            "choose another --dump_path, or delete that folder to start again"
        )
    return "" if before[1] == now[1] else f"processes: {before[1]} -> {now[1]}, global batch: {batches}"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """A state that does not fit this version's modules is the user's to solve."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"dump_path: the checkpoint in {folder} does not fit this version of the project ({type(error).__name__}: "
            f"{str(error).split(chr(10))[0]}); go on with the version that wrote it, or choose another --dump_path"
        ) from None
