"""Scores of segmentations, classifications and candidates: worked by hand, and at the edges."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from downstream import froc
from downstream.froc import EXCLUDED, NO_NODULE, Candidates
from downstream.metrics import (
    auc,
    average_precision,
    bootstrap,
    classification_scores,
    dice,
    hd95_mm,
    iou,
    summarise,
)
from utils.errors import UserError

EMPTY = torch.zeros(6, 8, 8, dtype=torch.bool)
CUBE = EMPTY.clone()
CUBE[1:5, 2:6, 2:6] = True

# --- segmentation ---


def voxel(*place: int) -> torch.Tensor:
    mask = EMPTY.clone()
    mask[place] = True
    return mask


def test_overlap_worked_by_hand():
    prediction = voxel(0, 0, 0) | voxel(0, 0, 1)
    reference = voxel(0, 0, 1) | voxel(0, 0, 2) | voxel(0, 0, 3)
    assert (dice(prediction, reference), iou(prediction, reference)) == (2 / 5, 1 / 4)


def test_hd95_is_in_mm_and_the_95th_percentile_of_the_larger_direction():
    for place, distance in (((3, 3, 4), 2.5), ((2, 4, 4), 0.8), ((2, 3, 5), 0.5), ((3, 4, 5), math.sqrt(7.14))):
        assert hd95_mm(voxel(*place), voxel(2, 3, 4), (2.5, 0.8, 0.5)) == pytest.approx(distance)
    row = torch.zeros(3, 3, 21, dtype=torch.bool)
    row[1, 1] = True
    end = torch.zeros_like(row)
    end[1, 1, 0] = True  # distances 0, 1, ..., 20 one way and 0 the other
    assert hd95_mm(row, end, (1, 1, 1)) == hd95_mm(end, row, (1, 1, 1)) == pytest.approx(19)


def test_empty_in_both_is_nan_and_in_one_is_the_worst():
    for metric in (dice, iou, lambda p, r: hd95_mm(p, r, (1, 1, 1))):
        assert math.isnan(metric(EMPTY, EMPTY))
    for pair in ((EMPTY, CUBE), (CUBE, EMPTY)):
        assert dice(*pair) == iou(*pair) == 0
        assert hd95_mm(*pair, (1, 1, 1)) == math.inf


def test_means_are_over_cases_then_structures_and_leave_out_absent_ones():
    def case(a: float, b: float, distance: float = 2.0) -> dict:
        return {
            "a": {"dice": a, "iou": a / 2, "hd95_mm": distance},
            "b": {"dice": b, "iou": b / 2, "hd95_mm": 4.0 if b == b else b},
        }

    summary = summarise([case(0.8, math.nan), case(0.4, 0.9), case(0.0, math.nan, math.inf)])
    assert summary["a"] == {
        "dice": pytest.approx(0.4), "iou": pytest.approx(0.2), "hd95_mm": 2.0, "present": 3, "absent": 0, "missed": 1,
    }  # fmt: skip
    assert (summary["b"]["dice"], summary["b"]["present"], summary["b"]["absent"]) == (0.9, 1, 2)
    assert summary["mean"]["dice"] == pytest.approx(0.65)  # of 0.4 and 0.9, though b was there once


# --- classification ---


def test_scores_of_four_cases_by_hand():
    truth = np.array([0, 0, 1, 1])
    p = np.array([0.1, 0.6, 0.4, 0.9])
    values = classification_scores(truth, np.stack([1 - p, p], 1), ["no", "yes"])[0]
    assert values["auc"] == pytest.approx(3 / 4)  # of four pairs one is in the wrong order
    assert values["average_precision"] == pytest.approx((1 + 2 / 3) / 2)  # found at ranks 1 and 3
    assert values["accuracy"] == values["balanced_accuracy"] == 0.5
    values, reasons = classification_scores(np.array([0, 0, 1]), np.eye(3)[[0, 0, 1]], ["a", "b", "c"])
    assert (values["auc"], reasons["auc"]) == (1, "without c")  # which is left out of the mean


def test_areas_and_precisions_are_those_of_scikit_learn_with_ties():
    rng = np.random.default_rng(0)
    for count in range(4, 60):
        hits, score = np.arange(count) < rng.integers(1, count), rng.integers(0, 6, count) / 6
        assert auc(hits, score) == pytest.approx(roc_auc_score(hits, score))
        assert average_precision(hits, score) == pytest.approx(average_precision_score(hits, score))


def test_the_interval_of_an_accuracy_is_about_the_binomial_one():
    right = np.arange(100) < 80

    def accuracy(counts: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.average(right, weights=counts)), "never": math.nan}

    intervals = bootstrap(accuracy, 100, 1000, seed=0)
    assert intervals["accuracy"] == pytest.approx((0.72, 0.88), abs=0.02)
    assert math.isnan(intervals["never"][0])
    assert bootstrap(accuracy, 100, 0, seed=0) == {}


# --- FROC ---


def curve(score: Any, scan: Any, hit: Any, nodule_scan: Any, scans: int, **more: Any) -> list[float]:
    arrays = (np.array(score, dtype=float), *(np.array(x, dtype=int) for x in (scan, hit, nodule_scan)))
    return froc.froc(Candidates(*arrays, scans), **more).tolist()


def test_froc_by_hand():
    """Two scans, three nodules: 0 found at 0.9 and 0.3, 1 found at 0.5, 2 without a candidate; false positives at
    0.8, 0.6, 0.4 and 0.2. Excluded ones do not count."""
    score, scan = [0.9, 0.3, 0.5, 0.8, 0.6, 0.4, 0.2, 0.99], [0, 0, 1, 0, 0, 1, 1, 1]
    hit = [0, 0, 1, NO_NODULE, NO_NODULE, NO_NODULE, NO_NODULE, EXCLUDED]
    found = curve(score, scan, hit, [0, 1, 1], 2, rates=(0.125, 0.5, 1, 1.5, 8))
    # false positives allowed: 0, 1, 2, 3, 16; thresholds just above 0.8, 0.6, 0.4, 0.2, none
    assert found == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])


def test_froc_edges():
    for nothing in (([0.5], [0], [NO_NODULE], [], 1), ([math.nan], [0], [0], [0], 1)):  # no nodules; no scores
        assert np.isnan(curve(*nothing)).all()
    assert curve([], [], [], [0], 1) == [0] * 7  # no candidates
    # A nodule and a false positive with equal scores: at fewer than one per scan neither may be accepted.
    assert curve([0.5, 0.5], [0, 0], [0, NO_NODULE], [0], 1, rates=(0.5, 1)) == [0, 1]


def test_froc_of_a_scan_drawn_twice_is_that_of_two_equal_scans():
    score = np.random.default_rng(1).random(30)
    hit = np.full(30, NO_NODULE)
    hit[[0, 1, 10, 20]] = [0, 0, 1, 2]
    weighted = curve(score, np.repeat([0, 1, 2], 10), hit, [0, 1, 2], 3, counts=np.array([2, 1, 0]))
    keep = np.r_[0:10, 0:10, 10:20]
    copied_hit = np.where(hit[keep] < 0, hit[keep], np.where(np.arange(30) // 10 == 1, 2, hit[keep]))
    assert weighted == pytest.approx(curve(score[keep], np.repeat([0, 2, 1], 10), copied_hit, [0, 1, 2], 3))


def test_froc_of_tables_is_written_and_those_that_do_not_fit_are_named(tmp_path):
    tables = {
        "cases": "case,p(none),p(nodule)\na/2.npy,0.1,0.9\nb/1.npy,0.8,0.2\n",
        "labels": "case,series,nodule\na/2,a,3\nb/1,b,\nc,c,5\n",
        "nodules": "series,nodule\na,3\na,4\nc,5\n",
    }
    cfg = froc.Config(run=str(tmp_path), **{name: str(tmp_path / f"{name}.csv") for name in ("labels", "nodules")})
    for table, old, new, message in (
        ("cases", "p(", "q(", "run: .* has no column p"),
        ("labels", "a/2", "a/7", "labels: .* has no case 'a/2'"),
        ("nodules", "a,3", "a,7", "nodules: .* has no nodule 3"),
    ):
        for name, text in tables.items():
            (tmp_path / f"{name}.csv").write_text(text.replace(old, new) if name == table else text)
        with pytest.raises(UserError, match=message):
            froc.run(cfg)
    (tmp_path / "nodules.csv").write_text(tables["nodules"])
    result = froc.run(cfg)
    assert (result["candidates"], result["nodules"], result["scans"], result["metrics"]["cpm"]) == (2, 2, 2, 0.5)
    assert json.loads((tmp_path / "froc.json").read_text())["metrics"] == result["metrics"]
    first, line, *_ = (tmp_path / "froc.csv").read_text().splitlines()
    assert (first, line[:10]) == ("false_positives_per_scan,sensitivity,low,high", "0.125,0.5,")
