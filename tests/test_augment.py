"""What datasets/augment.py promises about views and crops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from datasets import augment
from datasets.augment import RANGES, MultiCrop, VolumeViews

POLICIES = ("paper", "strong")
STILL = {"degrees": (0.0, 0.0), "noise_p": 0.0, "bias_p": 0.0, "gamma_p": 0.0, "blur_p": 0.0, "anisotropy_p": 0.0}
STILL_CROPS = STILL | {"crop_bias_p": 0.0, "jitter_p": 0.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def batch(B: int = 3, D: int = 6, S: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random volumes that fill the canvas, all slices real, with the global indices 10, 11, ..."""
    x = torch.from_numpy(np.random.default_rng(seed).random((B, D, S, S), dtype=np.float32))
    return x, torch.ones(B, D, dtype=torch.bool), torch.full((B, 2), S), torch.arange(10, 10 + B)


def mixed_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eight half-precision volumes of 5 to 9 slices, with more voxels than torch leaves to one thread."""
    x, mask, extents, index = batch(B=8, D=9, S=80)
    mask = torch.arange(9) < (5 + torch.arange(8) % 5)[:, None]
    return x.half() * mask[:, :, None, None], mask, extents - torch.arange(8)[:, None], index


@pytest.mark.parametrize("policy", POLICIES)
def test_views_and_crops_are_the_same_bits_in_batches_of_any_size(policy):
    x, mask, extents, index = mixed_batch()
    views, crops = VolumeViews(63, 67, policy, 0), MultiCrop([(33, 29)], [2], [(0.05, 1.0)], policy, 0)
    expected = views(x, mask, extents, index, 0, views=7), crops(x[:, 0], extents, index, 0)[0]
    for rows in ([5, 1, 7, 3, 6], [4]):
        found = views(x[rows], mask[rows], extents[rows], index[rows], 0, 7)
        assert torch.equal(found, expected[0][:, rows])
        found = crops(x[rows, 0], extents[rows], index[rows], 0)[0]
        assert torch.equal(found, expected[1][:, rows])


@pytest.mark.parametrize("policy", POLICIES)
def test_views_and_crops_are_the_same_bits_on_any_number_of_threads(policy):
    """Processes of torchrun have one thread each, a single process has all."""
    x, mask, extents, index = (t[:2] for t in mixed_batch())
    images = F.pad(x, (75, 75, 75, 75))[:, 4]
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        views = VolumeViews(63, 67, policy, 0)(x, mask, extents, index, 0, views=7)
        results += [views, MultiCrop([(183, 189)], [3], [(0.3, 1.0)], policy, 0)(images, extents + 150, index, 0)[0]]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_at_once_as_on_a_gpu_gives_what_one_by_one_gives(policy):
    x, mask, extents, index = mixed_batch()
    views = VolumeViews(63, 67, policy, 0)
    expected, length = views(x, mask, extents, index, 0, 7), mask.sum(1)
    draws = views.draws(80, extents.double().numpy(), length.numpy(), index.tolist(), 0, 7)
    for one, drawn in zip(expected, draws, strict=True):
        out = torch.empty_like(one)
        augment._transform(x, drawn, out, length, together=len(x))
        assert_close(out, one, atol=1e-6, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_reads_from_the_device(policy):
    """Tensors on the meta device have no values: whoever asked for one, and so had to wait on a GPU, would fail."""
    x, mask, extents, index = mixed_batch()
    out = VolumeViews(63, 67, policy, 0)(x.to("meta"), mask, extents, index, 0)
    assert out.shape == (2, 8, 9, 63, 67)
    assert out.is_meta
    crops = MultiCrop([(63, 67), (20, 20)], [2, 3], [(0.3, 1.0), (0.05, 0.3)], policy, 0)
    assert all(c.is_meta for c in crops(x[:, 0].to("meta"), extents, index, 0))


def test_paper_gives_the_first_seven_views_seven_different_transforms():
    content, slices = np.full((300, 2), 20.0), np.full(300, 6)
    views = list(VolumeViews(16, 16, "paper", 3).draws(20, content, slices, range(300), epoch=2, views=8))
    which = np.array([applied(p) for p in views])  # [8, 7, 300]
    assert (which.sum(1) == 1).all()
    kinds = which.argmax(1)
    assert (np.sort(kinds[:7], axis=0) == np.arange(7)[:, None]).all()
    assert (kinds[7] == kinds[0]).all()
    assert len(np.unique(kinds[:2], axis=1).T) == 42  # ordered pairs of different ones


def applied(p: dict[str, np.ndarray]) -> np.ndarray:
    """[7, B] which of the seven transforms the draws of `paper` apply, of views of 16 pixels from 20."""
    diagonal = p["theta"][:, [0, 1], [0, 1]]
    upright = (p["theta"][:, 0, 1] == 0) & (p["theta"][:, 1, 0] == 0)
    mirrored = upright & (diagonal < 0).any(1) & (abs(diagonal) == 0.8).all(1)
    return np.stack(
        [
            mirrored,
            ~upright,
            (p["downsampling"] > 1).any(1),
            (p["blur_std"] > 0).any(1),
            p["noise_std"] > 0,
            (p["bias"] != 0).any(1),
            p["log_gamma"] != 0,
        ]
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_stays_zero_and_does_not_touch_real_slices(policy):
    x, mask, extents, index = batch(B=16, D=5)
    index = torch.arange(16)
    views = VolumeViews(16, 16, policy, 0)
    out = views(x, mask, extents, index, 0)
    padded = views(F.pad(x, (0, 0, 0, 0, 0, 4)), F.pad(mask, (0, 4)), extents, index, 0)
    assert (padded[:, :, 5:] == 0).all()
    assert_close(padded[:, :, :5], out, atol=2e-6, rtol=0)


def test_single_slices_and_empty_volumes_work():
    x, _, extents, index = batch(B=8, D=1)
    out = VolumeViews(16, 16, "paper", 0)(x, torch.ones(8, 1, dtype=torch.bool), extents, index, 0, views=20)
    assert (out != x[:, :, 2:18, 2:18]).flatten(2).any(2).all()
    none = torch.zeros(8, 1, dtype=torch.bool)
    assert (VolumeViews(16, 16, "strong", 0)(x * 0, none, extents, index, 0) == 0).all()


@pytest.mark.parametrize("canvas", [60, 61, 59])
def test_paper_is_a_plain_crop_but_for_the_transform(canvas):
    x, mask, extents, _ = batch(B=1, D=2, S=canvas)
    ones = dict.fromkeys(("scale", "downsampling"), (1.0, 1.0))
    zeros = dict.fromkeys(("degrees", "blur_std", "noise_std", "bias", "log_gamma"), (0.0, 0.0))
    neutral = replace(RANGES["paper"], **ones, **zeros)
    side = round(0.8 * canvas)
    top = (canvas - side) // 2
    crop = x[0, :, top : top + side, top : top + side]
    out = VolumeViews(side, side, "paper", 0, neutral)(x, mask, extents, torch.tensor([0]), 0, views=30)[:, 0]
    mirrored = [crop.flip(dims) for dims in ((), (-2,), (-1,), (-2, -1))]
    found = [[torch.equal(view, m) for m in mirrored].index(True) for view in out]
    assert found.count(0) > 15
    assert set(found) - {0}


def marked(extent: tuple[int, int], S: int = 40, B: int = 32) -> tuple[Tensor, Tensor]:
    """[B, S, S] pictures, 0.25 in the content's box and 1 outside of it, and extents."""
    x = torch.ones(B, S, S)
    top, left = ((S - e) // 2 for e in extent)
    x[:, top : top + extent[0], left : left + extent[1]] = 0.25
    return x, torch.tensor(extent).expand(B, 2)


@pytest.mark.parametrize(
    ("extent", "size"), [((40, 40), (32, 32)), ((17, 40), (8, 24)), ((9, 11), (32, 32)), ((1, 7), (8, 24))]
)
def test_crops_without_rotation_stay_in_the_content(extent, size):
    x, extents = marked(extent)
    index = torch.arange(len(x))
    mask = torch.ones(len(x), 1, dtype=torch.bool)
    strong = VolumeViews(*size, "strong", 0, replace(RANGES["strong"], **STILL))
    assert_close(strong(x[:, None], mask, extents, index, 0), torch.full((2, 32, 1, *size), 0.25), atol=1e-4, rtol=0)
    for policy in POLICIES:
        make = MultiCrop([size], [2], [(0.05, 1.0)], policy, 0)
        make.ranges = replace(RANGES["strong"], **STILL_CROPS)
        (crops,) = make(x, extents, index, 0)
        assert_close(crops, torch.full((2, 32, *size), 0.25), atol=1e-4, rtol=0)


def test_crops_reach_all_of_the_content_with_the_asked_area_and_aspect():
    u = augment.Uniforms(0, 0, range(2000), 1)
    content, ones, zeros = np.full((2000, 2), 40.0), np.ones((2000, 2)), np.zeros(2000)
    t = augment.crop_theta(u, 50, content, (24, 24), (0.1, 0.5), ones, zeros, ones < 0)
    columns, rows = t[:, 0, 0] * 50, t[:, 1, 1] * 50
    area = rows * columns / 1600
    assert 0.1 <= area.min() < 0.105
    assert 0.495 < area.max() <= 0.5
    assert 0.75 - 1e-9 <= (columns / rows).min() < 0.76
    assert 1.3 < (columns / rows).max() <= 4 / 3 + 1e-9
    left = (t[:, 0, 2] + 1) * 25 - columns / 2
    assert 5 - 1e-9 <= left.min() < 5.7
    assert 44.3 < (left + columns).max() <= 45 + 1e-9


def test_half_precision_input_and_autocast_do_not_change_the_result():
    x, mask, extents, index = batch()
    x[1], x[2] = 0, 1
    x = x.half()
    views, crops = VolumeViews(16, 16, "strong", 0), MultiCrop([(16, 16)], [2], [(0.3, 1.0)], "strong", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = views(x, mask, extents, index, 0), crops(x[:, 0], extents, index, 0)[0]
    assert torch.equal(a, views(x.float(), mask, extents, index, 0))
    assert torch.equal(b, crops(x[:, 0].float(), extents, index, 0)[0])
    assert ((a >= 0) & (a <= 1)).all()
    assert ((b >= 0) & (b <= 1)).all()


def test_paper_crops_are_mirrored_sideways_only_and_strong_both_ways():
    for policy, vertical in (("paper", 0.0), ("strong", 0.5)):
        make = MultiCrop([(8, 8)], [1], [(0.3, 1.0)], policy, 0)
        u = augment.Uniforms(0, 0, range(1000), 1)
        p = make._draw(u, 20, np.full((1000, 2), 20.0), (8, 8), (0.3, 1.0))
        assert (p["theta"][:, 0, 0] < 0).mean() == pytest.approx(0.5, abs=0.06)
        assert (p["theta"][:, 1, 1] < 0).mean() == pytest.approx(vertical, abs=0.06)
        assert (p["theta"][:, 0, 1] != 0).any() == (policy == "strong")
        assert (p["noise_std"] != 0).mean() == pytest.approx(0.5 if policy == "strong" else 0, abs=0.06)
        assert (p["brightness"] != 0).mean() == pytest.approx(0.8, abs=0.06)
        assert p["blur_std"].max() <= 2 * 8 / 224
