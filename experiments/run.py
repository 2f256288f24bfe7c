"""Do what YAML files describe, as far as the time goes: pre-trainings, and comparisons of what they make.

    python -m experiments.run --experiments "[experiments/main.yaml]" --plan true      # what is done, what is left
    nice python -m experiments.run --experiments "[experiments/main.yaml, experiments/ablations.yaml]" --minutes 170

It may be stopped at any time: the same command goes on, a pre-training at its last step, a comparison in its last cell.
Progress stands in dump_path/progress.txt. Make the data first, with `python -m experiments.data`; then
`python -m experiments.summarise` makes the tables.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from downstream import compare, jobs
from experiments.plan import read_plan
from utils import config as options
from utils import signals
from utils.errors import UserError

GRACE = 60.0  # seconds in which a run that is told to stop may save


@dataclass
class Config:
    experiments: list[str] = field(default_factory=lambda: ["experiments/main.yaml"])
    """YAML files; one that refers to another comes after it"""
    dump_path: str = "runs/experiments"
    """receives recipes/, a folder per comparison, and progress.txt"""
    minutes: NonNegativeFloat = 0
    """time after which what runs is told to save and stop, for the same command to go on; 0: until all is done"""
    jobs: PositiveInt = 2
    """processes, each of which does one job at a time"""
    threads: PositiveInt = 1
    """threads of each process; on few cores two processes of one thread do more than one of two"""
    plan: bool = False
    """only print what there is to do, what is finished, and how long the rest takes"""


def main(cfg: Config) -> None:
    end = time.monotonic() + 60 * cfg.minutes if cfg.minutes else float("inf")
    plan = read_plan(cfg.experiments, Path(cfg.dump_path))
    print(jobs.progress(plan.jobs), flush=True)
    if cfg.plan:
        return
    compare.check(plan.cells)
    os.environ |= {"OMP_NUM_THREADS": str(cfg.threads), "MKL_NUM_THREADS": str(cfg.threads)}
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_work, args=(cfg,)) for _ in range(cfg.jobs)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
            time.sleep(0.2)
    finally:  # whatever ends this process ends its workers, which save first
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(1.5 * GRACE)
            worker.kill()
    print(jobs.progress(plan.jobs), flush=True)
    if any(worker.exitcode == 1 for worker in workers):
        raise UserError("some jobs failed, as said above; the same command tries them again")


def _work(cfg: Config) -> None:
    with signals.handled():
        plan = read_plan(cfg.experiments, Path(cfg.dump_path))
        failed = jobs.run_jobs(plan.jobs, Path(cfg.dump_path) / "progress.txt")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    options.main(main, Config, __doc__)
