"""The published algorithms, number by number: reference vectors of ../shared/golden, and small ones worked out here.

The reference vectors are not part of the repository; where they are absent, the tests that need them are skipped and
the hand-worked and NumPy (float64, from the formula) checks remain.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import SHARED
from processes import run_processes
from torch.testing import assert_close

from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, fold_grey, multi_scale
from objectives import SwAV
from objectives.kmeans import assign, kmeans_faiss, kmeans_torch
from objectives.sinkhorn import sinkhorn
from utils.optim import LARC, WarmupCosine

GOLDEN = SHARED.parent / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"needs the reference vectors in {GOLDEN}")
SWAV_CASES = ("noqueue", "queue", "queue_filling")


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array)).to(dtype)


def exact(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, atol: float = 1e-12) -> None:
    assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=atol)


# ---- Sinkhorn-Knopp


def sinkhorn_numpy(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """The formula as published: prototypes x batch, total mass one, no care for overflow."""
    Q = np.exp(scores.T / epsilon)
    K, B = Q.shape
    Q /= Q.sum()
    for _ in range(iterations):
        Q /= Q.sum(axis=1, keepdims=True) * K
        Q /= Q.sum(axis=0, keepdims=True) * B
    return (Q * B).T


@needs_golden
def test_sinkhorn_equals_the_reference_in_float64_and_float32() -> None:
    golden = load("a_sinkhorn")
    settings = float(golden["eps"]), int(golden["iters"])
    for kind in ("cos", "uni"):
        scores = tensor(golden[f"scores_{kind}"])
        exact(sinkhorn(scores, *settings), golden[f"q64_{kind}"])
        exact(sinkhorn(scores.float(), *settings), golden[f"q32_{kind}"], atol=2e-7)


def test_sinkhorn_equals_the_formula_in_numpy() -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (12, 7))
    for iterations in (1, 3, 10):
        exact(sinkhorn(tensor(scores), 0.1, iterations), sinkhorn_numpy(scores, 0.1, iterations))


# ---- spherical k-means


def kmeans_numpy(points: np.ndarray, centroids: np.ndarray, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        found = (points @ centroids.T).argmax(axis=1)
        for k in range(len(centroids)):
            if (found == k).any():
                centroids[k] = points[found == k].mean(axis=0)
        centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids


@needs_golden
def test_kmeans_equals_the_reference() -> None:
    golden = load("b_kmeans")
    iterations = int(golden["iters"])
    for case in ("_empty", ""):
        points, start = tensor(golden[f"memory{case}"], torch.float32), tensor(golden[f"init_centroids{case}"])
        centroids = kmeans_torch(points, start.float(), iterations, empty="keep")
        exact(centroids, golden[f"centroids{case}"], atol=5e-7)
        exact(assign(points, centroids)[0], golden[f"assignments{case}"], atol=0)
    exact(kmeans_torch(points.double(), start, iterations, empty="keep"), golden["centroids64"])


@pytest.mark.slow
def test_faiss_finds_clusters_as_good() -> None:
    points = torch.nn.functional.normalize(tensor(np.random.default_rng(1).standard_normal((300, 6)), torch.float32))
    # In a process of its own: once SimpleITK is loaded beside it, faiss does not know its own types any more.
    (theirs,) = run_processes(1, kmeans_faiss, points, points[:9], 10)
    ours = kmeans_torch(points, points[:9], 10, empty="keep")
    found = [float(assign(points, centroids)[1].mean()) for centroids in (theirs, ours)]
    assert found[0] == pytest.approx(found[1], rel=0.01)


def test_kmeans_equals_the_formula_in_numpy() -> None:
    points = np.random.default_rng(1).standard_normal((60, 6))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    start = points[[3, 11, 40, 55]]
    exact(kmeans_torch(tensor(points), tensor(start), 6, empty="keep"), kmeans_numpy(points, start.copy(), 6))


# ---- SwAV loss


def swav_step(golden: dict[str, np.ndarray], case: str, dtype: torch.dtype) -> dict[str, Any]:
    """Loss, gradients, and the queue after the step."""
    queue = {"noqueue": None, "queue": "queue_before", "queue_filling": "queue_before_filling"}[case]
    objective = SwAV(
        golden["embeddings"].shape[1],
        [len(golden["prototypes_raw"])],
        temperature=float(golden["temperature"]),
        epsilon=float(golden["eps"]),
        sinkhorn_iterations=int(golden["iters"]),
        queue_length=golden[queue].shape[1] if queue else 0,
    ).to(dtype)
    weight = objective.prototypes.heads[0].weight
    weight.data.copy_(tensor(golden["prototypes_raw"]))  # not of unit length: forward must see to that
    if queue:
        objective.queue.copy_(tensor(golden[queue]))
    objective.begin_epoch(0)
    z = tensor(golden["embeddings"], dtype).unflatten(0, (-1, int(golden["batch"]))).requires_grad_()
    loss = objective(z)
    loss.backward()
    return {"loss": loss.detach(), "z": z.grad, "prototypes": weight.grad, "queue": objective.queue.clone()}


@needs_golden
def test_swav_equals_the_reference() -> None:
    golden = load("c_swav_loss")
    for case in SWAV_CASES:
        step = swav_step(golden, case, torch.float64)
        exact(step["loss"], golden[f"loss64_{case}"])
        exact(step["z"].flatten(0, 1), golden[f"grad_embeddings_{case}"])
        exact(step["prototypes"], golden[f"grad_prototypes_{case}"])
        if case != "noqueue":
            exact(step["queue"], golden[f"queue_after_{case}"], atol=0)
        in_float32 = swav_step(golden, case, torch.float32)
        exact(in_float32["loss"].double(), golden[f"loss32_{case}"], atol=3e-6)


def test_swav_equals_the_formula_in_numpy() -> None:
    """Three crops, two heads, a full queue; cross-entropies written out."""
    rng = np.random.default_rng(2)
    unit = [rng.standard_normal(shape) for shape in ((3, 4, 5), (2, 6, 5), (7, 5), (3, 5))]
    z, queue, *heads = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in unit)
    expected = []
    for head in heads:
        for crop in (0, 1):
            q = sinkhorn_numpy(np.concatenate([queue[crop], z[crop]]) @ head.T, 0.05, 3)[6:]
            for view in {0, 1, 2} - {crop}:
                logits = z[view] @ head.T / 0.2
                log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
                expected.append(-(q * log_p).sum(axis=1).mean())
    objective = SwAV(5, [7, 3], temperature=0.2, queue_length=6).double()
    for own, head in zip(objective.prototypes.heads, heads, strict=True):
        own.weight.data.copy_(tensor(head))
    objective.queue.copy_(tensor(queue))
    objective.begin_epoch(0)
    exact(objective(tensor(z)).detach(), np.array(np.mean(expected)))


# ---- ResNet-50


def by_recipe(name: str, shape: torch.Size) -> torch.Tensor:
    """The reference's weights, which stand in no file."""
    rng = np.random.default_rng([1006, zlib.crc32(name.encode())])
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 4:
        value = rng.standard_normal(shape) * np.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    else:
        value = name.endswith("weight") + 0.1 * rng.standard_normal(shape)
    return tensor(value.astype(np.float32))


@needs_golden
@pytest.mark.slow
@torch.no_grad()
def test_resnet50_equals_the_reference() -> None:
    golden, resnet, shapes = (
        load("f_resnet50"),
        GreyResNet().double().eval(),
        torchvision.models.resnet50().state_dict(),
    )
    state = {name: by_recipe(name, value.shape) for name, value in shapes.items() if value.dim() and "fc." not in name}
    state["conv1.weight"] = fold_grey(state["conv1.weight"])
    resnet.load_state_dict(resnet.state_dict() | state)
    stages = resnet(tensor(golden["input"]) * GREY_STD + GREY_MEAN)
    for k, stage in enumerate(stages, start=1):
        exact(stage.mean(dim=(2, 3)), golden[f"stage{k}"], atol=1e-9)
    exact(multi_scale(stages), golden["feature5888"][:, :3840])  # which has the last stage twice


# ---- learning-rate schedule


@needs_golden
def test_schedule_equals_the_reference() -> None:
    golden = load("d_lr_schedule")
    per_epoch = int(golden["iters_per_epoch"])
    rate = WarmupCosine(
        *(float(golden[name]) for name in ("base_lr", "final_lr", "start_warmup")),
        warmup_steps=int(golden["warmup_epochs"]) * per_epoch,
        total_steps=int(golden["epochs"]) * per_epoch,
    )
    exact(np.array([rate(step) for step in range(700)]), golden["lr"], atol=1e-16)


def test_schedule_by_hand() -> None:
    rate = WarmupCosine(base_lr=1.0, final_lr=0.2, start_warmup=0.6, warmup_steps=5, total_steps=9)
    root = np.sqrt(0.5)
    expected = [0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 0.6 + 0.4 * root, 0.6, 0.6 - 0.4 * root]
    assert [rate(step) for step in range(9)] == pytest.approx(expected, abs=1e-15)
    assert rate(9) == rate(1000) == pytest.approx(0.2)  # never up again
    assert type(rate(3)) is float


# ---- LARC


def larc_trajectory(
    start: list[torch.Tensor], gradients: list[torch.Tensor], lrs: np.ndarray, **options: Any
) -> list[list[torch.Tensor]]:
    """[parameter][step] values after every step; gradients [parameter] of [steps, ...]."""
    weights = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = LARC(weights, lr=0.0, **options)
    path: list[list[torch.Tensor]] = [[] for _ in weights]
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = float(lr)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient[step].clone()
        optimizer.step()
        for weight, gradient, values in zip(weights, gradients, path, strict=True):
            exact(weight.grad, gradient[step], atol=0)  # the caller's gradient stays as it was
            values.append(weight.detach().clone())
    return path


@needs_golden
def test_larc_equals_the_reference() -> None:
    golden = load("e_larc")
    options = {name: float(golden[name]) for name in ("momentum", "weight_decay", "trust", "eps")}
    gradients = [tensor(golden[f"grad{i}"]) for i in range(3)]
    for clip in (False, True):
        expected = [tensor(golden[f"p{i}{'_clip' if clip else ''}"]) for i in range(3)]
        path = larc_trajectory([p[0] for p in expected], gradients, golden["lr"], clip=clip, **options)
        for found, wanted in zip(path, expected, strict=True):
            exact(torch.stack(found), wanted[1:], atol=1e-15)


def test_larc_by_hand() -> None:
    # trust * |w| / |g| = 0.5 is above lr = 0.1, so plain SGD; and with trust 0.001, 0.005 / 0.1 of it.
    w, g, zero = tensor(np.array([3.0, 4.0])), tensor(np.array([0.6, 0.8])), torch.zeros(2, dtype=torch.float64)
    for trust, share in ((0.1, 1.0), (0.001, 0.05)):
        path = larc_trajectory([w], [g[None]], np.array([0.1]), weight_decay=0.0, eps=0.0, trust=trust, clip=True)
        exact(path[0][0], w - 0.1 * share * g)
    # Without clipping it decays with the ratio, and not where a norm is zero.
    path = larc_trajectory([zero, w, w], [g[None], zero[None], g[None]], np.array([1.0]), weight_decay=0.1, eps=0.0)
    exact(path[0][0], -g)
    exact(path[1][0], w)
    exact(path[2][0], w - 0.001 * 5 / (1 + 0.1 * 5) * (g + 0.1 * w))


def test_larc_without_adaptation_is_sgd() -> None:
    rng = np.random.default_rng(3)
    start, gradients = tensor(rng.standard_normal((4, 3))), tensor(rng.standard_normal((3, 4, 3)))
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    larc = LARC([{"params": [ours], "adapt": False}], lr=0.1, weight_decay=0.01)
    sgd = torch.optim.SGD([plain], lr=0.1, momentum=0.9, weight_decay=0.01)
    for gradient in gradients:
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        larc.step()
        sgd.step()
    exact(ours.detach(), plain.detach())
