"""The grey ResNet, the deformable transformer over slices, and the projection between them."""

from __future__ import annotations

import pytest
import torch
import torchvision
from tiny import random, shake
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

from models.encoder import JointEncoder, init_orthogonal, init_pca
from models.resnet import GREY_MEAN, GREY_STD, GreyResNet, fold_grey, multi_scale
from models.transformer import DeformableAttention1D, OrdinaryAttention1D, SliceTransformer

WIDTH = 32


def first(length: int, of: int) -> Tensor:
    return (torch.arange(of) < length).unsqueeze(0)


def attention(**options: int) -> DeformableAttention1D:
    """With offsets of several slices, other than a new module's."""
    torch.manual_seed(0)
    module = DeformableAttention1D(WIDTH, **options).eval()
    module.offset_head.weight.data.mul_(20)
    return module


def transformer(attention: str = "deformable", layers: int = 2) -> SliceTransformer:
    torch.manual_seed(0)
    module = SliceTransformer(WIDTH, layers, hidden=48, dropout=0, heads=8, attention=attention)
    for layer in module.layers if attention == "deformable" else ():
        layer.attention.offset_head.weight.data.mul_(20)
    return module.eval()


# ---- grey ResNet


@torch.no_grad()
def test_folded_resnet_equals_torchvision_on_the_repeated_image_and_so_do_its_exported_weights() -> None:
    torch.manual_seed(0)
    colour = shake(torchvision.models.resnet18()).eval()
    state = {name: value for name, value in colour.state_dict().items() if not name.startswith("fc.")}
    assert state["conv1.weight"].std(dim=1).min() > 0  # three different channels
    grey, back = GreyResNet("resnet18").eval(), torchvision.models.resnet18().eval()
    grey.load_state_dict(state | {"conv1.weight": fold_grey(state["conv1.weight"])}, strict=True)
    back.load_state_dict(grey.torchvision_state(), strict=False)
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    found, repeated = grey(images), ((images - GREY_MEAN) / GREY_STD).repeat(1, 3, 1, 1)
    assert [tuple(stage.shape) for stage in found] == [(3, 64, 8, 8), (3, 128, 4, 4), (3, 256, 2, 2), (3, 512, 1, 1)]
    for other in (colour, back):
        stages = create_feature_extractor(other, [f"layer{k}" for k in (1, 2, 3, 4)])(repeated)
        for ours, theirs in zip(found, stages.values(), strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    means = [stage.mean(dim=(2, 3)) for stage in found]
    assert_close(multi_scale(found), torch.cat([mean / mean.norm(dim=1, keepdim=True) for mean in means], dim=1))


# ---- deformable attention


@torch.no_grad()
@pytest.mark.parametrize("attention", ["deformable", "ordinary"])
@pytest.mark.parametrize("real", [1, 2, 10])
def test_padded_slices_and_what_they_hold_change_nothing(real: int, attention: str) -> None:
    net, alone = transformer(attention), random(1, real, WIDTH)
    expected = net(alone, first(real, real))
    assert expected.std() > 0.1
    for total in (real + 1, 16, 32):
        padded = torch.cat([alone, 1e3 * random(1, total - real, WIDTH, seed=total)], dim=1)
        found = net(padded, first(real, total))
        assert_close(found[:, :real], expected, rtol=0, atol=1e-5)
        assert not found[:, real:].any()
        layer = net.layers[0].attention  # alone: its caller does not clear the padded slices for it
        assert_close(layer(padded, first(real, total))[:, :real], layer(alone, first(real, real)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("D", [1, 5, 64])
def test_maps_of_any_number_of_slices(D: int) -> None:
    net, length = transformer(), max(1, D - 2)
    mask = torch.cat([first(D, D), first(length, D)])
    with torch.no_grad():
        out, maps = net(random(2, D, WIDTH), mask), net.maps(random(2, D, WIDTH), mask)
    points = -(-D // 4)
    assert out.shape == (2, D, WIDTH)
    assert out.isfinite().all()
    assert len(maps) == 2
    for positions, weights in maps:
        assert positions.shape == (2, 8, points)
        assert weights.shape == (2, 8, D, points)
        assert_close(weights.sum(dim=-1), torch.ones(2, 8, D))
        assert positions.min() >= 0
        assert positions[0].max() <= D - 1
        assert positions[1].max() <= length - 1
        assert not weights[1, :, :, -(-length // 4) :].any()  # points whose window holds no real slice


def plain_attention(module: DeformableAttention1D, x: Tensor, mask: Tensor) -> Tensor:
    """The same formula for one volume, group and head at a time, by indexing and without tricks."""
    out = torch.zeros_like(x)
    width, per_group = module.width, module.heads // module.groups
    for b, length in enumerate(mask.sum(dim=1).tolist()):
        q = module.to_q(x[b]) * mask[b].unsqueeze(1)
        padded = nn.functional.pad(q, (0, 0, 0, -len(q) % module.stride))
        offsets = module.offset_head(nn.functional.gelu(module.offset_conv(padded.T)))  # [G, n]
        heads = []
        points = -(-length // module.stride)
        centres = torch.arange(points) * module.stride + (module.stride - 1) / 2
        positions = (centres + module.offset_scale * offsets[:, :points].tanh()).clamp(0, length - 1)
        below = positions.floor().long().clamp(max=max(length - 2, 0))
        part = (positions - below).unsqueeze(2)
        groups = x[b].unflatten(1, (module.groups, width))
        sampled = [
            groups[below[g], g] * (1 - part[g]) + groups[(below[g] + 1).clamp(max=len(q) - 1), g] * part[g]
            for g in range(module.groups)
        ]
        keys, values = module.to_kv(torch.cat(sampled, dim=1)).chunk(2, dim=1)
        size = x.shape[2] // module.heads
        for h in range(module.heads):
            own = slice(h * size, (h + 1) * size)
            distance = torch.arange(len(q)).unsqueeze(1) - positions[h // per_group]
            bias = module.bias((distance.sign() * distance.abs().log1p()).unsqueeze(2))[..., h % per_group]
            scores = q[:, own] @ keys[:, own].T / size**0.5 + bias
            heads.append(scores.softmax(dim=1) @ values[:, own])
        out[b] = module.to_out(torch.cat(heads, dim=1))
    return out


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2)])
def test_attention_and_its_gradients_equal_the_plain_formula(heads: int, groups: int) -> None:
    module = shake(attention(heads=heads, groups=groups))
    mask = torch.cat([first(19, 19), first(10, 19)])
    weight = random(2, 19, WIDTH, seed=1) * mask.unsqueeze(2)
    found = {}
    for formula in (module, lambda x, mask: plain_attention(module, x, mask)):
        module.zero_grad()
        x = random(2, 19, WIDTH).requires_grad_()
        out = formula(x, mask)
        (out * weight).sum().backward()
        found[formula] = out[mask], x.grad, {name: p.grad.clone() for name, p in module.named_parameters()}
    ours, plain = found.values()
    assert_close(ours, plain, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_the_position_bias_equal_the_network_at_once(dtype: torch.dtype) -> None:
    """Also under autocast, where the network by itself would compute in half precision."""
    module = shake(attention(heads=8, groups=2))
    signed_log, weight = random(2, 2, 100, 50), random(2, 8, 100, 50, seed=1)  # 20,000 scalars are three blocks
    found = []
    for blocks in (True, False):
        module.zero_grad()
        leaf = signed_log.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=blocks and dtype == torch.bfloat16):
            plain = module.bias(leaf.unsqueeze(-1)).permute(0, 1, 4, 2, 3).flatten(1, 2)
            out = module.position_bias(leaf) if blocks else plain
        (out * weight).sum().backward()
        found.append((out, leaf.grad, [p.grad.clone() for p in module.bias.parameters()]))
    assert_close(*found, rtol=1e-4, atol=1e-3)


def test_ordinary_attention_equals_torchs_on_the_real_slices() -> None:
    torch.manual_seed(0)
    ours = OrdinaryAttention1D(WIDTH, heads=8)
    theirs = nn.MultiheadAttention(WIDTH, 8, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.to_q.weight, ours.to_kv.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([ours.to_q.bias, ours.to_kv.bias]).detach()
    theirs.out_proj.load_state_dict(ours.to_out.state_dict())
    x, mask = random(2, 9, WIDTH), torch.cat([first(9, 9), first(5, 9)])
    expected, _ = theirs(x, x, x, key_padding_mask=~mask)
    assert_close(ours(x, mask)[mask], expected[mask], rtol=1e-5, atol=1e-6)


def test_mean_is_the_mean_of_the_slice_embeddings_and_nothing_else() -> None:
    joint = JointEncoder("resnet18", WIDTH, attention="mean").eval()
    tokens, mask = random(2, 7, WIDTH), torch.cat([first(7, 7), first(4, 7)])
    expected = torch.stack([tokens[0].mean(dim=0), tokens[1, :4].mean(dim=0)])
    assert_close(joint.holistic(tokens, mask), nn.functional.normalize(expected, dim=1))
    assert not joint.transformer.state_dict()
    assert joint.transformer.maps(tokens, mask) == []


def test_padded_slices_never_reach_batch_norm() -> None:
    torch.manual_seed(0)
    encoder = JointEncoder("resnet18", WIDTH, layers=1, dropout=0.0).train()
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    seen = []
    for total, fill in ((5, 0.0), (8, 1e4), (8, float("nan"))):
        volumes, mask = torch.full((2, total, 32, 32), fill), torch.arange(total) < torch.tensor([[5], [3]])
        volumes[mask] = random(8, 32, 32).sigmoid()
        encoder.load_state_dict(start)
        features, tokens = encoder.tokens(volumes, mask)
        statistics = {name: value.clone() for name, value in encoder.state_dict().items() if "running" in name}
        seen.append((features.detach(), tokens[:, :5].detach(), statistics))
        assert not tokens[~mask].any()
        assert tokens[mask].norm(dim=1).min() > 0
    assert any((seen[0][2][name] != start[name]).any() for name in seen[0][2])
    for other in seen[1:]:
        assert_close(other, seen[0], rtol=0, atol=0)


# ---- starts of the slice projection


@torch.no_grad()
def test_orthogonal_start() -> None:
    torch.manual_seed(0)
    projection = nn.Linear(96, 24)
    init_orthogonal(projection)
    assert_close(projection.weight @ projection.weight.T, 24 * torch.eye(24), rtol=0, atol=1e-4)  # 96 / 4
    assert not projection.bias.any()
    joined = nn.functional.normalize(random(500, 4, 24), dim=2).flatten(1)
    assert projection(joined).square().mean() == pytest.approx(1, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize(("samples", "rank"), [(200, 40), (200, 5), (9, 40), (2, 40)])
def test_pca_start_whitens_nothing_but_centres_decorrelates_and_scales(samples: int, rank: int) -> None:
    """40 features of the given rank -> 16 outputs, also where there are fewer samples or directions than outputs."""
    features = random(samples, rank) * torch.linspace(3, 1, rank) @ random(rank, 40, seed=1) + 5
    projection = nn.Linear(40, 16)
    kept = init_pca(projection, features)
    out = projection(features)
    assert projection.weight.isfinite().all()
    assert out.mean(dim=0).abs().max() < 1e-4
    assert out.square().mean() == pytest.approx(1, rel=1e-3)
    covariance = out.T @ out / samples
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-3
    assert (covariance.diag().diff() < 1e-3).all()  # by falling variance
    gram = projection.weight @ projection.weight.T
    assert_close(gram, gram[0, 0] * torch.eye(16), rtol=0, atol=1e-4 * gram[0, 0].item())
    values = torch.linalg.eigvalsh(torch.cov(features.double().T)).flip(0)
    assert kept == pytest.approx(float(values[:16].sum() / values.sum()), abs=1e-4)


@torch.no_grad()
def test_pca_start_on_equal_slices_stays_finite() -> None:
    projection = nn.Linear(40, 16)
    init_pca(projection, torch.ones(6, 40))
    out = projection(torch.ones(6, 40) + 0.01 * random(6, 40))
    assert out.isfinite().all()
    assert out.abs().max() < 1e3
