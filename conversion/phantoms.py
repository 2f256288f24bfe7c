"""Small anatomical phantoms, deterministic by seed: data to try the project on, and to test it with.

    python -m conversion.phantoms --dest Training_Data --volumes_per_anatomy 10 --images 32 --seed 0

Three anatomies of volumes (brain, chest, heart), each with a label map, and chest X-rays that are projections of the
chest. A phantom is a list of implicit shapes f(x, y, z), negative inside, painted one over the other in canonical
coordinates: x from the patient's right (-1) to left (+1), y from front (-1) to back (+1), z from feet (-1) to head
(+1), so a slice is seen the way radiologists look at it. Pose and a smooth random deformation bend the coordinates,
not the shapes. Contrast, bias field, blur, noise and intensity scale are then drawn per case.

A binary `finding` is in the images and never in the names: enlarged ventricles with a lesion (brain), lung nodules
(chest and X-ray), a dilated left ventricle with a thin wall (heart). Each group of random numbers has its own stream,
so the same seed with finding 0 and 1 is the same patient without and with the disease.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from scipy import ndimage

from utils.errors import UserError

ANATOMIES = ("brain", "chest", "heart")

STRUCTURES: dict[str, dict[int, str]] = {
    "brain": {
        1: "scalp",
        2: "skull",
        3: "csf",
        4: "grey_matter",
        5: "white_matter",
        6: "deep_grey",
        7: "cerebellum",
        8: "brainstem",
        9: "ventricles",
        10: "eyes",
        11: "lesion",
    },
    "chest": {
        1: "fat",
        2: "muscle",
        3: "ribs",
        4: "spine_and_sternum",
        5: "lung",
        6: "lung_vessels",
        7: "mediastinum",
        8: "heart",
        9: "great_vessels",
        10: "airways",
        11: "upper_abdomen",
        12: "nodule",
    },
    "heart": {
        1: "chest_wall",
        2: "lung",
        3: "bone",
        4: "fat",
        5: "upper_abdomen",
        6: "myocardium",
        7: "left_ventricle",
        8: "right_ventricle",
        9: "left_atrium",
        10: "right_atrium",
        11: "aorta",
        12: "pulmonary_artery",
    },
}
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

Point = tuple[float, float, float]
Coordinates = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, y, z; any common shape


@dataclass(frozen=True)
class Phantom:
    image: np.ndarray  # [H, W, C] uint8; rows front to back, columns right to left, slices feet to head
    labels: np.ndarray  # [H, W, C] uint8, values of STRUCTURES, 0 outside the body
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
    if finding is None:
        finding = draw_finding(seed, number)

    draw = stream(seed, number, CONTRAST)
    table = list(CONTRASTS[anatomy].values())
    tissues = np.array(table[draw.integers(len(table))])
    tissues[1:] = (tissues[1:] + 0.03 * draw.standard_normal(len(tissues) - 1)).clip(0.03, 1.0)

    at = posed_coordinates(seed, number, shape)
    canvas = Canvas(at, tissues, voxel=2 / min(shape[:2]))
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
    if finding is None:
        finding = draw_finding(seed, XRAY)

    depth = max(SMALLEST_AXIS, 3 * size // 8)  # the projection averages over depth, so a coarser grid will do
    at = posed_coordinates(seed, XRAY, (depth, size, size), rotation_degrees=4.0)
    draw = stream(seed, XRAY, CONTRAST)
    attenuation = np.array(ATTENUATION)
    attenuation[3:5] *= draw.uniform(0.75, 1.2)  # the energy of the beam changes bone most
    canvas = Canvas(at, attenuation, voxel=2 / size)
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

    for anatomy in ANATOMIES:
        folder = dest / f"Phantom_{anatomy.capitalize()}"
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        findings = []
        for i in range(volumes_per_anatomy):
            case, name = phantom(anatomy, seed + i, shape), f"{anatomy}_{i:03d}.npy"
            np.save(folder / name, case.image, allow_pickle=False)
            np.save(folder / "labels" / name, case.labels, allow_pickle=False)
            findings.append((name, case.finding))
        write_findings(folder, findings)
        about = {
            "modality": "synthetic",
            "spacing_mm": [1.0, 1.0, 1.5],
            "slice_axis": 2,
            "source": f"Synthetic {anatomy} phantoms made by conversion/phantoms.py; not patient data.",
            "structures": STRUCTURES[anatomy],
        }
        (folder / "dataset.yaml").write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")

    folder = dest / "Phantom_XRay"
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    findings = []
    for i in range(images):
        film, finding = xray(seed + i)
        name = f"xray_{i:03d}.png"
        Image.fromarray(film).save(folder / name)
        findings.append((name, finding))
    write_findings(folder, findings)
    about = {
        "modality": "synthetic",
        "source": "Projections of synthetic chest phantoms made by conversion/phantoms.py; not patient data.",
    }
    (folder / "dataset.yaml").write_text(yaml.safe_dump(about, sort_keys=False), encoding="utf-8")

    command = (
        f"python -m conversion.phantoms --dest {dest.name} --volumes_per_anatomy {volumes_per_anatomy} "
        f"--images {images} --seed {seed}"
    )
    if tuple(shape) != (64, 64, 40):
        command += f' --shape "{list(shape)}"'
    (dest / "README.md").write_text(README.format(command=command), encoding="utf-8")


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


def stream(seed: int, number: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng((seed, number, purpose))


def draw_finding(seed: int, number: int) -> int:
    return int(stream(seed, number, FINDING).integers(2))


def write_findings(folder: Path, findings: list[tuple[str, int]]) -> None:
    with (folder / "labels" / "findings.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("file", "finding"), *findings])


# Coordinates and random fields. Everything is float64: machines differ in the last bits of sin and exp, and only at
# this precision is that far too little to move a rounded grey value.


def smooth_field(draw: np.random.Generator, shape: tuple[int, int, int], modes: int = 3) -> np.ndarray:
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


def wave_field(draw: np.random.Generator, at: Coordinates, length: float, waves: int = 8) -> np.ndarray:
    """A random field of unit variance whose folds are `length` apart: plane waves of that length in all directions."""
    directions = draw.standard_normal((waves, 3))
    directions *= 2 * np.pi / length / np.sqrt((directions**2).sum(axis=1, keepdims=True))
    phases = draw.uniform(0, 2 * np.pi, waves)
    field = np.zeros(at[0].shape)
    for (a, b, c), phase in zip(directions, phases, strict=True):
        field += np.cos(a * at[0] + b * at[1] + c * at[2] + phase)
    return field * np.sqrt(2 / waves)


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


# Shapes: f < 0 inside, and near the surface |f| is about the distance to it


def ellipsoid(at: Coordinates, centre: Point, radii: Point) -> np.ndarray:
    square = sum(((a - c) / r) ** 2 for a, c, r in zip(at, centre, radii, strict=True))
    return (np.sqrt(square) - 1) * min(radii)


def capsule(at: Coordinates, start: Point, end: Point, radius: float, radius_end: float | None = None) -> np.ndarray:
    """A round tube from start to end whose radius goes linearly to radius_end; 1 where it is farther than 0.15."""
    radius_end = radius if radius_end is None else radius_end
    reach = max(radius, radius_end) + 0.15
    close = True
    for p, a, b in zip(at, start, end, strict=True):  # tubes fill little of a volume: work in their box only
        close = close & (p > min(a, b) - reach) & (p < max(a, b) + reach)
    axis = [b - a for a, b in zip(start, end, strict=True)]
    offset = [np.broadcast_to(p, close.shape)[close] - a for p, a in zip(at, start, strict=True)]
    length = sum(v * v for v in axis)
    share = (sum(o * v for o, v in zip(offset, axis, strict=True)) / length).clip(0, 1)
    square = sum((o - share * v) ** 2 for o, v in zip(offset, axis, strict=True))
    shape = np.ones(close.shape)
    shape[close] = np.sqrt(square) - (radius + share * (radius_end - radius))
    return shape


def tube(at: Coordinates, points: list[Point], radii: list[float]) -> np.ndarray:
    parts = [capsule(at, points[i], points[i + 1], radii[i], radii[i + 1]) for i in range(len(points) - 1)]
    return reduce(np.minimum, parts)


def rounded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Radius in a plane that is 1 on an outline between a circle and a square, as a trunk has."""
    a, b = a * a, b * b
    return 0.6 * np.sqrt(a + b) + 0.4 * np.sqrt(np.sqrt(a * a + b * b))


def lowest(*shapes: np.ndarray) -> np.ndarray:
    """Union of shapes."""
    return reduce(np.minimum, shapes)


def highest(*shapes: np.ndarray) -> np.ndarray:
    """Intersection of shapes."""
    return reduce(np.maximum, shapes)


class Canvas:
    """Label map and image of one case, filled by painting structures over each other."""

    def __init__(self, at: Coordinates, tissues: np.ndarray, voxel: float) -> None:
        """at: coordinates of the voxels.  tissues: value per label.  voxel: its width, over which edges are soft."""
        self.at, self.tissues, self.voxel = at, tissues, voxel
        self.image = np.full(at[0].shape, tissues[0])  # float64
        self.labels = np.zeros(at[0].shape, np.uint8)

    def paint(self, label: int, shape: np.ndarray) -> None:
        share = (0.5 - shape / self.voxel).clip(0, 1)  # how much of the voxel is inside
        self.image += share * (self.tissues[label] - self.image)
        self.labels[shape < 0] = label


# Anatomies. `draw` is for what all cases have, `disease` for the finding; both are drawn from whatever the finding is.


def paint_brain(canvas: Canvas, draw: np.random.Generator, disease: np.random.Generator, finding: int) -> None:
    x, y, z = canvas.at
    side = (np.abs(x), y, z)
    egg = x * (1 - draw.uniform(0.06, 0.16) * y)  # narrower in front
    low = np.where(z < -0.15, 0.6, 1.0) * (z + 0.15)  # the base is cut off, not round
    radius = np.sqrt((egg / 0.78) ** 2 + (y / 0.94) ** 2 + (low / 1.12) ** 2)
    depth = (1 - radius) * 0.78  # below the skin
    scalp, skull = draw.uniform(0.05, 0.075), draw.uniform(0.055, 0.075)
    canvas.paint(1, -depth)
    outer = depth
    canvas.paint(2, scalp - depth)
    depth = depth - scalp - skull  # below the inner table of the skull
    canvas.paint(3, -depth)

    # Distance to cerebrospinal fluid: outer surface, sulci (sheets on which a wave field is zero), and fissures
    spacing = draw.uniform(0.34, 0.42)
    folds = wave_field(draw, canvas.at, spacing)
    sulci = highest(np.abs(folds) * (spacing / (2 * np.pi)), depth - draw.uniform(0.17, 0.24))
    wobble = 0.012 * folds
    midline = highest(np.abs(x + wobble), depth - 0.36, -0.02 - z)
    sylvian = highest(np.abs(y + 0.2 - 0.6 * (z + 0.2) + wobble), depth - 0.3, np.abs(z + 0.3) - 0.4)
    to_fluid = lowest(depth - 0.01, sulci, midline, sylvian)
    atrophy = draw.uniform(0.004, 0.02)  # half the width of a sulcus, in both classes alike
    cortex = draw.uniform(0.065, 0.085)
    canvas.paint(4, highest(atrophy - to_fluid, -depth))
    canvas.paint(5, atrophy + cortex - to_fluid)

    nuclei = lowest(
        ellipsoid(side, (0.19, -0.26, 0.10), (0.055, 0.14, 0.13)),  # caudate
        ellipsoid(side, (0.31, -0.06, -0.04), (0.075, 0.20, 0.18)),  # lentiform
        ellipsoid(side, (0.12, 0.12, 0.00), (0.095, 0.16, 0.16)),  # thalamus
        capsule(side, (0.24, 0.26, -0.14), (0.36, -0.08, -0.42), 0.05, 0.07),  # hippocampus
    )
    canvas.paint(6, nuclei)

    back = ellipsoid(canvas.at, (0.0, 0.44, -0.92), (0.52, 0.36, 0.40))
    folia = 0.02 * np.sin(38 * np.sqrt((x / 1.3) ** 2 + (y - 0.15) ** 2 + (z + 0.7) ** 2))
    inside = 0.02 - depth
    canvas.paint(3, highest(back - 0.035, inside - 0.02))
    canvas.paint(7, highest(back + folia, inside))
    stem = capsule(canvas.at, (0.0, 0.16, -1.2), (0.0, 0.04, -0.40), 0.11, 0.15)
    cistern = lowest(highest(stem - 0.045, z + 0.36), ellipsoid(canvas.at, (0.0, -0.16, -0.52), (0.15, 0.11, 0.10)))
    canvas.paint(3, highest(cistern, inside))
    canvas.paint(8, stem)

    # Ventricles: lateral horns, third and fourth
    wide = draw.uniform(0.85, 1.15) * (disease.uniform(1.7, 2.1) if finding else 1.0)
    r = 0.052 * wide
    horns = tube(
        side,
        [(0.13, -0.42, 0.10), (0.06, -0.14, 0.20), (0.10, 0.16, 0.26), (0.25, 0.36, 0.08), (0.18, 0.60, 0.02)],
        [r, 1.1 * r, r, 1.3 * r, 0.7 * r],
    )
    temporal = capsule(side, (0.26, 0.36, 0.04), (0.38, 0.00, -0.32), r, 0.5 * r)
    third = highest(ellipsoid(canvas.at, (0.0, 0.04, -0.08), (0.02 + 0.3 * r, 0.20, 0.20)), -0.3 - z)
    fourth = ellipsoid(canvas.at, (0.0, 0.22, -0.74), (0.05 + 0.5 * r, 0.05, 0.10))
    canvas.paint(9, lowest(horns, temporal, third, fourth))

    # Face: the orbits lie in fat under the frontal lobes
    face = ellipsoid(side, (0.27, -0.76, -0.98), (0.36, 0.42, 0.38))
    canvas.paint(2, highest(face - 0.045, scalp - outer))
    canvas.paint(1, highest(face, -outer))
    canvas.paint(10, highest(ellipsoid(side, (0.30, -0.62, -0.86), (0.15, 0.16, 0.15)), -outer))

    centre = (
        disease.choice([-1.0, 1.0]) * disease.uniform(0.26, 0.42),
        disease.uniform(-0.42, 0.46),
        disease.uniform(0.12, 0.48),
    )
    radii = tuple(disease.uniform(0.10, 0.17, 3))
    if finding:
        canvas.paint(11, highest(ellipsoid(canvas.at, centre, radii) + 0.025 * folds, 0.03 - depth))


def paint_chest(canvas: Canvas, draw: np.random.Generator, disease: np.random.Generator, finding: int) -> None:
    x, y, z = canvas.at
    side = (np.abs(x), y, z)
    flat = (x, y, np.zeros(()))  # for columns along the body
    # Wall: fat, muscle, and the cage, which tapers to the apex
    broad, deep = draw.uniform(0.88, 0.95), draw.uniform(0.62, 0.70)
    shoulders = 1 + 0.5 * (z - 0.45).clip(0, None)
    body = (rounded(x / (broad * shoulders), y / deep) - 1) * deep
    canvas.paint(1, body)
    canvas.paint(2, body + draw.uniform(0.03, 0.08) - 0.02 * z)
    taper = np.sqrt(1 - 0.94 * ((z + 0.25).clip(0, 1.45) / 1.48) ** 2)
    cage = (np.sqrt((x / (broad - 0.16)) ** 2 + ((y - 0.01) / (deep - 0.14)) ** 2) / taper - 1) * 0.5 * taper
    space = draw.uniform(0.26, 0.31)  # from one rib to the next
    level = (z + draw.uniform(0.32, 0.42) * y + 0.10 * side[0]) / space  # ribs slope down to the front
    between = np.abs(level - np.round(level)) * space
    ribs = (np.sqrt(((cage - 0.025) / 0.036) ** 2 + (between / 0.065) ** 2) - 1) * 0.036
    canvas.paint(3, highest(ribs, -0.42 - y, body + 0.02))  # in front they are cartilage
    clavicle = capsule(side, (0.06, -0.42, 0.72), (0.66, -0.16, 0.86), 0.05)
    canvas.paint(3, highest(clavicle, body + 0.02))
    blade = (np.abs(cage - 0.105) - 0.018, np.abs(side[0] - 0.52 - 0.08 * z) - 0.16, 0.05 - y, 0.10 - z)
    canvas.paint(3, highest(*blade, body + 0.03))

    # Below the diaphragm, whose right dome is the higher one: liver, stomach and spleen in fat
    canvas.paint(7, cage + 0.02)
    dome = draw.uniform(-0.62, -0.5)
    rest = ((side[0] - 0.36) / 0.42) ** 2 + ((y + 0.05) / 0.5) ** 2
    diaphragm = dome + 0.07 * np.tanh(-x / 0.1) - 0.30 * rest
    abdomen = highest(cage + 0.03, (z - diaphragm) * 0.8)
    canvas.paint(1, abdomen)
    liver = x - 0.12 + 0.5 * (z + 0.6) + 0.5 * (y + 0.25).clip(0, None) + 0.06 * np.sin(7 * y)
    organs = lowest(
        liver,
        ellipsoid(canvas.at, (0.36, -0.16, -0.80), (0.24, 0.20, 0.36)),
        ellipsoid(canvas.at, (0.50, 0.22, -0.84), (0.20, 0.15, 0.34)),
    )
    canvas.paint(11, highest(abdomen + 0.02, organs))

    # Lungs: what the cage leaves beside the mediastinum, the heart and the spine
    heart_size = draw.uniform(0.9, 1.12)
    heart_radii = (0.34 * heart_size, 0.26 * heart_size, 0.36 * heart_size)
    heart = ellipsoid((x, y, z + 0.35 * (x - 0.12)), (0.14, -0.14, -0.28), heart_radii)
    middle = 0.14 + 0.06 * (z - 0.2).clip(0, 1) + 0.05 * np.tanh((y - 0.1) / 0.1) - side[0]
    spine_bed = -ellipsoid(flat, (0.0, 0.42, 0.0), (0.19, 0.19, 1.0))
    lungs = highest(cage + 0.035, middle, 0.02 - heart, spine_bed, (diaphragm - z) * 0.8 + 0.02)
    canvas.paint(5, lungs)
    blobs = wave_field(draw, canvas.at, 0.5, waves=5)
    canvas.image *= np.where(lungs < 0, 1 + 0.12 * blobs, 1.0)

    vessels = lung_vessels(draw, canvas.at, lungs)
    canvas.paint(6, highest(vessels, lungs + 0.01))

    canvas.paint(8, heart)
    chambers = ellipsoid((x, y, z + 0.35 * (x - 0.12)), (0.16, -0.15, -0.28), tuple(0.62 * r for r in heart_radii))
    canvas.paint(9, highest(chambers, 0.03 - np.abs(x - 0.13 + 0.6 * (y + 0.14))))  # two sides and a septum
    vertebra = ellipsoid(flat, (0.0, 0.37, 0.0), (0.13, 0.10, 1.0)) + 0.02 * np.cos(2 * np.pi * z / (0.8 * space))
    arch = lowest(
        highest(np.abs(np.hypot(x, y - 0.50) - 0.065) - 0.022, 0.43 - y),
        capsule(flat, (0.0, 0.55, 0.0), (0.0, 0.60, 0.0), 0.028),
        capsule((side[0], *flat[1:]), (0.06, 0.49, 0.0), (0.17, 0.53, 0.0), 0.025),
    )
    sternum = highest(ellipsoid(flat, (0.0, 0.16 - deep, 0.0), (0.12, 0.04, 1.0)), -0.45 - z, z - 0.7)
    canvas.paint(4, highest(lowest(vertebra, arch, sternum), body + 0.03))

    canvas.paint(
        9,
        lowest(
            tube(
                canvas.at,
                [(-0.05, -0.12, -0.1), (-0.08, -0.16, 0.25), (0.0, -0.04, 0.48), (0.13, 0.2, 0.4), (0.14, 0.26, -1.2)],
                [0.085, 0.085, 0.08, 0.07, 0.065],
            ),
            tube(canvas.at, [(0.06, -0.2, -0.02), (0.06, -0.08, 0.2), (-0.18, 0.04, 0.12)], [0.08, 0.075, 0.05]),
            capsule(canvas.at, (0.06, -0.08, 0.2), (0.22, 0.06, 0.16), 0.07, 0.05),
            capsule(canvas.at, (-0.16, -0.08, 0.0), (-0.15, -0.1, 1.2), 0.05),
            capsule(canvas.at, (0.08, -0.02, 0.45), (0.16, -0.02, 1.2), 0.03),
        ),
    )
    canvas.paint(
        10,
        lowest(
            capsule(canvas.at, (0.0, 0.06, 1.2), (0.0, 0.12, 0.30), 0.06),
            capsule(canvas.at, (0.0, 0.12, 0.30), (-0.2, 0.1, 0.08), 0.048, 0.035),
            capsule(canvas.at, (0.0, 0.12, 0.30), (0.2, 0.12, 0.06), 0.045, 0.035),
        ),
    )

    count = int(disease.integers(3, 5))
    places = disease.uniform(-1, 1, (4, 3))
    sizes = disease.uniform(0.10, 0.14, 4)  # radius 5 to 7 % of the width
    if finding:
        for k in range(count):
            # alternate between the lungs, each nodule in a height of its own
            sign = 1.0 if (k + int(places[0, 0] > 0)) % 2 else -1.0
            centre = (
                sign * (0.47 + 0.06 * places[k, 0]),
                0.10 + 0.06 * sign + 0.16 * places[k, 1],  # on the left, behind the heart
                (-0.20, 0.30, 0.05, -0.05)[k] + 0.1 * places[k, 2],
            )
            nodule = ellipsoid(canvas.at, centre, (sizes[k],) * 3) + 0.012 * blobs
            canvas.paint(12, highest(nodule, cage + 0.02))


def lung_vessels(draw: np.random.Generator, at: Coordinates, lungs: np.ndarray) -> np.ndarray:
    """Two branching trees that grow from the hila: [H, W, C], negative inside a vessel, 1 far from any."""
    distance = np.ones(lungs.shape)
    for sign in (-1.0, 1.0):
        here = (lungs < 0.05) & (sign * at[0] > 0)
        where = tuple(a[here] for a in at)
        nearest = np.ones(where[0].shape)
        for trunk in range(4):
            angle = 2 * np.pi * (trunk + draw.uniform(-0.25, 0.25)) / 4 + 0.5
            way = np.array([sign * draw.uniform(0.5, 0.8), 0.5 * np.cos(angle), np.sin(angle)])
            tips = [(np.array([sign * 0.17, 0.06, 0.08]), way, 0.05, 0.26)]
            for _ in range(3):
                grown = []
                for start, direction, radius, length in tips:
                    direction = direction / np.sqrt((direction**2).sum())
                    end = start + length * direction
                    reach = capsule(where, tuple(start), tuple(end), radius, 0.75 * radius)
                    nearest = np.minimum(nearest, reach)
                    grown += [
                        (end, direction + 0.55 * draw.standard_normal(3), 0.7 * radius, 0.8 * length) for _ in range(2)
                    ]
                tips = grown
        distance[here] = nearest
    return distance


def paint_heart(canvas: Canvas, draw: np.random.Generator, disease: np.random.Generator, finding: int) -> None:
    x, y, z = canvas.at
    side = (np.abs(x), y, z)
    flat = (x, y, np.zeros(()))
    # Chest wall with ribs under a layer of fat, lungs, and organs below the diaphragm
    wall = (rounded(x / 1.02, (y - 0.02) / 0.95) - 1) * 0.95
    thick = draw.uniform(0.17, 0.22)
    canvas.paint(4, wall)
    canvas.paint(1, wall + draw.uniform(0.03, 0.08))
    space = draw.uniform(0.36, 0.44)
    level = (z + 0.4 * y) / space
    between = np.abs(level - np.round(level)) * space
    ribs = (np.sqrt(((wall + thick - 0.055) / 0.042) ** 2 + (between / 0.11) ** 2) - 1) * 0.042
    canvas.paint(3, highest(ribs, -0.62 - y))
    sternum = ellipsoid(flat, (0.0, 0.09 + thick - 0.95, 0.0), (0.16, 0.05, 1.0))
    canvas.paint(3, sternum)
    cage = wall + thick
    canvas.paint(2, cage)
    rest = ((side[0] - 0.42) / 0.5) ** 2 + (y / 0.8) ** 2
    abdomen = highest(cage, (z + draw.uniform(0.36, 0.46) - 0.06 * np.tanh(-x / 0.1) + 0.25 * rest) * 0.85)
    canvas.paint(4, abdomen)
    organs = lowest(
        x - 0.25 + 0.5 * (z + 0.6) + 0.5 * (y + 0.2).clip(0, None) + 0.06 * np.sin(6 * y),
        ellipsoid(canvas.at, (0.45, -0.18, -0.95), (0.28, 0.26, 0.56)),
        ellipsoid(canvas.at, (0.58, 0.36, -0.92), (0.22, 0.20, 0.54)),
    )
    canvas.paint(5, highest(abdomen + 0.03, organs))
    texture = wave_field(draw, canvas.at, 0.4, waves=6)
    lung_vessels = [
        capsule(
            side,
            (0.24, 0.28, 0.15),
            (draw.uniform(0.55, 0.8), draw.uniform(-0.4, 0.6), draw.uniform(-0.5, 0.9)),
            0.06,
            0.025,
        )
        for _ in range(5)
    ]
    canvas.paint(12, highest(lowest(*lung_vessels), cage + 0.05, -0.03 - abdomen))

    # Spine and the muscles beside it
    canvas.paint(1, highest(ellipsoid(flat, (0.0, 0.80, 0.0), (0.36, 0.26, 1.0)), wall + 0.03))
    column = ellipsoid(flat, (0.0, 0.64, 0.0), (0.19, 0.15, 1.0)) + 0.015 * np.cos(2 * np.pi * z / space)
    ring = highest(np.abs(np.hypot(x, y - 0.82) - 0.08) - 0.028, 0.72 - y)
    canvas.paint(3, highest(lowest(column, ring), wall + 0.02))

    # The heart has its own axes: along (to the apex), across (from the left to the right ventricle), and the third
    size = draw.uniform(1.08, 1.24)
    along = np.array([0.66, -0.58, -0.48]) + 0.06 * draw.standard_normal(3)
    along /= np.sqrt((along**2).sum())
    across = np.array([-0.62, -0.76, 0.1])
    across = across - along * (across * along).sum()
    across /= np.sqrt((across**2).sum())
    third = np.cross(along, across)
    centre = np.array([0.13, -0.10, -0.04]) + 0.02 * draw.standard_normal(3)
    moved = tuple((a - c) / size for a, c in zip(canvas.at, centre, strict=True))
    u, v, w = (sum(axis[k] * moved[k] for k in range(3)) for axis in (along, across, third))
    own = (u, v, w)
    moved = tuple(m + c for m, c in zip(moved, centre, strict=True))

    normal = (draw.uniform(0.165, 0.205), draw.uniform(0.10, 0.125), draw.uniform(0.34, 0.38))
    dilated = (disease.uniform(0.255, 0.295), disease.uniform(0.045, 0.065), disease.uniform(0.40, 0.44))
    short, muscle, long = dilated if finding else normal
    right = draw.uniform(0.85, 1.15)
    atria = draw.uniform(0.88, 1.14)

    sac = lowest(
        ellipsoid(own, (0.0, 0.10, 0.0), (0.50, 0.46, 0.40)),
        ellipsoid(moved, (-0.08, 0.10, 0.12), (0.46, 0.38, 0.46)),
    )
    upper = highest(ellipsoid(flat, (0.0, 0.06, 0.0), (0.32, 0.46, 1.0)), -z)  # mediastinum above the heart
    sac = lowest(sac, upper) + 0.015 * texture
    canvas.paint(4, highest(sac, cage + 0.01))
    base = -0.24 - u  # the valve plane cuts the ventricles off
    right_ventricle = highest(ellipsoid(own, (-0.02, 0.26, 0.02), (0.38, 0.22 * right, 0.29 * right)), base + 0.02)
    outflow = capsule(moved, (0.02, -0.38, 0.10), (0.12, -0.30, 0.34), 0.11, 0.09)
    canvas.paint(6, lowest(right_ventricle - 0.035, outflow - 0.03))
    canvas.paint(8, lowest(right_ventricle + 0.008 * texture, outflow))

    right_atrium = ellipsoid(moved, (-0.34, -0.02, 0.0), (0.19 * atria, 0.22 * atria, 0.25 * atria))
    cavae = lowest(
        capsule(moved, (-0.32, 0.02, 0.1), (-0.30, -0.02, 1.4), 0.075),
        capsule(moved, (-0.28, 0.12, -0.2), (-0.22, 0.22, -1.4), 0.085),
    )
    left_atrium = ellipsoid(moved, (-0.02, 0.30, 0.16), (0.25 * atria, 0.16 * atria, 0.20 * atria))
    veins = lowest(
        capsule(side, (0.12, 0.34, 0.22), (0.50, 0.40, 0.34), 0.055, 0.04),
        capsule(side, (0.12, 0.34, 0.06), (0.50, 0.44, -0.02), 0.055, 0.04),
    )
    canvas.paint(6, lowest(right_atrium, left_atrium) - 0.02)
    canvas.paint(10, lowest(right_atrium, cavae))
    canvas.paint(9, lowest(left_atrium, veins))

    cavity = ellipsoid(own, (0.0, 0.0, 0.0), (long, short, short))
    outer = ellipsoid(own, (0.0, 0.0, 0.0), (long + muscle, short + muscle, short + muscle))
    canvas.paint(6, highest(outer, base))
    canvas.paint(7, highest(cavity + 0.008 * texture, base))
    papillary = lowest(
        capsule(own, (-0.02, 0.5 * short, 0.72 * short), (0.6 * long, 0.45 * short, 0.6 * short), 0.028),
        capsule(own, (-0.02, -0.2 * short, -0.85 * short), (0.6 * long, -0.1 * short, -0.6 * short), 0.028),
    )
    canvas.paint(6, highest(papillary, cavity))
    canvas.paint(7, capsule(own, (-0.34, 0.0, 0.02), (-0.2, 0.0, 0.0), 0.10))  # mitral valve, open

    canvas.paint(
        12,
        lowest(
            tube(
                moved,
                [(0.12, -0.30, 0.36), (0.14, -0.12, 0.56), (-0.1, 0.06, 0.56), (-0.34, 0.1, 0.52)],
                [0.09, 0.085, 0.07, 0.055],
            ),
            capsule(moved, (0.14, -0.12, 0.56), (0.36, 0.14, 0.56), 0.08, 0.055),
        ),
    )
    canvas.paint(
        11,
        lowest(
            tube(
                moved,
                [(0.02, 0.0, 0.06), (-0.08, -0.14, 0.34), (-0.10, -0.14, 0.62), (-0.02, 0.0, 0.84)],
                [0.095, 0.105, 0.095, 0.09],
            ),
            tube(
                canvas.at,
                [(-0.02, 0.0, 0.84), (0.16, 0.34, 0.82), (0.22, 0.48, 0.6), (0.20, 0.50, -1.3)],
                [0.09, 0.085, 0.08, 0.07],
            ),
        ),
    )


Painter = Callable[[Canvas, np.random.Generator, np.random.Generator, int], None]
PAINTERS: dict[str, Painter] = {"brain": paint_brain, "chest": paint_chest, "heart": paint_heart}


def acquire(image: np.ndarray, draw: np.random.Generator, noise: np.random.Generator) -> np.ndarray:
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
