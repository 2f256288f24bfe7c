"""What a run will cost on this machine, from a few of its own steps: `--dry_run N` of any training script."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datasets.cache import shown_size
from datasets.loaders import OneAhead
from training import memory
from utils import checkpoint, distributed, guards, signals
from utils.seeding import FILLING

WARM_UP = 3  # updates that are not counted, beside those whose batches the workers had in stock
PREFETCHED = 2  # batches that each data-loading worker keeps in stock


@dataclass
class Pass:
    """Some updates of one kind: how many epochs of the run are like them, and what they took."""

    epochs: int
    seconds: float = 0.0  # of an update
    waited: float = 0.0  # of them, for data
    samples: float = 0.0  # of an update, over all processes


def measure(training: Any) -> None:
    """Make `dry_run` real updates and print one table of the whole run; nothing is kept but the cache of the data.

    training: `training.train.Training`. All processes call it together.
    """
    config, loader = training.config, training.loader
    with tempfile.TemporaryDirectory(dir=_existing(training.folder)) as folder, signals.handled():
        training.folder = Path(folder)
        filling = _filling_seconds(training) if training.core.fills_memory else 0.0
        clustering = _seconds(training, lambda: memory.begin_full_epoch(training))
        cached = min(getattr(config, "cached_views", 0), config.epochs)
        passes = [Pass(cached), Pass(config.epochs - cached)]
        for first, part in zip((0, cached), passes, strict=True):
            if part.epochs:
                _updates(training, first, part)
        ending = _seconds(training, lambda: _finish(training))
        saving = _seconds(training, lambda: _save(training))
        size = (training.folder / checkpoint.LATEST).stat().st_size if training.run.is_main else 0
    updates = -(-loader.steps // config.accumulate)
    training_seconds = sum(part.epochs * updates * part.seconds for part in passes)
    total = filling + training_seconds + config.epochs * (clustering + ending + saving)
    if training.run.is_main:
        print(_table(training, passes, total, filling, clustering, ending + saving, size), flush=True)


def _updates(training: Any, epoch: int, part: Pass) -> None:
    """Measure updates from an epoch on: where views are cached, first while they are made, then while they are read."""
    parts, count = training.config.accumulate, training.config.dry_run
    epochs = (
        itertools.repeat(epoch)
        if training.config.stage == 2 and training.config.cached_views
        else itertools.count(epoch)
    )
    batches = OneAhead(batch for e in epochs for batch in training.loader.epoch(e))
    warm_up = WARM_UP + PREFETCHED * training.config.workers
    for step in range(warm_up + count):
        if step == warm_up:
            _wait(training)
            began, waited, samples = time.monotonic(), batches.waited, 0
        _, seen = training.update(batches, step * parts, parts)
        samples = samples + seen if step >= warm_up else 0
    _wait(training)
    part.seconds = (time.monotonic() - began) / count
    part.waited, part.samples = (batches.waited - waited) / count, samples / count


def _filling_seconds(training: Any) -> float:
    """Of the pass that fills the memory banks, from a few of its batches."""
    batches = OneAhead(training.loader.epoch(FILLING))
    count = min(WARM_UP + training.config.dry_run, training.loader.steps)
    training.core.train()
    training.statistics.remember()
    for step in range(count):
        if step == min(WARM_UP, count - 1):
            _wait(training)
            began, first = time.monotonic(), step
        with torch.no_grad(), training.precision.autocast():
            training.core.remember(batches.next)
        batches.step()
    _wait(training)
    training.statistics.restore()
    return (time.monotonic() - began) / (count - first) * training.loader.steps


def _finish(training: Any) -> None:
    """What ends an epoch beside its checkpoint."""
    training.monitor.finish(0, training.at.means())
    guards.require_equal_weights(training.core, "after the dry run")


def _save(training: Any) -> None:
    state = training.state()
    distributed.on_main(lambda: checkpoint.save(state, training.folder))


def _seconds(training: Any, action: Callable[[], None]) -> float:
    _wait(training)
    began = time.monotonic()
    action()
    _wait(training)
    return time.monotonic() - began


def _wait(training: Any) -> None:
    if training.run.device.type == "cuda":
        torch.cuda.synchronize(training.run.device)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there: on the disk that the run will write to."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _table(
    training: Any, passes: list[Pass], total: float, filling: float, clustering: float, ending: float, size: int
) -> str:
    config, loader, run = training.config, training.loader, training.run
    main = max(passes, key=lambda part: part.epochs)
    kept = 2 + (config.epochs - 1) // config.checkpoint_freq
    gradients = 4 * sum(p.numel() for p in training.core.parameters() if p.requires_grad)
    store = loader.dataset.store
    cache = sum(file.stat().st_size for file in store.files if file.exists())
    updates = -(-loader.steps // config.accumulate)
    rows = [
        ("whole run", _duration(total), f"{config.epochs} epochs of {updates} updates"),
        ("an update", f"{main.seconds:.3f} s", f"{main.samples / main.seconds:.3g} samples/s"),
        ("wait for data", f"{main.waited / main.seconds:.0%}", f"{config.workers} workers per process"),
        (
            "each epoch, beside updates",
            f"{clustering + ending:.1f} s",
            f"clustering {clustering:.1f} s, figures and checkpoint {ending:.1f} s",
        ),
        ("before the first epoch", f"{filling:.0f} s", "memory banks are filled" if filling else "nothing to do"),
        (
            "peak memory",
            f"{memory.peak_memory(run.device)[0] / 2**30:.2f} GiB",
            f"of a process on {run.device.type}, without its data-loading workers",
        ),
        ("cache", shown_size(cache), f"of the prepared data, in {store.folder}"),
        ("checkpoints", shown_size(kept * size), f"{kept} of {shown_size(size)}"),
        (
            "all-reduced per update",
            shown_size(gradients if run.world_size > 1 else 0),
            f"gradients; {run.world_size} process(es)",
        ),
    ]
    if config.stage == 2 and config.cached_views:
        first, later = passes
        rows.insert(
            2,
            (
                "cached views",
                f"{first.seconds:.3f} s",
                f"an update of the first {first.epochs} epochs; then {later.seconds:.3f} s",
            ),
        )
    width, middle = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    lines = [f"dry run: {config.dry_run} updates on {run.device.type}, {training.precision.name}; nothing was trained"]
    return "\n".join([*lines, *(f"  {a:<{width}}  {b:>{middle}}  {c}" for a, b, c in rows)])
