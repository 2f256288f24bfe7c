"""The memory bank: for every sample and assigning crop, the last embedding, spread over the processes."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.distributed import all_gather, rank, world_size


class MemoryBank:
    """Embeddings [crops, N, d] of N samples; process r keeps the samples whose index leaves remainder r.

    Not a module: its content differs between processes on purpose, so DistributedDataParallel and `state_dict` must
    not see it. `state` gathers it into one tensor that any number of processes can load.
    Memory: crops * N * d * 4 bytes / processes.
    """

    def __init__(self, samples: int, crops: int, dim: int) -> None:
        own = len(range(rank(), samples, world_size()))
        self.samples = samples
        self.embeddings = torch.zeros(crops, own, dim)
        self.seen = torch.zeros(own, dtype=torch.bool)

    def to(self, device: torch.device) -> None:
        self.embeddings, self.seen = self.embeddings.to(device), self.seen.to(device)

    @torch.no_grad()
    def write(self, z: Tensor, index: Tensor, counts: list[int] | None = None) -> None:
        """z [crops, B, d] and index [B] of this process's batch; counts: B of every process, None when all are alike.

        A sample that stands in the batch twice keeps its first embedding, whatever the number of processes. What is
        not finite is not kept: the training loop does not apply such a step.
        """
        joint_z = all_gather(z.detach().float().transpose(0, 1), counts).transpose(0, 1)  # [crops, joint batch, d]
        joint_index = all_gather(index, counts)
        own = joint_index % world_size() == rank()
        rows, z_own = joint_index[own] // world_size(), joint_z[:, own]
        # Scatter in reverse order is not defined to be sequential on a GPU: drop repeats explicitly.
        rows, inverse = rows.unique(return_inverse=True)
        first = torch.full_like(rows, inverse.numel())
        first.scatter_reduce_(0, inverse, torch.arange(inverse.numel(), device=rows.device), "amin")
        newest = z_own[:, first].to(self.embeddings)
        good = newest.isfinite().all(dim=2).all(dim=0)
        self.embeddings[:, rows] = torch.where(good.unsqueeze(1), newest, self.embeddings[:, rows])
        self.seen[rows] |= good

    def seen_everywhere(self) -> Tensor:
        """[N] bool on the CPU, equal on every process."""
        return self._join(self.seen.unsqueeze(0))[0]

    def state(self) -> dict[str, Tensor]:
        """All processes call it together; each gets the whole bank on the CPU."""
        return {"embeddings": self._join(self.embeddings), "seen": self.seen_everywhere()}

    def load(self, state: dict[str, Tensor]) -> None:
        """From `state` of a run with any number of processes. Raises ValueError when the shape does not fit."""
        crops, _, dim = self.embeddings.shape
        if tuple(state["embeddings"].shape) != (crops, self.samples, dim):
            raise ValueError(
                f"memory bank of {tuple(state['embeddings'].shape)} does not fit {(crops, self.samples, dim)}"
            )
        self.embeddings.copy_(state["embeddings"][:, rank() :: world_size()])
        self.seen.copy_(state["seen"][rank() :: world_size()])

    def _join(self, own: Tensor) -> Tensor:
        """[c, own rows, ...] of every process -> [c, N, ...] on the CPU, rows back in index order."""
        world = world_size()
        rows = -(-self.samples // world)
        padded = own.new_zeros(own.shape[0], rows, *own.shape[2:])
        padded[:, : own.shape[1]] = own
        parts = all_gather(padded.transpose(0, 1)).view(world, rows, own.shape[0], *own.shape[2:])
        joint = parts.transpose(0, 1).reshape(world * rows, own.shape[0], *own.shape[2:])
        return joint[: self.samples].transpose(0, 1).cpu().contiguous()
