"""Jobs that take long: each is done once, by one process at a time, and gone on with when it was stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from utils import config
from utils.files import write_text


class Job(Protocol):
    """A pre-training, or a cell of a comparison."""

    title: str  # a line for people; no two jobs have the same
    group: str  # jobs of one group take about as long
    needs: Sequence[Job]  # jobs that must be done before; they stand before this one
    folder: Path  # holds log.txt and all that the job writes; known when what it needs is done
    record: dict[str, Any] | None  # what came out, with its `seconds`; None until the job is done

    def make(self) -> str:
        """Do it, or go on with it; returns what came out, in a few words."""


def run_jobs(jobs: Sequence[Job], progress_file: Path) -> list[str]:
    """Do what is not done, in this order; returns the titles of what failed, which stops only what needs it.

    Several processes may be given the same jobs: each takes the first that no other has taken. Progress is written to
    a file with every job. Whatever ends this process ends the job under way, which goes on the next time.
    """
    failed: list[str] = []
    while waiting := [job for job in jobs if job.title not in failed and not job.record]:
        for job in waiting:
            if any(need.title in failed for need in job.needs):
                print(f"{job.title}: left out, as it needs what failed", flush=True)
                failed.append(job.title)
                break
            if all(need.record for need in job.needs):
                with claim(job.folder) as mine:
                    if mine and not job.record:
                        title = f"[{jobs.index(job) + 1}/{len(jobs)}] {job.title}"
                        started = f"{title}: started at {time.strftime('%d %b %H:%M')}, see {job.folder / 'log.txt'}"
                        print(started, flush=True)
                        write_text(f"{progress(jobs)}\n{started}\n", progress_file)
                        if not _attempt(job, title):
                            failed.append(job.title)
                        break
        else:
            time.sleep(0.5)  # the other processes are doing what is left
    write_text(progress(jobs), progress_file)
    return failed


def progress(jobs: Sequence[Job]) -> str:
    """What is finished, what a job takes, and what is left, group by group."""
    records = [job.record for job in jobs]
    table = pd.DataFrame({"group": [job.group for job in jobs], "done": [bool(record) for record in records]})
    table["seconds"] = [record["seconds"] if record else float("nan") for record in records]
    groups = table.groupby("group", sort=False).agg(
        finished=("done", "sum"), jobs=("done", "size"), seconds_each=("seconds", "mean")
    )
    hours = (groups.seconds_each * (groups.jobs - groups.finished)).sum() / 3600
    known = "about" if (groups.finished > 0).all() else "more than"  # groups of which none is finished
    text = f"{table.done.sum()} of {len(jobs)} jobs are finished; left: {known} {hours:.2f} h of one process"
    return f"{text}\n\n{groups.round(1).to_string(na_rep='-')}\n"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether this process, and no other, works in the folder within the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def parsed(config_class: type, values: Mapping[str, Any]) -> Any:
    """The configuration with these options; a wrong one ends the process as on the command line."""
    words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
    return config.parse(config_class, None, words)


def short_key(value: Any) -> str:
    """A name for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _attempt(job: Job, title: str) -> bool:
    """Do a job with its output in its log; whether it was finished."""
    with open(job.folder / "log.txt", "a") as file:
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                outcome = job.make()
        except Exception as error:
            traceback.print_exc(file=file)
            print(f"{title}: FAILED ({error})", flush=True)
            return False
    print(f"{title}: {outcome}, {job.record['seconds']:.0f} s", flush=True)
    return True
