"""From finished jobs to records, tables and a figure: what pre-training was worth, with intervals, and what it cost.

    python -m experiments.summarise --experiments "[experiments/main.yaml, experiments/controls.yaml]"

Adds the comparisons and recipes that are finished in dump_path to cells.csv and recipes.csv in `records`, works out
summary.csv from them, and renews what stands in `page` between `<!-- KIND NAME ... -->` and `<!-- end -->`. NAME is a
comparison; KIND is means or differences, a table of one or more comparisons, or figure, a panel for each of them. The
text around is a person's. Comparisons whose folders are gone stay as recorded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from downstream import compare
from experiments.run import Comparison, Plan, read_plan
from utils import config as options
from utils.errors import UserError
from utils.files import write_together

BLOCK = re.compile(r"(<!-- (means|differences|figure) ([\w ]+) -->\n).*?<!-- end -->", re.DOTALL)
LAST = ("loss", "intra_std", "intra_rank", "inter_std", "inter_rank", "interpolation", "mask_skill")  # of metrics.csv


@dataclass
class Config:
    experiments: list[str] = field(default_factory=lambda: ["experiments/main.yaml"])
    """YAML files that were given to experiments.run"""
    dump_path: str = "runs/experiments"
    """folder that experiments.run has written"""
    records: str = "docs/results"
    """folder of cells.csv, recipes.csv, summary.csv and comparisons.png"""
    page: str = "docs/RESULTS.md"
    """page whose tables and figure are renewed"""


def main(cfg: Config) -> None:
    plan, records, page = read_plan(cfg.experiments, Path(cfg.dump_path)), Path(cfg.records), Path(cfg.page)
    cells = update(records / "cells.csv", finished_cells(plan), "comparison")
    recipes = update(records / "recipes.csv", finished_recipes(plan), "recipe")
    known = {name: about for name, about in plan.comparisons.items() if (cells.comparison == name).any()}
    if not known:
        raise UserError(f"dump_path: {cfg.dump_path} holds no finished comparison; run experiments.run first")
    summary = pd.concat(summarise(name, about, cells, plan) for name, about in known.items())
    tables = {"cells": cells, "recipes": recipes, "summary": summary}
    contents = {records / f"{name}.csv": compare.csv_of(table).encode() for name, table in tables.items() if len(table)}

    def renewed(block: re.Match[str]) -> str:
        kind, names = block[2], block[3].split()
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"page: {unknown[0]} is no comparison of these files that is finished")
        if kind == "figure":
            panels = {name: (cells[cells.comparison == name], known[name].metrics[0]) for name in names}
            contents[picture := records / "comparisons.png"] = compare.plot(panels)
            content = f"![Scores over the number of labelled cases]({os.path.relpath(picture, page.parent)})\n"
        else:
            content = table(kind, names, known, summary)
        return f"{block[1]}{content}<!-- end -->"

    contents[page] = BLOCK.sub(renewed, page.read_text(encoding="utf-8")).encode()
    write_together(contents)
    print(f"wrote {page}, and cells.csv, recipes.csv and summary.csv in {records}")


def finished_cells(plan: Plan) -> pd.DataFrame:
    """A row per cell and metric of the comparisons that are begun, which must be finished."""
    tables = []
    for name, comparison in plan.comparisons.items():
        done = [cell for cell in comparison.cells if cell.record]
        if done and len(done) < len(comparison.cells):
            raise UserError(f"{name}: {len(done)} of {len(comparison.cells)} cells are finished; run it on")
        if done:
            rows = compare.results(done).drop(columns="weights")
            tables.append(rows[rows.metric.isin(comparison.metrics)].assign(comparison=name))
    return pd.concat(tables) if tables else pd.DataFrame()


def finished_recipes(plan: Plan) -> pd.DataFrame:
    """A row per pre-training that is finished, with the last line of its metrics.csv."""
    found = []
    for record in (run.record for runs in plan.recipes.values() for run in runs if run.record):
        about = {name: record[name] for name in ("recipe", "seed", "script", "seconds", "commit", "torch")}
        found.append(about | {name: record["last"].get(name) for name in LAST})
    return pd.DataFrame(found)


def update(path: Path, new: pd.DataFrame, key: str) -> pd.DataFrame:
    """The records in a file, with all rows of what is new in place of older ones of the same name."""
    old = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=[key])
    if new.empty:
        return old
    return pd.concat([old[~old[key].isin(new[key])], new]) if len(old) else new


def summarise(name: str, comparison: Comparison, cells: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """`compare.summarise` against the first initialisation, and of the pairs that the files want compared."""
    own = cells[cells.comparison == name]
    first = comparison.cells[0].initialisation
    parts = []
    for baseline in dict.fromkeys([first, *(worse for _, worse in plan.differences)]):
        if baseline in set(own.initialisation):
            wanted = [better for better, worse in plan.differences if worse == baseline]
            rows = compare.summarise(own, baseline).assign(comparison=name, baseline=baseline)
            parts.append(rows if baseline == first else rows[rows.initialisation.isin(wanted)])
    return pd.concat(parts)


def table(kind: str, names: list[str], known: dict[str, Comparison], summary: pd.DataFrame) -> str:
    """The comparisons' main metrics in Markdown: means ± sd, or differences with their 95 % intervals."""
    frames = {}
    for name in names:
        rows = summary[(summary.comparison == name) & (summary.metric == known[name].metrics[0])]
        if kind == "means":
            rows = rows.drop_duplicates(["labelled", "initialisation"])
        else:
            rows = rows[rows.initialisation != rows.baseline]
            rows = rows.assign(initialisation=rows.initialisation + " - " + rows.baseline)
        frames[name] = compare.as_text(rows, kind)
    frame = pd.concat(frames, axis=1).fillna("-")
    several = len(names) > 1
    head = [f"{name}, {count}" if several else count for name, count in frame.columns]
    corner = "" if several else known[names[0]].metrics[0]
    lines = [(corner, *head), ("---",) * (1 + len(head)), *frame.itertuples()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    options.main(main, Config, __doc__)
