"""Frozen slice embeddings of a fixed number of augmented versions of every volume, computed once and kept on disk.

Version v of a volume is what epoch v sees of it without this cache: its window and its two views, drawn with epoch v.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.batch import Batch
from datasets.cache import NPY_HEADER, cached, is_whole, make_room, read_sealed, seal, sealed_shape
from datasets.loaders import VolumeLoader, VolumeWindows
from datasets.render import FORMAT
from datasets.samplers import Key
from datasets.transforms import upload
from datasets.workers import read, torch_loader
from utils.distributed import everywhere
from utils.precision import Precision

LAYOUT = 2  # of the files; a new number makes all of them anew
VIEWS = 2


class Embeddings(Dataset):
    """Versions of volumes: their embeddings where they are on disk and whole, otherwise what they are made of.

    (epoch, index) -> `targets` [2, D, d], 0 at padded slices, length and index; or what `windows` returns for the epoch
    whose version this is.
    """

    def __init__(self, windows: VolumeWindows, versions: int, width: int, dtype: torch.dtype, folder: Path) -> None:
        self.windows, self.versions, self.width, self.dtype, self.folder = windows, versions, width, dtype, folder
        self.bytes_each = max(windows.bytes_each, VIEWS * windows.slices * width * dtype.itemsize)
        self.name, self.numpy_dtype = windows.name, torch.empty(0, dtype=dtype).numpy().dtype

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        version, length = epoch % self.versions, self.length(index)
        path = self.path(version, index)
        if is_whole(path, self.shape(index)):  # else it is not there, or was cut short
            with contextlib.suppress(OSError, ValueError):  # gone, or damaged: it is made anew
                found = read_sealed(path, self.numpy_dtype, (self.width,), 0, VIEWS * length)
                targets = torch.zeros(VIEWS, self.windows.slices, self.width, dtype=self.dtype)
                targets[:, :length] = torch.from_numpy(found).unflatten(0, (VIEWS, length))
                return {"targets": targets, "length": length, "index": index}
        return self.windows[version, index]

    def length(self, index: int) -> int:
        """Real slices of a volume's version."""
        return min(self.windows.samples[self.windows.items[index]].slices, self.windows.slices)

    def shape(self, index: int) -> tuple[int, int]:
        """Of what is on disk for a volume: real slices only."""
        return sealed_shape(VIEWS * self.length(index), self.width * self.dtype.itemsize)

    def path(self, version: int, index: int) -> Path:
        """The name begins as that of the volume's file in the store and so changes with the volume, too."""
        source = self.windows.store.files[self.windows.items[index]].stem
        return self.folder / f"{source}_{index}_{version}.npy"

    def write(self, version: int, index: int, targets: Tensor) -> None:
        """Keep embeddings [2, D, d] of a volume. Raises UserError where that fails."""
        path, own = self.path(version, index), targets[:, : self.length(index)].flatten(0, 1)
        save = partial(np.save, arr=seal(own.numpy()))
        cached(self.folder, path.stem, save, self.shape(index))

    def prepare_folder(self) -> str:
        """Make the folder; how many bytes are still to be written. UserError where there is no room for them."""
        made, missing = {file.name for file in self.folder.glob("*.npy")}, 0
        for index in range(len(self)):
            size = NPY_HEADER + 8 * int(np.prod(self.shape(index)))
            missing += size * sum(self.path(version, index).name not in made for version in range(self.versions))
        what = f"cached_views: {self.versions} versions of {len(self)} volumes"
        return make_room(self.folder, missing, what, "lower --cached_views, ")


class EmbeddingLoader:
    """Stage 2 from cached embeddings: a `VolumeLoader`'s batches with `targets` [2, B, D, d] in place of `views`.

    embedder: stage 2's learner: `targets` turns views into embeddings, `targets_digest` changes with every weight that
    they depend on.  With cached_views n, epoch e sees version e mod n of every volume, with fresh masked slices.
    What is not on disk yet is computed when its turn comes and written, by any process, for all and for later runs; in
    half precision as float16, which holds it.
    """

    def __init__(self, volumes: VolumeLoader, embedder: Any, cfg: Any) -> None:
        self.volumes, self.embedder, self.cfg, self.run = volumes, embedder, cfg, volumes.run
        self.precision = Precision(cfg.precision, self.run.device)
        self.batches, self.samples, self.steps = volumes.batches, volumes.samples, volumes.steps
        self.dataset, self.names = volumes.dataset, volumes.names
        self.counts, self.groups = volumes.counts, volumes.groups
        self.loader: DataLoader | None = None

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[Batch]:
        if self.loader is None:
            self._open()
        self.batches.begin(epoch, seen)
        for raw, (_, counts) in zip(read(self.loader), self.batches.plan(seen), strict=True):
            if isinstance(raw, list):
                raw = default_collate(self._complete(raw, epoch % self.cfg.cached_views))
            index, length = raw["index"], raw["length"]
            mask = torch.arange(self.dataset.slices) < length.unsqueeze(1)
            parts = index, mask, self.volumes.masked(index, length, epoch), raw["targets"].transpose(0, 1)
            index, mask, masked, targets = (upload(part, self.run.device) for part in parts)
            yield Batch(index, counts, mask=mask, masked=masked, targets=targets)

    def _open(self) -> None:
        """Only with the first epoch, when the weights are those of the checkpoint that the run goes on from."""
        windows, views, store = self.dataset, self.volumes.views, self.dataset.store
        of_views = views.height, views.width, views.policy, views.ranges, views.seed
        depends_on = (LAYOUT, windows.slices, windows.seed, store.size, *of_views, self.precision.name)
        digest = hashlib.sha256(repr((*depends_on, self.embedder.targets_digest())).encode()).hexdigest()[:16]
        folder = store.folder.parent / f"embeddings_{digest}_v{FORMAT}"
        dtype = torch.float32 if self.precision.dtype == torch.float32 else torch.float16
        self.cache = Embeddings(windows, self.cfg.cached_views, self.cfg.d_model, dtype, folder)
        left = everywhere(self.cache.prepare_folder)
        if self.run.is_main:
            print(f"cached_views: embeddings in {folder}; still to be made: {left}", flush=True)
        self.loader = torch_loader(self.cache, self.batches, self.cfg, self.run.device, collate=_collate)

    def _complete(self, samples: list[dict[str, Any]], version: int) -> list[dict[str, Any]]:
        """The samples with embeddings; those of the ones that came without are computed and written."""
        missing = [sample for sample in samples if "targets" not in sample]
        # On a CPU one by one: the last bits of a matrix product depend on its number of rows, and what lies on the
        # disk should not depend on the batch in which it was made.
        together = 1 if self.run.device.type == "cpu" else len(missing)
        for first in range(0, len(missing), together):
            part = missing[first : first + together]
            raw = default_collate(part)
            mask = torch.arange(self.dataset.slices) < raw["length"].unsqueeze(1)
            volumes, real = upload(raw["volume"], self.run.device), upload(mask, self.run.device)
            views = self.volumes.views(volumes, mask, raw["extent"], raw["index"], version)
            with self.precision.autocast():
                targets = self.embedder.targets(views, real).to("cpu", self.cache.dtype)
            for sample, own in zip(part, targets.unbind(1), strict=True):
                sample["targets"] = own
                self.cache.write(version, sample["index"], own)
        return [{name: sample[name] for name in ("targets", "length", "index")} for sample in samples]


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
    """A batch, or its samples as they are where some of them have no embeddings yet."""
    return default_collate(samples) if all("targets" in sample for sample in samples) else samples
