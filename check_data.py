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

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt

from datasets.cache import shown_size
from datasets.check import Content, check
from datasets.index import Sample, groups
from datasets.store import links_in_cache, unused_files
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
    data_sets = []
    for (dataset, kind), members in groups(samples).items():
        measured, dtypes = measure(members, contents), dict(Counter(s.dtype for s in members).most_common())
        data_set = {"data_set": dataset, "kind": kind, "files": len(members), "dtypes": dtypes, "measured": measured}
        data_sets.append(data_set)
        types = ", ".join(dtype if len(dtypes) == 1 else f"{count} {dtype}" for dtype, count in dtypes.items())
        size, modality = sum(s.size_bytes for s in members), members[0].modality
        print(f"{dataset}: {_count(members, kind)}, {shown_size(size)}, {types}{f', {modality}' if modality else ''}")
        print(f"  {'':<22}{'min':>12}{'median':>12}{'max':>12}")
        for name, values in measured.items():
            print(f"  {name:<22}" + "".join(f"{value:>12.4g}" for value in values.values()))
        print()
    errors, warnings = ([f for f in findings if f.level == level] for level in ("error", "warning"))
    for name, listed in (("errors: training stops at these", errors), ("warnings", warnings)):
        if listed:
            more = [f"... and {len(listed) - SHOWN} more; --report FILE.json lists all"] if len(listed) > SHOWN else []
            print("\n  ".join([name, *(finding.message for finding in listed[:SHOWN]), *more]) + "\n")
    depth = "all read" if cfg.full else "headers only; --full true reads everything"
    print(f"{_count(errors, 'error')}, {_count(warnings, 'warning')}, {_count(samples, 'file')} ({depth})", flush=True)
    if samples:
        cache = samples, cfg.cache_path
        tidy_cache(unused_files(*cache), links_in_cache(*cache), cfg.clean_cache)
    if cfg.report:
        found = [asdict(finding) for finding in findings]
        write_json({"options": options.to_dict(cfg), "data_sets": data_sets, "findings": found}, Path(cfg.report))
    if errors:
        raise SystemExit(1)


def measure(members: Sequence[Sample], contents: dict[Sample, Content]) -> dict[str, dict[str, float]]:
    """{measure: {"min", "median", "max"}} of a data set's volumes or images; intensities of those in contents."""
    read = [contents[sample] for sample in members if sample in contents]
    values = {name: [getattr(sample, name) for sample in members] for name in ("slices", "height", "width")}
    values["file size, MB"] = [sample.size_bytes / 1e6 for sample in members]
    for i, name in enumerate(("0.5 % of voxels below", "50 %", "99.5 %")):
        values[name] = [content.percentiles[i] for content in read]
    values["blank slices"] = [content.blank for content in read]
    return {name: {"min": min(v), "median": float(np.median(v)), "max": max(v)} for name, v in values.items() if v}


def tidy_cache(unused: Sequence[Path], links: Sequence[Path], delete: bool) -> None:
    """Say, or delete, what lies in the cache and no training on these data would read."""
    for link in links if delete else ():
        print(f"cache: {link} is a link, and nothing behind links is deleted; clean up there yourself")
    if not unused:
        return
    size = shown_size(sum(file.stat().st_size for file in unused))
    if delete:
        for file in unused:
            file.unlink(missing_ok=True)
    done = "deleted" if delete else "of files that have changed or are gone; --clean_cache true deletes them"
    print(f"cache: {_count(unused, 'cached file')} ({size}) {done}")


def _count(items: Sequence, name: str) -> str:
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


if __name__ == "__main__":
    options.main(main, Config, __doc__)
