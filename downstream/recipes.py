"""Pre-trainings that a comparison starts from. Recipes describe them; each is trained once, by its script.

    swav_2d: {script: ssl_swav2D, options: {data_path: Training_Data, epochs: 40}, seeds: [0, 1, 2]}
    swav_joint: {script: ssl_swav3D, start: {resnet_pretrained: swav_2d, trans_pretrained: none}, seeds: [0, 1, 2]}

options: of the script, where they differ from its constants. start: options that name weights: a recipe that stands
before, a file, or none. seeds: one pre-training each; the k-th starts from the k-th of the recipes in `start`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from downstream import jobs
from training.scripts import load
from utils import config
from utils.config import commit
from utils.errors import UserError
from utils.files import write_json

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"script", "options", "start", "seeds"}
PLACES = ("dump_path", "pretrained_path", "checkpoint_name")  # options that are set here
MATTER = {"data_path", "epochs", "batch_size"}  # of the options that may change when a run goes on
GRACE = 60.0  # seconds in which a run that is told to stop may save


@dataclass(eq=False)
class Pretraining:
    """One run of a training script, a `jobs.Job`: a recipe with one of its seeds."""

    group: str  # the recipe
    seed: int | None  # None: the recipe has no seeds
    script: str
    options: dict[str, Any]
    start: dict[str, Pretraining | str]  # option -> the run whose weights it gets, a file, or none
    root: Path

    def __post_init__(self) -> None:
        self.title = self.group if self.seed is None else f"{self.group}, seed {self.seed}"
        self.needs = [of for of in self.start.values() if isinstance(of, Pretraining)]
        self.config_class = load(self.script).Config

    @cached_property
    def key(self) -> str:
        """Of the script, the recipe's options that its result depends on, and what it starts from.

        Not of what the data hold, nor of the script's code and constants: the record names the commit of those.
        """
        may_change = {field.name for field in dataclasses.fields(self.config_class) if field.metadata.get("may_change")}
        options = {name: value for name, value in self.options.items() if name not in may_change - MATTER}
        start = {option: of.key if isinstance(of, Pretraining) else digest(of) for option, of in self.start.items()}
        return jobs.short_key([self.script, options, start])

    @property
    def folder(self) -> Path:
        return self.root / f"{self.script}_{self.key}"

    @property
    def weights(self) -> Path:
        return self.folder / "weights.pth"

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
        process = subprocess.Popen(command, stdout=sys.stdout, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:
            end(process)
        if code:
            raise UserError(f"{self.script}.py ended with {code}; see {self.folder / 'log.txt'}")
        metrics = pd.read_csv(self.folder / "metrics.csv")
        found = {"recipe": self.group, "seed": self.seed, "script": self.script, "options": told}
        found |= {"seconds": round(float(metrics.seconds.sum()), 1), "last": metrics.iloc[-1].to_dict()}
        found |= {"commit": commit(), "torch": torch.__version__}
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
        may_be_set = {field.name for field in dataclasses.fields(script.Config)} - set(PLACES)
        for option in (*options, *start):
            if option not in may_be_set or (option == "seed" and "seeds" in about):
                raise UserError(f"{where}: {script.__name__} has no option {option!r} that may be set here")
        for option, of in start.items():
            if of not in known and of != "none" and not Path(of).is_file():
                raise UserError(f"{where}: {option}: {of} is neither a file nor a recipe that stands before this one")
        config.check(jobs.parsed(script.Config, options))
        known[name] = []
        for k, seed in enumerate(seeds):
            own = options if seed is None else options | {"seed": seed}
            starts = {option: at(known[of], k) if of in known else _whole_path(of) for option, of in start.items()}
            known[name].append(Pretraining(name, seed, script.__name__, own, starts, root))
    return known


def at(runs: Sequence[Pretraining], k: int) -> Pretraining:
    """The run that goes with the k-th seed of what starts from them; with fewer runs than seeds they take turns."""
    return runs[k % len(runs)]


def end(process: subprocess.Popen) -> None:
    """End a process that still runs; it may save first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def digest(value: Any) -> Any:
    """sha256 of the content, for the name of a file; what is none stands for itself."""
    if not isinstance(value, str) or not Path(value).is_file():
        return value
    status = Path(value).stat()
    return _sha256(value, status.st_mtime_ns, status.st_size)


@cache
def _sha256(file: str, _modified: int, _size: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _whole_path(file: str) -> str:
    return file if file == "none" else str(Path(file).resolve())
