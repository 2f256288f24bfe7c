"""Small anatomical phantoms, deterministic by seed: data to try the project on, and to test it with.

    python -m conversion.phantoms --dest Training_Data --volumes_per_anatomy 10 --images 32 --seed 0

Three anatomies of volumes (brain, chest, heart), each with a label map, and chest X-rays that are projections of the
chest. Shapes are painted one over the other (conversion/anatomy.py), in slices as radiologists look at them. Pose and a
smooth random deformation bend the coordinates, not the shapes. Contrast, bias field, blur, noise and intensity scale
are then drawn per case.

A binary `finding` is in the images and never in the names: enlarged ventricles with a lesion (brain), lung nodules
(chest and X-ray), a dilated left ventricle with a thin wall (heart). Each group of random numbers has its own stream,
so the same seed with finding 0 and 1 is the same patient without and with the disease.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from scipy import ndimage

from conversion.anatomy import STRUCTURES, Canvas, Coordinates, Random, paint_brain, paint_chest
from conversion.cardiac import paint_heart
from utils.errors import UserError

ANATOMIES = ("brain", "chest", "heart")
PAINTERS = dict(zip(ANATOMIES, (paint_brain, paint_chest, paint_heart), strict=True))

FINDING_STRUCTURES = {"brain": "lesion", "chest": "nodule"}  # present only where the finding is 1
SMALLEST_AXIS = 16  # voxels; below this the shapes fall between the grid points

# Intensity of every structure, 0 to 1, in the order of STRUCTURES, air (0) first. One row is drawn per case.
CONTRASTS: dict[str, dict[str, tuple[float, ...]]] = {
    "brain": {
        "T1": (0.02, 0.85, 0.14, 0.20, 0.47, 0.78, 0.55, 0.54, 0.70, 0.17, 0.22, 0.36),
        "T2": (0.02, 0.55, 0.10, 0.88, 0.62, 0.35, 0.50, 0.55, 0.40, 0.95, 0.90, 0.78),
        "FLAIR": (0.02, 0.60, 0.10, 0.16, 0.70, 0.46, 0.62, 0.62, 0.50, 0.14, 0.20, 0.92),
    },
    "chest": {
        "CT": (0.02, 0.36, 0.52, 0.92, 0.86, 0.10, 0.55, 0.44, 0.58, 0.66, 0.03, 0.60, 0.55),
        "T1": (0.02, 0.88, 0.42, 0.55, 0.60, 0.10, 0.34, 0.66, 0.38, 0.16, 0.03, 0.52, 0.48),
        "T2": (0.02, 0.72, 0.32, 0.46, 0.52, 0.14, 0.52, 0.58, 0.66, 0.88, 0.03, 0.40, 0.72),
    },
    "heart": {
        "CT": (0.02, 0.46, 0.08, 0.80, 0.30, 0.56, 0.50, 0.86, 0.70, 0.84, 0.68, 0.85, 0.74),
        "cine": (0.02, 0.36, 0.08, 0.52, 0.60, 0.42, 0.34, 0.88, 0.84, 0.86, 0.82, 0.88, 0.84),
        "black_blood": (0.02, 0.44, 0.08, 0.64, 0.86, 0.56, 0.58, 0.16, 0.18, 0.14, 0.20, 0.12, 0.14),
    },
}
# X-ray attenuation per unit length, relative to muscle, in the order of STRUCTURES["chest"], air first
ATTENUATION = (0.0, 0.85, 1.0, 2.6, 1.55, 0.22, 1.0, 0.95, 1.05, 1.1, 0.02, 1.05, 1.3)

# Streams of random numbers of one case
FINDING, POSE, SHAPE, DISEASE, CONTRAST, NOISE = range(6)
XRAY = len(ANATOMIES)  # X-rays have their own patients


@dataclass(frozen=True)
class Phantom:
    image: np.ndarray  # [H, W, C] uint8; rows front to back, columns right to left, slices feet to head
    labels: np.ndarray | None  # [H, W, C] uint8, values of STRUCTURES, 0 outside the body
    finding: int  # 0 or 1


def phantom(anatomy: str, seed: int, shape: tuple[int, int, int] = (64, 64, 40), finding: int | None = None) -> Phantom:
    """One case, the same bytes on every machine.

    anatomy: one of ANATOMIES.  seed: >= 0.  shape: (H, W, C) voxels, each at least 16; any shape covers the same body.
    finding: 0, 1, or None to draw it from the seed.  Raises UserError naming the argument that is wrong.
    """
    if anatomy not in ANATOMIES:
        raise UserError(f"anatomy: {anatomy!r} is not known; choose one of {', '.join(ANATOMIES)}")
    check(seed, shape, finding)
    number = ANATOMIES.index(anatomy)
    finding = draw_finding(seed, number) if finding is None else finding
    draw = stream(seed, number, CONTRAST)
    table = list(CONTRASTS[anatomy].values())
    tissues = np.array(table[draw.integers(len(table))])
    tissues[1:] = (tissues[1:] + 0.03 * draw.standard_normal(len(tissues) - 1)).clip(0.03, 1.0)
    canvas = Canvas(anatomy, posed_coordinates(seed, number, shape), tissues, voxel=2 / min(shape[:2]))
    PAINTERS[anatomy](canvas, stream(seed, number, SHAPE), stream(seed, number, DISEASE), finding)
    return Phantom(acquire(canvas.image, draw, stream(seed, number, NOISE)), canvas.labels, finding)


def xray(seed: int, size: int = 128, finding: int | None = None) -> tuple[np.ndarray, int]:
    """A chest X-ray from the front, bones white: the chest projected along y after Beer and Lambert.

    seed: >= 0.  size: pixels, at least 16.  finding: 0, 1 (nodules), or None to draw it from the seed.
    Returns ([size, size] uint8, finding).  Raises UserError naming the argument that is wrong.
    """
    if size < SMALLEST_AXIS:
        raise UserError(f"size: {size} is too small; need at least {SMALLEST_AXIS} pixels")
    check(seed, (size, size, size), finding)
    finding = draw_finding(seed, XRAY) if finding is None else finding
    depth = max(SMALLEST_AXIS, 3 * size // 8)  # the projection averages over depth, so a coarser grid will do
    at = posed_coordinates(seed, XRAY, (depth, size, size), rotation_degrees=4.0)
    draw = stream(seed, XRAY, CONTRAST)
    attenuation = np.array(ATTENUATION)
    attenuation[3:5] *= draw.uniform(0.75, 1.2)  # the energy of the beam changes bone most
    canvas = Canvas("chest", at, attenuation, voxel=2 / size)
    paint_chest(canvas, stream(seed, XRAY, SHAPE), stream(seed, XRAY, DISEASE), finding)

    noise = stream(seed, XRAY, NOISE)
    path = canvas.image.sum(axis=0).T[::-1] * (2 / depth)  # [z, x], head up; in units of muscle
    path = ndimage.gaussian_filter(path, draw.uniform(0.3, 0.8) * size / 128)
    transmitted = np.exp(-draw.uniform(1.2, 1.7) * path)
    photons = draw.uniform(3000.0, 8000.0)
    transmitted += np.sqrt(transmitted / photons) * noise.standard_normal(path.shape)
    film = -np.log(transmitted.clip(0.01, 1.0))
    film *= 1 + 0.06 * smooth_field(draw, (size, size, 1))[..., 0]
    low, high = np.percentile(film, (2.0, 99.5))
    film = ((film - low) / (high - low)).clip(0.0, 1.0) ** draw.uniform(0.75, 1.3)
    film = draw.uniform(0.0, 0.08) + film * draw.uniform(0.75, 0.92)
    return quantise(film), finding


def write_tree(
    dest: Path,
    volumes_per_anatomy: int,
    images: int,
    seed: int,
    shape: tuple[int, int, int] = (64, 64, 40),
) -> None:
    """Write an example of the layout that training reads; case i of every data set has the seed `seed` + i.

    dest: folder to write into, for example Training_Data.  volumes_per_anatomy, images: how many, >= 0.
    shape: (H, W, C) voxels of every volume.  Files of the same names are replaced, others are left alone.
    """
    dest = Path(dest)
    check(seed, shape, None)
    for name, count in (("volumes_per_anatomy", volumes_per_anatomy), ("images", images)):
        if count < 0:
            raise UserError(f"{name}: {count} is negative; need 0 or more")

    about: dict[str, Any] = {"modality": "synthetic", "spacing_mm": [1.0, 1.0, 1.5], "slice_axis": 2}
    for anatomy in ANATOMIES:
        cases = {f"{anatomy}_{i:03d}.npy": phantom(anatomy, seed + i, shape) for i in range(volumes_per_anatomy)}
        about["source"] = f"Synthetic {anatomy} phantoms made by conversion/phantoms.py; not patient data."
        _write(dest / f"Phantom_{anatomy.capitalize()}", cases, about | {"structures": STRUCTURES[anatomy]})
    films = {
        f"xray_{i:03d}.png": Phantom(film, None, finding)
        for i, (film, finding) in enumerate(map(xray, range(seed, seed + images)))
    }
    source = "Projections of synthetic chest phantoms made by conversion/phantoms.py; not patient data."
    _write(dest / "Phantom_XRay", films, {"modality": "synthetic", "source": source})
    command = (
        f"python -m conversion.phantoms --dest {dest.name} --volumes_per_anatomy {volumes_per_anatomy} "
        f"--images {images} --seed {seed}"
    )
    if tuple(shape) != (64, 64, 40):
        command += f' --shape "{list(shape)}"'
    (dest / "README.md").write_text(README.format(command=command), encoding="utf-8")


def _write(folder: Path, cases: dict[str, Phantom], about: dict[str, Any]) -> None:
    """A data set by the names of its files."""
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    for name, case in cases.items():
        if case.labels is None:
            Image.fromarray(case.image).save(folder / name)
        else:
            np.save(folder / name, case.image, allow_pickle=False)
            np.save(folder / "labels" / name, case.labels, allow_pickle=False)
    lines = ["file,finding", *(f"{name},{case.finding}" for name, case in cases.items())]
    (folder / "labels" / "findings.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "dataset.yaml").write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")


README = """# Training data

Put your own data sets beside the examples, one folder each:

    Training_Data/<Dataset>/<id>.npy                       a volume, H x W x C, slices last, any real numeric type
    Training_Data/<Dataset>/<name>.png  .jpg  .tif         2D images
    Training_Data/<Dataset>/dataset.yaml                   optional: modality, window, spacing_mm, slice_axis

Folders named `labels` and hidden ones are never read for training. The label maps (same names as the volumes, values
in `structures` of dataset.yaml) and findings.csv (0 healthy, 1 diseased) that stand there are for evaluation.

The `Phantom_*` folders are synthetic, so that everything can be tried before any patient data is at hand: brains,
chests, hearts and chest X-rays. Delete them before you train on your own data. They were made by

    {command}
"""


def check(seed: int, shape: tuple[int, ...], finding: int | None) -> None:
    if seed < 0:
        raise UserError(f"seed: {seed} is negative; need 0 or more")
    if len(shape) != 3 or min(shape) < SMALLEST_AXIS:
        raise UserError(f"shape: need (H, W, C) of at least {SMALLEST_AXIS} voxels each, got {tuple(shape)}")
    if finding not in (None, 0, 1):
        raise UserError(f"finding: {finding!r} is neither 0 nor 1 nor None")


def stream(seed: int, number: int, purpose: int) -> Random:
    return np.random.default_rng((seed, number, purpose))


def draw_finding(seed: int, number: int) -> int:
    return int(stream(seed, number, FINDING).integers(2))


# Everything is float64: machines differ in the last bits of sin and exp, and only at this precision is that far too
# little to move a rounded grey value.
def smooth_field(draw: Random, shape: tuple[int, int, int], modes: int = 3) -> np.ndarray:
    """A random field of unit variance [H, W, C] out of the lowest `modes` cosines along every axis."""
    order = np.arange(modes)
    total = order[:, None, None] + order[:, None] + order
    weight = np.where(total == 0, 0.0, 1.0 / (1.0 + total))  # no constant, and less of the finer waves
    field = draw.standard_normal((modes,) * 3) * weight / np.sqrt((weight**2).sum() / 4)
    for axis, length in enumerate(shape):
        waves = np.cos(np.pi * order[:, None] * (np.arange(length) + 0.5) / length)
        along = [1, 1, 1]
        along[axis] = length
        field = sum(field.take([k], axis) * waves[k].reshape(along) for k in range(modes))
    return field


def posed_coordinates(
    seed: int, number: int, shape: tuple[int, int, int], rotation_degrees: float = 8.0
) -> Coordinates:
    """Canonical x, y, z of every voxel, each [H, W, C], after a random rotation, shift, scale and bending."""
    draw = stream(seed, number, POSE)
    height, width, slices = ((2 * np.arange(n) + 1.0) / n - 1 for n in shape)
    grid = (width[None, :, None], height[:, None, None], slices[None, None, :])
    turn = np.eye(3)
    for axis in range(3):
        angle = np.deg2rad(draw.uniform(-rotation_degrees, rotation_degrees))
        i, j = (axis + 1) % 3, (axis + 2) % 3
        row_i, row_j = turn[i].copy(), turn[j].copy()
        turn[i] = np.cos(angle) * row_i - np.sin(angle) * row_j
        turn[j] = np.sin(angle) * row_i + np.cos(angle) * row_j
    shift = draw.uniform(-0.06, 0.06, 3)
    scale = draw.uniform(0.92, 1.06) * draw.uniform(0.95, 1.05, 3)
    moved = [(grid[k] - shift[k]) / scale[k] for k in range(3)]
    x, y, z = (
        turn[k, 0] * moved[0] + turn[k, 1] * moved[1] + turn[k, 2] * moved[2] + 0.025 * smooth_field(draw, shape)
        for k in range(3)
    )
    return x, y, z


def acquire(image: np.ndarray, draw: Random, noise: Random) -> np.ndarray:
    """What a scanner would make of the tissue values [H, W, C]: texture, coil, resolution, noise, arbitrary units."""
    grain = ndimage.gaussian_filter(noise.standard_normal(image.shape), 0.8) * 3.0  # back to about unit variance
    image = image * (1 + draw.uniform(0.02, 0.06) * grain)
    image = image * np.exp(draw.uniform(0.05, 0.22) * smooth_field(draw, image.shape))
    width = draw.uniform(0.25, 0.6)  # voxels
    image = ndimage.gaussian_filter(image, (width, width, 0.8 * width), truncate=3.0)
    sigma = draw.uniform(0.01, 0.032)
    if draw.uniform() < 0.7:  # magnitude of a complex signal
        image = np.hypot(image + sigma * noise.standard_normal(image.shape), sigma * noise.standard_normal(image.shape))
    else:
        image = image + sigma * noise.standard_normal(image.shape)
    image = image.clip(0, None) ** draw.uniform(0.85, 1.2)
    return quantise(draw.uniform(0.0, 0.09) + image * draw.uniform(0.45, 0.85))


def quantise(image: np.ndarray) -> np.ndarray:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


def main() -> None:
    from jsonargparse import auto_cli

    try:
        auto_cli(write_tree, as_positional=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
