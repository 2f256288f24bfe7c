"""A lock has one owner and refuses the second by name; neither a dead, a frozen nor a far owner holds it for ever."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from utils import files, locks, signals
from utils.errors import UserError
from utils.locks import Lock

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.05), ("SILENT", 0.6), ("SAID_AFTER", 0.1)):
        monkeypatch.setattr(locks, name, seconds)


def own(path: Path, ready: Any) -> None:
    with Lock(path, "trains into runs/x").held():
        ready.set()
        time.sleep(60)


@contextlib.contextmanager
def owner(path: Path) -> Any:
    """Another process that has the lock."""
    ready = FORK.Event()
    process = FORK.Process(target=own, args=(path, ready))
    process.start()
    assert ready.wait(10)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught, Lock(path, "tests").held("choose another folder"):
        pass
    return str(caught.value)


def test_the_second_is_refused_by_name_and_leaves_the_lock_alone(tmp_path):
    path = tmp_path / "runs" / ".lock"
    with owner(path) as process:
        said = refused(path)
        assert f"process {process.pid} on " in said
        assert "trains into runs/x since" in said
        assert said.endswith("; choose another folder")
        with pytest.raises(UserError):
            Lock(path, "tests").check("choose")
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        assert f"is stopped (kill -CONT {process.pid}" in refused(path)
        assert path.exists()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_holds_nothing(tmp_path, reaped):
    path = tmp_path / ".lock"
    with owner(path) as process:
        process.kill()
        if reaped:
            process.join()
        else:
            time.sleep(0.2)  # a zombie still has its number
        assert path.exists()
        Lock(path, "tests").check("choose another folder")
        with Lock(path, "tests").held("choose another folder") as lock:
            assert lock.mine()
    assert not path.exists()


class Far(Lock):
    """Of a process on another machine."""

    def _content(self) -> bytes:
        return super()._content().replace(locks.machine().encode(), b"elsewhere")


def test_an_owner_on_another_machine_is_refused_while_it_counts_and_dead_when_it_is_silent(tmp_path):
    path, silent = tmp_path / ".lock", threading.Event()
    lock = Far(path, "trains into runs/x")
    assert lock._create(False)

    def count() -> None:
        while not silent.wait(0.05):
            lock.beat()

    thread = threading.Thread(target=count)
    thread.start()
    try:
        assert "trains into runs/x" in refused(path)
    finally:
        silent.set()
        thread.join()
    with Lock(path, "tests").held("choose another folder"):
        with pytest.raises(UserError, match=r"another process has taken over.*; stop"):
            lock.require("stop")
        lock.beat()  # wakes up, and leaves the new owner's file as it is
        assert json.loads(path.read_text())["doing"] == "tests"


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"pid": "x"}', os.urandom(200)])
def test_what_is_no_lock_of_ours_is_waited_for_only_so_long(tmp_path, content):
    path = tmp_path / ".lock"
    path.write_bytes(content)
    with Lock(path, "tests").held("choose another folder") as lock:
        assert lock.mine()


def add(path: Path, times: int) -> None:
    for _ in range(times):
        with Lock(path / ".lock", "adds").held():
            count = int((path / "count").read_text())
            time.sleep(0.001)
            (path / "count").write_text(str(count + 1))


def test_of_many_one_at_a_time_also_where_all_find_a_dead_one(tmp_path):
    (tmp_path / "count").write_text("0")
    with owner(tmp_path / ".lock") as process:
        process.kill()
    processes = [FORK.Process(target=add, args=(tmp_path, 10)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "count").read_text() == "40"
    assert [p.name for p in tmp_path.iterdir()] == ["count"]


def test_a_wait_is_said_and_ended_by_a_signal(tmp_path, capsys):
    path = tmp_path / ".lock"
    with owner(path) as process:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(SystemExit) as stopped, signals.handled(), signals.noted(), Lock(path, "tests").held():
            pass
        assert stopped.value.code == 143
        assert f"waiting: {path}: process {process.pid} on " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "old", "stays"),
    [
        (lambda: f".x.csv.{locks.machine()}-{os.getpid()}-ab.tmp", 0, True),
        (lambda: f".x.csv.{locks.machine()}-99999999-ab.tmp", 0, False),
        (lambda: ".x.csv.deadbeef-99999999-ab.tmp", 0, True),  # of another machine, where it may run
        (lambda: ".x.csv.deadbeef-99999999-ab.tmp", 2 * files.FORGOTTEN, False),
    ],
)
def test_only_what_nobody_writes_any_more_is_cleared_away(tmp_path, name: Callable[[], str], old: float, stays: bool):
    leftover = tmp_path / name()
    leftover.write_bytes(b"half")
    os.utime(leftover, (time.time() - old,) * 2)
    files.write_text("x", tmp_path / "x.csv")
    assert leftover.exists() == stays
