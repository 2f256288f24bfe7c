"""Cases converted one after the other, and on several processes where that takes long."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from conversion.layouts import Source
from conversion.table import Case
from utils.errors import UserError

POOL_AFTER_SECONDS = 3.0  # processes take as long to start, so short work goes without them


def converted(
    todo: Sequence[Source], convert: Callable[[Source], Case | str], workers: int
) -> Iterator[tuple[Source, Case | str]]:
    """(source, what `convert` makes of it) as they are finished.

    workers: processes; 0: one per core, at most 8. Raises UserError where one of them was killed.
    """
    workers = workers or min(os.cpu_count() or 1, 8)
    waiting = iter(todo)
    began = time.monotonic()
    with tqdm(total=len(todo), desc="converting", unit="case", disable=not sys.stderr.isatty()) as bar:
        for source in waiting:
            yield source, convert(source)
            bar.update()
            if workers > 1 and time.monotonic() - began > POOL_AFTER_SECONDS:
                break
        if bar.n == len(todo):
            return
        # Forked from a server that imports everything once and has no threads, of which a fork makes no copy.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(workers, len(todo) - bar.n), context, _end_with_the_run) as pool:
            jobs: dict[Any, Source] = {}
            try:
                while True:
                    for source in waiting:
                        jobs[pool.submit(convert, source)] = source
                        if len(jobs) >= 2 * workers:
                            break
                    if not jobs:
                        break
                    for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                        yield jobs.pop(job), job.result()
                        bar.update()
            except BrokenProcessPool:
                at_it = ", ".join(source.name for source in jobs.values())
                raise UserError(
                    f"a worker was killed, most likely for want of memory, at one of {at_it}; run the same command "
                    "again with fewer --workers"
                ) from None


def _end_with_the_run() -> None:
    """In a worker: end when the main process does, even if that was killed. A pool's workers would wait for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
