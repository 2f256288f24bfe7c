"""SwAV, DeepCluster-v2, masked slices, and the learner that joins them: what they compute, and at the edges."""

from __future__ import annotations

import itertools
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from tiny import random, unit
from torch import Tensor, nn
from torch.testing import assert_close

from objectives import DeepClusterV2, SwAV, bank
from objectives.deepcluster import UNASSIGNED
from objectives.kmeans import _sum_clusters, assign, kmeans_faiss, kmeans_torch
from objectives.sinkhorn import sinkhorn
from objectives.sizes import prototype_counts, queue_size
from utils.distributed import rank
from utils.errors import UserError
from utils.optim import parameter_groups


def swav(*sizes: int, dim: int = 8, **options: Any) -> SwAV:
    torch.manual_seed(0)
    return SwAV(dim, list(sizes), **options)


# ---- SwAV

PROTOTYPES = unit(50, 16)
HARD = {
    "spread": unit(24, 16, seed=1),
    "all on one prototype": PROTOTYPES[:1].expand(24, 16),
    "opposite": torch.cat([PROTOTYPES[:1].expand(12, 16), -PROTOTYPES[:1].expand(12, 16)]),
    "each on its prototype": PROTOTYPES[:24],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinkhorn_loss_and_gradients_survive_hard_embeddings_in_half_precision(dtype: torch.dtype) -> None:
    for (name, z), epsilon in itertools.product(HARD.items(), (0.01, 0.05)):
        q = sinkhorn(z.to(dtype) @ PROTOTYPES.to(dtype).T, epsilon)
        assert q.dtype == torch.float32, name
        assert_close(q.sum(dim=1), torch.ones(24), msg=name)
        if len(z.unique(dim=0)) == 1:  # equal embeddings share all prototypes equally
            assert_close(q, torch.full((24, 50), 0.02), rtol=0.02, atol=0, msg=name)
        objective = swav(50, dim=16, epsilon=epsilon, queue_length=24)
        objective.prototypes.heads[0].weight.data.copy_(PROTOTYPES)
        objective.queue.copy_(z)
        objective.begin_epoch(0)
        leaf = z.repeat(3, 1, 1).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = objective(leaf)
        loss.backward()
        assert loss.dtype == torch.float32, name
        for values in (loss, leaf.grad, objective.prototypes.heads[0].weight.grad):
            assert values.isfinite().all(), name


def test_prototypes_get_no_gradient_in_their_first_steps() -> None:
    objective, moving = swav(5, freeze_prototypes_niters=2), []
    for step in range(4):
        objective(unit(2, 6, 8)).backward()
        objective.cancel_gradients(step)
        moving.append(objective.prototypes.heads[0].weight.grad is not None)
    assert moving == [False, False, True, True]


def test_queue_starts_with_its_epoch_fills_and_is_used_once_full() -> None:
    with_queue, without = swav(5, queue_length=12, epoch_queue_starts=1), swav(5)
    used = []
    for epoch, step in ((0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5), (1, 6)):
        with_queue.begin_epoch(epoch)
        z = unit(2, 6, 8, seed=step)
        used.append(abs(with_queue(z) - without(z)).item() > 1e-4)
        if epoch == 0:
            assert not with_queue.queue.any()
        elif step == 3:
            assert_close(with_queue.queue[:, :6], z)
            assert not with_queue.queue[:, 6:].any()
    assert used == [False, False, False, False, False, True, True]
    newest = torch.cat([unit(2, 6, 8, seed=6), unit(2, 6, 8, seed=5)], dim=1)
    assert_close(with_queue.queue, newest)
    with_queue.eval()(unit(2, 6, 8, seed=9))
    assert_close(with_queue.queue, newest)


# ---- DeepCluster-v2


def deepcluster(samples: int, *sizes: int, dim: int = 4, **options: Any) -> DeepClusterV2:
    torch.manual_seed(0)
    return DeepClusterV2(dim, list(sizes), samples, **options)


def test_unassigned_samples_do_not_count() -> None:
    objective = deepcluster(6, 3, 2, temperature=0.2)
    objective.assignments.copy_(torch.tensor([[0, 2, UNASSIGNED, 1, 1, 0], [1, 0, UNASSIGNED, 0, 1, 0]]))
    z, index = unit(3, 3, 4).requires_grad_(), torch.tensor([3, 2, 1])
    loss = objective(z, index)
    expected = []
    for head, targets in zip(objective.prototypes.heads, ((1, 2), (0, 0)), strict=True):
        for view in z.detach():
            for row, target in zip((0, 2), targets, strict=True):
                expected.append(-(head.weight.detach() @ view[row] / 0.2).log_softmax(dim=0)[target])
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    loss.backward()
    assert not z.grad[:, 1].any()
    assert z.grad[:, [0, 2]].norm(dim=-1).min() > 0
    nothing = objective(unit(2, 2, 4), torch.tensor([2, 2]))
    assert float(nothing) == 0


def test_begin_epoch_assigns_every_seen_sample_to_its_nearest_prototype() -> None:
    objective = deepcluster(40, 5, 3, 4)
    seen = torch.tensor([i for i in range(40) if i % 7])
    z = unit(2, len(seen), 4)
    objective.remember(z, seen)
    objective.begin_epoch(0)
    for h, head in enumerate(objective.prototypes.heads):
        assert_close(head.weight.norm(dim=1), torch.ones(head.out_features))
        expected = torch.full((40,), UNASSIGNED, dtype=torch.int32)
        expected[seen] = (z[h % 2] @ head.weight.T).argmax(dim=1).int()
        assert torch.equal(objective.assignments[h], expected)
        assert len(expected[seen].unique()) == head.out_features
    few = deepcluster(40, 39)
    few.remember(z, seen)
    with pytest.raises(UserError, match=r"nmb_prototypes: 39 prototypes but only 34 samples"):
        few.begin_epoch(0)


def test_clusters_are_of_one_place_where_k_means_sees_places() -> None:
    """Two kinds of embeddings, each at both ends of its volumes, and images of the first kind, which have no place."""
    kinds = F.normalize(torch.eye(4)[:2].repeat_interleave(20, dim=0) + 0.01 * random(40, 4), dim=1)
    places = torch.tensor([0.0, 1.0, 0.05, 0.95]).repeat(10)
    places[:3] = torch.inf
    for w, expected in ((0.0, torch.arange(40) < 20), (3.0, places < 0.5)):
        objective = deepcluster(40, 2, places=places, position_code=w)
        objective.remember(kinds.expand(2, -1, -1), torch.arange(40))
        objective.begin_epoch(0)
        of = objective.assignments[0][3:]  # an image may go with either place
        assert torch.equal(of == of[expected[3:]][0], expected[3:])
        [head] = objective.prototypes.heads
        assert (head.in_features, len(objective.assignments[0].unique())) == (4, 2)
        assert_close(head.weight.norm(dim=1), torch.ones(2))


def test_empty_clusters_move_to_the_points_represented_worst() -> None:
    # Three tight groups; two equal centroids on the first, so the second of them is empty from the start.
    groups = F.normalize(torch.eye(4)[:3].repeat_interleave(10, dim=0) + 0.01 * random(30, 4), dim=1)
    start = torch.stack([groups[0], groups[0], groups[10]])
    kept, moved = (kmeans_torch(groups, start, 1, empty=empty) for empty in ("keep", "reseed"))
    assert_close(kept[1], groups[0])
    worst = groups[assign(groups, F.normalize(start, dim=1))[1].argmin()]
    assert_close(moved[1], worst)
    final = kmeans_torch(groups, start, 5)
    assert torch.bincount(assign(groups, final)[0], minlength=3).tolist() == [10, 10, 10]
    assert assign(groups, final)[1].mean() > 0.99


def test_assign_and_sums_in_blocks_equal_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = unit(50, 6), unit(7, 6, seed=1)
    whole = assign(points, centroids)
    corners = torch.eye(4)  # cosines of 0 and 1, so ties are exact: the first centroid wins
    assert assign(corners, corners[[2, 2, 0, 0, 3, 1]])[0].tolist() == [2, 5, 0, 4]
    assert [t.shape for t in assign(points[:0], centroids)] == [(0,), (0,)]
    monkeypatch.setattr("objectives.kmeans.SCORES_AT_ONCE", 30)
    assert_close(assign(points, centroids), whole)
    for K, sums_at_once in itertools.product((1, 7, 45), (1, 2**12)):
        monkeypatch.setattr("objectives.kmeans.SUMS_AT_ONCE", sums_at_once)
        assignment = torch.randint(K, (50,), generator=torch.Generator().manual_seed(1))
        sums, counts = _sum_clusters(points, assignment, K)
        assert_close(sums, torch.stack([points[assignment == k].sum(dim=0) for k in range(K)]))
        assert torch.equal(counts.long(), torch.bincount(assignment, minlength=K))


def test_products_in_half_precision_cluster_as_well() -> None:
    points = F.normalize(unit(60, 64).repeat(50, 1) + 0.1 * random(3000, 64, seed=1), dim=1)
    found = [kmeans_torch(points, points[:120], 10, products=kind) for kind in (None, torch.bfloat16, torch.float16)]
    plain, *half = (float(assign(points, centroids)[1].mean()) for centroids in found)
    assert half == pytest.approx([plain] * 2, rel=2e-3)
    nearest, cosine = assign(points, found[0], torch.bfloat16)
    assert_close(cosine, (points * found[0][nearest]).sum(dim=1))  # not rounded, whatever the products were


def remember_joint(objective: DeepClusterV2, rows: slice) -> None:
    """Two batches of 4 over all processes; sample 6 of 7 is seen by nobody, 5 twice."""
    for seed, index in ((1, [5, 0, 3, 2]), (2, [1, 5, 4, 0])):
        objective.remember(unit(2, 4, 4, seed=seed)[:, rows], torch.tensor(index)[rows])


def bank_on_two_processes(state: dict[str, Tensor], at_once: int) -> dict[str, Any]:
    bank.GATHERED_AT_ONCE = at_once
    written, loaded = deepcluster(7, 3), deepcluster(7, 3)
    remember_joint(written, slice(rank() * 2, rank() * 2 + 2))
    loaded.bank.load(state)
    written.begin_epoch(0)
    own = len(written.bank.embeddings[0])
    codes = sinkhorn(PROTOTYPES[:0] if rank() == 0 else PROTOTYPES)  # an empty share takes part and gets nothing
    states = written.bank.state(), loaded.bank.state()
    return {"banks": states, "own": own, "buffers": written.state_dict(), "codes": codes}


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_bank_state_is_the_same_on_any_number_of_processes(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("objectives.bank.GATHERED_AT_ONCE", at_once)
    alone, again = deepcluster(7, 3), deepcluster(7, 3)
    remember_joint(alone, slice(None))
    state = alone.bank.state()
    assert state["seen"].tolist() == [True] * 6 + [False]
    assert_close(state["embeddings"][:, 5], unit(2, 4, 4, seed=2)[:, 1])
    alone.begin_epoch(0)
    results = run_processes(2, bank_on_two_processes, state, at_once)
    assert [out["own"] for out in results] == [4, 3]
    for out in results:
        assert_close(out["banks"], (state, state))
        assert_close(out["buffers"], alone.state_dict())
    assert_close(torch.cat([out["codes"] for out in results]), sinkhorn(PROTOTYPES))
    again.bank.load(results[0]["banks"][0])
    assert_close(again.bank.state(), state)
    with pytest.raises(ValueError, match=r"\(2, 7, 4\) does not fit \(2, 8, 4\)"):
        deepcluster(8, 3).bank.load(state)


def test_prototypes_decay_but_biases_do_not() -> None:
    matrices, others = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), swav(5)), 0.1)
    assert [tuple(p.shape) for p in matrices["params"]] == [(2, 3), (5, 8)]
    assert [tuple(p.shape) for p in others["params"]] == [(2,)] * 3
    assert (matrices["weight_decay"], others["weight_decay"], others["adapt"]) == (0.1, 0.0, False)
    assert len(parameter_groups(deepcluster(5, 3), 0.1)[0]["params"]) == 0


# ---- sizes


def test_prototype_counts() -> None:
    cases = ((30, 100, [30]), ([30, 40], 100, [30, 40]), (0, 100, [20]), ([0, 7], 2500, [100, 7]), (0, 10**7, [3000]))
    for wanted, samples, expected in (*cases, (0, 1, [1]), (100, 100, [100])):
        assert prototype_counts(wanted, samples, "k") == expected
    with pytest.raises(UserError, match=r"nmb_prototypes: 101 prototypes are more than the 100 samples"):
        prototype_counts([5, 101], 100, "nmb_prototypes")


def test_queue_size_and_its_warning_with_numbers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert queue_size(-1, [30, 100], 32, "queue_length") == 192  # six batches: 224 >= 2 * 100 > 192
        assert queue_size(-1, [100], 500, "queue_length") == 0
        assert queue_size(68, [800], 32, "queue_length") == 68  # 100 in all: just enough
    with pytest.warns(UserWarning, match=r"32 embeddings .* queue of 67 .* 800 prototypes.*--queue_length 1568"):
        assert queue_size(67, [30, 800], 32, "queue_length") == 67


@pytest.mark.parametrize(("cuda", "gpus", "used"), [(True, 2, 1), (True, 0, 0), (False, 2, 0)])
def test_faiss_runs_on_a_gpu_where_points_and_its_build_are_there(cuda, gpus, used, monkeypatch):
    class Points(torch.Tensor):
        is_cuda = cuda

    class Kmeans:
        def __init__(self, d, K, **options):
            asked.update(options)

        def train(self, points, init_centroids):
            self.centroids = init_centroids

    asked: dict[str, object] = {}
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(Kmeans=Kmeans, get_num_gpus=lambda: gpus))
    points = unit(20, 4)
    assert kmeans_faiss(points.as_subclass(Points), points[:3]).shape == (3, 4)
    assert asked["gpu"] == used
