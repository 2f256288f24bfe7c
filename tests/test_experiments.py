"""Experiments: what YAML files describe, runs that are skipped, stopped and resumed, splits, and the arithmetic."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from PIL import Image

from experiments import data as layout
from experiments import run as runner
from experiments import summarise
from experiments.plan import Plan, Run, expand
from utils import config as options
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SLEEP = "import time; time.sleep({})"


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def described(tmp_path: Path) -> Path:
    return write(
        tmp_path / "some.yaml",
        {
            "defaults": {"arch": "resnet18", "data_path": "{data}/pretrain"},
            "pretraining": {
                "flat": {"script": "ssl_swav2D", "seconds": 100, "options": {"epochs": 5}},
                "joint": {
                    "script": "ssl_swav3D",
                    "start": {"resnet_pretrained": "flat", "trans_pretrained": "none"},
                    "seeds": [0, 1],
                    "variants": {"all": None, "no_intra": {"lambda_intra": 0}},
                },
            },
            "comparisons": {
                name: {
                    "task": "probe",
                    "initialisations": {"random": "random", "2D": "flat", "without": "no_intra"},
                    "labelled": [2, 4],
                    "seeds": [0, 1],
                    "seconds": 3,
                    "options": {"data_path": "{data}/x"},
                }
                for name in ("a", "b")
            },
            "differences": [["without", "random"]],
        },
    )


def test_files_become_runs_in_an_order_in_which_they_can_be_run(described: Path) -> None:
    plan = expand([described])
    by_seed = [[f"{name}-s{seed}" for name in ("all", "no_intra", "a", "b")] for seed in (0, 1)]
    assert list(plan.runs) == ["flat", *by_seed[0], *by_seed[1]]
    joint = plan.runs["no_intra-s1"]
    assert joint.needs == ("flat",)
    assert joint.placed(Path("/d"), Path("/out")) == {
        "arch": "resnet18",
        "data_path": "/d/pretrain",
        "lambda_intra": 0,
        "resnet_pretrained": "flat.pth",
        "trans_pretrained": "none",
        "checkpoint_name": "no_intra-s1.pth",
        "seed": 1,
        "dump_path": "/out/no_intra-s1",
        "pretrained_path": "/out/weights",
    }
    compared = plan.runs["a-s1"]
    placed = compared.placed(Path("/d"), Path("/out"))
    assert compared.needs == ("flat", "no_intra-s1")  # the weights of the same seed
    assert placed["initialisations"] == [
        "random",
        "2D=/out/weights/flat.pth",
        "without=/out/weights/no_intra-s1.pth",
    ]
    assert placed["options"] == {"data_path": "/d/x"}
    assert placed["dump_path"] == "/out/a-s1"
    assert compared.seconds == 3 * 3 * 2
    assert plan.differences == [("without", "random")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrainings": {}}, "'pretrainings' is not one of"),
        ({"pretraining": {"x": {"script": "demo"}}}, "script 'demo' is not one of"),
        ({"defaults": {"epoch": 5}}, "defaults: no script has an option 'epoch'"),
        ({"defaults": {"dump_path": "x"}}, "defaults: no script has an option 'dump_path'"),
        (
            {"comparisons": {"x": {"task": "probe", "initialisations": {"a": "random"}, "labelled": [1]}}},
            "x: has no seeds",
        ),
        ({"pretraining": {"x": {"script": "ssl_swav2D", "options": {"epoch": 1}}}}, "no option 'epoch'"),
        ({"pretraining": {"x": {"script": "ssl_swav2D", "options": {"seed": 1}}}}, "no option 'seed'"),
        ({"pretraining": {"x": {"script": "mask_swav", "start": {"resnet_pretrained": "y"}}}}, "no run is called 'y'"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand([write(tmp_path / "x.yaml", changes)])


@pytest.mark.parametrize("names", [("main",), ("main", "controls", "again", "ablations"), ("gpu",)])
def test_the_experiments_of_this_project_can_be_expanded(names: tuple[str, ...]) -> None:
    plan = expand([ROOT / "experiments" / f"{name}.yaml" for name in names])
    assert all(run.seconds > 0 for run in plan.runs.values())
    for table in plan.tables:
        assert len(table.runs) >= (5 if table.name == "heart_la" else 3)


def sleeping(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, str]) -> list[str]:
    """Runs become small Python programs; returns the names of those that were started."""
    started: list[str] = []
    runner.made_with()  # asks git
    popen = subprocess.Popen

    def fake(command: list[str], **options: Any) -> subprocess.Popen:
        name = Path(command[-1]).parent.name
        started.append(name)
        return popen([sys.executable, "-c", seconds[name]], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", fake)
    return started


def three() -> Plan:
    runs = [Run("a", "m", {"x": 1}, (), 10), Run("b", "m", {}, ("a",), 10), Run("c", "m", {}, (), 10)]
    return Plan({run.name: run for run in runs})


def test_finished_runs_are_skipped_and_a_failure_stops_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {"a": "raise SystemExit(3)", "b": "", "c": "print('hello')"}
    started = sleeping(monkeypatch, programs)
    assert runner.execute(three(), tmp_path, runner.Config(jobs=1)) == ["a"]
    assert started == ["a", "c"]
    assert (tmp_path / "c" / "log.txt").read_text() == "hello\n"
    programs["a"] = ""
    started.clear()
    assert runner.execute(three(), tmp_path, runner.Config()) == []
    assert started == ["a", "b"]
    started.clear()
    assert runner.execute(three(), tmp_path, runner.Config()) == []
    assert started == []
    assert "3 of 3 runs finished; left: about 0.00 h" in runner.format_plan(three(), tmp_path, 2)


def test_other_options_are_no_finished_run_and_count_for_what_starts_from_it(tmp_path: Path) -> None:
    plan, changed = three(), three()
    changed.runs["a"] = Run("a", "m", {"x": 2}, (), 10)
    keys, others = runner.run_keys(plan), runner.run_keys(changed)
    assert keys["c"] == others["c"]
    assert keys["b"] != others["b"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "status.json").write_text(json.dumps({"key": keys["b"], "done": True, "seconds": 4}))
    assert runner.status(tmp_path, "b", keys["b"]) == (True, 4, "")
    with pytest.raises(UserError, match="other options or from other weights"):
        runner.status(tmp_path, "b", others["b"])


def test_the_time_budget_ends_runs_which_go_on_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"a": SLEEP.format(60), "b": "", "c": ""}
    started = sleeping(monkeypatch, programs)
    began = time.monotonic()
    assert runner.execute(three(), tmp_path, runner.Config(minutes=0.02, jobs=1)) == []
    assert time.monotonic() - began < 20
    keys = runner.run_keys(three())
    state = runner.status(tmp_path, "a", keys["a"])
    assert not state.done
    assert state.seconds > 1
    assert started == ["a"]
    programs["a"] = ""
    runner.execute(three(), tmp_path, runner.Config())
    assert runner.status(tmp_path, "a", keys["a"]).seconds > state.seconds  # of both attempts


def test_the_plan_learns_from_finished_runs(tmp_path: Path) -> None:
    keys = runner.run_keys(three())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "status.json").write_text(json.dumps({"key": keys["a"], "done": True, "seconds": 1800}))
    assert "left: about 0.50 h, 2 at a time; finished ones took 180.00" in runner.format_plan(three(), tmp_path, 2)


def cell(name: str, seed: int, value: float) -> dict[str, Any]:
    return {"initialisation": name, "labelled": 3, "seed": seed, "metrics": {"dice": value}}


def test_means_and_paired_differences_by_hand() -> None:
    """Student's t of two degrees of freedom is 4.30265; differences 0.1, 0.2, 0.3 have mean 0.2 and sd 0.1."""
    cells = [cell("random", s, v) for s, v in enumerate([0.4, 0.5, 0.6, math.nan])]
    cells += [cell("joint", s, v) for s, v in enumerate([0.5, 0.7, 0.9, 0.8])]
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert summarise.means(cells, "dice")["random", 3] == pytest.approx((0.5, 0.5 - half, 0.5 + half, 3), abs=1e-5)
    *interval, n, p = summarise.difference(cells, "dice", 3, "joint", "random")
    assert interval == pytest.approx([0.2, 0.2 - half, 0.2 + half], abs=1e-5)
    assert n == 3
    t = 0.2 / (0.1 / math.sqrt(3))  # two degrees of freedom: P(|T| > t) = 1 - t / sqrt(t * t + 2)
    assert p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert summarise.difference(cells, "dice", 3, "joint", "nobody")[3] == 0


def test_stratified_splits_keep_patients_together_and_labels_in_every_part() -> None:
    patients = {f"{i}_{side}": f"p{i}" for i in range(20) for side in "lr"}
    labels = {case: "ill" if int(case[:-2]) < 8 else "well" for case in patients}
    split = layout.stratified(patients, labels, (0.5, 0.25, 0.25), 0)
    parts = [split.train, split.validation, split.test]
    assert sorted(case for part in parts for case in part) == sorted(patients)
    assert [len({patients[case] for case in part}) for part in parts] == [10, 5, 5]
    assert all({labels[case] for case in part} == {"ill", "well"} for part in parts)
    seen = {patients[case] for case in layout.allowed(split, patients)}
    assert seen.isdisjoint(patients[case] for case in split.test)


def test_no_tested_patient_is_pre_trained_on(shared: Path, tmp_path: Path) -> None:
    """The fixed splits of the real data; patients as the data's own files name them. No volume is converted here."""
    for name, fractions in layout.VOLUMES.items():
        patients = json.loads((shared / name / "dataset.json").read_text())["patient"]
        assert set(patients) == {
            path.name.removesuffix(".nii.gz") for path in (shared / name).glob("imagesTr/*.nii.gz")
        }
        split = layout.make_split(list(patients), list(patients.values()), fractions, 0)
        trained = {patients[case] for case in layout.allowed(split, patients)}
        assert trained.isdisjoint({patients[case] for case in split.test})
        assert trained | {patients[case] for case in split.test} == set(patients.values())
        assert len(split.train) >= 10
    for read, fractions in ((layout.slices, layout.SLICES), (layout.xrays, layout.XRAY)):
        everyone, labels = read(shared / ("slices_png" if read is layout.slices else "chest_xray"))
        unlabelled = {case for case, label in labels.items() if label in ("unknown", "Pneumonia")}
        patients = {case: patient for case, patient in everyone.items() if case not in unlabelled}
        split = layout.stratified(patients, labels, fractions, 0)
        trained = {everyone[case] for case in layout.allowed(split, everyone)}
        assert trained.isdisjoint({patients[case] for case in split.test})


def test_data_are_laid_out_once_without_tested_patients(tmp_path: Path) -> None:
    """From the smallest source that has all five folders to the three that experiments read."""
    source, dest = tmp_path / "source", tmp_path / "data"
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.normal(size=(12, 10, 8)).astype(np.float32), np.eye(4))
    for name in layout.VOLUMES:
        (source / name / "imagesTr").mkdir(parents=True)
        patients = {f"{name}_{i}": f"p{i // 2}" for i in range(16)}
        (source / name / "dataset.json").write_text(json.dumps({"patient": patients}))
        for case in patients:
            nib.save(image, source / name / "imagesTr" / f"{case}.nii.gz")
    (source / "heart_la" / "labelsTr").mkdir()
    deep = np.zeros((12, 10, 2 * layout.STACK + 3), np.uint8)  # two stacks and a rest
    for i in range(16):  # the first has none, the others begin in the first stack
        label = deep.copy()
        label[3, 4, i:-1] = i > 0
        for kind, voxels in (("labelsTr", label), ("imagesTr", deep + rng.integers(0, 99, deep.shape, np.uint8))):
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), source / "heart_la" / kind / f"heart_la_{i}.nii.gz")
    (source / "misc_nifti").mkdir()
    nib.save(image, source / "misc_nifti" / "one.nii.gz")
    for organ in ("brain", "liver"):
        (source / "slices_png" / organ).mkdir(parents=True)
        for i in range(12):
            picture = Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8))
            picture.save(source / "slices_png" / organ / f"scan{i // 2}_frame_{i}.png")
    (source / "chest_xray").mkdir()
    rows = ["filename,patient,finding"]
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (16, 16), dtype=np.uint8)).save(source / "chest_xray" / f"{i}.png")
        rows.append(f"{i}.png,p{i},{layout.FINDINGS[i % 2]}")
    (source / "chest_xray" / "labels.csv").write_text("\n".join(rows) + "\n")

    cfg = layout.Config(source=str(source), dest=str(dest))
    layout.main(cfg)
    splits = {path.stem: json.loads(path.read_text()) for path in (dest / "splits").glob("*.json")}
    assert set(splits) == {*layout.VOLUMES, "heart_la_stacks", "slices_png", "chest_xray"}
    of_stacks = splits.pop("heart_la_stacks")
    for name, split in splits.items():
        trained = {path.name.removesuffix(".npy") for path in (dest / "pretrain").rglob("*") if path.is_file()}
        assert split["test"]
        assert trained.isdisjoint(Path(case).name for case in split["test"]), name
        assert trained.issuperset(Path(case).name for case in split["train"]), name
    assert (dest / "pretrain" / "misc_nifti" / "one.npy").is_file()
    with open(dest / "tasks" / "heart_la_stacks.csv", newline="") as file:
        stacks = {row["case"]: row["label"] for row in csv.DictReader(file)}
    assert set(stacks) == {path.name for path in (dest / "tasks" / "heart_la_stacks").iterdir()}
    assert [stacks[f"heart_la_{i}_{k}.npy"] for i in (0, 5, 13) for k in (0, 1)] == [
        *("none", "none"),
        *("edge", "inside"),
        *("none", "edge"),
    ]
    stack = np.load(dest / "tasks" / "heart_la_stacks" / "heart_la_5_1.npy")
    assert stack.shape[2] == layout.STACK
    for part in ("train", "validation", "test"):
        whole = {f"{case}_{k}.npy" for case in splits["heart_la"][part] for k in (0, 1)}
        assert whole == set(of_stacks[part])
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("*.json")}
    layout.main(cfg)
    assert {path: path.stat().st_mtime_ns for path in dest.rglob("*.json")} == before


@pytest.fixture
def small(tmp_path: Path, data: Path) -> Path:
    """A training run, and a comparison of its weights with random ones on the same tiny tree."""
    return write(
        tmp_path / "small.yaml",
        {
            "defaults": {"arch": "resnet18", "data_path": "{data}", "device": "cpu", "workers": 0},
            "pretraining": {
                "flat": {
                    "script": "ssl_swav2D",
                    "seconds": 10,
                    "options": {
                        "size_crops": [32, 16],
                        "nmb_crops": [2, 1],
                        "batch_size": 8,
                        "epochs": 2,
                        "warmup_epochs": 0,
                        "slices_per_volume": 2,
                        "hidden_mlp": 32,
                        "feat_dim": 16,
                        "cache_path": str(tmp_path / "cache"),
                    },
                }
            },
            "comparisons": {
                "kind": {
                    "task": "probe",
                    "metrics": ["linear.balanced_accuracy"],
                    "initialisations": {"random": "random", "2D": "flat"},
                    "labelled": [4],
                    "seeds": [0],
                    "seconds": 5,
                    "options": {
                        "data_path": "{data}",
                        "arch": "resnet18",
                        "size": 32,
                        "bootstrap": 0,
                        "device": "cpu",
                        "cache_path": str(tmp_path / "cache"),
                    },
                }
            },
            "differences": [["2D", "random"]],
        },
    )


def test_from_a_file_to_a_page(small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"experiments": [str(small)], "data": str(data), "dump_path": str(tmp_path / "runs")}
    (tmp_path / "findings.md").write_text("## What was found\n")
    written = {"output": str(tmp_path / "docs" / "RESULTS.md"), "findings": str(tmp_path / "findings.md")}
    written["records"] = str(tmp_path / "records")
    page = tmp_path / "docs" / "RESULTS.md"
    with pytest.raises(UserError, match="2 of 2 runs are not finished"):
        summarise.main(summarise.Config(**common, **written))
    command = [sys.executable, "-m", "experiments.run", f"--experiments=[{small}]", f"--data={data}"]
    command += [f"--dump_path={common['dump_path']}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("flat: started"):
            time.sleep(1)
            os.kill(process.pid, signal.SIGTERM)  # in the middle of a run, which must end with it
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "goes on next time" in rest
    runner.main(runner.Config(**common))
    assert "2 of 2 runs finished" in capsys.readouterr().out
    summarise.main(summarise.Config(**common, **written))
    cells = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "kind-s0").glob("cells/*/cell.json")]
    of = {cell["initialisation"]: cell["metrics"]["linear.balanced_accuracy"] for cell in cells}
    text = page.read_text()
    assert f"| 2D | {of['2D']:.3f} [nan, nan], n 1 |" in text
    assert f"| 2D - random | {of['2D'] - of['random']:+.3f} [" in text
    assert "| flat | ssl_swav2D | " in text
    assert "## What was found" in text
    assert "arXiv 2306.11925" in text
    assert (page.parent / "results" / "kind_linear_balanced_accuracy.png").is_file()
    # Cells of weights that are no longer those do not count, neither now nor later.
    stale = tmp_path / "runs" / "kind-s0" / "cells" / "stale"
    stale.mkdir()
    (stale / "cell.json").write_text(json.dumps(cells[0] | {"metrics": {"linear.balanced_accuracy": 0.123}}))
    summarise.main(summarise.Config(**common, **written))
    assert page.read_text() == text
    shutil.rmtree(tmp_path / "runs")
    summarise.main(summarise.Config(**common, **written))  # from the records
    assert page.read_text() == text

    content = yaml.safe_load(small.read_text())
    content["comparisons"]["kind"]["metrics"].append("linear.auc")  # which the records have not kept
    write(small, content)
    with pytest.raises(UserError, match=r"1 of 2 runs are not finished \(kind-s0\)"):
        summarise.main(summarise.Config(**common, **written))
    content["comparisons"]["kind"]["metrics"].pop()
    content["pretraining"]["flat"]["options"]["epochs"] = 3  # those are other weights, also for what starts from them
    write(small, content)
    with pytest.raises(UserError, match="2 of 2 runs are not finished"):
        summarise.main(summarise.Config(**common, **written))
    assert len(summarise.read_records(tmp_path / "records")) == 2  # of the old ones, which stay


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "experiments" / "settings").glob("*/*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_recommended_settings_suit_both_methods_and_those_for_100_volumes_are_the_constants(path: Path) -> None:
    scripts = {
        "stage1": ("ssl_swav2D", "ssl_deepcluster2D"),
        "stage2": ("mask_swav", "mask_deepcluster"),
        "stage3": ("ssl_swav3D", "ssl_deepcluster3D"),
    }[path.stem]
    for script in scripts:
        config_class = importlib.import_module(script).Config
        chosen = options.parse(config_class, None, ["--config", str(path)])
        options.check(chosen)
        if path.parent.name == "100":
            default = config_class()
            assert options.to_dict(chosen) == options.to_dict(default)
