"""Jobs that take long: each has a process of its own, is done once, and gone on with when it was stopped.

Cells of a comparison (`downstream.compare`) are jobs, and so are the pre-trainings that they start from. Recipes
describe these; each is trained by its script:

    swav_2d: {script: ssl_swav2D, options: {data_path: Training_Data, epochs: 40}, seeds: [0, 1, 2]}
    swav_joint: {script: ssl_swav3D, start: {resnet_pretrained: swav_2d, trans_pretrained: none}, seeds: [0, 1, 2]}

options: of the script, where they differ from its constants. start: options that name weights: a recipe that stands
before, a file, imagenet, or none. seeds: one pre-training each; the k-th starts from the k-th of the recipes in
`start`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from downstream.encoders import content_of
from training import weights
from training.scripts import load
from utils import config, signals
from utils.errors import UserError
from utils.files import read_json, write_json, write_text, writing
from utils.locks import Lock

FORKED = multiprocessing.get_context("forkserver")  # whose server imports torch once
PARTS = {"script", "options", "start", "seeds"}  # of a recipe
PLACES = ("dump_path", "pretrained_path", "checkpoint_name")  # options of a script that are set here
LOG = "log.txt"
GRACE = 90.0  # seconds in which a job that is told to stop may save
MATTER = {"data_path", "epochs", "batch_size"}  # of the options that may change when a run goes on


class Job:
    """A pre-training, or a cell of a comparison."""

    title: str  # a line for people
    group: str  # jobs of one group take about as long
    needs: Sequence[Job]  # jobs that must be done before
    script: str  # module that does it, by its `main` or `run`
    options: dict[str, Any]  # of the script
    folder: Path  # holds log.txt and all that the job writes; known, as the options are, when what it needs is done
    record: dict[str, Any] | None  # what came out, with its `seconds`; None until the job is done

    def finish(self) -> None:
        """Do what is left when the script has ended well."""


def run_jobs(jobs: Sequence[Job], progress_file: Path, workers: int = 1, end: float = math.inf) -> list[str]:
    """Do what is not done, in this order, `workers` at a time; returns the titles of what failed.

    A failure stops only what needs it. Whatever ends this process, or `end` of time.monotonic(), ends the jobs under
    way: they save, and go on the next time.
    """
    left, failed, running = [job for job in jobs if not job.record], [], {}
    FORKED.set_forkserver_preload([__name__, *{job.script for job in left}])
    write_text(progress(jobs), progress_file)
    try:
        while time.monotonic() < end:
            for job in left:
                if len(running) == workers or job in failed or set(job.needs) & set(left):
                    continue
                if job.folder in [other.folder for other in running]:  # this job, or one that is the same
                    continue
                print(f"{job.title}: started at {time.strftime('%d %b %H:%M')}, see {job.folder / LOG}", flush=True)
                with signals.noted():
                    running[job] = launch(job)
            if not running:
                break
            time.sleep(0.1)
            for job in [job for job, process in running.items() if not process.is_alive()]:
                if running.pop(job).exitcode:
                    failed.append(job)
                    last = (job.folder / LOG).read_text(errors="replace").splitlines()[-1:]
                    print(f"{job.title}: FAILED ({''.join(last)})", flush=True)
                else:
                    job.finish()
                    print(f"{job.title}: done in {job.record['seconds']:.0f} s", flush=True)
                    left = [other for other in left if not other.record]
                write_text(progress(jobs), progress_file)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(GRACE)
            process.kill()
    return [job.title for job in failed]


def launch(job: Job) -> BaseProcess:
    """Start a job's process."""
    config.save_yaml(job.options, job.folder / "options.yaml")
    with writing(log := job.folder / LOG), open(log, "a"):  # what a full disk stops is named here
        pass
    process = FORKED.Process(target=_do, args=(job.script, job.folder))
    process.start()
    return process


def _do(script: str, folder: Path) -> None:
    """The script as from the command line, with its output in its log; it ends with the process that wanted it."""
    signals.end_with_parent()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    with Lock(folder / ".lock", "waits").held():  # a process of a runner that was killed, which saves; or another's
        pass
    module = importlib.import_module(script)
    main = module.main if hasattr(module, "main") else module.run
    config.main(main, module.Config, module.__doc__, ["--config", str(folder / "options.yaml")])


def progress(jobs: Sequence[Job]) -> str:
    """What is finished, what a job takes, and what is left, group by group."""
    rows = [{"group": job.group, "jobs": job.title, "seconds": job.record and job.record["seconds"]} for job in jobs]
    groups = pd.DataFrame(rows).astype({"seconds": float}).groupby("group", sort=False)
    table = groups.agg(finished=("seconds", "count"), jobs=("jobs", "count"), seconds_each=("seconds", "mean"))
    hours = (table.seconds_each * (table.jobs - table.finished)).sum() / 3600
    known = "about" if (table.finished > 0).all() else "more than"  # groups of which none is finished
    text = f"{table.finished.sum()} of {len(jobs)} jobs are finished; left: {known} {hours:.2f} h of one process"
    return f"{text}\n\n{table.round(1).to_string(na_rep='-')}\n"


def parsed(config_class: type, values: Mapping[str, Any]) -> Any:
    """The configuration with these options; a wrong one ends the process as on the command line."""
    words = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]
    return config.parse(config_class, None, words)


def short_key(value: Any) -> str:
    """A name for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(eq=False)
class Pretraining(Job):
    """One run of a training script: a recipe with one of its seeds."""

    group: str  # the recipe
    seed: int | None  # None: the recipe has no seeds
    script: str
    chosen: dict[str, Any]  # options
    start: dict[str, Pretraining | str]  # option -> the run whose weights it gets, a file, or none
    root: Path

    def __post_init__(self) -> None:
        self.title = self.group if self.seed is None else f"{self.group}, seed {self.seed}"
        self.needs = [of for of in self.start.values() if isinstance(of, Pretraining)]
        script = load(self.script).Config
        self.arch = self.chosen.get("arch", script.arch)
        # The key is of what the result depends on, save for what the data hold and for the script's code and constants:
        # the record names the commit of those.
        free = {field.name for field in fields(script) if field.metadata.get("may_change")} - MATTER
        options = {name: value for name, value in self.chosen.items() if name not in free}
        start = {option: of.key if isinstance(of, Pretraining) else content_of(of) for option, of in self.start.items()}
        self.key = short_key([self.script, options, start])
        self.folder = self.root / f"{self.script}_{self.key}"
        self.weights = self.folder / "weights.pth"
        self.options = {option: str(getattr(of, "weights", of)) for option, of in self.start.items()} | self.chosen
        self.options |= {"dump_path": str(self.folder), "pretrained_path": str(self.folder)}
        self.options |= {"checkpoint_name": self.weights.name}

    @property
    def record(self) -> dict[str, Any] | None:
        """Also: commit, torch, and last, the last line of metrics.csv."""
        path = self.folder / "recipe.json"
        try:
            return read_json(path) if path.is_file() else None
        except ValueError as error:
            raise UserError(f"{path}: is damaged ({error}); remove it to have it made anew") from None

    def finish(self) -> None:
        metrics = pd.read_csv(self.folder / "metrics.csv")
        about = {"recipe": self.group, "seed": self.seed, "script": self.script, "options": self.options}
        about |= {"seconds": round(float(metrics.seconds.sum()), 1), "last": metrics.iloc[-1].to_dict()}
        about |= {"commit": config.commit(), "torch": torch.__version__}
        write_json(about, self.folder / "recipe.json")


def read_recipes(recipes: Mapping[str, Any], root: Path) -> dict[str, list[Pretraining]]:
    """The runs of each recipe, one per seed. Raises UserError naming the recipe and what is wrong with it."""
    known: dict[str, list[Pretraining]] = {}
    for name, about in recipes.items():
        where = f"recipes: {name}"
        if not isinstance(about, dict) or not {"script"} <= about.keys() <= PARTS:
            raise UserError(f"{where}: must be a mapping with script, and none but {', '.join(sorted(PARTS))}")
        script = load(about["script"])
        options, start, seeds = about.get("options") or {}, about.get("start") or {}, about.get("seeds") or [None]
        free = {field.name for field in fields(script.Config)} - {*PLACES, *["seed"] * ("seeds" in about)}
        if wrong := [option for option in (*options, *start) if option not in free]:
            raise UserError(f"{where}: {script.__name__} has no option {wrong[0]!r} that may be set here")
        config.check(parsed(script.Config, options))
        known[name] = []
        for k, seed in enumerate(seeds):
            own = options if seed is None else options | {"seed": seed}
            starts = {option: _start(f"{where}: {option}", of, known, k) for option, of in start.items()}
            there = {option: of if isinstance(of, str) else "none" for option, of in starts.items()}
            made = dict.fromkeys(weights.MADE_BY.keys() & {field.name for field in fields(script.Config)}, "none")
            weights.check_sources(parsed(script.Config, options | made | there))
            known[name].append(Pretraining(name, seed, script.__name__, own, starts, root))
    return known


def _start(where: str, of: str, known: Mapping[str, Sequence[Pretraining]], k: int) -> Pretraining | str:
    """What the k-th run of a recipe starts from."""
    if known.get(of):
        return at(known[of], k)
    if of in ("none", "imagenet"):
        return of
    if not Path(of).is_file():
        raise UserError(f"{where}: {of} is neither a file nor a recipe that stands before this one")
    return os.path.realpath(of)


def at(runs: Sequence[Pretraining], k: int) -> Pretraining:
    """The run that goes with the k-th seed of what starts from them; with fewer runs than seeds they take turns."""
    return runs[k % len(runs)]
