"""Data-loading processes: started where there is room for them, read with signals obeyed, ended with the run."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from datasets.batch import Batch
from datasets.cache import shown_size
from datasets.samplers import CyclingBatches, EpochBatches
from utils import signals
from utils.distributed import everywhere
from utils.errors import UserError
from utils.profile import span

SHM = Path("/dev/shm")  # where batches lie on their way from the workers, on Linux
PREFETCHED = 2  # batches that each data-loading worker keeps in stock
DESCRIPTORS = 16, 64  # open files for each worker and its stock, and for all else
GRACE = 20.0  # seconds in which a batch may still come after a signal; torchrun kills after 30


class OneAhead:
    """Batches of which the next is always in hand: made while the device still computes. Counts the wait for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.waited = batches, 0.0
        self.step()

    def step(self) -> None:
        began = time.monotonic()
        with span("data"):
            self.next = next(self.batches, None)
        self.waited += time.monotonic() - began


def torch_loader(
    dataset: Dataset,
    batches: EpochBatches | CyclingBatches,
    cfg: Any,
    device: torch.device,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader:
    """A DataLoader whose `cfg.workers` live from one epoch to the next; its batches come by `read`.

    All processes call it together. Raises UserError on all where one has too little room for batches on their way.
    """
    workers = cfg.workers
    if workers:
        everywhere(lambda: _require_room(batches.batch_size * dataset.bytes_each, workers))
        atexit.register(_kill_workers)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCHED if workers else None,
        timeout=60 * cfg.timeout_minutes if workers else 0,
        worker_init_fn=_leave_signals_to_the_trainer,
        collate_fn=collate,
    )


def read(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader. A signal ends a wait that does not end; what went wrong in a worker is one UserError."""
    try:
        batches = iter(loader)
        while True:
            with signals.patient(GRACE):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
    except UserError as error:  # its text, from a worker, follows that worker's traceback
        raise UserError(str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2].strip()) from None
    except (RuntimeError, OSError) as error:
        text = str(error).strip()
        if not loader.num_workers or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = next((what for mark, what in _WORKER_FAULTS.items() if mark in text), None)
        if reason is None:
            raise
        raise UserError(f"workers: {text.splitlines()[-1]} ({reason})") from error


_WORKER_FAULTS = {  # what a text of torch or the system means
    "DataLoader worker (": "probably too little memory: lower --workers or --batch_size",
    "DataLoader timed out": "no batch came within --timeout_minutes: see whether the disk answers, or --workers 0",
    "shared memory": f"{SHM} is full: enlarge it (docker run --shm-size=8g), lower --workers, or --workers 0",
    "Too many open files": "raise the limit (ulimit -n 4096), lower --workers, or --workers 0",
    "received 0 items of ancdata": "too few open files: raise the limit (ulimit -n 4096), or --workers 0",
    "Cannot allocate memory": "too little memory: lower --workers or --batch_size",
    "Resource temporarily unavailable": "too many processes: lower --workers, or raise the limit (ulimit -u)",
}


def _require_room(size: int, workers: int) -> None:
    """Raises UserError where the stock of workers, batches of `size` bytes, has no room: it would never come."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = size * (workers * PREFETCHED + 1) * processes
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else need
    if need > free:
        raise UserError(
            f"workers: batches of {workers} workers in each of {processes} process(es) need {shown_size(need)} of "
            f"shared memory, but {SHM} has {shown_size(free)} free; enlarge it (docker run --shm-size=8g), lower "
            "--workers or --batch_size, or read in the training process itself with --workers 0"
        )
    limit, files = resource.getrlimit(resource.RLIMIT_NOFILE)[0], DESCRIPTORS[0] * workers + DESCRIPTORS[1]
    if files > limit != resource.RLIM_INFINITY:
        raise UserError(
            f"workers: {workers} workers need about {files} open files, but the limit is {limit}; raise it "
            "(ulimit -n 4096), lower --workers, or read in the training process itself with --workers 0"
        )


def _leave_signals_to_the_trainer(_: int) -> None:
    """torchrun and Ctrl-C signal the whole process group: a worker that died of it would tear the last step down."""
    for number in signals.STOPS:
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """At the end of the trainer, which would wait for ever for workers that it asks by a signal that they ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their death for a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
