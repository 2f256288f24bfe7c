"""LUNA16 to crops around its nodule candidates, with labels and what FROC needs.

    python -m conversion.luna16 --source LUNA16 --candidates candidates.csv --annotations annotations.csv \
        --excluded annotations_excluded.csv --dest Training_Data/LUNA16_crops

source: the folder with the .mhd files (subset0 ... subset9). Writes a prepared tree:

    <dest>/<series>/<line>.npy   int16 HU (height, width, slices), a cube of crop_mm around the candidate in this line
                                 of candidates.csv (the header is line 1); air (-1000) outside the scan
    <dest>/labels.csv            case,label,patient,series,nodule,test_only: a line per candidate
    <dest>/nodules.csv           series,nodule: a line per annotated nodule of the scans, found by a candidate or not
    <dest>/dataset.yaml          modality, window, slice_axis, spacing_mm, source and how the crops were cut

labels.csv: case is <series>/<line>. label is `nodule` or `no nodule`. patient is the series: LIDC has a scan of each.
nodule is the number, in nodules.csv, of the annotated nodule in whose sphere the candidate lies (the nearest of
several), `excluded` for one that lies in an excluded finding only and counts neither way, and empty for a false
positive. test_only is 1 for negatives beyond `negatives` per scan: leave them out of training and validation; a test
takes all. nodules.csv: numbers count from 0 over all scans; a nodule without a candidate is missed in any case.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import yaml
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from conversion.readers import read
from conversion.volume import BadFile, Options
from conversion.workers import outcomes
from datasets.index import MIN_SIDE
from utils import config
from utils.config import read_yaml
from utils.errors import UserError
from utils.files import read_csv, write_csv, write_text

SAME_NODULE_MM = 10.0  # without annotations: class-1 candidates this close are taken for one nodule
EXCLUDED_MM = 10.0  # diameter of an excluded finding whose own is not given (-1 in LUNA16's file)
AIR_HU = -1000.0
COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ")

Point = tuple[float, float, float]  # x, y, z in mm


@dataclass
class Config:
    source: str
    """folder with the .mhd files of LUNA16 (subset0 ... subset9)"""
    candidates: str
    """candidates.csv or candidates_V2.csv (seriesuid,coordX,coordY,coordZ,class)"""
    dest: str
    """data set to write, e.g. Training_Data/LUNA16_crops; a run found here is continued"""
    annotations: str | None = None
    """annotations.csv; a nodule is found by any candidate inside it, and missed where there is none"""
    excluded: str | None = None
    """annotations_excluded.csv; candidates on these findings count neither way"""
    crop_mm: PositiveFloat = 40.0
    """side of the cube around a candidate"""
    crop_size: PositiveInt = 64
    """pixels of a crop's slices"""
    crop_slices: PositiveInt = 16
    """slices of a crop"""
    window: list[float] = field(default_factory=lambda: [-1000.0, 400.0])
    """HU that become 0 and 1"""
    negatives: NonNegativeInt = 50
    """negative candidates of each scan for training and validation, the others being test_only; 0: all"""
    on_bad: Literal["error", "skip"] = "error"
    """candidates without a scan and repeated ones: stop, or go on without them"""
    workers: NonNegativeInt = 0
    """processes, each holding one scan; 0: one per core, at most 8"""


class Place(NamedTuple):
    """A line of one of LUNA16's files."""

    scan: str
    line: int  # the header is line 1
    xyz: Point
    value: float  # class of a candidate, diameter in mm of a nodule


def main(cfg: Config) -> None:
    if len(cfg.window) != 2 or cfg.window[0] >= cfg.window[1]:
        raise UserError(f"window: {cfg.window} must be two increasing numbers of HU, e.g. [-1000, 400]")
    if cfg.crop_size < MIN_SIDE:
        raise UserError(f"crop_size: training needs slices of {MIN_SIDE} pixels or more")
    scans, dest = find_scans(Path(cfg.source).expanduser()), Path(cfg.dest).expanduser()
    candidates = read_candidates(cfg, scans)
    hit, nodules = find_nodules(cfg, candidates, scans)
    _describe(cfg, dest)
    members: dict[str, list[Place]] = defaultdict(list)
    for candidate in candidates:
        members[candidate.scan].append(candidate)
    todo = {scan: (scans[scan], places) for scan, places in members.items() if not (dest / scan).exists()}
    shape = (cfg.crop_slices, cfg.crop_size, cfg.crop_size)
    for _ in outcomes(todo, partial(cut_crops, dest=dest, side_mm=cfg.crop_mm, shape=shape), cfg.workers):
        pass
    late = beyond(members, cfg.negatives)
    rows = [
        {
            "case": f"{c.scan}/{c.line}",
            "label": "nodule" if c.value else "no nodule",
            "patient": c.scan,
            "series": c.scan,
            "nodule": nodule,
            "test_only": int(c.line in late),
        }
        for c, nodule in zip(candidates, hit, strict=True)
    ]
    write_csv(rows, dest / "labels.csv")
    numbered = [{"series": nodule.scan, "nodule": k} for k, nodule in enumerate(nodules)]
    write_csv(numbered, dest / "nodules.csv", ("series", "nodule"))
    positive = sum(bool(c.value) for c in candidates)
    print(f"{dest}: {len(rows)} candidates of {len(members)} scans, {positive} of class 1; {len(nodules)} nodules")


def find_scans(source: Path) -> dict[str, Path]:
    """The .mhd file of every seriesuid below a folder."""
    files = sorted(source.rglob("*.mhd"))
    if not files:
        raise UserError(f"source: {source} has no .mhd files; give the folder that holds LUNA16's subset0 ... subset9")
    scans = {file.stem: file for file in files}
    if len(scans) < len(files):
        twice = next(file for file in files if scans[file.stem] != file)
        raise UserError(f"source: {twice} and {scans[twice.stem]} are the same scan; remove one")
    return scans


def read_candidates(cfg: Config, scans: Mapping[str, Path]) -> list[Place]:
    """The candidates of these scans, each once."""
    lines: dict[tuple[str, Point], int] = {}
    candidates, unknown, repeated = [], set(), 0
    for place in _read_places(cfg.candidates, "candidates", "class"):
        if place.value not in (0, 1):
            raise UserError(
                f"candidates: {cfg.candidates}, line {place.line}: class must be 0 or 1, not {place.value:g}"
            )
        first = lines.setdefault((place.scan, place.xyz), place.line)
        if first != place.line:
            repeated += 1
            if cfg.on_bad == "error":
                raise UserError(
                    f"candidates: {cfg.candidates}: lines {first} and {place.line} are the same candidate; keep one, "
                    "or leave repetitions out with --on_bad skip"
                )
        elif place.scan in scans:
            candidates.append(place)
        else:
            unknown.add(place.scan)
    if unknown and (cfg.on_bad == "error" or not candidates):
        raise UserError(
            f"candidates: {cfg.candidates} names {len(unknown)} scans that have no .mhd below {cfg.source}, e.g. "
            f"{min(unknown)}; add them, or leave their candidates out with --on_bad skip"
        )
    if unknown or repeated:
        print(f"left out: the candidates of {len(unknown)} scans that are not there, {repeated} repeated candidates")
    return candidates


def _read_places(path: str, option: str, value: str) -> list[Place]:
    """Scan, world coordinates and the column `value` of each line of a LUNA16 file."""
    rows = read_csv(path, option)
    missing = [name for name in (*COLUMNS, value) if name not in rows[0]]
    if missing:
        raise UserError(
            f"{option}: {path} has no column {', '.join(missing)}; LUNA16's has {','.join((*COLUMNS, value))}"
        )
    places = []
    for line, row in enumerate(rows, start=2):
        try:
            x, y, z, number = (float(row[name]) for name in (*COLUMNS[1:], value))
        except ValueError as error:
            raise UserError(f"{option}: {path}, line {line}: {error}") from None
        if not all(map(math.isfinite, (x, y, z, number))):
            raise UserError(f"{option}: {path}, line {line}: holds a number that is not finite")
        places.append(Place(row["seriesuid"], line, (x, y, z), number))
    return places


def find_nodules(
    cfg: Config, candidates: Sequence[Place], scans: Mapping[str, Path]
) -> tuple[list[int | str], list[Place]]:
    """(for each candidate the number of its nodule, "excluded" or "", the nodules)."""
    if cfg.annotations:
        nodules = [n for n in _read_places(cfg.annotations, "annotations", "diameter_mm") if n.scan in scans]
        hit = hit_nodules(candidates, nodules)
    else:
        print(f"without annotations, class-1 candidates within {SAME_NODULE_MM:g} mm count as one nodule")
        hit, nodules = group_positives(candidates)
    others = _read_places(cfg.excluded, "excluded", "diameter_mm") if cfg.excluded else []
    others = [place._replace(value=place.value if place.value > 0 else EXCLUDED_MM) for place in others]
    word = ["" if other is None else "excluded" for other in hit_nodules(candidates, others)]
    return [word[i] if nodule is None else nodule for i, nodule in enumerate(hit)], nodules


def hit_nodules(candidates: Sequence[Place], nodules: Sequence[Place]) -> list[int | None]:
    """For each candidate the nodule whose sphere it lies in, the nearest of several."""
    of_scan: dict[str, list[int]] = defaultdict(list)
    for k, nodule in enumerate(nodules):
        of_scan[nodule.scan].append(k)
    hit = []
    for candidate in candidates:
        distances = [(math.dist(candidate.xyz, nodules[k].xyz), k) for k in of_scan[candidate.scan]]
        inside = [(distance, k) for distance, k in distances if distance < nodules[k].value / 2]
        hit.append(min(inside)[1] if inside else None)
    return hit


def group_positives(candidates: Sequence[Place]) -> tuple[list[int | None], list[Place]]:
    """(nodule of each candidate, nodules) where chains of near class-1 candidates of a scan are a nodule each."""
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial.distance import cdist

    positives = [i for i, candidate in enumerate(candidates) if candidate.value]
    if not positives:
        return [None] * len(candidates), []
    far = {scan: 1e6 * k for k, scan in enumerate({candidates[i].scan for i in positives})}  # mm
    places = np.array([(*candidates[i].xyz, far[candidates[i].scan]) for i in positives])
    count, group = connected_components(cdist(places, places) <= SAME_NODULE_MM, directed=False)
    hit = dict(zip(positives, group.tolist(), strict=True))
    nodules = [candidates[positives[group.tolist().index(k)]] for k in range(count)]
    return [hit.get(i) for i in range(len(candidates))], nodules


def beyond(members: Mapping[str, Sequence[Place]], negatives: int) -> set[int]:
    """Lines of the negatives beyond so many per scan, chosen by chance, the same whatever other scans there are."""
    late: set[int] = set()
    for scan, candidates in members.items() if negatives else ():
        seed = int.from_bytes(hashlib.sha256(scan.encode()).digest()[:8], "little")
        lines = [candidate.line for candidate in candidates if not candidate.value]
        late.update(np.random.default_rng(seed).permutation(lines)[negatives:].tolist())
    return late


def _describe(cfg: Config, dest: Path) -> None:
    """Write dataset.yaml. Raises UserError where crops of other options lie there already."""
    digest = hashlib.sha256(Path(cfg.candidates).read_bytes()).hexdigest()[:16]
    crops = {"mm": cfg.crop_mm, "size": cfg.crop_size, "slices": cfg.crop_slices, "candidates_sha256": digest}
    path = dest / "dataset.yaml"
    old = read_yaml(path) if path.exists() else None
    if dest.exists() and any(dest.iterdir()) and not (isinstance(old, dict) and old.get("crops") == crops):
        raise UserError(f"dest: {dest} holds something else, or crops of other options; choose another folder")
    pixel = cfg.crop_mm / cfg.crop_size
    content = {
        "modality": "CT",
        "slice_axis": 2,
        "spacing_mm": [pixel, pixel, cfg.crop_mm / cfg.crop_slices],
        "window": [float(hu) for hu in cfg.window],
        "source": "LUNA16",
        "crops": crops,
    }
    write_text(yaml.safe_dump(content, sort_keys=False), path)


def cut_crops(scan: tuple[Path, Sequence[Place]], dest: Path, side_mm: float, shape: tuple[int, int, int]) -> None:
    """Write the crops of a scan, into a folder that appears when it is complete. Raises UserError, as `read_scan`."""
    path, places = scan
    volume, voxels, spacing = read_scan(path, [place.xyz for place in places])
    folder = dest / places[0].scan
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for place, voxel in zip(places, voxels, strict=True):
        if not all(-0.5 <= v <= n - 0.5 for v, n in zip(voxel, volume.shape, strict=True)):
            raise UserError(
                f"candidates: line {place.line} lies outside {path} (voxel {np.round(voxel, 1).tolist()} of "
                f"{list(volume.shape)}, slices first); coordinates must be world millimetres, x, y, z"
            )
        hu = np.rint(cut_cube(volume, voxel, spacing, side_mm, shape)).clip(-32768, 32767).astype(np.int16)
        np.save(temporary / f"{place.line}.npy", np.asfortranarray(hu.transpose(1, 2, 0)), allow_pickle=False)
    os.replace(temporary, folder)


def read_scan(path: Path, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A CT scan [D, H, W] in HU, the points (x, y, z in world mm) as voxel positions [n, 3], spacing in mm [3].

    Positions and spacing are in array order (slice, row, column); a voxel's centre is at whole numbers. The image's
    origin, spacing and direction are respected. Raises UserError where the file cannot be read.
    """
    import nibabel

    try:
        volume = read("itk", (path,), Options())
    except BadFile as error:
        raise UserError(f"{path}: {error}") from None
    in_ras = np.array(points).reshape(-1, 3) * (-1, -1, 1)
    voxels = nibabel.affines.apply_affine(np.linalg.inv(volume.affine), in_ras)
    return volume.array.T, voxels[:, ::-1], np.array(volume.spacing_mm[::-1])


def cut_cube(
    volume: np.ndarray, voxel: Sequence[float], spacing: Sequence[float], side_mm: float, shape: Sequence[int]
) -> np.ndarray:
    """Linear resampling of a cube to `shape` [D, S, S] float32; AIR_HU outside the volume.

    voxel: the cube's centre in array order.  spacing: mm, in array order.  side_mm: from the outer edge of the first
    sample to that of the last.
    """
    from scipy.ndimage import map_coordinates

    axes = [
        centre + ((np.arange(count) + 0.5) / count - 0.5) * side_mm / step
        for centre, step, count in zip(voxel, spacing, shape, strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    return map_coordinates(volume, grid, output=np.float32, order=1, mode="constant", cval=AIR_HU)


if __name__ == "__main__":
    config.main(main, Config, __doc__)
