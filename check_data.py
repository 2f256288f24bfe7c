"""Check data before training on them: what would be refused (errors), and what looks odd (warnings).

    python check_data.py --data_path Training_Data                # headers only, seconds
    python check_data.py --data_path Training_Data --full true    # reads every file

Exit code 0, or 1 where there are errors.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from datasets.cache import shown_size
from datasets.check import check, measure
from datasets.index import Sample, groups
from datasets.store import unused_files
from utils import config as options
from utils.errors import UserError
from utils.files import write_json

SHOWN = 30  # errors and warnings on the screen; the report has all


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


def main(cfg: Config) -> None:
    if cfg.report and not Path(cfg.report).parent.is_dir():
        raise UserError(f"report: {Path(cfg.report).parent} is not a folder; create it or name another file")
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    samples, findings, contents = check(cfg.data_path, cfg.full, cfg.target_shape, cfg.workers, sys.stderr.isatty())
    data_sets = [
        {
            "data_set": dataset,
            "kind": kind,
            "files": len(members),
            "dtypes": dict(Counter(sample.dtype for sample in members).most_common()),
            "measured": measure(members, contents),
        }
        for (dataset, kind), members in groups(samples).items()
    ]
    errors, warnings = ([f for f in findings if f.level == level] for level in ("error", "warning"))

    for members, data_set in zip(groups(samples).values(), data_sets, strict=True):
        print(f"{title(members, data_set['dtypes'])}\n{layout(data_set['measured'])}\n")
    for name, listed in (("errors: training stops at these", errors), ("warnings", warnings)):
        if listed:
            more = [f"... and {len(listed) - SHOWN} more; --report FILE.json lists all"] if len(listed) > SHOWN else []
            print("\n  ".join([name, *(finding.message for finding in listed[:SHOWN]), *more]) + "\n")
    depth = "all read" if cfg.full else "headers only; --full true reads everything"
    print(f"{_count(errors, 'error')}, {_count(warnings, 'warning')}, {_count(samples, 'file')} ({depth})", flush=True)
    if samples:
        tidy_cache(unused_files(samples, cfg.cache_path), cfg.clean_cache)
    if cfg.report:
        found = [asdict(finding) for finding in findings]
        write_json({"options": options.to_dict(cfg), "data_sets": data_sets, "findings": found}, Path(cfg.report))
    if errors:
        raise SystemExit(1)


def tidy_cache(unused: Sequence[Path], delete: bool) -> None:
    """Say, or delete, what lies in the cache and no training on these data would read."""
    if not unused:
        return
    size = shown_size(sum(file.stat().st_size for file in unused))
    if delete:
        for file in unused:
            file.unlink(missing_ok=True)
    done = "deleted" if delete else "of files that have changed or are gone; --clean_cache true deletes them"
    print(f"cache: {len(unused)} working cop{'y' if len(unused) == 1 else 'ies'} ({size}) {done}")


def title(members: Sequence[Sample], dtypes: dict[str, int]) -> str:
    """Name, number of files, bytes and dtypes of a data set's volumes or images."""
    first = members[0]
    types = ", ".join(dtype if len(dtypes) == 1 else f"{count} {dtype}" for dtype, count in dtypes.items())
    size = sum(sample.size_bytes for sample in members) / 1e6
    modality = f", {first.modality}" if first.modality else ""
    return f"{first.dataset}: {len(members)} {first.kind}{'s' * (len(members) > 1)}, {size:.1f} MB, {types}{modality}"


def layout(measured: dict[str, dict[str, float]]) -> str:
    """A line for each measure, with its minimum, median and maximum."""
    cells = [("", "min", "median", "max")] + [(k, *(f"{x:.4g}" for x in v.values())) for k, v in measured.items()]
    return "\n".join(f"  {name:<22}{low:>12}{middle:>12}{high:>12}" for name, low, middle, high in cells)


def _count(items: Sequence, name: str) -> str:
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


if __name__ == "__main__":
    options.main(main, Config, __doc__)
