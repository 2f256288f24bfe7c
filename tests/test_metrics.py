"""Overlap and surface distance: worked by hand, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from downstream.metrics import dice, format_table, hd95_mm, iou, score, summarise

EMPTY = torch.zeros(6, 8, 8, dtype=torch.bool)
CUBE = EMPTY.clone()
CUBE[1:5, 2:6, 2:6] = True


def voxel(*place: int) -> torch.Tensor:
    mask = EMPTY.clone()
    mask[place] = True
    return mask


def test_overlap_worked_by_hand():
    prediction = voxel(0, 0, 0) | voxel(0, 0, 1)
    reference = voxel(0, 0, 1) | voxel(0, 0, 2) | voxel(0, 0, 3)
    assert dice(prediction, reference) == 2 / 5
    assert iou(prediction, reference) == 1 / 4
    assert dice(CUBE, CUBE) == iou(CUBE, CUBE) == 1


@pytest.mark.parametrize(
    ("moved", "distance"), [((1, 0, 0), 2.5), ((0, 1, 0), 0.8), ((0, 0, 1), 0.5), ((1, 1, 1), math.sqrt(7.14))]
)
def test_hd95_of_a_voxel_one_off_is_the_spacing_there(moved, distance):
    there = voxel(2, 3, 4)
    found = voxel(*(a + b for a, b in zip((2, 3, 4), moved, strict=True)))
    assert hd95_mm(found, there, (2.5, 0.8, 0.5)) == pytest.approx(distance)


def test_hd95_of_a_cube_moved_one_slice_of_3_mm_is_3_mm():
    # Of its 56 surface voxels the 16 of one face are 3 mm away: more than 5 %.
    assert hd95_mm(CUBE.roll(1, dims=0), CUBE, (3.0, 1.0, 1.0)) == pytest.approx(3.0)
    assert hd95_mm(CUBE, CUBE, (3.0, 1.0, 1.0)) == 0


def test_hd95_is_the_95th_percentile_and_the_larger_direction():
    row = torch.zeros(3, 3, 21, dtype=torch.bool)
    row[1, 1] = True
    end = torch.zeros_like(row)
    end[1, 1, 0] = True  # distances 0, 1, ..., 20 one way and 0 the other
    assert hd95_mm(row, end, (1, 1, 1)) == pytest.approx(19)
    assert hd95_mm(end, row, (1, 1, 1)) == pytest.approx(19)


def test_empty_in_both_is_nan_and_in_one_is_the_worst():
    for metric in (dice, iou, lambda p, r: hd95_mm(p, r, (1, 1, 1))):
        assert math.isnan(metric(EMPTY, EMPTY))
    for pair in ((EMPTY, CUBE), (CUBE, EMPTY)):
        assert dice(*pair) == iou(*pair) == 0
        assert hd95_mm(*pair, (1, 1, 1)) == math.inf


def test_background_only_scores_zero_on_every_structure_that_is_there():
    reference = CUBE.long() + 2 * CUBE.roll(4, dims=2).long() % 3
    structures = {"first": [1], "second": [2], "third, in no case": [3]}
    summary = summarise([score(torch.zeros_like(reference), reference, structures, (1, 1, 1))] * 2)
    for name in ("first", "second", "mean"):
        assert summary[name]["dice"] == summary[name]["iou"] == 0
        assert math.isnan(summary[name]["hd95_mm"])
    assert summary["first"]["missed"] == summary["first"]["present"] == 2
    assert math.isnan(summary["third, in no case"]["dice"])
    assert summary["third, in no case"]["absent"] == 2


def test_a_structure_found_where_there_is_none_scores_zero():
    summary = summarise([score(CUBE.long(), torch.zeros_like(CUBE.long()), {"tumour": [1]}, (1, 1, 1))])
    assert summary["tumour"]["dice"] == 0
    assert summary["tumour"]["missed"] == 1


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
    assert summary["b"]["dice"] == 0.9
    assert (summary["b"]["present"], summary["b"]["absent"]) == (1, 2)
    assert summary["mean"]["dice"] == pytest.approx(0.65)  # of 0.4 and 0.9, though b was there once
    assert "0.400" in format_table(summary).splitlines()[1]


def test_structures_that_overlap_are_scored_as_unions_of_classes():
    reference = torch.zeros(4, 8, 8, dtype=torch.long)
    reference[:, 2:6, 2:6] = 1
    reference[:, 3:5, 3:5] = 3
    prediction = reference.clone()
    prediction[prediction == 3] = 1  # the whole is found, its core is not
    scores = score(prediction, reference, {"whole": [1, 2, 3], "core": [3]}, (1, 1, 1))
    assert scores["whole"]["dice"] == 1
    assert scores["core"]["dice"] == 0
