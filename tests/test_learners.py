"""The three stages' learners: masked slices, joint clustering, image clustering, and the folded slice encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import random, shake, unit
from torch import Tensor, nn
from torch.testing import assert_close

from datasets.batch import Batch
from datasets.loaders import draw_masks
from models import folding
from models.encoder import JointEncoder
from models.folding import FrozenSlices, slices_digest
from objectives import JointClustering, MaskedSlices, PositionContrast, SwAV
from objectives.masked import interpolate_masked, masked_loss
from training import weights

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- masked slices


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


@pytest.mark.parametrize("style", ["random", "span"])
def test_masks_hide_so_many_real_slices_and_are_a_pure_function(style: str) -> None:
    def masks(ratio: float, order: slice | Tensor = slice(None), **at: int) -> Tensor:
        seed, epoch, view = ({"seed": 0, "epoch": 0, "view": 1} | at).values()
        return draw_masks(LENGTHS[order], INDEX[order], ratio, style, seed, epoch, view, 32)

    counts = {0.1: [0, 1, 1, 1, 3, 1], 0.5: [0, 1, 2, 5, 15, 4], 1.0: [0, 1, 2, 9, 29, 6]}
    for ratio, expected in counts.items():  # 0.1 * 30 is 3, not 3.0000000000000004 rounded up; one slice stays visible
        hidden = masks(ratio)
        assert hidden.sum(dim=1).tolist() == expected
        assert not (hidden & (torch.arange(32) >= LENGTHS.unsqueeze(1))).any()
        breaks = hidden.int().diff(dim=1, prepend=torch.zeros(6, 1), append=torch.zeros(6, 1)).abs().sum(dim=1)
        assert style == "random" or breaks.max() <= 2
    torch.manual_seed(99)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    assert torch.equal(masks(0.3, order), masks(0.3)[order])
    for other in ({"seed": 1}, {"epoch": 1}, {"view": 2}):
        assert not torch.equal(masks(0.3), masks(0.3, **other))
    assert sum(masks(0.3, epoch=epoch)[3].int() for epoch in range(60))[:10].min() > 0  # everywhere at some time


class Oracle(nn.Module):
    """A transformer that knows the answer, and how wrong to be at every slice."""

    def __init__(self, targets: Tensor, error: Tensor) -> None:
        super().__init__()
        self.answer, self.saw = targets + error.unsqueeze(-1), None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.saw = x
        return self.answer


def test_masked_loss_counts_masked_slices_only() -> None:
    targets, token = random(2, 6, 3), torch.tensor([5.0, 6.0, 7.0])
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    masked = torch.zeros(2, 6, dtype=torch.bool)
    masked[0, [1, 2, 5]] = masked[1, 0] = True
    batch = Batch(torch.arange(2), mask=mask, masked=masked[None])
    oracle = Oracle(targets, torch.zeros(2, 6))
    losses = masked_loss(oracle, token, nn.Identity(), targets[None], batch)
    assert losses["mask"].item() == 0
    assert_close(oracle.saw[masked], token.expand(4, 3))
    assert torch.equal(oracle.saw[~masked], targets[~masked])
    guess = interpolate_masked(targets, mask & ~masked)[masked] - targets[masked]
    assert float(losses["interpolation"]) == pytest.approx(float(guess.square().mean()), rel=1e-5)
    error = torch.where(masked, 2.0, 100.0)  # 100 where it must not matter
    error[1, 0] = 4.0
    losses = masked_loss(Oracle(targets, error), token, nn.Identity(), targets[None], batch)
    assert float(losses["mask"].detach()) == pytest.approx((3 * 2**2 + 4**2) / 4)
    found = masked_loss(oracle, token, nn.Identity(), targets[None], batch, (heads := nn.Linear(3, 5)), unit(5, 3))
    nearest = (targets[masked] @ unit(5, 3).T).argmax(dim=1)
    assert_close(found["cluster"], F.cross_entropy(heads(targets[masked]), nearest))
    assert float(found["average"]) == pytest.approx(float(targets[masked].square().mean()), rel=1e-5)
    masked[:], learned = False, nn.Linear(3, 3)  # volumes of one slice: 0, and not nan
    losses = masked_loss(Oracle(targets, error), token, learned, targets[None], batch)
    losses["mask"].backward()
    assert (losses["mask"].item(), float(losses["interpolation"])) == (0, 0)
    assert learned.weight.grad.isfinite().all()


# ---- joint clustering


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


def test_the_same_slice_of_two_views_is_a_pair() -> None:
    picked = torch.tensor([[3, 0, 3], [1, 0, 1], [4, 2, 0]])  # repeats where a volume has too few slices
    mask = torch.arange(5) < torch.tensor([[4], [2], [5]])
    slice_index = (torch.tensor([[10], [20], [30]]) + picked).flatten()
    images = torch.tensor([[500.0, 510.0], [1500.0, 1510.0]])[..., None, None].expand(2, 2, 2, 2)
    more = {"images": images, "image_index": torch.tensor([98, 99])}
    encoder, intra, inter = Identify(), Capture(), Capture()
    views = numbered_volumes(3, 5)
    batch = Batch(torch.arange(3), views=views, mask=mask, picked=picked, slice_index=slice_index, **more)
    JointClustering(encoder, nn.Identity(), intra, inter)(batch)
    which = [*(torch.arange(3).view(3, 1) * 20 + picked).flatten().tolist(), 500, 510]
    for view in range(2):
        expected = identity(torch.tensor(which, dtype=torch.float32) + 1000 * view)
        assert_close(intra.z[view], F.normalize(expected, dim=1))
        tokens = encoder.tokens.unflatten(0, (2, 3))[view]
        assert_close(tokens[mask], identity(views[view, ..., 0, 0][mask]))
        assert not tokens[~mask].any()
        assert_close(inter.z[view], F.normalize(tokens.sum(dim=1), dim=1))
    assert intra.index.tolist() == [*slice_index.tolist(), 98, 99]
    assert inter.index.tolist() == [0, 1, 2]


BATCH = Batch(
    views=torch.rand(2, 2, 4, 32, 32, generator=torch.Generator().manual_seed(1)),
    mask=torch.tensor([[True, True, True, True], [True, True, True, False]]),
    index=torch.tensor([1, 0]),
    picked=torch.tensor([[2, 0], [1, 1]]),
    slice_index=torch.tensor([2, 0, 5, 5]),
    images=torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)),
    image_index=torch.tensor([7, 8, 9]),
    masked=torch.tensor([[[False, True, False, False]] * 2, [[True, False, False, False]] * 2]),
    rows=torch.tensor([0, 1, 2, 3, 4, 5, 6]),
    hidden=torch.rand(2, 4, 2, 2, generator=torch.Generator().manual_seed(3)) < 0.5,
    place=torch.tensor([1.0, 0.0, 0.5, 0.5, torch.inf, torch.inf, torch.inf]),
    group=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
)


@pytest.mark.parametrize(
    ("weighted", "encoded"),
    [
        ({"intra": 1.0}, 2 * 4 + 2 * 3),  # the picked slices, one of them twice, and the images of two views
        ({"inter": 1.0, "intra": 0.0}, 2 * 7),  # the real slices, no images
        ({"mask": 1.0}, 2 * 7),
        ({"position": 1.0}, 2 * 4 + 2 * 3),
        ({"recon": 1.0}, 7),
        ({"intra": 2.0, "inter": 0.5, "position": 1.5, "recon": 0.2, "mask": 3.0}, 2 * 7 + 2 * 3 + 7),
    ],
)
def test_lambda_zero_switches_a_branch_and_its_cost_off(weighted: dict[str, float], encoded: int) -> None:
    weighted = {name: weight for name, weight in weighted.items() if weight}
    torch.manual_seed(0)
    encoder = JointEncoder("resnet18", 32, layers=1, dropout=0.0)
    head, intra, inter = nn.Linear(512, 8), SwAV(8, [4]), SwAV(32, [4])
    position = PositionContrast(nn.Linear(512, 8), 0.3, 0.1)
    learner = JointClustering(encoder, head, intra, inter, position, weighted)
    given: dict[str, list[int]] = {"resnet": [], "transformer": []}
    for name, sizes in given.items():
        getattr(encoder, name).register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
    losses = learner(BATCH)
    losses["loss"].backward()
    assert sum(given["resnet"]) == encoded
    assert bool(given["transformer"]) == bool(weighted.keys() & {"inter", "recon", "mask"})
    assert losses.keys() - {"loss", "interpolation", "average"} == weighted.keys()
    total = sum(weight * losses[name] for name, weight in weighted.items())
    assert_close(losses["loss"], total)
    # Whatever asks for a gradient gets one, or DistributedDataParallel would wait for it in vain; the rest gets none.
    for name, parameter in learner.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    used = {"intra.": "intra", "inter.": "inter", "position.": "position", "unet.": "recon", "decoder.": "mask"}
    learning = [name for name, parameter in learner.named_parameters() if parameter.grad is not None]
    for prefix, wanted in used.items():
        assert any(name.startswith(prefix) for name in learning) == (wanted in weighted), prefix


def test_a_frozen_resnet_keeps_its_weights_and_statistics_while_the_rest_learns() -> None:
    encoder = JointEncoder("resnet18", 32, layers=1)
    before = {name: value.clone() for name, value in encoder.resnet.state_dict().items()}
    learner = JointClustering(encoder, nn.Linear(512, 8), SwAV(8, [4]), SwAV(32, [4]), freeze=True).train()
    learner(BATCH)["loss"].backward()
    assert_close(dict(encoder.resnet.state_dict()), before, rtol=0, atol=0)
    learning = {name.split(".")[0] for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert learning == {"projection", "transformer"}


# ---- the folded slice encoder


@pytest.mark.parametrize(("arch", "chunk"), [("resnet18", 1), ("resnet18", 1000), ("resnet50", 3)])
def test_embeddings_are_those_of_the_joint_encoder_whatever_the_chunk(arch, chunk, monkeypatch):
    encoder = shake(JointEncoder(arch, 32, 1)).eval()
    x, mask = random(3, 5, 32, 32).sigmoid(), torch.arange(5) < torch.tensor([[5], [2], [4]])
    monkeypatch.setitem(folding.CHUNK_PIXELS, "cpu", chunk * 32 * 32)
    found = FrozenSlices(encoder)(x, mask)
    torch.testing.assert_close(found, encoder.tokens(x, mask)[1].detach(), rtol=0, atol=2e-5)
    assert not found.requires_grad
    assert not found[~mask].any()


def test_the_learner_predicts_the_embeddings_of_the_unfolded_network_and_saves_that_one(tmp_path):
    encoder = shake(JointEncoder("resnet18", 32, 1))
    loaded = {name: value.clone() for name, value in encoder.resnet.torchvision_state().items()}
    learner = MaskedSlices(encoder).train()
    names = set(learner.state_dict())
    views, mask = random(2, 2, 6, 32, 32).sigmoid(), torch.ones(2, 6, dtype=torch.bool)
    learner.begin_epoch(0)
    expected = encoder.tokens(views.flatten(0, 1), mask.repeat(2, 1))[1].detach()
    torch.testing.assert_close(learner.targets(views, mask), expected.unflatten(0, (2, 2)), rtol=0, atol=2e-5)

    masked = torch.zeros(2, 2, 6, dtype=torch.bool)
    masked[:, :, 2] = True
    learner(Batch(torch.arange(2), views=views, mask=mask, masked=masked))["loss"].backward()
    assert set(learner.state_dict()) == names
    frozen = [name for name, parameter in learner.named_parameters() if parameter.grad is None]
    assert frozen == [name for name in frozen if name.startswith(("encoder.encoder.", "encoder.projection."))]
    assert learner.mask_token.grad.norm() > 0
    weights.save(learner, tmp_path / "mask.pth", {})
    saved = torch.load(tmp_path / "mask.pth", weights_only=True)
    for name, value in loaded.items():
        assert torch.equal(saved[f"encoder.{name}"], value), name
    encoder.resnet.conv1.weight.data.mul_(2)  # as from a checkpoint
    expected = encoder.tokens(views.flatten(0, 1), mask.repeat(2, 1))[1].detach()
    learner.begin_epoch(1)
    torch.testing.assert_close(learner.targets(views, mask), expected.unflatten(0, (2, 2)), rtol=0, atol=2e-5)


def test_the_digest_changes_with_the_slice_encoder_and_with_nothing_else():
    encoder = JointEncoder("resnet18", 32, 1)
    digests = [slices_digest(encoder)]
    for changed in (encoder.projection.bias, encoder.resnet.bn1.running_mean, encoder.transformer.layers[0].norm1.bias):
        changed.data[3] += 1e-6
        digests.append(slices_digest(encoder))
    assert len({*digests[:3]}) == 3
    assert digests[2] == digests[3]
