"""Cached embeddings change nothing but the time: batches, losses and weights are those of the epochs they stand for."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import losses, options, run, stop_after
from torch import Tensor

import mask_swav
from datasets.batch import Batch
from datasets.embeddings import EmbeddingLoader
from datasets.index import scan
from datasets.loaders import VolumeLoader
from datasets.store import unused_files
from objectives import MaskedSlices
from utils.distributed import Run

pytestmark = pytest.mark.usefixtures("one_thread")
JOINT = 4  # volumes per step over all processes
CPU = torch.device("cpu")


class Rows:
    """An embedder that any batch may call: 3 numbers of every slice, each from that slice alone."""

    def __init__(self, weights: str = "a") -> None:
        self.weights, self.calls = weights, 0

    def targets(self, views: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        numbers = torch.stack([views.mean(dim=(3, 4)), views.std(dim=(3, 4)), views.amax(dim=(3, 4))], dim=-1)
        return numbers * mask.unsqueeze(-1)

    def targets_digest(self) -> str:
        return self.weights


def loaders(
    place: Place, embedder: Any, rank: int = 0, world: int = 1, slices: int = 10, width: int = 24, **changes: Any
) -> tuple[VolumeLoader, EmbeddingLoader]:
    chosen = {"policy": "strong", "seed": 3, "precision": "fp32", "cached_views": 2, "d_model": 3} | changes
    chosen |= {"target_shape": [slices, 20, width], "batch_size": JOINT // world, "cache_path": str(place.cache)}
    cfg = mask_swav.Config(**options("mask_swav", place.data, place.cache, **chosen))
    plain = VolumeLoader(cfg, Run(rank, world, CPU), mask_ratio=0.2)
    return plain, EmbeddingLoader(plain, embedder, cfg)


class Place(NamedTuple):
    data: Path
    cache: Path


@pytest.fixture
def place(data: Path, tmp_path: Path) -> Place:
    """The tiny tree with a cache of its own."""
    return Place(data, tmp_path / "cache")


def cached(place: Place) -> list[Path]:
    return sorted(place.cache.glob("*/embeddings_*/*.npy"))


def same(found: Batch, expected: Batch) -> None:
    for name, value in expected._asdict().items():
        own = getattr(found, name)
        assert torch.equal(own, value) if isinstance(value, Tensor) else own == value, name


# ---- batches


def test_epochs_see_the_embeddings_of_their_version_and_masks_of_their_own(place):
    plain, loader = loaders(place, Rows())
    for epoch in range(5):
        version = {}
        for batch in plain.epoch(epoch % 2):
            embedded = Rows().targets(batch.views, batch.mask).unbind(1)
            version |= dict(zip(batch.index.tolist(), embedded, strict=True))
        for batch, expected in zip(loader.epoch(epoch), plain.epoch(epoch), strict=True):
            assert batch.views is batch.rows is None
            for name in ("mask", "index", "masked"):
                assert torch.equal(getattr(batch, name), getattr(expected, name))
            assert batch.counts == expected.counts
            targets = torch.stack([version[i] for i in batch.index.tolist()], dim=1)
            assert torch.equal(batch.targets, targets)
    assert len(cached(place)) == 2 * 8


def test_half_precision_is_stored_in_float16_which_holds_it(place):
    class Rounded(Rows):
        def targets(self, views: Tensor, mask: Tensor) -> Tensor:
            assert torch.is_autocast_enabled("cpu")
            return super().targets(views, mask).bfloat16().float()

    plain, loader = loaders(place, Rounded(), precision="bf16")
    for batch, expected in zip(loader.epoch(0), plain.epoch(0), strict=True):
        targets = Rows().targets(expected.views, expected.mask).bfloat16()
        assert batch.targets.dtype == torch.float16
        assert torch.equal(batch.targets.float(), targets.float())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_what_was_in_the_cache(workers, place):
    _, loader = loaders(place, Rows())
    expected = list(loader.epoch(1))
    files = cached(place)
    files[0].unlink()
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    files[2].write_bytes(b"")
    files[3].write_bytes(bytes(len(files[3].read_bytes())))
    before = {file: file.stat().st_mtime_ns for file in files[4:]}
    embedder = Rows()
    for found, batch in zip(loaders(place, embedder, workers=workers)[1].epoch(1), expected, strict=True):
        same(found, batch)
    assert embedder.calls == 4
    assert files[1].read_bytes() == whole
    assert before == {file: file.stat().st_mtime_ns for file in files[4:]}
    assert not list(place.cache.rglob(".*"))


def test_processes_fill_one_cache_and_share_it(place):
    expected = list(loaders(place, Rows())[1].epoch(0))
    shutil.rmtree(cached(place)[0].parent)
    embedders = Rows(), Rows()
    two = [loaders(place, embedders[rank], rank=rank, world=2)[1] for rank in range(2)]
    for *parts, batch in zip(*(loader.epoch(0) for loader in two), expected, strict=True):
        for name in ("index", "mask"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        for name in ("targets", "masked"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(batch, name))
    assert [embedder.calls for embedder in embedders] == [4, 4]
    other = Rows()
    list(loaders(place, other)[1].epoch(2))
    assert other.calls == 0


def test_what_embeddings_depend_on_names_their_folder(place):
    def folder(embedder: Any = None, **changes: Any) -> str:
        loader = loaders(place, embedder or Rows(), **changes)[1]
        next(loader.epoch(0))
        return loader.cache.folder.name

    changes = [{"slices": 9}, {"policy": "paper"}, {"seed": 4}, {"width": 20}, {"precision": "bf16"}]
    assert len({folder(), folder(Rows("b")), *(folder(**change) for change in changes)}) == 2 + len(changes)
    assert folder(cached_views=3) == folder(rank=1, world=2) == folder()
    samples = scan(place.data)[0]
    assert unused_files(samples, place.cache) == []
    unused = unused_files([replace(s, mtime_ns=1) if "case_3" in s.name else s for s in samples], place.cache)
    assert {file.parent.name.split("_")[0] for file in unused} == {"embeddings", "slices"}


# ---- runs


def losses_of(out: Path) -> list[tuple[float, float]]:
    return [(float(row["loss"]), float(row["interpolation"])) for row in losses(out / "runs" / "mask_swav")]


@pytest.mark.slow
def test_a_run_ends_with_the_same_bytes_with_and_without_a_cache_and_after_a_stop(data, tmp_path, monkeypatch):
    changes = {"epochs": 3, "cached_views": 2, "cache_path": str(tmp_path / "cache")}
    whole = run("mask_swav", data, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(MaskedSlices, "targets", lambda *_: pytest.fail("the cache was full"))
        again = run("mask_swav", data, tmp_path / "again", workers=2, **changes)
    shutil.rmtree(next((tmp_path / "cache").glob("*/embeddings_*")))
    with monkeypatch.context() as patch:
        stop_after(6, patch)  # in the middle of the second epoch
        with pytest.raises(SystemExit):
            run("mask_swav", data, tmp_path / "stopped", **changes)
    stopped = run("mask_swav", data, tmp_path / "stopped", **changes)
    for other in (again, stopped):
        assert whole.keys() == other.keys()
        assert all(torch.equal(other[name], value) for name, value in whole.items())
    found = losses_of(tmp_path / "whole")
    assert found == losses_of(tmp_path / "again") == losses_of(tmp_path / "stopped")

    run("mask_swav", data, tmp_path / "uncached", epochs=3)
    expected = losses_of(tmp_path / "uncached")
    # The last bits of the projection depend on how many slices it gets at once.
    assert found[:2] == [pytest.approx(row, rel=1e-5) for row in expected[:2]]
    assert found[2] != pytest.approx(expected[2], rel=5e-3)  # version 0 again
