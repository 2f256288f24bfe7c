"""Steps that must not be applied, processes that drift apart: noticed, named, survived."""

from __future__ import annotations

import csv
import os
import signal
from typing import Any

import pytest
import torch
from processes import run_processes
from tiny import losses, options, run, stop_after, write_data
from torch import nn
from torch.utils.data import get_worker_info
from trials import Trial

from datasets.batch import Batch
from datasets.loaders import VolumeWindows
from objectives.learners import Learner
from training.train import Training
from utils import checkpoint, files, guards
from utils.errors import UserError
from utils.precision import Precision

pytestmark = pytest.mark.usefixtures("one_thread")


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int], what: str) -> None:
    """Make the batch, the loss or the gradient of these steps (counted from 0) not finite."""
    backward, calls = Training.backward, []

    def spoiled(self: Training, batch: Batch, *how: Any, **more: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        now = len(calls) - 1 in bad
        if now and what == "batch":
            (batch.views if batch.crops is None else batch.crops[0]).view(-1)[0] = float("nan")
        found = backward(self, batch, *how, **more)
        if now and what == "gradient":
            list(self.core.parameters())[-1].grad.view(-1)[0] = float("inf")
        return found | {"loss": found["loss"] * float("nan")} if now and what == "loss" else found

    monkeypatch.setattr(Training, "backward", spoiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "what"),
    [("ssl_swav2D", "batch"), ("ssl_deepcluster3D", "batch"), ("mask_swav", "loss"), ("mask_swav", "gradient")],
)
def test_a_bad_step_is_left_out_whole_and_its_files_are_noted(script, what, data, tmp_path, monkeypatch, capsys):
    """Nothing of it stays: the state after the bad step is that before it."""
    states: list[dict[str, torch.Tensor]] = []
    update = Training.update

    def watched(self: Training, batches: Any, now: int, parts: int = 1) -> Any:
        before = snapshot(self.core)
        done = update(self, batches, now, parts)
        if now == 1:
            states.extend((before, snapshot(self.core)))
        return done

    monkeypatch.setattr(Training, "update", watched)
    spoil(monkeypatch, {1}, what)
    weights = run(script, data, tmp_path, epochs=1, **({"epoch_queue_starts": 0} if "swav2D" in script else {}))
    assert all(v.isfinite().all() for v in weights.values())
    before, after = states
    # Prototypes are brought to unit length in the forward pass, which changes the last bit of some.
    assert [k for k in before if not torch.allclose(before[k].float(), after[k].float(), atol=1e-6)] == []
    folder = tmp_path / "runs" / script
    with open(folder / guards.BAD_STEPS, newline="") as file:
        (line,) = csv.DictReader(file)
    wanted = "the gradient" if what == "gradient" else "the loss"
    assert (line["epoch"], line["step"], line["not_finite"]) == ("0", "1", wanted)
    assert "case_" in line["files"] or "image_" in line["files"]
    assert losses(folder)[0]["bad_steps"] == "1"
    assert f"warning: {wanted} is not finite at epoch 0 step 1" in capsys.readouterr().out


def test_names_stay_on_one_line_and_in_one_cell(tmp_path, capsys):
    names = ["a\nb.npy", "=1+1\x1b[31m.npy", "<script>.npy", "\u202egnp.npy", os.fsdecode(b"\xff.npy")]
    shown = [files.shown(name) for name in names]
    guards.report_bad_step("the loss", shown, 0, 1, 1, 10, tmp_path)
    with open(tmp_path / guards.BAD_STEPS, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["files"] == "; ".join(shown)
    assert row["files"].isprintable()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    assert len(set(shown)) == 5


def snapshot(core: Learner) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in core.state_dict().items()}
    for name, memory in core.memory_state().items():
        # Good embeddings of a bad step may be kept; those that are not finite may not.
        state |= {f"{name}.{key}": torch.isfinite(value) for key, value in memory.items()}
    return state


@pytest.mark.slow
def test_bad_steps_in_a_row_stop_the_run_and_the_count_goes_on_after_a_stop(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, {5, 6, 7}, "loss")
        stop_after(6, patch)  # after the first bad one, in epoch 1
        with pytest.raises(SystemExit):
            run("mask_swav", data, tmp_path, epochs=3, max_bad_steps=3)
    state = checkpoint.load(tmp_path / "runs" / "mask_swav")
    assert (state["epoch"], state["seen"], state["bad_steps"], state["bad_in_a_row"]) == (1, 4, 1, 1)
    spoil(monkeypatch, {0, 1}, "loss")
    with pytest.raises(UserError, match=r"epoch 1 step 3;.*\(3 in a row, max_bad_steps 3\).*keeps the last good"):
        run("mask_swav", data, tmp_path, epochs=3, max_bad_steps=3)
    assert checkpoint.load(tmp_path / "runs" / "mask_swav")["seen"] == 4
    assert not list((tmp_path / "weights").glob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_an_overflow_of_the_loss_scale_is_no_bad_step_until_there_is_nothing_left_to_lower(
    scale, data, tmp_path, monkeypatch
):
    spoil(monkeypatch, {1}, "gradient")
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **more: scaler(*args, init_scale=scale, **more))
    run("mask_swav", data, tmp_path, epochs=1, precision="fp16")
    (row,) = losses(tmp_path / "runs" / "mask_swav")
    state = checkpoint.load(tmp_path / "runs" / "mask_swav")
    assert row["bad_steps"] == ("0" if scale > 1 else "1")
    assert state["scaler"]["scale"] == (scale / 2 if scale > 1 else 1.0)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(data, tmp_path, monkeypatch):
    step = Precision.step

    def broken(self: Precision, optimizer: torch.optim.Optimizer) -> None:
        step(self, optimizer)
        optimizer.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    run("mask_swav", data, tmp_path, epochs=1)
    good = (tmp_path / "runs" / "mask_swav" / checkpoint.LATEST).read_bytes()
    monkeypatch.setattr(Precision, "step", broken)
    with pytest.raises(UserError, match=r"in a row|weights are not finite"):
        run("mask_swav", data, tmp_path, epochs=2)
    assert (tmp_path / "runs" / "mask_swav" / checkpoint.LATEST).read_bytes() == good


def said_of(options: list[dict[str, Any]]) -> str:
    try:
        guards.require_same_options(options[torch.distributed.get_rank()])
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_processes_with_other_options_are_named_and_places_are_their_own():
    usual = {"temperature": 0.1, "seed": 3, "workers": 4, "data_path": "/a"}
    others = usual | {"workers": 2, "data_path": "/b"}, usual | {"temperature": 0.2}, {"seed": 3}
    assert run_processes(3, said_of, [usual, others[0], usual]) == [""] * 3
    for other, wanted in ((others[1], "has temperature: 0.2 instead of 0.1"), (others[2], "has temperature: None ins")):
        said = run_processes(3, said_of, [usual, usual, other])
        assert len(set(said)) == 1
        assert said[0].startswith("process 2 on ")
        assert wanted in said[0]


@pytest.mark.slow
def test_a_process_with_another_window_is_refused_before_any_step(tmp_path):
    trees = [write_data(tmp_path / name) for name in "ab"]
    (trees[1] / "Volumes" / "dataset.yaml").write_text("window: [0, 1]\n")
    args = [options("mask_swav", tree, tmp_path, batch_size=1) for tree in trees]
    trial = Trial("mask_swav", args, tmp_path / "trial", ranks=2)
    assert trial.wait(120) == [2, 2]
    assert "error: data_path: processes see different files, or dataset.yaml" in trial.log(0)


def differ(broken_rank: int) -> str:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    guards.require_equal_weights(module, "at first")
    if torch.distributed.get_rank() == broken_rank:
        module[1].running_var[1] += 1e-6
    try:
        guards.require_equal_weights(module, "after epoch 3")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_process_with_other_weights_is_named_on_all():
    said = run_processes(3, differ, 1)
    assert len(set(said)) == 1
    assert said[0].startswith("process 1 on ")
    assert "other weights than the rest after epoch 3 (1 tensors, first 1.running_var)" in said[0]


@pytest.mark.slow
def test_a_worker_that_dies_is_said_with_a_remedy(data, tmp_path, monkeypatch):
    """As when the kernel kills it for want of memory."""

    def kill(*_: Any) -> None:
        assert get_worker_info()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(VolumeWindows, "__getitem__", kill)
    with pytest.raises(UserError, match=r"DataLoader worker \(pid.*lower --workers"):
        run("mask_swav", data, tmp_path, workers=1)
