"""LUNA16 as crops: scans with world coordinates, which candidates hit which nodules, what is written for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK
import yaml

from conversion.luna16 import XYZ, Config, cut_cube, find_nodules, main
from conversion.readers import read
from conversion.volume import Options, Volume
from datasets.index import scan
from utils.errors import UserError

ORIGIN = np.array((-100.5, 20, -300))


@pytest.fixture(scope="module")
def luna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans of 40 x 48 x 48 voxels, 2 x 1 x 1 mm, off origin; a bright ball in each, and candidates.csv with two
    candidates in the ball and five beside it; annotations.csv has the ball and a nodule without a candidate."""
    folder = tmp_path_factory.mktemp("luna")
    rng = np.random.default_rng(0)
    candidates, annotations = ["seriesuid,coordX,coordY,coordZ,class"], ["seriesuid,coordX,coordY,coordZ,diameter_mm"]
    z, y, x = np.mgrid[:40, :48, :48]
    for s in range(3):
        centre = rng.integers((12, 14, 14), (28, 34, 34))  # slice, row, column
        ball = 4 * (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 36
        image = SimpleITK.GetImageFromArray(np.where(ball, 100, -800).astype(np.int16))
        image.SetSpacing((1, 1, 2))
        image.SetOrigin(ORIGIN.tolist())
        (folder / f"subset{s}").mkdir()
        SimpleITK.WriteImage(image, str(folder / f"subset{s}/1.2.{s}.mhd"))
        world = ORIGIN + centre[::-1] * (1, 1, 2)
        places = [(world[0] + shift, world[1], world[2], 1) for shift in (0, 3)]
        places += [(*(ORIGIN + corner), 0) for corner in ((4, 4, 8), (44, 4, 8), (4, 44, 8), (44, 44, 70), (4, 4, 70))]
        candidates += [",".join(map(str, (f"1.2.{s}", *place))) for place in places]
        annotations += [",".join(map(str, (f"1.2.{s}", *world, 12))), f"1.2.{s},-90,30,-200,8"]
    (folder / "candidates.csv").write_text("\n".join(candidates) + "\n")
    (folder / "annotations.csv").write_text("\n".join(annotations) + "\n")
    return folder


def prepare(luna: Path, out: Path, **changes: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """labels.csv and nodules.csv."""
    chosen = {
        "candidates": str(luna / "candidates.csv"),
        "annotations": str(luna / "annotations.csv"),
        "crop_mm": 16.0,
        "crop_size": 32,
        "crop_slices": 4,
    }
    main(Config(source=str(luna), dest=str(out), **(chosen | {"negatives": 3, "workers": 1} | changes)))
    return tuple(pd.read_csv(out / f"{name}.csv", dtype=str, na_filter=False) for name in ("labels", "nodules"))


def test_crops_are_a_prepared_tree_with_what_froc_needs(luna, tmp_path):
    (tmp_path / "excluded.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.0,-96.5,24,-292,-1\n")
    labels, nodules = prepare(luna, tmp_path / "tree/crops", excluded=str(tmp_path / "excluded.csv"))
    assert ",".join(labels.nodule) == "0,0,excluded,,,,,2,2,,,,,,4,4,,,,,"
    assert nodules.to_numpy().tolist() == [[f"1.2.{k // 2}", str(k)] for k in range(6)]
    assert labels.iloc[0].tolist() == ["1.2.0/2", "nodule", "1.2.0", "1.2.0", "0", "0"]
    late = labels[labels.test_only == "1"]
    assert (set(late.label), late.series.value_counts().tolist()) == ({"no nodule"}, [2, 2, 2])
    samples, _ = scan(tmp_path / "tree")
    assert sorted(s.name for s in samples) == sorted(f"crops/{case}.npy" for case in labels.case)
    assert {(s.height, s.width, s.slices, s.dtype, s.window) for s in samples} == {(32, 32, 4, "int16", (-1000, 400))}
    ball = np.load(tmp_path / "tree/crops/1.2.1/9.npy")
    assert (ball[16, 16, 2], ball[0, 0, 0]) == (100, -800)
    assert yaml.safe_load((tmp_path / "tree/crops/dataset.yaml").read_text())["spacing_mm"] == [0.5, 0.5, 4.0]


def test_the_same_again_cuts_nothing_and_other_options_are_refused(luna, tmp_path):
    prepare(luna, tmp_path / "out")
    before = (tmp_path / "out/1.2.0/2.npy").stat().st_mtime_ns
    again, _ = prepare(luna, tmp_path / "out", negatives=0, window=[-900.0, 0.0])
    assert (tmp_path / "out/1.2.0/2.npy").stat().st_mtime_ns == before
    assert set(again.test_only) == {"0"}
    with pytest.raises(UserError, match=r"^dest: .* crops of other options"):
        prepare(luna, tmp_path / "out", crop_mm=20.0)


def test_a_candidate_hits_the_nearest_nodule_that_it_lies_in():
    places = pd.DataFrame([("s", 0, 0, 0), ("s", 4, 0, 0), ("t", 0, 0, 0)], columns=["seriesuid", *XYZ])
    points = pd.DataFrame([("s", 1, 0, 0), ("s", 3, 0, 0), ("s", 0, 5, 0), ("u", 0, 0, 0)], columns=places.columns)
    np.testing.assert_array_equal(find_nodules(points, places.assign(diameter_mm=10)), [0, 1, np.nan, np.nan])


def test_world_coordinates_become_voxels_whatever_origin_spacing_and_direction(tmp_path):
    array = np.zeros((6, 10, 12), np.int16)
    array[2, 7, 3] = 500
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / "a.mhd"))
    volume = read("itk", (tmp_path / "a.mhd",), Options())
    place = (10.0 - 3 * 0.5, -20.0 - 7 * 0.75, 30.0 + 2 * 2.5)
    crop = cut_cube(volume, place, 7.5, (3, 10, 15))  # whole voxels
    assert crop[1].max() == crop[1, 4:6, 7].max() == 250  # its centre between two rows
    assert cut_cube(volume, (place[0] - 10, *place[1:]), 7.5, (3, 3, 3)) is None
    border = cut_cube(Volume(np.zeros((4, 4, 4), np.int16), np.diag([-1, -1, 1, 1])), (0, 0, 0), 4, (4, 4, 4))
    assert (border[0, 0, 0], border[3, 3, 3]) == (-1000, 0)  # air outside


def test_wrong_candidates_are_told_by_their_line_and_those_without_a_scan_may_be_left_out(luna, tmp_path, capsys):
    file = tmp_path / "candidates.csv"
    for line, message in (
        ("1.2.0,20,20,20,1", "line 23 lies outside .* must be world mm"),
        ("9.9.9,0,0,0,1", r"line 23 \(9.9.9\) .*: this scan has no .mhd"),
    ):
        file.write_text((luna / "candidates.csv").read_text() + line + "\n")
        with pytest.raises(UserError, match=message):
            prepare(luna, tmp_path / line, candidates=str(file))
    prepare(luna, tmp_path / "out", candidates=str(file), on_bad="skip")
    assert "left out: 1 candidates" in capsys.readouterr().out
