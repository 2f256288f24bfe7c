"""Small anatomical phantoms, deterministic by seed: data to try the project on, and to test it with.

    python -m conversion.phantoms --dest Training_Data --volumes 6 --images 12 --seed 0

Volumes of brains, chests and hearts, and chest X-rays that are projections of chests. An anatomy is a list of
ellipsoids and tubes (phantoms.yaml), painted one over the other, in slices as radiologists look at them. Pose and a
smooth random deformation bend the coordinates, not the shapes. Contrast, bias field, blur and noise are drawn per case.
Hearts are written with their label maps. Half of the X-rays have a finding, lung nodules (labels/findings.csv).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

XRAY = 3  # the column of the attenuation in phantoms.yaml

Random = np.random.Generator
Grid = tuple[np.ndarray, np.ndarray, np.ndarray]
# f(x, y, z, random numbers of the case), negative inside, near its surface about the distance to it.
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


def ribs(width: float, depth: float, heights: Sequence[float]) -> list[Shape]:
    """Pairs of ribs that run from the spine down to the front. heights: from, to, step."""
    turns = np.linspace(0.1, 2.6, 6)
    arc = np.stack([width * np.sin(turns), depth * np.cos(turns), -0.1 * turns, 0 * turns + 0.04], axis=1)
    return [tube(*(arc + np.array([0, 0, z, 0])), both=True) for z in np.arange(*heights)]


def painted(parts: list[dict[str, Any]]) -> list[tuple[str, Shape]]:
    """What phantoms.yaml lists of an anatomy: tissues and their shapes, in the order of painting."""
    found = []
    for part in parts:
        tissue = part.pop("tissue")
        if "ribs" in part:
            found += [(tissue, rib) for rib in ribs(*part["ribs"], part["heights"])]
        elif "ball" in part:
            found.append((tissue, ball(*part.pop("ball"), **part)))
        else:
            found.append((tissue, tube(*part.pop("tube"), **part)))
    return found


_ATLAS = config.read_yaml(Path(__file__).with_suffix(".yaml"))
TISSUES = _ATLAS.pop("tissues")
PARTS = {anatomy: painted(_ATLAS[anatomy]) for anatomy in ANATOMIES}
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
    path = 2 * paint(PARTS["chest"] + nodules, labels, at, grey, draw)[0].mean(axis=0).T[::-1]  # [z, x], head on top
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
