"""Jobs that take long: each is done once, by one process at a time, and gone on with when it was stopped.

Cells of a comparison (`downstream.compare`) are jobs, and so are the pre-trainings that they start from. Recipes
describe these; each is trained by its script:

    swav_2d: {script: ssl_swav2D, options: {data_path: Training_Data, epochs: 40}, seeds: [0, 1, 2]}
    swav_joint: {script: ssl_swav3D, start: {resnet_pretrained: swav_2d, trans_pretrained: none}, seeds: [0, 1, 2]}

options: of the script, where they differ from its constants. start: options that name weights: a recipe that stands
before, a file, or none. seeds: one pre-training each; the k-th starts from the k-th of the recipes in `start`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from downstream.encoders import content_of
from training.scripts import load
from utils import config
from utils.errors import UserError
from utils.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"script", "options", "start", "seeds"}  # of a recipe
PLACES = ("dump_path", "pretrained_path", "checkpoint_name")  # options of a script that are set here
MATTER = {"data_path", "epochs", "batch_size"}  # of the options that may change when a run goes on


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
        if lost := [job.title for job in waiting if any(need.title in failed for need in job.needs)]:
            print(f"{'; '.join(lost)}: left out, as it needs what failed", flush=True)
            failed += lost
            continue
        ready = (job for job in waiting if all(need.record for need in job.needs))
        if not any(_taken(job, jobs, progress_file, failed) for job in ready):
            time.sleep(0.5)  # the other processes are doing what is left
    write_text(progress(jobs), progress_file)
    return failed


def progress(jobs: Sequence[Job]) -> str:
    """What is finished, what a job takes, and what is left, group by group."""
    rows = [{"group": job.group, "jobs": job.title, "seconds": job.record and job.record["seconds"]} for job in jobs]
    groups = pd.DataFrame(rows).astype({"seconds": float}).groupby("group", sort=False)
    table = groups.agg(finished=("seconds", "count"), jobs=("jobs", "count"), seconds_each=("seconds", "mean"))
    hours = (table.seconds_each * (table.jobs - table.finished)).sum() / 3600
    known = "about" if (table.finished > 0).all() else "more than"  # groups of which none is finished
    text = f"{table.finished.sum()} of {len(jobs)} jobs are finished; left: {known} {hours:.2f} h of one process"
    return f"{text}\n\n{table.round(1).to_string(na_rep='-')}\n"


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether this process, and no other, works in the folder within the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def _taken(job: Job, jobs: Sequence[Job], progress_file: Path, failed: list[str]) -> bool:
    """Do a job, with its output in its log, unless another process is at it; note it when it fails."""
    with claim(job.folder) as mine:
        if not mine or job.record:
            return False
        title, log = f"[{jobs.index(job) + 1}/{len(jobs)}] {job.title}", job.folder / "log.txt"
        started = f"{title}: started at {time.strftime('%d %b %H:%M')}, see {log}"
        print(started, flush=True)
        write_text(f"{progress(jobs)}\n{started}\n", progress_file)
        with open(log, "a") as file:
            try:
                with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    outcome = job.make()
                print(f"{title}: {outcome}, {job.record['seconds']:.0f} s", flush=True)
            except Exception as error:
                traceback.print_exc(file=file)
                print(f"{title}: FAILED ({error})", flush=True)
                failed.append(job.title)
    return True


def parsed(config_class: type, values: Mapping[str, Any]) -> Any:
    """The configuration with these options; a wrong one ends the process as on the command line."""
    words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
    return config.parse(config_class, None, words)


def short_key(value: Any) -> str:
    """A name for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(eq=False)
class Pretraining:
    """One run of a training script, a `Job`: a recipe with one of its seeds."""

    group: str  # the recipe
    seed: int | None  # None: the recipe has no seeds
    script: str
    options: dict[str, Any]
    start: dict[str, Pretraining | str]  # option -> the run whose weights it gets, a file, or none
    root: Path

    def __post_init__(self) -> None:
        self.title = self.group if self.seed is None else f"{self.group}, seed {self.seed}"
        self.needs = [of for of in self.start.values() if isinstance(of, Pretraining)]
        script = load(self.script).Config
        self.arch = self.options.get("arch", script.arch)
        # The key is of what the result depends on, save for what the data hold and for the script's code and constants:
        # the record names the commit of those.
        free = {field.name for field in fields(script) if field.metadata.get("may_change")} - MATTER
        options = {name: value for name, value in self.options.items() if name not in free}
        start = {option: of.key if isinstance(of, Pretraining) else content_of(of) for option, of in self.start.items()}
        self.key = short_key([self.script, options, start])
        self.folder = self.root / f"{self.script}_{self.key}"
        self.weights = self.folder / "weights.pth"

    @property
    def record(self) -> dict[str, Any] | None:
        """Also: commit, torch, and last, the last line of metrics.csv."""
        path = self.folder / "recipe.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def make(self) -> str:
        told = {option: str(getattr(of, "weights", of)) for option, of in self.start.items()} | self.options
        told |= {"dump_path": str(self.folder), "pretrained_path": str(self.folder), "checkpoint_name": "weights.pth"}
        config.save_yaml(told, self.folder / "options.yaml")
        command = [sys.executable, str(ROOT / f"{self.script}.py"), "--config", str(self.folder / "options.yaml")]
        with subprocess.Popen(command, stdout=sys.stdout, stderr=subprocess.STDOUT) as process:
            try:
                code = process.wait()
            finally:
                process.terminate()  # a script that still runs: it saves, and `with` waits for it
        if code:
            raise UserError(f"{self.script}.py ended with {code}; see {self.folder / 'log.txt'}")
        metrics = pd.read_csv(self.folder / "metrics.csv")
        found = {"recipe": self.group, "seed": self.seed, "script": self.script, "options": told}
        found |= {"seconds": round(float(metrics.seconds.sum()), 1), "last": metrics.iloc[-1].to_dict()}
        found |= {"commit": config.commit(), "torch": torch.__version__}
        write_json(found, self.folder / "recipe.json")
        return f"loss {found['last']['loss']:.3f}"


def read_recipes(recipes: Mapping[str, Any], root: Path) -> dict[str, list[Pretraining]]:
    """The runs of each recipe, one per seed. Raises UserError naming the recipe and what is wrong with it."""
    known: dict[str, list[Pretraining]] = {}
    for name, about in recipes.items():
        where = f"recipes: {name}"
        if not isinstance(about, dict) or not {"script"} <= about.keys() <= PARTS:
            raise UserError(f"{where}: must be a mapping with script, and none but {', '.join(sorted(PARTS))}")
        script = load(about["script"])
        options, start, seeds = about.get("options") or {}, about.get("start") or {}, about.get("seeds") or [None]
        may_be_set = {field.name for field in fields(script.Config)} - {*PLACES, *["seed"] * ("seeds" in about)}
        if wrong := [option for option in (*options, *start) if option not in may_be_set]:
            raise UserError(f"{where}: {script.__name__} has no option {wrong[0]!r} that may be set here")
        for option, of in start.items():
            if of not in known and of != "none" and not Path(of).is_file():
                raise UserError(f"{where}: {option}: {of} is neither a file nor a recipe that stands before this one")
        config.check(parsed(script.Config, options))
        known[name] = []
        for k, seed in enumerate(seeds):
            own = options if seed is None else options | {"seed": seed}
            files = {option: of if of == "none" else str(Path(of).resolve()) for option, of in start.items()}
            starts = {option: at(known[of], k) if of in known else files[option] for option, of in start.items()}
            known[name].append(Pretraining(name, seed, script.__name__, own, starts, root))
    return known


def at(runs: Sequence[Pretraining], k: int) -> Pretraining:
    """The run that goes with the k-th seed of what starts from them; with fewer runs than seeds they take turns."""
    return runs[k % len(runs)]
