"""What a run says of itself: the bar, the tables, TensorBoard, W&B, and where the time goes."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import losses, run, stop_after

from training import log as logs
from training.log import Log
from utils import profile
from utils.distributed import Run
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
MAIN, SECOND = Run(0, 1, torch.device("cpu")), Run(1, 2, torch.device("cpu"))
SCRIPT = "mask_swav"  # the fastest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def new_log(folder: Path, place: Run = MAIN, first_epoch: int = 0, **changes: Any) -> Log:
    values = {"epochs": 4, "pretrained_path": str(folder / "weights"), "tensorboard": False, "wandb_project": None}
    config = SimpleNamespace(**(values | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "to_dict", vars)
        return Log(folder, config, place, first_epoch, {"intra": 4.605})


def advance(log: Log) -> None:
    bar = log.bar(1, 10, 4)
    bar.began = 100.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: 102.0))
        bar.advance(2, {"loss": 5.0, "intra": 4.25}, 0.3, 16, 0.5)
    bar.tqdm.refresh()
    bar.close()


def test_the_bar_shows_loss_baseline_rate_speed_wait_and_the_runs_end(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    advance(new_log(tmp_path))
    shown = terminal.getvalue()
    for part in ("epoch 2/4", "6/10", "loss 5", "intra 4.25 (ln K 4.605)", "lr 0.3", "8 samples/s", "data 25%"):
        assert part in shown, part
    assert "run ends in 00:24" in shown  # a second per step; 4 steps of this epoch and 20 of the two others are left


def test_a_warning_is_printed_and_kept_and_dropped_where_the_run_goes_back(tmp_path, capsys):
    log = new_log(tmp_path)
    log.warn(0, [("intra_few", "few, all of them")])
    log.warn(1, [])
    log.warn(2, [("inter_jump", "jump")])
    assert "warning: epoch 1: few, all of them" in capsys.readouterr().out
    new_log(tmp_path, first_epoch=2)
    with open(tmp_path / "warnings.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"epoch": "0", "condition": "intra_few", "text": "few, all of them"}]


@pytest.mark.slow
def test_tensorboard_has_curves_and_no_epoch_twice(data, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with monkeypatch.context() as patch:
        stop_after(6, patch)  # of 4 an epoch
        with pytest.raises(SystemExit):
            run(SCRIPT, data, tmp_path, tensorboard=True)
    run(SCRIPT, data, tmp_path, tensorboard=True)
    folder = tmp_path / "runs" / SCRIPT
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [0, 1]
    skill = [float(row["mask_skill"]) for row in losses(folder)]
    assert [e.value for e in events.Scalars("mask_skill")] == pytest.approx(skill, rel=1e-5)


@pytest.mark.parametrize(
    ("package", "option", "says"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, "pip install tensorboard"),
        ("wandb", {"wandb_project": "mine"}, "pip install wandb"),
    ],
)
def test_a_package_that_is_missing_is_named_when_it_is_asked_for(package, option, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    new_log(tmp_path / "not_asked")
    with pytest.raises(UserError, match=says):
        new_log(tmp_path / "asked", **option)
    assert not (tmp_path / "asked" / "config.yaml").exists()


# ---- Weights & Biases, by a stand-in


class Wandb(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(started=[], logged=[], finished=0)

    def init(self, **arguments: Any) -> Wandb:
        self.started.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.slow
def test_a_resumed_run_is_the_same_one_in_wandb(data, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(SystemExit):
            run(SCRIPT, data, tmp_path, wandb_project="mine")
    run(SCRIPT, data, tmp_path, wandb_project="mine")
    first, second = wandb.started
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mine", SCRIPT, "allow")
    assert first["config"]["batch_size"] == 2
    assert [step for step, _ in wandb.logged] == [0, 1]
    assert wandb.logged[1][1]["loss"] == pytest.approx(float(losses(tmp_path / "runs" / SCRIPT)[1]["loss"]), rel=1e-5)
    assert wandb.finished == 2


# ---- where the time goes


def test_spans_inside_others_are_taken_from_them(monkeypatch):
    clock = iter([0, 1, 3, 7, 10, 11, 12, 14])  # outer from 0 to 7, inner from 1 to 3; the same again
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
    with profile.recording(torch.device("cpu")):
        for _ in range(2):
            with profile.span("outer"), profile.span("inner"):
                pass
        assert profile.seconds() == {"outer": 5 + 3, "inner": 2 + 1}
        assert profile.seconds() == {}
    assert profile.seconds() == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "parts"), [("ssl_swav2D", {"f_intra"}), ("ssl_deepcluster3D", {"f_intra", "f_inter"})]
)
def test_a_profiled_run_splits_its_epochs(script, parts, data, tmp_path):
    run(script, data, tmp_path, profile=True, epochs=1)
    with open(tmp_path / "runs" / script / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    times = {name: float(value) for name, value in row.items() if name.startswith("time_")}
    names = {"data", "augment", "forward", "objective", "diagnostics", "backward", "optimizer"}
    assert set(times) == {f"time_{name}" for name in names | parts}
    assert all(seconds > 0 for seconds in times.values())
    assert 0.5 * float(row["seconds"]) < sum(times.values()) <= float(row["seconds"]) + 0.01
