"""Batches are the same, bit for bit, whatever the workers, the processes and the place where a run goes on."""

from __future__ import annotations

import resource
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import options, save
from torch import Tensor

import ssl_swav2D
import ssl_swav3D
from datasets.batch import Batch
from datasets.loaders import ImageLoader, VolumeLoader, VolumeWindows
from datasets.samplers import CyclingBatches, EpochBatches
from utils.distributed import Run
from utils.errors import UserError
from utils.seeding import FILLING

pytestmark = pytest.mark.usefixtures("one_thread")
JOINT = 8  # samples per step over all processes


def volume_loader(root: Path, policy: str, workers: int = 0, rank: int = 0, world: int = 1) -> VolumeLoader:
    changes = {"target_shape": [10, 24, 20], "sampling_temperature": 2.0, "batch_size": JOINT // world, "seed": 3}
    chosen = options("ssl_swav3D", root, root, policy=policy, workers=workers, **changes)
    parts = {"mask_ratio": 0.2, "intra_slices": 3, "images_per_step": 4 // world, "min_scale_images": 0.3}
    return VolumeLoader(ssl_swav3D.Config(**chosen), Run(rank, world, torch.device("cpu")), **parts)


def image_loader(root: Path, policy: str, workers: int = 0, rank: int = 0, world: int = 1) -> ImageLoader:
    changes = {"size_crops": [24, 12], "nmb_crops": [2, 2], "batch_size": JOINT // world, "seed": 3}
    chosen = options("ssl_swav2D", root, root, policy=policy, workers=workers, **changes)
    return ImageLoader(ssl_swav2D.Config(**chosen), Run(rank, world, torch.device("cpu")))


def tensors(batch: Batch) -> dict[str, Tensor]:
    """What a learner gets, with the samples of the batch along axis 0 (views and crops along axis 1)."""
    if batch.mask is not None:
        assert torch.equal(batch.rows, batch.mask.flatten().nonzero().squeeze(1))
    flat = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor) and name != "rows"}
    for name in ("place", "group") if batch.slice_index is not None else ():  # each process has slices, then images
        of_slices, of_images = flat.pop(name).tensor_split([len(batch.slice_index)])
        flat |= {f"{name} of slices": of_slices, f"{name} of images": of_images}
    flat |= {f"crops {i}": crop.transpose(0, 1) for i, crop in enumerate(batch.crops or [])}
    return {
        name: value.transpose(0, 1) if name in ("views", "masked", "images") else value for name, value in flat.items()
    }


def joined(parts: Sequence[Batch]) -> dict[str, Tensor]:
    """The global batch from those of all processes."""
    shares = [tensors(part) for part in parts]
    return {name: torch.cat([share[name] for share in shares]) for name in shares[0]}


def same(found: Iterator[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), (step, name)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small volumes, two large ones, six images: three data sets of very different shape and size."""
    root, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for name, count, (low, high) in (("small", 20, (24, 50)), ("large", 2, (90, 120)), ("images", 6, (100, 140))):
        for i in range(count):
            shape = rng.integers(low, high, 3)
            if name == "images":
                save(root / name / f"image_{i}.png", rng.integers(0, 255, shape[:2], dtype=np.uint8))
            else:
                save(root / name / f"case_{i}.npy", rng.normal(size=shape).astype(np.float32))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "policy"), [(volume_loader, "paper"), (volume_loader, "strong"), (image_loader, "strong")]
)
def test_batches_do_not_depend_on_the_processes(make: Any, policy: str, mixed: Path) -> None:
    expected = [joined([batch]) for batch in make(mixed, policy).epoch(2)]
    assert len(expected) >= 3
    for world in (2, 4):
        loaders = [make(mixed, policy, rank=r, world=world) for r in range(world)]
        steps = list(zip(*(loader.epoch(2) for loader in loaders), strict=True))
        for parts in steps:
            assert all(part.counts == parts[0].counts for part in parts)
            assert [len(part.index) for part in parts] == parts[0].counts
        same(map(joined, steps), expected)


@pytest.mark.parametrize("make", [volume_loader, image_loader])
def test_batches_do_not_depend_on_the_workers(make: Any, data: Path) -> None:
    expected = [joined([batch]) for batch in make(data, "strong").epoch(1)]
    loader = make(data, "strong", workers=2)
    same((joined([batch]) for batch in loader.epoch(1)), expected)
    same((joined([batch]) for batch in loader.epoch(1)), expected)  # workers that live on begin anew


@pytest.mark.parametrize("make", [volume_loader, image_loader])
def test_an_epoch_goes_on_in_the_middle(make: Any, mixed: Path) -> None:
    loader = make(mixed, "strong")
    whole = [joined([batch]) for batch in loader.epoch(1)]
    places = [seen for seen, _ in loader.batches.plan()]
    for step in (1, len(places) - 1):
        same((joined([batch]) for batch in loader.epoch(1, places[step])), whole[step:])
    other = [joined([batch]) for batch in loader.epoch(2)]
    assert not torch.equal(other[0]["index"], whole[0]["index"])


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "disk_usage",
            SimpleNamespace(free=10**5),
            r"MB of shared memory, but .* has 0\.1 MB free.*--workers 0",
        ),
        ("getrlimit", (64, 64), r"need about 96 open files, but the limit is 64.*ulimit"),
    ],
)
def test_too_little_room_for_workers_is_said_before_they_start(name, value, says, data, monkeypatch) -> None:
    monkeypatch.setattr(shutil if name == "disk_usage" else resource, name, lambda _: value)
    volume_loader(data, "strong")
    with pytest.raises(UserError, match=says):
        volume_loader(data, "strong", workers=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (UserError("a.npy: is damaged; copy it again"), "^a.npy: is damaged; copy it again$"),
        (RuntimeError("unable to allocate shared memory(shm)"), "^workers: .*shared memory.*--shm-size"),
        (OSError(24, "Too many open files"), "^workers: .*Too many open files.*ulimit -n"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_one_line(error, says, data, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    loader = volume_loader(data, "strong", workers=1)
    monkeypatch.setattr(VolumeWindows, "__getitem__", fail)
    with pytest.raises(UserError, match=says) as caught:
        next(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_masking_needs_volumes_of_several_slices(tmp_path: Path, capsys) -> None:
    for i in range(JOINT):
        save(tmp_path / f"a/{i}.npy", np.random.default_rng(i).random((16, 16, 1)))
    with pytest.raises(UserError, match="all 8 volumes have a single slice"):
        volume_loader(tmp_path, "strong")
    save(tmp_path / "a/8.npy", np.random.default_rng(9).random((16, 16, 4)))
    volume_loader(tmp_path, "strong")
    assert "8 of 9 volumes have a single slice" in capsys.readouterr().out


# --- samplers: nothing lost, nothing twice, the same whatever the processes and stops


def run(rank: int, world: int) -> Run:
    return Run(rank, world, torch.device("cpu"))


def samplers(samples: int, batch_size: int, world: int, seed: int = 3) -> list[EpochBatches]:
    return [EpochBatches([0] * samples, batch_size, seed, run(r, world)) for r in range(world)]


def drawn(batches: EpochBatches, epoch: int, seen: int = 0) -> list[list[int]]:
    """Indices of every step of one process."""
    batches.begin(epoch, seen)
    steps = list(batches)
    assert len(steps) == len(batches) == batches.steps_after(seen)
    return [[i for _, i in step] for step in steps]


def joint(several: list[EpochBatches], epoch: int, seen: int = 0) -> list[list[int]]:
    """Indices of every global batch."""
    return [list(chain(*shares)) for shares in zip(*(drawn(b, epoch, seen) for b in several), strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [24, 25, 47])
def test_an_epoch_holds_every_sample_exactly_once(samples: int, world: int) -> None:
    several = samplers(samples, 12 // world, world)
    for epoch in (0, 5):
        batches = joint(several, epoch)
        assert sorted(chain(*batches)) == list(range(samples))
        assert len(batches) == -(-samples // 12)
        sizes = [len(batch) for batch in batches]
        assert max(sizes) <= 12
        assert max(sizes) - min(sizes) <= 1
        shares = [[len(share) for share in drawn(b, epoch)] for b in several]
        assert np.ptp(shares, axis=0).max() <= 1
        assert np.min(shares) >= 1
        assert shares == [[counts[r] for _, counts in several[0].plan()] for r in range(world)]


@pytest.mark.parametrize("samples", [25, 47, 64])
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (1, 3), (3, 1)])
def test_another_number_of_processes_goes_on_in_the_same_order(samples: int, before: int, after: int) -> None:
    first, second = samplers(samples, 3, before), samplers(samples, 3, after)
    order = list(first[0].order(7))
    for seen, _ in list(first[0].plan())[1:]:
        rest = list(chain(*joint(second, 7, seen)))
        left_out = samples - seen - len(rest)
        assert rest == order[seen : samples - left_out]
        assert left_out == 0 or samples - seen < after  # too few for one each
        assert 0 <= second[0].step_at(seen) <= second[0].steps


def test_too_few_samples_and_a_temperature_below_one_are_errors() -> None:
    with pytest.raises(UserError, match=r"4 per process x 3 process\(es\) need 12 samples.*hold 11"):
        samplers(11, 4, 3)
    with pytest.raises(UserError, match="there are no volumes"):
        EpochBatches([], 4, 0, run(0, 1), "volumes")
    with pytest.raises(UserError, match=r"^sampling_temperature: .* is below 1"):
        EpochBatches([0] * 8, 8, 3, run(0, 1), sampling_temperature=0.99)


GROUPS = ["small"] * 4 + ["large"] * 400 + ["middle"] * 40  # 444 samples


@pytest.mark.parametrize(
    ("temperature", "shares"),
    # 4, 400 and 40 to the power of 1 / T, as shares of 444; at T = 2: 2, 20 and 6.32 of 28.32.
    [(1, (4, 400, 40)), (2, (31, 314, 99)), (1e12, (148, 148, 148))],
)
def test_the_temperature_balances_data_sets(temperature: float, shares: tuple[int, ...]) -> None:
    several = [EpochBatches(GROUPS, 8, 3, run(r, 2), "volumes", temperature) for r in range(2)]
    for epoch in range(3):
        indices = list(chain(*joint(several, epoch)))
        counts = Counter(GROUPS[i] for i in indices)
        assert tuple(counts[name] for name in ("small", "large", "middle")) == shares


def test_balanced_data_sets_take_their_samples_in_turns() -> None:
    batches = EpochBatches(GROUPS, 8, 3, run(0, 1), sampling_temperature=2)
    total: Counter[int] = Counter()
    for epoch in range(40):
        total.update(chain(*drawn(batches, epoch)))
        for name in set(GROUPS):  # no sample comes again before every other of its data set
            times = [total[i] for i, group in enumerate(GROUPS) if group == name]
            assert max(times) - min(times) <= 1
    assert min(total[i] for i in range(len(GROUPS))) > 0


def test_the_pass_that_fills_a_memory_bank_sees_every_sample_however_data_sets_are_balanced() -> None:
    batches = EpochBatches(GROUPS, 8, 3, run(0, 1), sampling_temperature=5)
    assert sorted(chain(*drawn(batches, FILLING))) == list(range(len(GROUPS)))


@pytest.mark.parametrize(("samples", "steps"), [(7, 5), (3, 4), (50, 6)])
def test_cycling_batches_pass_over_all_samples_again_and_again(samples: int, steps: int) -> None:
    def cycling(rank: int, world: int, batch_size: int, epoch: int, first_step: int = 0) -> list[list[int]]:
        passes = EpochBatches([0] * samples, 1, 3, run(0, 1))
        batches = CyclingBatches(passes, batch_size, run(rank, world), steps)
        batches.begin(epoch, first_step)
        return [[i for _, i in step] for step in batches]

    alone = [cycling(0, 1, 4, epoch) for epoch in range(4)]
    indices = list(chain(*chain(*alone)))
    assert len(indices) == 4 * steps * 4
    for start in range(0, len(indices) - samples + 1, samples):
        assert sorted(indices[start : start + samples]) == list(range(samples))
    for epoch in range(4):
        shares = [cycling(r, 2, 2, epoch) for r in range(2)]
        assert [list(chain(*step)) for step in zip(*shares, strict=True)] == alone[epoch]
        assert cycling(1, 2, 2, epoch, 2) == shares[1][2:]
