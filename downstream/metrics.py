"""Overlap and surface distance of segmentations: per structure and per volume in 3D, with the empty cases defined.

    in the case:         Dice, IoU      HD95           in the mean over cases
    in both              0..1           mm             counts
    in neither           nan            nan            left out and counted as `absent`
    in one of the two    0              inf            Dice and IoU count as 0; HD95 is left out, counted as `missed`

So a network that predicts only background scores Dice 0 on every structure that is there, and its HD95 is nan (no case
with a finite one), not 0. HD95 means nothing without `missed` beside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from torch import Tensor

METRICS = ("dice", "iou", "hd95_mm")


def dice(prediction: Tensor, reference: Tensor) -> float:
    """2 |P and R| / (|P| + |R|) of two bool masks of one volume; nan when both are empty."""
    total = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else math.nan


def iou(prediction: Tensor, reference: Tensor) -> float:
    """|P and R| / |P or R| of two bool masks of one volume; nan when both are empty."""
    union = int((prediction | reference).sum())
    return int((prediction & reference).sum()) / union if union else math.nan


def hd95_mm(prediction: Tensor, reference: Tensor, spacing_mm: Sequence[float]) -> float:
    """The larger of the two directed 95th percentiles of the distance between surfaces, in mm (MONAI's).

    prediction, reference: [D, H, W] bool.  spacing_mm: of voxels along D, H, W.
    nan when both are empty, inf when one is.
    """
    found, there = bool(prediction.any()), bool(reference.any())
    if not (found and there):
        return math.inf if found or there else math.nan
    pair = [mask[None, None].float() for mask in (prediction, reference)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")  # MONAI's own use of its functions
        return float(
            compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=list(spacing_mm))
        )


def score(
    prediction: Tensor, reference: Tensor, structures: Mapping[str, Sequence[int]], spacing_mm: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Every metric of every structure of one volume: {structure: {metric: value}}.

    prediction, reference: [D, H, W] classes.  structures: the classes that make up each one; they may overlap.
    """
    scores = {}
    for name, classes in structures.items():
        p, r = masks(prediction, reference, classes)
        scores[name] = {"dice": dice(p, r), "iou": iou(p, r), "hd95_mm": hd95_mm(p, r, spacing_mm)}
    return scores


def masks(prediction: Tensor, reference: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where both have one of these classes."""
    return tuple(torch.isin(volume, volume.new_tensor(classes)) for volume in (prediction, reference))


def summarise(cases: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over cases of what `score` gave, per structure, and their means over structures as `mean`.

    Per structure also counts of cases: `present` (in the mean of Dice and IoU), `absent` and `missed` as above; under
    `mean` these are sums. A mean of nothing is nan.
    """
    table: dict[str, dict[str, float]] = {}
    for name in cases[0]:
        values = {metric: [case[name][metric] for case in cases] for metric in METRICS}
        present = sum(map(math.isfinite, values["dice"]))
        table[name] = {metric: mean(values[metric]) for metric in METRICS} | {
            "present": present,
            "absent": len(cases) - present,
            "missed": sum(map(math.isinf, values["hd95_mm"])),
        }
    rows = list(table.values())
    table["mean"] = {metric: mean([row[metric] for row in rows]) for metric in METRICS} | {
        count: sum(row[count] for row in rows) for count in ("present", "absent", "missed")
    }
    return table


def format_table(summary: Mapping[str, Mapping[str, float]]) -> str:
    """`summarise`'s result as text, one line per structure."""
    width = max(len("structure"), *map(len, summary))
    lines = [f"{'structure':<{width}}    Dice     IoU  HD95 mm  present  absent  missed"]
    for name, row in summary.items():
        lines.append(
            f"{name:<{width}}  {row['dice']:6.3f}  {row['iou']:6.3f}  {row['hd95_mm']:7.2f}  "
            f"{row['present']:7}  {row['absent']:6}  {row['missed']:6}"
        )
    return "\n".join(lines)


def mean(values: Sequence[float]) -> float:
    """Of those that are finite; nan where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
