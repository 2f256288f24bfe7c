"""Batches of each stage: order, reading in workers, augmentation on the device.

A loader has `steps` (per epoch, equal on all processes) and `epoch(e, first_step)`, which yields the keyword
arguments of the stage's learner. What it yields is a pure function of (data, options, e, step): nothing depends on
the number of workers, and a run can start again at any step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.augment import MultiCrop, VolumeViews
from datasets.index import Sample, slice_offsets, volumes
from datasets.masks import draw_masks
from datasets.seeding import INTRA_SLICES, SHARED, SHUFFLE, WINDOW, stream
from datasets.store import SliceStore
from utils.distributed import Run
from utils.errors import UserError

Key = tuple[int, int]  # (epoch, index): all that a data set needs to know to return a sample


def canvas_size(*sides: int) -> int:
    """Side of the square that the store keeps per slice: a quarter more than a view, so that crops can move."""
    return round(1.25 * max(sides))


class EpochBatches:
    """Batch sampler: every epoch a new order of all samples; process r takes the r-th part of every joint batch.

    The joint batch of a step is the same whatever the number of processes. The last samples that do not fill a joint
    batch are left out of this epoch (the next one draws another order).
    """

    def __init__(self, samples: int, batch_size: int, seed: int, run: Run, what: str) -> None:
        joint = batch_size * run.world_size
        if samples == 0:
            raise UserError(f"data_path: there are no {what} in it, which this stage trains on")
        if samples < joint:
            raise UserError(
                f"batch_size: {batch_size} per process x {run.world_size} process(es) need {joint} {what}, but the "
                f"data hold {samples}; lower --batch_size, start fewer processes or add data"
            )
        self.samples, self.batch_size, self.seed, self.run = samples, batch_size, seed, run
        self.steps = samples // joint
        self.epoch, self.first_step = 0, 0

    def order(self, epoch: int) -> np.ndarray:
        return stream(self.seed, epoch, 0, 0, SHUFFLE).permutation(self.samples)

    def __iter__(self) -> Iterator[list[Key]]:
        order, joint = self.order(self.epoch), self.batch_size * self.run.world_size
        for step in range(self.first_step, self.steps):
            start = step * joint + self.run.rank * self.batch_size
            yield [(self.epoch, int(i)) for i in order[start : start + self.batch_size]]

    def __len__(self) -> int:
        return self.steps - self.first_step


class CyclingBatches(EpochBatches):
    """As many batches per epoch as asked for: one shuffled pass over the samples follows the other."""

    def __init__(self, samples: int, batch_size: int, seed: int, run: Run, steps: int) -> None:
        self.samples, self.batch_size, self.seed, self.run, self.steps = samples, batch_size, seed, run, steps
        self.epoch, self.first_step = 0, 0

    def __iter__(self) -> Iterator[list[Key]]:
        joint = self.batch_size * self.run.world_size
        for step in range(self.first_step, self.steps):
            start = (self.epoch * self.steps + step) * joint + self.run.rank * self.batch_size
            places = range(start, start + self.batch_size)
            orders = {cycle: self.order(cycle) for cycle in {p // self.samples for p in places}}
            yield [(self.epoch, int(orders[p // self.samples][p % self.samples])) for p in places]


class Slices(Dataset):
    """2D samples: every image, and `per_volume` evenly spaced slices of every volume (0: all of them, None: none).

    (epoch, index) -> image [S, S], extent [2] (height and width of its content), index.
    """

    def __init__(self, samples: list[Sample], store: SliceStore, per_volume: int | None) -> None:
        self.samples, self.store = samples, store
        self.items: list[tuple[int, int]] = []
        for i, sample in enumerate(samples):
            if sample.kind == "volume" and per_volume is None:
                continue
            count = min(per_volume or sample.slices, sample.slices)
            # Centres of `count` equal parts, so the ends of a volume, often empty, are not preferred.
            places = ((np.arange(count) + 0.5) * sample.slices / count).astype(int)
            self.items.extend((i, int(s)) for s in places)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        _, index = key
        i, s = self.items[index]
        image = torch.from_numpy(self.store.read(i, s, s + 1)[0])
        return {"image": image, "extent": torch.from_numpy(self.store.extents[i].astype(np.int64)), "index": index}

    def name(self, index: int) -> str:
        i, s = self.items[index]
        return f"{self.samples[i].path}" + (f" slice {s}" if self.samples[i].kind == "volume" else "")


class VolumeWindows(Dataset):
    """3D samples: `slices` neighbouring slices of a volume from a random start, padded at the end where it has fewer.

    (epoch, index) -> volume [D, S, S], length (real slices), start (of the window), extent [2], index over the volumes
    of all data sets.
    """

    def __init__(self, samples: list[Sample], store: SliceStore, slices: int, seed: int) -> None:
        self.samples, self.store, self.slices, self.seed = samples, store, slices, seed
        self.items = volumes(samples)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        i = self.items[index]
        total = self.samples[i].slices
        length = min(total, self.slices)
        start = int(stream(self.seed, epoch, index, SHARED, WINDOW).integers(total - length + 1))
        window = torch.from_numpy(self.store.read(i, start, start + length))
        volume = window.new_zeros(self.slices, *window.shape[1:])
        volume[:length] = window
        extent = torch.from_numpy(self.store.extents[i].astype(np.int64))
        return {"volume": volume, "length": length, "start": start, "extent": extent, "index": index}

    def name(self, index: int) -> str:
        return str(self.samples[self.items[index]].path)


def _leave_signals_to_the_trainer(_: int) -> None:
    """torchrun and Ctrl-C signal the whole process group: a worker that died of it would tear the last step down."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _torch_loader(dataset: Dataset, batches: EpochBatches, workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_trainer,
    )


class ImageLoader:
    """Stage 1: multi-crop views of images and slices -> crops (list of [count, B, H, W]) and index [B]."""

    def __init__(self, dataset: Slices, crops: MultiCrop, batch_size: int, workers: int, seed: int, run: Run) -> None:
        self.dataset, self.crops, self.run = dataset, crops, run
        self.batches = EpochBatches(len(dataset), batch_size, seed, run, "images and slices")
        self.loader = _torch_loader(dataset, self.batches, workers, run.device)
        self.steps = self.batches.steps

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[dict[str, Any]]:
        self.batches.epoch, self.batches.first_step = epoch, first_step
        for raw in self.loader:
            batch = _to({"image": raw["image"], "index": raw["index"]}, self.run.device)
            # Parameters are drawn on the CPU, so what they are drawn from stays there.
            crops = self.crops(batch["image"], raw["extent"], raw["index"], epoch)
            yield {"crops": crops, "index": batch["index"]}

    def names(self, batch: dict[str, Any]) -> list[str]:
        return [self.dataset.name(i) for i in batch["index"].tolist()]


class VolumeLoader:
    """Stages 2 and 3: two views of volumes, with what the stage's learner needs beside them.

    mask_ratio > 0 adds `hidden` [V, B, D] (stage 2, or stage 3 with L_mask). intra_slices > 0 adds `picked` [B, S] and
    `slice_index` [B * S] (stage 3). images_per_step > 0 adds `images` [V, M, H, W] and `image_index` [M] from the 2D
    data sets; their indices follow those of all slices of all volumes.
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
    ) -> None:
        self.dataset, self.views, self.run, self.seed = dataset, views, run, seed
        self.mask_ratio, self.mask_style, self.intra_slices = mask_ratio, mask_style, intra_slices
        self.batches = EpochBatches(len(dataset), batch_size, seed, run, "volumes")
        self.steps = self.batches.steps
        self.loader = _torch_loader(dataset, self.batches, workers, run.device)
        self.slice_offsets = torch.from_numpy(slice_offsets([dataset.samples[i] for i in dataset.items]))
        self.total_slices = int(self.slice_offsets[-1])

        self.image_dataset = self.image_loader = None
        pictures = Slices(dataset.samples, dataset.store, per_volume=None)
        if images_per_step and len(pictures):
            self.image_dataset = pictures
            self.image_batches = CyclingBatches(len(pictures), images_per_step, seed, run, self.steps)
            self.image_loader = _torch_loader(self.image_dataset, self.image_batches, workers, run.device)
            self.image_views = image_views
        self.intra_samples = self.total_slices + (len(pictures) if self.image_dataset else 0)
        images_now = images_per_step if self.image_dataset else 0
        self.joint_batch_inter = batch_size * run.world_size
        self.joint_batch_intra = (batch_size * intra_slices + images_now) * run.world_size

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[dict[str, Any]]:
        self.batches.epoch, self.batches.first_step = epoch, first_step
        pictures = None
        if self.image_loader is not None:
            self.image_batches.epoch, self.image_batches.first_step = epoch, first_step
            pictures = iter(self.image_loader)
        for raw in self.loader:
            index, length = raw["index"], raw["length"]  # on the CPU, where the small draws are made
            D, device = raw["volume"].shape[1], self.run.device
            mask = torch.arange(D) < length.unsqueeze(1)
            batch = _to({"mask": mask, "index": index, "views": raw["volume"]}, device)
            batch["views"] = self.views(batch["views"], mask, raw["extent"], index, epoch)
            if self.mask_ratio:
                hidden = [
                    draw_masks(length, index, self.mask_ratio, self.mask_style, self.seed, epoch, view + 1, D)
                    for view in range(len(batch["views"]))
                ]
                batch["hidden"] = torch.stack(hidden).to(device)
            if self.intra_slices:
                picked = self._pick(index, length, epoch)
                where = self.slice_offsets[index].unsqueeze(1) + raw["start"].unsqueeze(1) + picked
                batch |= _to({"picked": picked, "slice_index": where.flatten()}, device)
            if pictures is not None:
                more = next(pictures)
                batch |= _to({"images": more["image"], "image_index": self.total_slices + more["index"]}, device)
                batch["images"] = self.image_views(batch["images"], more["extent"], more["index"], epoch)[0]
            yield batch

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


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
