"""Comparing initialisations: paired differences by hand, cells that are run once, tables, plot and CSV."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from downstream import compare, probe
from downstream.compare import MAIN_METRIC, format_tables, paired_difference, plot, summarise
from models.resnet import GreyResNet
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of ten images: bright squares and dark ones."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for organ, level in (("Bright", 120), ("Dark", 20)):
        (root / organ).mkdir()
        for i in range(10):
            pixels = rng.integers(0, 100, (16, 16))
            pixels[4:12, 4:12] += level
            Image.fromarray(pixels.astype(np.uint8)).save(root / organ / f"{i}.png")
    return root


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "other.pth"
    torch.save(GreyResNet("resnet18").torchvision_state(), path)
    return path


def run(tree: Path, out: Path, **changes: Any) -> dict[str, Any]:
    task = {"data_path": str(tree), "arch": "resnet18", "size": 32, "bootstrap": 0, "device": "cpu"}
    task |= {"cache_path": str(out / "cache")} | changes.pop("options", {})
    chosen: dict[str, Any] = {"task": "probe", "labelled": [2, 0], "seeds": [0, 1], "options": task}
    chosen |= {"initialisations": ["random"], "dump_path": str(out / "compare")}
    return compare.run(compare.Config(**(chosen | changes)))


def test_paired_difference_by_hand():
    mean, low, high, pairs = paired_difference([1, 2, 3, math.nan], [0, 0, 0, 0])
    half = 4.30265 / math.sqrt(3)  # Student's t of two degrees of freedom; standard deviation 1
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half), abs=1e-4)
    assert pairs == 3
    mean, low, _, pairs = paired_difference([0.5], [0.25])
    assert (mean, pairs) == (0.25, 1)
    assert math.isnan(low)
    assert paired_difference([math.nan], [1])[3] == 0


def test_a_common_shift_of_every_seed_has_an_interval_of_no_width():
    """Pairing takes out what the seeds have in common: unpaired, these would overlap."""
    base = np.array([0.1, 0.5, 0.9])
    mean, low, high, _ = paired_difference(base + 0.1, base)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))


def cells() -> list[dict[str, Any]]:
    """Two initialisations, one number of labels, three seeds; the second's AUC is nan once."""
    rows = {"random": [0.5, 0.6, 0.7], "ours": [0.7, math.nan, 0.8]}
    return [
        {"initialisation": name, "labelled": 5, "seed": seed, "metrics": {"auc": value}}
        for name, values in rows.items()
        for seed, value in enumerate(values)
    ]


def test_summary_leaves_nan_out_and_counts_it():
    random, ours = summarise(cells(), "random")
    assert (random["mean"], random["sd"], random["n"]) == pytest.approx((0.6, 0.1, 3))
    assert (random["difference"], random["pairs"]) == (0, 3)
    assert (ours["mean"], ours["n"], ours["seeds"]) == pytest.approx((0.75, 2, 3))
    assert (ours["difference"], ours["pairs"]) == (pytest.approx(0.15), 2)


def test_tables_show_spread_missing_seeds_and_differences():
    text = format_tables(summarise(cells(), "random"), "auc", "random")
    assert "0.600 ± 0.100" in text
    assert "0.750 ± 0.071 (2 of 3)" in text
    assert "+0.150 [" in text
    assert "5 labelled" in text


def test_the_plot_is_a_picture_also_with_nan(tmp_path):
    plot(cells(), summarise(cells(), "random"), "auc", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.size == (900, 600)
        assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_cells_run_once_and_new_ones_are_added(tree, weights, tmp_path, monkeypatch):
    asked = []

    def quick(cfg: probe.Config) -> dict[str, Any]:
        asked.append((cfg.weights, cfg.labelled, cfg.seed))
        return {"metrics": {"linear": {"balanced_accuracy": 0.1 * cfg.seed}}, "cases": 5}

    monkeypatch.setattr(probe, "run", quick)
    first = run(tree, tmp_path)
    assert len(asked) == 4
    again = run(tree, tmp_path)
    assert len(asked) == 4
    assert again["summary"] == first["summary"]
    more = run(tree, tmp_path, initialisations=["random", f"ours={weights}"])
    assert [cell[0] for cell in asked[4:]] == [str(weights)] * 4
    for line in more["summary"]:
        if line["initialisation"] == "random":
            assert line["difference"] == 0
    weights.write_bytes(weights.read_bytes() + b" ")  # another file under the same name
    run(tree, tmp_path, initialisations=["random", f"ours={weights}"])
    assert len(asked) == 12
    run(tree, tmp_path, options={"k": 1}, seeds=[0], labelled=[0])  # another option
    assert len(asked) == 13


def test_files_hold_what_was_returned(tree, tmp_path):
    found = run(tree, tmp_path, labelled=[4])
    out = tmp_path / "compare"
    with open(out / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in rows] == [line["mean"] for line in found["summary"]]
    with open(out / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "linear.accuracy"]
    assert {row["seed"]: float(row["value"]) for row in rows} == {
        str(cell["seed"]): cell["metrics"]["linear.accuracy"] for cell in found["cells"]
    }
    assert "linear.balanced_accuracy" in (out / "summary.txt").read_text()
    assert (out / "comparison.png").stat().st_size > 1000


def test_initialisations_of_a_seed_share_split_and_labelled_cases(tree, weights, tmp_path):
    run(tree, tmp_path, initialisations=["random", str(weights)], labelled=[4], seeds=[0, 1])
    splits: dict[int, set[str]] = {}
    for path in (tmp_path / "compare/cells").iterdir():
        seed = json.loads((path / "cell.json").read_text())["seed"]
        splits.setdefault(seed, set()).add((path / "split.json").read_text())
    assert [len(found) for found in splits.values()] == [1, 1]
    assert splits[0] != splits[1]
    assert "share their test cases" not in (tmp_path / "compare/summary.txt").read_text()


def test_one_split_for_all_seeds_is_said_to_be_one(tree, tmp_path):
    run(tree, tmp_path, vary_split=False, labelled=[4], seeds=[0, 1])
    splits = {path.read_text() for path in (tmp_path / "compare/cells").glob("*/split.json")}
    assert len(splits) == 1
    assert "all seeds share their test cases" in (tmp_path / "compare/summary.txt").read_text()


def test_errors_come_before_the_first_cell_and_name_the_option(tree, weights, tmp_path, capsys):
    for changes, message in (
        ({"baseline": "ours"}, "baseline: 'ours' is none of the initialisations random"),
        ({"initialisations": ["nowhere.pth"]}, r"weights: nowhere\.pth: no such file"),
        ({"initialisations": ["imagenet"]}, "initialisations: none is left"),
        ({"initialisations": [str(weights), f"other={weights}"]}, "two are called other"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] must be at least one number, each once"),
        ({"options": {"seed": 3}}, "options: seed is set by compare itself"),
    ):
        with pytest.raises(UserError, match=message):
            run(tree, tmp_path, **changes)
    (weights.with_suffix(".json")).write_text(json.dumps({"config": {"arch": "resnet18"}}))
    with pytest.raises(UserError, match="random resnet50, other resnet18 are different networks"):
        run(tree, tmp_path, initialisations=["random", str(weights)], options={"arch": None})
    with pytest.raises(SystemExit):
        run(tree, tmp_path, options={"sise": 32})
    assert "sise" in capsys.readouterr().err
    assert not (tmp_path / "compare/cells").exists()


def test_a_wrong_metric_lists_those_there_are_and_a_damaged_cell_is_named(tree, tmp_path):
    with pytest.raises(UserError, match=r"metric: 'dice' is not one of knn\.auc"):
        run(tree, tmp_path, metric="dice", seeds=[0], labelled=[0])
    cell = next((tmp_path / "compare/cells").glob("*/cell.json"))
    cell.write_text(cell.read_text()[:50])
    with pytest.raises(UserError, match="is damaged; remove it"):
        run(tree, tmp_path, seeds=[0], labelled=[0])


def test_detection_is_compared_by_ap50(tmp_path):
    pytest.importorskip("torchmetrics")
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 100, (32, 32))
        pixels[8:24, 8:24] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png"})
        content["annotations"].append({"image_id": i, "category_id": 1, "bbox": [8, 8, 16, 16]})
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    task = {"data_path": str(tmp_path), "annotations": str(tmp_path / "boxes.json"), "arch": "resnet18"}
    task |= {"image_size": 32, "pyramid_channels": 16, "proposals": 8, "epochs": 1, "device": "cpu", "workers": 2}
    chosen = {"initialisations": ["random"], "labelled": [2], "seeds": [0], "dump_path": str(tmp_path / "compare")}
    found = compare.run(compare.Config(task="detect", options=task, **chosen))
    assert [line["metric"] for line in found["summary"]] == ["map", "map_square", "ap50", "ap50_square"]
    (cell,) = found["cells"]
    assert cell["cases"] == 1  # a fifth of six images
    again = compare.run(compare.Config(task="detect", options=task | {"workers": 1}, **chosen))
    assert again["cells"] == found["cells"]  # read, not run: threads do not change a result
    assert "ap50: mean ± standard deviation" in (tmp_path / "compare/summary.txt").read_text()


@pytest.mark.parametrize("name", list(MAIN_METRIC))
def test_every_task_has_the_options_that_cells_set(name):
    task = importlib.import_module(f"downstream.{name}")
    fields = {field.name for field in dataclasses.fields(task.Config)}
    assert {"weights", "arch", "labelled", "seed", "split_seed", "split", "dump_path"} <= fields
    assert callable(task.run)
