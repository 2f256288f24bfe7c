"""The training loop of all six scripts: steps, precision, log, checkpoints, clean stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets.index import fingerprint
from datasets.transforms import upload
from objectives.learners import Learner
from training import memory, weights
from training.log import Log
from training.monitor import Monitor
from utils import checkpoint, distributed, guards, profile, signals
from utils.config import to_dict
from utils.distributed import Run
from utils.errors import UserError
from utils.optim import LARC, WarmupCosine, parameter_groups
from utils.precision import Precision
from utils.seeding import DROPOUT, FILLING, stream

# Options that may differ between the parts of one run: they change neither the data order nor the mathematics.
# (batch_size has a rule of its own below, of data_path the content is compared; more epochs may follow.)
FREE = {
    "workers",
    "recompute",
    "compile",
    "tensorboard",
    "wandb_project",
    "profile",
    "checkpoint_freq",
    "checkpoint_minutes",
    "max_bad_steps",
    "timeout_minutes",
    "device",
    "fit_batch",
    "data_path",
    "cache_path",
    "dump_path",
    "batch_size",
    "epochs",
}


def run(learner: Learner, loader: Any, config: Any, run: Run, export: Callable[[Learner, Path, dict], None]) -> None:
    """Train what a script has built, and export it; with `fit_batch`, only say which batch fits."""
    if getattr(config, "compile", False):
        learner.resnet.compile()
    wrapped = distributed.wrap(learner, run)
    optimizer = LARC(parameter_groups(learner, config.wd), config.base_lr)
    if config.fit_batch:
        memory.fit_batch(wrapped, loader, optimizer, config, run)
        return
    samples = loader.dataset.samples
    result = fit(wrapped, loader, optimizer, schedule(config, loader.steps), config, run, fingerprint(samples))
    export(learner, Path(config.pretrained_path) / config.checkpoint_name, weights.record(config, samples, result))


def schedule(config: Any, steps: int) -> WarmupCosine:
    """The learning-rate schedule of a script's options; `steps` per epoch."""
    return WarmupCosine(
        config.base_lr, config.final_lr, config.start_warmup, config.warmup_epochs * steps, config.epochs * steps
    )


@dataclass
class Progress:
    """Where a run is, as far as it is not in weights, optimiser and objectives."""

    epoch: int = 0
    seen: int = 0  # samples of this epoch that all processes together have seen
    counted: int = 0  # those of them that entered `sums`: not those of bad steps
    sums: dict[str, float] = field(default_factory=dict)  # of the losses of this epoch, times samples
    last: dict[str, float] = field(default_factory=dict)  # the means of the epoch before
    bad_steps: int = 0  # of this epoch, not applied
    bad_in_a_row: int = 0

    def applied(self, means: dict[str, float], joint: int) -> None:
        """An update of so many samples was made."""
        self.bad_in_a_row, self.counted = 0, self.counted + joint
        for name, value in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * joint

    def next_epoch(self) -> None:
        self.epoch, self.seen, self.counted, self.bad_steps, self.sums = self.epoch + 1, 0, 0, 0, {}


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

    Writes there: config.yaml, metrics.csv (a line per epoch), warnings.csv and guards.BAD_STEPS where there were any,
    checkpoints, and what `tensorboard` and `wandb_project` ask for.
    Returns the last epoch's means. A step whose loss or gradient is not finite is not applied, and its files are named.
    Raises UserError after `config.max_bad_steps` of them in a row; SystemExit (128 + signal) after a signal, once the
    step is finished and saved.
    """
    with signals.handled(), signals.noted(), profile.recording(run.device, config.profile):
        try:
            training = Training(learner, loader, optimizer, rate, config, run, data_fingerprint)
            training.start()
            while training.at.epoch < config.epochs:
                training.epoch()
            training.log.close()
            return training.at.last
        except (RuntimeError, OSError, EOFError, UserError) as error:  # a save may meet the worker's death as well
            guards.name_dead_worker(error)
            raise


class OneAhead:
    """Batches of which the next is always in hand: made while the device still computes. Counts the wait for them."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        self.batches, self.waited = batches, 0.0
        self.step()

    def step(self) -> None:
        began = time.monotonic()
        with profile.span("data"):
            self.next = next(self.batches, None)
        self.waited += time.monotonic() - began


class Training:
    """A run under way: all that a checkpoint holds, and the three things done with it: an update, an epoch, a save."""

    def __init__(
        self,
        learner: nn.Module,
        loader: Any,
        optimizer: Optimizer,
        rate: WarmupCosine,
        config: Any,
        run: Run,
        data: str,
    ) -> None:
        self.learner, self.loader, self.optimizer, self.rate = learner, loader, optimizer, rate
        self.config, self.run, self.data, self.folder = config, run, data, Path(config.dump_path)
        self.core: Learner = distributed.unwrap(learner)
        self.precision = Precision(config.precision, run.device)
        self.monitor = Monitor(self.core, loader, config, run.device)
        self.statistics = guards.BatchNormStatistics(self.core)
        self.at, self.saved_at = Progress(), time.monotonic()

    def start(self) -> None:
        """Take up the checkpoint where there is one, else fill the memory banks."""
        state, others = checkpoint.load(self.folder), ""
        if state:
            others = _check_same_run(state, self.config, self.run, self.data, self.folder)
            with _explained(self.folder):
                self.load(state)
        config, run, at = self.config, self.run, self.at
        self.log = Log(self.folder, config, run, at.epoch, self.monitor.chance)
        doing = "continuing" if state else "starting"
        self.log.say(
            f"{doing} at epoch {at.epoch} of {config.epochs}, {self.loader.steps} steps "
            f"each, {run.world_size} process(es) on {run.device.type}, {self.precision.name}; log and checkpoints in "
            f"{self.folder}"
        )
        if others:
            self.log.say(f"{others}; the order of the samples goes on where it was")
        if not state and self.core.fills_memory:
            with signals.obeyed():
                fill_memory(self.core, self.loader, self.precision)
        self.learner.train()
        self.saved_at = time.monotonic()

    def epoch(self) -> None:
        at, steps = self.at, self.loader.steps
        with signals.obeyed():
            self.core.begin_epoch(at.epoch, resumed=at.seen > 0)
        step, first_seen = self.loader.batches.step_at(at.seen), at.seen
        bar = self.log.bar(at.epoch, steps, step)
        profile.seconds()  # what was timed before, as the bank was filled, is none of this epoch's
        began, batches = time.monotonic(), OneAhead(self.loader.epoch(at.epoch, at.seen))
        if batches.next is not None and at.seen == 0:
            self.log.views(at.epoch, batches.next)
        while batches.next is not None:
            parts = min(self.config.accumulate, steps - step)  # batches of this update
            agreed, joint = self.update(batches, at.epoch * steps + step, parts)
            step += parts
            bar.advance(parts, agreed.means, self.rate(at.epoch * steps + step - 1), joint, batches.waited)
            if (agreed.stop or agreed.save) and step < steps:  # the epoch's end saves anyway
                self.save()
                if agreed.stop:
                    bar.close()
                    _stop(self.log, agreed.stop, at.epoch, step - 1)
        bar.close()
        self.finish_epoch(time.monotonic() - began, batches.waited, at.seen - first_seen)

    def update(self, batches: OneAhead, now: int, parts: int) -> tuple[Agreed, int]:
        """`parts` batches from step `now` of the run on, and one optimiser step, unless something is not finite."""
        self.statistics.remember()
        sums: dict[str, Tensor] = {}
        joint, names = 0, []
        for part in range(parts):
            batch = batches.next
            losses = self.backward(batch, now + part, parts, last=part + 1 == parts)
            samples = sum(batch["counts"])
            joint += samples
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * samples
            # Without the views, which would otherwise stay in memory until the update.
            names.append(partial(self.loader.names, {k: batch[k] for k in ("index", "image_index") if k in batch}))
            del batch, losses
            batches.step()  # read and augmented while the device still computes
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(now + parts - 1)
        due = (time.monotonic() - self.saved_at) / 60 > self.config.checkpoint_minutes
        with profile.span("optimizer"):
            means = {name: value / joint for name, value in sums.items()}
            agreed = _agree(means, guards.gradients_are_finite(self.optimizer), due, self.run)
        self.at.seen += joint
        # In half precision gradients overflow now and then: the scaler leaves that step out and lowers its factor.
        if agreed.finite and (agreed.gradients_finite or self.precision.may_overflow()):
            with profile.span("optimizer"):
                self.precision.step(self.optimizer)
            self.at.applied(agreed.means, joint)
        else:
            self.statistics.restore()
            self.refuse(
                agreed, [name for of_batch in names for name in of_batch()], (now + parts - 1) % self.loader.steps
            )
        self.optimizer.zero_grad(set_to_none=True)
        return agreed, joint

    def backward(self, batch: dict[str, Any], now: int, parts: int, last: bool) -> dict[str, Tensor]:
        """Forward and backward pass of one of an update's `parts` batches; processes join gradients in the last."""
        seed_dropout(self.config.seed, now, self.run.rank)
        with distributed.gradients_stay_local(self.learner, not last):
            with self.precision.autocast(), profile.span("forward"):
                losses = self.learner(**batch)
            with profile.span("backward"):
                self.precision.backward(losses["loss"] / parts)
        self.core.cancel_gradients(now)
        return losses

    def refuse(self, agreed: Agreed, files: list[str], step: int) -> None:
        """Note a step that is not applied; UserError after too many in a row."""
        at, limit = self.at, self.config.max_bad_steps
        at.bad_steps += 1
        at.bad_in_a_row += 1
        what = "the gradient" if agreed.finite else "the loss"
        said = guards.report_bad_step(what, files, at.epoch, step, at.bad_in_a_row, limit, self.folder)
        if at.bad_in_a_row >= limit:
            _give_up(said, self.folder)

    def finish_epoch(self, seconds: float, waited: float, seen: int) -> None:
        """The epoch's line in the log, checks, and the checkpoint from which the next one starts."""
        at = self.at
        at.last = {name: value / at.counted for name, value in at.sums.items()}
        figures, warnings = self.monitor.finish(at.epoch, at.last)
        figures |= {f"time_{name}": value for name, value in profile.seconds().items()}
        lr = self.rate((at.epoch + 1) * self.loader.steps - 1)
        self.log.row(at.epoch, at.last, lr, seconds, waited, seen, at.bad_steps, figures)
        self.log.warn(at.epoch, warnings)
        guards.require_equal_weights(self.core, f"after epoch {at.epoch}")
        at.next_epoch()
        is_last = at.epoch == self.config.epochs
        self.save(keep=not is_last and at.epoch % self.config.checkpoint_freq == 0)
        if not is_last and (stop := _stop_of_any(self.run)):
            _stop(self.log, stop, at.epoch - 1, self.loader.steps - 1)

    def save(self, keep: bool = False) -> None:
        guards.require_finite_weights(self.core)
        state = self.state()  # all processes take part
        keep_as = f"checkpoint_epoch{self.at.epoch}.pth" if keep else None
        distributed.on_main(lambda: checkpoint.save(state, self.folder, keep_as))
        self.saved_at = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {
            "learner": self.core.state_dict(),
            "memory": self.core.memory_state(),
            "diagnostics": self.monitor.state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            **asdict(self.at),
            "config": to_dict(self.config),
            "processes": self.run.world_size,
            "data": self.data,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.core.load_state_dict(state["learner"])
        self.core.load_memory_state(state["memory"])
        self.monitor.load(state["diagnostics"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty when `precision auto` meant another format on the device before
            self.precision.scaler.load_state_dict(state["scaler"])
        self.at = Progress(**{f.name: state[f.name] for f in fields(Progress)})


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """A state that does not fit this version's modules is the user's to solve."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"dump_path: the checkpoint in {folder} does not fit this version of the project ({reason}); go on "
            "with the version that wrote it, or choose another --dump_path"
        ) from None


def _stop(log: Log, stop: int, epoch: int, step: int) -> NoReturn:
    """Leave after a signal, once the step is saved, all processes together."""
    log.say(f"stopped by signal {stop} after epoch {epoch} step {step}; run the same command to go on")
    log.close()
    distributed.stop()
    raise SystemExit(128 + stop)


def _give_up(said: str, folder: Path) -> NoReturn:
    kept = f"{folder} keeps the last good checkpoint" if (folder / checkpoint.LATEST).exists() else "none was saved yet"
    raise UserError(
        f"{said}. The run stops ({kept}). Check these files; or start again, with another --dump_path, at a lower "
        "--base_lr or with --precision fp32"
    )


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
    before = [(m, [b.clone() for b in m.buffers()]) for m in norms]  # momentum 0 would not do: 0 * NaN is NaN
    for m in norms:
        m.train()
    try:
        for batch in loader.epoch(FILLING):
            with precision.autocast():
                core.remember(**batch)
    finally:
        for m, buffers in before:
            for now, was in zip(m.buffers(), buffers, strict=True):
                now.copy_(was)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout of a step is a function of (seed, step, rank): a resumed run draws what the first would have drawn."""
    torch.manual_seed(int(stream(seed, step, rank, 0, DROPOUT).integers(2**63)))


@dataclass(frozen=True)
class Agreed:
    """What all processes know of a step."""

    means: dict[str, float]  # of the losses
    gradients_finite: bool
    stop: int  # the signal that any of them caught, or 0
    save: bool  # whether the first one wants to save

    @property
    def finite(self) -> bool:
        return all(abs(v) < float("inf") for v in self.means.values())  # False for nan as well


def _agree(losses: dict[str, Tensor], gradients_finite: Tensor, due: bool, run: Run) -> Agreed:
    """Two collectives and the one wait for the device of an update, when the next batch is on its way already."""
    values = torch.stack(list(losses.values())) / run.world_size
    flags = upload(torch.tensor([float(signals.caught()), float(due and run.is_main)]), values.device)
    flags = torch.cat([flags, (~gradients_finite).to(flags).view(1)])
    joint = torch.cat([distributed.all_sum(values), distributed.all_max(flags)]).tolist()
    *sums, stop, save, bad = joint
    return Agreed(dict(zip(losses, sums, strict=True)), not bad, int(stop), bool(save))


def _stop_of_any(run: Run) -> int:
    return int(distributed.all_max(torch.tensor(signals.caught(), device=run.device)))


def _check_same_run(state: dict[str, Any], config: Any, run: Run, data_fingerprint: str, folder: Path) -> str:
    """Raises UserError unless the run may go on with these options; what is said of another number of processes.

    Another number of processes is welcome, with the same batch on each or with the same joint batch.
    """
    old, new = state["config"], to_dict(config)
    changed = [f"{k}: {old.get(k)} -> {new[k]}" for k in new if k not in FREE and old.get(k) != new[k]]
    batches = old["batch_size"], config.batch_size
    processes = state["processes"], run.world_size
    joint = tuple(b * p for b, p in zip(batches, processes, strict=True))
    if batches[0] != batches[1] and joint[0] != joint[1]:
        changed.append(f"batch_size: {batches[0]} -> {batches[1]} (x processes: {joint[0]} -> {joint[1]})")
    if state["data"] != data_fingerprint:
        changed.append("the files below data_path")
    if (state["epoch"], state["seen"]) > (config.epochs, 0):
        begun = state["epoch"] + (state["seen"] > 0)
        raise UserError(f"epochs: {folder} has begun {begun} epochs already, more than {config.epochs}")
    if changed:
        raise UserError(
            f"dump_path: {folder} holds a run made with other options ({'; '.join(changed)}); "
            "choose another --dump_path, or delete that folder to start again"
        )
    if processes[0] == processes[1]:
        return ""
    return f"processes: {processes[0]} -> {processes[1]}, joint batch: {joint[0]} -> {joint[1]}"
