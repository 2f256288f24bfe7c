"""Experiments: what YAML files describe, runs that are stopped and resumed, splits, and the page that records make."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import tiny
import yaml
from PIL import Image

from downstream import compare, jobs
from experiments import data as layout
from experiments import run as runner
from experiments import summarise
from experiments.run import read_plan
from utils import config as options
from utils import signals
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OURS = [str(ROOT / "experiments" / f"{name}.yaml") for name in ("main", "controls", "ablations")]


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
    assert flat.options == {"arch": "resnet18", "epochs": 15}  # of the defaults, those that the script has
    base = {"arch": "resnet18", "target_shape": [8, 32, 32], "epochs": 20}
    assert changed.options == base | {"lambda_intra": 0, "seed": 4}
    assert changed.start == {"resnet_pretrained": flat, "trans_pretrained": "none"}
    cell = plan.comparisons["a"].cells[-1]
    assert (cell.config.weights, cell.metric) == (str(changed.weights), "accuracy")
    other = plan.comparisons["b"].cells[0].config
    assert (other.size, other.data_path) == (64, "x")
    assert plan.differences == [("2D", "random")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pretraining": {}}, "must be a mapping with none but defaults, recipes"),
        ({"recipes": {"x": {"like": "y"}}}, "x: like: no entry before it is called 'y'"),
        ({"recipes": {"x": {"script": "ssl_swav2D"}}, "comparisons": {"x": {}}}, "x is described twice"),
        ({"comparisons": {"x": {"task": "detect", "initialisations": ["y.pth"]}}}, r"x: weights: y\.pth: no such file"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_plan([write(tmp_path / "x.yaml", content)], tmp_path)


@pytest.mark.slow
def test_the_page_of_results_is_what_its_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's files can be expanded, and tables and summary are worked out again without any run."""
    monkeypatch.setattr(compare, "plot", lambda *_: None)
    shutil.copytree(ROOT / "docs" / "results", tmp_path / "results")
    page = shutil.copy(ROOT / "docs" / "RESULTS.md", tmp_path)
    where = {"records": str(tmp_path / "results"), "page": str(page), "dump_path": str(tmp_path / "nothing")}
    summarise.main(summarise.Config(experiments=OURS, **where))
    assert Path(page).read_text() == (ROOT / "docs" / "RESULTS.md").read_text()
    ours, again = (pd.read_csv(folder / "summary.csv") for folder in (ROOT / "docs" / "results", tmp_path / "results"))
    pd.testing.assert_frame_equal(again, ours)


TRAINING = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[2]).parent
signal.signal(signal.SIGTERM, lambda *_: (here / "saved").touch() or sys.exit(143))
while not (here / "saved").exists():
    print("training", flush=True)
    time.sleep(0.05)
(here / "metrics.csv").write_text("epoch,loss,seconds\\n0,2,50\\n1,1,100\\n")
"""


def test_a_pre_training_that_is_stopped_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal for this process in the middle of a script, in whose place is one that ends only when it has saved."""
    (tmp_path / "ssl_swav2D.py").write_text(TRAINING)
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    (run,) = jobs.read_recipes({"flat": {"script": "ssl_swav2D"}}, tmp_path / "recipes")["flat"]

    def stop() -> None:
        while not (run.folder / "log.txt").is_file() or not (run.folder / "log.txt").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as stopped, signals.handled():
        jobs.run_jobs([run], tmp_path / "progress.txt")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert run.record is None
    assert jobs.run_jobs([run], tmp_path / "progress.txt") == []
    assert (run.record["seconds"], run.record["last"]["loss"]) == (150, 1)


@pytest.mark.slow
def test_from_a_file_to_a_page(data: Path, tmp_path: Path) -> None:
    """A training run, and a comparison of its weights with random ones on the same tiny tree."""
    cfg = tiny.options("ssl_swav2D", data, tmp_path, epochs=1, cache_path=str(tmp_path / "cache"))
    flat = {"script": "ssl_swav2D", "options": {k: v for k, v in cfg.items() if k not in jobs.PLACES}}
    task = {"arch": "resnet18", "data_path": str(data), "device": "cpu", "size": 32, "bootstrap": 0}
    kind = {"task": "classify", "initialisations": ["random", "2D=flat"], "labelled": [4], "seeds": [0]}
    kind |= {"metrics": ["accuracy"], "options": task | {"cache_path": str(tmp_path / "cache")}}
    content = {"recipes": {"flat": flat}, "comparisons": {"kind": kind}, "differences": [["2D", "random"]]}
    out, page = tmp_path / "runs", tmp_path / "docs" / "RESULTS.md"
    common = {"experiments": [write(tmp_path / "small.yaml", content)], "dump_path": str(out)}
    written = summarise.Config(**common, records=str(page.parent / "results"), page=str(page))
    runner.main(runner.Config(**common, jobs=1, minutes=1e-5))  # too few for anything, which is no failure
    with pytest.raises(UserError, match="holds no finished comparison"):
        summarise.main(written)
    runner.main(runner.Config(**common, jobs=1))
    assert "3 of 3 jobs are finished" in (out / "progress.txt").read_text()

    summarise.main(written)
    plan = read_plan(common["experiments"], out)
    value = {cell.initialisation: cell.record["metrics"]["accuracy"] for cell in plan.cells}
    text = page.read_text()
    assert f"| 2D | {value['2D']:.3f} ± nan |" in text
    assert f"| 2D - random | {value['2D'] - value['random']:+.3f} [" in text
    assert (page.parent / "results" / "comparisons.png").is_file()
    losses = pd.read_csv(page.parent / "results" / "recipes.csv").loss.tolist()
    assert losses == [plan.recipes["flat"][0].record["last"]["loss"]]
    plan.cells[0].folder.rename(out / "gone")
    with pytest.raises(UserError, match="kind: 1 of 2 cells are finished"):
        summarise.main(written)
    shutil.rmtree(out)
    page.write_text(text.replace("± nan", "± 7"))
    summarise.main(written)  # from the records
    assert page.read_text() == text


def write_source(source: Path) -> None:
    """The smallest data from which experiments.data lays out its trees."""
    rng = np.random.default_rng(0)
    for name, depth in (("heart_la", 2 * layout.STACK + 3), ("hippocampus", 8)):
        for kind in ("imagesTr", "labelsTr"):
            (source / name / kind).mkdir(parents=True)
        patients = {f"{name}_{i}": f"p{i // 2}" for i in range(16)}
        about = {"patient": patients, "labels": {"0": "background", "1": "it"}}
        (source / name / "dataset.json").write_text(json.dumps(about))
        for i, case in enumerate(patients):
            label = np.zeros((12, 10, depth), np.uint8)
            label[3, 4, i:-1] = i > 0  # the first has none, the others begin in slice i
            image = label + rng.integers(0, 99, label.shape, np.uint8)
            for kind, voxels in (("imagesTr", image), ("labelsTr", label)):
                nib.save(nib.Nifti1Image(voxels, np.eye(4)), source / name / kind / f"{case}.nii.gz")
    (source / "misc_nifti").mkdir()
    nib.save(nib.Nifti1Image(image, np.eye(4)), source / "misc_nifti" / "one.nii.gz")
    rows = ["filename,patient,finding"]
    names = [f"slices_png/{organ}/scan{i // 2}_frame_{i}.png" for organ in ("brain", "liver") for i in range(12)]
    for i, name in enumerate([*names, *(f"chest_xray/{i}.png" for i in range(24))]):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(source / name)
        rows += [f"{i - 24}.png,p{i},{layout.FINDINGS[i % 2]}"] * (i >= 24)
    (source / "chest_xray" / "labels.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.slow
def test_data_are_laid_out_once_without_tested_patients(tmp_path: Path) -> None:
    dest = tmp_path / "data"
    write_source(tmp_path / "source")
    cfg = layout.Config(source=str(tmp_path / "source"), dest=str(dest))
    layout.main(cfg)
    splits = {path.stem: json.loads(path.read_text()) for path in (dest / "splits").glob("*.json")}
    assert set(splits) == {*layout.SETS, "heart_la_stacks"}
    trained = {path.name.removesuffix(".npy") for path in (dest / "pretrain").rglob("*") if path.is_file()}
    of_stacks = splits.pop("heart_la_stacks")
    kinds = [{organ.split("/")[0] for organ in splits["slices_png"][part]} for part in ("train", "validation", "test")]
    assert kinds == [{"brain", "liver"}] * 3  # every label in every part
    for name, split in splits.items():
        assert split["test"]
        assert trained.isdisjoint(Path(case).name for case in split["test"]), name
        assert trained.issuperset(Path(case).name for case in split["train"]), name
    assert (dest / "pretrain" / "misc_nifti" / "one.npy").is_file()
    rows = pd.read_csv(dest / "tasks" / "heart_la_stacks.csv")
    stacks = dict(zip(rows.case, rows.label, strict=True))
    assert set(stacks) == {path.name for path in (dest / "tasks" / "heart_la_stacks").iterdir()}
    found = [stacks[f"heart_la_{i}_{k}.npy"] for i in (0, 5, 13) for k in (0, 1)]
    assert found == ["none", "none", "edge", "inside", "none", "edge"]
    assert np.load(dest / "tasks" / "heart_la_stacks" / "heart_la_5_1.npy").shape[2] == layout.STACK
    for part in ("train", "validation", "test"):
        assert {f"{case}_{k}.npy" for case in splits["heart_la"][part] for k in (0, 1)} == set(of_stacks[part])
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*.npy")}
    layout.main(cfg)
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*.npy")} == before


def test_recommended_settings_suit_both_methods() -> None:
    scripts = {"stage1": "ssl_{}2D", "stage2": "mask_{}", "stage3": "ssl_{}3D"}
    for path in (ROOT / "experiments" / "settings").glob("*/*.yaml"):
        for method in ("swav", "deepcluster"):
            script = importlib.import_module(scripts[path.stem].format(method))
            options.check(options.parse(script.Config, None, ["--config", str(path)]))
