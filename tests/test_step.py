"""Speed changes leave results equal: channels-last, one grey channel, recomputation, accumulation, half precision;
and nothing in a step makes the host wait for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
import torch.nn.functional as F
import torchvision
from syncs import HostWaits, no_waiting
from torch import Tensor, nn

from datasets.batch import Batch
from models.encoder import JointEncoder
from models.heads import ProjectionHead
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet
from objectives import DeepClusterV2, ImageClustering, JointClustering, MaskedSlices, SwAV
from objectives.kmeans import kmeans_torch
from utils import guards, optim
from utils.precision import Precision

STEPS = 5


def batch(seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[6], [4], [6]])
    return Batch(
        views=torch.rand(2, 3, 6, 32, 32, generator=draw).to(dtype),
        mask=mask,
        rows=mask.flatten().nonzero().squeeze(1),
        index=torch.arange(3),
        picked=torch.randint(0, 4, (3, 2), generator=draw),
        slice_index=torch.arange(6),
        counts=[3],
    )


def learner(recompute: bool = False) -> JointClustering:
    torch.manual_seed(0)
    encoder = JointEncoder("resnet18", 32, layers=1, dropout=0.0, recompute=recompute)
    return JointClustering(
        encoder, ProjectionHead(512, 32, 16), SwAV(16, [5]), SwAV(32, [3]), lambdas={"intra": 0.7, "inter": 1}
    ).train()


class PlainResNet(nn.Module):
    """torchvision's own network, three channels, channels first."""

    def __init__(self, ours: GreyResNet) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(weights=None)
        self.net.fc = nn.Identity()
        self.net.to(ours.conv1.weight.dtype).load_state_dict(ours.torchvision_state())

    def forward(self, images: Tensor) -> list[Tensor]:
        net, stages = self.net, []
        x = ((images - GREY_MEAN) / GREY_STD).repeat(1, 3, 1, 1)
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            stages.append(x)
        return stages


def plain_larc(groups: list[dict[str, Any]], momenta: dict[nn.Parameter, Tensor], lr: float) -> None:
    """The formula of `optim.LARC`, a tensor at a time."""
    for group in groups:
        for p in group["params"]:
            g = p.grad
            if group.get("adapt", True) and p.norm() > 0 and g.norm() > 0:
                decay = group["weight_decay"]
                g = 0.001 * p.norm() / (g.norm() + decay * p.norm() + 1e-8) * (g + decay * p)
            momenta[p] = 0.9 * momenta[p] + g if p in momenta else g.clone()
            p.data -= lr * momenta[p]
            p.grad = None


def losses(module: nn.Module, lr: float = 1.0) -> Iterator[float]:
    optimizer = optim.LARC(optim.parameter_groups(module, 1e-4), lr)
    for step in range(STEPS):
        loss = module(batch(step % 2, next(module.parameters()).dtype))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


@pytest.mark.slow
def test_loss_curve_is_that_of_the_plain_network_and_the_plain_optimiser(one_thread: None) -> None:
    """In float64, where rounding does not grow with the steps as it does in float32 on so small a batch."""
    ours = learner().double()
    plain = copy.deepcopy(ours)
    plain.encoder.encoder = PlainResNet(ours.resnet)
    groups, momenta, expected = optim.parameter_groups(plain, 1e-4), {}, []
    for step in range(STEPS):
        loss = plain(batch(step % 2, torch.float64))["loss"]
        loss.backward()
        # LARC's step depends on the tensor's norm, which three equal channels change: update the stem as a grey one.
        conv1 = plain.encoder.resnet.net.conv1.weight
        plain_larc([{**g, "params": [p for p in g["params"] if p is not conv1]} for g in groups], momenta, 1.0)
        grey = conv1.detach().sum(dim=1, keepdim=True).requires_grad_()
        grey.grad = conv1.grad[:, :1].clone()
        momentum = {grey: momenta["grey"]} if "grey" in momenta else {}
        plain_larc([{**groups[0], "params": [grey]}], momentum, 1.0)
        momenta["grey"] = momentum[grey]
        conv1.data, conv1.grad = (grey.detach() / 3).repeat(1, 3, 1, 1), None
        expected.append(float(loss.detach()))
    found = list(losses(ours))
    assert abs(found[0] - found[-1]) > 0.05  # it learns, so equal curves mean something
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_float32_and_bf16_stay_near_float64(one_thread: None) -> None:
    """The first loss and its gradient; later ones part, as they do between any two roundings of so small a batch."""
    found = {}
    for name, dtype in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.float32)):
        module = learner().to(dtype)
        with Precision("bf16" if name == "bf16" else "fp32", torch.device("cpu")).autocast():
            loss = module(batch(0, dtype))["loss"]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in module.resnet.parameters()]).double()
        found[name] = float(loss.detach()), gradient
    exact, direction = found["fp64"]
    for name, loss_tolerance, cosine in (("fp32", 1e-5, 0.9999), ("bf16", 5e-3, 0.8)):
        loss, gradient = found[name]
        assert loss == pytest.approx(exact, rel=loss_tolerance)
        assert torch.cosine_similarity(gradient, direction, dim=0) > cosine, name


@pytest.mark.slow
@pytest.mark.parametrize("synchronised", [False, True])
def test_recomputing_changes_no_bit(synchronised: bool, one_thread: None) -> None:
    """GPUs' synchronised BatchNorm counts its batches in the second pass as well; alone it runs on a CPU."""
    usual, again = learner(), learner(recompute=True)
    if synchronised:
        again = nn.SyncBatchNorm.convert_sync_batchnorm(again)
    assert list(losses(usual)) == list(losses(again))
    for (name, a), b in zip(usual.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert int(usual.resnet.bn1.num_batches_tracked) == STEPS


@pytest.mark.slow
def test_what_an_epoch_leaves_over_is_an_update_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches, three to an update; the log has the mean over all of them."""
    parts: list[float] = []
    backward = Precision.backward

    def note_backward(self: Precision, loss: Tensor) -> None:
        parts.append(float(loss.detach()))
        backward(self, loss)

    monkeypatch.setattr(Precision, "backward", note_backward)
    updates = Mock(side_effect=Precision.step)
    monkeypatch.setattr(Precision, "step", lambda *given: updates(*given))
    tiny.run("mask_swav", data, tmp_path, epochs=1, accumulate=3, dropout=0.0, projection_init="orthogonal")
    assert len(parts) == 4
    assert updates.call_count == 2
    row = tiny.losses(tmp_path / "runs" / "mask_swav")[0]
    mean = sum(value * batches for value, batches in zip(parts, (3, 3, 3, 1), strict=True)) / 4
    assert float(row["loss"]) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("stage", ["images", "masked", "joint swav", "joint deepcluster", "slices only"])
def test_a_step_does_not_wait_for_the_device(stage: str) -> None:
    """Forward, backward, the guards and the optimiser; the loop asks for the losses once, when all of it is queued."""
    torch.manual_seed(0)
    given = batch(0)
    if stage == "images":
        encoder = GreyResNet("resnet18")
        module = ImageClustering(encoder, ProjectionHead(512, 32, 16), SwAV(16, [5]))
        given = Batch(torch.arange(4), [4], crops=[torch.rand(2, 4, 32, 32), torch.rand(2, 4, 16, 16)])
    elif stage == "masked":
        module = MaskedSlices(JointEncoder("resnet18", 32, layers=1))
    else:
        make = (lambda d, k, n: DeepClusterV2(d, [k], n)) if "deepcluster" in stage else (lambda d, k, n: SwAV(d, [k]))
        lambdas = {"intra": 1.0} | ({} if stage == "slices only" else {"inter": 1.0, "mask": 0.5})
        encoder = JointEncoder("resnet18", 32, layers=1)
        module = JointClustering(encoder, ProjectionHead(512, 32, 16), make(16, 5, 8), make(32, 3, 3), lambdas=lambdas)
        given = given._replace(images=torch.rand(2, 2, 32, 32), image_index=torch.tensor([6, 7]))
    if stage not in ("images", "slices only"):
        given = given._replace(masked=(torch.arange(6) == 2).expand(2, 3, 6))
    module.train()
    optimizer = optim.LARC(optim.parameter_groups(module, 1e-6), 0.1)
    statistics = guards.BatchNormStatistics(module)
    for _ in range(2):
        with no_waiting():
            statistics.remember()
            module(given)["loss"].backward()
            module.cancel_gradients(0)
            guards.gradients_are_finite(optimizer)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("side", [12, 16])
def test_gradients_of_narrow_images_in_bf16_hold_nothing_that_was_left_in_memory(side: int) -> None:
    """The last stage's first convolution meets maps of width 1, so its outer columns see padding alone."""
    torch.manual_seed(0)
    net = GreyResNet("resnet18").train()
    weight = net.layer4[0].conv1.weight
    for _ in range(5):
        left = [torch.full((weight.numel(),), float("nan")) for _ in range(40)]
        del left
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            stages = net(torch.rand(4, 1, side, side))
        sum(stage.float().square().mean() for stage in stages).backward()
        assert weight.grad[..., 1].any()
        assert not weight.grad[..., [0, 2]].any()


@pytest.mark.parametrize("wait", [lambda x: bool(x.any()), lambda x: x[torch.arange(6) > 2], Tensor.cpu])
def test_what_waits_is_found(wait: Callable[[Tensor], object]) -> None:
    with no_waiting(), pytest.raises(HostWaits):
        wait(torch.arange(6.0))


@pytest.mark.parametrize("empty", ["reseed", "keep"])
def test_kmeans_does_not_wait_even_when_clusters_are_empty(empty: str) -> None:
    points = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    with no_waiting():
        kmeans_torch(points, points[[0, 0, 1, 2]], 3, empty=empty, products=torch.bfloat16)
