"""What can be said about data before training on them: errors, which training refuses, and warnings to look at.

Warnings from headers alone are printed by every training script before it begins. Statistics are robust (medians and
median absolute deviations) and taken within a data set and kind of file, because what is normal in one data set is
not in another.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from tqdm import tqdm

from datasets.index import Sample, groups, scan
from datasets.render import PERCENTILES, SLICES_AT_ONCE, BadSource, open_source, require_contrast, sampled

FEWEST = 8  # files that make a median and a deviation worth something
DEVIATIONS = 5.0  # robust standard deviations: of normal values fewer than one in a million lie further out
NAMED = 3  # files that a message names

THINNER = 2.0  # a plane in which the two sides differ so much holds the slice axis, if a third axis is as long
THINNER_EQUAL = 1.6  # enough where the other two are equal: 300 x 512 x 512, but not a head of 160 x 256 x 256
LONGER = 8.0  # slices per in-plane pixel; a whole-body PET has 6.5 (1,100 slices of 168 pixels)

SCALE_FACTOR = 8.0  # MR scanners' scales differ by small factors; 0..1 among 0..1000 differs by 1000
LEVEL_SHARE = 0.4  # of the median range: CT without its offset of -1024 moves by half of it, other anatomy by less
BLANK = 0.2  # share of slices; scans have some blank ones at their ends, a fifth of all draws is a waste
HU_LOWEST, HU_HIGHEST, HU_RANGE = -4096, 8192, 100  # HU; padding goes down to -3024, a 12-bit scale up to 3071


# What files of a data set have, and what to do about it.
WARNINGS = {
    "few slices": ("fewer slices than a view ({}), and will be padded", "lower --target_shape, or leave fragments out"),
    "slice axis": ("slices along axis {}, which does not look right", "turn them, or set slice_axis ({}?) for all"),
    "mixed dtypes": ("another dtype than the others ({})", "make sure that none is raw beside rescaled ones"),
    "window": ("an unsigned dtype where the window {} begins below 0", "correct the window, or convert to HU again"),
    "in-plane size": ("another height x width than the others (median {})", "make sure that they show the same"),
    "slice count": ("another number of slices than the others (median {})", "make sure that each is one whole scan"),
    "file size": ("another number of bytes than the others (median {})", "they may be empty or not what you meant"),
    "not HU": ("no Hounsfield units, although dataset.yaml says CT", "apply slope and intercept, or correct it"),
    "almost constant": ("one value in 99 % of their pixels", "look at them; it may be meant (vessels alone)"),
    "intensity": (
        "intensities far from the others' (0.5 / 50 / 99.5 % percentiles, median {})",
        "look whether modality, scale or offset differ; a scale alone harms only with a window",
    ),
    "blank slices": (f"more than {BLANK:.0%} blank slices", "crop the volumes to their content"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what is wrong, with which files, and what to do."""

    level: Literal["error", "warning"]
    check: str
    dataset: str | None  # None: concerns several data sets
    message: str
    files: list[str] = field(default_factory=list)  # all of them; the message names the first


@dataclass(frozen=True)
class Content:
    """What reading a whole file says about it; intensities as they are stored."""

    minimum: float
    maximum: float
    percentiles: tuple[float, float, float]  # 0.5th, 50th, 99.5th; of a large volume over a part of its voxels
    blank: int  # slices that hold a single value
    digest: str  # of the values as float32 [D, H, W]: blind to dtype, byte order, memory order and slice axis


def check(
    data_path: str, full: bool, target_shape: Sequence[int], workers: int = 1, progress: bool = False
) -> tuple[list[Sample], list[Finding], dict[Sample, Content]]:
    """(samples with a good header, everything found with the errors first, contents of the samples that were read).

    full: read all files, on `workers` threads (0: one per core); otherwise only headers.
    Raises UserError where there is no data tree.
    """
    samples, bad = scan(data_path)
    found = [Finding("error", "unusable", None, problem) for problem in bad]
    contents: dict[Sample, Content] = {}
    if full:
        total = sum(s.size_bytes for s in samples)
        with (
            tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=not progress) as bar,
            ThreadPoolExecutor(workers or os.cpu_count()) as pool,
        ):
            for sample, content in zip(samples, pool.map(read_content, samples), strict=True):
                if isinstance(content, Content):
                    contents[sample] = content
                else:
                    found.append(Finding("error", "content", sample.dataset, content, [sample.name]))
                bar.update(sample.size_bytes)
    warnings = header_findings(list(contents) if full else samples, target_shape) + _content_findings(contents)
    place = {sample.dataset: i for i, sample in enumerate(samples)}
    return samples, found + sorted(warnings, key=lambda f: place.get(f.dataset, len(samples))), contents


# --- what headers make doubtful


def header_findings(samples: Sequence[Sample], target_shape: Sequence[int] | None = None) -> list[Finding]:
    """Warnings about sizes, slice axes and dtypes, one per check and data set.

    target_shape: (slices, height, width) of a view, or None where no view has slices.
    """
    found: list[Finding] = []
    for members in groups(samples).values():
        turned = _turned(members)  # of images none
        if members[0].kind == "volume":
            found += _volume_findings(members, turned, target_shape[0] if target_shape else 0)
        found += _odd_sizes(members, set(turned))
    return found


def _volume_findings(members: list[Sample], turned: dict[Sample, int], wanted: int) -> list[Finding]:
    """What is odd about slices, their axis and the dtypes of a data set's volumes. wanted: slices of a view."""
    few = sorted((s for s in members if s.slices < wanted), key=lambda s: s.slices)
    dtypes = Counter(s.dtype for s in members).most_common()
    mixed = [s for s in members if s.dtype != dtypes[0][0]]
    unsigned = [s for s in members if s.window and s.window[0] < 0 and s.dtype.startswith("u")]
    likely = " or ".join(map(str, sorted(set(turned.values()))))

    def shape(s: Sample) -> str:
        return " x ".join(map(str, np.insert([s.height, s.width], s.slice_axis, s.slices)))

    warn = partial(_warning, members)
    return [
        *warn("few slices", few, lambda s: str(s.slices), wanted),
        *warn("slice axis", list(turned), shape, members[0].slice_axis, likely),
        *warn("mixed dtypes", mixed, lambda s: s.dtype, ", ".join(f"{count} {dtype}" for dtype, count in dtypes)),
        *warn("window", unsigned, lambda s: s.dtype, members[0].window),
    ]


def _turned(members: list[Sample]) -> dict[Sample, int]:
    """Volumes whose slices seem to lie along another axis than slice_axis, and along which one."""
    axes = {s: likely_slice_axis(np.insert([s.height, s.width], s.slice_axis, s.slices), s.slice_axis) for s in members}
    return {s: axis for s, axis in axes.items() if axis != s.slice_axis}


def likely_slice_axis(shape: Sequence[int], axis: int) -> int:
    """The axis along which the slices of a volume seem to lie; `axis` unless its lengths speak clearly against it."""
    rows, columns = (k for k in range(3) if k != axis)
    slices, (short, long) = shape[axis], sorted((shape[rows], shape[columns]))
    thinner = THINNER_EQUAL if slices == long else THINNER
    if slices > LONGER * long or min(slices, long) > thinner * short:
        return rows if shape[rows] <= shape[columns] else columns
    return axis


def _odd_sizes(members: list[Sample], without: set[Sample]) -> list[Finding]:
    """Outliers of in-plane size, slice count and file size; a file is reported by the first that catches it."""
    found = []
    # An outlier must also differ from the median by a factor that matters: where all agree, the deviation is 0.
    for check, names, factor in (
        ("in-plane size", ("height", "width"), 2.0),  # slices are fitted to one canvas
        ("slice count", ("slices",), 3.0),  # a chest has 100 slices of 3 mm or 300 of 1 mm
        ("file size", ("size_bytes",), 8.0),  # a black image takes a hundredth of the bytes of a full one
    ):
        values = np.array([[getattr(s, name) for s in members] for name in names])
        far = np.any([outliers(np.log(row), math.log(factor)) for row in values], axis=0)
        odd = {members[i]: values[:, i] for i in np.flatnonzero(far) if members[i] not in without}
        median = " x ".join(f"{value:.0f}" for value in np.median(values, axis=1))
        found += _warning(members, check, list(odd), lambda s, odd=odd: " x ".join(map(str, odd[s])), median)
        without = without | set(odd)
    return found


# --- what contents make doubtful


def read_content(sample: Sample) -> Content | str:
    """What a file holds, or why training would refuse it."""
    try:
        source = open_source(sample)
        low, high = require_contrast(source, sample)
    except BadSource as error:
        return f"{sample.path}: {error}"
    blank, digest = 0, hashlib.blake2b(repr(source.shape).encode(), digest_size=16)
    for first in range(0, sample.slices, SLICES_AT_ONCE):
        block = np.ascontiguousarray(source[first : first + SLICES_AT_ONCE])
        blank += int(np.count_nonzero(block.min((1, 2)) == block.max((1, 2))))
        digest.update(np.add(block, 0, dtype=np.float32, casting="unsafe"))  # + 0 turns -0 into 0
    percentiles = np.percentile(sampled(source), (PERCENTILES[0], 50, PERCENTILES[1])).tolist()
    return Content(low, high, tuple(percentiles), blank, digest.hexdigest())


def _content_findings(contents: dict[Sample, Content]) -> list[Finding]:
    """Warnings about intensities, blank slices and equal content; a file's intensities are reported once."""
    found: list[Finding] = []

    def limits(s: Sample) -> str:
        return f"{contents[s].minimum:.4g} to {contents[s].maximum:.4g}"

    def shown(percentiles: Iterable[float]) -> str:
        return " / ".join(f"{value:.4g}" for value in percentiles)

    for members in groups(contents).values():
        is_ct = members[0].kind == "volume" and (members[0].modality or "").strip().upper() == "CT"
        not_hu = [s for s in members if is_ct and not _looks_like_hu(contents[s])]
        flat = [s for s in members if contents[s].percentiles[0] == contents[s].percentiles[2]]
        odd = _odd_intensities([s for s in members if s not in {*not_hu, *flat}], contents)
        typical = shown(np.median([contents[s].percentiles for s in members], axis=0))
        blank = [s for s in members if s.kind == "volume" and contents[s].blank > BLANK * s.slices]
        found += [
            *_warning(members, "not HU", not_hu, limits),
            *_warning(members, "almost constant", flat, limits),
            *_warning(members, "intensity", odd, lambda s: shown(contents[s].percentiles), typical),
            *_warning(members, "blank slices", blank, lambda s: f"{contents[s].blank} of {s.slices}"),
        ]
    return found + _duplicates(contents)


def _looks_like_hu(content: Content) -> bool:
    """Air and fat are negative, bone stays below a 12-bit scale, and tissue differs by more than noise."""
    low, _, high = content.percentiles
    return content.minimum < 0 and low >= HU_LOWEST and high <= HU_HIGHEST and high - low >= HU_RANGE


def _odd_intensities(members: list[Sample], contents: dict[Sample, Content]) -> list[Sample]:
    """Files whose range has another scale than the others', or whose outer percentiles lie elsewhere."""
    low, _, high = np.array([contents[s].percentiles for s in members]).reshape(-1, 3).T
    odd = outliers(np.log(high - low), math.log(SCALE_FACTOR))
    for values in (low, high):  # the middle depends on how much air a picture shows
        odd |= outliers(values, LEVEL_SHARE * float(np.median(high - low)) if members else 0)
    return [s for s, is_odd in zip(members, odd, strict=True) if is_odd]


def _duplicates(contents: dict[Sample, Content]) -> list[Finding]:
    """At most one warning, about all files with the same values."""
    same = defaultdict(list)
    for sample, content in contents.items():
        same[content.digest].append(sample)
    sets = [members for members in same.values() if len(members) > 1]
    files = [s for members in sets for s in members]
    some = "; ".join(" = ".join(s.name for s in members[:NAMED]) for members in sets[:NAMED])
    message = (
        f"duplicates (all values agree): {len(files) - len(sets)} too many, e.g. {some}; keep one of each, or it "
        "counts twice and may stand on both sides of a split"
    )
    return [Finding("warning", "duplicates", None, message, [s.name for s in files])] if files else []


# --- findings


def outliers(values: Sequence[float], least: float) -> np.ndarray:
    """Which values lie more than `least`, and more than five robust standard deviations, from their median.

    Of fewer than eight values none does.
    """
    if len(values) < FEWEST:
        return np.zeros(len(values), dtype=bool)
    away = np.abs(values - np.median(values))
    return away > max(least, DEVIATIONS * 1.4826 * float(np.median(away)))


def _warning(
    members: list[Sample], check: str, which: list[Sample], show: Callable[[Sample], str], *about: object
) -> list[Finding]:
    """`data set: n of N volumes have what: first names (shown value); remedy`; nothing where there are none.

    about: what WARNINGS leaves open of the check's message, in order.
    """
    if not which:
        return []
    dataset, kind = members[0].dataset, members[0].kind
    names = [f"{s.name.removeprefix(f'{dataset}/')} ({show(s)})" for s in which[:NAMED]]
    more = " ..." if len(which) > NAMED else ""
    have = f"{len(which)} of {len(members)} {kind}s {'has' if len(which) == 1 else 'have'}"
    what, remedy = "\n".join(WARNINGS[check]).format(*about).split("\n")
    message = f"{dataset}: {have} {what}: {', '.join(names)}{more}; {remedy}"
    return [Finding("warning", check, dataset, message, [s.name for s in which])]
