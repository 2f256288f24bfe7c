"""The cache on disk: a file is made once, by one of many, and is whole or not there."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from datasets.cache import BadSource, cached, key_of, make_room
from utils.errors import UserError

ARRAY = np.arange(12.0).reshape(3, 4)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never(temporary: Path) -> None:
    raise AssertionError("the file is there")


def test_arrays_dictionaries_of_arrays_and_any_file_are_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep/cache"
    for suffix, make in (
        (".npy", lambda temporary: np.save(temporary, ARRAY)),
        (".npz", lambda temporary: np.savez(temporary, a=ARRAY, b=-ARRAY)),
        (".json", lambda temporary: temporary.write_text("{}")),
    ):
        path = cached(folder, "k", make, suffix)
        assert path == folder / f"k{suffix}"
        assert cached(folder, "k", never, suffix) == path
    np.testing.assert_array_equal(np.load(folder / "k.npy"), ARRAY)
    np.testing.assert_array_equal(np.load(folder / "k.npz")["b"], -ARRAY)
    assert files(folder) == ["k.json", "k.npy", "k.npz"]


def test_a_key_changes_with_every_part() -> None:
    keys = {key_of(*parts) for parts in ((1, "a"), (2, "a"), (1, "b"), ("1", "a"), (1, "a", None), ((1, "a"),))}
    assert len(keys) == 6
    assert all(len(key) == 32 for key in keys)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("left", [0, 40, -1])
def test_a_truncated_file_is_made_anew(tmp_path: Path, suffix: str, left: int) -> None:
    def make(temporary: Path) -> None:
        (np.save if suffix == ".npy" else np.savez)(temporary, ARRAY)

    path = cached(tmp_path, "k", make, suffix)
    good = path.read_bytes()
    path.write_bytes(good[:left])
    assert cached(tmp_path, "k", make, suffix).read_bytes() == good


def test_a_failure_leaves_nothing_and_a_full_disk_names_the_folder_and_the_option(tmp_path: Path) -> None:
    def fails(error: Exception) -> None:
        def make(temporary: Path) -> None:
            temporary.write_bytes(b"half")
            raise error

        cached(tmp_path, "k", make)

    with pytest.raises(UserError, match=rf"{tmp_path}: .* \(No space left on device\); .* --cache_path"):
        fails(OSError(28, "No space left on device"))
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())
    assert files(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--cache_path"):
        cached(tmp_path / "file", "k", never)


def test_a_lasting_verdict_is_remembered_and_a_passing_one_is_not(tmp_path: Path) -> None:
    def refuse(lasting: bool) -> None:
        cached(tmp_path, "k", lambda _: refused(lasting))

    def refused(lasting: bool) -> None:
        raise BadSource("is constant", lasting)

    with pytest.raises(BadSource):
        refuse(lasting=False)
    assert files(tmp_path) == []
    with pytest.raises(BadSource):
        refuse(lasting=True)
    assert files(tmp_path) == ["k.bad"]
    with pytest.raises(BadSource, match="is constant"):
        cached(tmp_path, "k", never)


def test_of_many_threads_one_makes_the_file(tmp_path: Path) -> None:
    calls = []

    def make(temporary: Path) -> None:
        calls.append(temporary)
        time.sleep(0.1)
        np.save(temporary, ARRAY)

    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: cached(tmp_path, "k", make), range(8)))
    assert paths == {tmp_path / "k.npy"}
    assert len(calls) == 1


def test_who_does_not_wait_gets_none_while_another_is_at_it(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def make(temporary: Path) -> None:
        inside.set()
        leave.wait()
        np.save(temporary, ARRAY)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(cached, tmp_path, "k", make)
        inside.wait()
        make_room(tmp_path, 0, "")  # a file at work is no leftover
        assert cached(tmp_path, "k", never, wait=False) is None
        leave.set()
        assert job.result() == tmp_path / "k.npy"
    assert cached(tmp_path, "k", never, wait=False) == tmp_path / "k.npy"


def _die(temporary: Path) -> None:
    temporary.write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_its_work_to_others(tmp_path: Path) -> None:
    for key in ("taken", "left"):
        process = multiprocessing.get_context("fork").Process(target=cached, args=(tmp_path, key, _die))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert files(tmp_path) == [".left.tmp.npy", ".taken.tmp.npy"]
    path = cached(tmp_path, "taken", lambda temporary: np.save(temporary, ARRAY))
    np.testing.assert_array_equal(np.load(path), ARRAY)
    make_room(tmp_path, 0, "")
    assert files(tmp_path) == ["taken.npy"]


def test_a_file_system_without_locks_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    inner = []

    def make(temporary: Path) -> None:
        inner.append(temporary)
        if len(inner) < 3:  # several at once, each with a file of its own
            cached(tmp_path, "k", make)
        np.save(temporary, ARRAY)

    np.testing.assert_array_equal(np.load(cached(tmp_path, "k", make)), ARRAY)
    assert len(set(inner)) == 3
    assert files(tmp_path) == ["k.npy"]
