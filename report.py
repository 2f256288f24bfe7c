"""One page about one or several runs that opens offline: curves, clusters, neighbours, maps, attention, results.

    python report.py runs/swav3D --output report.html
    python report.py runs/swav2D runs/mask_swav runs/swav3D --downstream "[runs/compare]"

Folders of runs come first, then options. Works on the runs of all six training scripts, while they train as well;
docs/REPORT.md says what every figure means.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeInt, PositiveInt

from datasets.cache import shown_size
from reporting import clusters, embed, figures, page, results
from reporting.clusters import MapMethod
from reporting.runs import STAGES, Run, method_of, read_runs
from utils import config as options
from utils.errors import UserError

STRIP_OF_VOLUME = 8  # slices shown above a volume's attention


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
    """of the choice of items and of the map"""
    workers: PositiveInt = 2
    """threads that prepare data which no run has prepared yet"""


def main(cfg: Config) -> None:
    output = Path(cfg.output).expanduser()
    if not output.parent.is_dir():
        raise UserError(f"output: {output.parent} is not a folder; create it, or name another file")
    runs = read_runs(cfg.runs)
    tables = results.read_tables(cfg.downstream)
    thumbs = page.Thumbnails()
    shown = []
    for run in runs:
        print(f"{run.name}: {STAGES[run.stage]}, {len(run.metrics.get('epoch', []))} epochs", flush=True)
        shown.append(about_run(run, cfg, thumbs))
        for note in run.notes:
            print(f"  note: {note}", flush=True)
    size = page.render(
        "report.html",
        output,
        title=", ".join(run.name for run in runs),
        made=datetime.now().astimezone(),
        runs=shown,
        options=compare_options(runs),
        data=compare_data(shown),
        curves=figures.curves(runs),
        tables=tables,
        thumbs=thumbs.uris,
        colours=figures.COLOURS,
        plotly=plotly_js(),
        cfg=options.to_dict(cfg),
    )
    print(f"wrote {output} ({shown_size(size)})", flush=True)


def about_run(run: Run, cfg: Config, thumbs: page.Thumbnails) -> dict[str, Any]:
    """All that the page shows of one run. What cannot be shown is said in `run.notes`."""
    about: dict[str, Any] = {
        "name": run.name,
        "folder": str(run.folder),
        "stage": run.stage,
        "stage_name": STAGES[run.stage],
        "method": method_of(run.config),
        "epochs": (len(run.metrics.get("epoch", [])), run.config.get("epochs")),
        "last": {name: column[-1] for name, column in run.metrics.items()},
        "notes": run.notes,
        "warnings": run.warnings,
        "record": run.record,
        "data": [],
        "levels": [],
        "neighbours": [],
        "attention": [],
        "masked": [],
    }
    try:
        samples, store, same = embed.open_data(run, cfg.data_path, cfg.cache_path, cfg.workers)
    except UserError as error:
        run.notes.append(f"The data cannot be read, so there are no pictures: {error}")
        return about
    about["data"] = embed.data_of(samples)
    if not same:
        run.notes.append(f"{samples[0].data_path} does not hold the data that the run was trained on.")
    if run.state is None:
        return about
    network = embed.build(run)
    levels = [
        level
        for level in (
            embed.embed_slices(run, network, samples, store, cfg.slices, cfg.seed),
            embed.embed_volumes(run, network, samples, store, cfg.volumes, cfg.seed),
        )
        if level
    ]
    names = list(dict.fromkeys(sample.dataset for sample in samples))
    about["levels"] = [about_level(run, level, cfg, thumbs, store, names) for level in levels]
    if levels and cfg.queries:
        level = levels[-1]  # volumes, where there are any
        queries = embed.choose([level.dataset(i) for i in range(len(level.items))], cfg.queries, cfg.seed)
        about["neighbours"] = [
            {
                "level": level.name,
                "query": page.picture(thumbs, store, level, q, None),
                "found": [page.picture(thumbs, store, level, i, cosine) for i, cosine in found],
            }
            for q, found in clusters.neighbours(level, queries, cfg.pictures)
        ]
    if cfg.examples:
        about["attention"] = [
            {
                "name": seen.sample.name,
                "dataset": seen.sample.dataset,
                "strip": thumbs.strip(store, seen.item, STRIP_OF_VOLUME),
                "figures": figures.attention_maps(seen),
            }
            for seen in embed.attention(run, network, samples, store, cfg.examples, cfg.seed)
        ]
        about["masked"] = [
            {"dataset": error.sample.dataset, "figure": figures.masked_error(error)}
            for error in embed.masked_errors(run, network, samples, store, cfg.examples, cfg.seed)
        ]
    return about


def about_level(
    run: Run, level: embed.Level, cfg: Config, thumbs: page.Thumbnails, store: Any, names: list[str]
) -> dict[str, Any]:
    about: dict[str, Any] = {"name": level.name, "count": len(level.items), "prototypes": [], "map": None}
    if level.prototypes:
        if cfg.head >= len(level.prototypes):
            raise UserError(f"head: {run.folder} has {len(level.prototypes)} head(s) of prototypes; use less than that")
        found, about["of"], about["unused"] = clusters.prototypes_of(level, cfg.head, cfg.prototypes, cfg.pictures)
        about["prototypes"] = [
            {
                "index": prototype.index,
                "members": len(prototype.members),
                "parts": parts_of(level, prototype.members, names),
                "nearest": [page.picture(thumbs, store, level, *shown) for shown in prototype.nearest],
                "farthest": [page.picture(thumbs, store, level, *shown) for shown in prototype.farthest],
            }
            for prototype in found
        ]
    if len(level.items) >= clusters.FEWEST_TO_MAP:
        places, axes = clusters.flatten(level.z, cfg.map, cfg.seed)
        pictures = [thumbs.add(store, item) for item in level.items]
        about["map"] = figures.map_of(level, places, axes, pictures, names)
    return about


def parts_of(level: embed.Level, members: list[int], names: list[str]) -> list[tuple[str, int, int]]:
    """(data set, its place among all, members from it) of a cluster, most first."""
    counts = [(name, k, sum(level.dataset(i) == name for i in members)) for k, name in enumerate(names)]
    return sorted((part for part in counts if part[2]), key=lambda part: -part[2])


def compare_options(runs: list[Run]) -> list[tuple[str, list[str], bool]]:
    """(option, its value in every run or -, whether the runs that have it differ), in the order of the scripts."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = []
    for name in names:
        values = [json.dumps(run.config[name], ensure_ascii=False) if name in run.config else "-" for run in runs]
        rows.append((name, [value.strip('"') for value in values], len(set(values) - {"-"}) > 1))
    return rows


def compare_data(shown: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(names of the runs that have these data, a row per data set and kind), without the runs whose data are gone."""
    found: list[tuple[list[str], list[dict[str, Any]]]] = []
    for run in shown:
        names = next((names for names, rows in found if rows == run["data"]), None)
        if names is not None:
            names.append(run["name"])
        elif run["data"]:
            found.append(([run["name"]], run["data"]))
    return [(", ".join(names), rows) for names, rows in found]


def plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def arguments(given: list[str]) -> list[str]:
    """Folders before the first option are the option `runs`."""
    first = next((i for i, value in enumerate(given) if value.startswith("-")), len(given))
    return [f"--runs={json.dumps(given[:first])}"] * bool(first) + given[first:]


if __name__ == "__main__":
    options.main(main, Config, __doc__, arguments(sys.argv[1:]))
