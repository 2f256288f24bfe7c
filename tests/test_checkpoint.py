"""Checkpoints are whole, damaged and known to be so, or absent; a run that was stopped ends as one that was not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import random
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import losses, run, stop_after, write_data

from models.resnet import GreyResNet
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


# ---- the checksum, and what is never loaded


def save(folder: Path, epoch: int, keep_as: str | None = None) -> Path:
    state = {"learner": {"w": torch.arange(300.0)}, "epoch": epoch, "seen": 0, "sums": {"loss": 0.5}}
    checkpoint.save(state, folder, keep_as)
    return folder / checkpoint.LATEST


def test_any_flipped_bit_and_any_cut_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    whole = path.read_bytes()
    draw = random.Random(0)
    for at in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(200))]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"checkpoint\.pth: is (damaged|cut short)"):
            checkpoint.read(path)
    for length in [0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(100))]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut short|damaged"):
            checkpoint.read(path)
    path.write_bytes(whole)
    assert checkpoint.read(path)[0]["epoch"] == 1


class Plant:
    def __reduce__(self):
        return Path.touch, (Path("planted"),)


@pytest.mark.parametrize(
    "pickled",
    [pickle.dumps(Plant(), 2), b"cbuiltins\nbytearray\n(L1000000000000L\ntR.", b"cbuiltins\neval\n(V1\ntR."],
    ids=["runs something", "asks for a terabyte", "evaluates"],
)
def test_what_needs_more_than_tensors_is_refused(pickled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    forge(path, {"archive/data.pkl": pickled})
    with pytest.raises(UserError, match=r"checkpoint\.pth: needs more than tensors and plain values"):
        checkpoint.read(path)
    assert not Path("planted").exists()


def forge(path: Path, changed: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Change records of a checkpoint and make its checksum right again."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()} | changed
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    content = path.read_bytes()
    path.write_bytes(content + checkpoint.SEAL + hashlib.sha256(content).hexdigest().encode())


# ---- what stays in a folder


def test_the_last_two_are_kept_and_those_for_good(tmp_path):
    for epoch in range(1, 7):
        save(tmp_path, epoch, f"checkpoint_epoch{epoch}.pth" if epoch % 3 == 0 else None)
    kept = {path.name: checkpoint.read(path)[0]["epoch"] for path in tmp_path.iterdir()}
    assert kept == {
        "checkpoint.pth": 6,
        "checkpoint_previous.pth": 5,
        "checkpoint_epoch3.pth": 3,
        "checkpoint_epoch6.pth": 6,
    }


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
    for name in (".checkpoint.pth.99999998.tmp", ".checkpoint_previous.pth.99999999-ab.tmp", ".other.pth.3.tmp"):
        (tmp_path / name).write_bytes(b"half")
    save(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint.pth",
        "checkpoint_previous.pth",
        ".other.pth.3.tmp",  # of another run that shares the folder
    }


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting a small disk was refused: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "400m"):
        run("mask_swav", data, tmp_path, epochs=1, dump_path=str(disk / "run"))
        used = shutil.disk_usage(disk)
        (disk / "filler").write_bytes(bytes(used.free - 2**20))
        good = (disk / "run" / checkpoint.LATEST).read_bytes()
        with pytest.raises(UserError, match=r"checkpoint\.pth: cannot be written \(No space left.*; free space"):
            run("mask_swav", data, tmp_path, epochs=2, dump_path=str(disk / "run"))
        assert (disk / "run" / checkpoint.LATEST).read_bytes() == good
        assert not list((disk / "run").glob(".*"))
        (disk / "filler").unlink()
        run("mask_swav", data, tmp_path, epochs=2, dump_path=str(disk / "run"))


# ---- what a late review found


def test_torchs_old_format_before_a_harmless_archive_is_refused(tmp_path):
    """torch.load takes a file that does not begin as an archive for its old format, past all checks of the archive."""

    class Large:
        def __reduce__(self):
            return bytearray, (10**9,)

    old, harmless = io.BytesIO(), io.BytesIO()
    torch.save({"learner": {}, "epoch": 1, "x": Large()}, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(harmless, "w") as archive:
        archive.writestr("x", "y")
    content = old.getvalue() + harmless.getvalue()
    path = tmp_path / checkpoint.LATEST
    path.write_bytes(content + checkpoint.SEAL + hashlib.sha256(content).hexdigest().encode())
    with pytest.raises(UserError, match=r"no archive of torch\.save"):
        checkpoint.read(path)


def changed(folder: Path, change) -> None:
    """Write the newest checkpoint again, with its checksum, after change(state)."""
    state = checkpoint.load(folder)
    change(state)
    (folder / checkpoint.LATEST).unlink()
    checkpoint.save(state, folder)


def test_a_checkpoint_of_another_precision_goes_on(data, tmp_path):
    """`precision auto` was bf16 on the first GPU, without a scaler, and is fp16 on the next."""
    run("mask_swav", data, tmp_path, epochs=1, precision="fp32")
    changed(tmp_path / "runs" / "mask_swav", lambda state: state["config"].update(precision="fp16"))
    run("mask_swav", data, tmp_path, epochs=2, precision="fp16")


@pytest.mark.parametrize("lost", ["counted", "config", "optimizer", "learner"])
def test_a_checkpoint_of_another_version_is_one_clear_error(lost, data, tmp_path):
    run("mask_swav", data, tmp_path, epochs=1)
    change = (lambda state: state["learner"].popitem()) if lost == "learner" else (lambda state: state.pop(lost))
    changed(tmp_path / "runs" / "mask_swav", change)
    with pytest.raises(UserError, match="does not fit this version of the project"):
        run("mask_swav", data, tmp_path, epochs=2)


def test_an_overflow_while_the_bank_is_filled_does_not_reach_the_statistics(data, tmp_path, monkeypatch):
    forward, calls = GreyResNet.forward, []

    def sometimes(self, x):
        calls.append(1)
        return forward(self, x * float("nan") if len(calls) == 2 else x)

    monkeypatch.setattr(GreyResNet, "forward", sometimes)
    state = run("ssl_deepcluster2D", data, tmp_path, epochs=1)
    assert all(value.isfinite().all() for value in state.values())
