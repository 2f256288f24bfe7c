"""What benchmarks share: fair timing, a file per machine, updates as in training; and that each of them runs."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import common, data, step
from utils import config as options

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_pieces_take_turns_and_ratios_are_those_of_neighbours(monkeypatch):
    order = []
    work = {name: lambda name=name: order.append(name) for name in ("slow", "fast")}
    ticks = iter([0, 9, 9, 10, 0, 2, 2, 3, 3, 12, 12, 15, 15, 19, 19, 23])  # slow takes 9, 2, 9, 4 s, fast 1, 1, 3, 4
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(ticks))
    found = common.compare(work, 3, pairs=[("slow", "fast")])
    assert order == ["slow", "fast"] * 4
    assert found["slow over fast"] == 2.0  # of 2, 3 and 1
    assert found["slow"] == {"median_s": 4.0, "iqr_s": 3.5, "repeats": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "changes", "expected"),
    [
        (step, {"arch": "resnet18", "target_shape": (8, 32, 32), "images": 2, "volumes": 2}, "stage2"),
        (data, {"target_shape": (4, 16, 16), "volumes": 4, "workers": (0,)}, "loader"),
    ],
)
def test_a_benchmark_runs_and_writes_its_results(module, changes, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(data, "RAW", {"24 x 24 x 8 int16": ((24, 24, 8), "int16")})
    module.main(module.Config(**changes, device="cpu", repeats=1))
    (file,) = tmp_path.iterdir()
    (entry,) = json.loads(file.read_text()).values()
    assert expected in entry["results"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_all_gpu_benchmarks_are_run_and_the_worst_status_is_that_of_all(tmp_path):
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\necho "$@" >> {called}\ncase "$2" in *data) exit 3;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "-C", str(ROOT), "bench-gpu", f"PYTHON={python}"], capture_output=True, text=True)
    assert done.returncode
    assert "Error 3" in done.stderr
    calls = [line.split()[1:] for line in called.read_text().splitlines()]
    names = ["step", "step", "data", "step"]
    assert [name for name, *_ in calls] == [f"benchmarks.{name}" for name in names]
    for name, *arguments in calls:  # which they understand
        module = importlib.import_module(name)
        assert options.parse(module.Config, module.__doc__, arguments).device == "cuda"
