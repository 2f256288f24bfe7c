"""Convert a data set of any medical format into what training reads: <dest>/<id>.npy, or images for 2D data.

    python prepare_data.py --source Task02_Heart --dest Training_Data/Heart            # NIfTI, with its labels
    python prepare_data.py --source LUNA16/subset0 --dest Training_Data/LUNA --modality CT --window lung
    python prepare_data.py --source dicom_export --dest Training_Data/MR --on_error skip
    python prepare_data.py --source BraTS2018 --dest Tasks/BraTS --preset brats2018    # four channels, for downstream

Reads NIfTI, DICOM series, NRRD, MHA / MHD, Analyze, MGH, MINC, PAR / REC, HDF5, NPY / NPZ, TIFF stacks and 2D images.
Writes beside the cases dataset.yaml (what training reads), cases.csv (where each case comes from), montage.png (look at
it) and labels/. The same command again converts only what is missing or has changed. docs/DATA.md has the details.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt

from conversion.convert import Window, attempt, source_key
from conversion.layouts import PRESETS, Found, Source, find
from conversion.montage import montage
from conversion.table import Case, assign_ids, assign_values, describe, in_order, read_table, write_table
from conversion.volume import BadFile, LeftOut, Options
from conversion.workers import outcomes
from datasets.index import LABEL_FOLDERS, MONTAGE, scan
from datasets.index import describe as describe_samples
from utils import config
from utils.errors import UserError
from utils.locks import Lock

WINDOWS_HU = {"lung": (-1000, 400), "soft_tissue": (-160, 240), "bone": (-500, 1300), "brain": (0, 80)}
SAVE_SECONDS = 10.0  # the table of cases is saved this often, so a killed run has little to do again


@dataclass
class Files:
    source: str | list[str] = "none"
    """a file, a folder, or a list of them: [a.nii.gz, b.nii.gz]"""
    dest: str = "none"
    """data set to write, e.g. Training_Data/MyData; a run found here is continued"""
    preset: Literal["none", "mmwhs_ct", "mmwhs_mr", "brats2018"] = "none"
    """public data set whose file names, channels and label values are known"""
    images: str | list[str] = "*"
    """pattern of the names of images, e.g. '*_flair.nii.gz', or a list with a pattern for each channel of a case"""
    labels: str = ""
    """pattern of the names of label maps, e.g. '*_seg.nii.gz'; default: those in folders labels, labelsTr or masks"""
    modality: str = ""
    """CT, MR, ...; default: what DICOM headers or dataset.json say"""
    window: str | list[float] = "keep"
    """intensities that become 0 and 1: lung, soft_tissue, bone, brain (CT), or two numbers; none: percentiles; keep:
    as dataset.yaml says, none where there is none yet"""


@dataclass
class Config(Options, Files):
    on_error: Literal["error", "skip"] = "error"
    """treatment of files that cannot be converted: report them, convert the rest and fail; or report them and go on"""
    workers: NonNegativeInt = 0
    """processes, each holding one volume; 0: one per core, at most 8"""


def main(cfg: Config) -> None:
    cfg = replace(cfg, orientation=cfg.orientation.upper())
    places, dest = _check(cfg)
    preset = PRESETS.get(cfg.preset)
    images = [cfg.images] if isinstance(cfg.images, str) else cfg.images
    found = find(places, images, cfg.labels, cfg.modality, cfg, preset)
    _say_what_was_found(found, places)
    window = _window(cfg.window, found.sources)
    with _only_run(dest):
        table = read_table(dest)
        described = preset.structures if preset else found.description.structures
        sources, structures = assign_values(found.sources, table, dest, described)
        sources = assign_ids(sources, {name: case.id for name, case in table.items()})
        todo = {}
        for source in sources:
            case = table.get(source.name)
            if case and case.key == source_key(source, cfg) and case.is_whole(dest):
                case.modality, case.patient = source.modality, source.patient or case.patient
            else:
                todo[source.name] = source
        one = partial(attempt, dest=dest, options=cfg, window=window)
        failed, left_out = _keep(outcomes(todo, one, cfg.workers), table, dest, found.problems)
        if not table:
            raise UserError("nothing was converted, for the reasons above")
        asked = "keep" if cfg.window == "keep" else window
        content = describe(in_order(table), dest, cfg.spacing_mm, asked, found.description.about, structures)
        montage(in_order(table), dest, content.get("window"))
    samples, _ = scan(dest.resolve().parent, dest.resolve().name)
    problems, converted = len(found.problems) + failed, len(todo) - failed - left_out
    print(
        f"{describe_samples(samples)}\n{dest}: {converted} cases converted, {len(sources) - len(todo)} there already, "
        f"left out: {left_out}, problems: {problems}; look at {dest / MONTAGE}"
    )
    if content["modality"] == "CT" and not content.get("window"):
        print("note: CT without --window: training scales each volume by its percentiles, not by HU")
    if problems and cfg.on_error == "error":
        raise UserError(
            f"problems: {problems}, listed above; everything else was converted. Correct them and run the same command "
            "again, or leave them out with --on_error skip"
        )


def _check(cfg: Config) -> tuple[list[Path], Path]:
    """(sources, destination). Raises UserError for these and for other options that are wrong in themselves."""
    sources = [cfg.source] if isinstance(cfg.source, str) else cfg.source
    if not sources or "none" in (*sources, cfg.dest):
        raise UserError("source, dest: both are needed, e.g. --source my_files --dest Training_Data/MyData")
    places, dest = [Path(source).expanduser() for source in sources], Path(cfg.dest).expanduser()
    if dest.name.startswith(".") or dest.name.lower() in LABEL_FOLDERS:
        raise UserError(f"dest: training never reads a folder called {dest.name}; choose another name")
    for place in (place.resolve() for place in places):
        if dest.resolve().is_relative_to(place) or place.is_relative_to(dest.resolve()):
            raise UserError(f"dest: source {place} lies inside {dest} or the other way round; choose another folder")
    if cfg.spacing_mm and len(cfg.spacing_mm) != 3:
        raise UserError(f"spacing_mm: {cfg.spacing_mm} are not three numbers: rows, columns, slices")
    if cfg.orientation and sorted(cfg.orientation) not in map(sorted, product("RL", "AP", "SI")):
        raise UserError(f"orientation: {cfg.orientation!r} is not one each of R or L, A or P, S or I, e.g. LPS")
    several = [] if isinstance(cfg.images, str) else cfg.images
    for option, patterns in (("labels", [cfg.labels] if cfg.labels else []), ("images", several)):
        if any(pattern.count("*") != 1 for pattern in patterns):
            raise UserError(f"{option}: {patterns} need one '*' each, which stands for what files of a case share")
    return places, dest


def _window(window: str | list[float], sources: Sequence[Source]) -> Window:
    """The window asked for, None for none and keep. It is for all volumes, so they must measure the same thing."""
    if window in ("keep", "none"):
        return None
    limits = WINDOWS_HU.get(window) if isinstance(window, str) else window
    if limits is None or len(limits) != 2 or not limits[0] < limits[1]:
        raise UserError(f"window: {window!r} is not one of {', '.join(WINDOWS_HU)}, none, keep or two growing numbers")
    found = Counter(s.modality or "unknown" for s in sources if s.format not in ("image", "dicom_image"))
    if len(found) != 1 or (isinstance(window, str) and set(found) != {"CT"}):
        text = ", ".join(f"{count} of modality {name}" for name, count in found.most_common()) or "no volumes"
        raise UserError(
            f"window: {window} holds for one modality, a named one for CT only, but there are {text}; say --modality "
            "CT if they are CT, or convert each modality into a data set of its own"
        )
    return limits[0], limits[1]


@contextlib.contextmanager
def _only_run(dest: Path) -> Iterator[None]:
    """A lock on the folder, which is made if need be, and goes again if nothing comes into it."""
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, dest)  # where nothing was converted: training would stop at an empty data set
        try:
            lock = Lock(dest / ".prepare.lock", "is writing to this folder")
            stack.enter_context(lock.held("wait for it, or choose another --dest"))
        except OSError as error:
            raise UserError(f"dest: {dest} cannot be written ({error.strerror}); choose another folder") from None
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _keep(
    results: Iterable[tuple[str, Case | BadFile]], table: dict[str, Case], dest: Path, problems: Sequence[str]
) -> tuple[int, int]:
    """Note what is converted in the table, which is saved meanwhile, and say at the end what is not, and why.

    problems: of files that were not tried.  Returns the numbers of cases that failed and that were left out.
    """
    bad: list[BadFile] = []
    notes: list[str] = []
    saved = time.monotonic()
    try:
        for name, result in results:
            if isinstance(result, BadFile):
                bad.append(result)
            else:
                result.patient = result.patient or (table[name].patient if name in table else "")  # as filled in
                notes += [f"note: {name}: {result.notes}"] if result.notes else []
            if not isinstance(result, BadFile) or isinstance(result, LeftOut):
                _replace(name, result, table, dest)
            if time.monotonic() - saved > SAVE_SECONDS:
                write_table(table, dest)
                saved = time.monotonic()
    finally:
        if table:
            write_table(table, dest)
        more = [f"note: and {len(notes) - 5} more in cases.csv"] if len(notes) > 5 else []
        print(*notes[:5], *more, sep="\n", end="\n" if notes else "", flush=True)
        said = sorted({*(f"problem: {p}" for p in problems), *(f"{_kind(error)}: {error}" for error in bad)})
        print(*said, sep="\n", end="\n" if said else "", file=sys.stderr, flush=True)
    left_out = sum(isinstance(error, LeftOut) for error in bad)
    return len(bad) - left_out, left_out


def _kind(error: BadFile) -> str:
    return "left out" if isinstance(error, LeftOut) else "problem"


def _replace(name: str, new: Case | LeftOut, table: dict[str, Case], dest: Path) -> None:
    """The case of an earlier run by a new one, or by none; files that nothing stands for any more are deleted."""
    old = table.pop(name, None)
    kept = {new.file, new.label} if isinstance(new, Case) else set()
    for file in {old.file, old.label} - kept - {""} if old else ():  # such as a label map that is gone from the source
        (dest / file).unlink(missing_ok=True)
    if isinstance(new, Case):
        table[name] = new


def _say_what_was_found(found: Found, places: Sequence[Path]) -> None:
    for note in found.notes:
        print(f"note: {note}", flush=True)
    if ignored := ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.ignored.items()) if count > 0):
        print(f"not converted: {ignored}", flush=True)
    if not found.sources and not found.problems:
        raise UserError(f"source: {places[0]} holds nothing to convert; docs/DATA.md lists the accepted formats")


if __name__ == "__main__":
    config.main(main, Config, __doc__)
