"""Run a function in several processes that form a gloo group."""

from __future__ import annotations

import atexit
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_processes(n: int, function: Callable[..., Any], *args: Any, limit_s: float = 120) -> list[Any]:
    """function(*args) in each of n processes -> its picklable results in rank order.

    `function` must stand at the top of a module. The first exception in a process is raised here as a RuntimeError
    with the traceback in its text; TimeoutError after limit_s seconds; either ends the processes. Otherwise they wait
    for the next call, because starting them (importing torch) costs seconds; every call forms a new process group.
    """
    workers = _waiting.pop(n, None) or _Workers(n)
    try:
        results = workers.run(function, args, limit_s)
    except BaseException:
        workers.stop()
        raise
    _waiting[n] = workers
    return results


class _Workers:
    def __init__(self, n: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, n, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a process that dies is the end of its pipe
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], limit_s: float) -> list[Any]:
        deadline = time.monotonic() + limit_s
        with TemporaryDirectory() as folder:
            for pipe in self.pipes:
                pipe.send((folder, function, args))
            pending = list(self.pipes)
            while pending:
                ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"{function.__name__} took more than {limit_s} s")
                for pipe in ready:
                    try:
                        error = pipe.recv()
                    except EOFError:
                        error = "the process died"
                    if error:
                        raise RuntimeError(f"process {self.pipes.index(pipe)}: {error}")
                    pending.remove(pipe)
            return [torch.load(_result(folder, rank), weights_only=False) for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


_waiting: dict[int, _Workers] = {}


@atexit.register
def _stop_all() -> None:
    while _waiting:
        _waiting.popitem()[1].stop()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pt"


def _work(rank: int, n: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            folder, function, args = pipe.recv()
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n, timeout=timedelta(seconds=60)
            )
            torch.save(function(*args), _result(folder, rank))
            dist.destroy_process_group()
        except EOFError:  # nobody is left to work for
            return
        except BaseException:
            pipe.send(traceback.format_exc())
            raise
        pipe.send(None)
