"""The seven transforms against TorchIO's deterministic ones, given the same parameters.

On a smooth random volume, where interpolation errors are small and wrong axes or signs large.
TorchIO's axes are [channel, W, H, D], ours [batch, D, H, W]; with a spacing of 1 mm its millimetres are voxels.
"""

import numpy as np
import pytest
import torch
import torchio as tio
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp, kurtosis
from torch import Tensor
from torch.testing import assert_close

from datasets import transforms
from datasets.augment import RANGES, window_theta

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def volume() -> Tensor:
    """[24, 40, 36], 0 to 1, three different sides."""
    x = gaussian_filter(np.random.default_rng(0).random((24, 40, 36)), 2.0, mode="constant")
    return torch.from_numpy((x - x.min()) / (x.max() - x.min())).float()


def theirs(transform: tio.Transform, x: Tensor) -> Tensor:
    """A TorchIO transform of [D, H, W]."""
    return transform(x.permute(2, 1, 0)[None])[0].permute(2, 1, 0)


def square(x: Tensor) -> Tensor:
    """[D, S, S]: in-plane geometry is defined on a square canvas."""
    side = min(x.shape[1:])
    return x[:, :side, :side].contiguous()


def whole(side: int, scale=(1.0, 1.0), degrees: float = 0.0, flips=(False, False)) -> Tensor:
    """theta of the whole canvas, magnified by `scale` (rows, columns) and turned."""
    centre, window = np.full((1, 2), side / 2), side / np.array([scale])
    return torch.from_numpy(window_theta(side, centre, window, np.array([degrees]), np.array([flips])))


@pytest.mark.parametrize(("flips", "axes"), [((True, False), 1), ((False, True), 0), ((True, True), (0, 1))])
def test_flip_is_torchios_exactly(volume, flips, axes):
    x = square(volume)
    ours = transforms.resample(x[None], whole(x.shape[1], flips=flips), *x.shape[1:])[0]
    assert torch.equal(ours, theirs(tio.Flip(axes), x))


@pytest.mark.parametrize(
    ("scale", "degrees"),
    [((1.0, 1.0), 10.0), ((1.1, 0.9), 0.0), ((0.9, 1.08), -7.0), ((1.1, 1.05), 4.0)],
)
def test_affine_is_torchios_inside_and_differs_by_the_fading_edge_only(volume, scale, degrees):
    x = square(volume)
    side = x.shape[1]
    theta = whole(side, scale, degrees)
    ours = transforms.resample(x[None], theta, side, side)[0]
    # A positive angle turns the other way there; drawn angles are symmetric about 0.
    affine = tio.Affine((scale[1], scale[0], 1), (0, 0, -degrees), (0, 0, 0), default_pad_value=0)
    other = theirs(affine, x)
    # How much of every voxel comes from inside the picture. Beyond the centres of the outermost voxels ours fades to
    # zero over one voxel, whereas SimpleITK repeats them for half a voxel and is zero then.
    share = transforms.resample(torch.ones_like(x)[None], theta, side, side)[0]
    inside, outside = share > 1 - 1e-5, share < 1e-5
    # Positions are float32 here and float64 there: 1e-5 voxels apart, times a slope of at most 1 per voxel.
    assert_close(ours[inside], other[inside], atol=5e-5, rtol=0)
    assert (ours[outside] == 0).all()
    assert (other[outside] == 0).all()
    edge = ~inside & ~outside
    assert inside.float().mean() > 0.75
    assert edge.float().mean() < 4 / side * 1.2
    # On the edge ours is `share` times what stands there, theirs all or nothing of it.
    assert ((ours - other)[edge].abs() <= 0.5 * x.max() + 1e-4).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.53, 2.31, 3.73, 4.61])
def test_anisotropy_is_torchios_but_for_its_black_ends(volume, axis, factor):
    factors = torch.ones(1, 3)
    factors[0, axis] = factor
    ours = transforms.anisotropy(volume[None], factors)[0].movedim(axis, 0)
    other = theirs(tio.RandomAnisotropy(axes=2 - axis, downsampling=(factor, factor)), volume).movedim(axis, 0)
    n = volume.shape[axis]  # whole factors would put coarse voxels just between two, and rounding would decide
    beyond = (torch.arange(n) - (n - 1) / 2).abs() - int(n / factor) * factor / 2  # the ends of the coarse voxels
    covered, outside = beyond < -1e-6, beyond > 1e-6  # a voxel exactly there may fall on either side
    # The same voxels are kept and the same weights used, in float32 here and float64 there.
    assert_close(ours[covered], other[covered], atol=2e-6, rtol=0)
    # Up to half a coarse voxel at either end, which TorchIO sets to zero and ours continues.
    assert outside.sum() < factor + 1
    assert (other[outside] == 0).all()
    x, outermost = volume.movedim(axis, 0), round((n - 1) / 2 - (int(n / factor) - 1) / 2 * factor)
    low, high = outside[: n // 2].sum(), n - outside[n // 2 :].sum()
    assert (ours[:low] == x[outermost]).all()
    assert (ours[high:] == x[n - 1 - outermost]).all()


@pytest.mark.parametrize("std", [(2.0, 2.0, 2.0), (0.3, 1.1, 1.9), (0.0, 0.7, 0.1)])
def test_blur_is_torchios_up_to_the_border(volume, std):
    ours = transforms.blur(volume[None], torch.tensor([std]))[0]
    # The same kernel and mirror; float32 sums of up to 17 terms here.
    assert_close(ours, theirs(tio.Blur(std[::-1]), volume), atol=1e-6, rtol=0)


def test_noise_is_distributed_as_torchios(volume):
    std = 0.2
    ours = transforms.noise(volume[None], torch.tensor([std]), torch.tensor([7]))[0] - volume
    other = theirs(tio.Noise(0, std, seed=7), volume) - volume
    n = volume.numel()
    # Generators differ, so distributions are compared: five standard errors of each statistic.
    for values in (ours, other):
        assert abs(values.mean()) < 5 * std / n**0.5
        assert abs(values.std() / std - 1) < 5 / (2 * n) ** 0.5
        assert abs(kurtosis(values.flatten().numpy())) < 5 * (24 / n) ** 0.5
    assert ks_2samp(ours.flatten().numpy(), other.flatten().numpy()).pvalue > 1e-3


def test_bias_field_is_torchios(volume):
    coefficients = np.random.default_rng(2).uniform(-0.5, 0.5, 20)
    of_term = dict(zip(transforms.BIAS_EXPONENTS, coefficients, strict=True))  # of columns, rows, slices for TorchIO
    ordered = torch.tensor([[of_term[k, j, i] for i, j, k in transforms.BIAS_EXPONENTS]])
    ours = transforms.bias_field(volume[None], ordered)[0]
    # The exponent, below 10, is summed in float32 here and in float64 there.
    assert_close(ours, theirs(tio.BiasField(list(coefficients), 3), volume), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("log_gamma", [-0.3, 0.05, 0.3])
def test_gamma_is_torchios(volume, log_gamma):
    ours = transforms.gamma(volume[None], torch.tensor([log_gamma]))[0]
    # exp(g log x): float32 rounds the exponent, below 25 for normal numbers, to 1e-6.
    assert_close(ours, theirs(tio.Gamma(float(np.exp(log_gamma))), volume), atol=1e-6, rtol=1e-5)


def test_ranges_of_policy_paper_are_torchios_defaults():
    r = RANGES["paper"]
    affine = tio.RandomAffine()
    assert affine.scales == 3 * r.scale
    assert affine.degrees == 3 * r.degrees
    assert set(affine.translation) == {0}
    assert tio.RandomAnisotropy().downsampling_range == r.downsampling
    assert tio.RandomBlur().std_ranges == 3 * r.blur_std
    assert tio.RandomNoise().std_range == r.noise_std
    assert tio.RandomNoise().mean_range == (0, 0)
    assert tio.RandomBiasField().coefficients_range == r.bias
    assert tio.RandomBiasField().order == transforms.BIAS_ORDER
    assert tio.RandomGamma().log_gamma_range == r.log_gamma
