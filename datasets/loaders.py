"""Batches of each stage: order, reading in workers, augmentation on the device.

A loader has `samples` and `steps` (per epoch, of all processes) and `epoch(e, seen)`, which yields the keyword
arguments of the stage's learner from the place where all processes together have seen `seen` samples of the epoch.
What it yields is a pure function of (data, options, e, seen): nothing depends on the number of workers, and a run can
go on anywhere.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.augment import MultiCrop, VolumeViews
from datasets.index import Sample, slice_offsets, volumes
from datasets.masks import draw_masks
from datasets.store import SliceStore, prepare
from datasets.transforms import upload
from utils import guards, signals
from utils.distributed import Run
from utils.errors import UserError
from utils.seeding import FILLING, INTRA_SLICES, SHARED, SHUFFLE, SHUFFLE_DATASET, WINDOW, stream

Key = tuple[int, int]  # (epoch, index): all that a data set needs to know to return a sample


def canvas_size(*sides: int) -> int:
    """Side of the square that the store keeps per slice: a quarter more than a view, so that crops can move."""
    return round(1.25 * max(sides))


class EpochBatches:
    """Batch sampler: every epoch a new order of the samples, cut into joint batches that are dealt to the processes.

    groups: the data set of each sample, any hashable.  batch_size: most samples per process and step.
    sampling_temperature: T >= 1, a data set of n samples gets a share of the epoch proportional to n ** (1 / T). With
    1 every sample stands exactly once in an epoch; with more, small data sets repeat and large ones take turns, and an
    epoch has as many samples as before.

    Epochs need not divide by the joint batch: its batches differ by at most one sample, and so do the shares of the
    processes in a batch. The place in an epoch is the number of samples `seen` by all processes, from which everything
    that follows is computed, so a run can go on there with any number of processes: in the same order, every sample
    once. (Only where fewer samples are left than there are processes, and with one sample per process and step, are
    those left out of this epoch.)
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        batch_size: int,
        seed: int,
        run: Run,
        what: str = "samples",
        sampling_temperature: float = 1.0,
    ) -> None:
        joint = batch_size * run.world_size
        if not sampling_temperature >= 1:
            raise UserError(f"sampling_temperature: {sampling_temperature:g} is below 1, every sample once; raise it")
        if not len(groups):
            raise UserError(f"data_path: there are no {what} in it, which this stage trains on")
        if len(groups) < joint:
            raise UserError(
                f"batch_size: {batch_size} per process x {run.world_size} process(es) need {joint} {what}, but the "
                f"data hold {len(groups)}; lower --batch_size, start fewer processes or add data"
            )
        self.samples, self.joint, self.seed, self.run = len(groups), joint, seed, run
        self.members = _members(groups)
        self.quotas = _quotas([len(m) for m in self.members], sampling_temperature)
        self.steps = self.steps_after(0)
        self.epoch, self.seen = 0, 0
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        """[samples] indices of an epoch: each data set's own endless sequence of shuffled passes, cut and mixed."""
        rng = stream(self.seed, epoch, 0, 0, SHUFFLE)
        # The pass that fills a memory bank needs every sample.
        if epoch == FILLING or self.quotas == [len(m) for m in self.members]:
            return rng.permutation(self.samples)
        parts = [
            _cut(members, epoch * quota, quota, self.seed, k)
            for k, (members, quota) in enumerate(zip(self.members, self.quotas, strict=True))
        ]
        return rng.permutation(np.concatenate(parts))

    def steps_after(self, seen: int) -> int:
        """Steps that the rest of an epoch takes after `seen` of its samples."""
        left = self.samples - seen
        steps = -(-left // self.joint)
        enough = steps > 0 and left // steps >= self.run.world_size  # one for every process
        return steps if enough else left // self.joint

    def step_at(self, seen: int) -> int:
        """How many steps, as this number of processes would count them, lie before this place of an epoch."""
        return self.steps - self.steps_after(seen)

    def plan(self, seen: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(samples seen before the batch, samples of each process in it) for the rest of an epoch."""
        world = self.run.world_size
        for steps in range(self.steps_after(seen), 0, -1):
            size = min(self.joint, -(-(self.samples - seen) // steps))
            yield seen, [size * (r + 1) // world - size * r // world for r in range(world)]
            seen += size

    def __iter__(self) -> Iterator[list[Key]]:
        order, rank = self.order(self.epoch), self.run.rank
        for seen, counts in self.plan(self.seen):
            first = seen + sum(counts[:rank])
            yield [(self.epoch, int(i)) for i in order[first : first + counts[rank]]]

    def __len__(self) -> int:
        return self.steps_after(self.seen)


class CyclingBatches:
    """Batch sampler for what accompanies an epoch: `batch_size` samples per process and step, pass after pass.

    Arguments as in `EpochBatches`; steps: of an epoch.
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        batch_size: int,
        seed: int,
        run: Run,
        steps: int,
        sampling_temperature: float = 1.0,
    ) -> None:
        self.batch_size, self.run, self.steps = batch_size, run, steps
        alone = Run(0, 1, run.device)
        self.passes = EpochBatches(groups, 1, seed, alone, sampling_temperature=sampling_temperature)
        self.epoch, self.first_step = 0, 0

    def __iter__(self) -> Iterator[list[Key]]:
        joint, samples = self.batch_size * self.run.world_size, self.passes.samples
        for step in range(self.first_step, self.steps):
            start = (self.epoch * self.steps + step) * joint + self.run.rank * self.batch_size
            places = range(start, start + self.batch_size)
            yield [(self.epoch, int(self.passes.order(p // samples)[p % samples])) for p in places]

    def __len__(self) -> int:
        return self.steps - self.first_step


def _members(groups: Sequence[Hashable]) -> list[np.ndarray]:
    """Indices of each group, groups in the order in which they first appear."""
    found: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return [np.array(indices) for indices in found.values()]


def _quotas(sizes: list[int], temperature: float) -> list[int]:
    """Samples of each data set in an epoch of sum(sizes) samples, in proportion to size ** (1 / temperature)."""
    weights = np.array(sizes, dtype=float) ** (1 / temperature)
    wanted = weights / weights.sum() * sum(sizes)
    quotas = np.floor(wanted + 1e-6).astype(int)
    # What rounding down left over goes to the largest remainders, the first one where they are equal.
    behind = np.argsort(-(wanted - quotas), kind="stable")[: sum(sizes) - quotas.sum()]
    quotas[behind] += 1
    return quotas.tolist()


def _cut(members: np.ndarray, start: int, count: int, seed: int, group: int) -> np.ndarray:
    """Places start to start + count - 1 of the endless sequence of shuffled passes over a data set."""
    n = len(members)
    first, last = start // n, (start + count - 1) // n
    passes = [members[stream(seed, p, group, 0, SHUFFLE_DATASET).permutation(n)] for p in range(first, last + 1)]
    return np.concatenate([members[:0], *passes])[start - first * n :][:count]


class Slices(Dataset):
    """2D samples: every image, and `per_volume` evenly spaced slices of every volume (0: all of them, None: none).

    (epoch, index) -> image [S, S] float16, extent [2] (height and width of its content), index.
    """

    def __init__(self, samples: list[Sample], store: SliceStore, per_volume: int | None) -> None:
        self.samples, self.store = samples, store
        parts = []
        for i, sample in enumerate(samples):
            if sample.kind == "volume" and per_volume is None:
                continue
            count = min(per_volume or sample.slices, sample.slices)
            # Centres of `count` equal parts, so the ends of a volume, often empty, are not preferred.
            places = ((np.arange(count) + 0.5) * sample.slices / count).astype(np.int32)
            parts.append(np.stack((np.full_like(places, i), places), axis=1))
        self.items = np.concatenate([np.empty((0, 2), np.int32), *parts])  # sample, slice

    @property
    def groups(self) -> list[str]:
        """The data set of every item."""
        return [self.samples[i].dataset for i in self.items[:, 0].tolist()]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        _, index = key
        i, s = self.items[index].tolist()
        image = torch.from_numpy(self.store.read(i, s, s + 1, half=True)[0])
        return {"image": image, "extent": torch.from_numpy(self.store.extents[i].astype(np.int64)), "index": index}

    def name(self, index: int) -> str:
        i, s = self.items[index].tolist()
        return f"{self.samples[i].path}" + (f" slice {s}" if self.samples[i].kind == "volume" else "")


class VolumeWindows(Dataset):
    """3D samples: `slices` neighbouring slices of a volume from a random start, padded at the end where it has fewer.

    (epoch, index) -> volume [D, S, S] float16, length (real slices), start (of the window), extent [2], index over the
    volumes of all data sets.
    """

    def __init__(self, samples: list[Sample], store: SliceStore, slices: int, seed: int) -> None:
        self.samples, self.store, self.slices, self.seed = samples, store, slices, seed
        self.items = volumes(samples)

    @property
    def groups(self) -> list[str]:
        """The data set of every item."""
        return [self.samples[i].dataset for i in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        i = self.items[index]
        total = self.samples[i].slices
        length = min(total, self.slices)
        start = int(stream(self.seed, epoch, index, SHARED, WINDOW).integers(total - length + 1))
        window = torch.from_numpy(self.store.read(i, start, start + length, half=True))
        volume = window.new_zeros(self.slices, *window.shape[1:])
        volume[:length] = window
        extent = torch.from_numpy(self.store.extents[i].astype(np.int64))
        return {"volume": volume, "length": length, "start": start, "extent": extent, "index": index}

    def name(self, index: int) -> str:
        return str(self.samples[self.items[index]].path)


def _leave_signals_to_the_trainer(_: int) -> None:
    """torchrun and Ctrl-C signal the whole process group: a worker that died of it would tear the last step down."""
    for number in signals.STOPS:
        signal.signal(number, signal.SIG_IGN)


def torch_loader(
    dataset: Dataset,
    batches: EpochBatches | CyclingBatches,
    workers: int,
    device: torch.device,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader:
    return DataLoader(
        guards.Reading(dataset, workers),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_trainer,
        collate_fn=collate,
    )


@dataclass(frozen=True)
class Counts:
    """What the size of an objective depends on: samples of each level, and embeddings of a joint batch of each."""

    slices: int  # and images: stage 1's samples, or all slices of all volumes and the images beside them
    slice_batch: int
    volumes: int = 0
    volume_batch: int = 0


def open_images(cfg: Any, run: Run) -> ImageLoader:
    """Stage 1's loader from its options."""
    samples, store = prepare(
        cfg.data_path, canvas_size(*cfg.size_crops), cfg.cache_path, cfg.on_bad, max(1, cfg.workers)
    )
    sizes, scales = (
        [(side, side) for side in cfg.size_crops],
        list(zip(cfg.min_scale_crops, cfg.max_scale_crops, strict=True)),
    )
    crops = MultiCrop(sizes, cfg.nmb_crops, scales, cfg.policy, cfg.seed)
    images = Slices(samples, store, cfg.slices_per_volume)
    return ImageLoader(images, crops, cfg.batch_size, cfg.workers, cfg.seed, run, cfg.sampling_temperature)


def open_volumes(
    cfg: Any, run: Run, mask_ratio: float = 0.0, intra_slices: int = 0, images_per_step: int = 0
) -> VolumeLoader:
    """The loader of stages 2 and 3 from their options."""
    slices, height, width = cfg.target_shape
    size = canvas_size(height, width)
    samples, store = prepare(
        cfg.data_path, size, cfg.cache_path, cfg.on_bad, max(1, cfg.workers), target_shape=cfg.target_shape
    )
    scales = [(getattr(cfg, "min_scale_images", 1.0), 1.0)]
    return VolumeLoader(
        VolumeWindows(samples, store, slices, cfg.seed),
        VolumeViews(height, width, cfg.policy, cfg.seed),
        cfg.batch_size,
        cfg.workers,
        cfg.seed,
        run,
        mask_ratio,
        cfg.mask_style,
        intra_slices,
        images_per_step,
        MultiCrop([(height, width)], [2], scales, cfg.policy, cfg.seed),
        cfg.sampling_temperature,
    )


class ImageLoader:
    """Stage 1: multi-crop views of images and slices -> crops (list of [count, B, H, W]), index [B] and counts.

    counts: samples of each process in this step's joint batch.
    """

    def __init__(
        self,
        dataset: Slices,
        crops: MultiCrop,
        batch_size: int,
        workers: int,
        seed: int,
        run: Run,
        sampling_temperature: float = 1.0,
    ) -> None:
        self.dataset, self.crops, self.run = dataset, crops, run
        self.batches = EpochBatches(dataset.groups, batch_size, seed, run, "images and slices", sampling_temperature)
        self.loader = torch_loader(dataset, self.batches, workers, run.device)
        self.samples, self.steps = self.batches.samples, self.batches.steps
        self.counts = Counts(len(dataset), self.batches.joint)

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[dict[str, Any]]:
        self.batches.epoch, self.batches.seen = epoch, seen
        for raw, (_, counts) in zip(self.loader, self.batches.plan(seen), strict=True):
            batch = to_device({"image": raw["image"], "index": raw["index"]}, self.run.device)
            # Parameters are drawn on the CPU, so what they are drawn from stays there.
            crops = self.crops(batch["image"], raw["extent"], raw["index"], epoch)
            yield {"crops": crops, "index": batch["index"], "counts": counts}

    def names(self, batch: dict[str, Any]) -> list[str]:
        return [self.dataset.name(i) for i in batch["index"].tolist()]


class VolumeLoader:
    """Stages 2 and 3: two views of volumes, with what the stage's learner needs beside them.

    `counts` are the volumes of each process in this step's joint batch, `rows` the places of the real slices in the
    flattened `mask` [B, D] (how many there are only the CPU can tell without a wait for the device). mask_ratio > 0
    adds `hidden` [V, B, D] (stage 2, or stage 3 with L_mask). intra_slices > 0 adds `picked` [B, S] and `slice_index`
    [B * S] (stage 3). images_per_step > 0 adds `images` [V, M, H, W] and `image_index` [M] from the 2D data sets;
    their indices follow those of all slices of all volumes.
    """

    def __init__(
        self,
        dataset: VolumeWindows,
        views: VolumeViews,
        batch_size: int,
        workers: int,
        seed: int,
        run: Run,
        mask_ratio: float = 0.0,
        mask_style: str = "random",
        intra_slices: int = 0,
        images_per_step: int = 0,
        image_views: MultiCrop | None = None,
        sampling_temperature: float = 1.0,
    ) -> None:
        self.dataset, self.views, self.run, self.seed = dataset, views, run, seed
        self.mask_ratio, self.mask_style, self.intra_slices = mask_ratio, mask_style, intra_slices
        self.batches = EpochBatches(dataset.groups, batch_size, seed, run, "volumes", sampling_temperature)
        self.samples, self.steps = self.batches.samples, self.batches.steps
        self.loader = torch_loader(dataset, self.batches, workers, run.device)
        self.slice_offsets = torch.from_numpy(slice_offsets([dataset.samples[i] for i in dataset.items]))
        self.total_slices = int(self.slice_offsets[-1])

        self.image_dataset = self.image_loader = None
        pictures = Slices(dataset.samples, dataset.store, per_volume=None)
        if images_per_step and len(pictures):
            self.image_dataset = pictures
            self.image_batches = CyclingBatches(
                pictures.groups, images_per_step, seed, run, self.steps, sampling_temperature
            )
            self.image_loader = torch_loader(self.image_dataset, self.image_batches, workers, run.device)
            self.image_views = image_views
        self.intra_samples = self.total_slices + (len(pictures) if self.image_dataset else 0)
        images_now = images_per_step if self.image_dataset else 0
        self.joint_batch_inter = batch_size * run.world_size
        self.joint_batch_intra = (batch_size * intra_slices + images_now) * run.world_size
        self.counts = Counts(self.intra_samples, self.joint_batch_intra, len(dataset), self.joint_batch_inter)

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[dict[str, Any]]:
        self.batches.epoch, self.batches.seen = epoch, seen
        pictures = None
        if self.image_loader is not None:
            self.image_batches.epoch, self.image_batches.first_step = epoch, self.batches.step_at(seen)
            pictures = iter(self.image_loader)
        for raw, (_, counts) in zip(self.loader, self.batches.plan(seen), strict=True):
            index, length = raw["index"], raw["length"]  # on the CPU, where the small draws are made
            D, device = raw["volume"].shape[1], self.run.device
            mask = torch.arange(D) < length.unsqueeze(1)
            rows = mask.flatten().nonzero().squeeze(1)
            batch = to_device(
                {"mask": mask, "rows": rows, "index": index, "views": raw["volume"], "counts": counts}, device
            )
            batch["views"] = self.views(batch["views"], mask, raw["extent"], index, epoch)
            if self.mask_ratio:
                batch |= to_device({"hidden": self.hidden(index, length, epoch, len(batch["views"]))}, device)
            if self.intra_slices:
                picked = self._pick(index, length, epoch)
                where = self.slice_offsets[index].unsqueeze(1) + raw["start"].unsqueeze(1) + picked
                batch |= to_device({"picked": picked, "slice_index": where.flatten()}, device)
            if pictures is not None:
                more = next(pictures)
                batch |= to_device({"images": more["image"], "image_index": self.total_slices + more["index"]}, device)
                batch["images"] = self.image_views(batch["images"], more["extent"], more["index"], epoch)[0]
            yield batch

    def hidden(self, index: Tensor, length: Tensor, epoch: int, views: int) -> Tensor:
        """[views, B, D] bool: the slices of every window that are hidden in this epoch."""
        D, how = self.dataset.slices, (self.mask_ratio, self.mask_style, self.seed, epoch)
        return torch.stack([draw_masks(length, index, *how, view, D) for view in range(1, views + 1)])

    def _pick(self, index: Tensor, length: Tensor, epoch: int) -> Tensor:
        """[B, intra_slices] real slices of every window, different ones as far as there are enough."""
        rows = [
            np.resize(stream(self.seed, epoch, i, SHARED, INTRA_SLICES).permutation(n), self.intra_slices)
            for i, n in zip(index.tolist(), length.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack(rows))

    def names(self, batch: dict[str, Any]) -> list[str]:
        names = [self.dataset.name(i) for i in batch["index"].tolist()]
        if "image_index" in batch:
            names += [self.image_dataset.name(i) for i in (batch["image_index"] - self.total_slices).tolist()]
        return names


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: upload(v, device) if isinstance(v, Tensor) else v for k, v in batch.items()}
