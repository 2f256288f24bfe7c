"""What all downstream tasks share: their common options, and one run from checked data to tested weights.

A task is a subclass of `Task`, which says what is learned and how it is scored. `run` does the rest: the split by
patient, the choice of labelled cases, every check before the first step, training in mixed precision, the best epoch
by validation, one test, the files in `dump_path`, and an exact continuation of a run that was stopped.
"""

from __future__ import annotations

import io
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from downstream.encoders import describe_weights
from downstream.metrics import format_metrics
from downstream.results import RESULTS, differences, pretrained_on, read_results, settings_of, warn_of
from downstream.splits import Split, choose_labelled, draw_split
from utils import checkpoint, config, distributed, signals
from utils.errors import UserError
from utils.files import csv_text, json_text, owned, write_together
from utils.optim import WarmupCosine, parameter_groups
from utils.options import ARCHITECTURES, FREE, Group, data, model, optimisation, running
from utils.precision import Precision
from utils.seeding import DROPOUT, stream

CONFIG = "config.yaml"
SAVE_SECONDS = 60.0  # between checkpoints at the end of epochs: one takes seconds, for gigabytes of weights


@dataclass(kw_only=True)
class Options(Group):
    """Options of every task. Tasks add their own and give the values."""

    data_path: str = data(MISSING, "folder of the data", FREE)  # the content is compared instead
    split: str | None = data(None, "YAML or JSON file with train, validation and test; null: drawn by patient")
    fractions: list[NonNegativeFloat] = data([0.6, 0.15, 0.25], "patients' shares of a drawn train, validation, test")
    split_seed: NonNegativeInt = data(0, "random seed of a drawn split: the same test cases whatever the seed")
    labelled: NonNegativeInt = data(0, "training cases whose labels are used, chosen by the seed; 0: all")
    weights: str = model("random", "random, imagenet (torchvision's, from torch's cache), or a file of any stage")
    arch: Literal[ARCHITECTURES] | None = model(
        None, "torchvision ResNet; null: as the .json of the weights, or resnet50"
    )
    epochs: PositiveInt = optimisation(40, "passes over the labelled cases; the one with the best validation is tested")
    steps_per_epoch: NonNegativeInt = optimisation(0, "steps of an epoch, however many cases are labelled; 0: one pass")
    batch_size: PositiveInt = optimisation(16, "samples of a step")
    base_lr: PositiveFloat = optimisation(0.0001, "peak learning rate of AdamW, cosine schedule")
    wd: NonNegativeFloat = optimisation(0.0001, "weight decay")
    head_start: ClosedUnitInterval = optimisation(
        0.1, "share of the steps in which new layers train alone; loaded ones then warm up over as many"
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = optimisation(
        "auto", "auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU"
    )
    seed: NonNegativeInt = running(0, "random seed of new weights, labelled cases, order and augmentation")
    device: Literal["auto", "cpu", "cuda"] = running("auto", "where to compute", FREE)
    dump_path: str = running("", "folder of results, cases.csv, best.pth, ...; a run found there is continued", FREE)


@dataclass
class Outcome:
    """What `Task.test` found."""

    metrics: dict[str, Any]  # name -> number, or group -> name -> number
    rows: list[dict[str, Any]]  # of cases.csv
    about: dict[str, Any] = field(default_factory=dict)  # what else results.json says
    files: dict[str, bytes] = field(default_factory=dict)  # what else is worth keeping: pictures, predictions


class Task(ABC):
    """What is learned and how it is scored.

    `__init__` opens the data by names and headers and checks the options; `run` then sets `split` and `labelled`,
    calls `build` and `examine`, and only then trains. Every random draw is a function of (seed, epoch, step).
    """

    needed: tuple[str, ...] = ("train", "validation", "test")  # parts of the split that must have cases
    patients: dict[str, str]  # of every case, by its name
    sources: dict[str, Path]  # their files
    fingerprint: str  # changes with the data, see `fingerprint`
    split: Split
    labelled: list[str]  # training cases whose labels may be used

    def __init__(self, cfg: Any, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.precision = Precision(cfg.precision, device)

    def choose(self, train: list[str]) -> list[str]:
        """The labelled ones among the training cases."""
        return choose_labelled(train, self.cfg.labelled, self.cfg.seed, self.patients)

    @abstractmethod
    def build(self) -> nn.Module:
        """The network from cfg.weights, on the CPU; its new weights depend on cfg.seed alone."""

    def examine(self) -> None:  # noqa: B027 - some have found all when they open their data
        """Raise UserError for whatever in the cases of `split` and `labelled` could stop the run later.

        `compare` asks this for all of its runs first, so what costs minutes is found once per process and file.
        """

    @abstractmethod
    def describe(self) -> str:
        """What the data show, in a few lines, with warnings; printed when a run starts."""

    def load(self) -> None:  # noqa: B027 - nor has every task anything to do here
        """Read into memory what training keeps there."""

    @property
    def epochs(self) -> int:
        """Epochs of training; 0 for what is fitted without gradients, in `test`."""
        return self.cfg.epochs

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.cfg.steps_per_epoch or max(1, math.ceil(len(self.labelled) / self.cfg.batch_size))

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up: an epoch, at most a tenth of all."""
        return min(self.steps, self.epochs * self.steps // 10)

    @property
    def head_start(self) -> int:
        """Steps in which new layers train alone."""
        return round(self.cfg.head_start * self.epochs * self.steps)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of AdamW: each has its `weight_decay`, its `share` of the learning rate, and the step at
        which it starts to learn (`start`; its rate then rises to the others' over as many steps)."""
        return [{**group, "share": 1.0, "start": 0} for group in parameter_groups(model, self.cfg.wd)]

    @abstractmethod
    def batch(self, epoch: int, step: int) -> Any:
        """The samples of a step (of `steps`); a function of (seed, epoch, step), so that any step can be the next."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Scalar, computed under autocast."""

    @abstractmethod
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Figures of the validation cases, most important first: the epoch with the highest is kept (nan: lowest)."""

    @abstractmethod
    def test(self, model: nn.Module) -> Outcome:
        """Score the test cases, once."""


def check(kind: type[Task], cfg: Any) -> None:
    """Raise UserError for whatever would stop `run`: options, weights, split, labels, data. Nothing is trained."""
    _require_one_process()
    opened = Course(kind, cfg)
    if not opened.finished:
        with redirect_stdout(io.StringIO()):  # what was loaded is said when it is used
            opened.task.build()
        opened.task.examine()


def run(kind: type[Task], cfg: Any) -> dict[str, Any]:
    """Check, train, test once, and write everything to `cfg.dump_path`; go on where a run found there was stopped.

    Returns what results.json holds (which has null for nan); a run that is finished is not repeated.
    Raises UserError before anything is trained, or when the loss is not finite; SystemExit (128 + signal) after a
    signal, once everything that was done is saved.
    """
    folder = Path(cfg.dump_path)
    _require_one_process()
    done = (folder / RESULTS).is_file()  # then nothing is written
    with signals.handled(), nullcontext() if done else owned(folder, f"trains into {folder}"):
        opened = Course(kind, cfg)
        if opened.finished:
            print(f"{folder} holds this run, finished; for another one choose another --dump_path", flush=True)
        return opened.finished or opened.finish()


@dataclass
class Progress:
    """Where a run is, beside the state of model and optimiser."""

    epoch: int = 0
    seen: int = 0  # steps of this epoch that are done
    loss: float = 0.0  # the sum of theirs
    best_epoch: int = -1  # so far, counted from 0
    best: dict[str, float] = field(default_factory=dict)  # its validation figures
    history: list[dict[str, float]] = field(default_factory=list)  # of each epoch the mean loss and validation figures
    seconds: float = 0.0  # of the parts of the run before this one


class Course:
    """The course of one run: opened and checked, trained from where a checkpoint is, tested."""

    def __init__(self, kind: type[Task], cfg: Any) -> None:
        """Check options, data, split and weights file, and that `dump_path` holds no run with others."""
        self.cfg, self.folder, self.began = cfg, Path(cfg.dump_path), time.monotonic()
        config.check(cfg)
        place = distributed.start(cfg.device, cfg.seed)
        describe_weights(cfg.weights)  # a missing file is found before the data are read
        self.task = task = kind(cfg, place.device)
        task.split = draw_split(cfg.split, cfg.fractions, task.patients, cfg.split_seed, task.needed)
        task.labelled = task.choose(task.split.train)
        self.settings = settings_of(cfg) | {"data": task.fingerprint}
        self.finished = read_results(self.folder) if (self.folder / RESULTS).is_file() else None
        self.state = None if self.finished else checkpoint.load(self.folder)
        begun = self.finished or self.state
        changed = differences(begun.get("settings"), self.settings) if begun else self.others()
        if changed:
            said = f"{self.folder} holds a run made with other options ({'; '.join(changed)})"
            raise UserError(f"dump_path: {said}; choose another, or delete that folder to start again")
        self.at, self.saved_at = Progress(), self.began
        self.kept: dict[str, Tensor] = {}  # weights of the best epoch

    def others(self) -> list[str]:
        """In what the options differ from those of a run whose results were removed, or of another script's."""
        file = self.folder / CONFIG
        old, new = config.read_yaml(file) if file.is_file() else None, config.to_dict(self.cfg)
        fixed = {f.name for f in fields(self.cfg) if not f.metadata.get("may_change")}
        if old is None or not isinstance(old, dict) or not fixed <= old.keys():
            return ["of another script"] if file.is_file() else []
        return [f"{name}: {old[name]} -> {new[name]}" for name in new if name in fixed and old[name] != new[name]]

    def finish(self) -> dict[str, Any]:
        """Train and test; then all that comes out takes its place together, so that a folder never holds a mixture."""
        cfg, task, folder = self.cfg, self.task, self.folder
        self.model = task.build()
        task.examine()
        print(task.describe())
        labelled, validation, test = (len(cases) for cases in (task.labelled, task.split.validation, task.split.test))
        print(f"train {labelled} (labelled), validation {validation}, test {test} cases", flush=True)
        seen = pretrained_on(cfg.weights, {case: task.sources[case] for case in task.split.test})
        if seen:
            print(f"warning: {warn_of(seen, test)}", flush=True)
        task.load()
        self.model.to(task.device)
        if task.epochs:
            self.begin()
        try:
            trained = self.train() if task.epochs else {}
            self.model.eval()
            with torch.no_grad():
                outcome = task.test(self.model)
        except SystemExit:  # a signal
            if task.epochs:
                print(f"stopped in epoch {self.at.epoch + 1}; run the same command to go on", flush=True)
                self.save()
            raise
        result = {
            "metrics": outcome.metrics,
            "cases": test,
            "weights": describe_weights(cfg.weights),
            "labelled": task.labelled,
            "pretrained_on": seen,
            **trained,
            **outcome.about,
            "seconds": round(self.seconds(), 1),
            "commit": config.commit(),
            "torch": torch.__version__,
            "config": config.to_dict(cfg),
            "settings": self.settings,
        }
        self.write(outcome, result)
        best = f"; epoch {result['best_epoch']} of {task.epochs} was the best on validation" if task.epochs > 1 else ""
        print(format_metrics(outcome.metrics, outcome.about))
        print(f"{test} test cases{best}\nwrote {folder}/results.json and cases.csv", flush=True)
        return result

    def write(self, outcome: Outcome, result: dict[str, Any]) -> None:
        texts = {
            CONFIG: config.yaml_text(result["config"]),
            "split.json": json_text(asdict(self.task.split)),
            "cases.csv": csv_text(outcome.rows),
            RESULTS: json_text(result),  # the last: it says that the run is finished
        }
        contents = {name: text.encode(errors="backslashreplace") for name, text in texts.items()} | outcome.files
        if self.kept:
            torch.save(self.kept, best := io.BytesIO())
            contents["best.pth"] = best.getvalue()
        with signals.noted():
            write_together({self.folder / name: x for name, x in contents.items()}, last=[self.folder / RESULTS])
            for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
                (self.folder / name).unlink(missing_ok=True)

    def begin(self) -> None:
        """Make the optimiser, and take up a run that was stopped."""
        task, state, self.state = self.task, self.state, None  # its memory is needed
        self.optimizer = torch.optim.AdamW(task.groups(self.model), self.cfg.base_lr)
        self.rate = WarmupCosine(self.cfg.base_lr, 0.0, 0.0, task.warmup_steps, task.epochs * task.steps)
        if not state:
            return
        with checkpoint.explained(self.folder):
            self.model.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty when `precision auto` meant another format on the device before
                task.precision.scaler.load_state_dict(state["scaler"])
            self.kept = state["kept"]
            self.at = Progress(**{f.name: state[f.name] for f in fields(Progress)})
        print(f"continuing at epoch {self.at.epoch + 1} of {task.epochs}, step {self.at.seen + 1}", flush=True)

    def train(self) -> dict[str, Any]:
        """The epochs that are still to be done; what the result says of all."""
        while self.at.epoch < self.task.epochs:
            self.epoch()
        self.model.load_state_dict(self.kept)
        return {"best_epoch": self.at.best_epoch + 1, "history": self.at.history}

    def epoch(self) -> None:
        """The steps of an epoch that are still to be done, validation, and the checkpoint behind them.

        Signals wait where something changes, so that the state may be saved wherever one ends the run.
        """
        at, steps = self.at, self.task.steps
        self.model.train()
        bar = tqdm(total=steps, initial=at.seen, desc=f"epoch {at.epoch + 1}", unit="step", disable=None, leave=False)
        with bar:
            while at.seen < steps:
                with signals.noted():
                    self.step()
                bar.update()
            figures = self.validate()
        with signals.noted():
            at.history.append({"loss": at.loss / steps, **figures})
            if _rank(figures) >= _rank(at.best):  # of equal ones the last has learned most
                at.best_epoch, at.best = at.epoch, figures
                self.kept = {key: value.cpu().clone() for key, value in self.model.state_dict().items()}
            said = "".join(f"  {name} {value:.4f}" for name, value in at.history[-1].items())
            print(f"epoch {at.epoch + 1:3}{said}", flush=True)
            at.epoch, at.seen, at.loss = at.epoch + 1, 0, 0.0
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save()

    def step(self) -> None:
        at, task = self.at, self.task
        now = at.epoch * task.steps + at.seen
        for group in self.optimizer.param_groups:
            ramp = min(max(now / group["start"] - 1, 0.0), 1.0) if group["start"] else 1.0
            group["lr"] = self.rate(now) * group["share"] * ramp
        torch.manual_seed(int(stream(self.cfg.seed, at.epoch, at.seen, 0, DROPOUT).integers(2**63)))
        batch = task.batch(at.epoch, at.seen)
        with task.precision.autocast():
            loss = task.loss(self.model, batch)
        value = loss.item()
        if not math.isfinite(value):
            where = f"epoch {at.epoch + 1}, step {at.seen + 1}"
            raise UserError(f"the loss is {value} in {where}; lower --base_lr or change --weights, and --dump_path")
        self.optimizer.zero_grad()
        task.precision.backward(loss)
        task.precision.step(self.optimizer)
        at.loss += value
        at.seen += 1

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Figures of an epoch, none where there is nothing to choose from or by."""
        if self.task.epochs == 1 or not self.task.split.validation:
            return {}
        self.model.eval()
        return self.task.validate(self.model)

    def save(self) -> None:
        parts = {"learner": self.model, "optimizer": self.optimizer, "scaler": self.task.precision.scaler}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= asdict(self.at) | {"kept": self.kept, "seconds": self.seconds(), "settings": self.settings}
        checkpoint.save(state, self.folder)
        self.saved_at = time.monotonic()

    def seconds(self) -> float:
        """Of the run, all its parts together."""
        return self.at.seconds + time.monotonic() - self.began


def _require_one_process() -> None:
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("downstream tasks train in one process; start them with python, not with torchrun")


def _rank(figures: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(-math.inf if math.isnan(value) else value for value in figures.values())
