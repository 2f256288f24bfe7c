"""Neither the objectives nor the transformer make the host wait for the device inside a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from syncs import HostWaits, no_waiting, pretended_gpu
from torch import Tensor

from models.transformer import SliceTransformer
from objectives import DeepClusterV2, SwAV
from objectives.kmeans import kmeans_torch


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


ROWS, MASK = torch.arange(6), torch.arange(6) > 2
WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if x.sum() > 0 else 2,
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "mask": lambda x: x[MASK],
    "write through a mask": lambda x: x.__setitem__(MASK, 0),
    "rows of a mask": lambda x: x[:, None][MASK, 0],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.long().bincount(),
    "masked_select": lambda x: x.masked_select(MASK),
    "repeat_interleave": lambda x: x.repeat_interleave(ROWS),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to device": lambda x: x.to(device=torch.device("cpu")),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "tensor": lambda x: torch.tensor([1.0]),
    "as_tensor": lambda x: torch.as_tensor(np.zeros(3)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_found(name: str) -> None:
    with no_waiting(), pytest.raises(HostWaits):
        WAITS[name](torch.arange(6.0))


@pytest.mark.parametrize("queue_length", [0, 8])
@pytest.mark.parametrize("freeze", [0, 1])
def test_swav_does_not_wait(queue_length: int, freeze: int) -> None:
    objective = SwAV(8, [5, 3], queue_length=queue_length, freeze_prototypes_niters=freeze)
    objective.begin_epoch(0)
    for step in range(4):  # the queue is filled by the second
        z = unit(3, 4, 8, seed=step).requires_grad_()
        with no_waiting():
            objective(z).backward()
            objective.cancel_gradients(step)


def test_deepcluster_does_not_wait() -> None:
    objective = DeepClusterV2(8, [5, 3], samples=20, kmeans_backend="torch")
    objective.remember(unit(2, 18, 8), torch.arange(18))
    objective.begin_epoch(0)
    z, index = unit(3, 4, 8).requires_grad_(), torch.tensor([7, 19, 3, 7])  # 19 has no assignment, 7 stands there twice
    with no_waiting():
        objective(z, index).backward()
    assert objective.bank.seen.sum() == 19


@pytest.mark.parametrize("empty", ["reseed", "keep"])
@pytest.mark.parametrize("products", [None, torch.bfloat16])
def test_kmeans_does_not_wait_even_when_clusters_are_empty(empty: str, products: torch.dtype | None) -> None:
    points = unit(50, 8)
    start = points[[0, 0, 1, 2]]
    with no_waiting():
        kmeans_torch(points, start, 3, empty=empty, products=products)


@pytest.mark.parametrize("half", [False, True])
def test_the_transformer_does_not_wait(half: bool) -> None:
    net, x, mask = SliceTransformer(32, 2, hidden=48), torch.randn(2, 9, 32), torch.arange(9) < torch.tensor([[9], [5]])
    with no_waiting(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        net(x.requires_grad_(), mask).float().square().mean().backward()


def test_a_pretended_gpu_finds_mixed_devices_and_values_asked_for() -> None:
    with pretended_gpu(), pytest.raises(RuntimeError, match="devices"):
        torch.zeros(3) + torch.zeros(3, device="cpu")
    with pretended_gpu(), pytest.raises(RuntimeError):
        bool(torch.zeros(3).any())


def test_objectives_and_transformer_stay_on_the_device() -> None:
    with pretended_gpu() as device:
        z, index = torch.empty(3, 4, 8), torch.empty(4, dtype=torch.long)
        swav = SwAV(8, [5, 3], queue_length=8)
        swav.begin_epoch(0)
        assert swav(z).device == device
        assert DeepClusterV2(8, [5, 3], samples=20, kmeans_backend="torch")(z, index).device == device
        net = SliceTransformer(32, 2, hidden=48)
        assert net(torch.empty(2, 9, 32), torch.empty(2, 9, dtype=torch.bool)).device == device
