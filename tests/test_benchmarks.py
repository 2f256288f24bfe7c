"""What benchmarks share: the statistics that they report, and the parts of a step that they split."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import diagnostics, timing
from benchmarks.data import write_raw
from benchmarks.training import Options, Training, joint_learner, recorded, shares, volume_loader
from datasets.augment import MultiCrop
from datasets.loaders import ImageLoader, Slices
from datasets.store import prepare
from models.heads import ProjectionHead
from models.resnet import GreyResNet
from objectives import ImageClustering, SwAV
from utils.distributed import Run

RUN = Run(0, 1, torch.device("cpu"))
PARTS = {"augmentation", "backward", "data wait", "f_intra", "objective", "optimiser", "other"}


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


def test_diagnostics_are_timed_with_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    tiny = {"arch": "resnet18", "target_shape": (8, 32, 32), "volumes": 8, "repeats": 2}
    diagnostics.main(diagnostics.Config(device="cpu", precision="fp32", **tiny))
    found = json.loads((tmp_path / "diagnostics_cpu.json").read_text())["results"]
    share = (found["observers"]["median_s"] + found["epoch_end"]["median_s"] / 8) / found["without"]["median_s"]
    assert found["share"] == pytest.approx(share)
    assert 0 < found["observers"]["median_s"] < found["with"]["median_s"]  # they are part of it
    assert found["prototypes"] == {"intra": 16, "inter": 6}
