"""From YAML files to named runs: pre-training scripts, and comparisons of what they wrote, one run per seed.

experiments/README.md describes the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from downstream.compare import MAIN_METRIC
from utils.config import read_yaml
from utils.errors import UserError

SECTIONS = ("defaults", "pretraining", "comparisons", "differences")
PRETRAINING = ("script", "options", "start", "seeds", "seconds", "variants")
COMPARISON = ("task", "initialisations", "labelled", "seeds", "options", "seconds", "metrics")
SCRIPTS = ("ssl_swav2D", "mask_swav", "ssl_swav3D", "ssl_deepcluster2D", "mask_deepcluster", "ssl_deepcluster3D")
PLACES = ("dump_path", "pretrained_path", "checkpoint_name")  # options that are set here


@dataclass(frozen=True)
class Run:
    """One process: a training script, or one seed of a comparison."""

    name: str  # also its folder
    module: str
    options: dict[str, Any]  # folders as {data}, {runs} and {weights}: a run is the same wherever they are
    needs: tuple[str, ...]  # runs whose weights it reads
    seconds: float  # expected, on one core

    def key(self, keys: Mapping[str, str]) -> str:
        """Of module, options that the YAML files set, and the same of the runs before it.

        Not of the data, nor of the scripts' code and constants: those are the commit's, which is kept beside the key.
        """
        text = json.dumps([self.module, self.options, [keys[name] for name in self.needs]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def placed(self, data: Path, runs: Path) -> dict[str, Any]:
        """Its options with those folders."""
        folders = {"{data}": data, "{runs}": runs, "{weights}": runs / "weights"}

        def fill(value: Any) -> Any:
            if isinstance(value, str):
                for name, folder in folders.items():
                    value = value.replace(name, str(folder))
                return value
            if isinstance(value, dict):
                return {key: fill(item) for key, item in value.items()}
            return [fill(item) for item in value] if isinstance(value, list) else value

        return fill(self.options)


@dataclass(frozen=True)
class Table:
    """One comparison as its table needs it."""

    name: str
    task: str
    metrics: tuple[str, ...]
    initialisations: tuple[str, ...]
    labelled: tuple[int, ...]
    runs: tuple[str, ...]  # one per seed


@dataclass
class Plan:
    """What some YAML files ask for. Runs come after those that they need."""

    runs: dict[str, Run] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    differences: list[tuple[str, str]] = field(default_factory=list)  # of initialisations: the first minus the second


def expand(files: Sequence[str | Path]) -> Plan:
    """The plan of the files, in their order; a later file may start from runs of an earlier one.

    Raises UserError naming the file and what is wrong in it: unknown keys, options that the script does not have, runs
    that no file describes.
    """
    plan, seeds_of = Plan(), {}
    for file in files:
        content = _checked(str(file), read_yaml(Path(file)), SECTIONS)
        for option in content.get("defaults", {}):
            if option in PLACES or not any(option in options_of(script) for script in SCRIPTS):
                raise UserError(f"{file}: defaults: no script has an option {option!r} that may be set here")
        # Seed by seed over all that has seeds: whenever the time is up, every table has as many as the others.
        by_seed: dict[int | None, list[Run]] = {None: []}
        for name, about in _variants(str(file), content.get("pretraining", {})):
            if name in seeds_of:
                raise UserError(f"{file}: {name} is described twice")
            seeds_of[name] = list(about.get("seeds", []))
            for seed in seeds_of[name] or [None]:
                run = _pretraining(f"{file}: {name}", name, about, content.get("defaults", {}), seed, seeds_of)
                by_seed.setdefault(seed, []).append(run)
        for name, about in content.get("comparisons", {}).items():
            about = _checked(f"{file}: {name}", about, COMPARISON)
            for needed in ("initialisations", "labelled", "seeds"):
                if not about.get(needed):
                    raise UserError(f"{file}: {name}: has no {needed}")
            runs = {seed: _comparison(f"{file}: {name}", name, about, seed, seeds_of) for seed in about["seeds"]}
            for seed, run in runs.items():
                by_seed.setdefault(seed, []).append(run)
            metrics = about.get("metrics", [MAIN_METRIC[about["task"]]])
            plan.tables.append(
                Table(
                    name,
                    about["task"],
                    tuple(metrics),
                    tuple(about["initialisations"]),
                    tuple(about["labelled"]),
                    tuple(run.name for run in runs.values()),
                )
            )
        for run in itertools.chain(*by_seed.values()):
            if run.name in plan.runs:
                raise UserError(f"{file}: {run.name} is described twice")
            plan.runs[run.name] = run
        plan.differences += [(better, worse) for better, worse in content.get("differences", [])]
    return plan


def options_of(script: str) -> set[str]:
    """Names of what the script can be told."""
    return {f.name for f in dataclasses.fields(importlib.import_module(script).Config)}


def _checked(where: str, content: Any, allowed: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be a mapping with any of {', '.join(allowed)}")
    for key in content:
        if key not in allowed:
            raise UserError(f"{where}: {key!r} is not one of {', '.join(allowed)}")
    return content


def _variants(file: str, pretraining: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every entry, or for one with `variants` as many: the entry with the options of the variant over its own."""
    for name, about in pretraining.items():
        about = _checked(f"{file}: {name}", about, PRETRAINING)
        if about.get("script") not in SCRIPTS:
            raise UserError(f"{file}: {name}: script {about.get('script')!r} is not one of {', '.join(SCRIPTS)}")
        base = {key: value for key, value in about.items() if key != "variants"}
        for variant, changes in about.get("variants", {}).items():
            yield variant, base | {"options": base.get("options", {}) | (changes or {})}
        if "variants" not in about:
            yield name, base


def _pretraining(
    where: str,
    name: str,
    about: Mapping[str, Any],
    defaults: Mapping[str, Any],
    seed: int | None,
    seeds_of: Mapping[str, Sequence[int]],
) -> Run:
    has = options_of(about["script"])
    own = about.get("options", {})
    for option in own:
        if option not in has or option in (*PLACES, "seed"):
            raise UserError(f"{where}: {about['script']} has no option {option!r} that may be set here")
    chosen = {option: value for option, value in defaults.items() if option in has} | dict(own)
    needs = []
    for option, of in about.get("start", {}).items():
        if option not in has:
            raise UserError(f"{where}: start: {about['script']} has no option {option!r}")
        if of != "none":
            of = _seeded(where, of, seed, seeds_of)
            needs.append(of)
        chosen[option] = of if of == "none" else f"{of}.pth"
    full = name if seed is None else f"{name}-s{seed}"
    chosen |= {"dump_path": f"{{runs}}/{full}", "pretrained_path": "{weights}", "checkpoint_name": f"{full}.pth"}
    if seed is not None:
        chosen["seed"] = seed
    return Run(full, about["script"], chosen, tuple(needs), float(about.get("seconds", 0)))


def _comparison(
    where: str, name: str, about: Mapping[str, Any], seed: int, seeds_of: Mapping[str, Sequence[int]]
) -> Run:
    """All initialisations and label counts of one seed, by downstream.compare, on test cases that all seeds share."""
    if about.get("task") not in MAIN_METRIC:
        raise UserError(f"{where}: task {about.get('task')!r} is not one of {', '.join(MAIN_METRIC)}")
    full = f"{name}-s{seed}"
    entries, needs = [], []
    for label, of in about["initialisations"].items():
        if of in ("random", "imagenet"):
            entries.append(of if of == label else f"{label}={of}")
        else:
            needs.append(_seeded(where, of, seed, seeds_of))
            entries.append(f"{label}={{weights}}/{needs[-1]}.pth")
    chosen = {
        "task": about["task"],
        "initialisations": entries,
        "labelled": list(about["labelled"]),
        "seeds": [seed],
        "vary_split": False,
        "options": dict(about.get("options", {})),
        "dump_path": f"{{runs}}/{full}",
    }
    cells = len(entries) * len(about["labelled"])
    return Run(full, "downstream.compare", chosen, tuple(needs), cells * float(about.get("seconds", 0)))


def _seeded(where: str, name: str, seed: int | None, seeds_of: Mapping[str, Sequence[int]]) -> str:
    """The run of a pre-training: that of the same seed, where it has seeds."""
    if name not in seeds_of:
        raise UserError(f"{where}: no run is called {name!r}; give the file that describes it before this one")
    if not seeds_of[name]:
        return name
    if seed not in seeds_of[name]:
        raise UserError(f"{where}: {name} has no seed {seed}, only {seeds_of[name]}")
    return f"{name}-s{seed}"
