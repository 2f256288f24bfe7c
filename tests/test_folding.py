"""The folded slice encoder is the unfolded one, and what is saved stays unfolded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from datasets.batch import Batch
from models import folding
from models.encoder import JointEncoder
from models.folding import FrozenSlices, fold_batch_norm, slices_digest
from models.resnet import GreyResNet
from objectives import MaskedSlices
from training import weights
from utils.options import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")


def lived_in(module: nn.Module) -> nn.Module:
    """BatchNorm as after training: no scale, shift, mean or variance at its initial value."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (norm.weight, 0.5, 1.5),
                (norm.bias, -0.5, 0.5),
                (norm.running_mean, -0.5, 0.5),
                (norm.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return module


def volumes(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_folded_resnet_equals_the_unfolded_one_in_all_stages(arch):
    net = lived_in(GreyResNet(arch)).eval()
    images = volumes(2, 1, 40, 32)
    with torch.no_grad():
        expected, found = net(images), fold_batch_norm(net)(images)
    for stage, other in zip(expected, found, strict=True):
        # fp32 rounding of up to 150 layers, relative to the stage's largest value
        torch.testing.assert_close(other, stage, rtol=0, atol=2e-5 * float(stage.abs().max()))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_embeddings_are_those_of_the_joint_encoder_whatever_the_chunk(chunk, monkeypatch):
    encoder = lived_in(JointEncoder("resnet18", 32, 1)).eval()
    x, mask = volumes(3, 5, 32, 32), torch.arange(5) < torch.tensor([[5], [2], [4]])
    monkeypatch.setitem(folding.CHUNK_PIXELS, "cpu", chunk * 32 * 32)
    found = FrozenSlices(encoder)(x, mask)
    torch.testing.assert_close(found, encoder.tokens(x, mask)[1].detach(), rtol=0, atol=2e-5)
    assert not found.requires_grad
    assert not found[~mask].any()


def test_the_learner_predicts_the_embeddings_of_the_unfolded_network_and_saves_that_one(tmp_path):
    encoder = lived_in(JointEncoder("resnet18", 32, 1))
    loaded = {name: value.clone() for name, value in encoder.encoder.torchvision_state().items()}
    learner = MaskedSlices(encoder).train()
    names = set(learner.state_dict())
    views, mask = volumes(2, 2, 6, 32, 32), torch.ones(2, 6, dtype=torch.bool)
    learner.begin_epoch(0)
    expected = encoder.tokens(views.flatten(0, 1), mask.repeat(2, 1))[1].detach()
    torch.testing.assert_close(learner.targets(views, mask), expected.unflatten(0, (2, 2)), rtol=0, atol=2e-5)

    masked = torch.zeros(2, 2, 6, dtype=torch.bool)
    masked[:, :, 2] = True
    learner(Batch(torch.arange(2), views=views, mask=mask, masked=masked))["loss"].backward()
    assert set(learner.state_dict()) == names
    weights.save_masked(learner, tmp_path / "mask.pth", {})
    saved = torch.load(tmp_path / "mask.pth", weights_only=True)
    for name, value in loaded.items():
        assert torch.equal(saved[f"encoder.{name}"], value), name


def test_weights_that_come_from_a_checkpoint_are_folded_with_the_next_epoch():
    views, mask = volumes(2, 1, 4, 32, 32), torch.ones(1, 4, dtype=torch.bool)
    torch.manual_seed(0)
    learner, other = (MaskedSlices(lived_in(JointEncoder("resnet18", 32, 1))) for _ in range(2))
    learner.begin_epoch(0)
    assert not torch.allclose(learner.targets(views, mask), other.targets(views, mask), atol=1e-2)
    learner.load_state_dict(other.state_dict())
    learner.begin_epoch(1)
    assert torch.equal(learner.targets(views, mask), other.targets(views, mask))


def test_the_digest_changes_with_the_slice_encoder_and_with_nothing_else():
    encoder = JointEncoder("resnet18", 32, 1)
    before = slices_digest(encoder)
    with torch.no_grad():
        encoder.transformer.layers[0].norm1.bias.add_(1)
    assert slices_digest(encoder) == before
    with torch.no_grad():
        encoder.projection.bias[3] += 1e-6
    changed = slices_digest(encoder)
    assert changed != before
    encoder.encoder.bn1.running_mean[0] += 1e-6
    assert slices_digest(encoder) not in (before, changed)
