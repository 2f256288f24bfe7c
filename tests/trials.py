"""Training runs as processes of their own, to kill: forked from a server that has imported torch once.

python -m trials STEPS_FILE mask_swav --epochs 2    # a script whose applied steps are noted; for torchrun
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.scripts import SCRIPTS


def arguments(options: dict[str, Any]) -> list[str]:
    """{"epochs": 2} -> ["--epochs", "2"]"""
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


class Trial:
    """A script with these options, or a list of those of each process, in `ranks` processes.

    folder: receives log_<rank>.txt and steps_<rank>.txt.  signal_in: (rank, module, function, n): SIGTERM for that
    process in the n-th call of the function.
    """

    def __init__(
        self, script: str, options: Any, folder: Path, ranks: int = 1, signal_in: tuple[Any, ...] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.began = folder, time.monotonic()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trials", *SCRIPTS])
        port = free_port() if ranks > 1 else 0
        self.processes = []
        for rank in range(ranks):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in group.items()} if ranks > 1 else {}
            own = signal_in[1:] if signal_in and signal_in[0] == rank else None
            given = options[rank] if isinstance(options, list) else options
            work = script, arguments(given), folder, rank, environment, own
            self.processes.append(context.Process(target=_forked, args=work))
            self.processes[-1].start()

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """A signal to some of the processes, by default to all; those that have ended do not mind."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit codes, -signal for killed processes. Raises TimeoutError, after killing what still runs."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [process.pid for process in self.processes if process.is_alive()]
        if late:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"still running after {seconds} s; see {self.folder}")
        return [process.exitcode for process in self.processes]

    @property
    def steps(self) -> list[int]:
        """Optimiser steps that each process has applied."""
        return [count_steps(self.folder / f"steps_{rank}.txt") for rank in range(len(self.processes))]

    def log(self, rank: int = 0) -> str:
        return (self.folder / f"log_{rank}.txt").read_text()


def count_steps(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def worker_of(torchrun: subprocess.Popen[bytes]) -> int:
    """The process id of torchrun's first worker."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid), "-f", "trials"], capture_output=True, text=True)
    return int(found.stdout.split()[0])


def signalled(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, with a real SIGTERM to this process in the given call, which then goes on if it may."""
    calls = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    return wrapped


def _forked(
    script: str,
    args: list[str],
    folder: Path,
    rank: int,
    environment: dict[str, str],
    signal_in: tuple[Any, ...] | None,
) -> None:
    os.setsid()
    os.environ.update(environment)
    log = os.open(folder / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    (folder / f"steps_{rank}.txt").unlink(missing_ok=True)
    if signal_in:
        owner, name, call = importlib.import_module(signal_in[0]), *signal_in[1:]
        setattr(owner, name, signalled(getattr(owner, name), call))
    run(script, args, folder / f"steps_{rank}.txt")


def run(script: str, args: list[str], steps: Path) -> None:
    """The script as from the command line; every optimiser step that was applied adds a line to `steps`."""
    import torch

    from utils import config
    from utils.precision import Precision

    torch.set_num_threads(1)
    apply = Precision.step

    def noted(self: Precision, optimizer: torch.optim.Optimizer) -> None:
        apply(self, optimizer)
        with open(steps, "a") as file:
            file.write("step\n")

    Precision.step = noted
    module = importlib.import_module(script)
    config.main(module.main, module.Config, module.__doc__, args)


if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3:], Path(f"{sys.argv[1]}.{os.environ.get('RANK', 0)}"))
