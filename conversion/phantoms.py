"""Small anatomical phantoms, deterministic by seed: data to try the project on, and to test it with.

    python -m conversion.phantoms --dest Training_Data --volumes 6 --images 12 --seed 0

Volumes of brains, chests and hearts, and chest X-rays that are projections of chests. An anatomy is a list of
ellipsoids and tubes, painted one over the other, in slices as radiologists look at them. Pose and a smooth random
deformation bend the coordinates, not the shapes. Contrast, bias field, blur and noise are drawn per case. Hearts are
written with their label maps. Half of the X-rays have a finding, lung nodules, which labels/findings.csv tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse.typing import NonNegativeInt
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from utils import config
from utils.files import write_csv

ANATOMIES = ("brain", "chest", "heart")
SHAPE = (64, 64, 40)  # height, width, slices
SPACING_MM = [1.0, 1.0, 1.5]

# Grey values from 0 to 1 in CT, T1 and T2; attenuation of X-rays per unit length, relative to muscle.
TISSUES = {
    "air": (0.02, 0.02, 0.02, 0.0),
    "fat": (0.36, 0.88, 0.72, 0.85),
    "muscle": (0.52, 0.42, 0.32, 1.0),
    "bone": (0.90, 0.58, 0.48, 1.8),
    "lung": (0.10, 0.10, 0.14, 0.22),
    "lung_vessels": (0.55, 0.34, 0.50, 1.0),
    "abdomen": (0.60, 0.52, 0.40, 1.05),
    "airways": (0.03, 0.03, 0.03, 0.02),
    "nodule": (0.55, 0.48, 0.72, 1.3),
    "scalp": (0.45, 0.85, 0.55, 1.0),
    "skull": (0.95, 0.14, 0.10, 2.2),
    "csf": (0.20, 0.20, 0.88, 1.0),
    "grey_matter": (0.48, 0.47, 0.62, 1.0),
    "white_matter": (0.36, 0.78, 0.35, 1.0),
    "deep_grey": (0.50, 0.55, 0.50, 1.0),
    "cerebellum": (0.44, 0.54, 0.58, 1.0),
    "brainstem": (0.38, 0.70, 0.42, 1.0),
    "ventricles": (0.18, 0.17, 0.95, 1.0),
    "eyes": (0.26, 0.22, 0.90, 1.0),
    "heart": (0.58, 0.62, 0.58, 1.05),
    "great_vessels": (0.72, 0.18, 0.84, 1.1),
    "myocardium": (0.56, 0.58, 0.34, 1.05),
    "left_ventricle": (0.88, 0.16, 0.88, 1.1),
    "right_ventricle": (0.72, 0.20, 0.82, 1.1),
    "left_atrium": (0.84, 0.14, 0.86, 1.1),
    "right_atrium": (0.68, 0.22, 0.80, 1.1),
    "aorta": (0.86, 0.12, 0.88, 1.1),
    "pulmonary_artery": (0.74, 0.15, 0.78, 1.1),
}
XRAY = 3  # the column of the attenuation

Random = np.random.Generator
Grid = tuple[np.ndarray, np.ndarray, np.ndarray]
# f(x, y, z, random numbers of the case), negative inside, near its surface about the distance to it. x runs from the
# patient's right (-1) to left (1), y from front to back, z from feet to head.
Shape = Callable[[Grid, Random], np.ndarray]


def ball(centre: tuple[float, ...], radii: tuple[float, ...], both: bool = False, folds: float = 0.0) -> Shape:
    """An ellipsoid, moved and stretched a little in every case.

    both: the same on the right.  folds: how deep its surface is folded, as the brain's.
    """

    def shape(at: Grid, draw: Random) -> np.ndarray:
        middle, size = centre + draw.uniform(-0.02, 0.02, 3), radii * draw.uniform(0.92, 1.08, 3)
        waves = wave_field(draw, at, 0.28) if folds else 0.0
        at = (np.abs(at[0]), *at[1:]) if both else at
        x, y, z = (((a - c) / r) ** 2 for a, c, r in zip(at, middle, size, strict=True))
        return (np.sqrt(x + y + z) - 1) * min(size) + folds * waves

    return shape


def tube(*points: tuple[float, float, float, float], both: bool = False) -> Shape:
    """A round tube through points (x, y, z, radius), linear in between."""

    def part(at: list[np.ndarray], start: np.ndarray, end: np.ndarray) -> np.ndarray:
        axis = (end - start)[:3]
        offset = [a - s for a, s in zip(at, start[:3], strict=True)]
        share = (sum(o * v for o, v in zip(offset, axis, strict=True)) / (axis @ axis)).clip(0, 1)
        square = sum((o - share * v) ** 2 for o, v in zip(offset, axis, strict=True))
        return np.sqrt(square) - (start[3] + share * (end - start)[3])

    def shape(at: Grid, draw: Random) -> np.ndarray:
        at = (np.abs(at[0]), *at[1:]) if both else at
        moved = np.array(points) + draw.uniform(-0.01, 0.01, (len(points), 4)) * [2, 2, 2, 1]
        distance = np.ones(at[0].shape)
        for ends in pairwise(moved):  # tubes fill little of a volume: work in their boxes only
            low, high = (limit(ends, axis=0) for limit in (np.min, np.max))
            near = np.ones(distance.shape, bool)
            for k in range(3):
                near &= (at[k] > low[k] - high[3] - 0.15) & (at[k] < high[k] + high[3] + 0.15)
            distance[near] = np.minimum(distance[near], part([a[near] for a in at], *ends))
        return distance

    return shape


def ribs(width: float, depth: float, heights: np.ndarray) -> list[tuple[str, Shape]]:
    """Pairs of ribs that run from the spine down to the front."""
    turns = np.linspace(0.1, 2.6, 6)
    arc = np.stack([width * np.sin(turns), depth * np.cos(turns), -0.1 * turns, 0 * turns + 0.04], axis=1)
    return [("bone", tube(*(arc + np.array([0, 0, z, 0])), both=True)) for z in heights]


def spine(back: float) -> list[tuple[str, Shape]]:
    return [
        ("bone", tube((0, back, -1.5, 0.12), (0, back, 1.5, 0.11))),
        ("bone", tube((0, back + 0.2, -1.5, 0.06), (0, back + 0.2, 1.5, 0.06))),
    ]


# What is painted, in this order: the structure and its shape.
BRAIN = [
    ("scalp", ball((0, 0, -0.1), (0.80, 0.95, 1.02))),
    ("skull", ball((0, 0, -0.1), (0.74, 0.89, 0.96))),
    ("csf", ball((0, 0, -0.1), (0.66, 0.81, 0.88))),
    ("scalp", ball((0, -0.75, -0.95), (0.55, 0.35, 0.42))),
    ("eyes", ball((0.30, -0.68, -0.84), (0.15, 0.16, 0.16), both=True)),
    ("grey_matter", ball((0.31, 0, 0), (0.29, 0.70, 0.66), both=True, folds=0.015)),
    ("white_matter", ball((0.29, 0, 0), (0.24, 0.60, 0.56), both=True, folds=0.045)),
    ("white_matter", ball((0, 0, 0.08), (0.20, 0.35, 0.08))),
    ("deep_grey", ball((0.19, -0.24, 0.08), (0.07, 0.17, 0.14), both=True)),
    ("deep_grey", ball((0.16, 0.10, -0.02), (0.11, 0.17, 0.15), both=True)),
    ("ventricles", tube((0.12, -0.40, 0.10, 0.05), (0.09, 0.1, 0.24, 0.07), (0.24, 0.46, 0.06, 0.08), both=True)),
    ("ventricles", ball((0, 0.04, -0.10), (0.035, 0.22, 0.16))),
    ("csf", ball((0, 0.1, -0.58), (0.30, 0.50, 0.16))),
    ("brainstem", tube((0, 0.14, -1.3, 0.12), (0, 0.02, -0.36, 0.16))),
    ("cerebellum", ball((0.22, 0.42, -0.66), (0.30, 0.32, 0.26), both=True, folds=0.02)),
    ("ventricles", ball((0, 0.25, -0.68), (0.07, 0.06, 0.12))),
]
CHEST = [
    ("fat", ball((0, 0, 0), (0.96, 0.74, 3.0))),
    ("muscle", ball((0, 0, 0), (0.89, 0.67, 3.0))),
    ("fat", ball((0, 0, 0), (0.16, 0.44, 1.4))),
    ("lung", ball((0.42, 0.02, -0.1), (0.34, 0.52, 0.98), both=True)),
    *ribs(0.81, 0.60, np.arange(-1.0, 1.3, 0.3)),
    *(("lung_vessels", tube((0.2, 0.05, 0.05, 0.05), (0.38, y, z, 0.035), (0.55, 1.6 * y, 1.8 * z, 0.015), both=True))
      for y, z in ((-0.1, 0.2), (0.1, -0.2), (0.15, 0.1), (-0.12, -0.15))),
    ("abdomen", ball((-0.38, -0.02, -0.85), (0.46, 0.50, 0.42))),
    ("abdomen", ball((0.42, -0.02, -0.95), (0.38, 0.46, 0.40))),
    *spine(0.40),
    ("bone", tube((0, -0.60, -0.4, 0.05), (0, -0.56, 0.7, 0.06))),
    ("heart", ball((0.12, -0.16, -0.25), (0.36, 0.28, 0.36))),
    ("great_vessels", ball((0.16, -0.15, -0.26), (0.2, 0.15, 0.2))),
    ("great_vessels", tube((0.0, -0.08, 0, 0.09), (-0.05, -0.08, 0.4, 0.08), (0.15, 0.22, 0.4, 0.07))),
    ("great_vessels", tube((0.15, 0.22, 0.4, 0.07), (0.15, 0.26, -1.3, 0.07))),
    ("great_vessels", tube((0.06, -0.12, 0.0, 0.08), (0.0, 0.0, 0.16, 0.08), (-0.2, 0.05, 0.1, 0.05))),
    ("airways", tube((0.0, 0.06, 1.3, 0.06), (0.0, 0.12, 0.28, 0.06))),
    ("airways", tube((0.0, 0.12, 0.28, 0.05), (0.22, 0.12, 0.08, 0.035), both=True)),
]  # fmt: skip
HEART = [
    ("fat", ball((0, 0, 0), (1.0, 0.94, 4.0))),
    ("muscle", ball((0, 0, 0), (0.93, 0.87, 4.0))),
    ("lung", ball((0, 0, 0), (0.80, 0.74, 4.0))),
    *ribs(0.84, 0.78, np.arange(-1.0, 1.5, 0.4)),
    ("abdomen", ball((-0.35, 0, -0.95), (0.50, 0.66, 0.50))),
    ("abdomen", ball((0.45, 0.1, -1.05), (0.38, 0.56, 0.44))),
    ("fat", ball((0.05, -0.05, 0.0), (0.60, 0.54, 0.60))),
    ("fat", tube((0, 0, 0.3, 0.34), (0, 0.05, 1.5, 0.3))),
    *spine(0.62),
    ("myocardium", ball((-0.10, -0.26, -0.10), (0.28, 0.24, 0.32))),
    ("right_ventricle", ball((-0.10, -0.27, -0.10), (0.23, 0.19, 0.27))),
    ("right_ventricle", tube((-0.02, -0.34, 0.1, 0.11), (0.1, -0.3, 0.38, 0.09))),
    ("myocardium", ball((0.24, -0.12, -0.12), (0.33, 0.31, 0.34))),
    ("left_ventricle", ball((0.24, -0.12, -0.1), (0.21, 0.19, 0.25))),
    ("right_atrium", ball((-0.34, 0.02, 0.0), (0.20, 0.22, 0.25))),
    ("right_atrium", tube((-0.30, 0.06, 1.4, 0.08), (-0.32, 0.04, 0.1, 0.09), (-0.26, 0.16, -1.4, 0.09))),
    ("left_atrium", ball((0.02, 0.28, 0.14), (0.27, 0.17, 0.20))),
    ("left_atrium", tube((0.05, 0.32, 0.18, 0.06), (0.55, 0.38, 0.26, 0.05), both=True)),
    ("pulmonary_artery", tube((0.1, -0.3, 0.38, 0.1), (0.1, -0.12, 0.56, 0.09), (-0.35, 0.12, 0.52, 0.06))),
    ("pulmonary_artery", tube((0.1, -0.12, 0.56, 0.08), (0.38, 0.14, 0.54, 0.06))),
    ("aorta", tube((0.06, -0.02, 0.1, 0.1), (-0.08, -0.14, 0.4, 0.11), (-0.06, -0.08, 0.76, 0.1))),
    ("aorta", tube((-0.06, -0.08, 0.76, 0.1), (0.18, 0.36, 0.76, 0.09), (0.22, 0.44, -1.4, 0.08))),
]  # fmt: skip
PARTS = dict(zip(ANATOMIES, (BRAIN, CHEST, HEART), strict=True))
# {label value: structure} of each anatomy
STRUCTURES = {a: dict(enumerate(dict.fromkeys(name for name, _ in parts), 1)) for a, parts in PARTS.items()}


class Phantom(NamedTuple):
    image: np.ndarray  # [H, W, D] uint8; rows front to back, columns right to left, slices feet to head
    labels: np.ndarray  # [H, W, D] uint8, values of STRUCTURES, 0 outside the body


def phantom(anatomy: str, seed: int, shape: tuple[int, int, int] = SHAPE) -> Phantom:
    """One case, the same bytes on every machine. shape: height, width, slices; any shape covers the same body."""
    draw = np.random.default_rng((seed, ANATOMIES.index(anatomy)))
    grey = tissues(draw, int(draw.integers(XRAY)))
    image, labels = paint(PARTS[anatomy], STRUCTURES[anatomy], posed_grid(draw, shape), grey, draw)
    image *= 1 + 0.15 * smooth_field(draw, shape)  # of the coil
    width = draw.uniform(0.3, 0.8) * min(shape[:2]) / 64
    image = ndimage.gaussian_filter(image, (width, width, 0.8 * width), truncate=3.0)
    image = (image + draw.uniform(0.01, 0.03) * draw.standard_normal(shape)).clip(0, None)
    return Phantom(quantise(draw.uniform(0, 0.09) + image * draw.uniform(0.45, 0.85)), labels)


def xray(seed: int, size: int = 128, finding: bool = False) -> np.ndarray:
    """[size, size] uint8: a chest from the front, bones white, projected along y after Beer and Lambert.

    finding: nodules in the lungs; with and without it, the same seed is the same patient.
    """
    draw, film = (np.random.default_rng((seed, XRAY, part)) for part in range(2))
    places = np.array([(0.45, 0, 0.35), (-0.45, 0, 0.2), (0.5, 0.2, -0.1), (-0.48, 0, -0.15)])
    places += film.uniform(-0.1, 0.1, places.shape)
    nodules = [("nodule", ball(tuple(place), (0.13, 0.13, 0.13))) for place in places if finding]
    at = posed_grid(draw, (size // 4, size, size))  # the projection averages over y, so a coarser grid will do
    grey = tissues(draw, XRAY)
    labels = STRUCTURES["chest"] | {99: "nodule"}
    path = 2 * paint(CHEST + nodules, labels, at, grey, draw)[0].mean(axis=0).T[::-1]  # [z, x], head on top
    path = ndimage.gaussian_filter(path, film.uniform(0.3, 0.8) * size / 128)
    path = film.uniform(1.2, 1.7) * path + 0.02 * film.standard_normal(path.shape)
    path *= 1 + 0.06 * smooth_field(film, (size, size, 1))[..., 0]
    low, high = np.percentile(path, (2.0, 99.5))
    path = ((path - low) / (high - low)).clip(0, 1) ** film.uniform(0.75, 1.3)
    return quantise(film.uniform(0, 0.08) + path * film.uniform(0.75, 0.92))


# Everything is float64: machines differ in the last bits of sin and exp, and only at this precision is that far too
# little to move a rounded grey value.
def paint(
    parts: list[tuple[str, Shape]], names: dict[int, str], at: Grid, grey: dict[str, float], draw: Random
) -> tuple[np.ndarray, np.ndarray]:
    """(grey values, labels) of shapes painted one over the other, their edges as soft as a voxel is wide."""
    values = {name: value for value, name in names.items()}
    image, labels = np.full(at[0].shape, grey["air"]), np.zeros(at[0].shape, np.uint8)
    for name, shape in parts:
        distance = shape(at, draw)
        share = (0.5 - distance * min(distance.shape[1:]) / 2).clip(0, 1)  # of the voxel that lies inside
        image += share * (grey[name] - image)
        labels[distance < 0] = values[name]
    return image, labels


def tissues(draw: Random, column: int) -> dict[str, float]:
    """One contrast, a little different in every case."""
    jitter = 0.03 * draw.standard_normal(len(TISSUES))
    return {name: max(0.02, row[column] + more) for (name, row), more in zip(TISSUES.items(), jitter, strict=True)}


def posed_grid(draw: Random, shape: tuple[int, int, int]) -> Grid:
    """x, y, z of every voxel, each [H, W, D], after a random rotation, shift, scaling and bending."""
    y, x, z = np.meshgrid(*((2 * np.arange(n) + 1.0) / n - 1 for n in shape), indexing="ij")
    turn = Rotation.from_euler("xyz", draw.uniform(-8, 8, 3), degrees=True).as_matrix()
    turn = turn / (draw.uniform(0.92, 1.06) * draw.uniform(0.95, 1.05, 3))
    shift = draw.uniform(-0.06, 0.06, 3)
    return tuple(
        a * (x - shift[0]) + b * (y - shift[1]) + c * (z - shift[2]) + 0.025 * smooth_field(draw, shape)
        for a, b, c in turn
    )


def smooth_field(draw: Random, shape: tuple[int, int, int], modes: int = 3) -> np.ndarray:
    """A random field of about unit variance [H, W, D] out of the lowest cosines along every axis."""
    order = np.arange(modes)
    weight = 1 / (1.0 + order[:, None, None] + order[:, None] + order)  # less of the finer waves
    weight[0, 0, 0] = 0
    waves = [np.cos(np.pi * order[:, None] * (np.arange(n) + 0.5) / n) for n in shape]
    return np.einsum("abc,ah,bw,cd->hwd", draw.standard_normal(weight.shape) * weight * 1.2, *waves, optimize=True)


def wave_field(draw: Random, at: Grid, length: float, waves: int = 8) -> np.ndarray:
    """A random field of unit variance whose folds are `length` apart: plane waves of that length in all directions."""
    directions = draw.standard_normal((waves, 3))
    directions *= 2 * np.pi / length / np.linalg.norm(directions, axis=1, keepdims=True)
    phases = draw.uniform(0, 2 * np.pi, waves)
    field = sum(np.cos(a * at[0] + b * at[1] + c * at[2] + p) for (a, b, c), p in zip(directions, phases, strict=True))
    return field * np.sqrt(2 / waves)


def quantise(image: np.ndarray) -> np.ndarray:
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


@dataclass
class Config:
    dest: str
    """folder to write into, e.g. Training_Data; files of the same names are replaced"""
    volumes: NonNegativeInt = 6
    """volumes of each anatomy"""
    images: NonNegativeInt = 12
    """X-rays"""
    seed: NonNegativeInt = 0
    """random seed of the first case of each data set"""


def main(cfg: Config) -> None:
    about: dict[str, Any] = {"modality": "synthetic", "source": "conversion/phantoms.py; not patient data"}
    for anatomy in ANATOMIES:
        folder = Path(cfg.dest) / f"Phantom_{anatomy.capitalize()}"
        structures = {name: [value] for value, name in STRUCTURES[anatomy].items()} if anatomy == "heart" else {}
        of_volumes = {"spacing_mm": SPACING_MM, "slice_axis": 2, "structures": structures}
        (folder / "labels" if structures else folder).mkdir(parents=True, exist_ok=True)
        config.save_yaml(about | {key: value for key, value in of_volumes.items() if value}, folder / "dataset.yaml")
        for i in range(cfg.volumes):
            case, name = phantom(anatomy, cfg.seed + i), f"{anatomy}_{i:03d}.npy"
            np.save(folder / name, case.image, allow_pickle=False)
            if structures:
                np.save(folder / "labels" / name, case.labels, allow_pickle=False)
    folder = Path(cfg.dest) / "Phantom_XRay"
    config.save_yaml(about, folder / "dataset.yaml")
    findings = {f"xray_{i:03d}.png": i % 2 for i in range(cfg.images)}
    for i, (name, finding) in enumerate(findings.items()):
        Image.fromarray(xray(cfg.seed + i, finding=bool(finding))).save(folder / name)
    rows = [{"file": name, "finding": finding} for name, finding in findings.items()]
    write_csv(rows, folder / "labels/findings.csv", ("file", "finding"))


if __name__ == "__main__":
    config.main(main, Config, __doc__)
