"""SwAV: predict the assignment of one view from another (Caron et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from datasets.batch import Counts
from models.heads import Prototypes
from models.resnet import wide
from objectives.sinkhorn import sinkhorn
from objectives.sizes import prototype_counts, queue_size
from utils.distributed import all_gather, rank, world_size
from utils.options import of_level
from utils.profile import span


class SwAV(nn.Module):
    """Swapped prediction with an optional queue of recent embeddings.

    forward: z [V, B, d] unit length, index [B] (for the observer), counts (B of every process; None when it is the same
    on each) -> scalar loss of this process's share; its mean over the processes is the loss of the global batch. The
    first `assign_crops` views get assignments, all views predict them:
    loss = mean over assigning crops i of mean over v != i of CE(q_i, softmax(scores_v / temperature)).

    dim: d.  sizes: prototypes of each head; the loss is the mean over heads.
    queue_length: embeddings per assigning crop over all processes, 0 for none. The queue is a buffer that is equal on
    all processes; it is filled from epoch `epoch_queue_starts` on and used once it is full.
    freeze_prototypes_niters: first batches in which the prototypes stay as they are.
    """

    assign_crops = 2
    fills_memory = False
    observer: Callable[..., None] | None = None  # sees what every training step computes (diagnostics.Diagnostics)

    def __init__(
        self,
        dim: int,
        sizes: list[int],
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_length: int = 0,
        epoch_queue_starts: int = 0,
        freeze_prototypes_niters: int = 0,
    ) -> None:
        super().__init__()
        self.prototypes = Prototypes(dim, sizes)
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.epoch_queue_starts = epoch_queue_starts
        self.freeze_prototypes_niters = freeze_prototypes_niters
        self.queue_on = False
        self.register_buffer("queue", torch.zeros(self.assign_crops, queue_length, dim))

    @classmethod
    def of(cls, cfg: Any, dim: int, counts: Counts, level: str) -> SwAV:
        """From a script's options, for the level `intra` or `inter` of its data."""
        samples, batch = counts.of(level)
        option, wanted = of_level(cfg, "nmb_prototypes", level)
        sizes = prototype_counts(wanted, samples, option)
        option, length = of_level(cfg, "queue_length", level)
        length = queue_size(length, sizes, batch, option)
        starts, frozen = cfg.epoch_queue_starts, cfg.freeze_prototypes_niters
        return cls(dim, sizes, cfg.temperature, cfg.epsilon, cfg.sinkhorn_iterations, length, starts, frozen)

    def begin_epoch(self, epoch: int, resumed: bool = False) -> None:
        self.queue_on = self.queue.shape[1] > 0 and epoch >= self.epoch_queue_starts

    def cancel_gradients(self, batch: int) -> None:
        if batch < self.freeze_prototypes_niters:
            for parameter in self.prototypes.parameters():
                parameter.grad = None

    def forward(self, z: Tensor, index: Tensor | None = None, counts: list[int] | None = None) -> Tensor:
        if self.training:
            self.prototypes.normalize_()
        V, B = z.shape[:2]
        # Softmax and codes never in half precision.
        scores = [wide(of_head).view(V, B, -1) for of_head in self.prototypes(z.flatten(0, 1))]  # per head [V, B, K]
        share = world_size() / (sum(counts) if counts else B * world_size())
        loss = wide(z.new_zeros(()))
        for assigning in range(self.assign_crops):
            codes = self._assign(assigning, z[assigning].detach(), [s[assigning].detach() for s in scores], counts)
            for q, of_head in zip(codes, scores, strict=True):
                for view in range(V):
                    if view != assigning:
                        log_p = (of_head[view] / self.temperature).log_softmax(dim=1)
                        loss = loss - (q * log_p).sum() * share
        if self.observer is not None and self.training:
            with span("diagnostics"):
                self.observer(z.detach(), scores[0].detach(), index, counts, codes[0])
        return loss / (self.assign_crops * (V - 1) * len(scores))

    @torch.no_grad()
    def _assign(self, view: int, z: Tensor, scores: list[Tensor], counts: list[int] | None) -> list[Tensor]:
        """Codes [B, K] per head for one assigning view: z [B, d], scores per head [B, K]. Updates the queue."""
        queue = self.queue[view]
        # `sinkhorn` normalises over all processes, so it does not matter which of them scores which row of the queue.
        share = queue[rank() :: world_size()] if self.queue_on else queue[:0]
        taking_part = None
        if self.queue_on:  # the last row is zero until the queue is full; asking the device would be waiting for it
            full = queue[-1].any().expand(len(share))
            taking_part = torch.cat([full, torch.ones(len(z), dtype=torch.bool, device=z.device)])
        codes = []
        for head, own in zip(self.prototypes.heads, scores, strict=True):
            with_queue = torch.cat([share @ head.weight.T.to(share.dtype), own])
            codes.append(sinkhorn(with_queue, self.epsilon, self.sinkhorn_iterations, taking_part)[len(share) :])
        if self.queue_on and self.training:
            newest = all_gather(z.to(queue.dtype), counts)
            longer = torch.cat([newest, queue])[: len(queue)]
            queue.copy_(torch.where(newest.isfinite().all(), longer, queue))  # without what is not finite
        return codes

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """A queue of another length (derived for another number of processes) gives its newest rows.

        Where they do not fill the queue it is not used until it is full, as at the start of training.
        """
        saved = state.get(f"{prefix}queue")
        if saved is not None and saved.dim() == 3 and saved.shape[1] != self.queue.shape[1]:
            kept = saved[:, : self.queue.shape[1]]
            fitted = saved.new_zeros(len(saved), self.queue.shape[1], saved.shape[2])
            fitted[:, : kept.shape[1]] = kept
            state[f"{prefix}queue"] = fitted
        super()._load_from_state_dict(state, prefix, *args)
