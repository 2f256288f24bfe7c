"""Batches are the same, bit for bit, whatever the workers, the processes and the place where a run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets.augment import MultiCrop, VolumeViews
from datasets.batch import Batch
from datasets.loaders import ImageLoader, Slices, VolumeLoader, VolumeWindows
from datasets.store import SliceStore, prepare
from utils.distributed import Run

pytestmark = pytest.mark.usefixtures("one_thread")
POLICIES = ("paper", "strong")
JOINT = 8  # samples per step over all processes


def volume_loader(store: SliceStore, policy: str, workers: int = 0, rank: int = 0, world: int = 1) -> VolumeLoader:
    return VolumeLoader(
        VolumeWindows(store.samples, store, 10, seed=3),
        VolumeViews(24, 20, policy, seed=3),
        JOINT // world,
        workers,
        3,
        Run(rank, world, torch.device("cpu")),
        mask_ratio=0.2,
        intra_slices=3,
        images_per_step=4 // world,
        image_views=MultiCrop([(24, 24)], [2], [(0.3, 1.0)], policy, seed=3),
        sampling_temperature=2,
    )


def image_loader(store: SliceStore, policy: str, workers: int = 0, rank: int = 0, world: int = 1) -> ImageLoader:
    crops = MultiCrop([(24, 24), (12, 12)], [2, 2], [(0.3, 1.0), (0.1, 0.3)], policy, seed=3)
    run = Run(rank, world, torch.device("cpu"))
    return ImageLoader(Slices(store.samples, store, per_volume=2), crops, JOINT // world, workers, 3, run)


def tensors(batch: Batch) -> dict[str, Tensor]:
    """What a learner gets, with the samples of the batch along axis 0 (views and crops along axis 1)."""
    if batch.mask is not None:
        assert torch.equal(batch.rows, batch.mask.flatten().nonzero().squeeze(1))
    flat = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor) and name != "rows"}
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
def mixed(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    """Twenty small volumes, two large ones, six images: three data sets of very different shape and size."""
    root, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for name, count, (low, high) in (("small", 20, (24, 50)), ("large", 2, (90, 120)), ("images", 6, (100, 140))):
        (root / name).mkdir()
        for i in range(count):
            shape = rng.integers(low, high, 3)
            if name == "images":
                pixels = rng.integers(0, 255, shape[:2], dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"image_{i}.png")
            else:
                np.save(root / name / f"case_{i}.npy", rng.normal(size=shape).astype(np.float32))
    return prepare(root, 30, progress=False)[1]


@pytest.fixture(scope="module")
def small(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    """The tiny tree, whose 8 volumes make one step."""
    return prepare(data, 30, tmp_path_factory.mktemp("cache"), progress=False)[1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [volume_loader, image_loader])
@pytest.mark.parametrize("data_set", ["small", "mixed"])
def test_batches_do_not_depend_on_the_processes(data_set: str, make: Any, policy: str, request) -> None:
    store = request.getfixturevalue(data_set)
    expected = [joined([batch]) for batch in make(store, policy).epoch(2)]
    assert len(expected) >= (3 if data_set == "mixed" else 1)
    for world in (2, 4):
        loaders = [make(store, policy, rank=r, world=world) for r in range(world)]
        steps = list(zip(*(loader.epoch(2) for loader in loaders), strict=True))
        for parts in steps:
            assert all(part.counts == parts[0].counts for part in parts)
            assert [len(part.index) for part in parts] == parts[0].counts
        same(map(joined, steps), expected)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("make", [volume_loader, image_loader])
def test_batches_do_not_depend_on_the_workers(workers: int, make: Any, small: SliceStore) -> None:
    expected = [joined([batch]) for batch in make(small, "strong").epoch(1)]
    loader = make(small, "strong", workers=workers)
    same((joined([batch]) for batch in loader.epoch(1)), expected)
    same((joined([batch]) for batch in loader.epoch(1)), expected)  # workers that live on begin anew


@pytest.mark.parametrize("make", [volume_loader, image_loader])
def test_an_epoch_goes_on_in_the_middle(make: Any, mixed: SliceStore) -> None:
    loader = make(mixed, "strong")
    whole = [joined([batch]) for batch in loader.epoch(1)]
    places = [seen for seen, _ in loader.batches.plan()]
    for step in (1, len(places) - 1):
        same((joined([batch]) for batch in loader.epoch(1, places[step])), whole[step:])
    other = [joined([batch]) for batch in loader.epoch(2)]
    assert not torch.equal(other[0]["index"], whole[0]["index"])


def test_images_of_a_step_follow_those_of_the_step_before(mixed: SliceStore) -> None:
    loader = volume_loader(mixed, "paper")
    shown = torch.cat([batch.image_index for batch in loader.epoch(0)]) - loader.total_slices
    assert len(shown) == 4 * loader.steps
    for start in range(0, len(shown) - 5, 6):
        assert sorted(shown[start : start + 6].tolist()) == list(range(6))  # pass after pass


def test_names_are_those_of_the_files_that_the_batch_holds(small: SliceStore) -> None:
    loader = volume_loader(small, "paper")
    batch = next(loader.epoch(0))
    names = loader.names(batch.index, batch.image_index)
    assert sorted(Path(n).name for n in names[:JOINT]) == [f"case_{i}.npy" for i in range(8)]
    assert sorted(Path(n).name for n in names[JOINT:]) == [f"image_{i}.png" for i in range(4)]
    assert all(" slice " in n or n.endswith(".png") for n in image_loader(small, "paper").names(batch.index))
