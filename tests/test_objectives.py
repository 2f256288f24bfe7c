"""SwAV, DeepCluster-v2, masked slices, and the learner that joins them: what they compute, and at the edges."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from torch import Tensor, nn
from torch.testing import assert_close

from datasets.batch import Batch
from datasets.loaders import draw_masks
from models.encoder import JointEncoder
from objectives import DeepClusterV2, ImageClustering, JointClustering, MaskedSlices, SwAV, bank
from objectives.deepcluster import UNASSIGNED
from objectives.kmeans import _sum_clusters, assign, choose_backend, kmeans_torch
from objectives.masked import interpolate_masked, masked_loss
from objectives.sinkhorn import sinkhorn
from objectives.sizes import prototype_counts, queue_size
from utils.distributed import rank
from utils.errors import UserError
from utils.optim import LARC, parameter_groups


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1)


def swav(*sizes: int, dim: int = 8, **options: Any) -> SwAV:
    torch.manual_seed(0)
    return SwAV(dim, list(sizes), **options)


# --------------------------------------------------------------------------------------------------------------- SwAV

PROTOTYPES = unit(50, 16)
HARD = {
    "spread": unit(24, 16, seed=1),
    "all on one prototype": PROTOTYPES[:1].expand(24, 16),
    "opposite": torch.cat([PROTOTYPES[:1].expand(12, 16), -PROTOTYPES[:1].expand(12, 16)]),
    "all away from one": -PROTOTYPES[:1].expand(24, 16),
    "one apart": torch.cat([PROTOTYPES[:1].expand(23, 16), -PROTOTYPES[:1]]),
    "each on its prototype": PROTOTYPES[:24],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epsilon", [0.01, 0.02, 0.05])
def test_sinkhorn_survives_hard_embeddings_in_half_precision(epsilon: float, dtype: torch.dtype) -> None:
    for name, z in HARD.items():
        q = sinkhorn(z.to(dtype) @ PROTOTYPES.to(dtype).T, epsilon)
        assert q.dtype == torch.float32, name
        assert q.isfinite().all(), name
        assert_close(q.sum(dim=1), torch.ones(24), msg=name)
        if len(z.unique(dim=0)) == 1:
            # Equal embeddings share all prototypes equally.
            assert_close(q, torch.full((24, 50), 0.02), rtol=0.02, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_finite_under_autocast(dtype: torch.dtype) -> None:
    for name, z in HARD.items():
        objective = swav(50, dim=16, epsilon=0.01, queue_length=24)
        objective.prototypes.heads[0].weight.data.copy_(PROTOTYPES)
        objective.queue.copy_(z)
        objective.begin_epoch(0)
        leaf = z.repeat(3, 1, 1).requires_grad_()
        with torch.autocast("cpu", dtype):
            loss = objective(leaf)
        loss.backward()
        assert loss.dtype == torch.float32, name
        assert loss.isfinite(), name
        assert leaf.grad.isfinite().all(), name
        assert objective.prototypes.heads[0].weight.grad.isfinite().all(), name


def test_rows_that_take_no_part_change_nothing() -> None:
    scores = unit(10, 16) @ PROTOTYPES.T
    rows = torch.tensor([0, 3, 4, 9])
    q = sinkhorn(scores, taking_part=torch.zeros(10, dtype=torch.bool).index_fill(0, rows, True))
    assert torch.equal(q[rows], sinkhorn(scores[rows]))
    assert q.sum() == pytest.approx(4)
    assert torch.equal(sinkhorn(scores, taking_part=torch.ones(10, dtype=torch.bool)), sinkhorn(scores))


def test_frozen_prototypes_move_only_after_their_steps() -> None:
    objective = swav(5, freeze_prototypes_niters=2)
    weight = objective.prototypes.heads[0].weight
    optimizer = LARC(objective.parameters(), lr=10.0)
    moves = []
    for step in range(4):
        before = weight.detach().clone()
        objective(unit(2, 6, 8, seed=step)).backward()
        objective.cancel_gradients(step)
        optimizer.step()
        optimizer.zero_grad()
        moves.append(float((weight.detach() - before).norm()))
    assert moves[:2] == pytest.approx([0, 0], abs=1e-6)
    assert min(moves[2:]) > 1e-3


def test_every_head_is_normalised_and_trained() -> None:
    objective = swav(5, 7, 3)
    for head in objective.prototypes.heads:
        head.weight.data.mul_(4)
    loss = objective(unit(3, 6, 8))
    loss.backward()
    for head in objective.prototypes.heads:
        assert_close(head.weight.norm(dim=1), torch.ones(len(head.weight)))
        assert head.weight.grad.norm() > 1e-3
    alone = []
    for head in objective.prototypes.heads:
        single = swav(head.out_features)
        single.prototypes.heads[0].weight.data.copy_(head.weight.detach())
        alone.append(single(unit(3, 6, 8)).item())
    assert loss.item() == pytest.approx(np.mean(alone), rel=1e-5)


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


# ----------------------------------------------------------------------------------------------------- DeepCluster-v2


def deepcluster(samples: int, *sizes: int, dim: int = 4, backend: str = "torch", **options: Any) -> DeepClusterV2:
    torch.manual_seed(0)
    return DeepClusterV2(dim, list(sizes), samples, kmeans_backend=backend, **options)


def test_bank_takes_the_assigning_crops_of_training_batches_only() -> None:
    objective, z = deepcluster(3, 2), unit(4, 3, 4)
    objective.remember(unit(2, 3, 4, seed=5), torch.arange(3))
    objective.begin_epoch(0)
    before = objective.memory_state()["embeddings"]
    objective.eval()(z, torch.tensor([2, 0, 1]))
    assert_close(objective.memory_state()["embeddings"], before)
    objective.train()(z, torch.tensor([2, 0, 1]))
    assert_close(objective.memory_state()["embeddings"], z[:2, [1, 2, 0]])


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


def test_more_prototypes_than_embedded_samples_is_an_error() -> None:
    objective = deepcluster(10, 4)
    objective.remember(unit(2, 3, 4), torch.tensor([1, 5, 7]))
    with pytest.raises(UserError, match=r"nmb_prototypes: 4 prototypes but only 3 samples"):
        objective.begin_epoch(0)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_begin_epoch_assigns_every_seen_sample_to_its_nearest_prototype(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    objective = deepcluster(40, 5, 3, 4, backend=backend)
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
    assert not any(p.requires_grad for p in objective.parameters())


def test_clustering_is_a_function_of_seed_and_epoch_and_a_resumed_epoch_keeps_its_own() -> None:
    found = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        objective = deepcluster(60, 6, seed=seed)
        objective.remember(unit(2, 60, 4), torch.arange(60))
        objective.begin_epoch(epoch)
        found.append(objective.assignments.clone())
        objective.begin_epoch(epoch + 5, resumed=True)
        assert torch.equal(objective.assignments, found[-1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


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


def test_assign_in_blocks_equals_assign_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = unit(50, 6), unit(7, 6, seed=1)
    whole = assign(points, centroids)
    monkeypatch.setattr("objectives.kmeans.SCORES_AT_ONCE", 30)
    assert_close(assign(points, centroids), whole)
    corners = torch.eye(4)  # cosines of 0 and 1, so ties are exact: the first centroid wins
    assert assign(corners, corners[[2, 2, 0, 0, 3, 1]])[0].tolist() == [2, 5, 0, 4]
    assert [t.shape for t in assign(points[:0], centroids)] == [(0,), (0,)]


@pytest.mark.parametrize("K", [4, 120])
def test_products_in_half_precision_cluster_as_well(K: int) -> None:
    centres = unit(60, 64)
    points = F.normalize(centres.repeat(50, 1) + 0.1 * random(3000, 64, seed=1), dim=1)
    mean_cosine = []
    for products in (None, torch.bfloat16, torch.float16):
        centroids = kmeans_torch(points, points[:K], 10, products=products)
        assert_close(centroids.norm(dim=1), torch.ones(K))
        assert len(assign(points, centroids)[0].unique()) == K
        mean_cosine.append(float(assign(points, centroids)[1].mean()))
    assert mean_cosine[1:] == pytest.approx([mean_cosine[0]] * 2, rel=2e-3)
    nearest, cosine = assign(points, centroids, torch.bfloat16)
    assert_close(cosine, (points * centroids[nearest]).sum(dim=1))  # not rounded, whatever the products were


@pytest.mark.parametrize(("n", "K"), [(1, 1), (7, 3), (200, 3), (200, 150)])
def test_sums_of_clusters_equal_a_loop(n: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = random(n, 5).double()
    assignment = torch.randint(K, (n,), generator=torch.Generator().manual_seed(1))
    for sums_at_once in (1, 10, 2**12):
        monkeypatch.setattr("objectives.kmeans.SUMS_AT_ONCE", sums_at_once)
        sums, counts = _sum_clusters(points, assignment, K)
        assert_close(sums, torch.stack([points[assignment == k].sum(dim=0) for k in range(K)]))
        assert counts.tolist() == [int((assignment == k).sum()) for k in range(K)]


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    assert [choose_backend(name) for name in ("auto", "torch", "faiss")] == ["torch", "torch", "faiss"]
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it raises ImportError
    assert choose_backend("auto") == "torch"
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        choose_backend("faiss")


def remember_joint(objective: DeepClusterV2, rows: slice) -> None:
    """Two batches of 4 over all processes; sample 6 of 7 is seen by nobody, 5 twice."""
    for seed, index in ((1, [5, 0, 3, 2]), (2, [1, 5, 4, 0])):
        objective.remember(unit(2, 4, 4, seed=seed)[:, rows], torch.tensor(index)[rows])


def bank_on_two_processes(state: dict[str, Tensor], at_once: int) -> dict[str, Any]:
    bank.GATHERED_AT_ONCE = at_once
    written, loaded = deepcluster(7, 3), deepcluster(7, 3)
    remember_joint(written, slice(rank() * 2, rank() * 2 + 2))
    loaded.load_memory_state(state)
    written.begin_epoch(0)
    return {
        "written": written.memory_state(),
        "loaded": loaded.memory_state(),
        "own": len(loaded.bank.embeddings[0]),
        "assignments": written.assignments,
        "prototypes": written.prototypes.heads[0].weight.detach(),
    }


@pytest.mark.parametrize("at_once", [1, 20, 2**24])
def test_bank_state_is_the_same_on_any_number_of_processes(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("objectives.bank.GATHERED_AT_ONCE", at_once)
    alone = deepcluster(7, 3)
    remember_joint(alone, slice(None))
    state = alone.memory_state()
    assert state["seen"].tolist() == [True] * 6 + [False]
    assert_close(state["embeddings"][:, 5], unit(2, 4, 4, seed=2)[:, 1])
    alone.begin_epoch(0)
    again = deepcluster(7, 3)
    again.load_memory_state(state)
    assert_close(again.memory_state(), state)
    results = run_processes(2, bank_on_two_processes, state, at_once)
    assert [out["own"] for out in results] == [4, 3]
    for out in results:
        assert_close(out["written"], state)
        assert_close(out["loaded"], state)
        assert torch.equal(out["assignments"], alone.assignments)
        assert_close(out["prototypes"], alone.prototypes.heads[0].weight.detach())
        back = deepcluster(7, 3)
        back.load_memory_state(out["written"])
        assert_close(back.memory_state(), state)
    with pytest.raises(ValueError, match=r"\(2, 7, 4\) does not fit \(2, 8, 4\)"):
        deepcluster(8, 3).load_memory_state(state)


# ------------------------------------------------------------------------------------------------------ masked slices


def test_interpolation_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.standard_normal((30, 11, 3)))
    visible = rng.random((30, 11)) < 0.4
    visible[np.arange(30), rng.integers(11, size=30)] = True
    visible[0] = np.eye(11, dtype=bool)[10]
    visible[1] = np.eye(11, dtype=bool)[0]
    visible[2] = True
    found = interpolate_masked(tokens, torch.from_numpy(visible))
    for b in range(30):
        places = visible[b].nonzero()[0]
        for feature in range(3):
            expected = np.interp(np.arange(11), places, tokens[b, places, feature])
            np.testing.assert_allclose(found[b, :, feature], expected, atol=1e-6)
    assert torch.equal(found[2], tokens[2])


LENGTHS, INDEX = torch.tensor([1, 2, 3, 10, 30, 7]), torch.tensor([4, 0, 9, 2, 5, 1])


def masks(ratio: float, style: str, seed: int = 0, epoch: int = 0, view: int = 1) -> Tensor:
    return draw_masks(LENGTHS, INDEX, ratio, style, seed, epoch, view, 32)


@pytest.mark.parametrize("style", ["random", "span"])
@pytest.mark.parametrize(
    ("ratio", "counts"),
    [
        (0.1, [0, 1, 1, 1, 3, 1]),  # 0.1 * 30 is 3, not 3.0000000000000004 rounded up; one slice stays visible
        (0.15, [0, 1, 1, 2, 5, 2]),
        (0.5, [0, 1, 2, 5, 15, 4]),
        (1.0, [0, 1, 2, 9, 29, 6]),
    ],
)
def test_masks_hide_so_many_real_slices(ratio: float, counts: list[int], style: str) -> None:
    for epoch in range(5):
        hidden = masks(ratio, style, epoch=epoch)
        assert hidden.shape == (6, 32)
        assert hidden.sum(dim=1).tolist() == counts
        assert not (hidden & (torch.arange(32) >= LENGTHS.unsqueeze(1))).any()
        if style == "span":
            for row in hidden:
                places = row.nonzero().squeeze(1)
                assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1)) if len(places) else True


@pytest.mark.parametrize("style", ["random", "span"])
def test_masks_are_a_pure_function_and_differ(style: str) -> None:
    start = masks(0.3, style)
    torch.manual_seed(99)
    assert torch.equal(start, masks(0.3, style))
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    assert torch.equal(draw_masks(LENGTHS[order], INDEX[order], 0.3, style, 0, 0, 1, 40)[:, :32], start[order])
    for other in ({"seed": 1}, {"epoch": 1}, {"view": 2}):
        assert not torch.equal(start, masks(0.3, style, **other))
    everywhere = sum(masks(0.3, style, epoch=epoch)[3].int() for epoch in range(60))
    assert everywhere[:10].min() > 0
    if style == "random":
        assert any(masks(0.3, style, epoch=epoch)[4].int().diff().abs().sum() > 2 for epoch in range(5))


class Oracle(nn.Module):
    """A transformer that knows the answer, and how wrong to be at every slice."""

    def __init__(self, targets: Tensor, error: Tensor) -> None:
        super().__init__()
        self.answer, self.saw = targets + error.unsqueeze(-1), None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.saw = x
        return self.answer


def of_slices(mask: Tensor, masked: Tensor) -> Batch:
    return Batch(torch.arange(len(mask)), mask=mask, masked=masked[None])


def test_masked_loss_counts_masked_slices_only() -> None:
    targets, token = random(2, 6, 3), torch.tensor([5.0, 6.0, 7.0])
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    masked = torch.zeros(2, 6, dtype=torch.bool)
    masked[0, [1, 2, 5]] = masked[1, 0] = True
    oracle = Oracle(targets, torch.zeros(2, 6))
    losses = masked_loss(oracle, token, nn.Identity(), targets[None], of_slices(mask, masked))
    assert losses["loss"].item() == 0
    assert_close(oracle.saw[masked], token.expand(4, 3))
    assert torch.equal(oracle.saw[~masked], targets[~masked])
    guess = [
        *(targets[0, 0] * (2 / 3) + targets[0, 3] / 3 - targets[0, 1]),
        *(targets[0, 0] / 3 + targets[0, 3] * (2 / 3) - targets[0, 2]),
        *(targets[0, 4] - targets[0, 5]),
        *(targets[1, 1] - targets[1, 0]),
    ]
    assert float(losses["interpolation"]) == pytest.approx(float(torch.stack(guess).square().mean()), rel=1e-5)
    error = torch.where(masked, 2.0, 100.0)  # 100 where it must not matter
    error[1, 0] = 4.0
    losses = masked_loss(
        Oracle(targets, error),
        token,
        nn.Identity(),
        targets[None],
        Batch(torch.arange(2), mask=mask, masked=masked[None]),
    )
    assert float(losses["loss"].detach()) == pytest.approx((3 * 2**2 + 4**2) / 4)


def test_masked_loss_of_volumes_with_one_slice_is_zero_and_not_nan() -> None:
    targets, mask = random(2, 3, 3), torch.tensor([[True, False, False]] * 2)
    nothing = draw_masks(torch.tensor([1, 1]), torch.tensor([0, 1]), 0.5, "random", 0, 0, 1, 3)
    token, decoder = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)
    losses = masked_loss(
        Oracle(targets, torch.ones(2, 3)),
        token,
        decoder,
        targets[None],
        Batch(torch.arange(2), mask=mask, masked=nothing[None]),
    )
    assert losses["loss"].item() == 0
    assert float(losses["interpolation"]) == 0
    losses["loss"].backward()
    assert decoder.weight.grad.isfinite().all()


def test_masked_slices_freezes_the_slice_encoder() -> None:
    torch.manual_seed(0)
    learner = MaskedSlices(JointEncoder("resnet18", 32, layers=1, dropout=0.0)).train()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    views, mask = torch.rand(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4).bool()
    mask[1, 3] = False
    masked = torch.stack([draw_masks(mask.sum(1), torch.arange(2), 0.5, "random", 0, 0, v, 4) for v in (1, 2)])
    losses = learner(Batch(torch.arange(2), views=views, mask=mask, masked=masked))
    losses["loss"].backward()
    assert set(losses) == {"loss", "interpolation"}
    for name, parameter in learner.named_parameters():
        frozen = name.startswith(("encoder.encoder.", "encoder.projection."))
        assert frozen == (not parameter.requires_grad), name
        assert frozen == (parameter.grad is None), name
    assert learner.mask_token.grad.norm() > 0
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---------------------------------------------------------------------------------------------------- joint clustering


class Capture(nn.Module):
    """An objective that keeps what it is given."""

    def forward(self, z: Tensor, index: Tensor, counts: list[int] | None = None) -> Tensor:
        self.z, self.index = z.detach(), index
        return z.sum() * 0 + 2


class Identify(nn.Module):
    """A slice encoder whose feature tells which slice it was given: the angle, and the view."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.transformer, self.seen = nn.Linear(3, 3), nn.Identity(), 0

    def slices(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        which = images.flatten(1).mean(dim=1)
        return identity(which), identity(which)

    def holistic(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.tokens = tokens.detach()
        return F.normalize(tokens.sum(dim=1), dim=1)


def identity(which: Tensor) -> Tensor:
    """Ids below 1000 are of view 0, others of view 1; the rest of the id is the angle in hundredths."""
    angle, view = (which % 1000) / 100, (which >= 1000).float()
    return torch.stack([angle.cos(), angle.sin(), 1 + view], dim=1)


def numbered_volumes(B: int, D: int) -> Tensor:
    """Views [2, B, D, 2, 2] whose slices hold 20 * volume + slice, and 1000 more in the second view."""
    which = torch.arange(B).view(B, 1) * 20 + torch.arange(D)
    return torch.stack([which, which + 1000]).float()[..., None, None].expand(2, B, D, 2, 2)


@pytest.mark.parametrize("lambda_inter", [1.0, 0.0])
@pytest.mark.parametrize("with_images", [True, False])
def test_the_same_slice_of_two_views_is_a_pair(with_images: bool, lambda_inter: float) -> None:
    picked = torch.tensor([[3, 0, 3], [1, 0, 1], [4, 2, 0]])  # repeats where a volume has too few slices
    mask = torch.arange(5) < torch.tensor([[4], [2], [5]])
    slice_index = (torch.tensor([[10], [20], [30]]) + picked).flatten()
    images = torch.tensor([[500.0, 510.0], [1500.0, 1510.0]])[..., None, None].expand(2, 2, 2, 2)
    more = {"images": images, "image_index": torch.tensor([98, 99])} if with_images else {}
    encoder, intra, inter = Identify(), Capture(), Capture()
    learner = JointClustering(encoder, nn.Identity(), intra, inter, lambda_inter=lambda_inter)
    views = numbered_volumes(3, 5)
    learner(Batch(torch.arange(3), views=views, mask=mask, picked=picked, slice_index=slice_index, **more))
    which = (torch.arange(3).view(3, 1) * 20 + picked).flatten().tolist() + ([500, 510] if with_images else [])
    for view in range(2):
        expected = identity(torch.tensor(which, dtype=torch.float32) + 1000 * view)
        assert_close(intra.z[view], F.normalize(expected, dim=1))
    assert intra.index.tolist() == slice_index.tolist() + ([98, 99] if with_images else [])
    if lambda_inter:
        assert inter.index.tolist() == [0, 1, 2]
        for view in range(2):
            tokens = encoder.tokens.unflatten(0, (2, 3))[view]
            assert_close(tokens[mask], identity(numbered_volumes(3, 5)[view, ..., 0, 0][mask]))
            assert not tokens[~mask].any()
            assert_close(inter.z[view], F.normalize(tokens.sum(dim=1), dim=1))


BATCH = Batch(
    views=torch.rand(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(1)),
    mask=torch.tensor([[True, True, True, True], [True, True, True, False]]),
    index=torch.tensor([1, 0]),
    picked=torch.tensor([[2, 0], [1, 1]]),
    slice_index=torch.tensor([2, 0, 5, 5]),
    images=torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
    image_index=torch.tensor([7, 8, 9]),
    masked=torch.tensor([[[False, True, False, False]] * 2, [[True, False, False, False]] * 2]),
)


@pytest.mark.parametrize(
    ("lambda_intra", "lambda_inter", "lambda_mask", "encoded"),
    [
        (1.0, 0.0, 0.0, 2 * 4 + 2 * 3),  # the picked slices, one of them twice, and the images of two views
        (0.0, 1.0, 0.0, 2 * 7),  # the real slices, no images
        (0.0, 0.0, 1.0, 2 * 7),
        (1.0, 0.0, 1.0, 2 * 7 + 2 * 3),
        (2.0, 0.5, 0.0, 2 * 7 + 2 * 3),
        (2.0, 0.5, 3.0, 2 * 7 + 2 * 3),
    ],
)
def test_lambda_zero_switches_a_branch_and_its_cost_off(
    lambda_intra: float, lambda_inter: float, lambda_mask: float, encoded: int
) -> None:
    torch.manual_seed(0)
    encoder = JointEncoder("resnet18", 32, layers=1, dropout=0.0)
    head, intra, inter = nn.Linear(512, 8), swav(4), swav(4, dim=32)
    learner = JointClustering(encoder, head, intra, inter, lambda_intra, lambda_inter, lambda_mask)
    calls: dict[str, int] = {}
    parts = {"resnet": encoder.encoder, "transformer": encoder.transformer, "intra": intra, "inter": inter}
    for name, part in {**parts, "head": head}.items():
        part.register_forward_hook(
            lambda _, given, __, name=name: calls.__setitem__(name, calls.get(name, 0) + given[0].shape[0])
        )
    losses = learner(BATCH)
    losses["loss"].backward()
    assert calls["resnet"] == encoded
    assert ("head" in calls) == ("intra" in calls) == bool(lambda_intra)
    assert ("inter" in calls) == bool(lambda_inter)
    assert ("transformer" in calls) == bool(lambda_inter or lambda_mask)
    expected = {"intra": lambda_intra, "inter": lambda_inter, "mask": lambda_mask}
    beside = {"interpolation"} if lambda_mask else set()  # what L_mask is compared with
    assert set(losses) == {"loss", *beside, *(name for name, weight in expected.items() if weight)}
    assert float(losses["loss"].detach()) == pytest.approx(
        sum(weight * float(losses[name]) for name, weight in expected.items() if weight), rel=1e-5
    )
    # Whatever asks for a gradient gets one, or DistributedDataParallel would wait for it in vain.
    for name, parameter in learner.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    used = {
        "head.": lambda_intra,
        "intra.": lambda_intra,
        "inter.": lambda_inter,
        "encoder.encoder.": lambda_intra or lambda_inter,
        "encoder.projection.": lambda_inter,
        "encoder.transformer.": lambda_inter or lambda_mask,
        "mask_token": lambda_mask,
        "decoder.": lambda_mask,
    }
    for prefix, wanted in used.items():
        gradients = [p.grad for name, p in learner.named_parameters() if name.startswith(prefix)]
        assert any(g is not None and bool(g.any()) for g in gradients) == bool(wanted), prefix


def test_joint_learner_answers_for_its_objectives() -> None:
    encoder = JointEncoder("resnet18", 32, layers=1)
    learner = JointClustering(encoder, nn.Linear(512, 4), deepcluster(10, 3), swav(4, dim=32, queue_length=4))
    assert learner.fills_memory
    assert [name for name, _ in learner.objectives()] == ["intra", "inter"]
    learner.eval().remember(BATCH)
    bank = learner.memory_state()["intra"]
    assert bank["seen"].nonzero().squeeze(1).tolist() == [0, 2, 5, 7, 8, 9]
    learner.begin_epoch(0)
    assert learner.inter.queue_on
    assert (learner.intra.assignments[0, [0, 2, 5, 7, 8, 9]] >= 0).all()
    learner.load_memory_state({"intra": {name: value * 0 for name, value in bank.items()}, "inter": {}})
    assert not learner.memory_state()["intra"]["seen"].any()


def test_image_clustering_joins_the_crops_of_all_sizes() -> None:
    intra, encoder = Capture(), nn.Module()
    encoder.forward = lambda images: [identity(images.flatten(1).mean(dim=1))[..., None, None]]
    learner = ImageClustering(encoder, nn.Identity(), intra)
    which = torch.arange(20.0).view(5, 4) * 7  # crops x images
    crops = [which[:2, :, None, None].expand(2, 4, 6, 6), which[2:, :, None, None].expand(3, 4, 2, 2)]
    losses = learner(Batch(torch.tensor([3, 1, 4, 9]), crops=crops))
    assert float(losses["loss"]) == 2
    assert intra.index.tolist() == [3, 1, 4, 9]
    assert_close(intra.z, F.normalize(identity(which.flatten()), dim=1).unflatten(0, (5, 4)))


def test_prototypes_decay_but_biases_do_not() -> None:
    matrices, others = parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), swav(5)), 0.1)
    assert [tuple(p.shape) for p in matrices["params"]] == [(2, 3), (5, 8)]
    assert [tuple(p.shape) for p in others["params"]] == [(2,)] * 3
    assert (matrices["weight_decay"], others["weight_decay"], others["adapt"]) == (0.1, 0.0, False)
    assert len(parameter_groups(deepcluster(5, 3), 0.1)[0]["params"]) == 0


# --------------------------------------------------------------------------------------------------------------- sizes


def test_prototype_counts() -> None:
    assert prototype_counts(30, 100, "k") == [30]
    assert prototype_counts([30, 40], 100, "k") == [30, 40]
    assert prototype_counts(0, 100, "k") == [20]
    assert prototype_counts([0, 7], 2500, "k") == [100, 7]
    assert prototype_counts(0, 10_000_000, "k") == [3000]
    assert prototype_counts(0, 1, "k") == [1]
    assert prototype_counts(100, 100, "k") == [100]
    with pytest.raises(UserError, match=r"nmb_prototypes: 101 prototypes are more than the 100 samples"):
        prototype_counts([5, 101], 100, "nmb_prototypes")
    with pytest.raises(UserError, match="nmb_prototypes"):
        prototype_counts([], 100, "nmb_prototypes")


def test_queue_size_and_its_warning_with_numbers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert queue_size(-1, [30, 100], 32, "queue_length") == 192  # six batches: 224 >= 2 * 100 > 192
        assert queue_size(-1, [100], 200, "queue_length") == 0
        assert queue_size(-1, [100], 500, "queue_length") == 0
        assert queue_size(68, [800], 32, "queue_length") == 68  # 100 in all: just enough
        assert queue_size(0, [27], 4, "queue_length") == 0
    with pytest.warns(UserWarning, match=r"32 embeddings .* queue of 67 .* 800 prototypes.*--queue_length 1568"):
        assert queue_size(67, [30, 800], 32, "queue_length") == 67
