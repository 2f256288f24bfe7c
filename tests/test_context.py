"""What carries positions and neighbours into the slice encoder: positional contrast, and L_recon with its decoder."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import run, shake, unit
from torch import nn
from torch.testing import assert_close

from datasets.batch import Batch
from datasets.loaders import draw_hidden
from models.encoder import JointEncoder, real_rows
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet
from models.unet import UNetDecoder, widen_stem
from objectives.position import PositionContrast
from objectives.recon import recon_loss
from training import weights

INF = math.inf


def test_positional_contrast_is_infonce_with_near_slices_as_positives() -> None:
    """Against loops over the definition: three volumes of two groups, one image."""
    z = unit(2, 6, 8, seed=1)
    place, group = [0.0, 0.1, 1.0, 0.05, 0.05, INF], [0, 0, 0, 0, 1, 2]
    batch = Batch(torch.arange(6), place=torch.tensor(place), group=torch.tensor(group))
    found = PositionContrast(nn.Identity(), 0.1, 0.2)(z, batch, None)
    every = [(v, i) for i in range(6) for v in range(2)]
    losses = []
    for v, i in every:
        if math.isinf(place[i]):
            continue
        rest = [(w, j) for w, j in every if (w, j) != (v, i)]
        scores = torch.stack([z[v, i] @ z[w, j] / 0.2 for w, j in rest])
        near = [j == i or (group[i] == group[j] and abs(place[i] - place[j]) < 0.1) for _, j in rest]
        losses.append(-scores.log_softmax(0)[torch.tensor(near)].mean())
    assert_close(found, torch.stack(losses).mean())
    images = Batch(torch.arange(6), place=torch.full((6,), INF), group=torch.zeros(6))
    assert float(PositionContrast(nn.Identity(), 0.1, 0.2)(z, images, None)) == 0


def test_hidden_blocks_have_their_share_and_are_a_function_of_the_volume() -> None:
    lengths, index = torch.tensor([10, 4, 1]), torch.tensor([3, 8, 1])
    hidden = draw_hidden(lengths, index, 60, 32, 0.6, 0.25, 16, seed=0, epoch=2, slices=10)
    assert hidden.shape == (3, 10, 4, 2)
    whole = hidden.flatten(2).all(2)
    assert whole.sum(1).tolist() == [2, 1, 0]
    assert (hidden.flatten(2).sum(2)[0][~whole[0]] == 5).all()  # 0.6 * 8
    assert not hidden[1, 4:].any()
    other = draw_hidden(lengths[[1]], index[[1]], 60, 32, 0.6, 0.25, 16, seed=0, epoch=2, slices=10)
    assert torch.equal(other[0], hidden[1])
    assert not torch.equal(draw_hidden(lengths, index, 60, 32, 0.6, 0.25, 16, 0, 3, 10), hidden)


def parts(seed: int = 0) -> tuple[JointEncoder, UNetDecoder]:
    torch.manual_seed(seed)
    encoder = JointEncoder("resnet18", 32, layers=1, dropout=0.0)
    return encoder, shake(UNetDecoder(encoder.resnet, 1, 32), seed)


def test_recon_counts_hidden_pixels_only_and_neighbours_reach_a_slice_that_is_hidden_whole() -> None:
    encoder, unet = parts()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    hidden = torch.zeros(2, 5, 4, 4, dtype=torch.bool)
    hidden[0, 2] = True
    views = torch.rand(1, 2, 5, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = Batch(torch.arange(2), views=views, mask=mask, rows=real_rows(mask), hidden=hidden)
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    loss = recon_loss(encoder.train(), unet, batch, statistics_move=False)
    assert_close(dict(encoder.named_buffers()), before)
    loss.backward()
    seen = views.grad[0].abs().amax((2, 3)) > 0
    assert seen.tolist() == [
        [True] * 5,
        [True] * 3 + [False] * 2,
    ]  # by BatchNorm
    encoder.eval()
    views.grad = None
    recon_loss(encoder, unet, batch, statistics_move=False).backward()
    assert (views.grad[0].abs().amax((2, 3)) > 0).tolist() == [[True] * 5, [False] * 5]  # by f_inter alone
    # A decoder that says nothing is wrong by the distance of the hidden pixels from the mean grey.
    nn.init.zeros_(unet.head.weight), nn.init.zeros_(unet.head.bias)
    found = recon_loss(encoder, unet, batch, statistics_move=False)
    assert_close(found, ((views.detach()[0, 0, 2] - GREY_MEAN) / GREY_STD).square().mean())


def test_a_new_context_map_changes_nothing_and_a_stem_for_channels_keeps_the_features() -> None:
    encoder, _ = parts()
    encoder.eval()
    images, mask = torch.rand(4, 1, 64, 64), torch.ones(1, 4, dtype=torch.bool)
    unet = UNetDecoder(encoder.resnet, 3, 32).eval()
    stages = encoder.resnet(images, stem=True)
    context = encoder.cells(stages[1:], real_rows(mask), mask)
    assert context.shape == (4, 2, 2, 32)
    assert unet(stages).shape == (4, 3, 64, 64)
    assert torch.equal(unet(stages), unet(stages, context))
    assert_close(encoder.resnet(images), stages[1:])
    wide = GreyResNet("resnet18").eval()
    wide.load_state_dict(encoder.resnet.state_dict())
    widen_stem(wide, 4)
    assert_close(wide(images.repeat(1, 4, 1, 1))[-1], stages[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["swav", "deepcluster"])
def test_every_loss_of_stage_3_trains_and_its_decoder_is_what_segmentation_starts_from(data, tmp_path, method) -> None:
    chosen = {"lambda_recon": 1.0, "position_threshold": 0.2, "hidden_block": 8, "epochs": 1}
    state = run(f"ssl_{method}3D", data, tmp_path, **chosen)
    resnet = GreyResNet("resnet18")
    plain, contextual = UNetDecoder(resnet, 3), UNetDecoder(resnet, 3, 32)
    assert weights.load_unet(plain, tmp_path / f"weights/{method}3D.pth")
    assert weights.load_unet(contextual, tmp_path / f"weights/{method}3D.pth")
    assert torch.equal(plain.blocks[2].convs[0].weight, state["unet.blocks.2.convs.0.weight"])
    assert torch.equal(contextual.from_inter.weight, state["unet.from_inter.weight"])
    assert contextual.from_inter.weight.abs().max() > 0
    assert not weights.load_unet(plain, tmp_path / f"weights/{method}3D_encoder.pth")
    stage_1 = run(f"ssl_{method}2D", data, tmp_path, position_threshold=0.2, epochs=1)
    assert "conv1.weight" in stage_1
