"""Classification: frozen features and fine-tuning, labels and patients, features of slices."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_task import stopping

from datasets.store import prepare
from downstream import classify, task
from downstream.features import Cases, frozen_features, vote
from downstream.labels import name_patients, read_labels
from downstream.splits import choose_by_turns
from models.resnet import multi_scale, pooled
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ["no finding", "finding"]
FINE = {"mode": "finetune", "epochs": 2, "batch_size": 4, "base_lr": 1e-3, "precision": "fp32"}


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


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of ten volumes of 3 to 5 slices each: those of `Bright` have a bright middle."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for organ in ("Bright", "Dark"):
        (root / organ).mkdir()
        for i in range(10):
            volume = rng.normal(0, 1, (24, 30, 3 + i % 3))
            volume[6:18, 6:18] += 6 * (organ == "Bright")
            np.save(root / organ / f"{organ}_p{i // 2}_{i}.npy", volume.astype(np.float32))
    return root


def config(folder: Path, out: Path, **changes: Any) -> classify.Config:
    chosen = {"data_path": str(folder), "arch": "resnet18", "size": 32, "bootstrap": 20, "device": "cpu"}
    chosen |= {"fractions": [0.5, 0.25, 0.25], "dump_path": str(out / "run"), "cache_path": str(out / "cache")}
    if (folder / "labels.csv").exists():
        chosen |= {"labels": str(folder / "labels.csv"), "classes": CLASSES}
    return classify.Config(**(chosen | changes))


def run(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return classify.run(config(folder, out, **changes))


# --- runs ---


def test_bright_squares_are_told_apart_by_frozen_features(images, tmp_path):
    result = run(images, tmp_path)
    assert result["metrics"]["auc"] == result["metrics"]["balanced_accuracy"] == 1
    assert (result["cases"], result["patients"], result["reasons"]) == (6, 3, {})
    assert result["intervals"]["auc"] == (1, 1)
    rows = pd.read_csv(tmp_path / "run/cases.csv")
    assert rows.case.tolist() == json.loads((tmp_path / "run/split.json").read_text())["test"]
    assert (rows["p(finding)"] + rows["p(no finding)"]).tolist() == pytest.approx([1] * len(rows))


@pytest.mark.parametrize(("mode", "level"), [("knn", "slice"), ("linear", "volume")])
def test_data_sets_are_told_apart_at_every_label_fraction(tree, tmp_path, mode, level):
    result = run(tree, tmp_path, mode=mode, level=level, label_fractions=[0.2, 1.0])
    assert result["metrics"]["balanced_accuracy@0.2"] == result["metrics"]["balanced_accuracy@1"] == 1
    assert result["label_counts"] == {"@0.2": 2, "@1": 10}
    assert len(result["labelled"]) == 10
    rows = pd.read_csv(tmp_path / "run/cases.csv")
    slices = sum(np.load(tree / case).shape[2] for case in rows.case.unique())
    assert len(rows) == (slices if level == "slice" else result["cases"])
    assert {"p(Bright)@0.2", "p(Dark)@1"} <= set(rows)


def test_labels_that_are_few_show_every_class():
    labels = {f"c{i}": int(i < 3) for i in range(20)}
    eight = choose_by_turns(list(labels), labels, 8, seed=3)
    assert [labels[case] for case in eight] == [0, 1, 0, 1, 0, 1, 0, 0]
    assert choose_by_turns(list(labels), labels, 2, seed=3) == eight[:2]


@pytest.mark.slow
def test_fine_tuning_learns_the_squares_and_a_stopped_run_ends_as_one_that_was_not(images, tmp_path):
    cfg = config(images, tmp_path / "a", **FINE)
    with pytest.raises(SystemExit):
        task.run(stopping(classify.Classification, "batch", 4), cfg)
    first = classify.run(cfg)
    whole = run(images, tmp_path / "b", **FINE)
    assert first["metrics"]["auc"] > 0.8
    for name in ("best.pth", "cases.csv", "split.json"):
        assert (tmp_path / "a/run" / name).read_bytes() == (tmp_path / "b/run" / name).read_bytes()
    assert first["history"] == whole["history"]


@pytest.mark.parametrize(("level", "model"), [("slice", "intra"), ("volume", "joint")])
def test_volumes_and_their_slices_are_classified_by_either_model(tree, tmp_path, level, model, joint):
    more = {"weights": joint[1], "arch": None, "precision": "bf16", "epochs": 1, "steps_per_epoch": 1, "batch_size": 4}
    result = run(tree, tmp_path, mode="finetune", level=level, model=model, slices=4, **more)
    assert 0 <= result["metrics"]["accuracy"] <= 1
    number = ",slice" if level == "slice" else ""
    written = (tmp_path / "run/cases.csv").read_text()
    assert written.startswith(f"case,patient{number},label,p(Bright),p(Dark)\nBright/")


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_one_labelled_case_cannot_teach_and_says_so(images, tmp_path, mode):
    result = run(images, tmp_path, mode=mode, labelled=1)
    assert all(math.isnan(value) for value in result["metrics"].values())
    assert result["reasons"]["accuracy"] == "the labelled training cases are all of one class"


def test_a_test_split_of_one_class_gives_nan_with_a_reason(images, tmp_path):
    names = [f"x_{i:02d}" for i in range(24)]  # of patients p0 to p11, two each
    split = {"train": names[:12], "validation": [*names[12:18], "p10"], "test": ["p9", "p11"]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    result = run(images, tmp_path, split=str(tmp_path / "split.json"))
    assert math.isnan(result["metrics"]["auc"])
    assert math.isnan(result["metrics"]["balanced_accuracy"])
    assert result["reasons"]["auc"] == "the split holds only 'finding'"
    assert json.loads((tmp_path / "run/results.json").read_text())["metrics"]["auc"] is None


def test_patients_that_a_prepared_tree_or_a_pattern_knows_stay_together(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "tree")
    for organ in ("Bright", "Dark"):
        rows = [f"{file.name},p{int(file.stem[-1]) // 5}" for file in (tmp_path / "tree" / organ).glob("*.npy")]
        (tmp_path / "tree" / organ / "cases.csv").write_text("\n".join(["file,patient", *rows]))
    assert run(tmp_path / "tree", tmp_path, fractions=[0.5, 0.0, 0.5])["patients"] == 1  # of p0 and p1
    result = run(tmp_path / "tree", tmp_path / "named", patient_pattern=r"^(\w+?_p\d)_")
    split = json.loads((tmp_path / "named/run/split.json").read_text())
    parts = {name: {case.rsplit("_", 1)[0] for case in cases} for name, cases in split.items()}
    assert not parts["train"] & parts["test"]
    assert result["patients"] == len(parts["test"])


def test_some_cases_are_for_the_test_only_and_a_split_may_name_patients(images, tmp_path):
    head, *rows = (images / "labels.csv").read_text().splitlines()  # two images of each patient
    text = [f"{head},test_only", *(f"{row},{i % 2}" for i, row in enumerate(rows))]
    (tmp_path / "labels.csv").write_text("\n".join(text))
    people = [f"p{i}" for i in range(12)]
    (tmp_path / "split.json").write_text(json.dumps({"train": people[:8], "validation": [], "test": people[8:]}))
    result = run(images, tmp_path, labels=str(tmp_path / "labels.csv"), split=str(tmp_path / "split.json"))
    assert sorted(result["labelled"]) == [f"x_{i:02d}.png" for i in range(0, 16, 2)]
    assert (result["cases"], result["patients"]) == (8, 4)


# --- what is refused ---


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("file,finding\nx_00.png,a\nx_99.png,b\n", {}, "line 3: 'x_99.png' is none of the 24 cases"),
        ("file,finding\nx_00.png,a\nx_00,b\n", {}, "line 3: 'x_00' stands in line 2 already"),
        ("file,verdict\nx_00.png,a\n", {}, "has no column label or finding or class, but file, verdict"),
        ("file,finding\nx_00.png,a\nx_01.png,a\n", {}, "have the same label"),
        ("", {"classes": ["finding", "fracture"]}, r"no case has the label 'fracture'; there are finding, no"),
        ("", {"model": "joint", "level": "slice"}, "model: joint describes whole volumes"),
    ],
)
def test_wrong_labels_and_options_are_named_before_anything_is_computed(images, tmp_path, content, options, message):
    if content:
        (tmp_path / "labels.csv").write_text(content)
        options = {"labels": str(tmp_path / "labels.csv"), "classes": []}
    with pytest.raises(UserError, match=message):
        classify.check(config(images, tmp_path, **options))


def test_a_case_is_found_by_path_or_unique_name_with_or_without_suffix(tmp_path):
    names = ["a/one.npy", "a/two.nii.gz", "b/two.png"]
    path = tmp_path / "labels.csv"
    path.write_text("case,label\none,x\na/two.nii.gz,y\nb/two,z\n", encoding="utf-8-sig")
    table = read_labels(path, names)
    assert table.place.tolist() == [0, 1, 2]
    assert table.label.tolist() == ["x", "y", "z"]
    path.write_text("case,label\ntwo,x\n")
    with pytest.raises(UserError, match=r"'two' may be a/two\.nii\.gz or b/two\.png"):
        read_labels(path, names)


def test_patients_are_read_from_file_names():
    names = ["Brain/Brats18_2013_1_1_t1ce_frame_097.png", "Heart/la_030_frame_12.png"]
    found = name_patients(names, r"^(.*?)(?:_(?:t1|t2|t1ce|flair))?_frame_")
    assert found == ["Brats18_2013_1_1", "la_030"]
    with pytest.raises(UserError, match="finds no patient"):
        name_patients(names, r"(mr\d)")


# --- fits ---


def test_the_nearest_neighbours_vote_by_similarity():
    train = np.array([[1, 0], [1, 0.1], [-1, 0], [-1, 0.1], [-1, -0.1]])
    labels = np.array([0, 0, 1, 1, 1])
    train -= train.mean(axis=0)  # so that centring changes nothing
    test = np.array([[2.0, 0.1], [-3.0, 0.0]])
    assert vote(train, labels, test, classes=3, k=2).argmax(1).tolist() == [0, 1]
    everybody = vote(train, labels, test, classes=3, k=99)
    angle = train @ test[0] / np.linalg.norm(train, axis=1) / np.linalg.norm(test[0])
    weight = np.exp(angle / 0.07)
    assert everybody[0] == pytest.approx([weight[:2].sum() / weight.sum(), weight[2:].sum() / weight.sum(), 0])


# --- features ---


@pytest.mark.parametrize("features", ["pooled", "multi_scale"])
def test_features_do_not_depend_on_what_else_is_encoded_and_are_the_encoders(tree, tmp_path, features, joint):
    cases, encoder = Cases(tree, 32, cache_path=tmp_path), joint[0]
    together = frozen_features(encoder, cases, [0, 1, 2], features)
    alone = [frozen_features(encoder, cases, [i], features)[0] for i in range(3)]
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    batch, mask = cases.read_batch(range(3))
    with torch.no_grad():
        embedded = encoder.holistic(encoder.tokens(batch, mask)[1], mask)
        slices = (pooled if features == "pooled" else multi_scale)(encoder.resnet(batch[mask][:, None]))
    means = torch.stack([part.mean(0) for part in slices.split([3, 4, 5])])
    np.testing.assert_allclose(together, torch.cat([means, embedded], dim=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(frozen_features(encoder.resnet, cases, [0, 1, 2], features), means, rtol=1e-4, atol=1e-5)


def test_stored_values_are_those_of_training_from_a_tree_and_from_a_single_folder(tree, tmp_path):
    store = prepare(tree, 32, tmp_path, progress=False)
    cases = Cases(tree, 32, slices=0, cache_path=tmp_path)
    np.testing.assert_array_equal(cases.read(2), store.read(2, 0, 5))
    assert cases.extents[2].tolist() == [26, 32]  # 24 x 30
    single = Cases(tree / "Dark", 32, slices=3, cache_path=tmp_path, level="slice")
    assert single.names[:2] == ["Dark_p0_0.npy", "Dark_p0_1.npy"]
    assert single.owner[:7].tolist() == [0, 0, 0, 1, 1, 1, 2]
    np.testing.assert_array_equal(single.read(7)[0], store.read(12, 2, 3)[0])
