"""The training loop of all six scripts: steps, precision, log, checkpoints, clean stops."""

from __future__ import annotations

import contextlib
import csv
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from datasets.seeding import DROPOUT, FILLING, stream
from objectives.learners import Learner
from utils import checkpoint, distributed
from utils.config import save_yaml, to_dict
from utils.distributed import Run
from utils.errors import UserError
from utils.optim import WarmupCosine
from utils.precision import Precision

# Options that may differ between the parts of one run: they change neither the data order nor the mathematics.
# (Of batch_size the joint batch of all processes is compared, of data_path the content; more epochs may follow.)
FREE = {
    "workers",
    "checkpoint_freq",
    "checkpoint_minutes",
    "device",
    "data_path",
    "cache_path",
    "dump_path",
    "batch_size",
    "epochs",
}


def schedule(config: Any, steps: int) -> WarmupCosine:
    """The learning-rate schedule of a script's options; `steps` per epoch."""
    return WarmupCosine(
        config.base_lr, config.final_lr, config.start_warmup, config.warmup_epochs * steps, config.epochs * steps
    )


def fit(
    learner: nn.Module,
    loader: Any,
    optimizer: Optimizer,
    rate: WarmupCosine,
    config: Any,
    run: Run,
    data_fingerprint: str,
) -> dict[str, float]:
    """Train to `config.epochs`, going on from the checkpoint in `config.dump_path` when there is one.

    Writes there: config.yaml, metrics.csv (a line per epoch) and checkpoints. Returns the last epoch's means.
    Raises UserError on a non-finite loss, naming the files of the batch; SystemExit (128 + signal) after SIGTERM or
    SIGINT, once the step is finished and saved.
    """
    folder = Path(config.dump_path)
    core: Learner = distributed.unwrap(learner)
    precision = Precision(config.precision, run.device)
    state = checkpoint.load(folder)
    first_epoch = first_seen = 0
    sums: dict[str, float] = {}
    if state:
        _check_same_run(state, config, run, data_fingerprint, folder)
        core.load_state_dict(state["learner"])
        core.load_memory_state(state["memory"])
        optimizer.load_state_dict(state["optimizer"])
        precision.scaler.load_state_dict(state["scaler"])
        first_epoch, first_seen, sums = state["epoch"], state["seen"], state["sums"]
    log = Log(folder, config, run, first_epoch)
    log.say(
        f"{'continuing' if state else 'starting'} at epoch {first_epoch} of {config.epochs}, {loader.steps} steps "
        f"each, {run.world_size} process(es) on {run.device.type}, {precision.name}; log and checkpoints in {folder}"
    )
    if not state and core.fills_memory:
        fill_memory(core, loader, precision)
    learner.train()
    last: dict[str, float] = state["last"] if state else {}

    def save(epoch: int, seen: int, keep: bool = False) -> None:
        memory = core.memory_state()  # all processes take part
        error = None
        try:
            if run.is_main:
                checkpoint.save(
                    {
                        "learner": core.state_dict(),
                        "memory": memory,
                        "optimizer": optimizer.state_dict(),
                        "scaler": precision.scaler.state_dict(),
                        "epoch": epoch,
                        "seen": seen,
                        "sums": sums,
                        "last": last,
                        "config": to_dict(config),
                        "joint_batch": config.batch_size * run.world_size,
                        "data": data_fingerprint,
                    },
                    folder,
                    keep_as=f"checkpoint_epoch{epoch}.pth" if keep else None,
                )
        except UserError as full_disk:
            error = full_disk
        distributed.raise_everywhere(error)

    with _signals() as caught:
        saved_at = time.monotonic()
        for epoch in range(first_epoch, config.epochs):
            core.begin_epoch(epoch, resumed=first_seen > 0)
            first_step, seen = loader.batches.step_at(first_seen), first_seen
            bar = log.bar(epoch, loader.steps, first_step)
            began = waiting = time.monotonic()
            waited = 0.0
            for step, batch in enumerate(loader.epoch(epoch, first_seen), start=first_step):
                waited += time.monotonic() - waiting
                now = epoch * loader.steps + step
                for group in optimizer.param_groups:
                    group["lr"] = rate(now)
                seed_dropout(config.seed, now, run.rank)
                with precision.autocast():
                    losses = learner(**batch)
                due = (time.monotonic() - saved_at) / 60 > config.checkpoint_minutes
                means, stop, due = _agree(losses, caught, due, run)
                if means is None:
                    _raise_not_finite(loader, batch, epoch, step, folder)
                precision.backward(losses["loss"])
                core.cancel_gradients(now)
                precision.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
                joint = sum(batch["counts"])
                seen += joint
                for name, value in means.items():
                    sums[name] = sums.get(name, 0.0) + value * joint
                bar.update()
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
                if (stop or due) and step + 1 < loader.steps:  # the epoch's end saves anyway
                    save(epoch, seen)
                    saved_at = time.monotonic()
                    if stop:
                        bar.close()
                        _stop(log, stop, epoch, step)
                waiting = time.monotonic()
            bar.close()
            seconds = time.monotonic() - began
            last = {name: value / seen for name, value in sums.items()}
            log.row(epoch, last, rate((epoch + 1) * loader.steps - 1), seconds, waited, seen - first_seen)
            sums, first_seen = {}, 0
            is_last = epoch + 1 == config.epochs
            save(epoch + 1, 0, keep=not is_last and (epoch + 1) % config.checkpoint_freq == 0)
            saved_at = time.monotonic()
            if stop and not is_last:
                _stop(log, stop, epoch, step)
    return last


def _stop(log: Log, stop: int, epoch: int, step: int) -> None:
    """Leave after a signal, once the step is saved."""
    log.say(f"stopped by signal {stop} after epoch {epoch} step {step}; run the same command to go on")
    raise SystemExit(128 + stop)


@torch.no_grad()
def fill_memory(core: Learner, loader: Any, precision: Precision) -> None:
    """One pass over the data that learns nothing and fills the memory banks.

    As in training, BatchNorm uses the batch's statistics (those of a new network are still meaningless), but its
    running statistics do not move and dropout is off.
    """
    core.eval()
    norms = [m for m in core.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    frozen = {id(p) for p in core.parameters() if not p.requires_grad}
    norms = [m for m in norms if id(m.weight) not in frozen]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for m in norms:
        m.train()
        m.momentum = 0.0
    try:
        for batch in loader.epoch(FILLING):
            with precision.autocast():
                core.remember(**batch)
    finally:
        for m, (momentum, batches) in zip(norms, before, strict=True):
            m.momentum = momentum
            m.num_batches_tracked.copy_(batches)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout of a step is a function of (seed, step, rank): a resumed run draws what the first would have drawn."""
    torch.manual_seed(int(stream(seed, step, rank, 0, DROPOUT).integers(2**63)))


def _agree(
    losses: dict[str, torch.Tensor], caught: list[int], due: bool, run: Run
) -> tuple[dict[str, float] | None, int, bool]:
    """Means over the processes (None when one is not finite), the signal that any caught, whether rank 0 wants to save.

    One collective and one wait for the device per step.
    """
    values = torch.stack([v.detach().float() for v in losses.values()])
    flags = torch.tensor([float(max(caught, default=0)), float(due and run.is_main)])
    joint = torch.cat([values / run.world_size, flags.to(values.device)])
    highest = distributed.all_max(joint[-2:].clone())
    joint = distributed.all_sum(joint).tolist()
    means = dict(zip(losses, joint, strict=False))
    finite = all(abs(v) < float("inf") for v in means.values())  # False for nan as well
    return (means if finite else None), int(highest[0]), bool(highest[1])


def _raise_not_finite(loader: Any, batch: dict[str, Any], epoch: int, step: int, folder: Path) -> None:
    names = [name for part in distributed.gather_objects(loader.names(batch)) for name in part]
    kept = f" and {folder} keeps the last good checkpoint" if (folder / checkpoint.LATEST).exists() else ""
    raise UserError(
        f"the loss is not finite at epoch {epoch} step {step}; this step was not applied{kept}. "
        f"Lower base_lr or use --precision fp32; the batch held: {', '.join(names[:32])}"
    )


def _check_same_run(state: dict[str, Any], config: Any, run: Run, data_fingerprint: str, folder: Path) -> None:
    old, new = state["config"], to_dict(config)
    changed = [f"{k}: {old.get(k)} -> {new[k]}" for k in new if k not in FREE and old.get(k) != new[k]]
    joint = config.batch_size * run.world_size
    if state["joint_batch"] != joint:
        changed.append(f"batch_size x processes: {state['joint_batch']} -> {joint}")
    if state["data"] != data_fingerprint:
        changed.append("the files below data_path")
    if state["epoch"] > config.epochs:
        raise UserError(f"epochs: {folder} has {state['epoch']} epochs already, more than {config.epochs}")
    if changed:
        raise UserError(
            f"dump_path: {folder} holds a run made with other options ({'; '.join(changed)}); "
            "choose another --dump_path, or delete that folder to start again"
        )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def remember(number: int, _: Any) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Log:
    """Progress for people and metrics.csv for plots; silent on all processes but the first."""

    def __init__(self, folder: Path, config: Any, run: Run, first_epoch: int) -> None:
        self.run, self.config, self.path = run, config, folder / "metrics.csv"
        if not run.is_main:
            return
        try:
            Path(config.pretrained_path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"pretrained_path: {config.pretrained_path} cannot be written ({error.strerror})") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_yaml(to_dict(config), folder / "config.yaml")
            rows = self._rows()
            if rows:  # drop what a run wrote after its last checkpoint
                self._write([row for row in rows if int(row["epoch"]) < first_epoch])
        except OSError as error:
            raise UserError(f"dump_path: {folder} cannot be written ({error.strerror})") from None

    def say(self, text: str) -> None:
        if self.run.is_main:
            print(text, flush=True)

    def bar(self, epoch: int, steps: int, first_step: int) -> tqdm:
        return tqdm(
            total=steps,
            initial=first_step,
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            disable=not (self.run.is_main and sys.stderr.isatty()),
            leave=False,
        )

    def row(self, epoch: int, means: dict[str, float], lr: float, seconds: float, waited: float, samples: int) -> None:
        if not self.run.is_main:
            return
        row = {
            "epoch": epoch,
            **{name: f"{value:.6g}" for name, value in means.items()},
            "lr": f"{lr:.6g}",
            "seconds": f"{seconds:.2f}",
            "samples_per_second": f"{samples / seconds:.2f}",
            "data_wait": f"{waited / seconds:.3f}",
            "peak_memory_mib": f"{peak_memory_mib(self.run.device):.0f}",
        }
        self._write([*self._rows(), row])
        shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.say(f"epoch {epoch + 1:3d}/{self.config.epochs}  {shown}  lr {lr:.4g}  {seconds:.1f} s")

    def _rows(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self.path.unlink(missing_ok=True)
            return
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[-1]))
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process has used so far: on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
