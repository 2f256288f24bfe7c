"""How many prototypes and how long a queue: checked against the data, or derived from their size."""

from __future__ import annotations

import math
import warnings

from utils.distributed import rank
from utils.errors import UserError

CROWDED = 8  # prototypes for each embedding of an assignment, above which too few of them get a share


def prototype_counts(wanted: int | list[int], samples: int, option: str) -> list[int]:
    """The prototypes of each head; 0 stands for 2 * sqrt(samples), between 2 and 3000.

    (SwAV's 3000 for ImageNet's 1.28 million images are 2.65 * sqrt(samples).)
    Raises UserError naming `option` when a head has more prototypes than there are samples.
    """
    heads = wanted if isinstance(wanted, list) else [wanted]
    if not heads:
        raise UserError(f"{option}: give at least one number of prototypes")
    sizes = [k or min(3000, samples, max(2, round(2 * math.sqrt(samples)))) for k in heads]
    for k in sizes:
        if k > samples:
            raise UserError(
                f"{option}: {k} prototypes are more than the {samples} samples they should group; "
                f"use at most {samples}, or 0 to choose by the size of the data"
            )
    return sizes


def queue_size(wanted: int, sizes: list[int], batch: int, option: str) -> int:
    """Embeddings in the queue over all processes; -1 stands for as many as make batch + queue twice the prototypes.

    batch: embeddings per step and crop over all processes. Warns when with an explicit queue every embedding stands for
    more than `CROWDED` prototypes: no assignment can use them all equally then (docs/DECISIONS.md).
    """
    needed = max(0, -(-(2 * max(sizes) - batch) // batch) * batch)
    if wanted == -1:
        return needed
    if max(sizes) > CROWDED * (batch + wanted) and rank() == 0:
        warnings.warn(
            f"{option}: {batch} embeddings per step over all processes + a queue of {wanted} are far fewer than "
            f"{max(sizes)} prototypes, so no assignment can use every prototype equally; "
            f"use --{option} {needed} or fewer prototypes",
            stacklevel=2,
        )
    return wanted
