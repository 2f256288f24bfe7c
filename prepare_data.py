"""Convert a data set of any medical format into what training reads: <dest>/<id>.npy, or images for 2D data.

    python prepare_data.py --source Task02_Heart --dest Training_Data/Heart            # NIfTI, with its labels
    python prepare_data.py --source LUNA16/subset0 --dest Training_Data/LUNA --modality CT --window lung
    python prepare_data.py --source dicom_export --dest Training_Data/MR --on_error skip

Reads NIfTI, DICOM series, NRRD, MHA / MHD, HDF5, NPY / NPZ and 2D images. Writes beside the cases dataset.yaml (what
training reads), cases.csv (where each case comes from), montage.png (look at it) and labels/. The same command again
converts only what is missing or has changed. docs/DATA.md has the details.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt
from PIL import Image, ImageDraw
from tqdm import tqdm

from conversion.convert import Case, Options, attempt, outside, source_key
from conversion.layouts import Found, Source, assign_ids, clean, find
from conversion.readers import BadFile, ReadOptions
from datasets.index import LABEL_FOLDERS, MONTAGE
from utils import config as options
from utils.errors import UserError
from utils.files import whole_file

WINDOWS_HU = {"lung": (-1000, 400), "soft_tissue": (-160, 240), "bone": (-500, 1300), "brain": (0, 80)}
CASES = "cases.csv"
SAVE_SECONDS = 10.0  # the table of cases is saved this often, so a killed run has little to do again
POOL_AFTER_SECONDS = 3.0  # processes take as long to start, so short work goes without them
SAME_SPACING = 0.02  # data sets whose spacings differ by less than this share have one spacing
TILE, TILES = 128, 48  # of the montage: pixels, number


@dataclass
class Config:
    source: str | list[str] = "none"
    """a file, a folder, or a list of them: [a.nii.gz, b.nii.gz]"""
    dest: str = "none"
    """data set to write, e.g. Training_Data/MyData; a run found here is continued"""
    images: str = "*"
    """only files with such a name are images, e.g. '*_flair.nii.gz'"""
    labels: str = ""
    """files with such a name are label maps, e.g. '*_seg.nii.gz'; else those in folders labels, labelsTr or masks"""
    modality: str = ""
    """CT, MR, ...; default: what DICOM headers or dataset.json say"""
    window: str | list[float] = "keep"
    """intensities that become 0 and 1: lung, soft_tissue, bone, brain (CT), or two numbers; none: percentiles; keep:
    as dataset.yaml says, none where there is none yet"""
    slice_axis: Literal["auto", "axial", "coronal", "sagittal"] = "auto"
    """plane of the slices; auto: across the axis of thickest spacing, axial where all are alike"""
    orientation: str = ""
    """sides of the patient towards which the axes of the file grow, e.g. LPS, where its header says nothing or lies"""
    spacing_mm: list[NonNegativeFloat] = field(default_factory=list)
    """resample to these mm: [rows, columns, slices]; 0 keeps an axis; empty: no resampling"""
    channel: NonNegativeInt | None = None
    """of 4D volumes, counted from 0"""
    channel_axis: int = -1
    """of 4D NPY, NPZ and HDF5 arrays"""
    array_axis: Literal[0, 1, 2] = 2
    """axis of NPY, NPZ and HDF5 arrays that counts slices"""
    array_key: str = ""
    """name of the image in NPZ and HDF5 files; default: the only volume"""
    label_key: str = ""
    """name of the label map in the same NPZ or HDF5 file"""
    nan_value: float | None = None
    """written in place of NaN and Inf; default: such a file is an error"""
    allow_gaps: bool = False
    """accept DICOM series whose slices are not evenly spaced"""
    on_error: Literal["error", "skip"] = "error"
    """files that cannot be converted: report them, convert the others and fail; or report them and go on"""
    workers: NonNegativeInt = 0
    """processes, each holding one volume; 0: one per core, at most 8"""


def main(cfg: Config) -> None:
    places, dest = _places(cfg)
    settings = Options(
        slice_axis=cfg.slice_axis,
        orientation=cfg.orientation.upper(),
        spacing_mm=tuple(cfg.spacing_mm),
        window=_window(cfg),
        nan_value=cfg.nan_value,
        label_key=cfg.label_key,
        read=ReadOptions(cfg.channel, cfg.channel_axis, cfg.array_axis, cfg.array_key, cfg.allow_gaps),
    )
    found = find(places, cfg.images, cfg.labels, cfg.modality, cfg.channel, _bar)
    for note in found.notes:
        print(f"note: {note}", flush=True)
    ignored = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.ignored.items()) if count > 0)
    if ignored:
        print(f"not converted: {ignored}", flush=True)
    if not found.sources and not found.problems:
        raise UserError(f"source: {places[0]} holds nothing to convert; docs/DATA.md lists the accepted formats")
    _check_window(cfg, found.sources)
    try:
        with _OnlyRun(dest):
            _convert_all(cfg, found, dest, settings)
    except PermissionError as error:
        raise UserError(f"dest: {dest} cannot be written ({error.strerror}); choose another folder") from None
    except SystemExit:  # Ctrl-C or SIGTERM, see utils/signals.py
        print(f"\nstopped; the same command goes on from what is in {dest}", file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(OSError):
            dest.rmdir()  # where nothing was converted: training would stop at an empty data set


def _convert_all(cfg: Config, found: Found, dest: Path, settings: Options) -> None:
    table = read_table(dest)
    ids = assign_ids(found.sources, {source: case.id for source, case in table.items()})
    _note(
        [
            f"{s.name} gets the id {ids[s.name]}, since {clean(s.stem)} is not unique"
            for s in found.sources
            if s.name not in table and ids[s.name] != clean(s.stem)
        ]
    )
    problems = list(found.problems)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr, flush=True)
    todo, changed, notes = [], [], []
    for source in found.sources:
        case = table.get(source.name)
        try:
            key = source_key(source, settings)
            if case and case.key == key and _is_whole(case, dest) and not _outside(case, settings):
                case.modality = source.modality
            else:
                todo.append(source)
                if case and case.key != key:
                    changed.append(f"{source.name} or the options have changed, and {case.file} is made again")
        except BadFile as error:
            problems.append(str(error))
    _note(changed)
    ours = {case.id for case in table.values()}
    replaced = [ids[s.name] for s in todo if ids[s.name] not in ours and (dest / f"{ids[s.name]}.npy").exists()]
    _note([f"{name}.npy is there but not in {CASES} (a killed run's, or yours) and is replaced" for name in replaced])
    there = len(found.sources) - len(todo)

    saved = time.monotonic()
    try:
        for source, result in _results(todo, ids, dest, settings, cfg.workers):
            if isinstance(result, Case):
                old = table.get(source.name, result)
                for file in {old.file, old.label} - {result.file, result.label, ""}:
                    (dest / file).unlink(missing_ok=True)  # such as a label map that is gone from the source
                table[source.name] = result
                notes += [f"{source.name}: {result.notes}"] if result.notes else []
            else:
                problems.append(result)
                tqdm.write(f"problem: {result}", file=sys.stderr)
            if time.monotonic() - saved > SAVE_SECONDS:
                write_table(table, dest)
                saved = time.monotonic()
    finally:
        if table:
            write_table(table, dest)

    _note(notes)
    cases = sorted(table.values(), key=lambda case: os.fsencode(case.id))
    if not cases:
        raise UserError("nothing was converted, for the reasons above")
    description = describe_dataset(cases, found, cfg, dest)
    with whole_file(dest / "dataset.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True), encoding="utf-8")
    montage(cases, dest, description.get("window"))
    print(summary(cases))
    failed = len(problems)
    print(
        f"{dest}: {len(todo) - (failed - len(found.problems))} cases converted, {there} there already, "
        f"problems: {failed}; look at {dest / MONTAGE}",
        flush=True,
    )
    gone = [case for source, case in table.items() if source not in ids]
    if gone:
        print(f"note: {len(gone)} cases of earlier runs are not in this source and stay, e.g. {gone[0].id}")
    if description.get("modality") == "CT" and not description.get("window"):
        print("note: CT without --window: training scales each volume by its percentiles, not by HU")
    if failed and cfg.on_error == "error":
        raise UserError(
            f"problems: {failed}, listed above; everything else was converted. Correct them and run the same command "
            "again, or leave them out with --on_error skip"
        )


def _places(cfg: Config) -> tuple[list[Path], Path]:
    sources = [cfg.source] if isinstance(cfg.source, str) else cfg.source
    if not sources or "none" in (*sources, cfg.dest):
        raise UserError("source, dest: both are needed, e.g. --source my_files --dest Training_Data/MyData")
    places, dest = [Path(source).expanduser() for source in sources], Path(cfg.dest).expanduser()
    if dest.name.startswith(".") or dest.name.lower() in LABEL_FOLDERS:
        raise UserError(f"dest: training never reads a folder called {dest.name}; choose another name")
    if dest.exists() and not dest.is_dir():
        raise UserError(f"dest: {dest} is a file; name a folder")
    for place in places:
        if dest.resolve() == place.resolve() or place.resolve() in dest.resolve().parents:
            raise UserError(f"dest: {dest} lies inside source {place}, and would be converted again; choose another")
        if dest.resolve() in place.resolve().parents:
            raise UserError(f"source: {place} lies inside dest {dest}, where results may replace it; move it elsewhere")
    if cfg.spacing_mm and len(cfg.spacing_mm) != 3:
        raise UserError(f"spacing_mm: {cfg.spacing_mm} are not three numbers: rows, columns, slices")
    sides = sorted(min(pair) for pair in ("LR", "AP", "IS") for code in cfg.orientation.upper() if code in pair)
    if cfg.orientation and (sides != ["A", "I", "L"] or len(cfg.orientation) != 3):
        raise UserError(f"orientation: {cfg.orientation!r} is not one each of R or L, A or P, S or I, e.g. LPS")
    if cfg.labels and cfg.labels.count("*") != 1:
        raise UserError(f"labels: {cfg.labels!r} needs one '*', which stands for what image and label map share")
    return places, dest


def _window(cfg: Config) -> tuple[float, float] | None:
    """The window asked for, None for none and keep."""
    if isinstance(cfg.window, str):
        if cfg.window in ("keep", "none"):
            return None
        if cfg.window not in WINDOWS_HU:
            raise UserError(f"window: {cfg.window!r} is not one of {', '.join(WINDOWS_HU)}, none, keep or two numbers")
        return WINDOWS_HU[cfg.window]
    if len(cfg.window) != 2 or not cfg.window[0] < cfg.window[1]:
        raise UserError(f"window: {cfg.window} are not two increasing numbers, e.g. [-1000, 400]")
    return cfg.window[0], cfg.window[1]


def _check_window(cfg: Config, sources: list[Source]) -> None:
    """A window holds for every volume of a data set, so all of them must measure the same thing."""
    if cfg.window in ("keep", "none"):
        return
    found = Counter(s.modality or "unknown" for s in sources if s.format not in ("image", "dicom_image"))
    if not found:
        raise UserError("window: is for volumes, of which there are none; images are scaled by their percentiles")
    text = ", ".join(f"{count} of modality {name}" for name, count in found.most_common())
    if isinstance(cfg.window, str) and set(found) != {"CT"}:
        raise UserError(
            f"window: {cfg.window} is in Hounsfield units, which only CT has, but there are {text}; say --modality CT "
            "if they are CT, or convert each modality into a data set of its own"
        )
    if len(found) > 1:
        raise UserError(f"window: one window for {text}; convert each modality into a data set of its own")


def _bar(items: Iterable[Path]) -> Iterable[Path]:
    return tqdm(items, desc="reading DICOM headers", unit="file", disable=not sys.stderr.isatty())


def _results(
    todo: list[Source], ids: dict[str, str], dest: Path, settings: Options, workers: int
) -> Iterator[tuple[Source, Case | str]]:
    """(source, case or what is wrong with it) as they are finished."""
    workers = workers or min(os.cpu_count() or 1, 8)
    waiting = iter(todo)
    began = time.monotonic()
    with tqdm(total=len(todo), desc="converting", unit="case", disable=not sys.stderr.isatty()) as bar:
        for source in waiting:
            yield source, attempt(source, ids[source.name], dest, settings)
            bar.update()
            if workers > 1 and time.monotonic() - began > POOL_AFTER_SECONDS:
                break
        if bar.n == len(todo):
            return
        # Forked from a server that imports everything once and has no threads, of which a fork makes no copy.
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(workers, len(todo) - bar.n), context, _end_with_the_run) as pool:
            jobs: dict[Any, Source] = {}
            try:
                while True:
                    for source in waiting:
                        jobs[pool.submit(attempt, source, ids[source.name], dest, settings)] = source
                        if len(jobs) >= 2 * workers:
                            break
                    if not jobs:
                        break
                    for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                        yield jobs.pop(job), job.result()
                        bar.update()
            except BrokenProcessPool:
                at_it = ", ".join(source.name for source in jobs.values())
                raise UserError(
                    f"a worker was killed, most likely for want of memory, at one of {at_it}; run the same command "
                    "again with fewer --workers"
                ) from None


def _end_with_the_run() -> None:
    """In a worker: end when the main process does, even if that was killed. A pool's workers would wait for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _note(notes: list[str]) -> None:
    """A few of many like notes; those on cases stand in cases.csv."""
    for note in notes[:3]:
        print(f"note: {note}")
    if len(notes) > 3:
        print(f"note: and {len(notes) - 3} more like this")


def _outside(case: Case, settings: Options) -> bool:
    return case.file.endswith(".npy") and outside(float(case.minimum), float(case.maximum), settings.window)


def _is_whole(case: Case, dest: Path) -> bool:
    """Whether all files of a case are there, as long as they were when they were written."""
    pairs = [(case.file, case.bytes), (case.label, case.label_bytes)]
    return all((dest / file).is_file() and (dest / file).stat().st_size == int(size) for file, size in pairs if file)


class _OnlyRun:
    """A lock on the folder, which is made if need be; removes what killed runs left behind."""

    def __init__(self, dest: Path) -> None:
        self.dest = dest

    def __enter__(self) -> None:
        try:
            self.dest.mkdir(parents=True, exist_ok=True)
            self.file = open(self.dest / ".prepare.lock", "w")
        except OSError as error:
            raise UserError(f"dest: {self.dest} cannot be written ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"dest: another prepare_data.py is writing to {self.dest}; wait for it") from None
        except OSError:  # a file system without locks
            return
        for leftover in [*self.dest.glob(".*.tmp"), *self.dest.glob("labels/.*.tmp")]:
            leftover.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        (self.dest / ".prepare.lock").unlink(missing_ok=True)
        self.file.close()


def read_table(dest: Path) -> dict[str, Case]:
    """{source: case} of cases.csv; {} where there is none."""
    path = dest / CASES
    if not path.exists():
        return {}
    names = {f.name for f in fields(Case)}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        rows = [{}]
    if any(set(row) != names for row in rows):
        raise UserError(f"{path}: was not written by this version; move it away, and all cases are converted again")
    return {row["source"]: Case(**row) for row in rows}


def write_table(table: dict[str, Case], dest: Path) -> None:
    with whole_file(dest / CASES) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Case)])
        writer.writeheader()
        writer.writerows(vars(case) for case in sorted(table.values(), key=lambda case: os.fsencode(case.id)))


def describe_dataset(cases: list[Case], found: Found, cfg: Config, dest: Path) -> dict[str, Any]:
    """Content of dataset.yaml. What differs between cases stands in cases.csv alone; other keys of people stay."""
    path = dest / "dataset.yaml"
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); correct or remove it"
        ) from None
    old = old if isinstance(old, dict) else {}
    volumes = [case for case in cases if case.file.endswith(".npy")]
    new: dict[str, Any] = {}
    modalities = sorted({case.modality or "unknown" for case in cases})
    new["modality"] = ", ".join(modalities)
    if volumes:
        new["slice_axis"] = 2
        for key in ("plane", "orientation"):
            values = {getattr(case, key) for case in volumes}
            new[key] = values.pop() if len(values) == 1 and "" not in values else None
        spacings = [[float(x) for x in case.spacing_mm.split(" x ")] for case in volumes if case.spacing_mm]
        new["spacing_mm"] = None
        if len(spacings) == len(volumes):
            middle = np.median(spacings, axis=0)
            if cfg.spacing_mm:
                middle = np.where(np.array(cfg.spacing_mm) > 0, cfg.spacing_mm, middle)
            if (np.abs(np.array(spacings) / middle - 1) < SAME_SPACING).all():
                new["spacing_mm"] = [round(float(x), 4) for x in middle]
        window = _window(cfg)
        new["window"] = [float(x) for x in window] if window else old.get("window") if cfg.window == "keep" else None
    about = [str(found.description[key]) for key in ("name", "reference", "licence") if found.description.get(key)]
    new["source"] = "; ".join(about) or ", ".join(sorted({re.split("[/#]", case.source)[0] for case in cases}))
    new["structures"] = found.structures if any(case.label for case in cases) else None
    merged = {**old, **{key: value or old.get(key) if key == "structures" else value for key, value in new.items()}}
    return {key: value for key, value in merged.items() if value is not None and value != {}}


def summary(cases: list[Case]) -> str:
    """A table of what a data set holds: one line for each plane, modality and dtype."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        kind = "volumes" if case.file.endswith(".npy") else "images"
        groups.setdefault((kind, case.modality or "unknown", case.plane or "-", case.dtype), []).append(case)
    rows = [("kind", "modality", "plane", "dtype", "cases", "labels", "shape", "spacing mm", "MB")]
    for key, members in groups.items():
        megabytes = sum(int(case.bytes) for case in members) / 1e6
        labels = sum(bool(case.label) for case in members)
        shape, spacing = _ranges(case.shape for case in members), _ranges(case.spacing_mm for case in members)
        rows.append((*key, str(len(members)), str(labels), shape, spacing, f"{megabytes:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _ranges(texts: Iterable[str]) -> str:
    """`31..42 x 40 x 24` from `31 x 40 x 24` and `42 x 40 x 24`."""
    values = [[float(x) for x in text.split(" x ")] for text in texts if text]
    if not values or len({len(v) for v in values}) > 1:
        return "-" if not values else "various"
    ends = [(min(column), max(column)) for column in zip(*values, strict=True)]
    return " x ".join(f"{low:g}" if low == high else f"{low:g}..{high:g}" for low, high in ends)


def montage(cases: list[Case], dest: Path, window: list[float] | None) -> None:
    """montage.png: slices as training sees them (window or percentiles), label maps as a red tint, with their ids."""
    picked = [cases[i] for i in np.unique(np.linspace(0, len(cases) - 1, min(len(cases), TILES)).astype(int))]
    shares = (0.3, 0.5, 0.7) if 3 * len(cases) <= TILES else (0.5,)
    tiles = [tile for case in picked for tile in _tiles(case, dest, window, shares)]
    columns = min(12 if len(shares) == 3 else 8, len(tiles))
    sheet = Image.new("RGB", (columns * TILE, math.ceil(len(tiles) / columns) * (TILE + 12)))
    draw = ImageDraw.Draw(sheet)
    for k, (text, tile) in enumerate(tiles):
        x, y = k % columns * TILE, k // columns * (TILE + 12)
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y + 12 + (TILE - tile.height) // 2))
        draw.text((x + 2, y), text[-20:], fill=(255, 255, 0))
    with whole_file(dest / MONTAGE) as temporary:
        sheet.save(temporary, format="PNG")


def _tiles(
    case: Case, dest: Path, window: list[float] | None, shares: tuple[float, ...]
) -> Iterator[tuple[str, Image.Image]]:
    if not case.file.endswith(".npy"):
        with Image.open(dest / case.file) as image:
            grey = np.asarray(image if image.mode.startswith("I") or image.mode == "F" else image.convert("L"))
        yield case.id, _tile(grey, None, *np.percentile(grey, (0.5, 99.5)), (1.0, 1.0))
        return
    volume = np.load(dest / case.file, mmap_mode="r", allow_pickle=False)
    label = np.load(dest / case.label, mmap_mode="r", allow_pickle=False) if case.label else None
    if window:
        low, high = window
    else:
        low, high = np.percentile(
            volume.reshape(-1, order="F")[:: max(1, volume.size // 10**6)].astype(float), (0.5, 99.5)
        )
        if low == high:
            low, high = float(case.minimum), float(case.maximum)
    spacing = [float(x) for x in case.spacing_mm.split(" x ")] if case.spacing_mm else [1.0, 1.0, 1.0]
    for share in shares:
        k = int(share * volume.shape[2])
        tint = label[:, :, k] > 0 if label is not None else None
        yield f"{case.id} {k}", _tile(volume[:, :, k], tint, low, high, (spacing[0], spacing[1]))


def _tile(pixels: np.ndarray, tint: np.ndarray | None, low: float, high: float, mm: tuple[float, float]) -> Image.Image:
    """At most TILE x TILE pixels, in the proportions that the patient has."""
    grey = ((pixels.astype(np.float32) - low) / max(high - low, 1e-20)).clip(0, 1) * 255
    rgb = np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if tint is not None:
        rgb[tint, 0] = rgb[tint, 0] // 2 + 127
    height, width = pixels.shape[0] * mm[0], pixels.shape[1] * mm[1]
    scale = TILE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR)


if __name__ == "__main__":
    options.main(main, Config, __doc__)
