"""Classification: labels, splits, metrics, FROC by hand, features, LUNA16 scans with world coordinates."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from downstream import classify
from downstream.classify import fit_logistic_regression
from downstream.encoders import load_encoder, load_joint_encoder
from downstream.features import (
    encode_slices,
    encode_volumes,
    mean_of_cases,
    open_cases,
    pad,
    read_nifti,
)
from downstream.labels import name_patients, read_labels
from downstream.luna16 import EXCLUDED, NO_NODULE, cut_cube, froc, hit_nodules, read_scan
from downstream.scores import bootstrap, classification_scores
from downstream.splits import choose_by_turns, without_suffix
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ["no finding", "finding"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 12 patients in one folder, and labels.csv: those with a bright square have a finding."""
    folder = tmp_path_factory.mktemp("xrays")
    rng = np.random.default_rng(0)
    rows = ["file,finding,patient"]
    for i in range(24):
        pixels = rng.integers(0, 60, (32, 32))
        if i // 2 % 2:
            pixels[8:24, 8:24] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"x_{i:02d}.png")
        rows.append(f"x_{i:02d}.png,{CLASSES[i // 2 % 2]},p{i // 2}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def run(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    chosen = {
        "data_path": str(folder),
        "labels": str(folder / "labels.csv"),
        "arch": "resnet18",
        "classes": CLASSES,
        "size": 32,
        "fractions": [0.5, 0.25, 0.25],
        "bootstrap": 20,
        "device": "cpu",
        "dump_path": str(out / "run"),
        "cache_path": str(out / "cache"),
    }
    return classify.run(classify.Config(**(chosen | changes)))


# ------------------------------------------------------------------------------------------------ runs


def test_bright_squares_are_told_apart_by_frozen_features(images, tmp_path):
    result = run(images, tmp_path)
    assert result["metrics"]["auc"] == 1
    assert result["metrics"]["balanced_accuracy"] == 1
    assert result["cases"] == 6
    assert result["patients"] == 3
    assert not result["reasons"]
    assert result["intervals"]["auc"] == (1, 1)
    written = json.loads((tmp_path / "run/results.json").read_text())
    assert written["metrics"] == result["metrics"]
    with open(tmp_path / "run/cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert [row["case"] for row in rows] == split["test"]
    assert all(float(row["p(finding)"]) + float(row["p(no finding)"]) == pytest.approx(1) for row in rows)


def test_fine_tuning_learns_the_squares_and_depends_on_the_seed_only(images, tmp_path):
    fine = {"mode": "finetune", "epochs": 4, "batch_size": 6, "base_lr": 1e-3}
    first = run(images, tmp_path / "a", **fine)
    again = run(images, tmp_path / "b", **fine)
    assert first["metrics"] == again["metrics"]
    assert (tmp_path / "a/run/cases.csv").read_text() == (tmp_path / "b/run/cases.csv").read_text()
    assert first["metrics"]["auc"] > 0.8


def test_weights_or_steps_that_give_nan_are_one_clear_error(images, tmp_path):
    state = load_encoder("random", "resnet18").torchvision_state()
    torch.save(state | {"layer4.1.bn2.bias": torch.full((512,), math.nan)}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth: layer4\.1\.bn2\.bias hold NaN or Inf"):
        run(images, tmp_path, weights=str(tmp_path / "nan.pth"))
    with pytest.raises(UserError, match="lower --base_lr"):
        run(images, tmp_path, mode="finetune", epochs=1, batch_size=6, base_lr=1e20)


def test_features_of_noise_score_about_one_half():
    rng = np.random.default_rng(0)
    aucs = []
    for _ in range(8):
        x, y = rng.standard_normal((120, 4)), np.tile([0, 1], 60)
        probability, _ = fit_logistic_regression((x[:20], y[:20]), (x[20:40], y[20:40]), x[40:], 2)
        aucs.append(classification_scores(y[40:], probability, CLASSES).values["auc"])
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.08)


def test_a_test_split_of_one_class_gives_nan_with_a_reason(images, tmp_path):
    of = {row.case: row for row in read_labels(images / "labels.csv", [f"x_{i:02d}.png" for i in range(24)])}
    test = [f"x_{i:02d}.png" for i in range(24) if of[i].label == "finding" and of[i].patient in ("p9", "p11")]
    rest = [f"x_{i:02d}.png" for i in range(24) if of[i].patient not in ("p9", "p11")]
    split = {"train": rest[:12], "validation": rest[12:], "test": test}
    (tmp_path / "split.json").write_text(json.dumps(split))
    result = run(images, tmp_path, split=str(tmp_path / "split.json"))
    assert math.isnan(result["metrics"]["auc"])
    assert math.isnan(result["metrics"]["balanced_accuracy"])
    assert result["reasons"]["auc"] == "the split holds only 'finding'"
    assert json.loads((tmp_path / "run/results.json").read_text())["metrics"]["auc"] is None


def test_one_labelled_case_cannot_teach_and_says_so(images, tmp_path):
    result = run(images, tmp_path, labelled=1)
    assert all(math.isnan(value) for value in result["metrics"].values())
    assert result["reasons"]["accuracy"].startswith("the labelled training cases are all")


def test_joint_model_classifies_volumes_with_few_slices(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["case,label"]
    (tmp_path / "data/set").mkdir(parents=True)
    for i in range(10):
        volume = rng.normal(0, 1, (24, 24, 3 + i % 3))
        volume[6:18, 6:18] += 6 * (i % 2)
        np.save(tmp_path / "data/set" / f"v{i}.npy", volume.astype(np.float32))
        rows.append(f"set/v{i},{CLASSES[i % 2]}")
    (tmp_path / "data/labels.csv").write_text("\n".join(rows))
    for mode in ("linear", "finetune"):
        more = {"mode": mode, "epochs": 1, "model": "joint", "task": "volumes", "slices": 4}
        result = run(tmp_path / "data", tmp_path / mode, **more)
        assert 0 <= result["metrics"]["accuracy"] <= 1


# ------------------------------------------------------------------------------------------------ labels and splits


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,finding\nx_00.png,a\nx_99.png,b\n", "line 3: 'x_99.png' is none of the 24 cases"),
        ("file,finding\nx_00.png,a\nx_00,b\n", "stands in lines 2 and 3"),
        ("file,finding\nx_00.png,\n", "line 2: 'x_00.png' has no finding"),
        ("file,verdict\nx_00.png,a\n", "has no column label or finding or class, but file, verdict"),
        ("file,finding\nx_00.png\n", "line 2: has not the header's 2 fields"),
        ("file,finding\n", "has no lines below its header"),
        ("file,finding\nx_00.png,a\nx_01.png,a\n", "have the same label"),
    ],
)
def test_errors_in_the_labels_name_the_line_and_the_remedy(images, tmp_path, content, message):
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run(images, tmp_path, labels=str(tmp_path / "labels.csv"), classes=[])


def test_errors_before_training_name_the_option(images, tmp_path):
    with pytest.raises(UserError, match=r"labels: .*nowhere.csv: cannot be read"):
        run(images, tmp_path, labels="nowhere.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a CSV text file"):
        run(images, tmp_path, labels=str(tmp_path / "binary.csv"))
    with pytest.raises(UserError, match=r"no case in .* has the label 'fracture'"):
        run(images, tmp_path, classes=["finding", "fracture"])
    with pytest.raises(UserError, match="labelled: 90 cases were asked for"):
        run(images, tmp_path, labelled=90)
    with pytest.raises(UserError, match="is not a folder"):
        run(tmp_path / "nowhere", tmp_path, labels=str(images / "labels.csv"))
    names = [f"x_{i:02d}.png" for i in range(24)]
    split = {"train": names[:11], "validation": [], "test": names[11:]}  # patient p5 has x_10 and x_11
    (tmp_path / "split.json").write_text(json.dumps(split))
    with pytest.raises(UserError, match=r"patient p5 is in two parts: x_10\.png in train, x_11\.png in test"):
        run(images, tmp_path, split=str(tmp_path / "split.json"))


def test_a_case_is_found_by_path_or_unique_name_with_or_without_suffix(tmp_path):
    names = ["a/one.npy", "a/two.nii.gz", "b/two.png"]
    path = tmp_path / "labels.csv"
    path.write_text("case,label\none,x\na/two.nii.gz,y\nb/two,z\n", encoding="utf-8-sig")
    assert [(row.case, row.label) for row in read_labels(path, names)] == [(0, "x"), (1, "y"), (2, "z")]
    path.write_text("case,label\ntwo,x\n")
    with pytest.raises(UserError, match=r"'two' may be a/two\.nii\.gz and b/two\.png"):
        read_labels(path, names)
    assert without_suffix("a/b.nii.gz") == "a/b"
    assert without_suffix("volume-1.5") == "volume-1.5"


def test_patients_are_read_from_file_names():
    pattern = r"^(.*?)(?:_(?:t1|t2|t1ce|flair))?_frame_"
    names = ["Brain/Brats18_2013_1_1_t1ce_frame_097.png", "Heart/la_030_frame_12.png"]
    assert name_patients(names, pattern) == ["Brats18_2013_1_1", "la_030"]
    assert name_patients(names, None) == names
    for wrong, message in ((r"^la", "has no group"), (r"(", "regular expression"), (r"(mr\d)", "finds no patient")):
        with pytest.raises(UserError, match=message):
            name_patients(names, wrong)


def test_few_labelled_cases_show_every_class_and_are_nested():
    labels = {f"c{i}": int(i < 3) for i in range(20)}
    four, eight = (choose_by_turns(list(labels), labels, n, seed=3) for n in (4, 8))
    assert [labels[case] for case in four] == [0, 1, 0, 1]
    assert eight[:4] == four
    assert sum(labels[case] for case in eight) == 3
    assert sorted(choose_by_turns(list(labels), labels, 0, seed=3)) == sorted(labels)


# ------------------------------------------------------------------------------------------------ metrics


def test_scores_of_four_cases_by_hand():
    truth = np.array([0, 0, 1, 1])
    p = np.array([0.1, 0.6, 0.4, 0.9])
    values = classification_scores(truth, np.stack([1 - p, p], 1), CLASSES).values
    assert values["auc"] == pytest.approx(3 / 4)  # of four pairs one is in the wrong order
    assert values["average_precision"] == pytest.approx((1 + 2 / 3) / 2)  # found at ranks 1 and 3
    assert values["accuracy"] == 0.5
    assert values["balanced_accuracy"] == 0.5


def test_a_class_that_the_split_has_not_is_left_out_and_named():
    truth = np.array([0, 0, 1])
    scores = classification_scores(truth, np.eye(3)[[0, 0, 1]], ["a", "b", "c"])
    assert scores.values["auc"] == 1
    assert scores.reasons["auc"] == "without c"


def test_the_interval_of_an_accuracy_is_about_the_binomial_one():
    right = np.arange(100) < 80

    def accuracy(counts: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(np.average(right, weights=counts)), "never": math.nan}

    intervals = bootstrap(accuracy, 100, 1000, seed=0)
    assert intervals["accuracy"] == pytest.approx((0.72, 0.88), abs=0.02)
    assert math.isnan(intervals["never"][0])
    assert bootstrap(accuracy, 100, 0, seed=0) == {}


def test_a_class_without_labelled_cases_gets_probability_zero():
    x = np.array([[0.0], [1.0], [0.1], [0.9]])
    y = np.array([0, 2, 0, 2])
    probability, _ = fit_logistic_regression((x, y), (x, y), x, classes=3)
    assert (probability[:, 1] == 0).all()
    assert probability.sum(1) == pytest.approx(1)


def test_froc_by_hand():
    """Two scans, three nodules: 0 found at 0.9 and 0.3, 1 found at 0.5, 2 without a candidate; false positives at
    0.8, 0.6, 0.4 and 0.2. Excluded ones do not count."""
    score = np.array([0.9, 0.3, 0.5, 0.8, 0.6, 0.4, 0.2, 0.99])
    scan = np.array([0, 0, 1, 0, 0, 1, 1, 1])
    hit = np.array([0, 0, 1, NO_NODULE, NO_NODULE, NO_NODULE, NO_NODULE, EXCLUDED])
    nodule_scan = np.array([0, 1, 1])
    found = froc(score, scan, hit, nodule_scan, scans=2, rates=(0.125, 0.5, 1, 1.5, 8))
    # false positives allowed: 0, 1, 2, 3, 16; thresholds just above 0.8, 0.6, 0.4, 0.2, none
    assert found == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])


def test_froc_edges():
    none = np.array([], dtype=int)
    one, first = np.array([0.5]), np.array([0])
    assert np.isnan(froc(one, first, np.array([NO_NODULE]), none, scans=1)).all()  # no nodules
    assert froc(np.array([]), none, none, first, scans=1).tolist() == [0] * 7  # no candidates
    assert froc(one, first, first, first, scans=1).tolist() == [1] * 7  # perfect
    # A nodule and a false positive with equal scores: at fewer than one per scan neither may be accepted.
    tied = froc(np.array([0.5, 0.5]), np.array([0, 0]), np.array([0, NO_NODULE]), first, scans=1, rates=(0.5, 1))
    assert tied.tolist() == [0, 1]


def test_froc_of_a_scan_drawn_twice_is_that_of_two_equal_scans():
    rng = np.random.default_rng(1)
    score, scan = rng.random(30), np.repeat([0, 1, 2], 10)
    hit = np.full(30, NO_NODULE)
    hit[[0, 1, 10, 20]] = [0, 0, 1, 2]
    nodule_scan = np.array([0, 1, 2])
    weighted = froc(score, scan, hit, nodule_scan, 3, counts=np.array([2, 1, 0]))
    keep = np.r_[0:10, 0:10, 10:20]
    copied_scan = np.repeat([0, 2, 1], 10)
    copied_hit = np.where(hit[keep] < 0, hit[keep], np.where(np.arange(30) // 10 == 1, 2, hit[keep]))
    copied = froc(score[keep], copied_scan, copied_hit, np.array([0, 1, 2]), 3)
    assert weighted == pytest.approx(copied)


def test_a_candidate_hits_the_nearest_nodule_that_it_lies_in():
    nodules = [("s", (0.0, 0.0, 0.0), 5.0), ("s", (4.0, 0.0, 0.0), 5.0), ("t", (0.0, 0.0, 0.0), 5.0)]
    places = [("s", (1.0, 0.0, 0.0)), ("s", (3.0, 0.0, 0.0)), ("s", (0.0, 5.0, 0.0)), ("u", (0.0, 0.0, 0.0))]
    assert hit_nodules(places, nodules).tolist() == [0, 1, NO_NODULE, NO_NODULE]


# ------------------------------------------------------------------------------------------------ LUNA16


@pytest.fixture(scope="module")
def luna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight scans of 40 x 48 x 48 voxels, 2 x 1 x 1 mm, off origin; a bright ball in each, and candidates.csv with two
    candidates in the ball and five beside it; annotations.csv."""
    import SimpleITK

    folder = tmp_path_factory.mktemp("luna")
    rng = np.random.default_rng(0)
    candidates, annotations = ["seriesuid,coordX,coordY,coordZ,class"], ["seriesuid,coordX,coordY,coordZ,diameter_mm"]
    z, y, x = np.mgrid[:40, :48, :48]
    for s in range(8):
        centre = rng.integers((12, 14, 14), (28, 34, 34))  # slice, row, column
        ball = 4 * (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < 36
        image = SimpleITK.GetImageFromArray(np.where(ball, 100, -800).astype(np.int16))
        image.SetSpacing((1, 1, 2))
        image.SetOrigin((-100.5, 20, -300))
        (folder / f"subset{s % 2}").mkdir(exist_ok=True)
        SimpleITK.WriteImage(image, str(folder / f"subset{s % 2}" / f"1.2.{s}.mhd"))
        world = np.array((-100.5, 20, -300)) + centre[::-1] * (1, 1, 2)
        annotations.append(f"1.2.{s},{world[0]},{world[1]},{world[2]},12")
        for shift in (0, 3):
            candidates.append(f"1.2.{s},{world[0] + shift},{world[1]},{world[2]},1")
        for corner in ((4, 4, 8), (44, 4, 8), (4, 44, 8), (44, 44, 70), (4, 4, 70)):
            far = np.array((-100.5, 20, -300)) + corner
            candidates.append(f"1.2.{s},{far[0]},{far[1]},{far[2]},0")
    (folder / "candidates.csv").write_text("\n".join(candidates) + "\n")
    (folder / "annotations.csv").write_text("\n".join(annotations) + "\n")
    return folder


def run_luna(luna: Path, out: Path, **changes: Any) -> dict[str, Any]:
    chosen = {"task": "luna16", "labels": str(luna / "candidates.csv"), "classes": [], "crop_mm": 16.0}
    chosen |= {"crop_size": 32, "crop_slices": 4, "negatives": 3}
    return run(luna, out, **(chosen | changes))


def test_luna16_from_files_to_froc(luna, tmp_path):
    result = run_luna(luna, tmp_path, annotations=str(luna / "annotations.csv"))
    assert result["cases"] == 2 * 7
    assert result["patients"] == 2
    assert result["metrics"]["auc"] == 1
    assert result["metrics"]["cpm"] == 1
    assert result["metrics"]["sensitivity@0.125"] == 1
    # Without annotations the two class-1 candidates, 3 mm apart, are still one nodule.
    grouped = run_luna(luna, tmp_path)
    assert grouped["metrics"]["cpm"] == 1


def test_a_nodule_without_candidates_is_missed_and_an_excluded_finding_is_no_false_positive(luna, tmp_path):
    lines = (luna / "annotations.csv").read_text().splitlines()
    more = [line.rsplit(",", 1)[0] for line in lines[1:]]
    far = [",".join([uid, "-90", "30", "-200", "8"]) for uid, *_ in (line.split(",") for line in more)]
    (tmp_path / "annotations.csv").write_text("\n".join([*lines, *far]) + "\n")
    result = run_luna(luna, tmp_path, annotations=str(tmp_path / "annotations.csv"))
    assert result["metrics"]["cpm"] == 0.5


def test_froc_of_a_network_that_could_not_learn_is_nan_with_the_reason(luna, tmp_path):
    lines = (luna / "candidates.csv").read_text().splitlines()
    one = [line for line in lines if line[-2:] == ",0" or line.startswith(("series", "1.2.0"))]
    (tmp_path / "candidates.csv").write_text("\n".join(one) + "\n")
    split = {"train": ["1.2.1", "1.2.2"], "validation": [], "test": ["1.2.0", "1.2.3"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    more = {"labels": str(tmp_path / "candidates.csv"), "split": str(tmp_path / "split.json")}
    result = run_luna(luna, tmp_path, **more)
    assert math.isnan(result["metrics"]["cpm"])
    assert result["reasons"]["cpm"] == "the labelled training cases are all 'no nodule'"


def test_world_coordinates_become_voxels_whatever_origin_spacing_and_direction(tmp_path):
    import SimpleITK

    volume = np.zeros((6, 10, 12), np.int16)
    volume[2, 7, 3] = 500
    image = SimpleITK.GetImageFromArray(volume)
    image.SetSpacing((0.5, 0.75, 2.5))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(tmp_path / "a.mhd"))
    world = (10.0 - 3 * 0.5, -20.0 - 7 * 0.75, 30.0 + 2 * 2.5)
    read, voxels, spacing = read_scan(tmp_path / "a.mhd", [world])
    assert voxels[0] == pytest.approx([2, 7, 3])
    assert spacing == pytest.approx([2.5, 0.75, 0.5])
    crop = cut_cube(read, voxels[0], (1, 1, 1), 3, (3, 3, 3))  # as if voxels were 1 mm: whole voxels
    assert crop[1, 1, 1] == 500
    assert crop.sum() == 500


def test_a_crop_at_the_border_shows_air_outside():
    crop = cut_cube(np.zeros((4, 4, 4), np.int16), (0, 0, 0), (1, 1, 1), 4, (4, 4, 4))
    assert crop[0, 0, 0] == -1000
    assert crop[3, 3, 3] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("9.9.9,0,0,0,1", "names 1 scans that have no .mhd .* e.g. 9.9.9"),
        ("1.2.0,0,zero,0,1", "line 58: could not convert string to float: 'zero'"),
        ("1.2.0,0,0,0,2", "line 58: class must be 0 or 1, not 2"),
        ("1.2.0,20,20,20,1", "1.2.0/58: lies outside .* must be world millimetres"),
    ],
)
def test_errors_in_candidates_name_line_scan_and_remedy(luna, tmp_path, line, message):
    (tmp_path / "candidates.csv").write_text((luna / "candidates.csv").read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        run_luna(luna, tmp_path, labels=str(tmp_path / "candidates.csv"), fractions=[0.9, 0.0, 0.1])


def test_candidates_of_missing_scans_can_be_left_out(luna, tmp_path, capsys):
    (tmp_path / "candidates.csv").write_text((luna / "candidates.csv").read_text() + "9.9.9,0,0,0,1\n")
    run_luna(luna, tmp_path, labels=str(tmp_path / "candidates.csv"), on_bad="skip")
    assert "left out the candidates of 1 scans" in capsys.readouterr().out
    twice = (luna / "candidates.csv").read_text() + "1.2.0,20,20,20,1\n1.2.0,20.0,20,20,1\n"
    (tmp_path / "candidates.csv").write_text(twice)
    with pytest.raises(UserError, match="lines 58 and 59 are the same candidate; keep one"):
        run_luna(luna, tmp_path, labels=str(tmp_path / "candidates.csv"))


# ------------------------------------------------------------------------------------------------ features


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    (folder / "CT").mkdir()
    rng = np.random.default_rng(0)
    for i, slices in enumerate((3, 7, 5)):
        np.save(folder / "CT" / f"c{i}.npy", rng.normal(0, 400, (24, 30, slices)).astype(np.float32))
    return folder


def test_features_do_not_depend_on_what_else_is_in_the_batch(volumes):
    cases = open_cases(volumes, 32)
    joint = load_joint_encoder("random", "resnet18", d_model=32, layers=1)
    together = encode_slices(joint.encoder, cases, [0, 1, 2])
    assert together.case.tolist() == [0] * 3 + [1] * 7 + [2] * 5
    both = encode_volumes(joint, together), mean_of_cases(together.pooled, together.case)
    for i in range(3):
        alone = encode_slices(joint.encoder, cases, [i])
        torch.testing.assert_close(encode_volumes(joint, alone)[0], both[0][i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.pooled.mean(0), both[1][i], rtol=1e-4, atol=1e-5)


def test_volume_embedding_is_that_of_the_joint_encoder(volumes):
    cases = open_cases(volumes, 32)
    joint = load_joint_encoder("random", "resnet18", d_model=32, layers=1).eval()
    batch, mask = pad([torch.from_numpy(cases.read(i)) for i in range(3)])
    with torch.no_grad():
        expected = joint.holistic(joint.tokens(batch, mask)[1], mask)
    torch.testing.assert_close(encode_volumes(joint, encode_slices(joint.encoder, cases, range(3))), expected)


def test_stored_values_are_those_of_training(volumes):
    from datasets.store import prepare

    cases = open_cases(volumes, 32, slices=0)
    _, store = prepare(volumes, 32, progress=False)
    np.testing.assert_array_equal(cases.read(1), store.read(1, 0, 7))
    few = open_cases(volumes, 32, slices=3)
    np.testing.assert_array_equal(few.read(1), store.read(1, 0, 7)[[1, 3, 5]])
    assert few.extent(1) == (26, 32)  # 24 x 30


def test_nifti_is_read_as_the_same_anatomy_as_npy(tmp_path):
    import nibabel

    rng = np.random.default_rng(0)
    axial = rng.normal(size=(12, 10, 9)).astype(np.float32)  # rows front to back, columns right to left, slices up
    ras = axial.transpose(1, 0, 2)[::-1, ::-1]  # x to the right, y to the front
    (tmp_path / "nifti").mkdir()
    (tmp_path / "npy").mkdir()
    flipped = nibabel.Nifti1Image(ras[::-1], np.diag([-1, 1, 2, 1]))  # stored right to left
    nibabel.save(flipped, tmp_path / "nifti" / "a.nii.gz")
    np.save(tmp_path / "npy" / "a.npy", axial)
    np.testing.assert_allclose(read_nifti(tmp_path / "nifti" / "a.nii.gz"), axial)
    a, b = (open_cases(tmp_path / kind, 16) for kind in ("nifti", "npy"))
    np.testing.assert_array_equal(a.read(0), b.read(0))
    assert a.names == b.names == ["a.npy"]


def test_nifti_follows_its_folder_and_its_window(tmp_path):
    import nibabel

    hu = np.linspace(-1200, 600, 12 * 10 * 9).reshape(12, 10, 9).astype(np.float32)
    (tmp_path / "CT").mkdir()
    for name in ("a", "b"):
        nibabel.save(nibabel.Nifti1Image(hu, np.eye(4)), tmp_path / "CT" / f"{name}.nii.gz")
    (tmp_path / "CT" / "dataset.yaml").write_text("window: [-1000, 400]\n")
    cases = open_cases(tmp_path, 16)
    assert cases.names == ["CT/a.npy", "CT/b.npy"]
    assert (cases.read(0) == 0).any()
    assert cases.store.samples[0].window == (-1000, 400)
    (tmp_path / "CT" / "b.nii.gz").unlink()
    (tmp_path / "CT" / "dataset.yaml").write_text("window: [0, 100]\n")
    again = open_cases(tmp_path, 16)
    assert again.names == ["CT/a.npy"]
    assert again.store.samples[0].window == (0, 100)


def test_broken_nifti_is_one_clear_error(shared):
    with pytest.raises(UserError, match=r"truncated\.nii\.gz: "):
        read_nifti(shared / "bad_input" / "truncated.nii.gz")
    with pytest.raises(UserError, match="mixes NIfTI"):
        open_cases(shared / "bad_input", 32)


def test_the_encoder_is_left_as_it_was(volumes):
    encoder = load_encoder("random", "resnet18").train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encode_slices(encoder, open_cases(volumes, 32), [0])
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_chest_x_rays_end_to_end(shared, tmp_path):
    result = run(
        shared / "chest_xray",
        tmp_path,
        labels=str(shared / "chest_xray/labels.csv"),
        classes=["No finding", "COVID-19"],
        bootstrap=5,
    )
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert sum(map(len, split.values())) == 45
    assert result["cases"] == len(split["test"])
    assert 0 <= result["metrics"]["auc"] <= 1
