"""Cached embeddings change nothing but the time: batches, losses and weights are those of the epochs they stand for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import losses, run, stop_after, write_data
from torch import Tensor

from check_data import tidy_cache
from datasets.augment import VolumeViews
from datasets.batch import Batch
from datasets.embeddings import EmbeddingLoader
from datasets.index import scan
from datasets.loaders import VolumeLoader, VolumeWindows
from datasets.store import SliceStore, prepare, unused_files
from objectives import MaskedSlices
from utils.distributed import Run
from utils.errors import UserError
from utils.precision import Precision

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
    store: SliceStore,
    embedder: Any,
    versions: int = 2,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    slices: int = 10,
    policy: str = "strong",
    seed: int = 3,
    width: int = 24,
    precision: str = "fp32",
    temperature: float = 1,
) -> tuple[VolumeLoader, EmbeddingLoader]:
    plain = VolumeLoader(
        VolumeWindows(store.samples, store, slices, seed),
        VolumeViews(20, width, policy, seed),
        JOINT // world,
        workers,
        seed,
        Run(rank, world, CPU),
        mask_ratio=0.2,
        sampling_temperature=temperature,
    )
    return plain, EmbeddingLoader(plain, embedder, versions, 3, workers, Precision(precision, CPU))


@pytest.fixture
def store(data: Path, tmp_path: Path) -> SliceStore:
    """The tiny tree with a cache of its own."""
    return prepare(data, 30, tmp_path / "cache", progress=False)[1]


def cached(store: SliceStore) -> list[Path]:
    return sorted(store.folder.parent.glob("embeddings_*/*.npy"))


def same(found: Batch, expected: Batch) -> None:
    for name, value in expected._asdict().items():
        own = getattr(found, name)
        assert torch.equal(own, value) if isinstance(value, Tensor) else own == value, name


# ---- batches


@pytest.mark.parametrize("policy", ["paper", "strong"])
def test_epochs_see_the_embeddings_of_their_version_and_masks_of_their_own(policy, store):
    plain, loader = loaders(store, Rows(), policy=policy)
    for epoch in range(5):
        steps = 0
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
            steps += 1
        assert steps == loader.steps == 2
    assert len(cached(store)) == 2 * 8


def test_half_precision_is_stored_in_float16_which_holds_it(store):
    class Rounded(Rows):
        def targets(self, views: Tensor, mask: Tensor) -> Tensor:
            assert torch.is_autocast_enabled("cpu")
            return super().targets(views, mask).bfloat16().float()

    plain, loader = loaders(store, Rounded(), precision="bf16")
    for batch, expected in zip(loader.epoch(0), plain.epoch(0), strict=True):
        targets = Rows().targets(expected.views, expected.mask).bfloat16()
        assert batch.targets.dtype == torch.float16
        assert torch.equal(batch.targets.float(), targets.float())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_what_was_in_the_cache(workers, store):
    _, loader = loaders(store, Rows())
    expected = list(loader.epoch(1))
    files = cached(store)
    files[0].unlink()
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    files[2].write_bytes(b"")
    files[3].write_bytes(bytes(len(files[3].read_bytes())))
    flipped = bytearray(files[4].read_bytes())
    flipped[200] ^= 1
    files[4].write_bytes(flipped)
    before = {file: file.stat().st_mtime_ns for file in files[5:]}
    embedder = Rows()
    for found, batch in zip(loaders(store, embedder, workers=workers)[1].epoch(1), expected, strict=True):
        same(found, batch)
    assert embedder.calls == 5
    assert files[1].read_bytes() == whole
    assert before == {file: file.stat().st_mtime_ns for file in files[5:]}
    assert not list(store.folder.parent.rglob("*.tmp"))


def test_processes_fill_one_cache_and_share_it(store):
    expected = list(loaders(store, Rows())[1].epoch(0))
    shutil.rmtree(cached(store)[0].parent)
    embedders = Rows(), Rows()
    two = [loaders(store, embedders[rank], rank=rank, world=2)[1] for rank in range(2)]
    for *parts, batch in zip(*(loader.epoch(0) for loader in two), expected, strict=True):
        for name in ("index", "mask"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        for name in ("targets", "masked"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(batch, name))
    assert [embedder.calls for embedder in embedders] == [4, 4]
    other = Rows()
    list(loaders(store, other)[1].epoch(2))
    assert other.calls == 0


def test_what_embeddings_depend_on_names_their_folder(store):
    def folder(embedder: Any = None, **changes: Any) -> str:
        loader = loaders(store, embedder or Rows(), **changes)[1]
        next(loader.epoch(0))
        return loader.cache.folder.name

    changes = [{"slices": 9}, {"policy": "paper"}, {"seed": 4}, {"width": 20}, {"precision": "bf16"}]
    assert len({folder(), folder(Rows("b")), *(folder(**change) for change in changes)}) == 2 + len(changes)
    assert folder(versions=3) == folder(workers=2) == folder(rank=1, world=2) == folder()


# ---- files


def test_a_disk_without_room_and_a_folder_that_cannot_be_made_are_the_users_to_put_right(store, monkeypatch):
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"cached_views: 2 versions of 8 volumes need .* lower --cached_views"):
            next(loaders(store, Rows())[1].epoch(0))
    _, loader = loaders(store, Rows())
    next(loader.epoch(0))
    shutil.rmtree(loader.cache.folder)
    loader.cache.folder.write_bytes(b"a file in its place")
    with pytest.raises(UserError, match=r"cannot be written .*--cache_path"):
        next(loaders(store, Rows())[1].epoch(0))


def test_check_data_knows_embeddings_of_volumes_that_have_changed(tmp_path, capsys):
    root = write_data(tmp_path / "data")
    store = prepare(root, 30, progress=False)[1]
    list(loaders(store, Rows())[1].epoch(0))
    assert unused_files(scan(root)) == []
    changed = root / "Volumes" / "case_3.npy"
    os.utime(changed, ns=(1, 1))
    unused = unused_files(scan(root))
    assert sorted(file.parent.name.split("_")[0] for file in unused) == ["embeddings", "slices"]
    tidy_cache(unused, delete=True)
    assert "2 working copies" in capsys.readouterr().out
    assert len(cached(store)) == 7


# ---- runs


@pytest.fixture(scope="module")
def uncached(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uncached")
    run("mask_swav", data, out, epochs=3)
    return out


def losses_of(out: Path) -> list[tuple[float, float]]:
    return [(float(row["loss"]), float(row["interpolation"])) for row in losses(out / "runs" / "mask_swav")]


def test_the_first_n_epochs_have_the_losses_of_a_run_without_cache(uncached, data, tmp_path):
    run("mask_swav", data, tmp_path, epochs=3, cached_views=2, cache_path=str(tmp_path / "cache"))
    found, expected = losses_of(tmp_path), losses_of(uncached)
    # The last bits of the projection depend on how many slices it gets at once.
    assert found[:2] == [pytest.approx(row, rel=1e-5) for row in expected[:2]]
    assert found[2] != pytest.approx(expected[2], rel=5e-3)  # version 0 again


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
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "again") == losses_of(tmp_path / "stopped")
