"""LUNA16: candidates and nodules from their CSV files, crops around candidates, FROC."""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from downstream.labels import Items, read_csv
from downstream.scores import bootstrap
from utils.errors import UserError

if TYPE_CHECKING:
    from downstream.classify import Config

FROC_RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # false positives per scan, as LUNA16 asks
FROC_NAMES = ("cpm", *(f"sensitivity@{rate:g}" for rate in FROC_RATES))
SAME_NODULE_MM = 10.0  # without annotations: class-1 candidates this close are taken for one nodule
EXCLUDED_MM = 10.0  # diameter of an excluded finding whose own is not given (-1 in LUNA16's file)
NO_NODULE, EXCLUDED = -1, -2
AIR_HU = -1000.0
Place = tuple[str, tuple[float, float, float]]  # scan, world coordinates x, y, z in mm
Sphere = tuple[str, tuple[float, float, float], float]  # scan, centre, radius in mm


class Luna(NamedTuple):
    """Candidates as items, and what FROC needs beside them."""

    items: Items
    hit: np.ndarray  # of each candidate: position of the nodule it lies in, NO_NODULE or EXCLUDED
    nodule_scan: list[str]  # of each nodule


def read_luna16(cfg: Config) -> Luna:
    """Candidates and nodules of the scans below data_path."""
    scans = find_scans(cfg.data_path)
    path = Path(cfg.labels)
    rows: list[tuple[str, tuple[float, float, float], int]] = []
    names = []
    lines: dict[Place, int] = {}
    unknown, repeated = set(), 0
    for line, (scan, xyz, label) in enumerate(_read_places(path, "labels", "class"), start=2):
        if label not in (0, 1):
            raise UserError(f"labels: {path}, line {line}: class must be 0 or 1, not {label:g}")
        if (scan, xyz) in lines:
            if cfg.on_bad == "error":
                raise UserError(
                    f"labels: {path}: lines {lines[scan, xyz]} and {line} are the same candidate; keep one, or leave "
                    "repetitions out with --on_bad skip"
                )
            repeated += 1
            continue
        lines[scan, xyz] = line
        if scan in scans:
            rows.append((scan, xyz, int(label)))
            names.append(f"{scan}/{line}")
        else:
            unknown.add(scan)
    if unknown and (cfg.on_bad == "error" or not rows):
        raise UserError(
            f"labels: {path} names {len(unknown)} scans that have no .mhd below {cfg.data_path}, e.g. "
            f"{min(unknown)}; add them, or leave their candidates out with --on_bad skip"
        )
    if unknown:
        print(f"left out the candidates of {len(unknown)} scans that are not below {cfg.data_path}")
    if repeated:
        print(f"left out {repeated} candidates that stand in {path} twice")
    labels = np.array([label for *_, label in rows])
    if len(set(labels)) < 2:
        raise UserError(f"labels: the candidates in {path} are all of class {labels[0]}; both classes are needed")
    places = [(scan, xyz) for scan, xyz, _ in rows]
    cases = CandidateCrops(
        names, places, scans, cfg.crop_size, cfg.crop_slices, cfg.crop_mm, cfg.window, cfg.cache_path or cfg.data_path
    )
    if cfg.annotations:
        nodules = [(s, xyz, d / 2) for s, xyz, d in _read_places(Path(cfg.annotations), "annotations", "diameter_mm")]
        hit = hit_nodules(places, nodules)
    else:
        print(f"without annotations, class-1 candidates within {SAME_NODULE_MM:g} mm count as one nodule")
        hit, nodules = _group_positives(places, labels)
    if cfg.excluded:
        others = _read_places(Path(cfg.excluded), "excluded", "diameter_mm")
        others = [(scan, xyz, (d if d > 0 else EXCLUDED_MM) / 2) for scan, xyz, d in others]
        hit[(hit == NO_NODULE) & (hit_nodules(places, others) != NO_NODULE)] = EXCLUDED
    test_only = np.zeros(len(rows), dtype=bool)
    if cfg.negatives:
        by_scan: dict[str, list[int]] = defaultdict(list)
        for i in np.flatnonzero(labels == 0):
            by_scan[rows[i][0]].append(int(i))
        for scan, members in sorted(by_scan.items()):
            order = np.random.default_rng(_number(scan)).permutation(members)
            test_only[order[cfg.negatives :]] = True
    items = Items(
        cases=cases,
        index=list(range(len(rows))),
        names=names,
        units=[scan for scan, *_ in rows],
        labels=labels,
        classes=["no nodule", "nodule"],
        patients={scan: scan for scan in sorted(scans)},
        for_test_only=test_only,
    )
    return Luna(items, hit, [scan for scan, *_ in nodules])


def find_scans(data_path: str | Path) -> dict[str, Path]:
    """The .mhd file of every seriesuid below a folder (LUNA16: subset0 ... subset9)."""
    root = Path(data_path).expanduser()
    files = sorted(root.rglob("*.mhd"))
    if not files:
        raise UserError(f"data_path: {root} has no .mhd files; give the folder that holds LUNA16's subset0 ... subset9")
    scans = {file.stem: file for file in files}
    if len(scans) < len(files):
        twice = next(file for file in files if scans[file.stem] != file)
        raise UserError(f"data_path: {twice} and {scans[twice.stem]} are the same scan; remove one")
    return scans


def _read_places(path: Path, option: str, value: str) -> list[Sphere]:
    """Scan, world coordinates and the column `value` of each line of a LUNA16 file."""
    rows = read_csv(path, option)
    wanted = ("seriesuid", "coordX", "coordY", "coordZ", value)
    missing = [name for name in wanted if name not in rows[0]]
    if missing:
        raise UserError(f"{option}: {path} has no column {', '.join(missing)}; LUNA16's has {','.join(wanted)}")
    places = []
    for line, row in enumerate(rows, start=2):
        try:
            x, y, z, number = (float(row[name]) for name in wanted[1:])
        except ValueError as error:
            raise UserError(f"{option}: {path}, line {line}: {error}") from None
        if not all(map(math.isfinite, (x, y, z, number))):
            raise UserError(f"{option}: {path}, line {line}: holds a number that is not finite")
        places.append((row["seriesuid"], (x, y, z), number))
    return places


def hit_nodules(places: Sequence[Place], nodules: Sequence[Sphere]) -> np.ndarray:
    """For each candidate the nodule whose sphere it lies in, the nearest of several, or NO_NODULE: [candidates]."""
    of_scan: dict[str, list[int]] = defaultdict(list)
    for k, (scan, *_) in enumerate(nodules):
        of_scan[scan].append(k)
    hit = np.full(len(places), NO_NODULE)
    for i, (scan, xyz) in enumerate(places):
        inside = [(d, k) for k in of_scan[scan] if (d := math.dist(xyz, nodules[k][1])) < nodules[k][2]]
        if inside:
            hit[i] = min(inside)[1]
    return hit


def _group_positives(places: Sequence[Place], labels: np.ndarray) -> tuple[np.ndarray, list[Sphere]]:
    """(nodule of each candidate, nodules) where chains of near class-1 candidates of a scan are a nodule each."""
    hit = np.full(len(places), NO_NODULE)
    positives = np.flatnonzero(labels == 1)
    scans = np.array([places[i][0] for i in positives])
    nodules: list[Sphere] = []
    for scan in sorted(set(scans)):
        members = positives[scans == scan]
        xyz = np.array([places[i][1] for i in members])
        near = np.linalg.norm(xyz[:, None] - xyz, axis=-1) <= SAME_NODULE_MM
        count, group = connected_components(near, directed=False)
        hit[members] = len(nodules) + group
        nodules += [(scan, tuple(xyz[group == g].mean(axis=0).tolist()), SAME_NODULE_MM) for g in range(count)]
    return hit, nodules


class CandidateCrops:
    """Cubes around points of CT scans, as stacks of axial slices, cut once per scan into a cache.

    places: scan and world coordinates (x, y, z in mm) of each crop.  scans: image file of each scan.
    size, slices: pixels of a crop's slices, and their number, over the same `crop_mm` in all directions.
    window: HU that become 0 and 1.  Outside the scan there is air.
    Raises UserError for a scan that cannot be read and a point outside its scan, when its crops are cut.
    """

    def __init__(
        self,
        names: Sequence[str],
        places: Sequence[tuple[str, tuple[float, float, float]]],
        scans: Mapping[str, Path],
        size: int,
        slices: int,
        crop_mm: float,
        window: Sequence[float],
        cache_path: str | Path,
    ):
        if len(window) != 2 or window[0] >= window[1]:
            raise UserError(f"window: {list(window)} must be two increasing numbers of HU, e.g. [-1000, 400]")
        self.names, self.places, self.scans = list(names), places, scans
        self.size, self.slices, self.crop_mm, self.window = size, slices, crop_mm, window
        self.folder = Path(cache_path).expanduser() / ".cache" / f"crops_{size}px"
        self.members: dict[str, list[int]] = {}
        self.row = []  # of each crop in its scan's file
        for i, (scan, _) in enumerate(places):
            self.row.append(len(self.members.setdefault(scan, [])))
            self.members[scan].append(i)
        self.files: dict[str, Path] = {}

    def prepare(self, indices: Iterable[int]) -> None:
        """Cut the crops of all scans that these are in, so that reading them later meets no error."""
        scans = sorted({self.places[i][0] for i in indices})
        for scan in tqdm(scans, desc="cutting crops", unit="scan", disable=None):
            self.files[scan] = self._cut(scan)

    def read(self, index: int) -> np.ndarray:
        scan = self.places[index][0]
        if scan not in self.files:
            self.files[scan] = self._cut(scan)
        return np.load(self.files[scan], mmap_mode="r", allow_pickle=False)[self.row[index]].astype(np.float32)

    def extent(self, index: int) -> tuple[int, int]:
        return self.size, self.size

    def _cut(self, scan: str) -> Path:
        """The file [crops of the scan, D, S, S] float16, made where it is missing."""
        path, points = self.scans[scan], [self.places[i][1] for i in self.members[scan]]
        status = os.stat(path)
        made_from = (status.st_size, status.st_mtime_ns, points, self.slices, self.crop_mm, tuple(self.window))
        key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
        target = self.folder / f"{scan}_{key}.npy"
        if target.exists():
            return target
        volume, voxels, spacing = read_scan(path, points)
        low, high = self.window
        crops = np.empty((len(points), self.slices, self.size, self.size), dtype=np.float16)
        for crop, name, voxel in zip(crops, (self.names[i] for i in self.members[scan]), voxels, strict=True):
            if not all(-0.5 <= v <= n - 0.5 for v, n in zip(voxel, volume.shape, strict=True)):
                raise UserError(
                    f"{name}: lies outside {path} (voxel {np.round(voxel, 1).tolist()} of {list(volume.shape)}, slices "
                    "first); coordinates must be world millimetres, x, y, z"
                )
            hu = cut_cube(volume, voxel, spacing, self.crop_mm, crop.shape)
            crop[:] = ((hu - low) / (high - low)).clip(0, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex}.npy")
        np.save(temporary, crops, allow_pickle=False)
        os.replace(temporary, target)
        return target


def read_scan(path: Path, points: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A CT scan [D, H, W] in HU, the points (x, y, z in world mm) as voxel positions [n, 3], spacing in mm [3].

    Positions and spacing are in array order (slice, row, column); a voxel's centre is at whole numbers. The image's
    origin, spacing and direction are respected. Raises UserError where the file cannot be read.
    """
    import SimpleITK  # only where there are scans

    try:
        image = SimpleITK.ReadImage(str(path))
        volume = SimpleITK.GetArrayFromImage(image)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{path}: cannot be read ({reason}); copy the .mhd and its .raw again") from None
    if volume.ndim != 3:
        raise UserError(f"{path}: is {volume.ndim}D; a scan has three dimensions")
    voxels = [image.TransformPhysicalPointToContinuousIndex(point)[::-1] for point in points]
    return volume, np.array(voxels).reshape(-1, 3), np.array(image.GetSpacing()[::-1])


def cut_cube(
    volume: np.ndarray, voxel: Sequence[float], spacing: Sequence[float], side_mm: float, shape: Sequence[int]
) -> np.ndarray:
    """Linear resampling of a cube to `shape` [D, S, S] float32; AIR_HU outside the volume.

    voxel: the cube's centre in array order.  spacing: mm, in array order.  side_mm: from the outer edge of the first
    sample to that of the last.
    """
    axes = [
        centre + ((np.arange(count) + 0.5) / count - 0.5) * side_mm / step
        for centre, step, count in zip(voxel, spacing, shape, strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    return map_coordinates(volume, grid, output=np.float32, order=1, mode="constant", cval=AIR_HU)


def froc(
    score: np.ndarray,
    scan: np.ndarray,
    hit: np.ndarray,
    nodule_scan: np.ndarray,
    scans: int,
    counts: np.ndarray | None = None,
    rates: Sequence[float] = FROC_RATES,
) -> np.ndarray:
    """Sensitivity at `rates` false positives per scan; the mean over FROC_RATES is LUNA16's CPM.

    score, scan, hit: [n] of each candidate its score, its scan (0 to scans - 1), and the nodule it lies in,
    NO_NODULE (a false positive) or EXCLUDED (neither).  nodule_scan: [m] scan of each nodule, found or not.
    counts: [scans] how often each scan counts (bootstrap); None: once.
    A nodule counts once, with the best of its candidates; one without candidates is missed. At each rate the lowest
    threshold is taken at which the false positives per scan do not exceed it, so nothing is interpolated (LUNA16's own
    script is linear between operating points, which differs where few false positives are allowed).
    Returns [rates], nan where there are no nodules.
    """
    counts = np.ones(scans) if counts is None else counts
    best = np.full(len(nodule_scan), -np.inf)
    found = hit >= 0
    np.maximum.at(best, hit[found], score[found])
    false = np.flatnonzero(hit == NO_NODULE)
    false = false[np.argsort(-score[false], kind="stable")]
    per_scan = np.cumsum(counts[scan[false]]) / counts.sum()
    nodules = counts[nodule_scan]
    if nodules.sum() == 0:
        return np.full(len(rates), np.nan)
    sensitivity = []
    for rate in rates:
        first_too_many = int(np.searchsorted(per_scan, rate + 1e-9, side="right"))
        threshold = score[false[first_too_many]] if first_too_many < len(false) else -np.inf
        sensitivity.append(nodules[best > threshold].sum() / nodules.sum())
    return np.array(sensitivity)


def froc_scores(
    luna: Luna, test: np.ndarray, scans: Sequence[str], score: np.ndarray, repeats: int, seed: int
) -> tuple[dict[str, float], dict[str, str], dict[str, tuple[float, float]]]:
    """FROC of the test scans, those without candidates too: values, reasons, intervals over scans.

    test: positions of their candidates.  score: of each.  repeats, seed: of the `bootstrap`.
    """
    number = {scan: k for k, scan in enumerate(scans)}
    nodules = [k for k, scan in enumerate(luna.nodule_scan) if scan in number]
    place = np.full(len(luna.nodule_scan) + 2, 0)  # two more: NO_NODULE and EXCLUDED stand for themselves
    place[nodules] = np.arange(len(nodules))
    place[[NO_NODULE, EXCLUDED]] = NO_NODULE, EXCLUDED
    scan = np.array([number[luna.items.units[i]] for i in test])
    nodule_scan = np.array([number[luna.nodule_scan[k]] for k in nodules], dtype=int)
    hit = place[luna.hit[test]]

    def values(counts: np.ndarray | None = None) -> dict[str, float]:
        curve = froc(score, scan, hit, nodule_scan, len(number), counts)
        return dict(zip(FROC_NAMES, [float(curve.mean()), *curve.tolist()], strict=True))

    found = values()
    why = f"no nodule in the {len(number)} test scans"
    reasons = {name: why for name, value in found.items() if math.isnan(value)}
    return found, reasons, bootstrap(values, len(number), repeats, seed)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
