"""Run what YAML files describe, in order, as far as the time goes; finished runs are skipped.

    python -m experiments.run --experiments "[experiments/main.yaml]" --plan true      # what, and how long
    python -m experiments.run --experiments "[experiments/main.yaml, experiments/ablations.yaml]" --minutes 170

A run is a process with a folder of its own: options.yaml, log.txt, status.json and what its script writes. It may be
stopped at any time: training goes on at its last step, a comparison at its last cell. Make the data first, with
`python -m experiments.data`; `python -m experiments.summarise` makes the tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from experiments.plan import Plan, Run, expand
from utils import config as options
from utils.errors import UserError
from utils.files import write_json
from utils.versions import commit

ROOT = Path(__file__).resolve().parents[1]
GRACE = 60.0  # seconds in which a run that is told to stop may save


@dataclass
class Config:
    experiments: list[str] = field(default_factory=lambda: ["experiments/main.yaml"])
    """YAML files; one that starts from runs of another comes after it"""
    data: str = "runs/experiments/data"
    """what experiments.data has written"""
    dump_path: str = "runs/experiments"
    """receives a folder per run, and weights/"""
    minutes: NonNegativeFloat = 0
    """after which running ones are told to save and stop, and none is started; 0: until all is done"""
    jobs: PositiveInt = 2
    """runs at the same time"""
    threads: PositiveInt = 1
    """of each run; on few cores two runs of one thread do more than one run of two"""
    plan: bool = False
    """only print the runs, what they need, and their expected seconds"""


class Status(NamedTuple):
    """What is known of a run."""

    done: bool
    seconds: float  # spent so far, all attempts
    made_with: str = ""  # commit, versions and cores


@dataclass
class Process:
    """A run under way."""

    popen: subprocess.Popen
    began: float


def main(cfg: Config) -> None:
    plan, out = read_plan(cfg)
    print(format_plan(plan, out, cfg.jobs), flush=True)
    if cfg.plan:
        return
    if not Path(cfg.data).is_dir():
        raise UserError(f"data: {cfg.data} is not a folder; run python -m experiments.data --dest {cfg.data} first")
    failed = execute(plan, out, cfg)
    print(format_plan(plan, out, cfg.jobs))
    if failed:
        raise UserError("failed: " + ", ".join(f"{name} (see {out / name}/log.txt)" for name in failed))


def read_plan(cfg: Any) -> tuple[Plan, Path]:
    """The plan of cfg.experiments, and the folder of its runs."""
    return expand(cfg.experiments), Path(cfg.dump_path).expanduser().resolve()


def execute(plan: Plan, out: Path, cfg: Config) -> list[str]:
    """Run what is not finished, `jobs` at a time, each when those that it needs are finished. Returns what failed.

    A run that fails stops only those that need it. Whatever ends this process ends its runs too, which save first.
    """
    keys, data = run_keys(plan), Path(cfg.data).expanduser().resolve()
    done = {name for name in plan.runs if status(out, name, keys[name]).done}
    waiting = [name for name in plan.runs if name not in done]
    running: dict[str, Process] = {}
    failed: list[str] = []
    end = time.monotonic() + 60 * cfg.minutes if cfg.minutes else float("inf")
    made_with()  # of now, whatever is edited meanwhile
    try:
        while (waiting or running) and time.monotonic() < end:
            ready = [name for name in waiting if done.issuperset(plan.runs[name].needs)]
            for name in ready[: cfg.jobs - len(running)]:
                waiting.remove(name)
                running[name] = start(plan.runs[name], data, out, keys[name], cfg.threads)
                print(f"{name}: started", flush=True)
            if not running:
                break  # what waits needs what failed
            time.sleep(0.1)
            for name in [name for name, process in running.items() if process.popen.poll() is not None]:
                code = finish(out, name, keys[name], running.pop(name))
                (failed.append if code else done.add)(name)
                spent = status(out, name, keys[name]).seconds
                print(f"{name}: {f'FAILED with {code}' if code else 'finished'}, {spent:.0f} s", flush=True)
    finally:
        for process in running.values():
            process.popen.terminate()
        for name, process in running.items():
            try:
                process.popen.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            code = finish(out, name, keys[name], process)
            print(f"{name}: {f'stopped with {code}, goes on next time' if code else 'finished'}", flush=True)
    return failed


def run_keys(plan: Plan) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, run in plan.runs.items():
        keys[name] = run.key(keys)
    return keys


def status(out: Path, name: str, key: str) -> Status:
    """Raises UserError where the folder is of a run with other options, or one that started from other weights."""
    path = out / name / "status.json"
    if not path.is_file():
        return Status(False, 0.0)
    try:
        known = json.loads(path.read_text())
        theirs = known["key"]
        found = Status(bool(known["done"]), float(known["seconds"]), str(known.get("made_with", "")))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged; remove {path.parent} to have the run made again") from None
    if theirs != key:
        raise UserError(f"{path.parent}: holds a run with other options or from other weights; move it elsewhere")
    return found


def start(run: Run, data: Path, out: Path, key: str, threads: int) -> Process:
    folder = out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    before = status(out, run.name, key)
    write_json({"key": key, "done": False, "seconds": before.seconds}, folder / "status.json")
    options.save_yaml(run.placed(data, out), folder / "options.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", run.module, "--config", str(folder / "options.yaml")]
    with open(folder / "log.txt", "ab") as log:
        popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    return Process(popen, time.monotonic())


def finish(out: Path, name: str, key: str, process: Process) -> int:
    """Keep what is known of a run that has ended; returns its exit code."""
    seconds = status(out, name, key).seconds + time.monotonic() - process.began
    code = process.popen.returncode
    record = {"key": key, "done": code == 0, "seconds": round(seconds, 1), "made_with": made_with()}
    write_json(record, out / name / "status.json")
    return code


@cache
def made_with() -> str:
    """The state of this repository when it is first asked for, and what runs on it."""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, {os.cpu_count()} cores"
    return f"{commit()}: {versions}"


def format_plan(plan: Plan, out: Path, jobs: int) -> str:
    """A line per run: what it needs, expected and spent seconds; then the sums."""
    keys = run_keys(plan)
    known = {name: status(out, name, keys[name]) for name in plan.runs}
    width = max(map(len, [*plan.runs, "run"])) + 2
    lines = [f"{'run':<{width}}{'expected s':>12}{'spent s':>10}  state"]
    for name, run in plan.runs.items():
        state = "finished" if known[name].done else "begun" if known[name].seconds else "waits"
        after = f", after {', '.join(run.needs)}" if run.needs and state == "waits" else ""
        lines.append(f"{name:<{width}}{run.seconds:12.0f}{known[name].seconds:10.0f}  {state}{after}")
    lines.append(_sums(plan.runs, known, jobs))
    return "\n".join(lines)


def _sums(runs: Mapping[str, Run], known: Mapping[str, Status], jobs: int) -> str:
    """Expected time that is left; runs that are finished say how far the expectations are off."""
    finished = [name for name in runs if known[name].done and runs[name].seconds]
    expected, spent = sum(runs[n].seconds for n in finished), sum(known[n].seconds for n in finished)
    factor = spent / expected if expected else 1.0
    left = sum(
        max(0.0, factor * run.seconds - known[name].seconds) for name, run in runs.items() if not known[name].done
    )
    said = f"; finished ones took {factor:.2f} of what was expected, which is counted in" if expected else ""
    done = sum(state.done for state in known.values())
    return f"{done} of {len(runs)} runs finished; left: about {left / 3600 / jobs:.2f} h, {jobs} at a time{said}"


if __name__ == "__main__":
    options.main(main, Config, __doc__)
