"""Scores of a classification and their intervals over patients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

METRICS = ("auc", "average_precision", "accuracy", "balanced_accuracy")


class Scores(NamedTuple):
    """Metrics by name, and for those that are nan, or leave a class out, why."""

    values: dict[str, float]
    reasons: dict[str, str]

    @classmethod
    def undefined(cls, why: str) -> Scores:
        return cls(dict.fromkeys(METRICS, math.nan), dict.fromkeys(METRICS, why))


def classification_scores(truth: np.ndarray, probability: np.ndarray, classes: Sequence[str]) -> Scores:
    """AUC, average precision, accuracy and balanced accuracy of one split.

    truth: [n] class numbers.  probability: [n, K].  AUC and average precision are those of the second of two classes,
    or the mean over more, each against the others; a class that the split has not is left out of the mean and named in
    `reasons`. Balanced accuracy is the mean recall of the classes that are there.
    All but the accuracy are nan, with the reason, where the split holds one class only.
    """
    predicted = probability.argmax(axis=1)
    accuracy = float((predicted == truth).mean())
    there = sorted(set(truth.tolist()))
    if len(there) < 2:
        scores = Scores.undefined(f"the split holds only {classes[there[0]]!r}")
        scores.values["accuracy"] = accuracy
        del scores.reasons["accuracy"]
        return scores
    asked = [1] if len(classes) == 2 else there
    values = {
        "auc": np.mean([auc(truth == k, probability[:, k]) for k in asked]),
        "average_precision": np.mean([average_precision(truth == k, probability[:, k]) for k in asked]),
        "accuracy": accuracy,
        "balanced_accuracy": np.mean([(predicted[truth == k] == k).mean() for k in there]),
    }
    absent = [name for k, name in enumerate(classes) if k not in there]
    reasons = dict.fromkeys(set(METRICS) - {"accuracy"}, f"without {', '.join(absent)}") if absent else {}
    return Scores({name: float(value) for name, value in values.items()}, reasons)


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
    classes = [str(k) for k in range(probability.shape[1])]
    area = classification_scores(truth, probability, classes).values["auc"]
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


def score_intervals(
    truth: np.ndarray, probability: np.ndarray, classes: Sequence[str], people: Sequence[str], repeats: int, seed: int
) -> dict[str, tuple[float, float]]:
    """`bootstrap` of `classification_scores`; people: the patient of each case."""
    names, patient = np.unique(people, return_inverse=True)

    def resampled(counts: np.ndarray) -> dict[str, float]:
        drawn = np.repeat(np.arange(len(truth)), counts[patient])
        return classification_scores(truth[drawn], probability[drawn], classes).values

    return bootstrap(resampled, len(names), repeats, seed)


def format_table(
    values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], reasons: Mapping[str, str]
) -> str:
    """A line per metric, with its interval and, where it is nan or leaves a class out, the reason."""
    width, lines = max(map(len, values)) + 2, []
    for name, value in values.items():
        low, high = intervals.get(name, (math.nan, math.nan))
        interval = "" if math.isnan(low) else f"   95 % [{low:.3f}, {high:.3f}]"
        lines.append(f"{name:<{width}}{value:6.3f}{interval}{f'   ({reasons[name]})' if name in reasons else ''}")
    return "\n".join(lines)
