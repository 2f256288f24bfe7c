"""Which samples stand in which batch: a pure function of (seed, epoch, samples seen), whatever the processes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from utils.distributed import Run
from utils.errors import UserError
from utils.seeding import FILLING, SHUFFLE, SHUFFLE_DATASET, stream

Key = tuple[int, int]  # (epoch, index): all that a data set needs to know to return a sample


class EpochBatches:
    """Batch sampler: every epoch a new order of the samples, cut into global batches that are dealt to the processes.

    groups: the data set of each sample, any hashable.  batch_size: most samples per process and step.
    sampling_temperature: T >= 1, a data set of n samples gets a share of the epoch proportional to n ** (1 / T). With
    1 every sample stands exactly once in an epoch; with more, small data sets repeat and large ones take turns.

    Batches differ by at most one sample, and so do the shares of the processes in a batch. The place in an epoch is the
    number of samples `seen` by all processes: a run goes on there with any number of processes, in the same order,
    every sample once (but for fewer left than there are processes).
    """

    def __init__(
        self,
        groups: Sequence[Hashable],
        batch_size: int,
        seed: int,
        run: Run,
        what: str = "samples",
        sampling_temperature: float = 1.0,
    ) -> None:
        self.samples, self.batch_size, self.seed, self.run = len(groups), batch_size, seed, run
        self.global_batch = batch_size * run.world_size
        if not sampling_temperature >= 1:
            raise UserError(f"sampling_temperature: {sampling_temperature:g} is below 1, every sample once; raise it")
        if not self.samples:
            raise UserError(f"data_path: there are no {what} in it, which this stage trains on")
        if self.samples < self.global_batch:
            raise UserError(
                f"batch_size: {batch_size} per process x {run.world_size} process(es) need {self.global_batch} {what}, "
                f"but the data hold {self.samples}; lower --batch_size, start fewer processes or add data"
            )
        members: dict[Hashable, list[int]] = {}  # of each data set, in the order in which they first appear
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        self.members = [np.array(indices) for indices in members.values()]
        self.quotas = _quotas([len(m) for m in self.members], sampling_temperature)
        self.steps = self.steps_after(0)
        self.epoch, self.seen = 0, 0
        self.order = lru_cache(maxsize=2)(self._order)

    def begin(self, epoch: int, seen: int = 0) -> None:
        """What the next pass over this sampler gives: the batches of `epoch` after `seen` of its samples."""
        self.epoch, self.seen = epoch, seen

    def _order(self, epoch: int) -> np.ndarray:
        """[samples] indices of an epoch: each data set's own endless sequence of shuffled passes, cut and mixed."""
        rng = stream(self.seed, epoch, 0, 0, SHUFFLE)
        # The pass that fills a memory bank needs every sample.
        if epoch == FILLING or self.quotas == [len(m) for m in self.members]:
            return rng.permutation(self.samples)
        parts = [
            _cut(members, epoch * quota, quota, self.seed, k)
            for k, (members, quota) in enumerate(zip(self.members, self.quotas, strict=True))
        ]
        return rng.permutation(np.concatenate(parts))

    def steps_after(self, seen: int) -> int:
        """Steps that the rest of an epoch takes after `seen` of its samples."""
        left = self.samples - seen
        steps = -(-left // self.global_batch)
        enough = steps > 0 and left // steps >= self.run.world_size  # one for every process
        return steps if enough else left // self.global_batch

    def step_at(self, seen: int) -> int:
        """How many steps, as this number of processes would count them, lie before this place of an epoch."""
        return self.steps - self.steps_after(seen)

    def plan(self, seen: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(samples seen before the batch, samples of each process in it) for the rest of an epoch."""
        world = self.run.world_size
        for steps in range(self.steps_after(seen), 0, -1):
            size = min(self.global_batch, -(-(self.samples - seen) // steps))
            yield seen, [size * (r + 1) // world - size * r // world for r in range(world)]
            seen += size

    def __iter__(self) -> Iterator[list[Key]]:
        order, rank = self.order(self.epoch), self.run.rank
        for seen, counts in self.plan(self.seen):
            first = seen + sum(counts[:rank])
            yield [(self.epoch, int(i)) for i in order[first : first + counts[rank]]]

    def __len__(self) -> int:
        return self.steps_after(self.seen)


class CyclingBatches:
    """Batch sampler for what accompanies an epoch: `batch_size` samples per process and step, pass after pass.

    passes: over all samples, with a global batch of one.  steps: of an epoch.
    """

    def __init__(self, passes: EpochBatches, batch_size: int, run: Run, steps: int) -> None:
        self.passes, self.batch_size, self.run, self.steps = passes, batch_size, run, steps
        self.epoch, self.first_step = 0, 0

    def begin(self, epoch: int, first_step: int) -> None:
        """What the next pass over this sampler gives: the batches of `epoch` from a step on."""
        self.epoch, self.first_step = epoch, first_step

    def __iter__(self) -> Iterator[list[Key]]:
        global_batch, samples = self.batch_size * self.run.world_size, self.passes.samples
        for step in range(self.first_step, self.steps):
            start = (self.epoch * self.steps + step) * global_batch + self.run.rank * self.batch_size
            places = range(start, start + self.batch_size)
            yield [(self.epoch, int(self.passes.order(p // samples)[p % samples])) for p in places]

    def __len__(self) -> int:
        return self.steps - self.first_step


def _quotas(sizes: list[int], temperature: float) -> list[int]:
    """Samples of each data set in an epoch of sum(sizes) samples, in proportion to size ** (1 / temperature)."""
    weights = np.array(sizes, dtype=float) ** (1 / temperature)
    wanted = weights / weights.sum() * sum(sizes)
    quotas = np.floor(wanted + 1e-6).astype(int)
    # What rounding down left over goes to the largest remainders, the first one where they are equal.
    behind = np.argsort(-(wanted - quotas), kind="stable")[: sum(sizes) - quotas.sum()]
    quotas[behind] += 1
    return quotas.tolist()


def _cut(members: np.ndarray, start: int, count: int, seed: int, group: int) -> np.ndarray:
    """Places start to start + count - 1 of the endless sequence of shuffled passes over a data set."""
    n = len(members)
    first, last = start // n, (start + count - 1) // n
    passes = [members[stream(seed, p, group, 0, SHUFFLE_DATASET).permutation(n)] for p in range(first, last + 1)]
    return np.concatenate([members[:0], *passes])[start - first * n :][:count]
