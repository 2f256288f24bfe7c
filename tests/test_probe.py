"""Probes on frozen features: votes by hand, label fractions, slices and volumes, real slices by organ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from downstream import probe
from downstream.probe import vote
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two organs of ten volumes each: those of `Bright` have a bright middle."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for organ in ("Bright", "Dark"):
        (root / organ).mkdir()
        for i in range(10):
            volume = rng.normal(0, 1, (24, 24, 3 + i % 2))
            volume[6:18, 6:18] += 6 * (organ == "Bright")
            np.save(root / organ / f"{organ}_p{i // 2}_{i}.npy", volume.astype(np.float32))
    return root


def run(tree: Path, out: Path, **changes: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"data_path": str(tree), "arch": "resnet18", "size": 32, "bootstrap": 10, "device": "cpu"}
    chosen |= {"dump_path": str(out / "run"), "cache_path": str(out / "cache")}
    return probe.run(probe.Config(**(chosen | changes)))


def test_the_nearest_neighbours_vote_by_similarity():
    train = np.array([[1, 0], [1, 0.1], [-1, 0], [-1, 0.1], [-1, -0.1]])
    labels = np.array([0, 0, 1, 1, 1])
    train -= train.mean(axis=0)  # so that centring changes nothing
    test = np.array([[2.0, 0.1], [-3.0, 0.0]])
    probability = vote(train, labels, test, classes=3, k=2)
    assert probability.argmax(1).tolist() == [0, 1]
    assert probability.sum(1) == pytest.approx(1)
    assert (probability[:, 2] == 0).all()
    everybody = vote(train, labels, test, classes=3, k=99)
    assert everybody.argmax(1).tolist() == [0, 1]  # far ones have almost no weight


def test_a_vote_of_one_is_the_label_of_the_nearest():
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(30, 8)), rng.normal(size=(7, 8)), rng.integers(0, 4, 30)
    centred = [x - train.mean(0) for x in (train, test)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in centred]
    nearest = (unit[1] @ unit[0].T).argmax(1)
    assert vote(train, labels, test, 4, k=1).argmax(1).tolist() == labels[nearest].tolist()


@pytest.mark.parametrize("level", ["slice", "volume"])
def test_organs_are_told_apart_at_every_label_fraction(tree, tmp_path, level):
    result = run(tree, tmp_path, level=level, label_fractions=[0.2, 1.0])
    assert set(result["metrics"]) == {"knn@0.2", "linear@0.2", "knn@1", "linear@1"}
    split = json.loads((tmp_path / "run/split.json").read_text())
    assert result["labelled"]["knn@1"] == len(split["train"])
    assert result["labelled"]["knn@0.2"] == round(0.2 * len(split["train"]))
    assert all(values["balanced_accuracy"] == 1 for values in result["metrics"].values())
    assert json.loads((tmp_path / "run/results.json").read_text())["metrics"] == result["metrics"]


def test_without_fractions_there_is_one_probe_of_each_kind(tree, tmp_path):
    result = run(tree, tmp_path, labelled=4)
    assert result["labelled"] == {"knn": 4, "linear": 4}


def test_joint_model_probes_volumes(tree, tmp_path):
    result = run(tree, tmp_path, model="joint", labelled=6)
    assert 0.5 <= result["metrics"]["linear"]["accuracy"] <= 1
    with pytest.raises(UserError, match="model: joint describes whole volumes"):
        run(tree, tmp_path, model="joint", level="slice")


def test_labels_by_chance_are_guessed_by_chance():
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(50):
        x, y = rng.normal(size=(60, 16)).astype(np.float32), rng.integers(0, 4, 60)
        hits.append((vote(x[:40], y[:40], x[40:], 4, k=5).argmax(1) == y[40:]).mean())
    assert np.mean(hits) == pytest.approx(0.25, abs=0.05)


def test_patients_of_the_pattern_stay_together(tree, tmp_path):
    result = run(tree, tmp_path, patient_pattern=r"^(\w+?_p\d)_")
    split = json.loads((tmp_path / "run/split.json").read_text())
    parts = {name: {case.rsplit("_", 1)[0] for case in cases} for name, cases in split.items()}
    assert not parts["train"] & parts["test"]
    assert result["patients"] == len(parts["test"])


def test_one_labelled_case_is_nan_with_a_reason_and_not_a_half(tree, tmp_path):
    result = run(tree, tmp_path, labelled=1)
    assert math.isnan(result["metrics"]["knn"]["auc"])
    assert result["reasons"]["knn"]["auc"] == "the labelled cases are all of one class"


def test_wrong_options_are_named_before_anything_is_encoded(tree, tmp_path):
    for wrong in ({"label_fractions": [5.0]}, {"label_fractions": [0.5], "labelled": 3}):
        with pytest.raises(UserError, match=r"label_fractions: .* must be parts, at most 1, and stand without"):
            run(tree, tmp_path, **wrong)
    with pytest.raises(UserError, match="have the same label"):
        run(tree, tmp_path, data_path=str(tree / "Dark"))
    with pytest.raises(UserError, match=r"weights: nowhere\.pth: no such file"):
        run(tree, tmp_path, weights="nowhere.pth")


def test_real_slices_by_organ(shared, tmp_path):
    """A few slices of each organ: even random features beat chance (1/4) by far, with scans kept apart."""
    tree = tmp_path / "data"
    for organ in sorted((shared / "slices_png").iterdir()):
        (tree / organ.name).mkdir(parents=True)
        shown = [path for path in sorted(organ.glob("*.png"))[:15] if np.asarray(Image.open(path)).any()]
        for path in shown:
            (tree / organ.name / path.name).symlink_to(path)
    result = run(tree, tmp_path, patient_pattern=r"^(.*?)(?:_(?:t1|t2|t1ce|flair))?_frame_")
    assert result["metrics"]["linear"]["balanced_accuracy"] > 0.4
    assert result["patients"] < result["cases"]
