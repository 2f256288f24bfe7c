"""Work on many files, one after the other, and on several processes where that takes long."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from utils.errors import UserError

POOL_AFTER_SECONDS = 3.0  # processes take as long to start, so short work goes without them


def outcomes(todo: Mapping[str, Any], function: Callable[[Any], Any], workers: int) -> Iterator[tuple[str, Any]]:
    """(name, what `function` makes of it) of things that are named, as they are finished.

    workers: processes; 0: one per core, at most 8. Raises UserError where one of them was killed.
    """
    workers = workers or min(os.cpu_count() or 1, 8)
    waiting = iter(todo)
    began = time.monotonic()
    with tqdm(total=len(todo), desc="converting", unit="case", disable=not sys.stderr.isatty()) as bar:
        for name in waiting:
            yield name, function(todo[name])
            bar.update()
            if workers > 1 and time.monotonic() - began > POOL_AFTER_SECONDS:
                break
        if bar.n == len(todo):
            return
        # Forked from a server that imports everything once and has no threads, of which a fork makes no copy.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(workers, len(todo) - bar.n), context, _end_with_the_run) as pool:
            jobs = {pool.submit(function, todo[name]): name for name in waiting}
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
                    bar.update()
            except BrokenProcessPool:
                raise UserError(
                    "a worker was killed, most likely for want of memory; run the same command again with fewer "
                    "--workers"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


def _end_with_the_run() -> None:
    """In a worker: end when the main process does, even if that was killed. A pool's workers would wait for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
