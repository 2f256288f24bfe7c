"""Do what YAML files describe, as far as the time goes: pre-trainings, and comparisons of what they make.

    python -m experiments.run --experiments "[experiments/main.yaml]" --plan true      # what is done, what is left
    nice python -m experiments.run --experiments "[experiments/main.yaml, experiments/ablations.yaml]" --minutes 170

It may be stopped at any time: the same command goes on, a pre-training at its last step, a comparison in its last cell.
Progress stands in dump_path/progress.txt. Make the data first, with `python -m experiments.data`; then
`python -m experiments.summarise` makes the tables.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from downstream import compare, jobs
from downstream.jobs import Pretraining, read_recipes
from training.scripts import load
from utils import config as options
from utils import signals
from utils.errors import UserError

GRACE = 60.0  # seconds in which a run that is told to stop may save
SECTIONS = ("defaults", "recipes", "comparisons", "differences")


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


class Comparison(NamedTuple):
    """A comparison of a file: its cells, and which of their metrics are kept, the main one first."""

    cells: list[compare.Cell]
    metrics: list[str]


@dataclass
class Plan:
    """What some files ask for."""

    recipes: dict[str, list[Pretraining]] = field(default_factory=dict)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    differences: list[tuple[str, str]] = field(default_factory=list)  # initialisations: the first minus the second
    jobs: list[jobs.Job] = field(default_factory=list)  # in the order in which they are to be done

    @property
    def cells(self) -> list[compare.Cell]:
        return [cell for comparison in self.comparisons.values() for cell in comparison.cells]


def read_plan(files: Sequence[str | Path], out: Path) -> Plan:
    """The plan of the files, in their order; a later file may refer to what stands in an earlier one.

    Raises UserError naming the file or the entry and what is wrong in it.
    """
    plan, recipes, comparisons = Plan(), {}, {}
    place: dict[str, int] = {}  # of the file, by the names of its recipes and comparisons
    for number, file in enumerate(files):
        content = options.read_yaml(Path(file)) or {}
        if not isinstance(content, dict) or not content.keys() <= set(SECTIONS):
            raise UserError(f"{file}: must be a mapping with none but {', '.join(SECTIONS)}")
        for known, section in ((recipes, "recipes"), (comparisons, "comparisons")):
            for name, about in (content.get(section) or {}).items():
                if name in place:
                    raise UserError(f"{file}: {name} is described twice")
                known[name], place[name] = _inherited(f"{file}: {name}", about, known), number
                if section == "recipes":
                    known[name]["options"] = _with_defaults(known[name], content.get("defaults") or {})
        plan.differences += [tuple(pair) for pair in content.get("differences") or []]
    plan.recipes = read_recipes(recipes, (out / "recipes").resolve())
    plan.comparisons = {name: _comparison(name, about, plan.recipes, out) for name, about in comparisons.items()}
    # Seed by seed over all that has seeds: whenever the time is up, every table has as many as the others.
    ranked = [((place[name], k), run) for name, runs in plan.recipes.items() for k, run in enumerate(runs)]
    for name, (cells, _) in plan.comparisons.items():
        seeds = list(dict.fromkeys(cell.config.seed for cell in cells))
        ranked += [((place[name], seeds.index(cell.config.seed)), cell) for cell in cells]
    plan.jobs = [job for _, job in sorted(ranked, key=lambda pair: pair[0])]
    return plan


def _inherited(where: str, about: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    """An entry over the one that it is `like`, whose options and start it adds to."""
    if not isinstance(about, dict):
        raise UserError(f"{where}: must be a mapping")
    base = known.get(about.get("like"), {})
    if "like" in about and not base:
        raise UserError(f"{where}: like: no entry before it is called {about['like']!r}")
    merged = {name: value for name, value in (base | about).items() if name != "like"}
    for part in ("options", "start"):
        if part in merged:
            merged[part] = base.get(part, {}) | about.get(part, {})
    return merged


def _with_defaults(recipe: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options over those of the file's defaults that its script has."""
    has = {f.name for f in dataclasses.fields(load(str(recipe.get("script"))).Config)}
    return {name: value for name, value in defaults.items() if name in has} | recipe.get("options", {})


def _comparison(name: str, about: dict[str, Any], recipes: dict[str, list[Pretraining]], out: Path) -> Comparison:
    metrics = about.get("metrics", [None])
    given = {option: value for option, value in about.items() if option != "metrics"}
    config = jobs.parsed(compare.Config, given | {"metric": metrics[0], "dump_path": str(out / name)})
    try:
        cells = compare.make_cells(config, recipes)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return Comparison(cells, [cells[0].metric, *metrics[1:]])


if __name__ == "__main__":
    options.main(main, Config, __doc__)
