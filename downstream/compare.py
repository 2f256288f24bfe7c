"""Does pre-training pay? One task from several initialisations, with several label counts and seeds.

    python -m downstream.compare --task probe --initialisations "[random, joint=weights/swav3D_encoder.pth]" \\
        --labelled "[10, 50, 0]" --seeds "[0, 1, 2]" --options.data_path Training_Data --options.size 128

Each combination is a cell: it is run once, kept in dump_path, and read from there when the command is given again. The
differences are paired: the same seed, split and labelled cases from either initialisation. docs/COMPARE.md has more.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jsonargparse.typing import NonNegativeInt
from scipy.stats import t as student

from downstream.encoders import NAMED, choose_arch, describe_weights, load_encoder
from utils import config as options
from utils.errors import UserError
from utils.files import write_json

MAIN_METRIC = {"segment": "mean.dice", "classify": "auc", "probe": "linear.balanced_accuracy", "detect": "ap50"}
# Of a task's options: those that do not change what a cell computes.
FREE = {"dump_path", "cache_path", "device", "overlays", "workers"}


@dataclass
class Config:
    task: Literal["segment", "classify", "probe", "detect"]
    """the script of downstream/ that is run"""
    initialisations: list[str] = field(default_factory=lambda: ["random", "imagenet"])
    """weights to start from: random, imagenet (left out where it is not in torch's cache), or files, as NAME=FILE"""
    labelled: list[NonNegativeInt] = field(default_factory=lambda: [5, 0])
    """numbers of labelled training cases; 0: all"""
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """each is run with every initialisation and number of labelled cases"""
    vary_split: bool = True
    """draw the split by the seed too; false, or a split file among the options: test on the same cases always"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the task, for every cell: --options.size 128"""
    metric: str | None = None
    """what the tables and the plot show, e.g. linear.auc; null: the task's main one. The CSV files have all"""
    baseline: str | None = None
    """initialisation that the others are compared with; null: the first"""
    dump_path: str = "runs/compare"
    """receives results.csv, summary.csv, summary.txt, comparison.png, and the cells that are finished"""


class Cell(NamedTuple):
    """One run of the task."""

    initialisation: str  # its name in tables
    labelled: int
    seed: int
    config: Any  # of the task


def main(cfg: Config) -> None:
    run(cfg)


def run(cfg: Config) -> dict[str, Any]:
    """Run the cells that are not finished, then write and print the comparison.

    Returns summary (list of dictionaries, the lines of summary.csv) and cells (those of results.csv).
    """
    weights = _initialisations(cfg)
    baseline = cfg.baseline or next(iter(weights))
    if baseline not in weights:
        raise UserError(f"baseline: {baseline!r} is none of the initialisations {', '.join(weights)}")
    for name, values in {"labelled": cfg.labelled, "seeds": cfg.seeds}.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}: {values} must be at least one number, each once")
    task = importlib.import_module(f"downstream.{cfg.task}")
    out = Path(cfg.dump_path)
    cells = [
        Cell(name, labelled, seed, _task_config(cfg, task, weights[name], labelled, seed))
        for labelled in cfg.labelled
        for seed in cfg.seeds
        for name in weights
    ]
    metric = cfg.metric or MAIN_METRIC[cfg.task]
    results = []
    for number, cell in enumerate(cells, start=1):
        title = f"[{number}/{len(cells)}] {cell.initialisation}, {_count(cell.labelled)}, seed {cell.seed}"
        result = _read(out, cfg.task, cell)
        done = result is not None
        if not done:
            print(f"\n{title}", flush=True)
            result = _run(out, cfg.task, task, cell)
        if metric not in result["metrics"]:
            raise UserError(f"metric: {metric!r} is not one of {', '.join(result['metrics'])}")
        print(f"{title}: {metric} {result['metrics'][metric]:.3f}" + " (finished before)" * done, flush=True)
        results.append(result)
    summary = summarise(results, baseline)
    _write_csv(out / "results.csv", [_long(result, name) for result in results for name in result["metrics"]])
    _write_csv(out / "summary.csv", summary)
    text = format_tables(summary, metric, baseline)
    if not _splits_vary(cfg):
        text += "\nall seeds share their test cases: the intervals do not cover which cases these are"
    (out / "summary.txt").write_text(text + "\n")
    plot(results, summary, metric, out / "comparison.png")
    print(f"\n{text}\n\nwrote {out}/results.csv, summary.csv, summary.txt, comparison.png")
    return {"summary": summary, "cells": results}


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float, int]:
    """(mean, low, high, pairs) of values - baseline, pair by pair, with Student's 95 % interval of the mean.

    Pairs with a nan do not count. The interval is nan with fewer than two pairs; all is nan without any.
    """
    differences = np.array(values, dtype=float) - np.array(baseline, dtype=float)
    differences = differences[~np.isnan(differences)]
    n = len(differences)
    if n == 0:
        return math.nan, math.nan, math.nan, 0
    mean = float(differences.mean())
    if n == 1:
        return mean, math.nan, math.nan, 1
    half = float(student.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half, n


def summarise(results: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """One line per initialisation, number of labelled cases and metric.

    mean and sd (n - 1) over the n seeds whose metric is not nan, of `seeds` in all; difference, low, high, pairs: of
    `paired_difference` to the baseline.
    """
    values = {(r["initialisation"], r["labelled"], r["seed"], m): v for r in results for m, v in r["metrics"].items()}
    names, counts, seeds, metrics = (list(dict.fromkeys(key[i] for key in values)) for i in range(4))
    lines = []
    for metric in metrics:
        for labelled in counts:
            reference = [values.get((baseline, labelled, seed, metric), math.nan) for seed in seeds]
            for name in names:
                own = [values.get((name, labelled, seed, metric), math.nan) for seed in seeds]
                known = np.array([value for value in own if not math.isnan(value)])
                mean, low, high, pairs = paired_difference(own, reference)
                lines.append(
                    {
                        "initialisation": name,
                        "labelled": labelled,
                        "metric": metric,
                        "mean": float(known.mean()) if len(known) else math.nan,
                        "sd": float(known.std(ddof=1)) if len(known) > 1 else math.nan,
                        "n": len(known),
                        "seeds": len(seeds),
                        "difference": mean,
                        "low": low,
                        "high": high,
                        "pairs": pairs,
                    }
                )
    return lines


def format_tables(summary: Sequence[Mapping[str, Any]], metric: str, baseline: str) -> str:
    """Mean ± standard deviation, and below it the paired differences to the baseline, of one metric."""
    lines = [line for line in summary if line["metric"] == metric]
    names, counts = (list(dict.fromkeys(line[key] for line in lines)) for key in ("initialisation", "labelled"))
    of = {(line["initialisation"], line["labelled"]): line for line in lines}
    width = max(map(len, [*names, "initialisation"])) + 2

    def table(title: str, rows: Sequence[str], cell: Any) -> list[str]:
        head = f"{'initialisation':<{width}}" + "".join(f"{_count(count):>26}" for count in counts)
        return [title, head, *(f"{n:<{width}}" + "".join(f"{cell(of[n, c]):>26}" for c in counts) for n in rows)]

    def mean(line: Mapping[str, Any]) -> str:
        missing = f" ({line['n']} of {line['seeds']})" if line["n"] < line["seeds"] else ""
        return f"{line['mean']:.3f} ± {line['sd']:.3f}{missing}"

    def difference(line: Mapping[str, Any]) -> str:
        return f"{line['difference']:+.3f} [{line['low']:+.3f}, {line['high']:+.3f}]"

    text = table(f"{metric}: mean ± standard deviation of {lines[0]['seeds']} seeds", names, mean)
    others = [name for name in names if name != baseline]
    if others:
        title = f"difference to {baseline}, seed by seed: mean [95 % t-interval]"
        text += ["", *table(title, others, difference)]
    return "\n".join(text)


def plot(results: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]], metric: str, path: Path) -> None:
    """Mean and standard deviation over the number of labelled cases, every seed as a small dot."""
    from matplotlib.figure import Figure

    lines = [line for line in summary if line["metric"] == metric]
    counts = sorted({line["labelled"] for line in lines}, key=lambda count: count or math.inf)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(line["initialisation"] for line in lines))
    for k, name in enumerate(names):
        shift = 0.12 * (k - (len(names) - 1) / 2)
        own = {line["labelled"]: line for line in lines if line["initialisation"] == name}
        x = [counts.index(count) + shift for count in counts]
        y, sd = ([own[count][key] for count in counts] for key in ("mean", "sd"))
        bars = axes.errorbar(x, y, np.nan_to_num(sd), marker="o", capsize=3, label=name)
        dots = [r for r in results if r["initialisation"] == name]
        axes.scatter(
            [counts.index(r["labelled"]) + shift for r in dots],
            [r["metrics"][metric] for r in dots],
            s=8,
            alpha=0.5,
            color=bars[0].get_color(),
        )
    axes.set_xticks(range(len(counts)), [str(count) if count else "all" for count in counts])
    axes.set_xlabel("labelled training cases")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _initialisations(cfg: Config) -> dict[str, str]:
    """Name in tables -> weights; all of them exist and have the same network."""
    found: dict[str, str] = {}
    arch = cfg.options.get("arch")
    for entry in cfg.initialisations:
        name, _, file = entry.partition("=")
        weights = file or name
        if weights == "imagenet":
            try:
                load_encoder(weights, arch)
            except UserError as error:
                print(f"left out: {error}")
                continue
        if not file and weights not in NAMED:
            name = Path(weights).stem
        describe_weights(weights)  # a missing file is an error now, not after an hour
        if name in found:
            raise UserError(f"initialisations: two are called {name}; name them, e.g. mine={weights}")
        found[name] = weights
    if not found:
        raise UserError("initialisations: none is left; give random or files of weights")
    networks = {name: choose_arch(weights, arch) for name, weights in found.items()}
    if len(set(networks.values())) > 1:
        listed = ", ".join(f"{name} {network}" for name, network in networks.items())
        raise UserError(f"initialisations: {listed} are different networks; name one with --options.arch")
    return found


def _splits_vary(cfg: Config) -> bool:
    return cfg.vary_split and not cfg.options.get("split")


def _task_config(cfg: Config, task: Any, weights: str, labelled: int, seed: int) -> Any:
    """The task's checked configuration of one cell."""
    own = {"weights": weights, "labelled": labelled, "seed": seed}
    if _splits_vary(cfg):
        own["split_seed"] = seed
    for name in [*own, "dump_path"]:
        if name in cfg.options:
            raise UserError(f"options: {name} is set by compare itself; leave it out")
    args = []
    for name, value in (cfg.options | own).items():
        args += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return options.parse(task.Config, None, args)


def _settings(task: str, cell: Cell) -> dict[str, Any]:
    """All that the result of a cell depends on but the data themselves: options, and what is in the files they name."""
    values = {key: value for key, value in options.to_dict(cell.config).items() if key not in FREE}
    files = {
        key: hashlib.sha256(Path(value).read_bytes()).hexdigest()
        for key, value in values.items()
        if isinstance(value, str) and Path(value).is_file()
    }
    return {"task": task, "options": values, "files": files}


def _folder(out: Path, settings: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return out / "cells" / key


def _read(out: Path, task: str, cell: Cell) -> dict[str, Any] | None:
    """The result of a finished cell, under the name it has now; None where it is not finished."""
    path = _folder(out, _settings(task, cell)) / "cell.json"
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text())
        metrics = {name: math.nan if value is None else float(value) for name, value in result["metrics"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is damaged; remove it to have the cell run again") from None
    return result | {"metrics": metrics, "initialisation": cell.initialisation}


def _run(out: Path, name: str, task: Any, cell: Cell) -> dict[str, Any]:
    """Run one cell and keep its result."""
    settings = _settings(name, cell)
    folder = _folder(out, settings)
    cell.config.dump_path = str(folder)
    began = time.monotonic()
    found = task.run(cell.config)
    result = {
        "initialisation": cell.initialisation,
        "weights": describe_weights(cell.config.weights),
        "labelled": cell.labelled,
        "seed": cell.seed,
        "cases": found["cases"],
        "seconds": round(time.monotonic() - began, 1),
        "metrics": _flat(found["metrics"]),
        "settings": settings,
    }
    write_json(result, folder / "cell.json")
    return result


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"mean": {"dice": 0.9}} -> {"mean.dice": 0.9}."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = math.nan if value is None else float(value)
    return flat


def _long(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    keys = ("initialisation", "weights", "labelled", "seed", "cases", "seconds")
    return {key: result[key] for key in keys} | {"metric": metric, "value": result["metrics"][metric]}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _count(labelled: int) -> str:
    return f"{labelled} labelled" if labelled else "all labelled"


if __name__ == "__main__":
    options.main(main, Config, __doc__)
