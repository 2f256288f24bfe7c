"""Comparing initialisations: statistics by hand, jobs that are done once, recipes, cells, what is written."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from downstream import compare, jobs
from downstream.compare import format_tables, plot, summarise
from downstream.jobs import at, read_recipes
from models.resnet import GreyResNet
from utils.errors import UserError
from utils.files import write_json
from utils.locks import Lock

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "other.pth"
    torch.save(GreyResNet("resnet18").torchvision_state(), path)
    return path


def run(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    task = {"data_path": str(data), "arch": "resnet18", "size": 32, "bootstrap": 0, "device": "cpu"}
    task |= {"cache_path": str(out / "cache")} | changes.pop("options", {})
    chosen: dict[str, Any] = {"task": "classify", "labelled": [4], "seeds": [0, 1], "options": task}
    chosen |= {"initialisations": ["random"], "dump_path": str(out / "compare")}
    return compare.run(compare.Config(**(chosen | changes)))


def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Cells of `classify` cost nothing; returns what they were asked."""
    asked = []

    def launch(cell: compare.Cell) -> SimpleNamespace:
        asked.append((cell.config.weights, cell.config.labelled, cell.config.seed))
        result = {"metrics": {"auc": 0.1 * cell.config.seed}, "cases": 5, "seconds": 1, "weights": "", "commit": "c"}
        write_json(result | {"settings": {}}, cell.folder / "results.json")
        return SimpleNamespace(is_alive=lambda: False, exitcode=0)

    monkeypatch.setattr(jobs, "launch", launch)
    return asked


def table(rows: dict[str, list[float]], pretraining: Sequence[int] = ()) -> pd.DataFrame:
    """One metric and number of labels, one seed per value; pretraining: that `ours` starts from."""
    return pd.DataFrame(
        {"initialisation": name, "pretraining_seed": [*pretraining, *[None] * 9][seed] if name == "ours" else None}
        | {"labelled": 5, "seed": seed, "metric": "auc", "value": value}
        for name, values in rows.items()
        for seed, value in enumerate(values)
    ).astype({"pretraining_seed": "Int64"})


def test_the_summary_leaves_nan_out_counts_it_and_is_shown():
    """A common shift of every seed has an interval of no width: pairing takes out what seeds have in common."""
    rows = {"random": [0.5, 0.6, 0.7, 0.8], "shifted": [0.6, 0.7, 0.8, 0.9], "ours": [0.7, math.nan, 1.0, 1.2]}
    cells = table(rows)
    summary = summarise(cells, "random")
    random, shifted, ours = summary.itertuples()
    assert (random.mean, random.sd, random.n) == pytest.approx((0.65, math.sqrt(1 / 60), 4))
    assert (random.difference, random.pairs) == (0, 4)
    assert (shifted.difference, shifted.low, shifted.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (ours.n, ours.seeds, ours.pairs) == (3, 4, 3)
    half = 4.30265 * 0.1 / math.sqrt(3)  # Student's t of two degrees of freedom; differences 0.2, 0.3, 0.4
    assert (ours.difference, ours.low, ours.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half), abs=1e-5)
    text = format_tables(summary, "auc", "random")
    for part in ("0.650 ± 0.129", "0.967 ± 0.252 (3 of 4)", "+0.300 [", "5 labelled"):
        assert part in text
    alone = summarise(table({"random": [0.5], "ours": [0.75]}), "random").iloc[1]
    assert (alone.difference, alone.pairs, math.isnan(alone.low)) == (0.25, 1, True)
    assert len(plot({"all": (cells, "auc"), "again": (cells, "auc")})) > 10000


def test_of_several_pre_trainings_each_counts_once():
    """Six label draws from two pre-trainings: two independent values, the means of three each."""
    cells = table({"random": [0] * 6, "ours": [1, 4, 2, 5, 3, 6]}, [7, 8, 7, 8, 7, 8])
    random, ours = summarise(cells, "random").itertuples()
    assert (ours.mean, ours.n, ours.pairs, ours.difference) == (3.5, 2, 2, 3.5)
    assert ours.sd == pytest.approx(math.sqrt(4.5))
    assert random.n == 6
    cells = table({"random": [0, 0, 0], "ours": [1, 2, 3]}, [7, 7, 7])  # one pre-training: the draws count
    assert summarise(cells, "random").n.tolist() == [3, 3]


SCRIPT = """
import dataclasses
from utils.errors import UserError
@dataclasses.dataclass
class Config:
    fail: bool = False
def run(cfg):
    print("hello")
    if cfg.fail:
        raise UserError("no room")
"""


class Fake(jobs.Job):
    """A job of a tiny script."""

    def __init__(self, title: str, root: Path, needs: Sequence[Fake] = (), script: str = "greeting", **options) -> None:
        self.title, self.group, self.needs, self.folder = title, title[0], needs, root / title
        self.script, self.options = script, options

    @property
    def record(self) -> dict[str, Any] | None:
        return {"seconds": 1800.0} if (self.folder / "done").exists() else None

    def finish(self) -> None:
        (self.folder / "done").touch()


@pytest.mark.slow
def test_a_failure_stops_only_what_needs_it_and_progress_is_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "greeting.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(tmp_path)
    bad = Fake("bad", tmp_path, fail=True)
    after, good, again = Fake("after", tmp_path, (bad,)), Fake("good", tmp_path), Fake("good too", tmp_path)
    assert jobs.run_jobs([bad, after, good], tmp_path / "progress.txt") == ["bad"]
    assert "bad: FAILED (error: no room)" in capsys.readouterr().out
    assert (tmp_path / "good" / "log.txt").read_text() == "hello\n"
    assert jobs.progress([good, again]).startswith("1 of 2 jobs are finished; left: about 0.50 h")
    assert "more than" in (tmp_path / "progress.txt").read_text()
    bad.options = after.options
    assert jobs.run_jobs([bad, after, good], tmp_path / "progress.txt", workers=2) == []
    assert (tmp_path / "good" / "log.txt").read_text() == "hello\n"  # once
    assert after.record
    assert jobs.run_jobs([Fake("twin", tmp_path), Fake("twin", tmp_path)], tmp_path / "progress.txt", workers=2) == []
    assert (tmp_path / "twin" / "log.txt").read_text() == "hello\n"


def test_recipes_are_known_by_what_they_are_made_from_and_paired_by_place(tmp_path, weights):
    options = {"arch": "resnet18", "epochs": 3, "warmup_epochs": 0}

    def read(start: str = "flat", **changes: Any):
        described = {"flat": {"script": "ssl_swav2D", "options": options | changes, "seeds": [5, 6]}}
        described["joint"] = {"script": "ssl_swav3D", "start": {"resnet_pretrained": start}, "seeds": [0, 1, 2]}
        described["joint"]["options"] = {"arch": "resnet18"}
        return read_recipes(described, tmp_path)

    runs = read()
    assert [run.title for run in runs["joint"]] == ["joint, seed 0", "joint, seed 1", "joint, seed 2"]
    assert [run.needs[0].seed for run in runs["joint"]] == [5, 6, 5]
    assert at(runs["flat"], 3).seed == 6
    assert len({run.key for run in (*runs["flat"], *runs["joint"])}) == 5
    assert read()["joint"][1].key == runs["joint"][1].key
    assert read(workers=0)["joint"][1].key == runs["joint"][1].key  # may change when a run goes on
    assert read(epochs=4)["joint"][1].key != runs["joint"][1].key
    of_file = read(str(weights))["joint"][0].key
    weights.write_bytes(weights.read_bytes() + b" ")
    assert read(str(weights))["joint"][0].key != of_file


def test_a_mistake_in_a_recipe_is_named_before_anything_is_trained(data, weights, tmp_path):
    (tmp_path / "page.pth").write_text("<html>")
    for options, start, message in (
        ({"epoch": 1}, "none", "ssl_swav2D has no option 'epoch'"),
        ({"epochs": 5}, "none", "warmup_epochs: a warm-up of 10 epochs leaves nothing"),
        ({}, str(weights), r"other\.pth: holds a resnet18, to be loaded as a resnet50; add --arch resnet18"),
        ({}, str(tmp_path / "page.pth"), r"page\.pth: is a web page"),
        ({}, "no.pth", "neither a file nor a recipe"),
    ):
        recipe = {"script": "ssl_swav2D", "options": options, "start": {"resnet_pretrained": start}}
        with pytest.raises(UserError, match=message):
            run(data, tmp_path, recipes={"mine": recipe}, initialisations=["mine"])
    assert not (tmp_path / "compare").exists()


@pytest.mark.slow
def test_cells_run_once_and_new_ones_are_added(data, weights, tmp_path, monkeypatch):
    asked = quick(monkeypatch)
    first, again = run(data, tmp_path), run(data, tmp_path)
    assert len(asked) == 2
    pd.testing.assert_frame_equal(again["summary"], first["summary"])
    both = ["random", f"ours={weights}"]
    more = run(data, tmp_path, initialisations=both)["summary"]
    assert [cell[0] for cell in asked[2:]] == [str(weights)] * 2
    assert (more[more.initialisation == "random"].difference == 0).all()
    moved = weights.rename(tmp_path / "moved.pth")  # the same content under another name
    run(data, tmp_path, initialisations=["random", f"theirs={moved}"])
    assert len(asked) == 4
    torch.save({key: 2 * value for key, value in torch.load(moved).items()}, weights)  # another under the old name
    run(data, tmp_path, initialisations=both)
    run(data, tmp_path, options={"k": 1}, seeds=[0])  # another option
    assert len(asked) == 7


@pytest.mark.slow
def test_files_hold_what_was_returned_of_paired_cells(data, weights, tmp_path):
    found, out = run(data, tmp_path, initialisations=["random", str(weights)]), tmp_path / "compare"
    assert pd.read_csv(out / "summary.csv")["mean"].tolist() == found["summary"]["mean"].tolist()
    assert pd.read_csv(out / "results.csv").value.tolist() == found["cells"].value.tolist()
    assert "auc: mean ± standard deviation of 2 seeds" in (out / "summary.txt").read_text()
    assert "4 of 4 jobs are finished" in (out / "progress.txt").read_text()
    splits: dict[int, set[str]] = {}  # initialisations of a seed share split and labelled cases
    for path in (out / "cells").iterdir():
        result = json.loads((path / "results.json").read_text())
        drawn = (path / "split.json").read_text() + str(result["labelled"])
        splits.setdefault(result["config"]["seed"], set()).add(drawn)
    assert [len(found) for found in splits.values()] == [1, 1]
    assert splits[0] != splits[1]


def test_a_fixed_split_is_said_and_damage_is_named(data, tmp_path, monkeypatch):
    quick(monkeypatch)
    run(data, tmp_path, vary_split=False)
    assert "all seeds share their test cases" in (tmp_path / "compare/summary.txt").read_text()
    path = next((tmp_path / "compare/cells").glob("*/results.json"))
    path.write_text(path.read_text()[:30])  # half written: not a finished cell
    with pytest.raises(UserError, match="is damaged"):
        run(data, tmp_path, vary_split=False)


def test_the_tables_of_one_command_stand_together_and_a_second_command_is_refused(data, tmp_path, monkeypatch):
    quick(monkeypatch)
    run(data, tmp_path)
    out = tmp_path / "compare"
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert before.keys() == {
        "comparison.png", "options.yaml", "progress.txt", "results.csv", "summary.csv", "summary.txt"
    }  # fmt: skip
    replace, moved = os.replace, []

    def full(source: Path, target: Path) -> None:
        if moved.append(target) or target == out / "summary.txt":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match=r"summary\.txt: cannot be written \(No space left"):
            run(data, tmp_path, seeds=[0, 1, 2])
    assert not (out / "summary.csv").exists()  # which speaks of the others
    with Lock(out / ".lock", "compares").held(), pytest.raises(UserError, match=r"compare/\.lock: process \d+ on"):
        run(data, tmp_path)
    run(data, tmp_path)
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_errors_of_any_cell_come_before_the_first_and_name_the_option(data, weights, tmp_path, monkeypatch):
    asked = quick(monkeypatch)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "half.pth")
    (weights.with_suffix(".json")).write_text(json.dumps({"config": {"arch": "resnet18"}}))
    for changes, message in (
        ({"initialisations": [str(weights), f"other={weights}"]}, "two are called other"),
        ({"initialisations": ["random", f"half={tmp_path / 'half.pth'}"]}, r"half\.pth: holds no ResNet"),
        ({"initialisations": ["random", str(weights)], "options": {"arch": None}}, "resnet18, resnet50 differ"),
        ({"labelled": [2, 99]}, "labelled: 99 cases were asked for"),
    ):
        with pytest.raises(UserError, match=message):
            run(data, tmp_path, **changes)
    assert asked == []
