"""What benchmarks share: the statistics that they report, and the parts of a step that they split."""

import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import estimate
import pytest
import torch

from benchmarks import constants, diagnostics, kmeans, memory, step, timing
from benchmarks.data import write_raw
from benchmarks.training import (
    Options,
    Training,
    file_name,
    joint_learner,
    recorded,
    shares,
    volume_loader,
    write_volumes,
)
from datasets.augment import MultiCrop
from datasets.loaders import ImageLoader, Slices
from datasets.store import prepare
from models.heads import ProjectionHead
from models.resnet import GreyResNet
from objectives import ImageClustering, SwAV
from training import memory as probes
from utils import config as options
from utils.distributed import Run
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
RUN = Run(0, 1, torch.device("cpu"))
PARTS = {"augment", "backward", "data", "diagnostics", "f_intra", "forward", "objective", "optimizer", "other"}


def test_pieces_take_turns_and_ratios_are_those_of_neighbours() -> None:
    order = []
    times = timing.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1)
    assert "".join(order) == "ab" + "abab"
    assert len(times["a"].seconds) == 2
    slow, fast = timing.Timing((2.0, 9.0, 4.0), (0.0,) * 3), timing.Timing((1.0, 3.0, 4.0), (0.0,) * 3)
    assert slow.ratios(fast) == (2.0, 3.0, 1.0)
    assert slow.over(fast) == 2.0
    assert timing.spread(slow.ratios(fast)) == 1.0
    assert timing.spread([5.0]) == 0.0


def test_memory_is_what_is_added_from_then_on() -> None:
    before = torch.ones(2**26)  # 256 MiB that come and go
    del before
    memory = kmeans.Memory(RUN.device)
    kept = torch.ones(2**24)
    if not kmeans.LINUX_PEAK.exists():
        pytest.skip("only Linux tells what was resident at most")
    assert memory.added() == pytest.approx(kept.nbytes, rel=0.2)


def test_some_parts_do_not_replace_the_results_of_all() -> None:
    assert timing.of_parts("step", ["stage3", "stage1", "ranks"], step.PARTS) == "step"
    assert timing.of_parts("step", ["ranks", "stage1", "stage3"], step.PARTS) == "step"
    assert timing.of_parts("step", ["stage3"], step.PARTS) == "step_stage3"
    assert timing.of_parts("step", ["ranks", "stage1"], step.PARTS) == "step_stage1_ranks"
    with pytest.raises(UserError, match="nothing is to be measured"):
        timing.of_parts("step", [], step.PARTS)
    assert timing.of_parts("check_estimate", ["stage2 cached"], ["stage1", "stage2 cached"]) == (
        "check_estimate_stage2_cached"
    )


def test_other_networks_and_views_do_not_replace_the_usual_results() -> None:
    assert file_name("step", step.Config()) == "step"
    assert file_name("step", step.Config(target_shape=[64, 128, 128], batch_size=3)) == "step"
    assert file_name("step", step.Config(arch="resnet18")) == "step_resnet18_64x128x128"
    assert file_name("step", step.Config(target_shape=(16, 32, 32))) == "step_resnet50_16x32x32"


def training_of(stage: int, root: Path) -> Training:
    torch.manual_seed(0)
    write_raw(root, (40, 40, 8), "int16", 2)
    if stage == 3:
        cfg = Options(device="cpu", arch="resnet18", target_shape=(8, 32, 32))
        return Training(joint_learner("resnet18", 5, 3), volume_loader(root, cfg, RUN, intra_slices=2), "fp32", RUN)
    samples, store = prepare(root, 40, progress=False)
    crops = MultiCrop([(32, 32)], [2], [(0.3, 1.0)], "strong", 0)
    encoder = GreyResNet("resnet18")
    learner = ImageClustering(encoder, ProjectionHead(encoder.num_features), SwAV(128, [5]))
    return Training(learner, ImageLoader(Slices(samples, store, 4), crops, 4, 0, 0, RUN), "fp32", RUN)


@pytest.mark.parametrize(("stage", "parts"), [(1, PARTS), (3, PARTS | {"f_inter"})])
def test_parts_of_a_step_add_up_to_it(stage: int, parts: set[str], tmp_path: Path) -> None:
    training = training_of(stage, tmp_path)
    weight = next(training.learner.encoder.parameters())
    before = weight.clone()
    step, calls = recorded(training.step, RUN.device)
    step()
    began = time.perf_counter()
    step()
    took = time.perf_counter() - began
    assert not torch.equal(weight, before)  # it trains
    assert [set(call) for call in calls] == [parts, parts]
    assert all(seconds > 0 for seconds in calls[1].values())
    assert 0.5 * took < sum(calls[1].values()) <= took
    split = shares(calls)
    assert list(split) == sorted(parts)
    assert sum(split.values()) == pytest.approx(1)


def test_a_step_does_what_training_does(tmp_path: Path) -> None:
    training = training_of(3, tmp_path)
    core = training.core
    training.step()
    training.step()
    assert core.inter.observer.seen == 2  # a volume in each step
    assert core.intra.observer.seen == 4
    assert training.sums.keys() == {"loss", "inter", "intra"}
    before = {name: value.clone() for name, value in core.state_dict().items()}
    training.batch["views"].fill_(float("nan"))
    training.step()  # is not applied
    after = core.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert all("prototypes" in name and after[name].isfinite().all() for name in moved)  # brought back to length 1


def test_an_epoch_holds_all_steps_of_a_measurement(tmp_path: Path) -> None:
    cfg = step.Config(parts=["stage3"], batch_size=2, images=64, repeats=3, steps=5, workers=2)
    volumes = step.volumes_of_an_epoch(cfg, RUN.device)
    # The batch ahead, warm-up and repeats; what workers read ahead, and one, before 5 steps; what they read meanwhile.
    assert volumes == 2 * (1 + (1 + 3) + (1 + 4) + 5 + 4)
    write_volumes(tmp_path, (40, 40, 4), volumes)
    loader = volume_loader(tmp_path, Options(device="cpu", target_shape=(4, 32, 32), batch_size=2), RUN)
    assert loader.steps == 19
    assert len({file.stat().st_ino for file in tmp_path.glob("Raw/*.npy")}) == 8


def test_without_packages_the_reference_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    assert step.missing().keys() == {"torchio", "deformable_attention"}
    monkeypatch.setitem(sys.modules, "torchio", None)  # an import of either would fail
    monkeypatch.setitem(sys.modules, "deformable_attention", None)
    cfg = step.Config(arch="resnet18", target_shape=(4, 32, 32), batch_size=2)
    for parts in (1, 2):
        step.plain_step(cfg, RUN.device, set(step.missing()), parts)()


def test_kmeans_of_other_sizes_has_a_file_of_its_own() -> None:
    usual = {"points": 10**5, "clusters": 3000, "dim": 640, "iterations": 3, "processes": 1}
    names = [
        kmeans.name_of(usual | changes, RUN.device)
        for changes in ({}, {"points": 10**4, "clusters": 300}, {"processes": 2}, {"dim": 128, "processes": 2})
    ]
    assert names == ["kmeans", "kmeans_10000x300", "kmeans_2_processes", "kmeans_100000x3000_2_processes"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_all_gpu_benchmarks_are_run_and_the_worst_status_is_that_of_all(tmp_path: Path) -> None:
    python, called = tmp_path / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\necho "$@" >> {called}\ncase "$2" in *kmeans) exit 3;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "-C", str(ROOT), "bench-gpu", f"PYTHON={python}"], capture_output=True, text=True)
    assert done.returncode
    assert "Error 3" in done.stderr
    calls = [line.split()[1:] for line in called.read_text().splitlines()]
    names = ["step", "attention", "kmeans", "stage2", "augmentation", "diagnostics", "step"]
    assert [name for name, *_ in calls] == [f"benchmarks.{name}" for name in names]
    for name, *arguments in calls:  # which they understand
        module = importlib.import_module(name)
        assert options.parse(module.Config, module.__doc__, arguments).device == "cuda"


def test_diagnostics_are_timed_with_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    tiny = {"arch": "resnet18", "target_shape": (8, 32, 32), "volumes": 8, "repeats": 2}
    diagnostics.main(diagnostics.Config(device="cpu", precision="fp32", **tiny))
    found = json.loads((tmp_path / "diagnostics_cpu.json").read_text())["results"]
    share = (found["observers"]["median_s"] + found["epoch_end"]["median_s"] / 8) / found["without"]["median_s"]
    assert found["share"] == pytest.approx(share)
    assert 0 < found["observers"]["median_s"] < found["with"]["median_s"]  # they are part of it
    assert found["prototypes"] == {"intra": 16, "inter": 6}


def test_gpu_benchmarks_need_only_what_training_needs() -> None:
    """bench-gpu's modules load, and k-means runs, where nothing else is installed."""
    absent = ["scipy", "faiss", "torchio", "deformable_attention", "monai", "nibabel", "sklearn", "matplotlib", "timm"]
    modules = ["attention", "kmeans", "stage2", "augmentation", "diagnostics", "step", "constants", "memory"]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({absent}))
for name in {modules}:
    importlib.import_module("benchmarks." + name)
from benchmarks import kmeans, timing
timing.write = lambda *arguments: None
kmeans.main(kmeans.Config(device="cpu", points=64, clusters=4, dim=8, iterations=1, repeats=1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert "faiss is left out" in done.stdout
    assert "sparse matrices are left out" in done.stdout


def test_a_card_is_measured_only_between_batches_that_were_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "measure", lambda config, size, free: (1 + 2 * size) * probes.GIB)
    monkeypatch.setattr(probes, "free_memory", lambda device: 1e12)
    cfg = memory.Config(batches=[4, 8, 16], arch="resnet18", target_shape=(16, 32, 32))
    found = memory.one(3, "fp32", False, cfg, tmp_path, RUN.device)
    cards = {gib: tuple(card.values()) for gib, card in found["cards"].items()}
    assert cards[8] == (3, "extrapolated")
    assert cards[16] == (7, "measured")
    assert cards[24] == (11, "measured")
    assert cards[40] == (19, "extrapolated")


@pytest.mark.parametrize("side", [32, 64, 128, 224])
def test_images_of_the_constants_fit_a_gpu_of_80_gb(side: int) -> None:
    kept = constants.images_of(side, True) * estimate.resnet_activations("resnet50", side, side) / 2  # bf16
    assert kept < 30 * 2**30
