"""Frozen features of images and volumes, from files read and normalised as in training.

cases = open_cases("Training_Data", size=224)
slices = encode_slices(load_encoder("weights/swav3D_encoder.pth"), cases, range(len(cases.names)))
features = mean_of_cases(slices.pooled, slices.case)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conversion.convert import arrange
from conversion.readers import BadFile, ReadOptions, read
from datasets.index import LABEL_FOLDERS
from datasets.loaders import Slices
from datasets.store import prepare
from downstream.splits import SUFFIXES, without_suffix
from models.encoder import JointEncoder
from models.resnet import GreyResNet, multi_scale, pooled
from utils.errors import UserError

SLICES_AT_ONCE = 64  # through the ResNet: 64 slices of 224 x 224 keep half a gigabyte of ResNet-50's maps


class Cases(Protocol):
    """What can be encoded: every case is a stack of slices on a square canvas."""

    names: list[str]
    size: int  # S, side of the canvas in pixels

    def read(self, index: int) -> np.ndarray:
        """[D, S, S] float32 in 0..1; D = 1 for an image."""

    def extent(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of what the canvas shows; it is centred."""


class StoredCases:
    """Images and volumes of a data tree, the volumes as at most `slices` evenly spaced slices (0: all of them).

    Has `names`, relative to the tree, and `datasets`, the first-level folder of each case.
    """

    def __init__(self, tree: Path, size: int, slices: int, cache_path: str | None, on_bad: Literal["error", "skip"]):
        samples, self.store = prepare(tree, size, cache_path, on_bad, progress=False)
        self.size = size
        self.names = [sample.name for sample in samples]
        self.datasets = [sample.dataset for sample in samples]
        items = np.asarray(Slices(samples, self.store, slices).items)  # (sample, slice), sample by sample
        self.places = np.split(items[:, 1], np.flatnonzero(np.diff(items[:, 0])) + 1)

    def read(self, index: int) -> np.ndarray:
        return np.concatenate([self.store.read(index, place, place + 1) for place in self.places[index].tolist()])

    def extent(self, index: int) -> tuple[int, int]:
        height, width = self.store.extents[index].tolist()
        return height, width


def open_cases(
    data_path: str | Path,
    size: int,
    slices: int = 32,
    cache_path: str | None = None,
    on_bad: Literal["error", "skip"] = "error",
) -> StoredCases:
    """The cases of a data tree as training reads it, of a single folder of images or volumes, or of NIfTI files.

    Intensities, windows (`dataset.yaml`) and in-plane size are those of training (`datasets.render`); names are
    relative to data_path. NIfTI files are turned, once, into NPY files in the cache (`read_nifti`). Folders of
    labels are not entered. on_bad: as in `datasets.store.prepare`. Raises UserError naming what cannot be used.
    """
    root = Path(data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"data_path: {root} is not a folder; give the one that holds the images or volumes")
    cache = Path(cache_path).expanduser() if cache_path else root / ".cache"
    files = [file for file in _walk(root) if _suffix(file.name)]
    nifti = [file for file in files if _suffix(file.name).startswith(".nii")]
    if 0 < len(nifti) < len(files):
        other = next(file for file in files if file not in nifti)
        raise UserError(f"data_path: {root} mixes NIfTI ({nifti[0].name}) with {other.name}; give a folder for each")
    tree = _converted(nifti, root, cache) if nifti else root
    one_data_set = any(file.parent == root for file in files)
    if one_data_set:
        tree = _linked(tree, cache, root.resolve().name)
    cases = StoredCases(tree, size, slices, cache_path, on_bad)
    if one_data_set:
        cases.names = [name.split("/", 1)[1] for name in cases.names]
    return cases


def read_nifti(path: Path) -> np.ndarray:
    """[H, W, D] float32 of a NIfTI volume, turned as prepare_data.py turns it. Raises UserError, whatever is wrong."""
    try:
        volume = read("nifti", (path,), ReadOptions())
        view = arrange(volume, "auto")[0]
    except BadFile as error:
        raise UserError(f"{path}: {error}") from None
    return np.ascontiguousarray(view, dtype=np.float32) * volume.slope + volume.intercept


class SliceFeatures(NamedTuple):
    """Frozen features of n slices, case after case."""

    pooled: Tensor  # [n, C4] global average of the last stage
    multi_scale: Tensor  # [n, C1 + C2 + C3 + C4] of all stages, each of unit length
    case: Tensor  # [n] position of the slice's case in the list that was asked for


@torch.no_grad()
def encode_slices(
    encoder: GreyResNet, cases: Cases, indices: Sequence[int], device: torch.device | str = "cpu"
) -> SliceFeatures:
    """f_intra of every slice of the cases at `indices`, on the CPU; the encoder is put in eval mode.

    Raises UserError where a feature is not finite.
    """
    encoder.eval().to(device)
    last, scales, owners = [], [], []
    for images, case in _chunks(cases, indices):
        stages = encoder(images.unsqueeze(1).to(device))
        last.append(pooled(stages).cpu())
        scales.append(multi_scale(stages).cpu())
        owners.append(case)
        _require_finite(last[-1])
    return SliceFeatures(torch.cat(last), torch.cat(scales), torch.cat(owners))


def mean_of_cases(features: Tensor, case: Tensor) -> Tensor:
    """Mean over the slices of each case: [n, C] and case [n] -> [cases, C]."""
    count = int(case.max()) + 1
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, case, features)
    return sums / torch.bincount(case, minlength=count).unsqueeze(1)


@torch.no_grad()
def encode_volumes(encoder: JointEncoder, slices: SliceFeatures, batch_size: int = 16) -> Tensor:
    """f_inter, the holistic embedding of each case, from its slices in order: [cases, d], unit length, on the CPU.

    Cases of different lengths share a batch, padded; the padding is masked and changes nothing.
    """
    encoder.eval()
    device = encoder.projection.weight.device
    parts = slices.multi_scale.split(torch.bincount(slices.case).tolist())
    embeddings = []
    for first in range(0, len(parts), batch_size):
        batch, mask = pad([part.to(device) for part in parts[first : first + batch_size]])
        tokens = encoder.projection(batch) * mask.unsqueeze(-1)
        embeddings.append(encoder.holistic(tokens, mask).cpu())
        _require_finite(embeddings[-1])
    return torch.cat(embeddings)


def frozen_features(
    encoder: GreyResNet | JointEncoder,
    cases: Cases,
    indices: Sequence[int],
    features: Literal["pooled", "multi_scale"],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """[cases, C]: the mean over slices of f_intra and, from a joint encoder, its volume embedding behind it."""
    joint = isinstance(encoder, JointEncoder)
    encoder.to(device)
    slices = encode_slices(encoder.encoder if joint else encoder, cases, indices, device)
    parts = [mean_of_cases(getattr(slices, features), slices.case)]
    if joint:
        parts.append(encode_volumes(encoder, slices))
    return torch.cat(parts, dim=1).numpy()


def _require_finite(features: Tensor) -> None:
    if not features.isfinite().all():
        raise UserError("weights: they give features that are NaN or Inf; the file is of a training that diverged")


def pad(stacks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacks [D_i, ...] of different lengths -> batch [B, D, ...] with zeros at the end, mask [B, D]: True if real."""
    lengths = torch.tensor([len(stack) for stack in stacks])
    batch = pad_sequence(list(stacks), batch_first=True)
    return batch, (torch.arange(batch.shape[1]) < lengths.unsqueeze(1)).to(batch.device)


def _chunks(cases: Cases, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices [n, S, S] of one case after another, SLICES_AT_ONCE at a time, and their places in `indices` [n]."""
    waiting, owners, count = [], [], 0
    for place, index in enumerate(indices):
        stack = torch.from_numpy(cases.read(index))
        waiting.append(stack)
        owners.append(torch.full((len(stack),), place))
        count += len(stack)
        if count >= SLICES_AT_ONCE or place == len(indices) - 1:
            yield from zip(
                torch.cat(waiting).split(SLICES_AT_ONCE), torch.cat(owners).split(SLICES_AT_ONCE), strict=True
            )
            waiting, owners, count = [], [], 0


def _suffix(name: str) -> str:
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def _walk(root: Path) -> Iterator[Path]:
    """All files but hidden ones and those in folders of labels, in order."""
    seen = set()
    for parent, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n.lower() not in LABEL_FOLDERS)
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _converted(nifti: list[Path], root: Path, cache: Path) -> Path:
    """A tree in the cache with an NPY file for every NIfTI file below root, and root's dataset.yaml files."""
    tree = cache / f"nifti_{_digest(root)}"
    wanted = set()
    for source in [*nifti, *(file for file in _walk(root) if file.name == "dataset.yaml")]:
        volume = source.name != "dataset.yaml"
        name = f"{without_suffix(source.name)}.npy" if volume else source.name
        target = tree / source.relative_to(root).parent / name
        wanted.add(target)
        made_from = os.stat(source).st_mtime_ns
        if target.exists() and os.stat(target).st_mtime_ns == made_from:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
        if volume:
            np.save(temporary, read_nifti(source), allow_pickle=False)
        else:
            shutil.copy(source, temporary)
        os.utime(temporary, ns=(made_from, made_from))
        os.replace(temporary, target)
    for file in list(_walk(tree)):
        if file not in wanted:  # its source is gone
            file.unlink()
    return tree


def _linked(folder: Path, cache: Path, name: str) -> Path:
    """A tree in the cache whose only data set is `folder`."""
    tree = cache / f"{name}_{_digest(folder)}"
    tree.mkdir(parents=True, exist_ok=True)
    link = tree / name
    if not link.is_symlink():
        link.symlink_to(folder.resolve(), target_is_directory=True)
    return tree


def _digest(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
