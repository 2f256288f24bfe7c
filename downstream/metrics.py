"""Scores of segmentations and classifications, with the empty cases defined, and intervals over patients.

Segmentations are scored per structure and volume, in 3D:

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from torch import Tensor, isin

OVERLAPS = ("dice", "iou", "hd95_mm")
COUNTS = ("present", "absent", "missed")
CLASSIFICATION = ("auc", "average_precision", "accuracy", "balanced_accuracy")


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

    prediction, reference: [D, H, W] bool.  spacing_mm: along these axes. nan when both are empty, inf when one is.
    """
    from monai.metrics import compute_hausdorff_distance

    found, there = bool(prediction.any()), bool(reference.any())
    if not (found and there):
        return math.inf if found or there else math.nan
    pair = [mask[None, None].float() for mask in (prediction, reference)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")  # MONAI's own use of its functions
        return float(
            compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=list(spacing_mm))
        )


def masks(prediction: Tensor, reference: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where both have one of these classes."""
    return tuple(isin(volume, volume.new_tensor(classes)) for volume in (prediction, reference))


def score(
    prediction: Tensor, reference: Tensor, structures: Mapping[str, Sequence[int]], spacing_mm: Sequence[float]
) -> dict[str, dict[str, float]]:
    """{structure: {metric: value}} of one volume [D, H, W] of classes; structures: the classes that make up each."""
    scores = {}
    for name, classes in structures.items():
        p, r = masks(prediction, reference, classes)
        scores[name] = {"dice": dice(p, r), "iou": iou(p, r), "hd95_mm": hd95_mm(p, r, spacing_mm)}
    return scores


def summarise(cases: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over cases of what `score` gave, and counts of cases as above, per structure.

    `mean` has the means over structures, nan where there is nothing, and the sums of the counts.
    """
    table: dict[str, dict[str, float]] = {}
    for name in cases[0]:
        values = {metric: [case[name][metric] for case in cases] for metric in OVERLAPS}
        present, missed = sum(map(math.isfinite, values["dice"])), sum(map(math.isinf, values["hd95_mm"]))
        counts = {"present": present, "absent": len(cases) - present, "missed": missed}
        table[name] = {metric: mean(values[metric]) for metric in OVERLAPS} | counts
    rows = list(table.values())
    sums = {count: sum(row[count] for row in rows) for count in COUNTS}
    return table | {"mean": {metric: mean([row[metric] for row in rows]) for metric in OVERLAPS} | sums}


def mean(values: Sequence[float]) -> float:
    """Of those that are finite; nan where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def undefined(why: str) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of a classification that none can be given for."""
    return dict.fromkeys(CLASSIFICATION, math.nan), dict.fromkeys(CLASSIFICATION, why)


def classification_scores(
    truth: np.ndarray, probability: np.ndarray, classes: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """AUC, average precision, accuracy and balanced accuracy of one split; reasons of those that lack something.

    truth: [n] class numbers.  probability: [n, K].  AUC and average precision are those of the second of two classes,
    or the mean over more, each against the others; a class that the split has not is left out of the mean and named in
    the reason. Balanced accuracy is the mean recall of the classes that are there.
    All but the accuracy are nan where the split holds one class only.
    """
    predicted = probability.argmax(axis=1)
    accuracy = float((predicted == truth).mean())
    there = sorted(set(truth.tolist()))
    if len(there) < 2:
        values, reasons = undefined(f"the split holds only {classes[there[0]]!r}")
        del reasons["accuracy"]
        return values | {"accuracy": accuracy}, reasons
    asked = [1] if len(classes) == 2 else there
    values = {
        "auc": np.mean([auc(truth == k, probability[:, k]) for k in asked]),
        "average_precision": np.mean([average_precision(truth == k, probability[:, k]) for k in asked]),
        "accuracy": accuracy,
        "balanced_accuracy": np.mean([(predicted[truth == k] == k).mean() for k in there]),
    }
    absent = [name for k, name in enumerate(classes) if k not in there]
    reasons = dict.fromkeys(set(values) - {"accuracy"}, f"without {', '.join(absent)}") if absent else {}
    return {name: float(value) for name, value in values.items()}, reasons


def auc(hits: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve, as scikit-learn's, whose checks take twenty times as long: a bootstrap needs thousands.

    hits: [n] bool, some of them True and some False.  score: [n], higher for hits.
    """
    count = int(hits.sum())
    return (rankdata(score)[hits].sum() - count * (count + 1) / 2) / (count * (len(hits) - count))


def average_precision(hits: np.ndarray, score: np.ndarray) -> float:
    """Mean precision over the hits, each at the threshold that just finds it; as scikit-learn's. Arguments of `auc`."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # equal scores are found together
    found = np.cumsum(hits[order])[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / found[-1])


def validation_score(truth: np.ndarray, probability: np.ndarray) -> tuple[float, float]:
    """(AUC, minus the log loss), higher is better; the AUC of a validation set of one class counts as 0."""
    area = classification_scores(truth, probability, list(map(str, range(probability.shape[1]))))[0]["auc"]
    likelihood = np.log(probability[np.arange(len(truth)), truth].clip(1e-7))
    return 0.0 if math.isnan(area) else round(area, 6), float(likelihood.mean())


def bootstrap(
    statistic: Callable[[np.ndarray], Mapping[str, float]], patients: int, repeats: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals over patients, drawn with replacement.

    statistic: from how often each patient was drawn [patients] to metrics. Draws on which a metric is nan do not count
    for it; where more than half are, so is its interval. (scipy's bootstrap has one metric and no such draws.)
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.multinomial(patients, [1 / patients] * patients)) for _ in range(repeats)]
    intervals = {}
    for name in drawn[0] if drawn else ():
        values = np.array([metrics[name] for metrics in drawn])
        defined = values[~np.isnan(values)]
        enough = 2 * len(defined) > len(values)
        intervals[name] = tuple(np.percentile(defined, [2.5, 97.5]).tolist()) if enough else (math.nan, math.nan)
    return intervals


def classification_intervals(
    truth: np.ndarray, probability: np.ndarray, classes: Sequence[str], people: Sequence[str], repeats: int, seed: int
) -> dict[str, tuple[float, float]]:
    """`bootstrap` of `classification_scores`; people: the patient of each case."""
    names, patient = np.unique(people, return_inverse=True)

    def resampled(counts: np.ndarray) -> dict[str, float]:
        drawn = np.repeat(np.arange(len(truth)), counts[patient])
        return classification_scores(truth[drawn], probability[drawn], classes)[0]

    return bootstrap(resampled, len(names), repeats, seed)


def format_metrics(metrics: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Groups of metrics as a table, or a line per metric with the interval and the reason that `about` has of it."""
    if isinstance(next(iter(metrics.values())), Mapping):
        return pd.DataFrame(metrics).T.to_string(float_format="{:.3g}".format)
    lines, width = [], max(map(len, metrics)) + 2
    for name, value in metrics.items():
        low, high = about.get("intervals", {}).get(name, (math.nan, math.nan))
        interval = "" if math.isnan(low) else f"   95 % [{low:.3f}, {high:.3f}]"
        reason = about.get("reasons", {}).get(name)
        lines.append(f"{name:<{width}}{value:6.3f}{interval}{f'   ({reason})' if reason else ''}")
    return "\n".join(lines)
