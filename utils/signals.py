"""Requests to stop: noted where work would be lost, obeyed at once elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

# torchrun, `kill` and SLURM's pre-emption send SIGTERM, Ctrl-C sends SIGINT, SLURM's --signal option usually SIGUSR1,
# a terminal that closes SIGHUP.
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SAME_CTRL_C = 3.0  # seconds in which a second SIGINT is the first again: torchrun passes on what its children got too

_caught: list[int] = []
_handled = False
_noting = _owner = 0
_interrupted = 0.0


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within, a signal of STOPS raises SystemExit(128 + signal), or is noted inside `noted`.

    Ctrl-C again after SAME_CTRL_C seconds raises KeyboardInterrupt anywhere.
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


def _obey() -> None:
    if _handled and _caught and not _noting:
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
    if first:  # later ones must not disturb the way out
        _obey()
