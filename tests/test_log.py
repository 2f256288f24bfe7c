"""What a run says of itself: the bar, the tables, TensorBoard, W&B, and where the time goes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny import losses, run, stop_after

from training import log as logs
from training.log import Log
from utils import profile
from utils.distributed import Run
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = "mask_swav"  # the fastest


def new_log(folder: Path, first_epoch: int = 0, **changes: Any) -> Log:
    values = {"epochs": 4, "pretrained_path": str(folder / "weights"), "tensorboard": False, "wandb_project": None}
    config = SimpleNamespace(**(values | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "to_dict", vars)
        return Log(folder, config, Run(0, 1, torch.device("cpu")), first_epoch)


def test_the_bar_shows_losses_rate_wait_and_the_runs_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    log = new_log(tmp_path)
    bar = log.bar(1, 10, 4)
    log.advance(bar, 2, {"loss": 5.0, "intra": 4.25}, 0.3, 0.0)
    bar.refresh()
    bar.close()
    shown = capsys.readouterr().err
    for part in ("epoch 2/4", "16/40", "loss 5", "intra 4.25", "lr 0.3", "data 0%", "ends in 00:"):
        assert part in shown, part


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


def test_a_package_that_is_missing_is_named_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    new_log(tmp_path / "not_asked")
    with pytest.raises(UserError, match="pip install wandb"):
        new_log(tmp_path / "asked", wandb_project="mine")
    assert not (tmp_path / "asked" / "config.yaml").exists()


# ---- Weights & Biases, by a stand-in


@pytest.mark.slow
def test_a_resumed_run_is_the_same_one_in_wandb(data, tmp_path, monkeypatch):
    wandb = Mock()
    logged = wandb.init.return_value.log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        with pytest.raises(SystemExit):
            run(SCRIPT, data, tmp_path, wandb_project="mine")
    run(SCRIPT, data, tmp_path, wandb_project="mine")
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mine", SCRIPT, "allow")
    assert first["config"]["batch_size"] == 2
    assert [call.kwargs["step"] for call in logged.call_args_list] == [0, 1]
    last = float(losses(tmp_path / "runs" / SCRIPT)[1]["loss"])
    assert logged.call_args.args[0]["loss"] == pytest.approx(last, rel=1e-5)
    assert wandb.init.return_value.finish.call_count == 2


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
def test_a_profiled_run_splits_its_epochs(data, tmp_path):
    run("ssl_deepcluster3D", data, tmp_path, profile=True, epochs=1)
    with open(tmp_path / "runs/ssl_deepcluster3D/metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    times = {name: float(value) for name, value in row.items() if name.startswith("time_")}
    names = {"data", "augment", "forward", "f_intra", "f_inter", "objective", "diagnostics", "backward", "optimizer"}
    assert set(times) == {f"time_{name}" for name in names}
    assert all(seconds > 0 for seconds in times.values())
    assert 0.5 * float(row["seconds"]) < sum(times.values()) <= float(row["seconds"]) + 0.01
