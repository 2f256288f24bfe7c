"""Everything that can be said about data before training on them: what would be refused, and what looks odd.

An error is what training would refuse; a warning is what it would accept and somebody should look at.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.cache import BadSource
from datasets.headers import Finding, duplicates, header_findings, name_twins, outliers, warning
from datasets.index import Sample, groups, inspect_tree
from datasets.render import PERCENTILES, SLICES_AT_ONCE, open_source, require_contrast, sampled

SCALE_FACTOR = 8.0  # MR scanners' scales differ by small factors; 0..1 among 0..1000 differs by 1000
LEVEL_SHARE = 0.4  # of the median range: CT without its offset of -1024 moves by half of it, other anatomy by less
BLANK = 0.2  # share of slices; scans have some blank ones at their ends, a fifth of all draws is a waste
HU_LOWEST, HU_HIGHEST, HU_RANGE = -4096, 8192, 100  # HU; padding goes down to -3024, a 12-bit scale up to 3071
WRAPPED_FROM, SHARE_WRAPPED = 61440, 0.001  # 65536 - 4096: where negative HU land as unsigned 16-bit numbers


@dataclass(frozen=True)
class Content:
    """What reading a whole file says about it; intensities as they are stored."""

    minimum: float
    maximum: float
    percentiles: tuple[float, float, float]  # 0.5th, 50th, 99.5th; of a large volume over a part of its voxels
    blank: int  # slices that hold a single value
    wrapped: bool  # looks like negative numbers stored as unsigned ones
    digest: str  # of the values as float32 [D, H, W]: blind to dtype, byte order, memory order and slice axis

    def looks_like_hu(self) -> bool:
        """Air and fat are negative, bone stays below a 12-bit scale, and tissue differs by more than noise."""
        low, _, high = self.percentiles
        return self.minimum < 0 and low >= HU_LOWEST and high <= HU_HIGHEST and high - low >= HU_RANGE


def check(
    data_path: str | Path,
    full: bool = False,
    target_shape: Sequence[int] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> tuple[list[Sample], list[Finding], dict[Sample, Content]]:
    """(samples with a good header, everything found with the errors first, contents of the samples that were read).

    full: read all files, on `workers` threads; otherwise only headers.
    Raises UserError where there is no data tree.
    """
    samples, bad_sets, bad = inspect_tree(data_path)
    found = [Finding("error", "unusable", None, problem) for problem in bad_sets + bad]
    contents: dict[Sample, Content] = {}
    if full:
        contents, refused = _read_all(samples, workers, progress)
        found += [Finding("error", "content", s.dataset, f"{s.path}: {why}", [s.name]) for s, why in refused.items()]
        warnings = header_findings(list(contents), target_shape) + content_findings(contents)
    else:
        warnings = header_findings(samples, target_shape) + name_twins(samples)
    place = {sample.dataset: i for i, sample in enumerate(samples)}
    found += sorted(warnings, key=lambda warning: place.get(warning.dataset, len(samples)))
    return samples, found, contents


def measure(members: Sequence[Sample], contents: dict[Sample, Content]) -> dict[str, dict[str, float]]:
    """{measure: {"min", "median", "max"}} of a data set's volumes or images; intensities of those in contents."""
    is_volume = members[0].kind == "volume"
    read = [(sample, contents[sample]) for sample in members if sample in contents]
    values = {"slices": [sample.slices for sample in members]} if is_volume else {}
    values["height"] = [sample.height for sample in members]
    values["width"] = [sample.width for sample in members]
    values["file size, MB"] = [sample.size_bytes / 1e6 for sample in members]
    if read:
        for i, name in enumerate(("0.5 % of voxels below", "50 %", "99.5 %")):
            values[name] = [content.percentiles[i] for _, content in read]
        if is_volume:
            values["blank slices, %"] = [100 * content.blank / sample.slices for sample, content in read]
    return {name: {"min": min(v), "median": float(np.median(v)), "max": max(v)} for name, v in values.items()}


def read_content(sample: Sample) -> Content:
    """Read a file once. Raises BadSource as training would."""
    source = open_source(sample)
    low, high = require_contrast(source, sample)
    lowest, highest = np.empty(sample.slices), np.empty(sample.slices)
    digest = hashlib.blake2b(repr(source.shape).encode(), digest_size=16)
    for first in range(0, sample.slices, SLICES_AT_ONCE):
        part = slice(first, first + SLICES_AT_ONCE)
        block = np.ascontiguousarray(source[part])
        lowest[part], highest[part] = block.min((1, 2)), block.max((1, 2))
        digest.update(np.add(block, 0, dtype=np.float32, casting="unsafe"))  # + 0 turns -0 into 0
    values = sampled(source)
    return Content(
        minimum=low,
        maximum=high,
        percentiles=tuple(np.percentile(values, (PERCENTILES[0], 50, PERCENTILES[1])).tolist()),
        blank=int(np.count_nonzero(lowest == highest)),
        wrapped=_looks_wrapped(values, low, high),
        digest=digest.hexdigest(),
    )


def _looks_wrapped(values: np.ndarray, low: float, high: float) -> bool:
    """Whether there are low values and values just below 65536 but hardly any between: -1000 HU became 64536."""
    if low < 0 or not WRAPPED_FROM <= high < 65536:
        return False
    top = values[values >= WRAPPED_FROM]
    between = np.count_nonzero((values > HU_HIGHEST) & (values < WRAPPED_FROM))
    # Values that are all alike are a mask or saturated white, not air.
    return bool(top.size > SHARE_WRAPPED * values.size and between < 0.01 * top.size and top.min() < top.max())


def _read_all(
    samples: Sequence[Sample], workers: int, progress: bool
) -> tuple[dict[Sample, Content], dict[Sample, BadSource]]:
    """What the files hold, and why training would refuse the others; both in the order of the samples."""
    contents: dict[Sample, Content] = {}
    refused: dict[Sample, BadSource] = {}

    def read(sample: Sample) -> Content | BadSource:
        try:
            return read_content(sample)
        except BadSource as error:
            return error

    total = sum(s.size_bytes for s in samples)
    with (
        tqdm(total=total, desc="reading", unit="B", unit_scale=True, disable=not progress) as bar,
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,
    ):
        for sample, result in zip(samples, pool.map(read, samples), strict=True):
            (refused if isinstance(result, BadSource) else contents)[sample] = result
            bar.update(sample.size_bytes)
    return contents, refused


def content_findings(contents: dict[Sample, Content]) -> list[Finding]:
    """Warnings about intensities, blank slices and equal content."""
    found: list[Finding] = []
    for members in groups(contents).values():
        found += _intensity_findings(members, contents)
        found += warning(
            members,
            "blank slices",
            [s for s in members if s.kind == "volume" and contents[s].blank > BLANK * s.slices],
            f"more than {BLANK:.0%} blank slices",
            "crop the volumes to their content; blank slices teach nothing",
            lambda s: f"{contents[s].blank} of {s.slices}",
        )
    digests = {sample: content.digest for sample, content in contents.items()}
    return found + duplicates(digests, "duplicates (all values agree)")


def _intensity_findings(members: list[Sample], contents: dict[Sample, Content]) -> list[Finding]:
    """Files whose intensities are not what they should be; a file is reported by the first that catches it."""
    wrapped = [s for s in members if contents[s].wrapped]
    is_ct = members[0].kind == "volume" and (members[0].modality or "").strip().upper() == "CT"
    not_hu = [s for s in members if is_ct and s not in wrapped and not contents[s].looks_like_hu()]
    flat = [s for s in members if contents[s].percentiles[0] == contents[s].percentiles[2]]
    odd = _odd_intensities([s for s in members if s not in {*wrapped, *not_hu, *flat}], contents)

    def limits(s: Sample) -> str:
        return f"{contents[s].minimum:.4g} to {contents[s].maximum:.4g}"

    def shown(percentiles: Iterable[float]) -> str:
        return " / ".join(f"{value:.4g}" for value in percentiles)

    warn = partial(warning, members)
    typical = shown(np.median([contents[s].percentiles for s in members], axis=0))
    return [
        *warn(
            "wrap-around",
            wrapped,
            "values just below 65536 and low ones but none between: negative numbers stored as unsigned ones",
            "read them as signed, volume.astype(np.int16), and save them again",
            limits,
        ),
        *warn(
            "not HU",
            not_hu,
            "intensities that are not Hounsfield units, although dataset.yaml says CT",
            "apply rescale slope and intercept, or remove modality and window from dataset.yaml",
            limits,
        ),
        *warn(
            "almost constant",
            flat,
            f"one value in 99 % of their {'voxels' if members[0].kind == 'volume' else 'pixels'}",
            "look at them; where that is meant (vessels alone), training scales by minimum and maximum",
            limits,
        ),
        *warn(
            "intensity",
            odd,
            f"intensities far from the others' (0.5 / 50 / 99.5 % percentiles, median {typical})",
            "look whether modality, scale or offset differ; a scale alone does no harm, as training scales each "
            "file by its own percentiles, unless dataset.yaml gives a window",
            lambda s: shown(contents[s].percentiles),
        ),
    ]


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
