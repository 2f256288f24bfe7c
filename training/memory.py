"""How large a batch fits: the memory of real training steps at a few batch sizes, and the line through them."""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from datasets.loaders import OneAhead
from training import scripts
from utils import config as options
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
GIB = 2**30
PROBE = "JOINT_SSL_MEMORY_PROBE"  # environment variable: this process measures one batch size
FOUND = "memory probe: "  # begins the line in which such a process says what it needed
OUT_OF_MEMORY = (  # what torch says; CUDA's libraries may be the first to meet a full card
    "OutOfMemoryError",
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
STEPS = 3  # the first has no gradients and momenta of one before, the second has all, the third finds them in place
MOST_PROBES = 14  # batch sizes that are tried at most
SPARE = 0.9  # share of the free memory that a probe may be expected to need


@dataclass(frozen=True)
class Fit:
    """The largest batch size within a limit; memory as a function of the batch is base + per_sample * batch (bytes)."""

    batch_size: int  # 0: not even one sample fits
    measured: bool  # that batch size was run; otherwise the line says so
    base: float
    per_sample: float
    points: dict[int, int]  # batch size -> bytes, of those that ran

    def predict(self, batch_size: int) -> float:
        return self.base + self.per_sample * batch_size


def fit_batch(training: Any) -> None:
    """Say the largest batch_size whose step needs at most `fit_batch` GiB; nothing is trained or written.

    training: `training.train.Training`. Every batch size is tried in a process of its own, which builds what the script
    builds and makes real updates. On a GPU its memory is what the allocator reserved at most, and the context; on a CPU
    the most that was resident. Memory of data-loading processes comes on top. Raises UserError where there are several
    processes, or nothing fits.
    """
    config, device = training.config, training.run.device
    if os.environ.get(PROBE):
        print(f"{FOUND}{json.dumps(_peak(training))}", flush=True)
        return
    if training.run.world_size > 1:
        raise UserError("fit_batch: start the script without torchrun; what fits in one process fits in each of many")
    limit, most = config.fit_batch * GIB, training.loader.samples
    before = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    print(f"fit_batch: looking for the largest batch_size within {config.fit_batch:g} GiB on {device.type}", flush=True)

    def probe(batch_size: int) -> int | None:
        used = measure(config, batch_size, before)
        print(f"  batch_size {batch_size}: {'does not fit' if used is None else f'{used / GIB:.2f} GiB'}", flush=True)
        return used

    fit = search(probe, limit, most, free_memory(device))
    if not fit.batch_size:
        recompute = ", or --recompute true" if config.stage != 2 else ""
        raise UserError(
            f"fit_batch: one sample needs {fit.predict(1) / GIB:.2f} GiB, more than {config.fit_batch:g}; use a "
            f"smaller view or --arch{recompute}"
        )
    how = "measured" if fit.measured else "extrapolated"
    used = fit.points.get(fit.batch_size, fit.predict(fit.batch_size))
    bound = f"; the data have no more than {most} samples" if fit.batch_size == most else ""
    print(
        f"fit_batch: --batch_size {fit.batch_size} needs {used / GIB:.2f} of "
        f"{config.fit_batch:g} GiB ({how}; {fit.base / GIB:.2f} GiB + {fit.per_sample / GIB:.4f} per sample{bound}). "
        "Nothing was trained.",
        flush=True,
    )


def search(probe: Callable[[int], int | None], limit: float, most: int, available: float) -> Fit:
    """The largest batch size up to `most` that needs at most `limit` bytes.

    probe: batch size -> bytes, None where the machine had not enough.  available: bytes that a probe may take; a
    batch size expected to need more is not run, and the answer is then read from the line through those that were.
    """
    room = min(limit, available * SPARE)
    points: dict[int, int] = {}
    too_large = most + 1  # the smallest batch size known not to fit

    def run(batch_size: int) -> None:
        nonlocal too_large
        used = probe(batch_size)
        if used is not None:
            points[batch_size] = used
        if used is None or used > limit:
            too_large = min(too_large, batch_size)

    run(1)
    size = 2
    # Doubling until the batch, and no longer what every step needs, makes up most of the memory.
    while size < too_large and 1 in points and points[1] <= limit:
        base, each = line(points)
        if len(points) > 2 and each * max(points) > base and base + each * size > room / 2:
            break
        if len(points) > 1 and base + each * size > room:
            break
        run(size)
        size *= 2
    while True:
        base, each = line(points)
        fits = max((b for b, used in points.items() if used <= limit), default=0)
        if not fits or too_large == fits + 1 or len(points) >= MOST_PROBES:
            break
        guess = most if each <= 0 else int((limit - base) / each + 1e-3)  # a whole number, rounded
        guess = min(max(guess, fits), too_large - 1)
        if guess == fits or base + each * guess > available * SPARE:
            return Fit(guess, guess == fits, base, each, points)
        run(guess)
    return Fit(fits, True, base, each, points)


def line(points: dict[int, int]) -> tuple[float, float]:
    """(base, per sample) in bytes: least squares through the larger batch sizes, as small ones are lost in slack."""
    if len(points) < 2:
        return float(next(iter(points.values()), math.inf)), 0.0
    sizes = sorted(points)
    used = [b for b in sizes if 8 * b >= sizes[-1]]
    used = used if len(used) > 1 else sizes[-2:]
    memory = [points[b] for b in used]
    each = max(0.0, float(np.polyfit(used, memory, 1)[0]))
    return float(np.mean(memory)) - each * float(np.mean(used)), each


def measure(config: Any, batch_size: int, free_before: int = 0) -> int | None:
    """Bytes that training with this batch size needs, from a process of its own; None where it ran out of memory.

    config: of one of the entry scripts.  free_before: of the GPU, so that the process's context counts.
    Raises RuntimeError with what the process said when it failed otherwise.
    """
    values = options.to_dict(config) | {"batch_size": batch_size, "fit_batch": config.fit_batch or 1.0}
    if config.stage == 2:
        # Neither changes the memory of a step: the projection would be fitted anew for every probe, and what is cached
        # is first computed from images, in the memory that this takes without a cache.
        values |= {"projection_init": "orthogonal", "cached_views": 0}
    code = "import sys; from training import memory; memory.probe(*sys.argv[1:])"
    script = Path(inspect.getfile(type(config))).stem
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, script, json.dumps(values | {"dump_path": folder})]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {PROBE: "1", "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [text for text in done.stdout.splitlines() if text.startswith(FOUND)]
    if found:
        peak, reserved, free = json.loads(found[-1].removeprefix(FOUND))
        return peak + max(0, free_before - free - reserved)
    if done.returncode == -9 or any(text in done.stderr for text in OUT_OF_MEMORY):
        return None
    raise RuntimeError(f"a step with batch_size {batch_size} failed:\n{done.stderr.strip()}")


def probe(script: str, values: str) -> None:
    """In a process of its own: run an entry script's `main`, which stops at `fit_batch`."""
    module = scripts.load(script)
    module.main(module.Config(**json.loads(values)))


def _peak(training: Any) -> tuple[int, int, int]:
    """A few updates -> bytes at their peak; of a GPU: reserved and free at the end."""
    begin_full_epoch(training)
    batches = OneAhead(batch for epoch in itertools.count() for batch in training.loader.epoch(epoch))
    for step in range(STEPS):
        training.update(batches, step, training.config.accumulate)
    return peak_memory(training.run.device)


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


def peak_memory(device: torch.device) -> tuple[int, int, int]:
    """Most bytes so far: reserved on the GPU (and what is reserved and free now), or resident of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free = torch.cuda.mem_get_info(device)[0]
        return torch.cuda.max_memory_reserved(device), torch.cuda.memory_reserved(device), free
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had resident when it started this process
        kib = next(text.split()[1] for text in status.read_text().splitlines() if text.startswith("VmHWM:"))
        return 1024 * int(kib), 0, 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0


def free_memory(device: torch.device) -> float:
    """Bytes that a new process could take."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        kib = next(text.split()[1] for text in meminfo.read_text().splitlines() if text.startswith("MemAvailable:"))
        return 1024.0 * int(kib)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2
