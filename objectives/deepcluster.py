"""DeepCluster-v2: k-means over a memory bank, then predict the cluster (Caron et al., NeurIPS 2020, appendix D)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.batch import Counts
from models.heads import Prototypes
from objectives.bank import MemoryBank
from objectives.kmeans import assign, fast_products, gather_rows, kmeans_faiss, kmeans_torch
from objectives.sizes import prototype_counts
from utils.distributed import all_sum, rank, world_size
from utils.errors import UserError
from utils.options import of_level
from utils.profile import span
from utils.seeding import KMEANS, stream

UNASSIGNED = -100  # ignored by cross-entropy: the sample was never embedded before this epoch's clustering


class DeepClusterV2(nn.Module):
    """Cluster assignments as targets, one head per entry of `sizes`.

    forward: z [V, B, d] unit length, index [B] global sample index, counts (B of every process; None when it is the
    same on each) -> scalar loss of this process's share; its mean over the processes is the loss of the global batch:
    mean over heads of CE(z . C^T / temperature, assignment of the sample), over the views of assigned samples.

    `begin_epoch` clusters the bank: head h uses the embeddings of crop h mod assign_crops, the centroids become the
    prototypes (which no gradient changes), and every sample that has an embedding gets an assignment. Memory beside
    the bank: what `kmeans_torch` says, and while some samples have no embedding yet, a copy of one crop's others.
    samples: N, the number of global indices at this level.
    places: [N] relative positions in their volumes, inf where there are none; position_code: w. Where w > 0, k-means
    compares (z . z' + w^2 cos(pi (p - p'))) / (1 + w^2), so that clusters are of one place as well as of one kind;
    prototypes have the mean embedding of their cluster alone.
    kmeans_backend: `faiss`, `torch`, or `auto`, which is torch: as good, faster, and on GPUs too (docs/DECISIONS.md).
    precision: of training; with `fp32` k-means compares points in float32, too (see `fast_products`).
    """

    assign_crops = 2
    fills_memory = True  # the bank needs a pass over the data before the first epoch
    observer: Callable[..., None] | None = None  # sees what every training step computes (diagnostics.Diagnostics)

    def __init__(
        self,
        dim: int,
        sizes: list[int],
        samples: int,
        temperature: float = 0.1,
        kmeans_iterations: int = 10,
        kmeans_backend: str = "auto",
        seed: int = 0,
        precision: str = "auto",
        places: Tensor | None = None,
        position_code: float = 0.0,
    ) -> None:
        super().__init__()
        self.prototypes = Prototypes(dim, sizes, trainable=False)
        self.bank = MemoryBank(samples, self.assign_crops, dim)
        self.register_buffer("assignments", torch.full((len(sizes), samples), UNASSIGNED, dtype=torch.int32))
        self.temperature, self.kmeans_iterations, self.seed = temperature, kmeans_iterations, seed
        self.faiss = kmeans_backend == "faiss"
        if self.faiss and importlib.util.find_spec("faiss") is None:
            raise UserError("kmeans_backend: faiss is not installed; pip install faiss-cpu, or use torch")
        self.precision = precision
        self.codes: Tensor | None = None  # [own samples, 2], joined with the embeddings for k-means
        if position_code:
            angle = torch.pi * places[rank() :: world_size()].unsqueeze(1)
            code = torch.cat([angle.cos(), angle.sin()], dim=1)
            self.codes = position_code * torch.where(angle.isfinite(), code, 0)

    @classmethod
    def of(cls, cfg: Any, dim: int, counts: Counts, level: str) -> DeepClusterV2:
        """From a script's options, for the level `intra` or `inter` of its data."""
        samples, _ = counts.of(level)
        option, wanted = of_level(cfg, "nmb_prototypes", level)
        kmeans = cfg.kmeans_iterations, cfg.kmeans_backend
        sizes = prototype_counts(wanted, samples, option)
        where = {"places": counts.places, "position_code": cfg.position_code} if level == "intra" else {}
        return cls(dim, sizes, samples, cfg.temperature, *kmeans, cfg.seed, cfg.precision, **where)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.bank.to(self.assignments.device)
        return self

    def remember(self, z: Tensor, index: Tensor, counts: list[int] | None = None) -> None:
        """z [V, B, d] unit length, index [B]: keep the assigning crops' embeddings."""
        self.bank.write(z[: self.assign_crops], index, counts)

    @torch.no_grad()
    def begin_epoch(self, epoch: int, resumed: bool = False) -> None:
        if resumed:  # in the middle of an epoch: its assignments came with the checkpoint
            return
        seen = self.bank.seen_everywhere()
        rows = seen.nonzero().squeeze(1)  # global indices, equal on every process
        own, complete = self.bank.seen, bool(self.bank.seen.all())
        device = self.bank.embeddings.device
        self.assignments.fill_(UNASSIGNED)
        for h, head in enumerate(self.prototypes.heads):
            K = head.out_features
            if len(rows) < K:
                raise UserError(
                    f"nmb_prototypes: {K} prototypes but only {len(rows)} samples have an embedding; "
                    "use fewer prototypes, more data or a smaller batch"
                )
            every = self.located(self.bank.embeddings[h % self.assign_crops])
            points = every if complete else every[own]
            rng = stream(self.seed, epoch, h, 0, KMEANS)
            start = rows[torch.from_numpy(np.sort(rng.choice(len(rows), K, replace=False)))].to(device)
            start = gather_rows(every, start)
            if self.faiss:
                centroids = kmeans_faiss(points, start, self.kmeans_iterations, int(rng.integers(2**31)))
            else:
                products = None if self.precision == "fp32" else fast_products(len(rows) * K, device)
                centroids = kmeans_torch(points, start, self.kmeans_iterations, products=products)
            of_place = self.codes is not None
            head.weight.copy_(F.normalize(centroids[:, : head.in_features], dim=1) if of_place else centroids)
            found = torch.full((len(every),), UNASSIGNED, dtype=torch.long, device=device)
            found[own] = assign(points, centroids)[0]
            self.assignments[h] = self.bank.join(found.unsqueeze(0))[0].to(self.assignments)

    def located(self, embeddings: Tensor) -> Tensor:
        """This process's [n, d] joined with the codes of their places, unit length; unchanged without codes."""
        if self.codes is None:
            return embeddings
        return F.normalize(torch.cat([embeddings, self.codes.to(embeddings)], dim=1), dim=1)

    def cancel_gradients(self, batch: int) -> None:
        """Nothing to do: the prototypes are no trainable parameters."""

    def forward(self, z: Tensor, index: Tensor, counts: list[int] | None = None) -> Tensor:
        V = len(z)
        targets = self.assignments[:, index].long()  # [heads, B]
        loss = z.new_zeros((), dtype=torch.float32)
        every = self.prototypes(z.flatten(0, 1))
        for scores, target in zip(every, targets, strict=True):
            repeated = target.repeat(V)
            assigned = all_sum((repeated != UNASSIGNED).sum().float()).clamp(min=1)
            logits = scores.float() / self.temperature
            summed = F.cross_entropy(logits, repeated, ignore_index=UNASSIGNED, reduction="sum")
            # Processes may hold different numbers of assigned samples; their mean must be the global batch's mean.
            loss = loss + summed * world_size() / assigned
        if self.training:
            self.remember(z, index, counts)
            if self.observer is not None:
                with span("diagnostics"):
                    self.observer(z.detach(), every[0].detach().unflatten(0, (V, -1)), index, counts)
        return loss / len(targets)
