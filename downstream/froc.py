"""FROC of a classification of nodule candidates: sensitivity over false positives per scan, as LUNA16 asks.

    python -m downstream.froc --run runs/classify --labels LUNA16_crops/labels.csv --nodules LUNA16_crops/nodules.csv

run: what `downstream.classify` wrote (its cases.csv has the test candidates and their scores). The tables are those of
`python -m conversion.luna16`. The scans are those of the test candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jsonargparse.typing import NonNegativeInt

from downstream.metrics import bootstrap, format_metrics
from downstream.splits import without_suffix
from utils import config, options
from utils.errors import UserError
from utils.files import read_csv, write_csv, write_json

RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # false positives per scan
NO_NODULE, EXCLUDED = -1, -2


@dataclass
class Config(options.Group):
    run: str = options.data(MISSING, "dump_path of the classification; receives froc.json and froc.csv")
    labels: str = options.data(
        MISSING, "labels.csv of the candidates (case, series, nodule: its number, excluded, or none)"
    )
    nodules: str = options.data(MISSING, "nodules.csv (series, nodule): every nodule, those without a candidate too")
    bootstrap: NonNegativeInt = options.running(1000, "resamplings of the test scans for the 95 % intervals; 0: none")
    seed: NonNegativeInt = options.running(0, "random seed of the resamplings")


class Candidates(NamedTuple):
    """Test candidates [n] and nodules [m] of `scans` scans, which are numbered from 0."""

    score: np.ndarray  # [n]
    scan: np.ndarray  # [n]
    hit: np.ndarray  # [n] position of the nodule that the candidate lies in, NO_NODULE or EXCLUDED
    nodule_scan: np.ndarray  # [m]
    scans: int


def run(cfg: Config) -> dict[str, Any]:
    """Metrics `cpm` and `sensitivity@rate`, their intervals over scans, reasons of those that are nan; and counts."""
    candidates = read_candidates(Path(cfg.run) / "cases.csv", cfg.labels, cfg.nodules)
    names = ["cpm", *(f"sensitivity@{rate:g}" for rate in RATES)]

    def values(counts: np.ndarray | None = None) -> dict[str, float]:
        curve = froc(candidates, counts)
        return dict(zip(names, [float(curve.mean()), *curve.tolist()], strict=True))

    found, intervals = values(), bootstrap(values, candidates.scans, cfg.bootstrap, cfg.seed)
    learnt = not np.isnan(candidates.score).any()
    why = "no nodule in the test scans" if learnt else "the classification could not learn: its cases.csv has no scores"
    result = {
        "metrics": found,
        "intervals": intervals,
        "reasons": {name: why for name, value in found.items() if np.isnan(value)},
        "candidates": len(candidates.score),
        "nodules": len(candidates.nodule_scan),
        "scans": candidates.scans,
    }
    write_json(result, Path(cfg.run) / "froc.json")
    rows = []
    for rate, name in zip(RATES, names[1:], strict=True):
        low, high = intervals.get(name, (np.nan, np.nan))
        rows.append({"false_positives_per_scan": rate, "sensitivity": found[name], "low": low, "high": high})
    write_csv(rows, Path(cfg.run) / "froc.csv")
    print(f"{result['candidates']} candidates and {result['nodules']} nodules of {result['scans']} test scans")
    print(format_metrics(found, result))
    print(f"wrote {cfg.run}/froc.json, froc.csv")
    return result


def froc(candidates: Candidates, counts: np.ndarray | None = None, rates: Sequence[float] = RATES) -> np.ndarray:
    """Sensitivity at `rates` false positives per scan; the mean over RATES is LUNA16's CPM.

    counts: [scans] how often each scan counts (bootstrap); None: once.
    A candidate in no nodule is a false positive, an excluded one is neither. A nodule counts once, with the best of its
    candidates; one without candidates is missed. At each rate the lowest threshold is taken at which the false
    positives per scan do not exceed it, so nothing is interpolated (LUNA16's own script is linear between operating
    points, which differs where few false positives are allowed).
    Returns [rates], nan where there are no nodules, or no scores.
    """
    score, scan, hit, nodule_scan, scans = candidates
    counts = np.ones(scans) if counts is None else counts
    nodules = counts[nodule_scan]
    if nodules.sum() == 0 or np.isnan(score).any():
        return np.full(len(rates), np.nan)
    best, found = np.full(len(nodule_scan), -np.inf), hit >= 0
    np.maximum.at(best, hit[found], score[found])
    false = np.flatnonzero(hit == NO_NODULE)
    false = false[np.argsort(-score[false], kind="stable")]
    per_scan = np.cumsum(counts[scan[false]]) / counts.sum()
    first_too_many = np.searchsorted(per_scan, np.array(rates) + 1e-9, side="right")
    thresholds = np.append(score[false], -np.inf)[first_too_many]
    return np.array([nodules[best > threshold].sum() / nodules.sum() for threshold in thresholds])


def read_candidates(cases: Path, labels: str | Path, nodules: str | Path) -> Candidates:
    """The test candidates in a classification's cases.csv with what the tables of LUNA16 say about them.

    Their score is the probability of the last class, `nodule`. Raises UserError for a column, a case or a nodule that
    is not there.
    """
    tested = pd.DataFrame(read_csv(cases, "run", ("case",)))
    known = pd.DataFrame(read_csv(labels, "labels", ("case", "series", "nodule"))).set_index("case")
    annotated = pd.DataFrame(read_csv(nodules, "nodules", ("series", "nodule")))
    scores = [name for name in tested if name.startswith("p(")]
    if not scores:
        raise UserError(f"run: {cases} has no column p(...); give the dump_path of downstream.classify")
    names = tested.case.map(without_suffix)
    if lacking := [name for name in names if name not in known.index]:
        raise UserError(f"labels: {labels} has no case {lacking[0]!r}, which {cases} has; give the labels of that run")
    found = known.loc[names]
    scan, series = pd.factorize(found.series)
    own = annotated[annotated.series.isin(series)]
    place = {nodule: k for k, nodule in enumerate(own.nodule)} | {"": NO_NODULE, "excluded": EXCLUDED}
    if unknown := [nodule for nodule in found.nodule if nodule not in place]:
        raise UserError(f"nodules: {nodules} has no nodule {unknown[0]}, which {labels} names; give those of one run")
    return Candidates(
        score=tested[scores[-1]].astype(float).to_numpy(),
        scan=scan,
        hit=found.nodule.map(place).to_numpy(),
        nodule_scan=series.get_indexer(own.series),
        scans=len(series),
    )


if __name__ == "__main__":
    config.main(run, Config, __doc__)
