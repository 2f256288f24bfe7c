"""What a run costs on this machine, from its own updates: hours and sizes (`--dry_run`), the largest batch that fits
(`--fit_batch`). Neither trains; only the cache of the data stays."""

from __future__ import annotations

import gc
import inspect
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from datasets.cache import shown_size
from datasets.workers import PREFETCHED, OneAhead
from training import scripts
from utils import checkpoint, distributed, files, guards, signals
from utils.errors import UserError

GIB = 2**30
WARM_UP = 3  # updates that are not counted, beside those whose batches the workers had in stock
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
STEPS = 3  # of a probe: the first has no momenta, the second makes them, the third finds all in place
SPARE = 0.9  # share of the free memory of a CPU that a probe may need

# ---- --dry_run


class Update(NamedTuple):
    """What an update takes."""

    seconds: float = 0.0
    waited: float = 0.0  # of them, for data
    samples: float = 0.0  # over all processes


def dry_run(training: Any) -> None:
    """Make `dry_run` real updates of a `training.train.Training` and print one table of the whole run.

    All processes call it together. The pass that fills memory banks, less than an epoch, is not in it.
    """
    config, loader, folder = training.config, training.loader, training.folder.absolute()
    disk = next(place for place in (folder, *folder.parents) if place.is_dir())  # that the run will write to
    with files.writing(disk):
        place = tempfile.TemporaryDirectory(dir=disk)
    with place as temporary, signals.handled():
        training.folder = Path(temporary)
        clustering = _seconds(training, lambda: begin_full_epoch(training))
        cached = min(getattr(config, "cached_views", 0), config.epochs)
        first = _update(training, 0) if cached else Update()
        later = _update(training, cached) if cached < config.epochs else first
        ending = _seconds(training, lambda: _end_epoch(training))
        size = (training.folder / checkpoint.LATEST).stat().st_size if training.run.is_main else 0
    updates = -(-loader.steps // config.accumulate)
    total = updates * (cached * first.seconds + (config.epochs - cached) * later.seconds)
    total += config.epochs * (clustering + ending)
    if training.run.is_main:
        rows = [("whole run", _duration(total), f"{config.epochs} epochs of {updates} updates")]
        if cached:
            rows.append(("cached views", f"{first.seconds:.3f} s", f"an update of the first {cached} epochs"))
        rows += _table(training, later, size)
        rows += [
            ("clustering", f"{clustering:.1f} s", "at the start of each epoch"),
            ("figures and checkpoint", f"{ending:.1f} s", "at the end of each epoch"),
        ]
        width, middle = (max(len(row[column]) for row in rows) for column in (0, 1))
        print(
            f"dry run: {config.dry_run} updates on {training.run.device.type}, {training.precision.name}; nothing was "
            "trained",
            *(f"  {what:<{width}}  {value:>{middle}}  {about}" for what, value, about in rows),
            sep="\n",
            flush=True,
        )


def _table(training: Any, update: Update, size: int) -> list[tuple[str, str, str]]:
    """Rows of an update, and of what the run needs room for; size: bytes of a checkpoint."""
    config, run, store = training.config, training.run, training.loader.dataset.store
    kept = 2 + (config.epochs - 1) // config.checkpoint_freq
    gradients = 4 * sum(p.numel() for p in training.core.parameters() if p.requires_grad)
    return [
        ("an update", f"{update.seconds:.3f} s", f"{update.samples / update.seconds:.3g} samples/s"),
        ("wait for data", f"{update.waited / update.seconds:.0%}", f"{config.workers} workers per process"),
        ("peak memory", shown_size(peak_memory(run.device)), f"of a process on {run.device.type}, without its workers"),
        ("cache", shown_size(sum(f.stat().st_size for f in store.files if f.exists())), f"in {store.folder}"),
        ("checkpoints", shown_size(kept * size), f"{kept} of {shown_size(size)}"),
        ("all-reduced", shown_size(gradients * (run.world_size > 1)), f"per update; {run.world_size} process(es)"),
    ]


def _update(training: Any, epoch: int) -> Update:
    """An update from an epoch on: where views are cached, first while they are made, then while they are read."""
    parts, count = training.config.accumulate, training.config.dry_run
    epochs = itertools.repeat(epoch) if getattr(training.config, "cached_views", 0) else itertools.count(epoch)
    batches = OneAhead(batch for e in epochs for batch in training.loader.epoch(e))
    warm_up = WARM_UP + PREFETCHED * training.config.workers
    for step in range(warm_up):
        training.update(batches, step * parts, parts)
    _wait(training)
    began, waited = time.monotonic(), batches.waited
    samples = sum(training.update(batches, (warm_up + i) * parts, parts)[1] for i in range(count))
    _wait(training)
    return Update((time.monotonic() - began) / count, (batches.waited - waited) / count, samples / count)


def _end_epoch(training: Any) -> None:
    training.monitor.finish(0, training.at.means())
    guards.require_equal_weights(training.core, "after the dry run")
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


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


# ---- --fit_batch


def fit_batch(training: Any) -> None:
    """Say the largest batch_size whose updates need at most `fit_batch` GiB, of what is free on this machine.

    training: `training.train.Training`. Every batch size is tried in a process of its own, which builds what the script
    builds and makes real updates: on a GPU its memory is what disappears from the card, on a CPU the most that was
    resident. Memory of data-loading processes comes on top. Raises UserError where there are several processes, or
    nothing fits.
    """
    config, device = training.config, training.run.device
    if training.run.world_size > 1:
        raise UserError("fit_batch: start the script without torchrun; what fits in one process fits in each of many")
    free, most = free_memory(device), training.loader.samples
    limit = min(config.fit_batch * GIB, free * SPARE if device.type == "cpu" else free)
    print(f"fit_batch: looking for the largest batch_size within {limit / GIB:.3g} GiB on {device.type}", flush=True)

    def probe(batch_size: int) -> int | None:
        used = measure(type(training), replace(config, batch_size=batch_size), free)
        print(f"  batch_size {batch_size}: {'does not fit' if used is None else f'{used / GIB:.2f} GiB'}", flush=True)
        return used

    largest, used = search(probe, limit, most)
    if not largest:
        recompute = ", or --recompute true" if config.stage != 2 else ""
        raise UserError(f"fit_batch: not even one sample fits; use a smaller view or --arch{recompute}")
    bound = " (the data have no more samples)" if largest == most else ""
    print(
        f"fit_batch: --batch_size {largest}{bound} needs {used[largest] / GIB:.2f} of {limit / GIB:.3g} GiB. "
        "Nothing was trained.",
        flush=True,
    )


def search(probe: Callable[[int], int | None], limit: float, most: int) -> tuple[int, dict[int, int]]:
    """The largest batch size up to `most` that needs at most `limit` bytes, 0: none; and the bytes of all that ran.

    probe: batch size -> bytes, None where the machine had not enough.
    """
    used: dict[int, int] = {}
    fits, too_large, size = 0, most + 1, 1
    while fits + 1 < too_large:
        needs = probe(size)
        if needs is not None:
            used[size] = needs
        if needs is None or needs > limit:
            too_large = size
        else:
            fits = size
        size = min(2 * fits, (fits + too_large) // 2)
    return fits, used


def measure(make: Callable[..., Any], config: Any, free: int = 0) -> int | None:
    """Bytes that a few updates need, in a process of their own; None where it ran out of memory.

    make: `training.train.Training`.  config: of one of the training scripts.  free: bytes of the GPU.
    """
    script = Path(inspect.getfile(type(config))).stem
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        try:
            return processes.submit(needs, make, script, vars(config), free).result()
        except BrokenProcessPool:  # killed by the system
            return None
        except RuntimeError as error:
            if any(text in str(error) for text in OUT_OF_MEMORY):
                return None
            raise


def needs(make: Callable[..., Any], script: str, values: dict[str, Any], free: int) -> int:
    """Bytes at the peak of a few updates of what the script builds."""
    module = scripts.load(script)
    config = module.Config(**values)
    run = distributed.start(config.device, config.seed)
    loader = module.data(config, run)
    training = make(module.model(config, loader.counts), loader, config, run)
    begin_full_epoch(training)
    batches = OneAhead(batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    for step in range(STEPS):
        training.update(batches, step, config.accumulate)
    _wait(training)
    return free - torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else peak_memory(run.device)


# ---- both


def begin_full_epoch(training: Any) -> None:
    """An epoch that has all that takes memory and time: queues in use, k-means over full banks (of random points)."""
    for _, objective in training.core.objectives():
        if objective.fills_memory:
            crops, samples, dim = objective.assign_crops, objective.bank.samples, objective.bank.embeddings.shape[2]
            embeddings = F.normalize(torch.randn(crops, samples, dim), dim=2)
            objective.bank.load({"embeddings": embeddings, "seen": torch.ones(samples, dtype=torch.bool)})
    gc.collect()
    training.core.begin_epoch(training.config.epochs)
    training.learner.train()


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: reserved on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had resident when it started this process
        return _kib(status, "VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int:
    """Bytes that a new process could take; of a CPU, on Linux alone."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kib(Path("/proc/meminfo"), "MemAvailable:")


def _kib(file: Path, name: str) -> int:
    """A line of Linux's files of sizes, in bytes."""
    return 1024 * int(next(text.split()[1] for text in file.read_text().splitlines() if text.startswith(name)))
