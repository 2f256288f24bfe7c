"""What file headers alone make doubtful: warnings that every training script prints before it begins.

Statistics are robust (medians and median absolute deviations) and taken within a data set and kind of file, because
what is normal in one data set is not in another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from datasets.index import Sample, groups

FEWEST = 8  # files that make a median and a deviation worth something
DEVIATIONS = 5.0  # robust standard deviations: of normal values fewer than one in a million lie further out
NAMED, LINES = 3, 12  # files that a message names; lines that the start of a training run may print

# An outlier must also differ from the median by what matters: where all files but one agree, the deviation is 0.
SIDE_FACTOR = 2.0  # in plane: slices are fitted to one canvas, so a structure would appear at half or twice its size
SLICES_FACTOR = 3.0  # slice counts vary more: a chest has 100 slices of 3 mm or 300 of 1 mm
BYTES_FACTOR = 8.0  # images are compressed: a black one takes a hundredth of the bytes of a full one

THINNER = 2.0  # a plane in which the two sides differ so much holds the slice axis, if a third axis is as long
THINNER_EQUAL = 1.6  # less is enough where the other two are equal: 300 x 512 x 512, but not a head of 160 x 256 x 256
LONGER = 8.0  # slices per in-plane pixel; a whole-body PET has 6.5 (1,100 slices of 168 pixels)
DOMINATES = 0.9  # share of the files: all other data sets together give one sample in ten


@dataclass(frozen=True)
class Finding:
    """One line of the report: what is wrong, with which files, and what to do."""

    level: Literal["error", "warning"]
    check: str
    dataset: str | None  # None: concerns several data sets
    message: str
    files: list[str] = field(default_factory=list)  # all of them; the message names the first


def header_warnings(samples: Sequence[Sample], target_shape: Sequence[int] | None = None) -> list[str]:
    """Lines to print before training: what the headers alone make doubtful, a line per check and data set, 12 at most.

    target_shape: (slices, height, width) of a view, or None where no view has slices. Reads nothing.
    """
    lines = [finding.message for finding in header_findings(samples, target_shape) + name_twins(samples)]
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"{len(lines) - LINES + 1} more warnings about the data; check_data.py lists all of them"]
    return lines


def header_findings(samples: Sequence[Sample], target_shape: Sequence[int] | None = None) -> list[Finding]:
    """Warnings about sizes, slice axes, dtypes and the balance of the data sets."""
    found: list[Finding] = []
    for members in groups(samples).values():
        turned: dict[Sample, int] = {}
        if members[0].kind == "volume":
            turned = _turned(members)
            found += _volume_findings(members, turned, target_shape[0] if target_shape else 0)
        found += _odd_sizes(members, set(turned))
    return found + _dominance(samples)


def _volume_findings(members: list[Sample], turned: dict[Sample, int], wanted: int) -> list[Finding]:
    """What is odd about slices, their axis and the dtypes of a data set's volumes. wanted: slices of a view."""
    axis, axes = members[0].slice_axis, set(turned.values())
    if len(turned) == len(members) and len(axes) == 1:
        turn = f"if they lie along axis {min(axes)}, write slice_axis: {min(axes)} into dataset.yaml"
    else:
        turn = "if they differ from the others, turn them (np.moveaxis) or give them a data set of their own"
    dtypes = Counter(s.dtype for s in members).most_common()
    warn = partial(warning, members)
    return [
        *warn(
            "few slices",
            sorted((s for s in members if s.slices < wanted), key=lambda s: s.slices),
            f"fewer slices than a view ({wanted}) and will be padded",
            "lower the first number of --target_shape, or leave them out if they are fragments",
            lambda s: f"{s.slices}",
        ),
        *warn(
            "slice axis",
            list(turned),
            f"slices along axis {axis} by dataset.yaml or default, which does not look right",
            turn,
            lambda s: " x ".join(map(str, np.insert([s.height, s.width], s.slice_axis, s.slices))),
        ),
        *warn(
            "mixed dtypes",
            [s for s in members if s.dtype != dtypes[0][0]],
            f"another dtype than the others ({', '.join(f'{count} {dtype}' for dtype, count in dtypes)})",
            "make sure that all hold the same kind of values, not raw ones beside rescaled ones",
        ),
        *warn(
            "window",
            [s for s in members if s.window and s.window[0] < 0 and s.dtype.startswith("u")],
            f"an unsigned dtype, but window {list(members[0].window or ())} of dataset.yaml begins below 0",
            "correct the window, or convert the volumes to HU again",
            lambda s: s.dtype,
        ),
    ]


def _turned(members: list[Sample]) -> dict[Sample, int]:
    """Volumes whose slices seem to lie along another axis than slice_axis, and along which one."""
    rows, columns = (axis for axis in range(3) if axis != members[0].slice_axis)
    # CT in the order of SimpleITK, slices first: two axes are 512 in every file, and what is called height varies.
    counts = {s.slices for s in members}
    heights, widths = {s.height for s in members}, {s.width for s in members}
    if len(members) >= FEWEST:
        for axis, varying, other in ((rows, heights, widths), (columns, widths, heights)):
            if len(counts) == 1 and other == counts and len(varying) > 2:
                return dict.fromkeys(members, axis)
    turned = {}
    for s in members:
        short, long = sorted((s.height, s.width))
        thinner = THINNER_EQUAL if s.slices == long else THINNER
        if s.slices > LONGER * long or min(s.slices, long) > thinner * short:
            turned[s] = rows if s.height <= s.width else columns
    return turned


def _odd_sizes(members: list[Sample], without: set[Sample]) -> list[Finding]:
    """Outliers of in-plane size, slice count and file size; a file is reported by the first that catches it."""
    values = {name: [getattr(s, name) for s in members] for name in ("height", "width", "slices", "size_bytes")}
    median = {name: np.median(column) for name, column in values.items()}

    def far(name: str, factor: float) -> np.ndarray:
        return outliers(np.log(values[name]), math.log(factor))

    found, warn = [], partial(warning, members)
    for check, which, what, remedy, show in (
        (
            "in-plane size",
            far("height", SIDE_FACTOR) | far("width", SIDE_FACTOR),
            f"slices of another size than the others (median {median['height']:g} x {median['width']:g} pixels)",
            "make sure that they show the same as the others",
            lambda s: f"{s.height} x {s.width}",
        ),
        (
            "slice count",
            far("slices", SLICES_FACTOR),
            f"many more or fewer slices than the others (median {median['slices']:g})",
            "make sure that they are whole and not several scans in one file",
            lambda s: f"{s.slices}",
        ),
        (
            "file size",
            far("size_bytes", BYTES_FACTOR),
            f"many more or fewer bytes than the others (median {median['size_bytes']:.0f})",
            "look at them: they may be empty or not what you meant",
            lambda s: f"{s.size_bytes} bytes",
        ),
    ):
        odd = [s for s, is_odd in zip(members, which, strict=True) if is_odd and s not in without]
        without = without | set(odd)
        found += warn(check, odd, what, remedy, show)
    return found


def _dominance(samples: Sequence[Sample]) -> list[Finding]:
    found = []
    for kind in ("volume", "image"):
        counts = Counter(s.dataset for s in samples if s.kind == kind)
        largest, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
        others, total = len(counts) - 1, sum(counts.values())
        if others > 0 and count > DOMINATES * total:
            message = (
                f"{largest}: has {count} of {total} {kind}s, {others} other data set{'s' * (others > 1)} the rest; "
                "--sampling_temperature 2 draws those more often"
            )
            found.append(Finding("warning", "balance", largest, message))
    return found


def name_twins(samples: Sequence[Sample]) -> list[Finding]:
    """Files that are links to one, or copies that kept their time: equal in size, time and last part of the name.

    A time without a fraction of a second is no evidence: archives and some file systems round.
    """
    keys = {s: (s.size_bytes, s.mtime_ns, s.path.name) for s in samples if s.mtime_ns % 1_000_000_000}
    return duplicates(keys, "probable duplicates (size, time and name agree)")


def outliers(values: Sequence[float], least: float) -> np.ndarray:
    """Which values lie more than `least`, and more than five robust standard deviations, from their median.

    Of fewer than eight values none does.
    """
    if len(values) < FEWEST:
        return np.zeros(len(values), dtype=bool)
    away = np.abs(values - np.median(values))
    return away > max(least, DEVIATIONS * 1.4826 * float(np.median(away)))


def duplicates(keys: dict[Sample, Hashable], what: str) -> list[Finding]:
    """At most one warning, about all files with the same key; `what` begins it and says how that is known."""
    same: dict[Hashable, list[Sample]] = {}
    for sample, key in keys.items():
        same.setdefault(key, []).append(sample)
    sets = [members for members in same.values() if len(members) > 1]
    if not sets:
        return []
    some = "; ".join(
        " = ".join(s.name for s in members[:NAMED]) + " = ..." * (len(members) > NAMED) for members in sets[:NAMED]
    )
    more = "; ..." * (len(sets) > NAMED)
    files = [s for members in sets for s in members]
    datasets = {s.dataset for s in files}
    surplus = len(files) - len(sets)
    message = (
        f"{what}: {surplus} file{'s' * (surplus > 1)} too many: {some}{more}; "
        "keep one of each, or it counts twice and may stand on both sides of a split"
    )
    dataset = datasets.pop() if len(datasets) == 1 else None
    return [Finding("warning", "duplicates", dataset, message, [s.name for s in files])]


def warning(
    members: list[Sample],
    check: str,
    which: list[Sample],
    what: str,
    remedy: str,
    show: Callable[[Sample], str] | None = None,
) -> list[Finding]:
    """`data set: n of N volumes have what: first names (shown value); remedy`; nothing where there are none."""
    if not which:
        return []
    dataset, kind = members[0].dataset, members[0].kind
    names = [s.name.removeprefix(f"{dataset}/") + (f" ({show(s)})" if show else "") for s in which[:NAMED]]
    more = " ..." if len(which) > NAMED else ""
    verb = "has" if len(which) == 1 else "have"
    message = f"{dataset}: {len(which)} of {len(members)} {kind}s {verb} {what}: {', '.join(names)}{more}; {remedy}"
    return [Finding("warning", check, dataset, message, [s.name for s in which])]
