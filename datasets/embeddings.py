"""Frozen slice embeddings of a fixed number of augmented versions of every volume, computed once and kept on disk.

Version v of a volume is what epoch v sees of it without this cache: its window and its two views, drawn with epoch v.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.batch import Batch
from datasets.cache import cached, make_room, shown_size
from datasets.loaders import VolumeLoader, VolumeWindows, torch_loader
from datasets.render import FORMAT
from datasets.samplers import Key
from datasets.store import NPY_HEADER
from datasets.transforms import upload
from utils.distributed import everywhere
from utils.errors import UserError
from utils.guards import Reading
from utils.precision import Precision

LAYOUT = 1  # of the files; a new number makes all of them anew
VIEWS = 2
SEAL_BYTES = 4  # CRC-32 of what precedes it, at the end of each file


class Embedder(Protocol):
    """What turns views into embeddings: stage 2's learner."""

    def targets(self, views: Tensor, mask: Tensor) -> Tensor:
        """[V, B, D, H, W] and mask [B, D] -> [V, B, D, d], no gradient."""

    def targets_digest(self) -> str:
        """Changes with every weight that the targets depend on."""


class Embeddings(Dataset):
    """Versions of volumes: their embeddings where they are on disk and whole, otherwise what they are made of.

    (epoch, index) -> `targets` [2, D, d], 0 at padded slices, length and index; or what `windows` returns for the epoch
    whose version this is.
    """

    def __init__(self, windows: VolumeWindows, versions: int, width: int, dtype: torch.dtype, folder: Path) -> None:
        self.windows, self.versions, self.width, self.dtype, self.folder = windows, versions, width, dtype, folder

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        version, length = epoch % self.versions, self.length(index)
        path = self.path(version, index)
        found = read(path)
        if found is None:
            return self.windows[version, index]
        if (found.dtype, found.shape) != (self.dtype, (VIEWS, length, self.width)):
            raise UserError(f"{path}: holds {found.dtype} {tuple(found.shape)}, no such embeddings; delete its folder")
        targets = found.new_zeros(VIEWS, self.windows.slices, self.width)
        targets[:, :length] = found
        return {"targets": targets, "length": length, "index": index}

    def name(self, index: int) -> str:
        return self.windows.name(index)

    def length(self, index: int) -> int:
        return min(self.windows.samples[self.windows.items[index]].slices, self.windows.slices)

    def path(self, version: int, index: int) -> Path:
        """The name begins as that of the volume's file in the store and so changes with the volume, too."""
        source = self.windows.store.files[self.windows.items[index]].stem
        return self.folder / f"{source}_{index}_{version}.npy"

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its name."""
        slice_bytes = VIEWS * self.width * self.dtype.itemsize
        return {
            self.path(version, index).name: NPY_HEADER + self.length(index) * slice_bytes + SEAL_BYTES
            for index in range(len(self))
            for version in range(self.versions)
        }


def read(path: Path) -> Tensor | None:
    """The array of a file; None where there is no file or not the whole of it (a power failure, a full disk)."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); delete it, then start again") from None
    body, seal = content[:-SEAL_BYTES], content[-SEAL_BYTES:]
    if not body or zlib.crc32(body).to_bytes(SEAL_BYTES, "little") != seal:
        return None
    return torch.from_numpy(np.load(io.BytesIO(body), allow_pickle=False))


def write(array: Tensor, path: Path) -> None:
    """The opposite of `read`, unless the file is there; np.load reads it, too. Raises UserError where that fails."""
    buffer = io.BytesIO()
    np.save(buffer, array.numpy(), allow_pickle=False)
    sealed = buffer.getvalue() + zlib.crc32(buffer.getvalue()).to_bytes(SEAL_BYTES, "little")
    cached(path.parent, path.stem, lambda temporary: temporary.write_bytes(sealed), whole=lambda p: read(p) is not None)


class EmbeddingLoader:
    """Stage 2 from cached embeddings: a `VolumeLoader`'s batches with `targets` [2, B, D, d] in place of `views`.

    versions: n > 0; epoch e sees version e mod n of every volume, with fresh masked slices.  width: d.
    precision: what the embeddings are computed in. They are stored in float32 where that is fp32, otherwise in float16,
    which holds bf16 and fp16 results: nothing is lost.
    What is not on disk yet is computed when its turn comes and written: by any process, for all and for later runs.
    So nothing depends on what was there, on the number of workers and processes, or on interruptions.
    """

    def __init__(
        self, volumes: VolumeLoader, embedder: Embedder, versions: int, width: int, workers: int, precision: Precision
    ) -> None:
        self.volumes, self.embedder, self.versions, self.width = volumes, embedder, versions, width
        self.workers, self.precision, self.run = workers, precision, volumes.run
        self.dtype = torch.float32 if precision.dtype == torch.float32 else torch.float16
        self.batches, self.samples, self.steps = volumes.batches, volumes.samples, volumes.steps
        self.dataset, self.views, self.names = volumes.dataset, volumes.views, volumes.names
        self.counts, self.groups = volumes.counts, volumes.groups
        self.cache: Embeddings | None = None
        self.loader: DataLoader | None = None

    @property
    def reading(self) -> list[Reading]:
        """What the data-loading workers are at."""
        return [self.loader.dataset] if self.loader else []

    def epoch(self, epoch: int, seen: int = 0) -> Iterator[Batch]:
        if self.loader is None:
            self._open()
        self.batches.begin(epoch, seen)
        for raw, (_, counts) in zip(self.loader, self.batches.plan(seen), strict=True):
            if isinstance(raw, list):
                raw = default_collate(self._complete(raw, epoch % self.versions))
            index, length = raw["index"], raw["length"]
            mask = torch.arange(self.dataset.slices) < length.unsqueeze(1)
            masked = self.volumes.masked(index, length, epoch, VIEWS)
            targets = raw["targets"].transpose(0, 1)
            index, mask, masked, targets = (upload(x, self.run.device) for x in (index, mask, masked, targets))
            yield Batch(index, counts, mask=mask, masked=masked, targets=targets)

    def _open(self) -> None:
        """Only with the first epoch, when the weights are those of the checkpoint that the run goes on from."""
        windows, views, store = self.dataset, self.volumes.views, self.dataset.store
        of_views = views.height, views.width, views.policy, views.ranges, views.seed
        depends_on = (LAYOUT, windows.slices, windows.seed, store.size, *of_views, self.precision.name)
        digest = hashlib.sha256(repr((*depends_on, self.embedder.targets_digest())).encode()).hexdigest()[:16]
        folder = store.folder.parent / f"embeddings_{digest}_v{FORMAT}"
        self.cache = Embeddings(windows, self.versions, self.width, self.dtype, folder)
        everywhere(lambda: self._prepare_folder(folder))
        self.loader = torch_loader(self.cache, self.batches, self.workers, self.run.device, collate=_collate)

    def _prepare_folder(self, folder: Path) -> None:
        """Make the folder and say how much will lie there; UserError where the disk has no room for it."""
        there = {file.name for file in folder.glob("*.npy")}
        sizes = self.cache.sizes()
        need = sum(size for name, size in sizes.items() if name not in there)
        what = f"{self.versions} versions of {self.samples} volumes"
        left = make_room(folder, need, f"cached_views: {what}", "lower --cached_views, ")
        if self.run.is_main:
            total = shown_size(sum(sizes.values()))
            print(f"cached_views: embeddings of {what}, {total} in {folder}; still to be made: {left}", flush=True)

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
            views = self.views(volumes, mask, raw["extent"], raw["index"], version)
            with self.precision.autocast():
                targets = self.embedder.targets(views, real).to("cpu", self.dtype)
            for sample, own in zip(part, targets.unbind(1), strict=True):
                sample["targets"] = own
                write(own[:, : sample["length"]], self.cache.path(version, sample["index"]))
        return [{name: sample[name] for name in ("targets", "length", "index")} for sample in samples]


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
    """A batch, or its samples as they are where some of them have no embeddings yet."""
    return default_collate(samples) if all("targets" in sample for sample in samples) else samples
