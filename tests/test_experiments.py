"""Experiments: what YAML files describe, runs that are stopped and resumed, splits, and the page that records make."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import yaml
from PIL import Image
from sklearn.linear_model import RidgeCV
from test_compare import Fake

import mask_swav
from downstream import compare, jobs
from experiments import data as layout
from experiments import run as runner
from experiments import skill, summarise
from experiments.run import read_plan
from utils import config as options
from utils import signals
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OURS = [str(ROOT / "experiments" / f"{name}.yaml") for name in ("main", "controls", "ablations", "volumes")]


FIRST = """
defaults: {arch: resnet18, target_shape: [8, 32, 32], epochs: 20}
recipes:
  flat: {script: ssl_swav2D, options: {epochs: 15}}
  joint: {script: ssl_swav3D, start: {resnet_pretrained: flat}, seeds: [3, 4]}
  no_intra: {like: joint, options: {lambda_intra: 0}, start: {trans_pretrained: none}}
comparisons:
  a:
    {task: classify, metrics: [accuracy, auc], initialisations: [random, 2D=flat, no_intra], labelled: [2],
     seeds: [0, 1], options: {data_path: x, size: 32, arch: resnet18}}
differences: [[2D, random]]
"""
SECOND = "comparisons: {b: {like: a, initialisations: [joint], seeds: [0], options: {size: 64}}}"


def write(path: Path, content: str | dict[str, Any]) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return str(path)


def test_files_become_jobs_seed_by_seed(tmp_path: Path) -> None:
    plan = read_plan([write(tmp_path / "1.yaml", FIRST), write(tmp_path / "2.yaml", SECOND)], tmp_path / "out")
    cells = [[f"a: {name}, 2 labelled, seed {k}" for name in ("random", "2D", "no_intra")] for k in (0, 1)]
    titles = ["flat", "joint, seed 3", "no_intra, seed 3", *cells[0], "joint, seed 4", "no_intra, seed 4", *cells[1]]
    assert [job.title for job in plan.jobs] == [*titles, "b: joint, 2 labelled, seed 0"]
    flat, changed = plan.recipes["flat"][0], plan.recipes["no_intra"][1]
    assert flat.chosen == {"arch": "resnet18", "epochs": 15}  # of the defaults, those that the script has
    base = {"arch": "resnet18", "target_shape": [8, 32, 32], "epochs": 20}
    assert changed.chosen == base | {"lambda_intra": 0, "seed": 4}
    assert changed.start == {"resnet_pretrained": flat, "trans_pretrained": "none"}
    cell = plan.comparisons["a"].cells[-1]
    assert (cell.config.weights, cell.metric) == (str(changed.weights), "accuracy")
    other = plan.comparisons["b"].cells[0].config
    assert (other.size, other.data_path) == (64, "x")
    assert plan.differences == [("2D", "random")]


def test_a_mistake_in_a_file_is_named(tmp_path: Path) -> None:
    content = {"comparisons": {"x": {"task": "detect", "initialisations": ["y.pth"]}}}
    with pytest.raises(UserError, match=r"x: weights: y\.pth: no such file"):
        read_plan([write(tmp_path / "x.yaml", content)], tmp_path)


@pytest.mark.parametrize("junk", [3, [None], {1: 2}])
@pytest.mark.parametrize(
    "part", ["defaults", "recipes", "comparisons", "options", "start", "script", "seeds", "metrics"]
)
def test_what_is_of_another_kind_is_named(part: str, junk: Any, tmp_path: Path) -> None:
    content = yaml.safe_load(FIRST)
    holder = next(
        place for place in (content, content["recipes"]["joint"], content["comparisons"]["a"]) if part in place
    )
    holder[part] = junk
    with pytest.raises(UserError, match=f"{part}: .* must be "):
        read_plan([write(tmp_path / "x.yaml", content)], tmp_path)
    with pytest.raises(UserError, match="describes no recipes"):
        read_plan([write(tmp_path / "x.yaml", "")], tmp_path)


@pytest.mark.slow
def test_the_page_of_results_is_what_its_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's files can be expanded, and tables and summary are worked out again without any run."""
    monkeypatch.setattr(compare, "plot", lambda *_: b"")
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    page = shutil.copy(ROOT / "docs" / "RESULTS.md", tmp_path)
    where = {"records": str(tmp_path / "results"), "page": str(page), "dump_path": str(tmp_path / "nothing")}
    summarise.main(summarise.Config(experiments=OURS, **where))
    assert Path(page).read_text() == (ROOT / "docs" / "RESULTS.md").read_text()
    ours, again = (pd.read_csv(folder / "summary.csv") for folder in (ROOT / "docs" / "results", tmp_path / "results"))
    pd.testing.assert_frame_equal(again, ours)


SLOW = """
import dataclasses, pathlib, time
@dataclasses.dataclass
class Config:
    folder: str
def main(cfg):
    saved = pathlib.Path(cfg.folder) / "saved"
    try:
        while not saved.exists():
            print("training", flush=True)
            time.sleep(0.05)
    finally:
        saved.touch()
"""


@pytest.mark.slow
def test_what_is_stopped_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal for this process in the middle of a script that ends only when it has saved."""
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    job = Fake("slow", tmp_path, script="slow", folder=str(tmp_path))

    def stop() -> None:
        while not (job.folder / "log.txt").is_file() or not (job.folder / "log.txt").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as stopped, signals.handled():
        jobs.run_jobs([job], tmp_path / "progress.txt")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert job.record is None
    assert jobs.run_jobs([job], tmp_path / "progress.txt") == []
    assert job.record


@pytest.mark.slow
def test_from_a_file_to_a_page(data: Path, tmp_path: Path) -> None:
    """A training run, and a comparison of its weights with random ones on the same tiny tree."""
    cfg = tiny.options("ssl_swav2D", data, tmp_path, epochs=1, cache_path=str(tmp_path / "cache"))
    flat = {"script": "ssl_swav2D", "options": {k: v for k, v in cfg.items() if k not in jobs.PLACES}}
    task = {"arch": "resnet18", "data_path": str(data), "device": "cpu", "size": 32, "bootstrap": 0}
    kind = {"task": "classify", "initialisations": ["random", "2D=flat"], "labelled": [4], "seeds": [0]}
    kind |= {"metrics": ["accuracy"], "options": task | {"cache_path": str(tmp_path / "cache")}}
    content = {"recipes": {"flat": flat}, "comparisons": {"kind": kind}, "differences": [["2D", "random"]]}
    out, page = tmp_path / "runs", tmp_path / "RESULTS.md"
    page.write_text("".join(f"<!-- {what} kind -->\n<!-- end -->\n" for what in ("means", "differences", "figure")))
    common = {"experiments": [write(tmp_path / "small.yaml", content)], "dump_path": str(out)}
    written = summarise.Config(**common, records=str(page.parent / "results"), page=str(page))
    runner.main(runner.Config(**common, minutes=1e-5))  # too few for anything, which is no failure
    with pytest.raises(UserError, match="holds no finished comparison"):
        summarise.main(written)
    runner.main(runner.Config(**common))
    assert "3 of 3 jobs are finished" in (out / "progress.txt").read_text()

    summarise.main(written)
    plan = read_plan(common["experiments"], out)
    random, ours = (cell.record["metrics"]["accuracy"] for cell in plan.comparisons["kind"].cells)
    text = page.read_text()
    assert f"| 2D | {ours:.3f} ± nan |" in text
    assert f"| 2D - random | {ours - random:+.3f} [" in text
    losses = pd.read_csv(page.parent / "results" / "recipes.csv").loss.tolist()
    assert losses == [plan.recipes["flat"][0].record["last"]["loss"]]
    plan.jobs[-1].folder.rename(out / "gone")
    with pytest.raises(UserError, match="kind: 1 of 2 cells are finished"):
        summarise.main(written)
    shutil.rmtree(out)
    page.write_text(text.replace("± nan", "± 7"))
    summarise.main(written)  # from the records
    assert page.read_text() == text


def test_no_tested_patient_is_pre_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the images, without the data sets that are converted."""
    source, dest = tmp_path / "source", tmp_path / "data"
    rows = ["filename,patient,finding"]
    names = [f"slices_png/{organ}/scan{i // 2}_frame_{i}.png" for organ in ("brain", "liver") for i in range(12)]
    for i, name in enumerate([*names, *(f"chest_xray/{i}.png" for i in range(24))]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(source / name)
        rows += [f"{i - 24}.png,p{i // 2},{layout.FINDINGS[i // 2 % 2]}"] * (i >= 24)
    (source / "chest_xray" / "labels.csv").write_text("\n".join(rows) + "\n")
    (source / "misc_nifti").mkdir(), (source / "sunnybrook").mkdir()
    monkeypatch.setattr(layout, "prepare", lambda *_: None)
    monkeypatch.setattr(layout, "SETS", {name: layout.SETS[name] for name in ("slices_png", "chest_xray")})
    for _ in range(2):  # again: nothing changes
        layout.main(layout.Config(source=str(source), dest=str(dest)))
        splits = {path.stem: json.loads(path.read_text()) for path in (dest / "splits").glob("*.json")}
        organs = {part: {name.split("/")[0] for name in names} for part, names in splits["slices_png"].items()}
        assert list(organs.values()) == [{"brain", "liver"}] * 3  # every label in every part
        for folder, split in (
            (dest / "pretrain", splits["slices_png"]),
            (dest / "pretrain/chest_xray", splits["chest_xray"]),
        ):
            for part, names in split.items():
                assert names
                assert {(folder / name).exists() for name in names} == {part != "test"}
    people = [{int(Path(name).stem) // 2 for name in names} for names in splits["chest_xray"].values()]
    assert sum(map(len, people)) == len(set.union(*people)) == 12


def test_recommended_settings_suit_both_methods() -> None:
    scripts = {"stage1": "ssl_{}2D", "stage2": "mask_{}", "stage3": "ssl_{}3D"}
    for path in (ROOT / "experiments" / "settings").glob("*/*.yaml"):
        for method in ("swav", "deepcluster"):
            script = importlib.import_module(scripts[path.stem].format(method))
            options.check(options.parse(script.Config, None, ["--config", str(path)]))


def test_skill_is_judged_against_the_best_of_three_rivals(data: Path, tmp_path: Path, capsys: Any) -> None:
    """Slices on a line are guessed by interpolation; what decides is the better rival, on volumes of their own."""
    tokens = torch.arange(6.0)[:, None] * torch.tensor([[1.0, -2.0]])
    visible = torch.tensor([True, False, False, True, True, False])
    sides = skill.nearest_visible(tokens, visible)
    assert torch.equal(sides[[1, 2], 4:].unflatten(1, (2, 2)).sum(1), tokens[[1, 2]])
    assert torch.equal(sides[5, :2], tokens[4])
    hidden = skill.Hidden("a", tokens[~visible], tokens[~visible] + 1, tokens[~visible] * 0.5, sides[~visible])
    found = skill.errors([hidden, hidden], RidgeCV([1e-6]).fit(sides[:5].numpy(), tokens[:5].numpy()))
    square = float(tokens[~visible].square().mean())
    assert found["a"][:3] == pytest.approx([square, 1, square / 4])

    cfg = tiny.options("mask_swav", data, tmp_path, epochs=1, checkpoint_name="mask.pth")
    mask_swav.main(mask_swav.Config(**cfg))
    capsys.readouterr()
    skill.main(skill.Config(str(tmp_path / "weights/mask.pth"), seen=str(data), unseen=str(data)))
    assert re.search(
        r"Volumes: transformer \d.*, ridge 0\.\d+ of the average's error; skill -\d", capsys.readouterr().out
    )
    with pytest.raises(UserError, match="give a file of stage 2"):
        skill.load(tmp_path / "weights/other.pth")
