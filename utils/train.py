"""The training loop of all six scripts: steps, precision, log, checkpoints, clean stops."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from datasets.seeding import DROPOUT, FILLING, stream
from datasets.transforms import upload
from objectives.diagnostics import Monitor
from objectives.learners import Learner
from utils import checkpoint, distributed, guards, profile, signals
from utils.config import to_dict
from utils.distributed import Run
from utils.errors import UserError
from utils.log import Log
from utils.optim import WarmupCosine
from utils.precision import Precision

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
        if config.profile:
            for name in {"crops", "views", "image_views"} & vars(loader).keys():
                setattr(loader, name, profile.spanned("augment", getattr(loader, name)))
        try:
            return _fit(learner, loader, optimizer, rate, config, run, data_fingerprint)
        except (RuntimeError, OSError, EOFError, UserError) as error:  # a save may meet the worker's death as well
            guards.name_dead_worker(error)
            raise


def _fit(
    learner: nn.Module,
    loader: Any,
    optimizer: Optimizer,
    rate: WarmupCosine,
    config: Any,
    run: Run,
    data_fingerprint: str,
) -> dict[str, float]:
    folder = Path(config.dump_path)
    core: Learner = distributed.unwrap(learner)
    precision = Precision(config.precision, run.device)
    at = Progress()
    monitor = Monitor(core, loader, config, run.device)
    state = checkpoint.load(folder)
    if state:
        try:
            others = _check_same_run(state, config, run, data_fingerprint, folder)
            core.load_state_dict(state["learner"])
            core.load_memory_state(state["memory"])
            monitor.load(state["diagnostics"])
            optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty when `precision auto` meant another format on the device before
                precision.scaler.load_state_dict(state["scaler"])
            at = Progress(**{f.name: state[f.name] for f in fields(Progress)})
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise UserError(
                f"dump_path: the checkpoint in {folder} does not fit this version of the project ({reason}); go on "
                "with the version that wrote it, or choose another --dump_path"
            ) from None
    log = Log(folder, config, run, at.epoch, monitor.chance)
    log.say(
        f"{'continuing' if state else 'starting'} at epoch {at.epoch} of {config.epochs}, {loader.steps} steps "
        f"each, {run.world_size} process(es) on {run.device.type}, {precision.name}; log and checkpoints in {folder}"
    )
    if state and others:
        log.say(f"{others}; the order of the samples goes on where it was")

    def save(keep: bool = False) -> None:
        guards.require_finite_weights(core)
        memory, figures = core.memory_state(), monitor.state()  # all processes take part
        state = {
            "learner": core.state_dict(),
            "memory": memory,
            "diagnostics": figures,
            "optimizer": optimizer.state_dict(),
            "scaler": precision.scaler.state_dict(),
            **asdict(at),
            "config": to_dict(config),
            "processes": run.world_size,
            "data": data_fingerprint,
        }
        keep_as = f"checkpoint_epoch{at.epoch}.pth" if keep else None
        distributed.on_main(lambda: checkpoint.save(state, folder, keep_as))

    if not state and core.fills_memory:
        with signals.obeyed():
            fill_memory(core, loader, precision)
    learner.train()
    statistics = guards.BatchNormStatistics(core)
    saved_at = time.monotonic()
    while at.epoch < config.epochs:
        with signals.obeyed():
            core.begin_epoch(at.epoch, resumed=at.seen > 0)
        first_step, first_seen = loader.batches.step_at(at.seen), at.seen
        bar = log.bar(at.epoch, loader.steps, first_step)
        profile.seconds()  # what was timed before, as the bank was filled, is none of this epoch's
        began = waiting = time.monotonic()
        step = first_step
        incoming = loader.epoch(at.epoch, at.seen)
        with profile.span("data"):
            batch = next(incoming, None)
        waited = time.monotonic() - waiting
        if batch is not None and at.seen == 0:
            log.views(at.epoch, batch)
        while batch is not None:
            statistics.remember()
            parts = min(config.accumulate, loader.steps - step)  # batches of this update
            totals: dict[str, Tensor] = {}
            joint, names = 0, []
            for part in range(parts):
                now = at.epoch * loader.steps + step
                seed_dropout(config.seed, now, run.rank)
                with distributed.gradients_stay_local(learner, part + 1 < parts):
                    with precision.autocast(), profile.span("forward"):
                        losses = learner(**batch)
                    with profile.span("backward"):
                        precision.backward(losses["loss"] / parts)
                core.cancel_gradients(now)
                samples = sum(batch["counts"])
                joint += samples
                for name, value in losses.items():
                    totals[name] = totals.get(name, 0) + value.detach().float() * samples
                # Without the views, which would otherwise stay in memory until the update.
                names.append(partial(loader.names, {k: batch[k] for k in ("index", "image_index") if k in batch}))
                step += 1
                waiting = time.monotonic()
                with profile.span("data"):
                    batch = next(incoming, None)  # read and augmented while the device still computes
                waited += time.monotonic() - waiting
            for group in optimizer.param_groups:
                group["lr"] = rate(now)
            due = (time.monotonic() - saved_at) / 60 > config.checkpoint_minutes
            means = {name: value / joint for name, value in totals.items()}
            with profile.span("optimizer"):
                agreed = _agree(means, guards.gradients_are_finite(optimizer), due, run)
            at.seen += joint
            # In half precision gradients overflow now and then: the scaler leaves that step out and lowers its factor.
            if agreed.finite and (agreed.gradients_finite or precision.may_overflow()):
                with profile.span("optimizer"):
                    precision.step(optimizer)
                at.bad_in_a_row = 0
                at.counted += joint
                for name, value in agreed.means.items():
                    at.sums[name] = at.sums.get(name, 0.0) + value * joint
            else:
                statistics.restore()
                at.bad_steps += 1
                at.bad_in_a_row += 1
                what = "the gradient" if agreed.finite else "the loss"
                counted = at.bad_in_a_row, config.max_bad_steps
                files = [name for of_batch in names for name in of_batch()]
                said = guards.report_bad_step(what, files, at.epoch, step - 1, *counted, folder)
                if at.bad_in_a_row >= config.max_bad_steps:
                    _give_up(said, folder)
            optimizer.zero_grad(set_to_none=True)
            bar.advance(parts, agreed.means, rate(now), joint, waited)
            if (agreed.stop or agreed.save) and step < loader.steps:  # the epoch's end saves anyway
                save()
                saved_at = time.monotonic()
                if agreed.stop:
                    bar.close()
                    _stop(log, agreed.stop, at.epoch, step - 1)
        bar.close()
        seconds = time.monotonic() - began
        at.last = {name: value / at.counted for name, value in at.sums.items()}
        lr = rate((at.epoch + 1) * loader.steps - 1)
        figures, warnings = monitor.finish(at.epoch, at.last)
        figures |= {f"time_{name}": value for name, value in profile.seconds().items()}
        log.row(at.epoch, at.last, lr, seconds, waited, at.seen - first_seen, at.bad_steps, figures)
        log.warn(at.epoch, warnings)
        guards.require_equal_weights(core, f"after epoch {at.epoch}")
        at.epoch += 1
        at.seen = at.counted = at.bad_steps = 0
        at.sums = {}
        is_last = at.epoch == config.epochs
        save(keep=not is_last and at.epoch % config.checkpoint_freq == 0)
        saved_at = time.monotonic()
        if not is_last and (stop := _stop_of_any(run)):
            _stop(log, stop, at.epoch - 1, loader.steps - 1)
    log.close()
    return at.last


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
