"""Checkpoints are whole or absent, and a run that was stopped ends as one that was not."""

from __future__ import annotations

import pytest
import torch
from tiny import losses, run, stop_after, write_data

from utils import checkpoint
from utils.errors import UserError

SCRIPTS = [f"{kind}" for m in ("swav", "deepcluster") for kind in (f"ssl_{m}2D", f"mask_{m}", f"ssl_{m}3D")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_stopped_inside_an_epoch_ends_with_the_same_bytes(script, data, tmp_path, monkeypatch):
    whole = run(script, data, tmp_path / "whole")
    steps = 5 if "2D" in script else 4  # per epoch: 20 images in batches of 4, 8 volumes in batches of 2
    with monkeypatch.context() as patch:
        stop_after(steps + 2, patch)
        with pytest.raises(SystemExit) as stopped:
            run(script, data, tmp_path / "parts")
    assert stopped.value.code == 143
    state = checkpoint.load(tmp_path / "parts" / "runs" / script)
    assert (state["epoch"], state["seen"]) == (1, 8 if "2D" in script else 4)
    resumed = run(script, data, tmp_path / "parts")
    assert resumed.keys() == whole.keys()
    assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []
    assert losses(tmp_path / "parts" / "runs" / script) == losses(tmp_path / "whole" / "runs" / script)


def test_workers_change_nothing(data, tmp_path):
    plain, worker = run("mask_swav", data, tmp_path / "0"), run("mask_swav", data, tmp_path / "1", workers=1)
    assert all(torch.equal(plain[k], worker[k]) for k in plain)


def test_a_finished_run_starts_no_further_step(data, tmp_path, capsys):
    first = run("mask_swav", data, tmp_path)
    before = losses(tmp_path / "runs" / "mask_swav")
    again = run("mask_swav", data, tmp_path)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert losses(tmp_path / "runs" / "mask_swav") == before


def test_other_options_or_data_do_not_continue_a_run(data, tmp_path):
    run("mask_swav", data, tmp_path, epochs=1)
    with pytest.raises(UserError, match=r"dump_path.*base_lr: 0.5 -> 0.25.*another --dump_path"):
        run("mask_swav", data, tmp_path, epochs=1, base_lr=0.25)
    with pytest.raises(UserError, match="batch_size: 2 -> 4"):
        run("mask_swav", data, tmp_path, epochs=1, batch_size=4)
    other = write_data(tmp_path / "other", volumes=9)
    with pytest.raises(UserError, match="the files below data_path"):
        run("mask_swav", other, tmp_path, epochs=1)
    run("mask_swav", data, tmp_path, epochs=2)
    assert [row["epoch"] for row in losses(tmp_path / "runs" / "mask_swav")] == ["0", "1"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left: write failed")])
def test_a_failed_write_leaves_the_old_file_and_no_other(error, tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    checkpoint.write({"learner": torch.ones(3)}, path)
    old = path.read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"x\.pth.*No space left"):
        checkpoint.write({"learner": torch.zeros(3)}, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_the_previous_checkpoint_is_used_when_the_newest_is_damaged(tmp_path, capsys):
    assert checkpoint.load(tmp_path) is None
    for epoch in range(3):
        checkpoint.save(
            {"learner": {}, "epoch": epoch, "seen": 0}, tmp_path, keep_as="kept.pth" if epoch == 0 else None
        )
    assert checkpoint.load(tmp_path)["epoch"] == 2
    assert torch.load(tmp_path / "kept.pth", weights_only=True)["epoch"] == 0
    latest = tmp_path / checkpoint.LATEST
    latest.write_bytes(latest.read_bytes()[:100])
    assert checkpoint.load(tmp_path)["epoch"] == 1
    assert "checkpoint.pth" in capsys.readouterr().out
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        checkpoint.load(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/x\.pth: cannot be written"):
        checkpoint.write({}, tmp_path / "file" / "x.pth")
    with pytest.raises(UserError, match=r"pretrained_path: .*file/weights.*cannot be written"):
        run("mask_swav", data, tmp_path, pretrained_path=str(tmp_path / "file" / "weights"))
    assert not (tmp_path / "runs").exists()  # before training, not after it
    with pytest.raises(UserError, match=r"dump_path: .*file.*cannot be written"):
        run("mask_swav", data, tmp_path, dump_path=str(tmp_path / "file" / "run"))
