"""What each stage learns: one module per stage that turns a batch into its loss.

`forward(**batch)` returns a dict of scalars, `loss` first. Its mean over the processes is that of the joint batch, of
which `counts` says how many samples each process holds (None: all the same).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import JointEncoder, real_rows, spread
from models.folding import FrozenSlices, slices_digest
from models.resnet import GreyResNet, pooled, wide
from objectives.deepcluster import DeepClusterV2
from objectives.masked import interpolate_masked
from objectives.swav import SwAV
from utils.distributed import all_sum, world_size
from utils.profile import span

Objective = SwAV | DeepClusterV2
Embedded = tuple[Tensor, Tensor, list[int] | None]  # unit embeddings [V, n, d], index [n], n of every process


class Learner(nn.Module):
    """What the training loop asks of a learner, answered for all objectives it holds."""

    @property
    def resnet(self) -> GreyResNet:
        return getattr(self.encoder, "encoder", self.encoder)

    def objectives(self) -> Iterator[tuple[str, Objective]]:
        for name, module in self.named_children():
            if isinstance(module, SwAV | DeepClusterV2):
                yield name, module

    @property
    def fills_memory(self) -> bool:
        return any(objective.fills_memory for _, objective in self.objectives())

    def embed(self, **batch: Any) -> dict[str, Embedded]:
        """Objective name -> what it gets of this batch."""
        raise NotImplementedError

    def remember(self, **batch: Any) -> None:
        """Fill the memory banks from a batch, learning nothing."""
        for name, embedded in self.embed(**batch).items():
            if getattr(self, name).fills_memory:
                getattr(self, name).remember(*embedded)

    def begin_epoch(self, epoch: int, resumed: bool = False) -> None:
        """resumed: the epoch began before the run was interrupted."""
        for _, objective in self.objectives():
            objective.begin_epoch(epoch, resumed)

    def cancel_gradients(self, step: int) -> None:
        for _, objective in self.objectives():
            objective.cancel_gradients(step)

    def memory_state(self) -> dict[str, dict[str, Tensor]]:
        return {name: objective.memory_state() for name, objective in self.objectives()}

    def load_memory_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, objective in self.objectives():
            objective.load_memory_state(state[name])


class ImageClustering(Learner):
    """Stage 1: L_intra alone, on multi-crop images.

    crops: one tensor [count, B, H, W] per crop size, large crops first; index [B].
    """

    def __init__(self, encoder: GreyResNet, head: nn.Module, intra: Objective) -> None:
        super().__init__()
        self.encoder, self.head, self.intra = encoder, head, intra

    def embed(self, crops: list[Tensor], index: Tensor, counts: list[int] | None = None) -> dict[str, Embedded]:
        with span("f_intra"):
            features = [pooled(self.encoder(size.flatten(0, 1).unsqueeze(1))) for size in crops]
        z = F.normalize(wide(self.head(torch.cat(features))), dim=1)
        return {"intra": (z.unflatten(0, (-1, len(index))), index, counts)}

    def forward(self, crops: list[Tensor], index: Tensor, counts: list[int] | None = None) -> dict[str, Tensor]:
        embedded = self.embed(crops, index, counts)["intra"]
        with span("objective"):
            return {"loss": self.intra(*embedded)}


class MaskedSlices(Learner):
    """Stage 2: predict the frozen slice embeddings of hidden slices from the visible ones.

    mask [B, D] real slices, hidden [V, B, D] slices to predict, and views [V, B, D, H, W] or, where they are known
    already, the targets: their embeddings [V, B, D, d]. rows as `JointClustering`'s.
    Loss: mean squared error over hidden slices and features. `interpolation`: what linear interpolation between the
    nearest visible slices scores on the same slices: a model that is not below it has learnt nothing.
    """

    def __init__(self, encoder: JointEncoder) -> None:
        super().__init__()
        d_model = encoder.projection.out_features
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.randn(d_model) * 0.02)
        self.decoder = nn.Linear(d_model, d_model)
        self.encoder.encoder.requires_grad_(False)
        self.encoder.projection.requires_grad_(False)
        self._frozen: FrozenSlices | None = None

    def train(self, mode: bool = True) -> MaskedSlices:
        super().train(mode)
        self.encoder.encoder.eval()  # frozen: its BatchNorm statistics must not move either
        return self

    def begin_epoch(self, epoch: int, resumed: bool = False) -> None:
        super().begin_epoch(epoch, resumed)
        self._frozen = FrozenSlices(self.encoder)  # anew, as the weights may have come from a checkpoint meanwhile

    def targets(self, views: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        """[V, B, D, H, W] -> frozen slice embeddings [V, B, D, d] float32, no gradient."""
        frozen = self._frozen or FrozenSlices(self.encoder)
        if rows is not None:
            rows = (torch.arange(len(views), device=rows.device).unsqueeze(1) * mask.numel() + rows).flatten()
        with span("f_intra"):
            return frozen(views.flatten(0, 1), mask.repeat(len(views), 1), rows).unflatten(0, views.shape[:2])

    def targets_digest(self) -> str:
        """Changes with every weight that the targets depend on."""
        return slices_digest(self.encoder)

    def forward(
        self,
        mask: Tensor,
        hidden: Tensor,
        views: Tensor | None = None,
        targets: Tensor | None = None,
        index: Tensor | None = None,
        counts: list[int] | None = None,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if targets is None:
            targets = self.targets(views, mask, rows)
        mask = mask.repeat(len(targets), 1)
        targets, hidden = wide(targets.flatten(0, 1)), hidden.flatten(0, 1)
        return masked_loss(self.encoder.transformer, self.mask_token, self.decoder, targets, mask, hidden)


def masked_loss(
    transformer: nn.Module,
    mask_token: Tensor,
    decoder: nn.Module,
    targets: Tensor,
    mask: Tensor,
    hidden: Tensor,
) -> dict[str, Tensor]:
    """targets [B, D, d], mask and hidden [B, D] -> loss and interpolation over the joint batch's hidden slices."""
    tokens = torch.where(hidden.unsqueeze(-1), mask_token.to(targets.dtype), targets)
    with span("f_inter"):
        predicted = wide(decoder(transformer(tokens, mask)))
    guessed = interpolate_masked(targets, mask & ~hidden)
    # Volumes of different length hide different numbers of slices; every hidden slice of all processes counts once.
    share = world_size() / (all_sum(hidden.sum().float()).clamp(min=1) * targets.shape[-1])
    only = hidden.unsqueeze(-1)
    loss = ((predicted - targets) * only).square().sum() * share
    interpolation = ((guessed - targets) * only).square().sum() * share
    return {"loss": loss, "interpolation": interpolation}


class JointClustering(Learner):
    """Stage 3: L = lambda_inter * L_inter(volumes) + lambda_intra * L_intra(slices, images) + lambda_mask * L_mask.

    views [V, B, D, H, W], mask [B, D] real slices, index [B] of the volumes; picked [B, S] slices that enter L_intra
    and slice_index [B * S] their global indices; optionally images [V, M, H, W] with image_index [M], and hidden
    [V, B, D] for L_mask. A slice at the same position of two views is a positive pair.
    A branch whose lambda is 0 costs nothing: without L_inter and L_mask only the picked slices are encoded.
    freeze: the ResNet stays as it is, its running statistics too.
    rows [n]: `real_rows(mask)`, where the caller knows it without waiting for the device.
    """

    def __init__(
        self,
        encoder: JointEncoder,
        head: nn.Module,
        intra: Objective,
        inter: Objective,
        lambda_intra: float = 1.0,
        lambda_inter: float = 1.0,
        lambda_mask: float = 0.0,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        if lambda_intra + lambda_inter + lambda_mask <= 0:
            raise ValueError("lambda_intra, lambda_inter, lambda_mask: at least one must be above 0")
        self.encoder = encoder
        self.lambda_intra, self.lambda_inter, self.lambda_mask = lambda_intra, lambda_inter, lambda_mask
        self.head, self.intra = (head, intra) if lambda_intra else (None, None)
        self.inter = inter if lambda_inter else None
        d_model = encoder.projection.out_features
        self.mask_token = nn.Parameter(torch.randn(d_model) * 0.02) if lambda_mask else None
        self.decoder = nn.Linear(d_model, d_model) if lambda_mask else None
        # DistributedDataParallel must not wait for gradients that never come (the targets of L_mask are detached).
        if freeze or not (lambda_inter or lambda_intra):
            encoder.encoder.requires_grad_(False)
        if not lambda_inter:
            encoder.projection.requires_grad_(False)
        if not (lambda_inter or lambda_mask):
            encoder.transformer.requires_grad_(False)
        self.freeze = freeze

    def train(self, mode: bool = True) -> JointClustering:
        super().train(mode)
        if self.freeze:
            self.encoder.encoder.eval()  # BatchNorm keeps its statistics
        return self

    def _encode(
        self, views: Tensor, mask: Tensor, picked: Tensor, images: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """-> slice embeddings [V, B, D, d] and intra features [V, B * S + M, C4], None where no branch needs them."""
        V, B, D = views.shape[:3]
        need_tokens = bool(self.lambda_inter or self.lambda_mask)
        need_intra = bool(self.lambda_intra)
        first = torch.arange(B, device=views.device).unsqueeze(1) * D
        if not need_tokens:
            rows = (first + picked).flatten()
        elif rows is None:
            rows = real_rows(mask)
        both = (torch.arange(V, device=views.device).unsqueeze(1) * (B * D) + rows).flatten()
        batch = [views.flatten(0, 2)[both]]  # [n, H, W], ordered by view, volume, slice
        if need_intra and images is not None:
            batch.append(images.flatten(0, 1))
        with span("f_intra"):
            features, embedded = self.encoder.slices(torch.cat(batch).unsqueeze(1))
        slices = len(both)
        tokens = intra = None
        if need_tokens:
            tokens = spread(embedded[:slices], both, (V, B, D))
        if need_intra:
            seen = features[:slices].unflatten(0, (V, -1))
            if need_tokens:
                where = torch.zeros(B * D, dtype=torch.long, device=views.device)
                where = where.index_copy(0, rows, torch.arange(len(rows), device=views.device))
                seen = seen[:, where[first + picked].flatten()]
            intra = seen if images is None else torch.cat([seen, features[slices:].unflatten(0, (V, -1))], dim=1)
        return tokens, intra

    def embed(
        self,
        views: Tensor,
        mask: Tensor,
        index: Tensor,
        picked: Tensor,
        slice_index: Tensor,
        images: Tensor | None = None,
        image_index: Tensor | None = None,
        hidden: Tensor | None = None,
        counts: list[int] | None = None,
        rows: Tensor | None = None,
    ) -> dict[str, Embedded]:
        tokens, intra = self._encode(views, mask, picked, images, rows)
        return self._embed(tokens, intra, mask, index, slice_index, image_index, counts)

    def _embed(
        self,
        tokens: Tensor | None,
        intra: Tensor | None,
        mask: Tensor,
        index: Tensor,
        slice_index: Tensor,
        image_index: Tensor | None,
        counts: list[int] | None,
    ) -> dict[str, Embedded]:
        found = {}
        if self.inter is not None:
            V = len(tokens)
            with span("f_inter"):
                z = self.encoder.holistic(tokens.flatten(0, 1), mask.repeat(V, 1))
            found["inter"] = (z.unflatten(0, (V, -1)), index, counts)
        if self.intra is not None:
            z = F.normalize(wide(self.head(intra.flatten(0, 1))), dim=1).unflatten(0, (len(intra), -1))
            both = slice_index if image_index is None else torch.cat([slice_index, image_index])
            per_volume, images = len(slice_index) // len(index), len(both) - len(slice_index)
            joint = counts and [per_volume * n + images for n in counts]
            found["intra"] = (z, both, joint)
        return found

    def forward(
        self,
        views: Tensor,
        mask: Tensor,
        index: Tensor,
        picked: Tensor,
        slice_index: Tensor,
        images: Tensor | None = None,
        image_index: Tensor | None = None,
        hidden: Tensor | None = None,
        counts: list[int] | None = None,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        tokens, intra = self._encode(views, mask, picked, images, rows)
        losses = {}
        embedded = self._embed(tokens, intra, mask, index, slice_index, image_index, counts)
        for name, arguments in embedded.items():
            with span("objective"):
                losses[name] = getattr(self, name)(*arguments)
        total = sum(getattr(self, f"lambda_{name}") * value for name, value in losses.items())
        if self.lambda_mask:
            V = len(tokens)
            targets = wide(tokens.detach().flatten(0, 1))
            masked = masked_loss(
                self.encoder.transformer,
                self.mask_token,
                self.decoder,
                targets,
                mask.repeat(V, 1),
                hidden.flatten(0, 1),
            )
            losses |= {"mask": masked["loss"], "interpolation": masked["interpolation"]}
            total = total + self.lambda_mask * masked["loss"]
        return {"loss": total, **losses}
