"""Does pre-training pay? One task from several initialisations, with several label counts and seeds.

    python -m downstream.compare --task classify --initialisations "[random, joint=weights/swav3D_encoder.pth]" \\
        --labelled "[10, 50, 0]" --seeds "[0, 1, 2]" --options.data_path Training_Data --options.size 128

Each combination is a cell: it is run once, kept in dump_path, and read from there when the command is given again. The
differences are paired: the same seed, split and labelled cases from either initialisation. docs/DOWNSTREAM.md has more.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pandas as pd
from jsonargparse.typing import NonNegativeInt
from scipy.stats import t

from downstream import jobs
from downstream.encoders import NAMED, choose_arch, content_of, load_encoder
from downstream.jobs import Pretraining
from downstream.results import RESULTS, read_results, warn_of
from utils import config as options
from utils.errors import UserError
from utils.files import owned, write_together

MAIN_METRIC = {"segment": "mean.dice", "classify": "auc", "detect": "ap50"}


@dataclass
class Config:
    task: Literal["segment", "classify", "detect"]
    """script of downstream/ that is run"""
    initialisations: list[str] = field(default_factory=lambda: ["random", "imagenet"])
    """weights to start from: random, imagenet (left out where it is not in torch's cache), files or recipes; NAME=FILE
    or NAME=RECIPE gives one a name"""
    recipes: dict[str, Any] = field(default_factory=dict)
    """pre-trainings that are run first, by name: script, options, start and seeds (downstream/jobs.py)"""
    labelled: list[NonNegativeInt] = field(default_factory=lambda: [5, 0])
    """numbers of labelled training cases; 0: all"""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """each is run with every initialisation and number of labelled cases; the k-th starts from a recipe's k-th run"""
    vary_split: bool = True
    """draw the split by the seed too; false, or a split file among the options: test on the same cases always"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the task, for every cell: --options.size 128"""
    metric: str | None = None
    """metric of the tables and the plot, e.g. linear.auc; null: the task's main one. The CSV files have all"""
    baseline: str | None = None
    """initialisation that the others are compared with; null: the first"""
    dump_path: str = "runs/compare"
    """receives results.csv, summary.csv, summary.txt, comparison.png, options.yaml, progress.txt, and cells/"""
    recipes_path: str | None = None
    """folder of the recipes' runs, which several comparisons may share; null: recipes in dump_path"""


@dataclass(eq=False)
class Cell(jobs.Job):
    """One run of the task."""

    task: ModuleType  # of downstream
    initialisation: str  # its name in tables
    config: Any  # of the task
    pretraining: Pretraining | None  # which makes config.weights
    out: Path
    metric: str

    def __post_init__(self) -> None:
        self.group = self.out.name
        self.title = f"{self.group}: {self.initialisation}, {_count(self.config.labelled)}, seed {self.config.seed}"
        self.needs = [self.pretraining] if self.pretraining else []
        self.script = self.task.__name__

    @cached_property
    def folder(self) -> Path:
        """Named by the task, its options, and the content of the files that they name; not by what the data hold."""
        fixed = [f.name for f in fields(self.config) if not f.metadata.get("may_change")]
        settings = {name: content_of(getattr(self.config, name)) for name in ["data_path", *fixed]}
        return self.out / "cells" / jobs.short_key([self.task.__name__, settings])

    @property
    def options(self) -> dict[str, Any]:
        return options.to_dict(replace(self.config, dump_path=str(self.folder)))

    @property
    def record(self) -> dict[str, Any] | None:
        """What the task has written when it was finished: metrics by their full names, cases, seconds, commit."""
        if not all(need.record for need in self.needs) or not (self.folder / RESULTS).is_file():
            return None
        found = read_results(self.folder)
        return found | {"metrics": dict(_flat(found["metrics"]))}


def run(cfg: Config) -> dict[str, Any]:
    """Do what is not finished, then write and print the comparison; returns the tables summary and cells (results)."""
    out = Path(cfg.dump_path)
    with owned(out, f"compares in {out}"):
        return _run(cfg, out)


def _run(cfg: Config, out: Path) -> dict[str, Any]:
    recipes = jobs.read_recipes(cfg.recipes, Path(os.path.realpath(cfg.recipes_path or out / "recipes")))
    cells = make_cells(cfg, recipes)
    check(cells)
    failed = jobs.run_jobs([*itertools.chain(*recipes.values()), *cells], out / "progress.txt")
    if failed:
        raise UserError(f"failed: {'; '.join(failed)}. The same command goes on with them")
    table = results(cells)
    metric = cells[0].metric
    if metric not in set(table.metric):
        raise UserError(f"metric: {metric!r} is not one of {', '.join(table.metric.unique())}")
    baseline = cfg.baseline or cells[0].initialisation
    summary = summarise(table, baseline)
    text = format_tables(summary, metric, baseline)
    if not _splits_vary(cfg):
        text += "\nall seeds share their test cases: the intervals do not cover which cases these are"
    for name, seen, tested in leaks(cells):
        text += f"\nwarning: {name}: {warn_of(seen, tested)}"
    texts = {
        "options.yaml": options.yaml_text(options.to_dict(cfg)),
        "results.csv": csv_of(table),
        "summary.txt": text + "\n",
        "summary.csv": csv_of(summary),
    }
    contents = {out / name: part.encode() for name, part in texts.items()}
    contents[out / "comparison.png"] = plot({"": (table, metric)})
    write_together(contents, last=[out / "summary.csv"])
    print(f"\n{text}\n\nwrote {out}/results.csv, summary.csv, summary.txt, comparison.png")
    return {"summary": summary, "cells": table}


def make_cells(cfg: Config, recipes: Mapping[str, Sequence[Pretraining]]) -> list[Cell]:
    """The cells in the order in which they are run. Raises UserError naming the option that is wrong."""
    found = _initialisations(cfg, recipes)
    if cfg.baseline not in (None, *found):
        raise UserError(f"baseline: {cfg.baseline!r} is none of the initialisations {', '.join(found)}")
    for name, values in {"labelled": cfg.labelled, "seeds": cfg.seeds}.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}: {values} must be at least one number, each once")
    own = {"weights", "labelled", "seed", "dump_path", *["split_seed"] * _splits_vary(cfg)}
    if given := own & cfg.options.keys():
        raise UserError(f"options: {', '.join(sorted(given))} is set by compare itself; leave it out")
    task = importlib.import_module(f"downstream.{cfg.task}")
    common = jobs.parsed(task.Config, cfg.options)
    cells = []
    for (k, seed), labelled, (name, of) in itertools.product(enumerate(cfg.seeds), cfg.labelled, found.items()):
        pretraining = None if isinstance(of, str) else jobs.at(of, k)
        chosen = {"weights": str(pretraining.weights) if pretraining else of, "labelled": labelled, "seed": seed}
        config = replace(common, **chosen, **({"split_seed": seed} if _splits_vary(cfg) else {}))
        cells.append(Cell(task, name, config, pretraining, Path(cfg.dump_path), cfg.metric or MAIN_METRIC[cfg.task]))
    return cells


def check(cells: Sequence[Cell]) -> None:
    """Raise UserError for whatever is wrong with cells that are not finished, before the first is run.

    All weights and all draws of labels are seen, not each with each. Weights that are still to be made count as random.
    """
    seen: set[tuple[Any, ...]] = set()
    for cell in cells:
        cfg = cell.config
        if cell.pretraining and not cell.pretraining.record:
            cfg = replace(cfg, weights="random", arch=cfg.arch or cell.pretraining.arch)
        facts = {(cell.out, cfg.weights), (cell.out, cfg.labelled, cfg.seed)}
        if not facts <= seen and not cell.record:
            folder = cell.folder if cfg is cell.config else cell.out / "cells" / "to be made"
            cell.task.check(replace(cfg, dump_path=str(folder)))
            seen |= facts


def results(cells: Sequence[Cell]) -> pd.DataFrame:
    """A row per finished cell and metric."""
    rows = []
    for cell in cells:
        if record := cell.record:
            about = {"initialisation": cell.initialisation, "weights": record["weights"]}
            about |= {"pretraining_seed": cell.pretraining.seed if cell.pretraining else None}
            about |= {"labelled": cell.config.labelled, "seed": cell.config.seed}
            about |= {name: record[name] for name in ("cases", "seconds", "commit")}
            rows += [about | {"metric": name, "value": value} for name, value in record["metrics"].items()]
    return pd.DataFrame(rows).astype({"pretraining_seed": "Int64"})


def leaks(cells: Sequence[Cell]) -> Iterator[tuple[str, list[str], int]]:
    """(initialisation, test cases that it was pre-trained on, how many there are), the worst of each initialisation."""
    for name in dict.fromkeys(cell.initialisation for cell in cells):
        records = [cell.record for cell in cells if cell.initialisation == name and cell.record]
        worst = max(records, key=lambda record: len(record.get("pretrained_on", [])))
        if worst.get("pretrained_on"):
            yield name, worst["pretrained_on"], worst["cases"]


def summarise(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row per metric, number of labelled cases and initialisation.

    mean and sd (n - 1) over the n seeds whose metric is not nan, of `seeds` in all; difference to the baseline over the
    `pairs` of seeds in which both are not nan, with Student's 95 % interval low, high. Where an initialisation has
    several pre-trainings, it is these that count: seeds that start from the same one are averaged first.
    """
    rows = []
    for (metric, labelled), part in table.groupby(["metric", "labelled"], sort=False):
        wide = part.pivot(index="seed", columns="initialisation", values=["value", "pretraining_seed"])
        values, drawn = wide["value"].astype(float), wide["pretraining_seed"]
        draws = {name: drawn[name] if drawn[name].nunique() > 1 else values.index for name in values}
        for name in part.initialisation.unique():
            own = values[name].groupby(draws[name]).mean()
            coarser = min(draws[name], draws.get(baseline, values.index), key=lambda draw: draw.nunique())
            gains = (values[name] - values.get(baseline, math.nan)).groupby(coarser).mean()
            half = t.ppf(0.975, gains.count() - 1) * gains.sem()
            rows.append(
                {"initialisation": name, "labelled": labelled, "metric": metric}
                | {"mean": own.mean(), "sd": own.std(), "n": own.count(), "seeds": len(own)}
                | {"difference": gains.mean(), "low": gains.mean() - half, "high": gains.mean() + half}
                | {"pairs": gains.count()}
            )
    return pd.DataFrame(rows)


def format_tables(summary: pd.DataFrame, metric: str, baseline: str) -> str:
    """Mean ± standard deviation, and below it the paired differences to the baseline, of one metric."""
    rows = summary[summary.metric == metric]
    text = f"{metric}: mean ± standard deviation of {rows.seeds.max()} seeds\n{as_text(rows, 'means').to_string()}"
    others = rows[rows.initialisation != baseline]
    if len(others):
        text += f"\n\ndifference to {baseline}, seed by seed: mean [95 % t-interval]\n"
        text += as_text(others, "differences").to_string()
    return text


def as_text(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Rows of one metric of a summary as words, initialisations by numbers of labels: its means or differences."""
    words = []
    for row in rows.itertuples():
        if kind == "means":
            words.append(f"{row.mean:.3f} ± {row.sd:.3f}" + f" ({row.n} of {row.seeds})" * (row.n < row.seeds))
        else:
            words.append(f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]")
    shown = pd.DataFrame({"name": rows.initialisation, "count": rows.labelled.map(_count), "words": words})
    wide = shown.pivot(index="name", columns="count", values="words")
    return wide.loc[shown.name.unique(), shown["count"].unique()].rename_axis(index=None, columns=None)


def plot(tables: Mapping[str, tuple[pd.DataFrame, str]]) -> bytes:
    """PNG: a panel per title -> (table, metric) of mean, deviation and every seed over the number of labelled cases."""
    from matplotlib.figure import Figure

    wide, tall = min(2, len(tables)), math.ceil(len(tables) / 2)
    figure = Figure(figsize=(6 * wide, 4 * tall), layout="constrained")
    for place, (title, (table, metric)) in enumerate(tables.items(), start=1):
        axes = figure.add_subplot(tall, wide, place, title=title, xlabel="labelled training cases", ylabel=metric)
        rows = table[table.metric == metric]
        counts = sorted(rows.labelled.unique(), key=lambda count: count or math.inf)
        for k, (name, own) in enumerate(rows.groupby("initialisation", sort=False)):
            x = own.labelled.map(counts.index) + 0.12 * (k - (rows.initialisation.nunique() - 1) / 2)
            spread = own.value.groupby(x).agg(["mean", "std"]).fillna({"std": 0})
            bars = axes.errorbar(spread.index, spread["mean"], spread["std"], marker="o", capsize=3, label=name)
            axes.scatter(x, own.value, s=8, alpha=0.5, color=bars[0].get_color())
        axes.set_xticks(range(len(counts)), [str(count or "all") for count in counts])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture := io.BytesIO(), dpi=150, format="png")
    return picture.getvalue()


def csv_of(table: pd.DataFrame) -> str:
    return table.to_csv(index=False)


def _initialisations(
    cfg: Config, recipes: Mapping[str, Sequence[Pretraining]]
) -> dict[str, str | Sequence[Pretraining]]:
    """Name in tables -> weights or the runs of a recipe; files exist, and all have the same network."""
    found: dict[str, Any] = {}
    networks = set()
    arch = cfg.options.get("arch")
    for entry in cfg.initialisations:
        name, _, given = entry.partition("=")
        weights = given or name
        if not given and weights not in (*NAMED, *recipes):
            name = Path(weights).stem
        if name in found:
            raise UserError(f"initialisations: two are called {name}; name them, e.g. mine={weights}")
        if weights == "imagenet":
            try:
                load_encoder(weights, arch)
            except UserError as error:
                print(f"left out: {error}")
                continue
        found[name] = recipes.get(weights, weights)
        networks.add(arch or recipes[weights][0].arch if weights in recipes else choose_arch(weights, arch))
    if not found:
        raise UserError("initialisations: none is left; give random, files of weights or recipes")
    if len(networks) > 1:
        raise UserError(f"initialisations: {', '.join(sorted(networks))} differ; name one with --options.arch")
    return found


def _splits_vary(cfg: Config) -> bool:
    return cfg.vary_split and not cfg.options.get("split")


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """{"mean": {"dice": 0.9}} -> mean.dice, 0.9."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, math.nan if value is None else float(value)


def _count(labelled: int) -> str:
    return f"{labelled} labelled" if labelled else "all labelled"


if __name__ == "__main__":
    options.main(run, Config, __doc__)
