"""datasets/transforms.py against scipy, numpy and TorchIO, given the same parameters.

TorchIO's axes are [channel, W, H, D], ours [batch, D, H, W]; with a spacing of 1 mm its millimetres are voxels.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchio as tio
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.stats import kstest
from torch import Tensor
from torch.testing import assert_close

from datasets import transforms
from datasets.augment import RANGES, window_theta

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def noisy(B: int = 3, D: int = 6, S: int = 20) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((B, D, S, S), dtype=np.float32))


@pytest.fixture(scope="module")
def volume() -> Tensor:
    """[24, 40, 36], 0 to 1, smooth: interpolation errors are small and wrong axes or signs large."""
    x = gaussian_filter(np.random.default_rng(0).random((24, 40, 36)), 2.0, mode="constant")
    return torch.from_numpy((x - x.min()) / (x.max() - x.min())).float()


def theirs(transform: tio.Transform, x: Tensor) -> Tensor:
    """A TorchIO transform of [D, H, W]."""
    return transform(x.permute(2, 1, 0)[None])[0].permute(2, 1, 0)


def theta(canvas: int, centre, window, degrees: float = 0.0) -> Tensor:
    """`window_theta` of a single sample."""
    centre, window, flips = (np.array([v]) for v in (centre, window, (False, False)))
    return torch.from_numpy(window_theta(canvas, centre, window, np.array([degrees]), flips))


def test_resampling_equals_map_coordinates(volume):
    x, (top, left, side), degrees = volume[:1, :36, :36], (6, 3, 25), 20.0
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    steps = (np.arange(30) + 0.5) * side / 30 - side / 2  # input pixels from the middle of the window
    v, u = np.meshgrid(steps, steps, indexing="ij")
    rows = top + side / 2 + s * u + c * v - 0.5
    columns = left + side / 2 + c * u - s * v - 0.5
    expected = map_coordinates(x[0].numpy(), [rows, columns], order=1, mode="grid-constant")
    ours = transforms.resample(x[None], theta(36, (top + side / 2, left + side / 2), (side, side), degrees), 30, 30)
    assert_close(ours[0, 0], torch.from_numpy(expected).float(), atol=1e-4, rtol=0)


def test_shrinking_takes_the_mean_over_the_area():
    x = noisy(B=2, S=24)
    shrunk = transforms.resample(x, theta(24, (12, 12), (24, 24)).expand(2, 2, 3), 8, 12)
    assert_close(shrunk, F.interpolate(x, (8, 12), mode="area"), atol=1e-5, rtol=0)
    turned = transforms.resample(x, theta(24, (12, 12), (24, 24), 90.0).expand(2, 2, 3), 8, 12)
    assert_close(turned, F.interpolate(x.rot90(1, (-2, -1)), (8, 12), mode="area"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [21, 13, 5, 1])
def test_blur_equals_scipy_up_to_the_border_of_the_real_slices(length):
    x = noisy(B=3, D=21)
    std = torch.tensor([[1.5, 0.7, 2.0], [0.0, 1.2, 0.0], [3.0, 0.1, 0.13]])
    ours = transforms.blur(x, std, torch.tensor([length, 21, length]))
    for b, n in enumerate((length, 21, length)):
        expected = gaussian_filter(x[b, :n].double().numpy(), std[b].tolist())
        assert_close(ours[b, :n], torch.from_numpy(expected).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [1.53, 2.31, 4.61])
def test_anisotropy_is_torchios_but_for_its_black_ends(volume, axis, factor):
    factors = torch.ones(1, 3)
    factors[0, axis] = factor
    ours = transforms.anisotropy(volume[None], factors)[0].movedim(axis, 0)
    other = theirs(tio.RandomAnisotropy(axes=2 - axis, downsampling=(factor, factor)), volume).movedim(axis, 0)
    n = volume.shape[axis]  # whole factors would put coarse voxels just between two, and rounding would decide
    beyond = (torch.arange(n) - (n - 1) / 2).abs() - int(n / factor) * factor / 2  # the ends of the coarse voxels
    covered, outside = beyond < -1e-6, beyond > 1e-6  # a voxel exactly there may fall on either side
    assert_close(ours[covered], other[covered], atol=2e-6, rtol=0)
    # Up to half a coarse voxel at either end, which TorchIO sets to zero and ours continues.
    x, outermost = volume.movedim(axis, 0), round((n - 1) / 2 - (int(n / factor) - 1) / 2 * factor)
    low, high = outside[: n // 2].sum(), n - outside[n // 2 :].sum()
    assert (ours[:low] == x[outermost]).all()
    assert (ours[high:] == x[n - 1 - outermost]).all()


def test_bias_field_is_torchios_but_keeps_the_mean_of_the_real_slices(volume):
    coefficients = np.random.default_rng(2).uniform(-0.5, 0.5, 20)
    of_term = dict(zip(transforms.BIAS_EXPONENTS, coefficients, strict=True))  # of columns, rows, slices for TorchIO
    ordered = torch.tensor([[of_term[k, j, i] for i, j, k in transforms.BIAS_EXPONENTS]])
    field = tio.BiasField(list(coefficients), transforms.BIAS_ORDER)
    for length in (24, 17):
        real = volume[:length]
        padded = torch.cat([real, torch.zeros(24 - length, 40, 36)])[None]
        ours = transforms.bias_field(padded, ordered, torch.tensor([length]))[0]
        other = theirs(field, real)
        assert_close(ours[:length], other * real.mean() / other.mean(), atol=1e-6, rtol=1e-5)
        assert (ours[length:] == 0).all()


@pytest.mark.parametrize("log_gamma", [-0.3, 0.05, 0.3])
def test_gamma_is_torchios(volume, log_gamma):
    ours = transforms.gamma(volume[None], torch.tensor([log_gamma]))[0]
    # exp(g log x): float32 rounds the exponent, below 25 for normal numbers, to 1e-6.
    assert_close(ours, theirs(tio.Gamma(float(np.exp(log_gamma))), volume), atol=1e-6, rtol=1e-5)


def test_ranges_of_policy_paper_are_torchios_defaults():
    r, affine = RANGES["paper"], tio.RandomAffine()
    assert (affine.scales, affine.degrees, set(affine.translation)) == (3 * r.scale, 3 * r.degrees, {0})
    assert tio.RandomAnisotropy().downsampling_range == r.downsampling
    assert tio.RandomBlur().std_ranges == 3 * r.blur_std
    assert (tio.RandomNoise().std_range, tio.RandomNoise().mean_range) == (r.noise_std, (0, 0))
    assert (tio.RandomBiasField().coefficients_range, tio.RandomBiasField().order) == (r.bias, transforms.BIAS_ORDER)
    assert tio.RandomGamma().log_gamma_range == r.log_gamma


def test_jitter_equals_numpy():
    x, b, c = noisy(), np.array([0.4, -0.3, 0.0]), np.array([-0.2, 0.4, 0.0])
    bright = x.numpy() * (1 + b)[:, None, None, None]
    mean = bright.mean((1, 2, 3), keepdims=True)
    expected = np.clip(mean + (bright - mean) * (1 + c)[:, None, None, None], 0, 1)
    ours = transforms.jitter(x, torch.from_numpy(b), torch.from_numpy(c))
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)


def test_noise_has_the_asked_std_and_leaves_its_input_alone():
    x = torch.zeros(3, 8, 40, 40)
    out = transforms.noise(x, torch.tensor([0.1, 0.2, 0.0]), torch.tensor([5, 5, 2**52]))
    assert out[0].std().item() == pytest.approx(0.1, rel=0.03)
    assert_close(out[1], 2 * out[0])
    assert (out[2] == 0).all()
    assert (x == 0).all()


def test_normal_numbers_are_a_function_of_seed_slice_and_pixel():
    seeds = torch.tensor([3, 2**53 - 1])
    golden = [
        [[[-0.0279, -0.8026, -1.2243]], [[-1.0805, 0.6848, -1.4936]]],
        [[[-0.1613, -1.8547, -0.8031]], [[0.7924, 1.4920, 0.5180]]],
    ]
    assert_close(transforms.normal(seeds, 2, 1, 3, CPU), torch.tensor(golden), atol=1e-4, rtol=0)
    assert torch.equal(transforms.normal(seeds, 9, 5, 4, CPU)[1:, :3], transforms.normal(seeds[1:], 3, 5, 4, CPU))


def test_normal_numbers_are_normal_and_uncorrelated():
    x = transforms.normal(torch.tensor([0, 1, 2, 2**52]), 16, 128, 128, CPU).double()
    for sample in x:
        assert kstest(sample.flatten().numpy(), "norm").pvalue > 1e-3
        assert 4 < sample.abs().max() < 6.6
    # Neighbours along each axis (the first of samples of neighbouring seeds), the partners of Box-Muller, and squares.
    halves = x.flatten(2).unflatten(2, (2, -1)).unbind(2)
    pairs = [(x.narrow(a, 1, x.shape[a] - 1), x.narrow(a, 0, x.shape[a] - 1)) for a in range(4)]
    for a, b in [*pairs, halves]:
        for power in (1, 2):
            correlation = np.corrcoef((a**power).flatten(), (b**power).flatten())[0, 1]
            assert abs(correlation) < 4.5 / a.numel() ** 0.5


def test_neutral_parameters_return_the_input_exactly():
    x, zero = noisy(), torch.zeros(3)
    assert torch.equal(transforms.anisotropy(x, torch.ones(3, 3)), x)
    assert torch.equal(transforms.blur(x, torch.zeros(3, 3)), x)
    assert torch.equal(transforms.bias_field(x, torch.zeros(3, 20)), x)
    assert torch.equal(transforms.gamma(x, zero), x)
    assert torch.equal(transforms.jitter(x, zero, zero), x)
    assert torch.equal(transforms.noise(x, zero, zero.long()), x)
    # ... also beside a sample that is not neutral, and the rest of a batch does not change the result of that one.
    std = torch.tensor([[0.0] * 3, [1.0] * 3, [0.0] * 3])
    out = transforms.blur(x, std)
    assert torch.equal(out[[0, 2]], x[[0, 2]])
    assert_close(out[1:2], transforms.blur(x[1:2], std[1:2]))
