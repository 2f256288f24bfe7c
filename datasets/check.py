"""What is wrong or odd about the data: by headers alone (every training script asks), or by reading everything.

An error is what training would refuse; a warning is what it would accept and somebody should look at. Statistics are
robust (medians and median absolute deviations) and taken within a data set and kind of file, because what is normal
in one data set is not in another.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from datasets.index import Sample, inspect_tree
from datasets.render import PERCENTILES, BadContent, intensity_limits, open_image, open_volume

FEWEST = 8  # files that make a median and a deviation worth something
DEVIATIONS = 5.0  # robust standard deviations: of normal values fewer than one in a million lie further out
NAMED, LINES = 3, 12  # files that a message names; lines that the start of a training run may print

# An outlier must also differ from the median by what matters: where all files but one agree, the deviation is 0.
SIDE_FACTOR = 2.0  # in plane: slices are fitted to one canvas, so a structure would appear at half or twice its size
SLICES_FACTOR = 3.0  # slice counts vary more: a chest has 100 slices of 3 mm or 300 of 1 mm
BYTES_FACTOR = 8.0  # images are compressed: a black one takes a hundredth of the bytes of a full one
SCALE_FACTOR = 8.0  # MR scanners' scales differ by small factors; 0..1 among 0..1000 differs by 1000
LEVEL_SHARE = 0.4  # of the median range: CT without its offset of -1024 moves by half of it, other anatomy by less

THINNER = 2.0  # a plane in which the two sides differ so much holds the slice axis, if a third axis is as long
THINNER_EQUAL = 1.6  # less is enough where the other two are equal: 300 x 512 x 512, but not a head of 160 x 256 x 256
LONGER = 8.0  # slices per in-plane pixel; a whole-body PET has 6.5 (1,100 slices of 168 pixels)
DOMINATES = 0.9  # share of the files: all other data sets together give one sample in ten
BLANK = 0.2  # share of slices; scans have some blank ones at their ends, a fifth of all draws is a waste
HU_LOWEST, HU_HIGHEST, HU_RANGE = -4096, 8192, 100  # HU; padding goes down to -3024, a 12-bit scale up to 3071
WRAPPED_FROM, SHARE_WRAPPED = 61440, 0.001  # 65536 - 4096: where negative HU land as unsigned 16-bit numbers

PROBE_BYTES = 4096  # read at three places of files of equal size
VOXELS_AT_ONCE = 2**18  # float32 copies of a block stay in a core's cache: twice as fast as blocks of 2**22
SAMPLED_VOXELS = 2**16  # the 0.5th percentile of so many is off by 0.03 percentage points (one standard deviation)


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
    wrapped: bool  # looks like negative numbers stored as unsigned ones
    digest: str  # of the values as float32 [D, H, W]: blind to dtype, byte order, memory order and slice axis


def header_warnings(samples: Sequence[Sample], target_shape: Sequence[int] | None = None) -> list[str]:
    """Lines to print before training: what the headers alone make doubtful, a line per check and data set, 12 at most.

    target_shape: (slices, height, width) of a view, or None where no view has slices. Reads nothing.
    """
    lines = [finding.message for finding in header_findings(samples, target_shape) + _name_twins(samples)]
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"{len(lines) - LINES + 1} more warnings about the data; check_data.py lists all of them"]
    return lines


def header_findings(samples: Sequence[Sample], target_shape: Sequence[int] | None = None) -> list[Finding]:
    """Warnings about sizes, slice axes, dtypes and the balance of the data sets."""
    found: list[Finding | None] = []
    for members in groups(samples).values():
        turned: dict[Sample, int] = {}
        if members[0].kind == "volume":
            if target_shape is not None:
                found.append(_few_slices(members, target_shape[0]))
            turned = _turned(members)
            found += [_slice_axis(members, turned), _mixed_dtypes(members), _unsigned_window(members)]
        found += _odd_sizes(members, set(turned))
    return [finding for finding in found if finding] + _dominance(samples)


def check(
    data_path: str | Path,
    full: bool = False,
    target_shape: Sequence[int] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> tuple[list[Sample], list[Finding], dict[Sample, Content]]:
    """(samples with a good header, everything found with the errors first, contents of the samples that were read).

    full: read all files, on `workers` threads; otherwise only headers, and a few kilobytes of files of equal size.
    Raises UserError where there is no data tree.
    """
    samples, problems = inspect_tree(data_path)
    found = [Finding("error", "unusable", None, problem) for problem in problems]
    contents: dict[Sample, Content] = {}
    if full:
        contents, refused = _read_all(samples, workers, progress)
        found += [Finding("error", "content", s.dataset, str(error), [s.name]) for s, error in refused.items()]
        warnings = header_findings(list(contents), target_shape) + content_findings(contents)
    else:
        warnings = header_findings(samples, target_shape) + _probed_twins(samples)
    place = {sample.dataset: i for i, sample in enumerate(samples)}
    found += sorted(warnings, key=lambda warning: place.get(warning.dataset, len(samples)))
    return samples, found, contents


def groups(samples: Iterable[Sample]) -> dict[tuple[str, str], list[Sample]]:
    """Samples by data set and kind."""
    found: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.dataset, sample.kind), []).append(sample)
    return found


def outliers(values: Sequence[float], least: float) -> np.ndarray:
    """Which values lie more than `least`, and more than five robust standard deviations, from their median.

    Of fewer than eight values none does.
    """
    if len(values) < FEWEST:
        return np.zeros(len(values), dtype=bool)
    away = np.abs(values - np.median(values))
    return away > max(least, DEVIATIONS * 1.4826 * float(np.median(away)))


# ---- by headers


def _few_slices(members: list[Sample], wanted: int) -> Finding | None:
    few = sorted((s for s in members if s.slices < wanted), key=lambda s: s.slices)
    return _warning(
        "few slices",
        members,
        few,
        f"fewer slices than a view ({wanted}) and will be padded",
        "lower the first number of --target_shape, or leave them out if they are fragments",
        lambda s: f"{s.slices}",
    )


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
    return {s: rows if s.height <= s.width else columns for s in members if _looks_turned(s)}


def _looks_turned(sample: Sample) -> bool:
    short, long = sorted((sample.height, sample.width))
    thinner = THINNER_EQUAL if sample.slices == long else THINNER
    return sample.slices > LONGER * long or min(sample.slices, long) > thinner * short


def _slice_axis(members: list[Sample], turned: dict[Sample, int]) -> Finding | None:
    axes = set(turned.values())
    if len(turned) == len(members) and len(axes) == 1:
        axis = axes.pop()
        remedy = f"if they lie along axis {axis}, write slice_axis: {axis} into dataset.yaml"
    else:
        remedy = "if they differ from the others, turn them (np.moveaxis) or give them a data set of their own"
    return _warning(
        "slice axis",
        members,
        list(turned),
        f"slices along axis {members[0].slice_axis} by dataset.yaml or default, which does not look right",
        remedy,
        lambda s: " x ".join(map(str, _file_shape(s))),
    )


def _mixed_dtypes(members: list[Sample]) -> Finding | None:
    kinds = Counter(s.dtype for s in members)
    usual = kinds.most_common(1)[0][0]
    rare = [s for s in members if s.dtype != usual]
    return _warning(
        "mixed dtypes",
        members,
        rare,
        f"another dtype than the others ({', '.join(f'{count} {dtype}' for dtype, count in kinds.most_common())})",
        "make sure that all hold the same kind of values, not raw ones beside rescaled ones",
    )


def _unsigned_window(members: list[Sample]) -> Finding | None:
    wrong = [s for s in members if s.window and s.window[0] < 0 and s.dtype.startswith("u")]
    return _warning(
        "window",
        members,
        wrong,
        f"an unsigned dtype, but window {list(members[0].window or ())} of dataset.yaml begins below 0",
        "correct the window, or convert the volumes to HU again",
        lambda s: s.dtype,
    )


def _odd_sizes(members: list[Sample], without: set[Sample]) -> list[Finding | None]:
    """Outliers of in-plane size, slice count and file size; a file is reported by the first that catches it."""

    def far(values: list[float], factor: float) -> np.ndarray:
        return outliers(np.log(values), math.log(factor))

    kind = members[0].kind
    found = []
    height, width = (np.median([getattr(s, side) for s in members]) for side in ("height", "width"))
    in_plane = far([s.height for s in members], SIDE_FACTOR) | far([s.width for s in members], SIDE_FACTOR)
    for check, which, what, remedy, show in (
        (
            "in-plane size",
            in_plane,
            f"slices of another size than the others (median {height:g} x {width:g} pixels)",
            "make sure that they show the same as the others",
            lambda s: f"{s.height} x {s.width}",
        ),
        (
            "slice count",
            far([s.slices for s in members], SLICES_FACTOR),
            f"many more or fewer slices than the others (median {np.median([s.slices for s in members]):g})",
            "make sure that they are whole and not several scans in one file",
            lambda s: f"{s.slices}",
        ),
        (
            "file size",
            far([s.size_bytes for s in members], BYTES_FACTOR),
            f"many more or fewer bytes than the others (median {np.median([s.size_bytes for s in members]):.0f})",
            "look at them: they may be empty" if kind == "image" else "make sure that they are what you meant",
            lambda s: f"{s.size_bytes} bytes",
        ),
    ):
        odd = [s for s, is_odd in zip(members, which, strict=True) if is_odd and s not in without]
        without = without | set(odd)
        found.append(_warning(check, members, odd, what, remedy, show))
    return found


def _dominance(samples: Sequence[Sample]) -> list[Finding]:
    found = []
    for kind in ("volume", "image"):
        counts = Counter(s.dataset for s in samples if s.kind == kind)
        if len(counts) < 2:
            continue
        (largest, count), total = counts.most_common(1)[0], sum(counts.values())
        if count > DOMINATES * total:
            found.append(
                Finding(
                    "warning",
                    "balance",
                    largest,
                    f"{largest}: has {count} of {total} {kind}s, {len(counts) - 1} other data "
                    f"set{'s' * (len(counts) > 2)} the rest; --sampling_temperature 2 draws those more often",
                )
            )
    return found


def _name_twins(samples: Sequence[Sample]) -> list[Finding]:
    """Files that are links to one, or copies that kept their time: equal in size, time and last part of the name.

    A time without a fraction of a second is no evidence: archives and some file systems round.
    """
    same: dict[tuple, list[Sample]] = {}
    for s in samples:
        if s.mtime_ns % 1_000_000_000:
            same.setdefault((s.size_bytes, s.mtime_ns, s.path.name), []).append(s)
    return _duplicates(same.values(), "probable duplicates (size, time and name agree)")


def _probed_twins(samples: Sequence[Sample]) -> list[Finding]:
    """Files of equal size and shape that also agree at three places, unless these are too empty to tell."""
    alike: dict[tuple, list[Sample]] = {}
    for s in samples:
        alike.setdefault((s.kind, s.size_bytes, s.slices, s.height, s.width), []).append(s)
    same: dict[tuple, list[Sample]] = {}
    for key, members in alike.items():
        if len(members) > 1:
            for s in members:
                if probe := _probe(s):
                    same.setdefault((key, probe), []).append(s)
    return _duplicates(same.values(), "probable duplicates (size and three parts of the content agree)")


def _probe(sample: Sample) -> bytes:
    """Digest of a few kilobytes behind each quarter of a file; b"" where they are too uniform to mean anything.

    Also where the file cannot be read: whoever needs its content will say so.
    """
    try:
        with open(sample.path, "rb", buffering=0) as file:
            parts = [os.pread(file.fileno(), PROBE_BYTES, sample.size_bytes * quarter // 4) for quarter in (1, 2, 3)]
    except OSError:
        return b""
    content = b"".join(parts)
    return hashlib.blake2b(content, digest_size=16).digest() if len(set(content)) >= 16 else b""


# ---- by content


def read_content(sample: Sample) -> Content:
    """Read a file once, block by block in the order in which it lies on disk. Raises BadContent as training would."""
    try:
        source = open_volume(sample) if sample.kind == "volume" else open_image(sample)
        return _measure(source, sample)
    except OSError as error:
        raise BadContent(sample, f"cannot be read ({error}); copy it again or remove it", lasting=False) from None


def _measure(source: np.ndarray, sample: Sample) -> Content:
    order = sorted(range(3), key=lambda axis: -abs(source.strides[axis]))  # slowest first
    names = "".join("dhw"[axis] for axis in order)
    in_plane = tuple(i for i in range(3) if names[i] != "d")
    stored = source.transpose(order)
    lowest = np.full(sample.slices, np.inf)
    highest = np.full(sample.slices, -np.inf)
    # Sums along the height of value codes times odd weights, modulo 2**32: exact, hence equal in any order of summing.
    weights = np.random.default_rng(0).integers(0, 2**32, sample.height, dtype=np.uint32) | np.uint32(1)
    sums = np.zeros((sample.slices, sample.width), dtype=np.uint32)
    stride = _stride(stored.size)
    sampled, position = [], 0
    at_once = max(1, VOXELS_AT_ONCE // math.prod(stored.shape[1:]))
    for first in range(0, stored.shape[0], at_once):
        rows = slice(first, first + at_once)
        block = stored[rows]
        block = block.astype(block.dtype.newbyteorder("="), copy=False)
        part = {name: rows if i == 0 else slice(None) for i, name in enumerate(names)}
        d, h, w = part["d"], part["h"], part["w"]
        lowest[d] = np.minimum(lowest[d], block.min(in_plane))  # minimum and maximum keep NaN and Inf
        highest[d] = np.maximum(highest[d], block.max(in_plane))
        flat = block.reshape(-1)
        sampled.append(flat[-position % stride :: stride].astype(np.float64))
        position += flat.size
        with np.errstate(over="ignore", invalid="ignore"):
            codes = np.add(block, 0, dtype=np.float32, casting="unsafe").view(np.uint32)  # + 0 turns -0 into 0
        codes ^= codes >> 15  # small integers as float32 differ in their upper bits only
        sums[d, w] += np.einsum(f"{names},h->dw", codes, weights[h])
    low, high = float(lowest.min()), float(highest.max())
    usual = np.isfinite(low) and np.isfinite(high) and 0 < high - low <= 1e38
    if not usual or (sample.window and not (low < sample.window[1] and sample.window[0] < high)):
        intensity_limits(source, sample)  # reads it once more, to say what training would
    values = np.concatenate(sampled)
    shape = np.array(source.shape, dtype=np.int64)
    return Content(
        minimum=low,
        maximum=high,
        percentiles=tuple(map(float, np.percentile(values, (PERCENTILES[0], 50, PERCENTILES[1])))),
        blank=int(np.count_nonzero(lowest == highest)),
        wrapped=_looks_wrapped(values, low, high),
        digest=hashlib.blake2b(shape.tobytes() + sums.tobytes(), digest_size=16).hexdigest(),
    )


def _stride(size: int) -> int:
    """A step through `size` voxels that visits about SAMPLED_VOXELS, in all rows, columns and slices."""
    stride = max(1, math.ceil(size / SAMPLED_VOXELS))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride


def _looks_wrapped(values: np.ndarray, low: float, high: float) -> bool:
    """Whether there are low values and values just below 65536 but hardly any between: -1000 HU became 64536."""
    if low < 0 or not WRAPPED_FROM <= high < 65536:
        return False
    top = values[values >= WRAPPED_FROM]
    between = np.count_nonzero((values > HU_HIGHEST) & (values < WRAPPED_FROM))
    # Values that are all alike are a mask or saturated white, not air.
    return top.size > SHARE_WRAPPED * values.size and between < 0.01 * top.size and top.min() < top.max()


def _read_all(
    samples: Sequence[Sample], workers: int, progress: bool
) -> tuple[dict[Sample, Content], dict[Sample, BadContent]]:
    """What the files hold, and why training would refuse the others; both in the order of the samples."""
    results: dict[Sample, Content | BadContent] = {}

    def read(sample: Sample) -> Content | BadContent:
        try:
            return read_content(sample)
        except BadContent as error:
            return error

    total = sum(s.size_bytes for s in samples)
    with (
        tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=not progress) as bar,
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,
    ):
        jobs = {pool.submit(read, sample): sample for sample in samples}
        for job in as_completed(jobs):
            results[jobs[job]] = job.result()
            bar.update(jobs[job].size_bytes)
    ordered = [(sample, results[sample]) for sample in samples]
    return (
        {sample: result for sample, result in ordered if isinstance(result, Content)},
        {sample: result for sample, result in ordered if isinstance(result, BadContent)},
    )


def content_findings(contents: dict[Sample, Content]) -> list[Finding]:
    """Warnings about intensities, blank slices and equal content."""
    found: list[Finding | None] = []
    for members in groups(contents).values():
        wrapped = [s for s in members if contents[s].wrapped]
        not_hu = [s for s in members if s not in wrapped and _is_ct(s) and not _looks_like_hu(contents[s])]
        flat = [s for s in members if contents[s].percentiles[0] == contents[s].percentiles[2]]
        odd = _odd_intensities([s for s in members if s not in {*wrapped, *not_hu, *flat}], contents)
        blank = [s for s in members if s.kind == "volume" and contents[s].blank > BLANK * s.slices]

        def limits(s: Sample) -> str:
            return f"{contents[s].minimum:.4g} to {contents[s].maximum:.4g}"

        def shares(s: Sample) -> str:
            return f"{contents[s].blank} of {s.slices}"

        def middle(s: Sample) -> str:
            return " / ".join(f"{value:.4g}" for value in contents[s].percentiles)

        typical = " / ".join(f"{v:.4g}" for v in np.median([contents[s].percentiles for s in members], axis=0))
        found += [
            _warning(
                "wrap-around",
                members,
                wrapped,
                "values just below 65536 and low ones but none between: negative numbers stored as unsigned ones",
                "read them as signed, volume.astype(np.int16), and save them again",
                limits,
            ),
            _warning(
                "not HU",
                members,
                not_hu,
                "intensities that are not Hounsfield units, although dataset.yaml says CT",
                "apply rescale slope and intercept, or remove modality and window from dataset.yaml",
                limits,
            ),
            _warning(
                "almost constant",
                members,
                flat,
                "one value in 99 % of their voxels"
                if members[0].kind == "volume"
                else "one value in 99 % of their pixels",
                "look at them; where that is meant (vessels alone), training scales by minimum and maximum",
                limits,
            ),
            _warning(
                "intensity",
                members,
                odd,
                f"intensities far from the others' (0.5 / 50 / 99.5 % percentiles, median {typical})",
                "look whether modality, scale or offset differ; a scale alone does no harm, as training scales each "
                "file by its own percentiles, unless dataset.yaml gives a window",
                middle,
            ),
            _warning(
                "blank slices",
                members,
                blank,
                f"more than {BLANK:.0%} blank slices",
                "crop the volumes to their content; blank slices teach nothing",
                shares,
            ),
        ]
    same: dict[str, list[Sample]] = {}
    for sample, content in contents.items():
        same.setdefault(content.digest, []).append(sample)
    return [finding for finding in found if finding] + _duplicates(same.values(), "duplicates (all values agree)")


def _odd_intensities(members: list[Sample], contents: dict[Sample, Content]) -> list[Sample]:
    """Files whose range has another scale than the others', or whose outer percentiles lie elsewhere."""
    if not members:
        return []
    percentiles = np.array([contents[s].percentiles for s in members])
    ranges = percentiles[:, 2] - percentiles[:, 0]
    odd = outliers(np.log(ranges), math.log(SCALE_FACTOR))
    for values in (percentiles[:, 0], percentiles[:, 2]):  # the middle depends on how much air a picture shows
        odd |= outliers(values, LEVEL_SHARE * float(np.median(ranges)))
    return [s for s, is_odd in zip(members, odd, strict=True) if is_odd]


def _is_ct(sample: Sample) -> bool:
    return sample.kind == "volume" and (sample.modality or "").strip().upper() == "CT"


def _looks_like_hu(content: Content) -> bool:
    """Air and fat are negative, bone stays below a 12-bit scale, and tissue differs by more than noise."""
    low, _, high = content.percentiles
    return content.minimum < 0 and low >= HU_LOWEST and high <= HU_HIGHEST and high - low >= HU_RANGE


# ---- words


def _duplicates(sets: Iterable[list[Sample]], what: str) -> list[Finding]:
    """One warning about all sets of files that are the same; `what` begins it and says how that is known."""
    sets = [members for members in sets if len(members) > 1]
    if not sets:
        return []
    some = "; ".join(
        " = ".join(s.name for s in members[:NAMED]) + " = ..." * (len(members) > NAMED) for members in sets[:NAMED]
    )
    more = "; ..." * (len(sets) > NAMED)
    names = {s.dataset for members in sets for s in members}
    surplus = sum(map(len, sets)) - len(sets)
    return [
        Finding(
            "warning",
            "duplicates",
            names.pop() if len(names) == 1 else None,
            f"{what}: {surplus} file{'s' * (surplus > 1)} too many: {some}{more}; "
            "keep one of each, or it counts twice and may stand on both sides of a split",
            [s.name for members in sets for s in members],
        )
    ]


def _warning(
    check: str,
    members: list[Sample],
    which: list[Sample],
    what: str,
    remedy: str,
    show: Callable[[Sample], str] | None = None,
) -> Finding | None:
    """`data set: n of N volumes have what: first names (shown value); remedy`, or None where there are none."""
    if not which:
        return None
    dataset, kind = members[0].dataset, members[0].kind
    names = [s.name.removeprefix(f"{dataset}/") + (f" ({show(s)})" if show else "") for s in which[:NAMED]]
    more = " ..." if len(which) > NAMED else ""
    verb = "has" if len(which) == 1 else "have"
    message = f"{dataset}: {len(which)} of {len(members)} {kind}s {verb} {what}: {', '.join(names)}{more}; {remedy}"
    return Finding("warning", check, dataset, message, [s.name for s in which])


def _file_shape(sample: Sample) -> list[int]:
    shape = [sample.height, sample.width]
    shape.insert(sample.slice_axis, sample.slices)
    return shape
