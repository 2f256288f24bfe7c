"""LUNA16 to crops around its nodule candidates, with labels and what FROC needs.

    python -m conversion.luna16 --source LUNA16 --candidates candidates.csv --annotations annotations.csv \
        --excluded annotations_excluded.csv --dest Training_Data/LUNA16_crops

writes a prepared tree:

    <dest>/<series>/<line>.npy   int16 HU (height, width, slices), a cube of crop_mm around the candidate in this line
                                 of candidates.csv (the header is line 1); air (-1000) outside the scan
    <dest>/labels.csv            case,label,patient,series,nodule,test_only: a line per candidate
    <dest>/nodules.csv           series,nodule: a line per annotated nodule of the scans, found by a candidate or not
    <dest>/dataset.yaml          modality, window, slice_axis, spacing_mm, source and how the crops were cut

nodule is the number of the annotated nodule in whose sphere the candidate lies (the nearest of several), `excluded` for
one that lies in an excluded finding only and counts neither way, and empty for a false positive. test_only is 1 for
negatives beyond `negatives` per scan: training and validation leave them out, a test takes all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from conversion.readers import read
from conversion.volume import BadFile, Options, Volume
from conversion.workers import outcomes
from utils import config
from utils.errors import UserError
from utils.files import read_csv, write_csv

EXCLUDED_MM = 10.0  # diameter of an excluded finding whose own is not given (-1 in LUNA16's file)
AIR_HU = -1000.0
XYZ = ["coordX", "coordY", "coordZ"]  # world millimetres


@dataclass
class Config:
    source: str
    """folder with the .mhd files of LUNA16 (subset0 ... subset9)"""
    candidates: str
    """candidates.csv or candidates_V2.csv (seriesuid,coordX,coordY,coordZ,class)"""
    annotations: str
    """annotations.csv; a nodule is found by any candidate inside it, and missed where there is none"""
    dest: str
    """data set to write, e.g. Training_Data/LUNA16_crops; a run found here is continued"""
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


def main(cfg: Config) -> None:
    if len(cfg.window) != 2 or cfg.window[0] >= cfg.window[1]:
        raise UserError(f"window: {cfg.window} must be two increasing numbers of HU, e.g. [-1000, 400]")
    dest = Path(cfg.dest).expanduser()
    scans = {file.stem: file for file in sorted(Path(cfg.source).expanduser().rglob("*.mhd"))}
    if not scans:
        raise UserError(f"source: {cfg.source} has no .mhd files; give the folder of LUNA16's subset0 ... subset9")
    candidates = read_candidates(cfg, scans)
    nodules = read_places(cfg.annotations, "annotations", "diameter_mm")
    nodules = nodules[nodules.seriesuid.isin(list(scans))]
    hit = find_nodules(candidates, nodules).map("{:.0f}".format, na_action="ignore")
    if cfg.excluded:
        others = read_places(cfg.excluded, "excluded", "diameter_mm")
        others.diameter_mm = others.diameter_mm.where(others.diameter_mm > 0, EXCLUDED_MM)
        hit = hit.mask(hit.isna() & find_nodules(candidates, others).notna(), "excluded")
    _describe(cfg, dest)
    by_scan = candidates.groupby("seriesuid")
    todo = {scan: (scans[scan], members) for scan, members in by_scan if not (dest / scan).exists()}
    shape = (cfg.crop_slices, cfg.crop_size, cfg.crop_size)
    list(outcomes(todo, partial(cut_crops, dest=dest, side_mm=cfg.crop_mm, shape=shape), cfg.workers))
    series, late = candidates.seriesuid, beyond(candidates, cfg.negatives)
    labels = pd.DataFrame({"case": series + "/" + candidates.index.astype(str)})
    labels["label"] = candidates["class"].map({0: "no nodule", 1: "nodule"})
    labels["patient"] = labels["series"] = series  # LIDC has a scan of each patient
    labels["nodule"], labels["test_only"] = hit.fillna(""), candidates.index.isin(late).astype(int)
    write_csv(labels.to_dict("records"), dest / "labels.csv")
    numbered = [{"series": scan, "nodule": k} for k, scan in enumerate(nodules.seriesuid)]
    write_csv(numbered, dest / "nodules.csv", ("series", "nodule"))
    print(f"{dest}: {len(labels)} candidates of {series.nunique()} scans; {len(nodules)} nodules")


def read_places(path: str, option: str, value: str) -> pd.DataFrame:
    """A LUNA16 file with its numbers; the index is the line, of which the header is the first."""
    rows = read_csv(path, option, ("seriesuid", *XYZ, value))
    places = pd.DataFrame(rows, index=range(2, len(rows) + 2))[["seriesuid", *XYZ, value]]
    numbers = places.drop(columns="seriesuid").apply(pd.to_numeric, errors="coerce")
    bad = places[~np.isfinite(numbers).all(axis=1)]
    if len(bad):
        raise UserError(f"{option}: {path}, line {bad.index[0]}: {', '.join(bad.iloc[0])} must be numbers; correct it")
    return places[["seriesuid"]].join(numbers)


def read_candidates(cfg: Config, scans: Mapping[str, Path]) -> pd.DataFrame:
    """The candidates of these scans, each once."""
    places = read_places(cfg.candidates, "candidates", "class")
    absent, repeated = ~places.seriesuid.isin(list(scans)), places.duplicated(["seriesuid", *XYZ])
    reasons = {
        "class must be 0 or 1": ~places["class"].isin((0, 1)),
        f"this scan has no .mhd below {cfg.source}": absent,
        "the same candidate is in a line above": repeated,
    }
    for reason, bad in reasons.items():
        if bad.any() and (cfg.on_bad == "error" or reason.startswith("class") or bad.all()):
            line = bad.idxmax()
            raise UserError(
                f"candidates: {cfg.candidates}, line {line} ({places.seriesuid[line]}) and {bad.sum() - 1} more: "
                f"{reason}; correct them, or leave out repetitions and missing scans with --on_bad skip"
            )
        if bad.any():
            print(f"left out: {bad.sum()} candidates, as {reason}")
    return places[~absent & ~repeated]


def find_nodules(candidates: pd.DataFrame, nodules: pd.DataFrame) -> pd.Series:
    """For each candidate the position of the nodule in whose sphere it lies, the nearest of several, or NaN."""
    from scipy.spatial.distance import cdist

    hit = pd.Series(np.nan, candidates.index)
    for scan, members in candidates.groupby("seriesuid"):
        at = np.flatnonzero(nodules.seriesuid == scan)
        distances = cdist(members[XYZ], nodules[XYZ].iloc[at])
        distances[distances >= nodules.diameter_mm.to_numpy()[at] / 2] = np.inf
        found = np.isfinite(distances).any(axis=1)
        hit[members.index[found]] = at[distances[found].argmin(axis=1)] if found.any() else np.nan
    return hit


def beyond(candidates: pd.DataFrame, negatives: int) -> list[int]:
    """Lines of the negatives beyond so many per scan, chosen by chance, the same whatever other scans there are."""
    late: list[int] = []
    for scan, members in candidates[candidates["class"] == 0].groupby("seriesuid") if negatives else ():
        seed = int.from_bytes(hashlib.sha256(scan.encode()).digest()[:8], "little")
        late += np.random.default_rng(seed).permutation(members.index)[negatives:].tolist()
    return late


def _describe(cfg: Config, dest: Path) -> None:
    """Write dataset.yaml. Raises UserError where crops of other options lie there already."""
    digest = hashlib.sha256(Path(cfg.candidates).read_bytes()).hexdigest()[:16]
    crops = {"mm": cfg.crop_mm, "size": cfg.crop_size, "slices": cfg.crop_slices, "candidates_sha256": digest}
    path = dest / "dataset.yaml"
    old = config.read_yaml(path) if path.exists() else None
    if dest.exists() and any(dest.iterdir()) and not (isinstance(old, dict) and old.get("crops") == crops):
        raise UserError(f"dest: {dest} holds something else, or crops of other options; choose another folder")
    pixel = cfg.crop_mm / cfg.crop_size
    content = {"modality": "CT", "slice_axis": 2, "spacing_mm": [pixel, pixel, cfg.crop_mm / cfg.crop_slices]}
    content |= {"window": [float(hu) for hu in cfg.window], "source": "LUNA16", "crops": crops}
    config.save_yaml(content, path)


def cut_crops(scan: tuple[Path, pd.DataFrame], dest: Path, side_mm: float, shape: tuple[int, int, int]) -> None:
    """Write the crops of a scan, into a folder that appears when it is complete. Raises UserError for a bad file."""
    path, candidates = scan
    try:
        volume = read("itk", (path,), Options())
    except BadFile as error:
        raise UserError(f"{path}: {error}") from None
    folder = dest / candidates.seriesuid.iloc[0]
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for line, place in zip(candidates.index, candidates[XYZ].to_numpy(), strict=True):
        crop = cut_cube(volume, place, side_mm, shape)
        if crop is None:
            raise UserError(f"candidates: line {line} lies outside {path}; coordinates must be world mm, x, y, z")
        hu = np.rint(crop).clip(-32768, 32767).astype(np.int16)
        np.save(temporary / f"{line}.npy", np.asfortranarray(hu.transpose(1, 2, 0)), allow_pickle=False)
    os.replace(temporary, folder)


def cut_cube(volume: Volume, place: Sequence[float], side_mm: float, shape: Sequence[int]) -> np.ndarray | None:
    """Linear resampling of a cube to `shape` [D, S, S] float32, AIR_HU outside the volume; None where its centre is.

    place: the centre, x, y, z in ITK's world mm.  side_mm: from the outer edge of the first sample to that of the last.
    """
    from scipy.ndimage import map_coordinates

    voxel = (np.linalg.inv(volume.affine) @ (*(np.array(place) * (-1, -1, 1)), 1))[:3]  # to RAS and to indices
    if not all(-0.5 <= v <= n - 0.5 for v, n in zip(voxel, volume.array.shape, strict=True)):
        return None
    axes = [
        centre + ((np.arange(count) + 0.5) / count - 0.5) * side_mm / step
        for centre, step, count in zip(voxel[::-1], volume.spacing_mm[::-1], shape, strict=True)
    ]
    grid = np.meshgrid(*axes, indexing="ij")
    return map_coordinates(volume.array.T, grid, output=np.float32, order=1, mode="constant", cval=AIR_HU)


if __name__ == "__main__":
    config.main(main, Config, __doc__)
