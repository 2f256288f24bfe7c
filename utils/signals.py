"""Requests to stop: noted where work would be lost, obeyed at once elsewhere.

Several processes obey together, where they next exchange something (`together`): whoever left alone would take the
others' connections along.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

# torchrun, `kill` and SLURM's pre-emption send SIGTERM, Ctrl-C sends SIGINT, SLURM's --signal option usually SIGUSR1,
# a terminal that closes SIGHUP.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PARENT_SECONDS = 2.0  # between looks at whether the parent still lives
SAME_CTRL_C = 3.0  # seconds in which a second SIGINT is the first again: torchrun passes on what its children got too

_caught: list[int] = []
_handled = _together = False
_noting = _owner = 0
_interrupted = _patience = 0.0


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within, a signal of STOPS raises SystemExit(128 + signal), or is noted inside `noted`.

    Ctrl-C again after SAME_CTRL_C seconds raises KeyboardInterrupt anywhere. A signal that nobody has obeyed by the
    end of the block is obeyed there.
    """
    global _handled, _owner
    if _handled:  # already, around this
        yield
        return
    _caught.clear()
    _owner = os.getpid()
    # A hang-up that nohup has switched off stays so.
    wanted = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    old = {number: signal.signal(number, _handle) for number in wanted}
    _handled = True
    try:
        yield
        if _caught:
            raise SystemExit(128 + caught())
    finally:
        _handled = False
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Within, signals wait; `caught` tells them. One that still waits at the end of the outermost block is obeyed."""
    global _noting
    _noting += 1
    try:
        yield
    finally:
        _noting -= 1
    _obey()


@contextlib.contextmanager
def obeyed() -> Iterator[None]:
    """A part of a `noted` block that may take minutes and in which nothing would be lost: signals end it at once."""
    global _noting
    outer, _noting = _noting, 0
    try:
        _obey()
        yield
    finally:
        _noting = outer


def caught() -> int:
    """The number of a signal that came, 0 when none did."""
    return max(_caught, default=0)


def together(several: bool) -> None:
    """From now on signals wait for `obey_together`, or no longer."""
    global _together
    _together = several


def obey_together(numbers: Sequence[int]) -> None:
    """Note what each of several processes has `caught`, and obey unless all are in a `noted` block."""
    if number := max(numbers):
        if not _caught:
            _caught.append(number)
        if _handled and not _noting:
            raise SystemExit(128 + number)


def obey_in_thread() -> None:
    """In a wait that a signal should end, whatever the thread and whatever is noted."""
    if _handled and _caught:
        raise SystemExit(128 + caught())


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """A wait within a `noted` block that may never end: a signal ends it after so many seconds."""
    if not _handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    global _patience
    before = signal.signal(signal.SIGALRM, lambda *_: obey_in_thread())
    _patience = seconds
    try:
        if _caught:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        _patience = 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def end_with_parent() -> None:
    """SIGTERM to this process when its parent has died, however: what a launcher started does not run on without it.

    The parent of a process of `multiprocessing` is who started it, not the server that it was forked from.
    """
    parent, pid = multiprocessing.parent_process(), os.getppid()

    def lives() -> bool:
        return os.getppid() == pid if parent is None else parent.is_alive()

    def watch() -> None:
        while lives():
            time.sleep(PARENT_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def waiting() -> int:
    """The number of a signal that the next chance obeys, 0 when there is none."""
    return caught() if _handled and not _noting else 0


def _obey() -> None:
    if waiting() and not _together:
        raise SystemExit(128 + caught())


def _handle(number: int, _: Any) -> None:
    global _interrupted
    if os.getpid() != _owner:  # a forked child, which does not save anything
        if number != signal.SIGUSR1:  # that one SLURM sends to all processes of a job, and means the trainer
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    now = time.monotonic()
    if number == signal.SIGINT:
        if signal.SIGINT in _caught and now - _interrupted > SAME_CTRL_C:
            raise KeyboardInterrupt
        _interrupted = now
    first = not _caught
    _caught.append(int(number))
    if _patience:
        signal.setitimer(signal.ITIMER_REAL, _patience)
    if first:  # later ones must not disturb the way out
        _obey()
