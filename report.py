"""One page about one or several runs that opens offline: curves, clusters, neighbours, maps, attention, results.

    python report.py runs/swav3D --output report.html
    python report.py runs/swav2D runs/mask_swav runs/swav3D --downstream "[runs/compare]"
    python report.py --data ssl_swav3D --policy paper     # the augmented views instead -> inspect.html

Folders of runs come first, then options. Works on the runs of all six training scripts, while they train as well.
After --data comes a training script or the folder of a run, and any option of that script (--data ssl_swav3D --help).
docs/REPORT.md says what every figure means.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pandas as pd
from jsonargparse.typing import NonNegativeInt, PositiveInt
from plotly.offline import get_plotlyjs

from datasets.index import describe, fingerprint
from reporting import embed, figures, page, views
from reporting.embed import Level, MapMethod, Network
from reporting.runs import STAGES, RunFolder, read_runs, read_tables
from utils import config
from utils.errors import UserError


@dataclass
class Config:
    runs: list[str]
    """folders of runs (their --dump_path), side by side on the page"""
    output: str = "report.html"
    """the page to write"""
    downstream: list[str] = field(default_factory=list)
    """results of downstream/ to show: files, or folders that hold results.json or summary.csv"""
    data_path: str | None = None
    """data to show; null: those that each run was trained on"""
    cache_path: str | None = None
    """folder of the working copies of the data; null: the run's own"""
    slices: PositiveInt = 400
    """slices and images of each run to embed, spread evenly over the data sets"""
    volumes: PositiveInt = 120
    """volumes of each run to embed, spread evenly over the data sets"""
    prototypes: PositiveInt = 12
    """prototypes to show at each level, those with most members first"""
    head: NonNegativeInt = 0
    """which head's prototypes, where a run has several"""
    pictures: PositiveInt = 6
    """nearest items of a prototype to show, and as many of its least typical members"""
    queries: NonNegativeInt = 5
    """volumes (stage 1: slices and images) to show with their nearest neighbours"""
    examples: NonNegativeInt = 2
    """volumes whose attention and masked prediction are shown"""
    map: MapMethod = "tsne"
    """how embeddings are laid on a plane"""
    seed: NonNegativeInt = 0
    """random seed of the choice of items and of the map"""
    workers: PositiveInt = 2
    """threads that prepare data which no run has prepared yet"""


def main(cfg: Config) -> None:
    output = page.check_output(cfg.output)
    runs = read_runs(cfg.runs)
    tables = read_tables(cfg.downstream)
    thumbs = page.Thumbnails()
    shown = []
    for run in runs:
        print(f"{run.name}: {STAGES[run.stage]}, {len(run.metrics)} epochs", flush=True)
        shown.append(about_run(run, cfg, thumbs))
        for note in run.notes:
            print(f"  note: {note}", flush=True)
    same_data: dict[str, list[str]] = {}  # table of the data -> the runs that have these
    for about in shown:
        same_data.setdefault(about["data"], []).append(about["name"])
    page.render(
        "report.html",
        output,
        title=", ".join(run.name for run in runs),
        made=datetime.now().astimezone(),
        runs=shown,
        options=compare_options(runs),
        data={", ".join(names): table for table, names in same_data.items() if table},
        curves=figures.curves(runs),
        tables=tables,
        stages=STAGES,
        thumbs=thumbs.uris,
        colours=figures.COLOURS,
        plotly=get_plotlyjs(),
        cfg=cfg,
    )


def about_run(run: RunFolder, cfg: Config, thumbs: page.Thumbnails) -> dict[str, Any]:
    """All that the page shows of one run. What cannot be shown is said in `run.notes`."""
    about = vars(run) | dict.fromkeys(("data", "datasets", "levels", "neighbours", "attention", "masked"), ())
    about["last"] = run.metrics.iloc[-1].to_dict() if len(run.metrics) else {}
    try:
        loader = embed.open_data(run, cfg.data_path, cfg.cache_path, cfg.workers)
    except UserError as error:
        run.notes.append(f"The data cannot be read, so there are no pictures: {error}")
        return about
    samples = loader.dataset.samples
    about["data"], about["datasets"] = describe(samples), list(dict.fromkeys(sample.dataset for sample in samples))
    if run.state is None:
        return about
    if not fingerprint(samples).startswith(run.state["data"]):
        run.notes.append(f"{samples[0].data_path} does not hold the data that the run was trained on.")
    network = Network(run, loader, cfg.seed)
    levels = [level for level in (network.slices(cfg.slices), network.volumes(cfg.volumes)) if level]
    about["levels"] = [about_level(level, run, cfg, thumbs, about["datasets"]) for level in levels]
    about["neighbours"] = about_neighbours(levels[-1], cfg, thumbs) if levels else []  # of volumes, where there are any
    seen, missed = network.attention(cfg.examples), network.masked_errors(cfg.examples)
    about["attention"] = [(item.sample, thumbs.strip(item), figures.attention_maps(item, maps)) for item, maps in seen]
    about["masked"] = [(item.sample, figures.masked_error(item, errors)) for item, errors in missed]
    return about


def about_level(level: Level, run: RunFolder, cfg: Config, thumbs: page.Thumbnails, names: list[str]) -> dict[str, Any]:
    about: dict[str, Any] = {"name": level.name, "count": len(level.items), "prototypes": [], "map": None}
    if level.prototypes:
        if cfg.head >= len(level.prototypes):
            raise UserError(f"head: {run.path} has {len(level.prototypes)} head(s) of prototypes; use less than that")
        found, about["of"], about["unused"] = embed.prototypes_of(level, cfg.head, cfg.prototypes, cfg.pictures)
        for index, members, nearest, farthest in found:
            rows = {"nearest of all": thumbs.row(level, nearest), "least typical members": thumbs.row(level, farthest)}
            parts = Counter(level.datasets[i] for i in members).most_common()
            about["prototypes"].append({"index": index, "members": len(members), "parts": parts, "rows": rows})
    if len(level.items) >= embed.FEWEST_TO_MAP:
        places, axes = embed.flatten(level.z, cfg.map, cfg.seed)
        about["map"] = figures.map_of(level, places, axes, [thumbs.add(item) for item in level.items], names)
    return about


def about_neighbours(level: Level, cfg: Config, thumbs: page.Thumbnails) -> list[list[dict[str, Any]]]:
    """A row of pictures for every query: the query, then its nearest neighbours."""
    queries = embed.choose(level.datasets, cfg.queries, cfg.seed)
    return [thumbs.row(level, [(query, None), *embed.neighbours(level, query, cfg.pictures)]) for query in queries]


def compare_options(runs: list[RunFolder]) -> list[tuple[str, list[str], bool]]:
    """(option, its value in every run or -, whether the runs that have it differ), in the order of the scripts."""
    values = [config.to_dict(run.config) for run in runs]
    texts = [{name: json.dumps(value, ensure_ascii=False).strip('"') for name, value in own.items()} for own in values]
    table = pd.DataFrame(texts).fillna("-")
    return [(name, values.tolist(), values[values != "-"].nunique() > 1) for name, values in table.items()]


def command(given: list[str]) -> None:
    """The report of runs or, with --data, the page of views."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data")
    found, rest = parser.parse_known_args(given)
    if found.data is None:
        first = next((i for i, value in enumerate(given) if value.startswith("-")), len(given))
        folders = [f"--runs={json.dumps(given[:first])}"] * bool(first)  # what stands before the first option
        config.main(main, Config, __doc__, folders + given[first:])
        return
    try:
        page_options, own = views.options_of(found.data)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    config.main(views.main, page_options, views.__doc__, own + rest)


if __name__ == "__main__":
    command(sys.argv[1:])
