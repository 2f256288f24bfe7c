"""Where the time of a step goes: named spans, timed on the device that does the work.

with profile.recording(device):
    with profile.span("forward"):
        ...
    profile.seconds()  # {"forward": 1.2, ...}
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()
_current: Spans | None = None


class Spans:
    """Seconds of every span, without those of the spans inside it, so that they add up to the whole.

    On a GPU a span's edges are events in the stream: between them lie its kernels and what the GPU waited for the host
    meanwhile. They are read by `seconds` alone, so nothing waits for the device within a step. On a CPU: the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: list[str] = []
        self._edges: list[tuple[Any, str | None]] = []  # time, and the innermost span from then on

    def _edge(self) -> None:
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
        else:
            now = time.perf_counter()
        self._edges.append((now, self._open[-1] if self._open else None))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self._edge()
        try:
            yield
        finally:
            self._open.pop()
            self._edge()

    def seconds(self) -> dict[str, float]:
        """Of each name since the last call, in the order in which the names first began. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total: dict[str, float] = {}
        for (began, name), (ended, _) in itertools.pairwise(self._edges):
            if name:
                passed = began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began
                total[name] = total.get(name, 0.0) + passed
        self._edges = []
        return total


@contextmanager
def recording(device: torch.device, on: bool = True) -> Iterator[Spans | None]:
    """Spans of this process are timed while the context lasts."""
    global _current
    before, _current = _current, Spans(device) if on else None
    try:
        yield _current
    finally:
        _current = before


def span(name: str) -> AbstractContextManager[None]:
    """A part of a step, timed while `recording`; otherwise it costs a function call."""
    return _current.span(name) if _current else _NOTHING


def seconds() -> dict[str, float]:
    """`Spans.seconds` of what is being recorded; nothing outside `recording`."""
    return _current.seconds() if _current else {}
