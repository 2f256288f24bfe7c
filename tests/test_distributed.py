"""Two processes with half of the batch each learn what one process with all of it learns.

All comparisons are in float32. Losses agree to 1e-5; gradients to 1e-3 of the largest entry of their tensor (sums in
another order, amplified by BatchNorm over few values); parameters and statistics after several steps likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn
from torch.testing import assert_close

from datasets.batch import Batch
from datasets.loaders import draw_masks
from models.encoder import JointEncoder, real_rows
from models.heads import ProjectionHead
from objectives import DeepClusterV2, ImageClustering, JointClustering, MaskedSlices, PositionContrast, SwAV
from utils import distributed, guards
from utils.distributed import Run, all_sum, convert_sync_batchnorm, everywhere, rank, world_size
from utils.errors import UserError
from utils.optim import LARC, parameter_groups

STEPS = 3
# Of 48 slices of volumes of two aligned data sets, and 6 images.
PLACES = torch.cat([torch.linspace(0, 1, 6).repeat(8), torch.full((6,), torch.inf)])
GROUPS = torch.tensor([0] * 24 + [1] * 24 + [2] * 6)


def part(x: Tensor, dim: int = 0) -> Tensor:
    """This process's share of a joint tensor."""
    return x.chunk(world_size(), dim)[rank()]


# ------------------------------------------------------------------------------------------------ what the tests train


class TinySlices(nn.Module):
    """Four stages as the ResNet has them, with BatchNorm, small enough for many steps."""

    stem_features = 1
    stage_features = (8, 8, 16, 16)
    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        widths = (1, *self.stage_features)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        )

    def forward(self, x: Tensor, stem: bool = False) -> list[Tensor]:
        found = [nn.functional.avg_pool2d(x, 2)] if stem else []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


def joint_encoder() -> JointEncoder:
    encoder = JointEncoder("resnet18", 32, layers=2, dropout=0.0)
    encoder.encoder = TinySlices()
    encoder.projection = nn.Linear(sum(TinySlices.stage_features), 32)
    return encoder


def counts(joint: int) -> list[int]:
    """How many of a joint batch each process gets from `part`."""
    return [len(share) for share in torch.arange(joint).chunk(world_size())]


def image_batches(size: int) -> Iterator[Batch]:
    """Multi-crop views of some of 16 images: two large and one small crop."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        index = torch.randperm(16, generator=generator)[:size]
        crops = [torch.rand(n, size, side, side, generator=generator) for n, side in ((2, 32), (1, 16))]
        crops = [part(crop, 1) for crop in crops]
        yield Batch(part(index), counts(size), crops=crops, place=PLACES[part(index)], group=GROUPS[part(index)])


def volume_batches(size: int, images: bool = True) -> Iterator[Batch]:
    """Some of 8 volumes of different length, two slices of each for L_intra, two of 6 images."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        index = torch.randperm(8, generator=generator)[:size]
        lengths = torch.tensor([6, 5, 2, 3]).roll(step)[:size]
        picked = torch.stack([torch.randperm(int(n), generator=generator)[:2] for n in lengths])
        masked = torch.stack([draw_masks(lengths, index, 0.4, "random", 0, step, view, 6) for view in (1, 2)])
        batch = Batch(
            part(index),
            counts(size),
            views=part(torch.rand(2, size, 6, 16, 16, generator=generator), 1),
            mask=part(torch.arange(6) < lengths.unsqueeze(1)),
            picked=part(picked),
            slice_index=part(index.unsqueeze(1) * 6 + picked).flatten(),
            masked=part(masked, 1),
        )
        pictures = torch.rand(2, 2, 16, 16, generator=generator), 48 + torch.randperm(6, generator=generator)[:2]
        hidden = torch.rand(size, 6, 2, 2, generator=generator) < 0.6
        batch = batch._replace(rows=real_rows(batch.mask), hidden=part(hidden))
        if images:
            batch = batch._replace(images=part(pictures[0], 1), image_index=part(pictures[1]))
            batch = batch._replace(place=PLACES[batch.intra_index], group=GROUPS[batch.intra_index])
        yield batch


def objective(kind: str, dim: int, samples: int, batch: int) -> nn.Module:
    if kind == "swav":
        return SwAV(dim, [12, 7], queue_length=2 * batch)  # full after two steps
    return DeepClusterV2(dim, [4, 3], samples, kmeans_backend="torch", kmeans_iterations=4)


LAMBDAS = {"intra": 0.7, "inter": 1.3, "position": 0.5}
RESTORED = {"position": 0.5, "recon": 0.9}


def learner_and_batches(kind: str, lambdas: Mapping[str, float] = LAMBDAS) -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    what, _, how = kind.removesuffix(UNEVEN).partition(" ")
    images, volumes = (7, 3) if kind.endswith(UNEVEN) else (8, 4)
    if what == "images":
        encoder = TinySlices()
        head = ProjectionHead(encoder.num_features, 64, 16)
        position = PositionContrast(ProjectionHead(encoder.num_features, 32, 16), 0.3, 0.1)
        return ImageClustering(encoder, head, objective(how, 16, 16, images), position), list(image_batches(images))
    encoder = joint_encoder()
    if what == "masked":
        return MaskedSlices(encoder), list(volume_batches(volumes, images=False))
    head = ProjectionHead(encoder.resnet.num_features, 32, 16)
    intra, inter = objective(how, 16, 54, 2 * volumes + 2), objective(how, 32, 8, volumes)
    position = PositionContrast(ProjectionHead(encoder.resnet.num_features, 32, 16), 0.3, 0.1)
    batches = list(volume_batches(volumes))
    if what == "restored":  # in float64: maps that are constant where a whole slice is hidden put ReLUs at their kink
        learner = JointClustering(encoder, head, intra, inter, position, RESTORED)
        return learner.double(), [b._replace(views=b.views.double(), images=b.images.double()) for b in batches]
    return JointClustering(encoder, head, intra, inter, position, lambdas), batches


UNEVEN = ", uneven shares"
KINDS = ("images swav", "images deepcluster", "joint swav", "joint deepcluster", "restored swav", "masked")
KINDS += tuple(kind + UNEVEN for kind in KINDS)


def train(kind: str) -> dict[str, Any]:
    """A few optimiser steps as the training loop makes them; what came out, equal in every process or named."""
    learner, batches = learner_and_batches(kind)
    run = Run(rank(), world_size(), torch.device("cpu"))
    wrapped = distributed.wrap(learner, run).train()
    core = learner
    if core.fills_memory:
        core.eval()
        with torch.no_grad():
            for batch in batches:
                core.remember(batch)
        wrapped.train()
    optimizer = LARC(parameter_groups(wrapped, 1e-4), lr=0.02)
    out: dict[str, Any] = {"losses": [], "assignments": []}
    for step, batch in enumerate(batches):
        core.begin_epoch(step)
        out["assignments"] += [getattr(o, "assignments", torch.zeros(0)).clone() for _, o in core.objectives()]
        losses = wrapped(batch)
        losses["loss"].backward()
        out["losses"].append({name: all_sum(value.detach().clone()) / world_size() for name, value in losses.items()})
        if step == 0:
            out["gradients"] = {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}
        core.cancel_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
    out["state"] = {name: value.clone() for name, value in core.state_dict().items()}
    out["memory"] = core.memory_state()
    guards.require_equal_weights(core, "after training")
    if rank():  # equal, so rank 0's copy is enough
        del out["state"], out["gradients"]
    return out


def close(found: Tensor, expected: Tensor, name: str, share: float = 1e-3) -> None:
    """Equal to `share` of the tensor's largest entry."""
    if not expected.is_floating_point():
        assert torch.equal(found, expected), name
        return
    scale = max(float(expected.abs().max()), 1e-4) if expected.numel() else 1.0
    assert_close(found, expected, rtol=0, atol=share * scale, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns(kind: str) -> None:
    """Losses and gradients; after several steps parameters, BatchNorm statistics, queue, assignments and bank."""
    one, (two, other) = train(kind), run_processes(2, train, kind)
    assert len(one["losses"]) == STEPS
    for step, (alone, first, second) in enumerate(zip(one["losses"], two["losses"], other["losses"], strict=True)):
        for name, value in alone.items():
            assert value > 0
            assert float(first[name]) == float(second[name])
            assert float(first[name]) == pytest.approx(float(value), rel=2e-4 if step else 1e-5), name
    assert one["gradients"].keys() == two["gradients"].keys()
    assert len(one["gradients"]) > 10
    # Scale of the whole learner: biases before a BatchNorm or a softmax have no gradient but rounding.
    floor = 1e-6 * max(float(g.abs().max()) for g in one["gradients"].values())
    for name, expected in one["gradients"].items():
        if float(expected.abs().max()) > floor:
            close(two["gradients"][name], expected, name)
    assert one["state"].keys() == two["state"].keys()
    for name, expected in one["state"].items():
        found = two["state"][name]
        if name == "intra.queue" and "joint swav" in kind:
            # A step's rows: per process its slices and an image; one process has all slices before all images.
            rows = [0, 1, 2, 3, 5, 6, 4, 7] if kind.endswith(UNEVEN) else [0, 1, 2, 3, 5, 6, 7, 8, 4, 9]
            found = found.unflatten(1, (2, len(rows)))[:, :, rows].flatten(1, 2)
        close(found, expected, name)
        assert not name.endswith("queue") or expected[:, -1].norm() > 0  # it was full, and so was used
    for out in (two, other):
        for level, memory in one["memory"].items():
            assert "swav" in kind or memory["seen"].any()
            for name, expected in memory.items():
                close(out["memory"][level][name], expected, f"{level} {name}")
        for found, expected in zip(out["assignments"], one["assignments"], strict=True):
            assert torch.equal(found, expected)


# -------------------------------------------------------------------------------------------- branches switched off


def two_steps(lambdas: dict[str, float]) -> bool:
    learner, batches = learner_and_batches("joint swav", lambdas)
    learner = distributed.wrap(learner, Run(rank(), world_size(), torch.device("cpu")))
    for batch in batches[:2]:  # torch notices in the second that a parameter had no gradient in the first
        loss = learner(batch)["loss"]
        loss.backward()
    return bool(loss.isfinite())


@pytest.mark.slow
@pytest.mark.parametrize("on", ["intra", "inter", "position", "recon", "mask", "intra inter mask", "position recon"])
def test_any_branches_train_on_two_processes(on: str) -> None:
    assert run_processes(2, two_steps, dict.fromkeys(on.split(), 1.0)) == [True, True]


# ------------------------------------------------------------------------------------------------- the parts they use

NORM_INPUT, NORM_WEIGHTS = torch.randn((2, 7, 3, 4), generator=torch.Generator().manual_seed(0))
NORM_INPUT = NORM_INPUT * torch.tensor([[1.0], [5.0], [0.1]]) + torch.tensor([[0.0], [100.0], [-3.0]])


def normalise(rows: slice, synchronised: bool = True) -> dict[str, Any]:
    """Two training steps and an evaluation of a BatchNorm on these rows, with gradients of a weighted sum."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(3))
    nn.init.uniform_(module[0].weight, 0.5, 1.5)
    nn.init.uniform_(module[0].bias)
    if synchronised:
        module = convert_sync_batchnorm(module)
    x = NORM_INPUT[rows].clone().requires_grad_()
    module.train()(x.detach() * 2)
    out = module(x)
    (out * NORM_WEIGHTS[rows]).sum().backward()
    norm = module[0]
    return {
        "out": out.detach(),
        "x": x.grad,
        "weight": all_sum(norm.weight.grad.clone()),
        "bias": all_sum(norm.bias.grad.clone()),
        "state": {name: value.clone() for name, value in norm.state_dict().items()},
        "evaluated": module.eval()(x).detach() if len(x) else out.detach(),
    }


FIRST = (5, 7)  # rows on the first process; the other has the rest, or nothing


def parts_on_two_processes() -> dict[str, Any]:
    shares = {n: slice(0, n) if rank() == 0 else slice(n, 7) for n in FIRST}
    norms = {n: normalise(rows) for n, rows in shares.items()}
    return {"norms": norms, "errors": [said(ranks) for ranks in ([], [0, 1], [1])]}


def said(ranks: list[int]) -> str | None:
    """What all processes raise when some of them fail."""

    def fail() -> None:
        if rank() in ranks:
            raise UserError(f"failed on {rank()}")

    try:
        everywhere(fail)
    except UserError as raised:
        return str(raised)
    return None


@pytest.fixture(scope="module")
def parts() -> list[dict[str, Any]]:
    return run_processes(2, parts_on_two_processes)


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_synchronised_batch_norm_equals_batch_norm_of_the_joint_batch(first: int, parts: list) -> None:
    """Channels of large mean and of small variance."""
    alone = normalise(slice(None), synchronised=False)
    found = [out["norms"][first] for out in parts]
    out, gradient, evaluated = (torch.cat([part[name] for part in found]) for name in ("out", "x", "evaluated"))
    assert_close(out, alone["out"], rtol=1e-4, atol=2e-4)
    assert_close(evaluated, alone["evaluated"], rtol=1e-4, atol=2e-4)
    for channel in range(3):
        close(gradient[:, channel], alone["x"][:, channel], f"channel {channel}")
    for out in found:
        for name in ("weight", "bias"):
            close(out[name], alone[name], name)
        assert_close(out["state"], alone["state"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_on_all(parts: list) -> None:
    for out in parts:
        assert out["errors"] == [None, "failed on 0", "failed on 1"]
