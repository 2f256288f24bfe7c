"""Check data before training on them: what would be refused (errors), and what looks odd (warnings).

    python check_data.py --data_path Training_Data                # headers only, seconds
    python check_data.py --data_path Training_Data --full true    # reads every file

Exit code 0, or 1 where there are errors.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt

from datasets.check import Content, check
from datasets.headers import Finding
from datasets.index import Sample, groups
from datasets.store import unused_files
from utils import config as options
from utils.errors import UserError


@dataclass
class Config:
    data_path: str = "Training_Data"
    """data sets: <data set>/<case>.npy volumes (height, width, slices) and folders of 2D images"""
    full: bool = False
    """read every file: NaN, constant slices, intensities, equal content; otherwise headers only"""
    target_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 128, 128)
    """slices, height, width of a view, as you will train: volumes with fewer slices are named"""
    workers: NonNegativeInt = 0
    """threads that read; 0: one per CPU core"""
    cache_path: str | None = None
    """folder of the training scripts' working copies; null: .cache in data_path"""
    clean_cache: bool = False
    """delete working copies of files that have changed or are gone (while no training runs on other data there)"""
    report: str | None = None
    """JSON file to write everything to, with the names of all files"""


SHOWN = 30  # errors and warnings on the screen; the report has all

Row = tuple[str, float, float, float]  # what is measured, its minimum, median and maximum


def main(cfg: Config) -> None:
    if cfg.report and not Path(cfg.report).parent.is_dir():
        raise UserError(f"report: {Path(cfg.report).parent} is not a folder; create it or name another file")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    samples, findings, contents = check(cfg.data_path, cfg.full, cfg.target_shape, cfg.workers, sys.stderr.isatty())
    errors = [finding for finding in findings if finding.level == "error"]
    warnings = [finding for finding in findings if finding.level == "warning"]

    for members in groups(samples).values():
        print(f"{title(members)}\n{layout(rows(members, contents))}\n")
    for name, listed in (("errors: training stops at these", errors), ("warnings", warnings)):
        if listed:
            print("\n".join([name, *(f"  {finding.message}" for finding in listed[:SHOWN])]))
            if len(listed) > SHOWN:
                print(f"  ... and {len(listed) - SHOWN} more; --report FILE.json lists all")
            print()
    depth = "all read" if cfg.full else "headers only; --full true reads everything"
    print(f"{_count(errors, 'error')}, {_count(warnings, 'warning')}, {_count(samples, 'file')} ({depth})", flush=True)
    if samples:
        tidy_cache(unused_files(samples, cfg.cache_path), cfg.clean_cache)
    if cfg.report:
        write_report(Path(cfg.report), cfg, samples, findings, contents)
    if errors:
        raise SystemExit(1)


def tidy_cache(unused: Sequence[Path], delete: bool) -> None:
    """Say, or delete, what lies in the cache and no training on these data would read."""
    if not unused:
        return
    size = sum(file.stat().st_size for file in unused) / 1e6
    if delete:
        for file in unused:
            file.unlink(missing_ok=True)
    done = "deleted" if delete else "of files that have changed or are gone; --clean_cache true deletes them"
    copies = "working copy" if len(unused) == 1 else "working copies"
    print(f"cache: {len(unused)} {copies} ({size:.1f} MB) {done}")


def title(members: Sequence[Sample]) -> str:
    """Name, number of files, bytes and dtypes of a data set's volumes or images."""
    first = members[0]
    dtypes = Counter(sample.dtype for sample in members).most_common()
    types = ", ".join(dtype if len(dtypes) == 1 else f"{count} {dtype}" for dtype, count in dtypes)
    size = sum(sample.size_bytes for sample in members) / 1e6
    modality = f", {first.modality}" if first.modality else ""
    return f"{first.dataset}: {len(members)} {first.kind}{'s' * (len(members) > 1)}, {size:.1f} MB, {types}{modality}"


def rows(members: Sequence[Sample], contents: dict[Sample, Content]) -> list[Row]:
    """Minimum, median and maximum of what was measured; intensities only of files that were read and are good."""
    measured = {
        "slices": [sample.slices for sample in members],
        "height": [sample.height for sample in members],
        "width": [sample.width for sample in members],
        "file size, MB": [sample.size_bytes / 1e6 for sample in members],
    }
    read = [(sample, contents[sample]) for sample in members if sample in contents]
    if read:
        for i, name in enumerate(("0.5 % of voxels below", "50 %", "99.5 %")):
            measured[name] = [content.percentiles[i] for _, content in read]
        measured["blank slices, %"] = [100 * content.blank / sample.slices for sample, content in read]
    if members[0].kind == "image":
        del measured["slices"]
        measured.pop("blank slices, %", None)
    return [(name, float(min(v)), float(np.median(v)), float(max(v))) for name, v in measured.items()]


def layout(table: Sequence[Row]) -> str:
    cells = [("", "min", "median", "max")] + [(name, *(f"{value:.4g}" for value in values)) for name, *values in table]
    return "\n".join(f"  {name:<22}{low:>12}{middle:>12}{high:>12}" for name, low, middle, high in cells)


def write_report(
    path: Path,
    cfg: Config,
    samples: Sequence[Sample],
    findings: Sequence[Finding],
    contents: dict[Sample, Content],
) -> None:
    """Everything that was printed and the names of all files concerned, as JSON."""
    report = {
        "options": options.to_dict(cfg),
        "data_sets": [
            {
                "data_set": dataset,
                "kind": kind,
                "files": len(members),
                "dtypes": Counter(sample.dtype for sample in members),
                "measured": {
                    name: {"min": low, "median": middle, "max": high}
                    for name, low, middle, high in rows(members, contents)
                },
            }
            for (dataset, kind), members in groups(samples).items()
        ],
        "findings": [asdict(finding) for finding in findings],
    }
    try:
        path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"report: {path} cannot be written ({error.strerror}); name another file") from None


def _count(items: Sequence, name: str) -> str:
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


if __name__ == "__main__":
    options.main(main, Config, __doc__)
