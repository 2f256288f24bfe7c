"""Tables and plots of finished runs: what pre-training was worth, with intervals, paired differences, and costs.

    python -m experiments.summarise --experiments "[experiments/main.yaml]" --output docs/RESULTS.md

Reads the finished runs (experiments.run makes them) and writes one page, with plots beside it in results/. Every mean
has its 95 % t-interval over seeds and its number of seeds; differences are paired, seed by seed. The figures of every
run that it has seen are kept in `records`: runs whose folders are gone, or on another machine, still count.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from downstream import compare
from experiments.plan import SCRIPTS, Plan, Table
from experiments.run import read_plan, run_keys, status
from utils import config as options
from utils import files
from utils.errors import UserError

LOWER_IS_BETTER = ("hd95_mm",)
RUNS, CELLS = "runs.csv", "cells.csv"
CELL = ("initialisation", "labelled", "seed", "cases")  # what cells.csv says of a cell, a word and three numbers
LAST = ("loss", "intra_std", "intra_rank", "inter_std", "inter_rank", "interpolation", "mask_skill")  # of metrics.csv


@dataclass
class Config:
    experiments: list[str] = field(default_factory=lambda: ["experiments/main.yaml"])
    """the YAML files that were given to experiments.run"""
    data: str = "runs/experiments/data"
    """as for experiments.run"""
    dump_path: str = "runs/experiments"
    """as for experiments.run"""
    output: str = "docs/RESULTS.md"
    """the page; its plots go to results/ beside it"""
    records: str = "docs/results"
    """folder of runs.csv and cells.csv, which are read and added to"""
    findings: str | None = "experiments/findings.md"
    """text that stands before the tables: what people concluded from them; null: none"""
    published: str = "experiments/published.yaml"
    """other people's figures, shown beside ours as such"""
    partial: bool = False
    """write the page although some runs are not finished; it says which"""


@dataclass
class Finished:
    """What is kept of a finished run."""

    name: str
    script: str
    seconds: float
    made_with: str
    last: dict[str, float] = field(default_factory=dict)  # of a pre-training: the last line of metrics.csv
    cells: list[dict[str, Any]] = field(default_factory=list)  # of a comparison


def main(cfg: Config) -> None:
    plan, out = read_plan(cfg)
    known = read_records(Path(cfg.records)) | read_runs(plan, out)
    write_records(known, Path(cfg.records))
    keys = run_keys(plan)
    wanted = {run: table.metrics for table in plan.tables for run in table.runs}
    finished = {name: known[key] for name, key in keys.items() if key in known and has(known[key], wanted.get(name))}
    missing = [name for name in plan.runs if name not in finished]
    if not finished or (missing and not cfg.partial):
        raise UserError(
            f"{len(missing)} of {len(plan.runs)} runs are not finished ({', '.join(missing[:5])}); run them"
        )
    page = Path(cfg.output)
    folder = page.with_name("results")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Results",
        f"Made by `python -m experiments.summarise` from {len(finished)} finished runs of "
        f"{', '.join(cfg.experiments)}; experiments/README.md says what they are. Means with 95 % t-intervals over "
        "seeds; a seed draws the labelled cases and all random weights, while test cases and pre-trained weights are "
        "the same for all seeds of a comparison without seeded pre-training: the intervals do not cover those. "
        f"Every figure: {CELLS} and {RUNS} in {cfg.records}.",
    ]
    if cfg.findings:
        try:
            parts.append(Path(cfg.findings).read_text(encoding="utf-8").strip())
        except OSError as error:
            raise UserError(
                f"findings: {cfg.findings} cannot be read ({error.strerror}); correct it, or null"
            ) from None
    if missing:
        parts.append(f"**{len(missing)} of {len(plan.runs)} runs are not finished**: {', '.join(missing)}.")
    for table in plan.tables:
        cells = [cell for run in table.runs if run in finished for cell in finished[run].cells]
        if cells:
            parts += section(table, cells, plan.differences, folder)
    parts += [*costs(finished), *published(Path(cfg.published))]
    files.write_text("\n\n".join(parts) + "\n", page)
    print(f"wrote {page} and {folder}")


def has(run: Finished, metrics: Sequence[str] | None) -> bool:
    """Whether every cell of a comparison has these metrics; a pre-training needs none."""
    return metrics is None or bool(run.cells and all(set(metrics) <= set(cell["metrics"]) for cell in run.cells))


def read_runs(plan: Plan, out: Path) -> dict[str, Finished]:
    """By their keys, the runs of the plan that are finished in `out`; of a comparison, the metrics of its table."""
    keys, found = run_keys(plan), {}
    metrics = {run: table.metrics for table in plan.tables for run in table.runs}
    for name, run in plan.runs.items():
        state = status(out, name, keys[name])
        if not state.done:
            continue
        found[keys[name]] = one = Finished(name, run.module, state.seconds, state.made_with)
        if name in metrics:
            with open(out / name / "results.csv", newline="") as file:  # cells of older weights are not in it
                one.cells = cells_of(row for row in csv.DictReader(file) if row["metric"] in metrics[name])
        else:
            with open(out / name / "metrics.csv", newline="") as file:
                *_, last = csv.DictReader(file)
            one.last = {column: float(last[column]) for column in LAST if last.get(column)}
    return found


def cells_of(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """A line per cell and metric -> the cells."""
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        cell = (row["initialisation"], *(int(row[key]) for key in CELL[1:]))
        known = cells.setdefault(cell, dict(zip(CELL, cell, strict=True)) | {"metrics": {}})
        known["metrics"][row["metric"]] = float(row["value"])
    return list(cells.values())


def read_records(folder: Path) -> dict[str, Finished]:
    """What `write_records` has written there, by key; empty where it has not."""
    found: dict[str, Finished] = {}
    if not (folder / RUNS).is_file():
        return found
    try:
        with open(folder / RUNS, newline="") as file:
            for row in csv.DictReader(file):
                last = {column: float(row[column]) for column in LAST if row.get(column)}
                about = (row["run"], row["script"], float(row["seconds"]), row["made_with"])
                found[row["key"]] = Finished(*about, last)
        with open(folder / CELLS, newline="") as file:
            by_key: dict[str, list[dict[str, str]]] = {}
            for row in csv.DictReader(file):
                by_key.setdefault(row["key"], []).append(row)
        for key in by_key.keys() & found.keys():
            found[key].cells = cells_of(by_key[key])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"records: {folder}/{RUNS} or {CELLS} is damaged ({error}); restore it from git") from None
    return found


def write_records(known: Mapping[str, Finished], folder: Path) -> None:
    """A line per run, and a line per cell and metric, which is there before the run's."""
    runs, cells = io.StringIO(), io.StringIO()
    lines = csv.writer(runs, lineterminator="\n")
    lines.writerow(["run", "key", "script", "seconds", "made_with", *LAST])
    for key, run in known.items():
        figures = (run.last.get(column, "") for column in LAST)
        lines.writerow([run.name, key, run.script, run.seconds, run.made_with, *figures])
    lines = csv.writer(cells, lineterminator="\n")
    lines.writerow(["run", "key", *CELL, "metric", "value"])
    for key, run in known.items():
        for cell in run.cells:
            about = [run.name, key, *(cell[column] for column in CELL)]
            lines.writerows([*about, metric, value] for metric, value in cell["metrics"].items())
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(cells.getvalue(), folder / CELLS)
    files.write_text(runs.getvalue(), folder / RUNS)


def means(cells: Sequence[Mapping[str, Any]], metric: str) -> dict[tuple[str, int], tuple[float, float, float, int]]:
    """(initialisation, labelled) -> mean, 95 % t-interval, number of seeds whose metric is not nan."""
    values: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        values.setdefault((cell["initialisation"], cell["labelled"]), []).append(cell["metrics"][metric])
    return {key: compare.paired_difference(some, [0.0] * len(some)) for key, some in values.items()}


def difference(
    cells: Sequence[Mapping[str, Any]], metric: str, labelled: int, better: str, worse: str
) -> tuple[float, float, float, int, float]:
    """Mean of `better` - `worse` over the seeds that both have, its 95 % t-interval, their number, and p of the paired
    t-test (nan with fewer than two pairs)."""
    of = {(c["initialisation"], c["seed"]): c["metrics"][metric] for c in cells if c["labelled"] == labelled}
    both = [(of[better, s], of[worse, s]) for name, s in of if name == better and (worse, s) in of]
    both = [pair for pair in both if not any(math.isnan(value) for value in pair)]
    first, second = [a for a, _ in both], [b for _, b in both]
    p = float(ttest_rel(first, second).pvalue) if len(both) > 1 else math.nan
    return (*compare.paired_difference(first, second), p)


def section(
    table: Table, cells: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]], plots: Path
) -> list[str]:
    """A heading, and for every metric a table of means, one of differences, and a plot."""
    cases = ", ".join(sorted({str(cell["cases"]) for cell in cells}))
    parts = [f"## {table.name}", f"`downstream.{table.task}`, {cases} test cases."]
    head = "".join(f" {count or 'all'} labelled |" for count in table.labelled)
    rule = "---|" * (1 + len(table.labelled))
    for metric in table.metrics:
        found = means(cells, metric)
        note = " (lower is better)" if metric.endswith(LOWER_IS_BETTER) else ""
        rows = [f"| **{metric}**{note} |{head}", f"|{rule}"]
        for name in table.initialisations:
            values = (found.get((name, count)) for count in table.labelled)
            rows.append(f"| {name} |" + "".join(f" {_interval(v)} |" for v in values))
        parts.append("\n".join(rows))
        known = [pair for pair in pairs if set(pair) <= set(table.initialisations)]
        rows = [f"| difference of {metric} |{head}", f"|{rule}"]
        for better, worse in known:
            values = (difference(cells, metric, count, better, worse) for count in table.labelled)
            rows.append(f"| {better} - {worse} |" + "".join(f" {_interval(v[:4], '+', v[4])} |" for v in values))
        if known:
            parts.append("\n".join(rows))
        picture = plots / f"{table.name}_{metric.replace('.', '_')}.png"
        compare.plot(cells, compare.summarise(cells, table.initialisations[0]), metric, picture)
        parts.append(f"![{metric} over labelled cases](results/{picture.name})")
    return parts


def costs(finished: Mapping[str, Finished]) -> list[str]:
    """Every pre-training's wall-clock time and the last line of its metrics.csv; the time of all comparisons."""
    rows = ["| run | script | seconds | " + " | ".join(LAST) + " |", "|---|---|---|" + "---|" * len(LAST)]
    for name, run in finished.items():
        if run.script in SCRIPTS:
            figures = (f"{run.last[column]:.3f}" if column in run.last else "-" for column in LAST)
            rows.append(f"| {name} | {run.script} | {run.seconds:.0f} | {' | '.join(figures)} |")
    compared = sum(run.seconds for run in finished.values() if run.script not in SCRIPTS)
    made_with = "; ".join(sorted({run.made_with for run in finished.values()}))
    text = (
        f"Wall-clock seconds of each process ({made_with}); "
        f"{sum(run.seconds for run in finished.values()) / 3600:.1f} hours of processes in all, {compared / 3600:.1f} "
        "of comparisons. Beside them the last epoch's figures, as docs/DIAGNOSTICS.md defines them."
    )
    return ["## Pre-training runs and costs", text, "\n".join(rows)]


def published(path: Path) -> list[str]:
    """Figures from the literature, marked as such."""
    about = options.read_yaml(path)
    names = about["columns"]
    rows = [f"| method | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    rows += [f"| {method} | {' | '.join(values)} |" for method, values in about["rows"].items()]
    return ["## Other people's figures, on other data", about["note"], "\n".join(rows)]


def _interval(value: tuple[float, float, float, int] | None, sign: str = "", p: float | None = None) -> str:
    if value is None or not value[3]:
        return "-"
    mean, low, high, n = value
    tested = "" if p is None or math.isnan(p) else f", p {p:.3f}"
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}], n {n}{tested}"


if __name__ == "__main__":
    options.main(main, Config, __doc__)
