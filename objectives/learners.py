"""What each stage learns: one module per stage that turns a batch into its loss.

`forward(batch)` returns a dict of scalars, `loss` first. Its mean over the processes is that of the global batch, of
which `batch.counts` says how many samples each process holds. In the paper's words, L_intra clusters slices and images
(of all volumes), L_inter whole volumes.

Letters: B volumes or images of this process, V views, D slices, S picked slices, M images, n embeddings per view, d the
size of an embedding, C4 features of the ResNet's last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from models.encoder import JointEncoder, real_rows, spread
from models.folding import FrozenSlices, slices_digest
from models.heads import projected
from models.resnet import GreyResNet, pooled
from models.unet import UNetDecoder
from objectives.deepcluster import DeepClusterV2
from objectives.masked import masked_loss
from objectives.position import PositionContrast
from objectives.recon import recon_loss
from objectives.swav import SwAV
from utils.profile import span

Objective = SwAV | DeepClusterV2


class Embedded(NamedTuple):
    """What an objective gets of a batch."""

    z: Tensor  # [V, n, d] unit length
    index: Tensor  # [n] global sample indices
    counts: list[int] | None  # n of every process; None: the same on each


class Learner(nn.Module):
    """What the training loop asks of a learner, answered for all objectives it holds."""

    stage: ClassVar[int]  # 1, 2 or 3: what the log, the report and the weights files depend on
    encoder: nn.Module  # the ResNet in stage 1, else a JointEncoder, which holds it

    def objectives(self) -> Iterator[tuple[str, Objective]]:
        """(level, objective) of the levels `intra` and `inter` that the learner has."""
        for level in ("intra", "inter"):
            if getattr(self, level, None) is not None:
                yield level, getattr(self, level)

    @property
    def resnet(self) -> GreyResNet:
        return self.encoder.resnet

    @property
    def fills_memory(self) -> bool:
        return any(objective.fills_memory for _, objective in self.objectives())

    def embed(self, batch: Batch) -> dict[str, Embedded]:
        """Level -> what its objective gets of this batch."""
        raise NotImplementedError

    def remember(self, batch: Batch) -> None:
        """Fill the memory banks from a batch, learning nothing."""
        objectives = dict(self.objectives())
        for level, embedded in self.embed(batch).items():
            if objectives[level].fills_memory:
                objectives[level].remember(*embedded)

    def observe(self, observers: Mapping[str, Callable[..., None]]) -> None:
        """Let an observer per level see what every training step computes (`objectives.diagnostics`)."""
        for level, objective in self.objectives():
            objective.observer = observers[level]

    def begin_epoch(self, epoch: int, resumed: bool = False) -> None:
        """resumed: the epoch began before the run was interrupted."""
        for _, objective in self.objectives():
            objective.begin_epoch(epoch, resumed)

    def cancel_gradients(self, batch: int) -> None:
        """Called after each backward pass; batch: how many came before in the run. An update may have several."""
        for _, objective in self.objectives():
            objective.cancel_gradients(batch)

    def memory_state(self) -> dict[str, dict[str, Tensor]]:
        """The memory banks, which the state dict does not hold; all processes call it together."""
        return {level: objective.bank.state() for level, objective in self.objectives() if objective.fills_memory}

    def load_memory_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        for level, objective in self.objectives():
            if objective.fills_memory:
                objective.bank.load(state[level])


class ImageClustering(Learner):
    """Stage 1: L_intra alone, on multi-crop images."""

    stage = 1

    def __init__(
        self,
        encoder: GreyResNet,
        head: nn.Module,
        intra: Objective,
        position: PositionContrast | None = None,
        lambda_position: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.intra = encoder, head, intra
        self.position, self.lambda_position = position, lambda_position

    @property
    def resnet(self) -> GreyResNet:
        return self.encoder

    def embed(self, batch: Batch) -> dict[str, Embedded]:
        return {"intra": Embedded(projected(self.head, self._features(batch)), batch.index, batch.counts)}

    def _features(self, batch: Batch) -> Tensor:
        """[V, B, C4] of all crops."""
        with span("f_intra"):
            features = [pooled(self.encoder(size.flatten(0, 1).unsqueeze(1))) for size in batch.crops]
        return torch.cat(features).unflatten(0, (-1, len(batch.index)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = self._features(batch)
        z = projected(self.head, features)
        with span("objective"):
            loss = self.intra(z, batch.index, batch.counts)
            if self.position is None:
                return {"loss": loss}
            nearby = self.position(features, batch, batch.counts)
        return {"loss": loss + self.lambda_position * nearby, "intra": loss, "position": nearby}


class MaskedSlices(Learner):
    """Stage 2: predict the frozen slice embeddings of masked slices from the visible ones.

    Loss: mean squared error over masked slices and features, and lambda_cluster times the cross-entropy against the
    clusters of the masked slices, which `training.slices.fit` finds (`masked_loss`). A model whose error is not below
    that of interpolation between the nearest visible slices has learnt nothing.
    """

    stage = 2

    def __init__(self, encoder: JointEncoder, clusters: int = 0, lambda_cluster: float = 0.0) -> None:
        super().__init__()
        d_model = encoder.projection.out_features
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.randn(d_model) * 0.02)
        self.decoder = nn.Linear(d_model, d_model)
        self.lambda_cluster = lambda_cluster
        self.classifier = nn.Linear(d_model, clusters) if lambda_cluster else None
        self.register_buffer("clusters", torch.zeros(clusters, d_model))
        self.encoder.resnet.requires_grad_(False)
        self.encoder.projection.requires_grad_(False)
        self._frozen: FrozenSlices | None = None

    def train(self, mode: bool = True) -> MaskedSlices:
        super().train(mode)
        self.encoder.resnet.eval()  # frozen: its BatchNorm statistics must not move either
        return self

    def begin_epoch(self, epoch: int, resumed: bool = False) -> None:
        super().begin_epoch(epoch, resumed)
        self._frozen = FrozenSlices(self.encoder)  # anew, as the weights may have come from a checkpoint meanwhile

    def targets(self, views: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        """views [V, B, D, H, W], mask [B, D] -> frozen slice embeddings [V, B, D, d] float32, no gradient."""
        frozen = self._frozen or FrozenSlices(self.encoder)
        if rows is not None:
            rows = (torch.arange(len(views), device=rows.device).unsqueeze(1) * mask.numel() + rows).flatten()
        with span("f_intra"):
            return frozen(views.flatten(0, 1), mask.repeat(len(views), 1), rows).unflatten(0, views.shape[:2])

    def targets_digest(self) -> str:
        """Changes with every weight that the targets depend on."""
        return slices_digest(self.encoder)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        targets = batch.targets
        if targets is None:
            targets = self.targets(batch.views, batch.mask, batch.rows)
        parts = self.encoder.transformer, self.mask_token, self.decoder, targets, batch
        found = masked_loss(*parts, self.classifier, self.clusters)
        return {"loss": found["mask"] + self.lambda_cluster * found.get("cluster", 0.0), **found}


class JointClustering(Learner):
    """Stage 3: the sum of lambda * loss over `lambdas`, whose names are

    `inter`: volumes; `intra`: slices and images; `position`: slices at the same place of other patients; `recon`:
    hidden parts of slices are restored, by a decoder that is trained beside the encoder; `mask`: hidden embeddings of
    slices are predicted, which trains the transformer, a token and a decoder alone.

    The views of a volume show the same slices in the same order, so a slice at the same position of two views is a
    positive pair. A branch whose lambda is 0, or has none, costs next to nothing: without `inter` and `mask` only the
    picked slices are encoded.  freeze: the ResNet stays as it is, its running statistics too, as it does wherever no
    loss trains it.
    """

    stage = 3

    def __init__(
        self,
        encoder: JointEncoder,
        head: nn.Module,
        intra: Objective,
        inter: Objective,
        position: PositionContrast | None = None,
        lambdas: Mapping[str, float] = MappingProxyType({"intra": 1.0, "inter": 1.0}),
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.lambdas = on = {name: weight for name, weight in lambdas.items() if weight}
        self.head, self.intra = (head, intra) if "intra" in on else (None, None)
        self.inter = inter if "inter" in on else None
        self.position = position if "position" in on else None
        d_model = encoder.projection.out_features
        self.mask_token = nn.Parameter(torch.randn(d_model) * 0.02) if "mask" in on else None
        self.decoder = nn.Linear(d_model, d_model) if "mask" in on else None
        self.unet = UNetDecoder(encoder.resnet, 1, d_model) if "recon" in on else None
        # DistributedDataParallel must not wait for gradients that never come (the targets of L_mask are detached).
        self.freeze = freeze or not on.keys() - {"mask"}
        if self.freeze:
            encoder.resnet.requires_grad_(False)
        if not on.keys() & {"inter", "recon"}:
            encoder.projection.requires_grad_(False)
        if not on.keys() & {"inter", "recon", "mask"}:
            encoder.transformer.requires_grad_(False)

    def train(self, mode: bool = True) -> JointClustering:
        super().train(mode)
        if self.freeze:
            self.encoder.resnet.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        objectives, losses, more = dict(self.objectives()), {}, {}
        if self.lambdas.keys() - {"recon"}:
            tokens, features = self._slices(batch)
            for level, embedded in self._levels(tokens, features, batch).items():
                with span("objective"):
                    losses[level] = objectives[level](*embedded)
            if self.position is not None:
                with span("objective"):
                    losses["position"] = self.position(features, batch, _intra_counts(batch))
            if "mask" in self.lambdas:
                found = masked_loss(self.encoder.transformer, self.mask_token, self.decoder, tokens.detach(), batch)
                losses["mask"] = found.pop("mask")
                more = found
        if self.unet is not None:
            alone = not self.lambdas.keys() & {"intra", "inter", "position"} and not self.freeze
            losses["recon"] = recon_loss(self.encoder, self.unet, batch, statistics_move=alone)
        total = sum(self.lambdas[name] * loss for name, loss in losses.items())
        return {"loss": total, **losses, **more}

    def embed(self, batch: Batch) -> dict[str, Embedded]:
        return self._levels(*self._slices(batch), batch)

    def _slices(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """f_intra -> slice embeddings [V, B, D, d] and what L_intra clusters: features [V, B * S + M, C4] of the picked
        slices and the images. None where no branch needs them."""
        V, B, D = batch.views.shape[:3]
        every_slice = bool(self.lambdas.keys() & {"inter", "mask"})
        clusters_slices = bool(self.lambdas.keys() & {"intra", "position"})
        picked = (torch.arange(B, device=batch.views.device).unsqueeze(1) * D + batch.picked).flatten()
        rows = batch.rows if every_slice else picked
        rows = real_rows(batch.mask) if rows is None else rows
        of_views = (torch.arange(V, device=rows.device).unsqueeze(1) * (B * D) + rows).flatten()
        encoded = [batch.views.flatten(0, 2)[of_views]]  # [n, H, W], ordered by view, volume, slice
        if clusters_slices and batch.images is not None:
            encoded.append(batch.images.flatten(0, 1))
        with span("f_intra"):
            features, embedded = self.encoder.slices(torch.cat(encoded).unsqueeze(1))
        tokens = spread(embedded[: len(of_views)], of_views, (V, B, D)) if every_slice else None
        if not clusters_slices:
            return tokens, None
        parts = [part.unflatten(0, (V, -1)) for part in features.tensor_split([len(of_views)])]
        if every_slice:  # place: slice of the batch -> its row among those encoded
            place = torch.zeros(B * D, dtype=torch.long, device=rows.device)
            place = place.index_copy(0, rows, torch.arange(len(rows), device=rows.device))
            parts[0] = parts[0][:, place[picked]]
        return tokens, torch.cat(parts, dim=1)

    def _levels(self, tokens: Tensor | None, features: Tensor | None, batch: Batch) -> dict[str, Embedded]:
        """f_inter and projection head."""
        found = {}
        if self.inter is not None:
            V = len(tokens)
            with span("f_inter"):
                z = self.encoder.holistic(tokens.flatten(0, 1), batch.mask.repeat(V, 1))
            found["inter"] = Embedded(z.unflatten(0, (V, -1)), batch.index, batch.counts)
        if self.intra is not None:
            found["intra"] = Embedded(projected(self.head, features), batch.intra_index, _intra_counts(batch))
        return found


def _intra_counts(batch: Batch) -> list[int] | None:
    """Slices and images of every process that L_intra clusters."""
    per_volume = len(batch.slice_index) // len(batch.index)
    images = 0 if batch.image_index is None else len(batch.image_index)
    return batch.counts and [per_volume * n + images for n in batch.counts]
