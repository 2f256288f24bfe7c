"""Do what YAML files describe, as far as the time goes: pre-trainings, and comparisons of what they make.

    python -m experiments.run --experiments "[experiments/main.yaml]" --plan true      # what is done, what is left
    nice python -m experiments.run --experiments "[experiments/main.yaml, experiments/ablations.yaml]" --minutes 170

It may be stopped at any time: the same command goes on, a pre-training at its last step, a comparison in its last cell.
Progress stands in dump_path/progress.txt. Make the data first, with `python -m experiments.data`; then
`python -m experiments.summarise` makes the tables.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from downstream import compare, jobs
from training.scripts import load
from utils import config as options
from utils import files
from utils.errors import UserError

SECTIONS = ("defaults", "recipes", "comparisons", "differences")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


MAPPING = (lambda v: isinstance(v, dict) and all(isinstance(name, str) for name in v), "a mapping by name")
PARTS = {  # of a file and its entries: what is a good value, in code and in words
    **dict.fromkeys(("defaults", "recipes", "comparisons", "options"), MAPPING),
    "start": (lambda v: isinstance(v, dict) and _texts([*v, *v.values()]), "a mapping of options to names"),
    "script": (lambda v: isinstance(v, str), "the name of a training script"),
    "like": (lambda v: isinstance(v, str), "the name of an entry"),
    "seeds": (lambda v: isinstance(v, list) and v and all(type(x) is int for x in v), "a list of whole numbers"),
    "metrics": (lambda v: _texts(v) and v, "a list of names of metrics"),
    "differences": (lambda v: isinstance(v, list) and all(_texts(x) and len(x) == 2 for x in v), "a list of pairs"),
}


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
    out = Path(cfg.dump_path)
    plan = read_plan(cfg.experiments, out)
    print(jobs.progress(plan.jobs), flush=True)
    if cfg.plan:
        return
    compare.check([cell for comparison in plan.comparisons.values() for cell in comparison.cells])
    os.environ |= {"OMP_NUM_THREADS": str(cfg.threads), "MKL_NUM_THREADS": str(cfg.threads)}
    with files.owned(out, "does experiments"):
        failed = jobs.run_jobs(plan.jobs, out / "progress.txt", cfg.jobs, end)
    print(jobs.progress(plan.jobs), flush=True)
    if failed:
        raise UserError(f"failed: {'; '.join(failed)}. The same command tries them again")


class Comparison(NamedTuple):
    """A comparison of a file: its cells, and which of their metrics are kept, the main one first."""

    cells: list[compare.Cell]
    metrics: list[str]


class Plan(NamedTuple):
    """What some files ask for."""

    recipes: dict[str, list[jobs.Pretraining]]
    comparisons: dict[str, Comparison]
    differences: list[tuple[str, str]]  # initialisations: the first minus the second
    jobs: list[jobs.Job]  # in the order in which they are to be done


def read_plan(files: Sequence[str | Path], out: Path) -> Plan:
    """The plan of the files, in their order; a later file may refer to what stands in an earlier one.

    Raises UserError naming the file or the entry and what is wrong in it.
    """
    described: dict[str, dict[str, Any]] = {"recipes": {}, "comparisons": {}}
    place: dict[str, int] = {}  # of the file, by the names of its recipes and comparisons
    differences = []
    for number, file in enumerate(files):
        content = options.read_yaml(Path(file)) or {}
        if not isinstance(content, dict) or not content.keys() <= set(SECTIONS):
            raise UserError(f"{file}: must be a mapping with none but {', '.join(SECTIONS)}")
        _require_kinds(str(file), content)
        for section, known in described.items():
            for name, about in (content.get(section) or {}).items():
                if name in place:
                    raise UserError(f"{file}: {name} is described twice")
                known[name] = _entry(f"{file}: {name}", about, known, content.get("defaults") or {})
                place[name] = number
        differences += [tuple(pair) for pair in content.get("differences") or []]
    if not any(described.values()):
        raise UserError(f"experiments: {', '.join(map(str, files))}: describes no recipes and no comparisons")
    recipes = jobs.read_recipes(described["recipes"], Path(os.path.realpath(out / "recipes")))
    comparisons = {name: _comparison(name, about, recipes, out) for name, about in described["comparisons"].items()}
    # Seed by seed over all that has seeds: whenever the time is up, every table has as many as the others.
    ranked = [((place[name], k), run) for name, runs in recipes.items() for k, run in enumerate(runs)]
    for name, (cells, _) in comparisons.items():
        seeds = list(dict.fromkeys(cell.config.seed for cell in cells))
        ranked += [((place[name], seeds.index(cell.config.seed)), cell) for cell in cells]
    return Plan(recipes, comparisons, differences, [job for _, job in sorted(ranked, key=lambda pair: pair[0])])


def _require_kinds(where: str, part: Mapping[str, Any]) -> None:
    """UserError for what PARTS say is of another kind."""
    for name, (good, wanted) in PARTS.items():
        if name in part and not good(part[name]):
            raise UserError(f"{where}: {name}: {part[name]!r} must be {wanted}")


def _entry(where: str, about: Any, known: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """An entry over the one that it is `like`, whose options and start it adds to; below, its script's defaults."""
    if not isinstance(about, dict) or about.get("like") not in (None, *known):
        raise UserError(f"{where}: must be a mapping, and `like`, if given, the name of an entry before it")
    _require_kinds(where, about)
    base = known.get(about.get("like"), {})
    entry = {name: value for name, value in (base | about).items() if name != "like"}
    for part in ("options", "start"):
        if part in entry:
            entry[part] = base.get(part, {}) | about.get(part, {})
    if "script" in entry:
        has = {f.name for f in fields(load(entry["script"]).Config)}
        given = {name: value for name, value in defaults.items() if name in has}
        entry["options"] = given | entry.get("options", {})
    return entry


def _comparison(name: str, about: dict[str, Any], recipes: dict[str, list[jobs.Pretraining]], out: Path) -> Comparison:
    metrics = about.pop("metrics", [None])
    config = jobs.parsed(compare.Config, about | {"metric": metrics[0], "dump_path": str(out / name)})
    try:
        cells = compare.make_cells(config, recipes)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return Comparison(cells, [cells[0].metric, *metrics[1:]])


if __name__ == "__main__":
    options.main(main, Config, __doc__)
