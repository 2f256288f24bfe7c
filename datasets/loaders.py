"""Batches of each stage: reading in workers, augmentation on the device.

A loader has `samples` and `steps` (per epoch, over all processes), `counts`, `groups` (level -> data set of every
index) and `epoch(e, seen)`, which yields batches from the place where all processes have seen `seen` samples: a pure
function of (data, options, e, seen), whatever the workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.augment import MultiCrop, VolumeViews
from datasets.batch import Batch, Counts
from datasets.index import Sample, volumes
from datasets.samplers import CyclingBatches, EpochBatches, Key
from datasets.store import SliceStore, prepare
from datasets.transforms import upload
from datasets.workers import read, torch_loader
from utils.distributed import Run
from utils.errors import UserError
from utils.files import shown
from utils.profile import span
from utils.seeding import HIDDEN, INTRA_SLICES, MASKED_SLICES, SHARED, WINDOW, stream


def canvas_size(*sides: int) -> int:
    """Side of the square that the store keeps per slice: a quarter more than a view, so that crops can move."""
    return round(1.25 * max(sides))


class Slices(Dataset):
    """2D samples: every image, and `per_volume` evenly spaced slices of every volume (0: all of them, None: none).

    (epoch, index) -> image [S, S] float16, extent [2] (height and width of its content), index.
    """

    def __init__(self, store: SliceStore, per_volume: int | None) -> None:
        self.store, self.samples = store, store.samples
        parts = []
        for i, sample in enumerate(self.samples):
            if sample.kind == "volume" and per_volume is None:
                continue
            count = min(per_volume or sample.slices, sample.slices)
            # Centres of `count` equal parts, so the ends of a volume, often empty, are not preferred.
            places = ((np.arange(count) + 0.5) * sample.slices / count).astype(np.int32)
            parts.append(np.stack((np.full_like(places, i), places), axis=1))
        self.items = np.concatenate([np.empty((0, 2), np.int32), *parts])  # sample, slice
        self.groups = [self.samples[i].dataset for i in self.items[:, 0].tolist()]
        slices = np.array([max(sample.slices, 1) for sample in self.samples])
        self.places = relative(self.items[:, 1], slices[self.items[:, 0]])
        self.bytes_each = 2 * store.size**2  # of a sample

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        _, index = key
        i, s = self.items[index].tolist()
        image = torch.from_numpy(self.store.read(i, s, s + 1, half=True)[0])
        return {"image": image, "extent": torch.from_numpy(self.store.extents[i]), "index": index}

    def name(self, index: int) -> str:
        i, s = self.items[index].tolist()
        return shown(self.samples[i].path) + (f" slice {s}" if self.samples[i].kind == "volume" else "")


class VolumeWindows(Dataset):
    """3D samples: `slices` neighbouring slices of a volume from a random start, padded at the end where it has fewer.

    (epoch, index) -> volume [D, S, S] float16, length (real slices), start (of the window), extent [2], index over the
    volumes of all data sets.
    """

    def __init__(self, store: SliceStore, slices: int, seed: int) -> None:
        self.store, self.samples, self.slices, self.seed = store, store.samples, slices, seed
        self.items = volumes(self.samples)
        self.groups = [self.samples[i].dataset for i in self.items]
        self.bytes_each = 2 * slices * store.size**2  # of a sample

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
        extent = torch.from_numpy(self.store.extents[i])
        return {"volume": volume, "length": length, "start": start, "extent": extent, "index": index}

    def name(self, index: int) -> str:
        return shown(self.samples[self.items[index]].path)


def relative(slices: np.ndarray, counts: np.ndarray) -> Tensor:
    """Positions of slices in volumes of so many, 0 to 1; inf where there is a single one, as in an image."""
    return torch.from_numpy(np.where(counts > 1, slices / np.maximum(counts - 1, 1), np.inf)).float()


def corresponding(samples: Sequence[Sample], groups: Sequence[str]) -> Tensor:
    """The number of each data set of `groups` in which positions correspond: one for all that are aligned."""
    aligned = {sample.dataset: sample.aligned_with or sample.dataset for sample in samples}
    return torch.from_numpy(np.unique([aligned[name] for name in groups], return_inverse=True)[1])


class ImageLoader:
    """Stage 1, from its options: multi-crop views of images and slices."""

    def __init__(self, cfg: Any, run: Run) -> None:
        canvas = canvas_size(*cfg.size_crops)
        store = prepare(cfg.data_path, canvas, cfg.cache_path, cfg.on_bad, max(1, cfg.workers))
        self.run, self.dataset = run, Slices(store, cfg.slices_per_volume)
        sizes = [(side, side) for side in cfg.size_crops]
        scales = list(zip(cfg.min_scale_crops, cfg.max_scale_crops, strict=True))
        self.crops = MultiCrop(sizes, cfg.nmb_crops, scales, cfg.policy, cfg.seed)
        how = cfg.batch_size, cfg.seed, run, "images and slices", cfg.sampling_temperature
        self.batches = EpochBatches(self.dataset.groups, *how)
        self.loader = torch_loader(self.dataset, self.batches, cfg, run.device)
        self.samples, self.steps = self.batches.samples, self.batches.steps
        self.counts = Counts(len(self.dataset), self.batches.global_batch, places=self.dataset.places)
        self.groups: dict[str, Sequence[str]] = {"intra": self.dataset.groups}
        self.places = self.dataset.places.to(run.device)
        self.aligned = corresponding(store.samples, self.dataset.groups).to(run.device)

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[Batch]:
        self.batches.begin(epoch, seen)
        for raw, (_, counts) in zip(read(self.loader), self.batches.plan(seen), strict=True):
            image, index = (upload(raw[name], self.run.device) for name in ("image", "index"))
            # Parameters are drawn on the CPU, so what they are drawn from stays there.
            with span("augment"):
                crops = self.crops(image, raw["extent"], raw["index"], epoch)
            yield Batch(index, counts, crops=crops, place=self.places[index], group=self.aligned[index])

    def names(self, index: Tensor, image_index: Tensor | None = None) -> list[str]:
        """The files of a batch."""
        return [self.dataset.name(i) for i in index.tolist()]


class VolumeLoader:
    """Stages 2 and 3, from their options: two views of volumes, with what the learner needs beside them (`Batch`).

    mask_ratio > 0 adds `masked`, intra_slices > 0 `picked` and `slice_index`, images_per_step > 0 `images` and
    `image_index` from the 2D data sets; their indices follow those of all slices of all volumes.  recon adds `hidden`.
    """

    def __init__(
        self,
        cfg: Any,
        run: Run,
        mask_ratio: float = 0.0,
        intra_slices: int = 0,
        images_per_step: int = 0,
        min_scale_images: float = 1.0,
        recon: bool = False,
    ) -> None:
        self.run, self.seed = run, cfg.seed
        self.mask_ratio, self.mask_style, self.intra_slices = mask_ratio, cfg.mask_style, intra_slices
        self.recon = (cfg.hidden_pixels, cfg.hidden_slices, cfg.hidden_block) if recon else None
        slices, *size = cfg.target_shape
        about = cfg.cache_path, cfg.on_bad, max(1, cfg.workers)
        store = prepare(cfg.data_path, canvas_size(*size), *about, target_shape=cfg.target_shape)
        self.dataset = VolumeWindows(store, slices, cfg.seed)
        if mask_ratio:
            require_neighbours([store.samples[i] for i in self.dataset.items], run)
        self.views = VolumeViews(*size, cfg.policy, cfg.seed)
        temperature, groups = cfg.sampling_temperature, self.dataset.groups
        self.batches = EpochBatches(groups, cfg.batch_size, cfg.seed, run, "volumes", temperature)
        self.samples, self.steps = self.batches.samples, self.batches.steps
        self.loader = torch_loader(self.dataset, self.batches, cfg, run.device)
        # Slice s of volume i has index slice_offsets[i] + s over all slices; the last entry is their number.
        self.slice_offsets = torch.tensor([0, *(store.samples[i].slices for i in self.dataset.items)]).cumsum(0)
        self.total_slices = int(self.slice_offsets[-1])

        self.image_dataset = Slices(store, per_volume=None)
        images = self.image_dataset.groups if images_per_step else []
        self.image_loader = None
        if images:
            self.image_views = MultiCrop([tuple(size)], [2], [(min_scale_images, 1.0)], cfg.policy, cfg.seed)
            passes = EpochBatches(images, 1, cfg.seed, Run(0, 1, run.device), "images", temperature)
            self.image_batches = CyclingBatches(passes, images_per_step, run, self.steps)
            self.image_loader = torch_loader(self.image_dataset, self.image_batches, cfg, run.device)
        each = cfg.batch_size * intra_slices + (images_per_step if images else 0)
        of_volumes = len(self.dataset), self.batches.global_batch
        counts = np.diff(self.slice_offsets.numpy())
        intra = np.concatenate([np.repeat(np.array(groups, dtype=object), counts), np.array(images, dtype=object)])
        self.groups: dict[str, Sequence[str]] = {"inter": groups, "intra": intra}
        places = relative(np.concatenate([*map(np.arange, counts)]), counts.repeat(counts))
        places = torch.cat([places, self.image_dataset.places[: len(images)]])
        self.counts = Counts(len(places), each * run.world_size, *of_volumes, places)
        self.places = places.to(run.device)
        self.aligned = corresponding(store.samples, intra).to(run.device)

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[Batch]:
        self.batches.begin(epoch, seen)
        pictures = None
        if self.image_loader is not None:
            self.image_batches.begin(epoch, self.batches.step_at(seen))
            pictures = read(self.image_loader)
        for raw, (_, counts) in zip(read(self.loader), self.batches.plan(seen), strict=True):
            batch = self._volumes(raw, counts, epoch)
            if pictures is not None:
                batch = batch._replace(**self._images(next(pictures), epoch))
            if self.intra_slices:
                index = batch.intra_index
                batch = batch._replace(place=self.places[index], group=self.aligned[index])
            yield batch

    def _volumes(self, raw: dict[str, Tensor], counts: list[int], epoch: int) -> Batch:
        index, length = raw["index"], raw["length"]  # on the CPU, where the small draws are made
        mask = torch.arange(raw["volume"].shape[1]) < length.unsqueeze(1)
        rows = mask.flatten().nonzero().squeeze(1)  # how many there are only the CPU knows without a wait
        device = self.run.device
        volumes = upload(raw["volume"], device)
        with span("augment"):
            views = self.views(volumes, mask, raw["extent"], index, epoch)
        batch = Batch(upload(index, device), counts, views=views, mask=upload(mask, device), rows=upload(rows, device))
        if self.mask_ratio:
            batch = batch._replace(masked=upload(self.masked(index, length, epoch), device))
        if self.recon:
            height, width = views.shape[-2:]
            hidden = draw_hidden(length, index, height, width, *self.recon, self.seed, epoch, mask.shape[1])
            batch = batch._replace(hidden=upload(hidden, device))
        if self.intra_slices:
            picked = self._pick(index, length, epoch)
            where = self.slice_offsets[index].unsqueeze(1) + raw["start"].unsqueeze(1) + picked
            batch = batch._replace(picked=upload(picked, device), slice_index=upload(where.flatten(), device))
        return batch

    def _images(self, raw: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        image, index = (upload(values, self.run.device) for values in (raw["image"], self.total_slices + raw["index"]))
        with span("augment"):
            views = self.image_views(image, raw["extent"], raw["index"], epoch)[0]
        return {"images": views, "image_index": index}

    def masked(self, index: Tensor, length: Tensor, epoch: int) -> Tensor:
        """[2, B, D] bool: the slices of every window that are masked in this epoch, view by view."""
        D, how = self.dataset.slices, (self.mask_ratio, self.mask_style, self.seed, epoch)
        return torch.stack([draw_masks(length, index, *how, view, D) for view in (1, 2)])

    def _pick(self, index: Tensor, length: Tensor, epoch: int) -> Tensor:
        """[B, intra_slices] real slices of every window, different ones as far as there are enough."""
        orders = [
            stream(self.seed, epoch, i, SHARED, INTRA_SLICES).permutation(n)
            for i, n in zip(index.tolist(), length.tolist(), strict=True)
        ]
        return torch.from_numpy(np.stack([np.resize(order, self.intra_slices) for order in orders]))

    def names(self, index: Tensor, image_index: Tensor | None = None) -> list[str]:
        """The files of a batch."""
        names = [self.dataset.name(i) for i in index.tolist()]
        if image_index is not None:
            names += [self.image_dataset.name(i) for i in (image_index - self.total_slices).tolist()]
        return names


def require_neighbours(volumes: Sequence[Sample], run: Run) -> None:
    """Raises UserError where no volume has a slice to mask and one to predict it from; says how many have not."""
    alone = [sample for sample in volumes if sample.slices < 2]
    if alone and len(alone) == len(volumes):
        raise UserError(
            f"data_path: all {len(volumes)} volumes have a single slice ({alone[0].path} ...), but masked slices are "
            "predicted from their neighbours; give volumes of several slices, or set slice_axis in dataset.yaml"
        )
    if alone and run.is_main:
        print(f"warning: {len(alone)} of {len(volumes)} volumes have a single slice and teach nothing here", flush=True)


def draw_masks(
    lengths: Tensor, index: Tensor, ratio: float, style: str, seed: int, epoch: int, view: int, slices: int
) -> Tensor:
    """[B, slices] bool, True where a slice is masked: ceil(ratio * length) real slices of every volume.

    lengths [B] real slices, index [B] global sample index. style: `random` (anywhere) or `span` (one contiguous run).
    At least one slice stays visible.
    """
    masked = torch.zeros(len(lengths), slices, dtype=torch.bool)
    for b, (length, i) in enumerate(zip(lengths.tolist(), index.tolist(), strict=True)):
        rng = stream(seed, epoch, i, view, MASKED_SLICES)
        # The small step down keeps 0.1 * 30 = 3.0000000000000004 from being rounded up to 4.
        count = min(max(1, int(np.ceil(ratio * length - 1e-9))), length - 1)
        if style == "span":
            start = int(rng.integers(length - count + 1))
            masked[b, start : start + count] = True
        else:
            masked[b, torch.from_numpy(rng.permutation(length)[:count])] = True
    return masked


def draw_hidden(
    lengths: Tensor,
    index: Tensor,
    height: int,
    width: int,
    pixels: float,
    whole: float,
    block: int,
    seed: int,
    epoch: int,
    slices: int,
) -> Tensor:
    """[B, slices, ceil(height / block), ceil(width / block)] bool, True where L_recon hides a view's pixels.

    A share `pixels` of every slice's blocks, each slice's own, and all of a share `whole` of the slices, one of which
    at least is not hidden whole.
    """
    grid = -(-height // block), -(-width // block)
    hidden = torch.zeros(len(lengths), slices, *grid, dtype=torch.bool)
    for b, (length, i) in enumerate(zip(lengths.tolist(), index.tolist(), strict=True)):
        rng = stream(seed, epoch, i, SHARED, HIDDEN)
        order = rng.random((length, math.prod(grid))).argsort(axis=1)
        blocks = order < round(pixels * math.prod(grid))
        blocks[rng.permutation(length)[: min(round(whole * length), length - 1)]] = True
        hidden[b, :length] = torch.from_numpy(blocks).unflatten(1, grid)
    return hidden
