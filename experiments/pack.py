"""Pack what the experiments pre-train on into one small file, for a machine that only a small file can reach.

    python -m experiments.pack --data runs/experiments/data --archive runs/gpu_data.zip                   # here
    python -m experiments.pack --data runs/gpu/data --archive runs/gpu_data.zip --unpack true             # there

Packed are the volumes and images of <data>/pretrain as training sees them: 0..1 by window or percentiles, in 8 bits,
and no larger in plane than the working copy that training would make of them. Unpacked is a tree that the training
scripts read, volumes with a window of 0 to 255. Images are stretched to their own percentiles again, which their
reduction has narrowed: noisy ones get more contrast. splits/ and tasks/ stay behind: what is tested is tested here.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jsonargparse.typing import PositiveFloat, PositiveInt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from datasets.index import Sample, scan
from datasets.loaders import canvas_size
from datasets.render import content_size, render
from utils import config as options
from utils.config import read_yaml
from utils.errors import UserError

TREE = "pretrain"
STACK = ".stack.png"  # ends the names of volumes in the archive, which are pictures of their slices
WHITE = 255
SAME_SPACING = 0.02  # volumes whose spacings differ by less than this share have one spacing


@dataclass
class Config:
    data: str = "runs/experiments/data"
    """what experiments.data has written; with unpack: the folder to make"""
    archive: str = "runs/gpu_data.zip"
    """file to write; with unpack: to read"""
    unpack: bool = False
    """make the tree again; what is there already is left as it is"""
    view: PositiveInt = 128
    """pixels of the largest view that will be trained on"""
    max_mib: PositiveFloat = 50
    """largest archive that is accepted"""


def main(cfg: Config) -> None:
    data, archive = Path(cfg.data).expanduser(), Path(cfg.archive).expanduser()
    if cfg.unpack:
        written, there = unpack(archive, data)
        print(f"{data / TREE}: {written} files written, {there} there already")
        return
    size = pack(data, archive, canvas_size(cfg.view), cfg.max_mib * 2**20)
    print(f"wrote {archive}: {size / 2**20:.1f} MiB")


def pack(data: Path, archive: Path, side: int, max_bytes: float) -> int:
    """Write the archive, slices at most `side` pixels long; its size in bytes.

    Raises UserError where it becomes larger than max_bytes, and leaves none then.
    """
    samples = scan(data / TREE)
    temporary = archive.with_name(f".{archive.name}.tmp")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:  # pictures are deflated by themselves
            for name, content in _members(samples, side):
                file.writestr(zipfile.ZipInfo(f"{TREE}/{name}"), content)  # no times: the same data, the same bytes
        size = temporary.stat().st_size
        if size > max_bytes:
            raise UserError(
                f"max_mib: the archive would have {size / 2**20:.1f} MiB, more than {max_bytes / 2**20:g}; "
                f"lower --view, or take data out of {data / TREE}"
            )
        temporary.replace(archive)
    except OSError as error:
        raise UserError(f"archive: {archive} cannot be written ({error.strerror}); choose another place") from None
    finally:
        temporary.unlink(missing_ok=True)
    return size


def unpack(archive: Path, data: Path) -> tuple[int, int]:
    """Make the tree; how many files were written, and how many were there. A killed run is finished by the next."""
    written = there = 0
    try:
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                target = data / info.filename.removesuffix(STACK)
                if data.resolve() not in target.resolve().parents:
                    raise UserError(f"archive: {archive} was not made by this command ({info.filename})")
                if target.exists():
                    there += 1
                    continue
                content = file.read(info)
                temporary = target.with_name(f".{target.name}.tmp")
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(_volume(content) if info.filename.endswith(STACK) else content)
                temporary.replace(target)
                written += 1
    except FileNotFoundError:
        raise UserError(f"archive: {archive} is not there; make it with python -m experiments.pack") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"archive: {archive} is damaged ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"data: {data} cannot be written ({error.strerror}); choose another folder") from None
    return written, there


def _members(samples: Sequence[Sample], side: int) -> Iterator[tuple[str, bytes]]:
    """(name below the tree, content) of every file."""
    volumes: dict[str, list[Sample]] = {}
    for sample in samples:
        pixels = np.round(render(sample, _size(sample, side)).astype(np.float32) * WHITE).astype(np.uint8)
        if sample.kind == "volume":
            volumes.setdefault(sample.dataset, []).append(sample)
            yield sample.name + STACK, _png(pixels)
        else:
            yield sample.name + ".png" * (not sample.name.lower().endswith(".png")), _png(pixels)
    for dataset, members in volumes.items():
        described = describe(members, read_settings(members[0]), side)
        yield f"{dataset}/dataset.yaml", yaml.safe_dump(described, sort_keys=False, allow_unicode=True).encode()


def describe(members: Sequence[Sample], settings: dict[str, Any], side: int) -> dict[str, Any]:
    """dataset.yaml of the packed volumes, from that of their sources: slices last, 8 bits, larger pixels.

    spacing_mm stays only where it is still one for all volumes, which are reduced each by its own factor.
    """
    described = settings | {"slice_axis": 2, "window": [0, WHITE]}
    described.pop("spacing_mm", None)
    if settings.get("window"):
        described["source_intensities"] = settings["window"]
    if settings.get("spacing_mm"):
        spacings = np.array([_spacing(sample, settings["spacing_mm"], side) for sample in members])
        if np.all(np.ptp(spacings, axis=0) <= SAME_SPACING * spacings.min(axis=0)):
            described["spacing_mm"] = [round(float(mm), 4) for mm in np.median(spacings, axis=0)]
    return described


def read_settings(sample: Sample) -> dict[str, Any]:
    """The content of the dataset.yaml of a sample's data set, which the scan has checked."""
    path = sample.data_path / sample.dataset / "dataset.yaml"
    return (read_yaml(path) or {}) if path.is_file() else {}


def _spacing(sample: Sample, spacing_mm: Sequence[float], side: int) -> list[float]:
    """Rows, columns, slices in mm of a packed volume; spacing_mm in the order of the axes of its source."""
    plane = [mm for axis, mm in enumerate(spacing_mm) if axis != sample.slice_axis]
    h, w = content_size(sample.height, sample.width, _size(sample, side))
    return [plane[0] * sample.height / h, plane[1] * sample.width / w, spacing_mm[sample.slice_axis]]


def _size(sample: Sample, side: int) -> int:
    return min(side, max(sample.height, sample.width))  # reduced, never enlarged


def _png(pixels: np.ndarray) -> bytes:
    """[D, h, w] uint8 as one picture, slices below each other: PNG's filters save a third, deflate alone nothing."""
    about = PngInfo()
    about.add_text("slices", str(len(pixels)))
    content = io.BytesIO()
    Image.fromarray(pixels.reshape(-1, pixels.shape[2])).save(content, "PNG", compress_level=9, pnginfo=about)
    return content.getvalue()


def _volume(content: bytes) -> bytes:
    """The NPY file, height x width x slices, of such a picture."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        slices, pixels = int(image.text["slices"]), np.asarray(image)
    volume = np.moveaxis(pixels.reshape(slices, -1, pixels.shape[1]), 0, 2)
    file = io.BytesIO()
    np.save(file, np.asfortranarray(volume), allow_pickle=False)
    return file.getvalue()


if __name__ == "__main__":
    options.main(main, Config, __doc__)
