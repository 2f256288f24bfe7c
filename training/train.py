"""The training loop of all six scripts: updates, precision, log, checkpoints, clean stops."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from datasets.index import fingerprint
from datasets.transforms import upload
from datasets.workers import OneAhead
from objectives.learners import Learner
from training import cost, weights
from training.log import Log
from training.monitor import Monitor
from utils import checkpoint, distributed, files, guards, profile, signals
from utils.config import to_dict
from utils.distributed import Run
from utils.errors import UserError
from utils.locks import Lock
from utils.optim import LARC, WarmupCosine, parameter_groups
from utils.precision import Precision
from utils.seeding import DROPOUT, FILLING, stream


def start(config: Any) -> Run:
    """Join the other processes. UserError before any long work where weights cannot be read or written, processes have
    other options than the rest, or another run trains into the same folder or weights file."""
    weights.check(config)
    run = distributed.start(config.device, config.seed, config.timeout_minutes)
    guards.require_same_options(to_dict(config))
    distributed.on_main(partial(require_free, config))
    return run


def require_free(config: Any) -> None:
    """UserError where another run has what this one would write, or its folder holds results of downstream/."""
    locks, folder = outputs(config), Path(config.dump_path)
    for lock, remedy in locks.items():
        lock.check(remedy)
    if locks and (folder / "results.json").exists():
        raise UserError(f"dump_path: {folder} holds results of a downstream task; choose another")


def outputs(config: Any) -> dict[Lock, str]:
    """Locks on what a run writes, and what to do where another run has them."""
    if config.dry_run or config.fit_batch:
        return {}
    folder, file = Path(config.dump_path), Path(config.pretrained_path) / config.checkpoint_name
    doing = f"trains into {folder}"
    return {
        Lock(folder / ".lock", doing): "wait for it or stop it, or choose another --dump_path",
        Lock(file.with_name(f".{file.name}.lock"), doing): "choose another --checkpoint_name or --pretrained_path",
    }


@contextmanager
def owning(config: Any) -> Iterator[list[Lock]]:
    """Within, what the run writes is its own. Raises UserError on all processes where another run has it."""
    with ExitStack() as stack:
        locks: list[Lock] = []

        def take() -> None:
            for lock, remedy in outputs(config).items():
                with files.writing(lock.path):
                    locks.append(stack.enter_context(lock.held(remedy)))

        distributed.on_main(take)
        yield locks


def fit(learner: Learner, loader: Any, config: Any, run: Run) -> None:
    """Train what a script has built to `config.epochs`, from the checkpoint in `dump_path` if any; save the weights.

    run: this process among the others.  An update whose loss or gradient is not finite is skipped, and its files are
    named. Raises UserError after `max_bad_steps` of them in a row; SystemExit (128 + signal) after a signal, once the
    step is finished and saved.
    """
    training = Training(learner, loader, config, run)
    if config.fit_batch:
        cost.fit_batch(training)
    elif config.dry_run:
        cost.dry_run(training)
    else:
        train(training)


def train(training: Training) -> None:
    """The whole run, from its checkpoint to its weights."""
    learner, loader, config = training.core, training.loader, training.config
    with owning(config) as training.locks:
        with signals.handled(), signals.noted(), profile.recording(training.run.device, config.profile):
            training.start()
            while training.at.epoch < config.epochs:
                training.epoch()
            training.log.close()
        made_by = weights.record(config, loader.dataset.samples, training.at.last)
        weights.save(learner, Path(config.pretrained_path) / config.checkpoint_name, made_by)


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


class Training:
    """A run under way: all that a checkpoint holds, and the three things done with it: an update, an epoch, a save."""

    def __init__(self, learner: Learner, loader: Any, config: Any, run: Run) -> None:
        self.core, self.loader, self.config, self.run = learner, loader, config, run
        if getattr(config, "compile", False):
            learner.resnet.compile()
        self.learner: nn.Module = distributed.wrap(learner, run)
        self.optimizer = LARC(parameter_groups(learner, config.wd), config.base_lr)
        warmup, total = (epochs * loader.steps for epochs in (config.warmup_epochs, config.epochs))
        self.rate = WarmupCosine(config.base_lr, config.final_lr, config.start_warmup, warmup, total)
        self.precision = Precision(config.precision, run.device)
        self.monitor = Monitor(learner, loader, config, run.device)
        self.statistics = guards.BatchNormStatistics(learner)
        self.data, self.folder = fingerprint(loader.dataset.samples), Path(config.dump_path)
        self.at, self.saved_at = Progress(), time.monotonic()
        self.locks: list[Lock] = []  # on what it writes, in the first process

    def start(self) -> None:
        """Take up the checkpoint where there is one, else fill the memory banks."""
        config, run = self.config, self.run
        state, others = checkpoint.load(self.folder), ""
        if state:
            with checkpoint.explained(self.folder):
                others = checkpoint.check_same_run(state, config, run, self.data, self.folder)
                self.load(state)
        self.log = Log(self.folder, config, run, self.at.epoch)
        doing = "continuing" if state else "starting"
        self.log.say(
            f"{doing} at epoch {self.at.epoch} of {config.epochs}, {self.loader.steps} steps each, {run.world_size} "
            f"process(es) on {run.device.type}, {self.precision.name}; log and checkpoints in {self.folder}"
        )
        if others:
            self.log.say(f"{others}; the order of the samples goes on where it was")
        if not state and self.core.fills_memory:
            with signals.obeyed():
                self.fill_memory()
        self.learner.train()
        self.saved_at = time.monotonic()

    @torch.no_grad()
    def fill_memory(self) -> None:
        """One pass over the data that learns nothing and fills the memory banks.

        As in training, BatchNorm uses the batch's statistics (those of a new network are still meaningless), but its
        running statistics do not move and dropout is off.
        """
        self.core.eval()
        frozen = {id(p) for p in self.core.parameters() if not p.requires_grad}
        for module in guards.batch_norms(self.core):
            module.train(id(module.weight) not in frozen)
        self.statistics.remember()
        try:
            for batch in self.loader.epoch(FILLING):
                distributed.obey_signals()
                with self.precision.autocast():
                    self.core.remember(batch)
        finally:
            self.statistics.restore()

    def epoch(self) -> None:
        """What is left of the epoch, its line in the log, and the checkpoint from which the next one starts."""
        at, steps = self.at, self.loader.steps
        with signals.obeyed():
            self.core.begin_epoch(at.epoch, resumed=at.seen > 0)
        step, first_seen = self.loader.batches.step_at(at.seen), at.seen
        bar = self.log.bar(at.epoch, steps, step)
        profile.seconds()  # what was timed before, as the bank was filled, is none of this epoch's
        began, batches = time.monotonic(), OneAhead(self.loader.epoch(at.epoch, at.seen))
        while batches.next is not None:
            parts = min(self.config.accumulate, steps - step)  # batches of this update
            agreed, _ = self.update(batches, at.epoch * steps + step, parts)
            step += parts
            self.log.advance(bar, parts, agreed.means, self.rate(at.epoch * steps + step - 1), batches.waited)
            if (agreed.stop or agreed.save) and step < steps:  # the epoch's end saves anyway
                self.save()
                if agreed.stop:
                    bar.close()
                    self.stop(agreed.stop, at.epoch, step - 1)
        bar.close()
        self.finish_epoch(time.monotonic() - began, batches.waited, at.seen - first_seen)

    def update(self, batches: OneAhead, now: int, parts: int = 1) -> tuple[Agreed, int]:
        """Gradients of `parts` batches from step `now` of the run on, and one optimiser step if all is finite.

        Returns what the processes agreed on, and the samples of the global batches.
        """
        self.statistics.remember()
        sums: dict[str, Tensor] = {}
        samples, names = 0, []
        for part in range(parts):
            batch = batches.next
            losses = self.backward(batch, now + part, parts, last=part + 1 == parts)
            size = sum(batch.counts)
            samples += size
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() * size
            # Without the views, which would otherwise stay in memory until the update.
            names.append(partial(self.loader.names, batch.index, batch.image_index))
            del batch, losses
            batches.step()  # read and augmented while the device still computes
        last = now + parts - 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(last)
        due = (time.monotonic() - self.saved_at) / 60 > self.config.checkpoint_minutes
        with profile.span("optimizer"):
            means = {name: value / samples for name, value in sums.items()}
            agreed = _agree(means, guards.gradients_are_finite(self.optimizer), due, self.run)
        self.at.seen += samples
        # In half precision gradients overflow now and then: the scaler leaves that step out and lowers its factor.
        if agreed.finite and (agreed.gradients_finite or self.precision.may_overflow()):
            with profile.span("optimizer"):
                self.precision.step(self.optimizer)
            self.at.applied(agreed.means, samples)
        else:
            self.statistics.restore()
            self.refuse(agreed, [name for of_batch in names for name in of_batch()], last % self.loader.steps)
        self.optimizer.zero_grad(set_to_none=True)
        return agreed, samples

    def backward(self, batch: Batch, now: int, parts: int, last: bool) -> dict[str, Tensor]:
        """Forward and backward pass of one of an update's `parts` batches; processes join gradients in the last."""
        # Dropout is a function of the step: a resumed run draws what the first would have drawn.
        torch.manual_seed(int(stream(self.config.seed, now, self.run.rank, 0, DROPOUT).integers(2**63)))
        with distributed.gradients_stay_local(self.learner, not last):
            with self.precision.autocast(), profile.span("forward"):
                losses = self.learner(batch)
            with profile.span("backward"):
                self.precision.backward(losses["loss"] / parts)
        self.core.cancel_gradients(now)
        return losses

    def refuse(self, agreed: Agreed, files: list[str], step: int) -> None:
        """Note an update that is skipped; UserError after too many in a row."""
        at, limit = self.at, self.config.max_bad_steps
        at.bad_steps += 1
        at.bad_in_a_row += 1
        what = "the gradient" if agreed.finite else "the loss"
        said = guards.report_bad_step(what, files, at.epoch, step, at.bad_in_a_row, limit, self.folder)
        if at.bad_in_a_row >= limit:
            saved = (self.folder / checkpoint.LATEST).exists()
            kept = f"{self.folder} keeps the last good checkpoint" if saved else "none was saved yet"
            raise UserError(
                f"{said}. The run stops ({kept}). Check these files; or start again, with another --dump_path, at a "
                "lower --base_lr or with --precision fp32"
            )

    def finish_epoch(self, seconds: float, waited: float, seen: int) -> None:
        at, means = self.at, self.at.means()
        figures, warnings = self.monitor.finish(at.epoch, means)
        figures |= {f"time_{name}": value for name, value in profile.seconds().items()}
        values = {"lr": self.rate((at.epoch + 1) * self.loader.steps - 1), "bad_steps": at.bad_steps, **figures}
        self.log.row(at.epoch, means, values, seconds, waited, seen)
        self.log.warn(at.epoch, warnings)
        guards.require_equal_weights(self.core, f"after epoch {at.epoch}")
        at.next_epoch()
        is_last = at.epoch == self.config.epochs
        self.save(keep=not is_last and at.epoch % self.config.checkpoint_freq == 0)
        stop = int(distributed.all_max(torch.tensor(signals.caught(), device=self.run.device)))
        if stop and not is_last:
            self.stop(stop, at.epoch - 1, self.loader.steps - 1)

    def stop(self, signal: int, epoch: int, step: int) -> NoReturn:
        """Leave after a signal, once the step is saved, all processes together."""
        self.log.say(f"stopped by signal {signal} after epoch {epoch} step {step}; run the same command to go on")
        self.log.close()
        distributed.stop()
        raise SystemExit(128 + signal)

    def save(self, keep: bool = False) -> None:
        """Replace the newest checkpoint, and keep this one for good as well."""
        guards.require_finite_weights(self.core)
        state = self.state()  # all processes take part
        keep_as = f"checkpoint_epoch{self.at.epoch}.pth" if keep else None
        distributed.on_main(lambda: self.write(state, keep_as))
        self.saved_at = time.monotonic()

    def write(self, state: dict[str, Any], keep_as: str | None) -> None:
        for lock in self.locks:
            lock.require("this run stops; look into dump_path for what goes on")
        checkpoint.save(state, self.folder, keep_as)

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
            "counts": list(self.loader.counts),  # what the learner was sized by
        }

    def load(self, state: dict[str, Any]) -> None:
        self.core.load_state_dict(state["learner"])
        self.core.load_memory_state(state["memory"])
        self.monitor.load(state["diagnostics"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty when `precision auto` meant another format on the device before
            self.precision.scaler.load_state_dict(state["scaler"])
        self.at = Progress(**{f.name: state[f.name] for f in fields(Progress)})


@dataclass(frozen=True)
class Agreed:
    """What all processes know of an update."""

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
    *sums, stop, save, bad = torch.cat([distributed.all_sum(values), distributed.all_max(flags)]).tolist()
    return Agreed(dict(zip(losses, sums, strict=True)), not bad, int(stop), bool(save))
