"""Checkpoints are whole, damaged and known to be so, or absent; a run that was stopped ends as one that was not.

The same for signals is in test_signals.py.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import run_processes
from tiny import losses, options, run, stop_after, unit, write_data
from trials import Trial

import mask_swav
from objectives import SwAV
from training.scripts import SCRIPTS
from utils import checkpoint, locks
from utils.config import to_dict
from utils.distributed import Run
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- files


def save(folder: Path, epoch: int, keep_as: str | None = None, seen: int = 0) -> Path:
    state = {"learner": {"w": torch.arange(300.0) + epoch}, "epoch": epoch, "seen": seen, "sums": {"loss": 0.5}}
    checkpoint.save(state, folder, keep_as)
    return folder / checkpoint.LATEST


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    whole, draw = path.read_bytes(), random.Random(0)
    for at in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(100))]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.randrange(8)
        for broken in (flipped, whole[:at]):
            path.write_bytes(broken)
            with pytest.raises(UserError, match=r"checkpoint\.pth: is damaged, cut short"):
                checkpoint.read(path)


def test_the_last_two_are_kept_and_those_for_good_and_the_one_before_replaces_a_damaged_one(tmp_path, capsys):
    assert checkpoint.load(tmp_path) is None
    for epoch in range(1, 7):
        save(tmp_path, epoch, f"checkpoint_epoch{epoch}.pth" if epoch % 3 == 0 else None)
    kept = {path.name: checkpoint.read(path)[0]["epoch"] for path in tmp_path.iterdir()}
    assert kept == {checkpoint.LATEST: 6, checkpoint.PREVIOUS: 5} | {f"checkpoint_epoch{e}.pth": e for e in (3, 6)}
    latest = tmp_path / checkpoint.LATEST
    latest.write_bytes(latest.read_bytes()[:100])
    assert checkpoint.load(tmp_path)["epoch"] == 5
    assert "trying the checkpoint before it" in capsys.readouterr().out
    assert checkpoint.read(latest)[0]["epoch"] == 5  # not the damaged one becomes the previous one
    for path in (latest, tmp_path / checkpoint.PREVIOUS):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("cut", ["link", "replace"])
def test_a_kill_between_any_two_file_operations_leaves_a_newest_checkpoint(cut, tmp_path, monkeypatch):
    """Each link and each renaming is in turn the last thing that happens."""
    for nth in range(1, 6):
        folder = tmp_path / str(nth)
        for epoch in (1, 2):
            save(folder, epoch)
        function, calls = getattr(os, cut), []

        def die(*args, function=function, calls=calls, nth=nth):
            function(*args)
            calls.append(1)
            if len(calls) == nth:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, cut, die)
            with contextlib.suppress(KeyboardInterrupt):
                save(folder, 3, "kept.pth")
        assert checkpoint.load(folder)["epoch"] in (2, 3)
        assert all(checkpoint.read(path) for path in folder.glob("*.pth"))


def test_what_killed_processes_left_is_cleared_away(tmp_path):
    save(tmp_path, 1)
    other = ".other.pth.3.tmp"  # of another run that shares the folder
    mine = [
        f".{name}.{locks.machine()}-9999999{i}-ab.tmp"
        for i, name in enumerate((checkpoint.LATEST, checkpoint.PREVIOUS))
    ]
    for name in (*mine, other):
        (tmp_path / name).write_bytes(b"half")
    save(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {checkpoint.LATEST, checkpoint.PREVIOUS, other}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("No space left: write failed")])
def test_a_full_disk_is_said_and_keeps_the_last_good_checkpoint(error, tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    good = path.read_bytes()

    def fail(state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be written \(No space left.*; free space"):
        save(tmp_path, 2)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def load_own(folder: str) -> dict:
    return checkpoint.load(Path(folder) / str(torch.distributed.get_rank()))


@pytest.mark.slow
def test_the_newest_checkpoint_is_what_every_process_gets(tmp_path):
    for rank, (epoch, seen) in enumerate([(1, 4), (2, 0), (0, 8)]):  # of disks that the processes do not share
        save(tmp_path / str(rank), epoch, seen=seen)
    found = run_processes(3, load_own, str(tmp_path))
    assert [state["epoch"] for state in found] == [2, 2, 2]
    assert all(torch.equal(state["learner"]["w"], torch.arange(300.0) + 2) for state in found)


# ---- runs


# Per epoch: 5 steps of 4 images, 4 of 2 volumes.
STOPS = [(script, 7 if "2D" in script else 6, (1, 8 if "2D" in script else 4)) for script in SCRIPTS]
STOPS += [("ssl_swav2D", 5, (1, 0)), ("mask_swav", 4, (1, 0))]  # in the last step of an epoch


@pytest.mark.slow
@pytest.mark.parametrize(("script", "step", "place"), STOPS)
def test_a_stopped_run_ends_with_the_same_bytes(script, step, place, data, tmp_path, monkeypatch):
    whole = run(script, data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(SystemExit) as stopped:
            run(script, data, tmp_path / "parts")
    assert stopped.value.code == 143
    state = checkpoint.load(tmp_path / "parts" / "runs" / script)
    assert (state["epoch"], state["seen"]) == place
    resumed = run(script, data, tmp_path / "parts")
    assert resumed.keys() == whole.keys()
    assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []
    assert losses(tmp_path / "parts" / "runs" / script) == losses(tmp_path / "whole" / "runs" / script)


@pytest.mark.slow
def test_other_options_or_data_do_not_continue_a_run_and_a_finished_one_stays(data, tmp_path):
    first = run("mask_swav", data, tmp_path, epochs=1)
    before = losses(tmp_path / "runs" / "mask_swav")
    again = run("mask_swav", data, tmp_path, epochs=1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert losses(tmp_path / "runs" / "mask_swav") == before
    with pytest.raises(UserError, match=r"dump_path.*base_lr: 0.5 -> 0.25.*another --dump_path"):
        run("mask_swav", data, tmp_path, epochs=1, base_lr=0.25)
    with pytest.raises(UserError, match="the files below data_path"):
        run("mask_swav", write_data(tmp_path / "other", volumes=9), tmp_path, epochs=1)
    for name, content in (("Volumes/dataset.yaml", b"window: [0, 1]\n"), ("Volumes/case_0.npy", None)):
        other = write_data(tmp_path / Path(name).name)  # one voxel, or how voxels are read
        content = content or (other / name).read_bytes()[:-1] + b"?"
        (other / name).write_bytes(content)
        with pytest.raises(UserError, match="the files below data_path, or window"):
            run("mask_swav", other, tmp_path, epochs=2)
    run("mask_swav", write_data(tmp_path / "moved"), tmp_path, epochs=2)
    assert [row["epoch"] for row in losses(tmp_path / "runs" / "mask_swav")] == ["0", "1"]


def changed(folder: Path, change) -> None:
    """Write the newest checkpoint again, with its checksum, after change(state)."""
    state = checkpoint.load(folder)
    change(state)
    checkpoint.save(state, folder)


@pytest.mark.slow
def test_a_checkpoint_of_another_precision_goes_on_and_one_of_another_version_is_a_clear_error(data, tmp_path):
    """`precision auto` was bf16 on the first GPU, without a scaler, and is fp16 on the next."""
    folder = tmp_path / "runs" / "mask_swav"
    run("mask_swav", data, tmp_path, epochs=1, precision="fp32")
    changed(folder, lambda state: state["config"].update(precision="fp16"))
    run("mask_swav", data, tmp_path, epochs=2, precision="fp16")
    good = checkpoint.load(folder)
    for lost in ("counted", "config", "optimizer", "learner"):
        checkpoint.save(copy.deepcopy(good), folder)
        changed(folder, lambda s, lost=lost: s["learner"].popitem() if lost == "learner" else s.pop(lost))
        with pytest.raises(UserError, match="does not fit this version of the project"):
            run("mask_swav", data, tmp_path, epochs=3, precision="fp16")


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(data, tmp_path):
    script = "ssl_deepcluster2D"
    whole = Trial(script, options(script, data, tmp_path / "whole"), tmp_path / "whole")
    assert whole.wait() == [0], whole.log()
    seconds = time.monotonic() - whole.began
    mine = options(script, data, tmp_path / "killed", workers=1, checkpoint_minutes=0.001)
    killed = Trial(script, mine, tmp_path / "killed")
    time.sleep(random.Random(script).uniform(0.3, 0.9) * seconds)
    killed.send(signal.SIGKILL)
    assert killed.wait() in ([-9], [0])  # it may just have ended
    resumed = Trial(script, mine, tmp_path / "killed")
    assert resumed.wait() == [0], resumed.log()
    made = [{p.name: p.read_bytes() for p in (tmp_path / out / "weights").glob("*.pth")} for out in ("killed", "whole")]
    assert made[0] == made[1]
    assert len(made[0]) == 1
    assert losses(tmp_path / "killed" / "runs" / script) == losses(tmp_path / "whole" / "runs" / script)
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.slow
def test_a_second_run_in_the_same_place_is_refused_by_name_at_the_start(data, tmp_path):
    mine = options("mask_swav", data, tmp_path, epochs=1000)
    first = Trial("mask_swav", mine, tmp_path / "first")
    while not (tmp_path / "runs/mask_swav" / checkpoint.LATEST).exists():
        time.sleep(0.1)
    for changes, says in (
        ({}, r"runs/mask_swav/\.lock: process {} on .* trains into .*another --dump_path"),
        (
            {"dump_path": str(tmp_path / "other")},
            r"weights/\.mask_swav\.pth\.lock: process {}.*--checkpoint_name",
        ),
    ):
        with pytest.raises(UserError, match=says.format(first.processes[0].pid)):
            run("mask_swav", data, tmp_path, **changes)
    assert not (tmp_path / "other").exists()
    first.send(signal.SIGKILL)
    assert first.wait() == [-9]
    run("mask_swav", data, tmp_path, epochs=checkpoint.load(tmp_path / "runs/mask_swav")["epoch"] + 1)
    assert not list(tmp_path.rglob(".*lock"))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["runs", "weights", "cache"])
def test_a_read_only_place_is_named_before_training(place, data, tmp_path, monkeypatch):
    """Permissions do not bind root, so the system call fails instead."""
    opened, places = os.open, {"runs": "runs/mask_swav", "weights": "weights", "cache": "cache"}

    def refuse(path, flags, *args, **more):
        if flags & os.O_CREAT and Path(path).parent.is_relative_to(tmp_path / places[place]):
            raise OSError(30, "Read-only file system")
        return opened(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"{places[place]}.*\(Read-only file system\); free"):
        run("mask_swav", data, tmp_path, cache_path=str(tmp_path / "cache"))
    assert not list(tmp_path.rglob("*.pth"))


# ---- another number of processes


@pytest.mark.slow
def test_two_processes_go_on_where_one_stopped(data, tmp_path, monkeypatch):
    """With the same batch on each: the global batch doubles, the bank is dealt out anew, no sample comes twice."""
    script = "ssl_deepcluster3D"
    mine = options(script, data, tmp_path)
    with monkeypatch.context() as patch:
        stop_after(5, patch)  # of 4 a epoch: 2 of 8 volumes of the second epoch are seen
        with pytest.raises(SystemExit):
            run(script, data, tmp_path)
    folder = tmp_path / "runs" / script
    before = checkpoint.load(folder)
    assert (before["epoch"], before["seen"], before["processes"]) == (1, 2, 1)
    two = Trial(script, mine, tmp_path / "two", ranks=2)
    assert two.wait() == [0, 0], two.log(0) + two.log(1)
    assert "processes: 1 -> 2, global batch: 2 -> 4; the order of the samples goes on" in two.log()
    assert two.steps == [2, 2]  # 6 volumes that were left, at most 4 a step
    old, new = (state["memory"]["inter"]["embeddings"] for state in (before, checkpoint.load(folder)))
    assert (new != old).any(dim=2).all(dim=0).sum() == 6  # exactly those that the second epoch had not seen
    one = Trial(script, mine | {"epochs": 3}, tmp_path / "one")
    assert one.wait() == [0], one.log()
    assert "processes: 2 -> 1" in one.log()
    assert one.steps == [4]


def test_which_batches_may_go_on(tmp_path):
    """After batches of 4 on each of two processes."""

    def goes_on(size: int, processes: int) -> str:
        old, new = (mask_swav.Config(batch_size=n, epochs=3) for n in (4, size))
        state = {"config": to_dict(old), "processes": 2, "data": "x", "epoch": 1, "seen": 0}
        return checkpoint.check_same_run(state, new, Run(0, processes, torch.device("cpu")), "x", tmp_path)

    assert goes_on(4, 2) == ""
    assert goes_on(8, 1) == "processes: 2 -> 1, global batch: 8 -> 8"
    with pytest.raises(UserError, match="batch_size: 4 -> 2"):
        goes_on(2, 2)


def test_a_run_of_a_version_that_knew_less_of_its_data_goes_on(tmp_path):
    config = mask_swav.Config(epochs=3)
    state = {"config": to_dict(config), "processes": 1, "data": "ab", "epoch": 1, "seen": 0}
    one = Run(0, 1, torch.device("cpu"))
    assert checkpoint.check_same_run(state, config, one, "abcd", tmp_path) == ""
    with pytest.raises(UserError, match="the files below data_path"):
        checkpoint.check_same_run(state | {"data": "abce"}, config, one, "abcd", tmp_path)


@pytest.mark.parametrize(("before", "after"), [(6, 6), (6, 4), (4, 6), (0, 4), (4, 0)])
def test_a_queue_of_another_length_keeps_its_newest_rows(before, after):
    torch.manual_seed(0)
    z = unit(4, 2, 2, 3)  # steps, views, samples, d
    old, new = SwAV(3, [2], queue_length=before), SwAV(3, [2], queue_length=after)
    for part in z:
        old.begin_epoch(0)
        old(part)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    kept = min(before, after)
    assert torch.equal(new.queue[:, :kept], old.queue[:, :kept])
    assert not new.queue[:, kept:].any()
    new.begin_epoch(0)
    for part in z:  # goes on, and is full after as many steps as the rows that it lacks take
        assert new(part).isfinite()
    assert after == 0 or new.queue[:, -1].any()
