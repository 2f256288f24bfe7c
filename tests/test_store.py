"""The cache and the slice store: what a cache file holds, that it is made once and whole, when it is rebuilt."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from processes import run_processes
from tiny import save

from datasets import render as render_module
from datasets import store as store_module
from datasets.cache import cached
from datasets.index import fingerprint, scan
from datasets.render import content_size, robust_limits
from datasets.store import SliceStore, prepare
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

RNG = np.random.default_rng(5)
ARRAY = np.arange(12.0).reshape(3, 4)
HALF = 2**-11  # largest rounding error of float16 in 0..1


def tree(root: Path, volumes: int = 1, shape: tuple[int, int, int] = (8, 8, 8)) -> Path:
    for i in range(volumes):
        save(root / f"A/{i}.npy", RNG.random(shape))
    return root


def built(root: Path, size: int = 8, **options) -> SliceStore:
    return prepare(root, size, progress=False, **options)


def cache_files(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def refusal(root: Path, size: int = 16, **options) -> str:
    with pytest.raises(UserError) as caught:
        built(root, size, **options)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["u1", ">i2", "<u2", ">i4", "<u8", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_slices_come_first_and_values_lie_between_numpys_percentiles(tmp_path: Path, dtype: str, order: str) -> None:
    volume = (np.arange(16 * 12 * 40) % 201).reshape(16, 12, 40)  # more slices than are converted at once
    save(tmp_path / "A/1.npy", np.asarray(volume, dtype=dtype, order=order))
    store = built(tmp_path, 16)
    found = store.read(0, 0, 40)
    low, high = np.percentile(volume, [0.5, 99.5])
    expected = ((np.moveaxis(volume, 2, 0) - low) / (high - low)).clip(0, 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, :, 2:14], expected, atol=HALF)
    assert not found[:, :, [0, 1, 14, 15]].any()
    np.testing.assert_array_equal(store.read(0, 7, 20, half=True), found[7:20].astype(np.float16))
    with pytest.raises(IndexError, match=r"1\.npy"):
        store.read(0, 39, 41)


def test_window_and_slice_axis_of_dataset_yaml_are_used(tmp_path: Path) -> None:
    volume = RNG.integers(-1500, 1500, (5, 32, 24)).astype(np.int16)
    save(tmp_path / "CT/1.npy", volume)
    (tmp_path / "CT/dataset.yaml").write_text("window: [-1000, 400]\nslice_axis: 0\n")
    found = built(tmp_path, 32).read(0, 0, 5)
    np.testing.assert_allclose(found[:, :, 4:28], ((volume + 1000.0) / 1400).clip(0, 1), atol=HALF)
    (tmp_path / "CT/dataset.yaml").write_text("window: [2000, 3000]\nslice_axis: 0\n")
    assert "outside the window" in refusal(tmp_path)


def test_of_several_channels_the_first_is_read_and_that_is_said_once(tmp_path: Path, capsys) -> None:
    volumes = RNG.random((2, 12, 12, 6, 4))
    for i, volume in enumerate(volumes):
        save(tmp_path / f"Brain/{i}.npy", volume)
        save(tmp_path / f"One/{i}.npy", np.ascontiguousarray(volume[..., 0]))
    (tmp_path / "Brain/dataset.yaml").write_text("channels: [t1, t1ce, t2, flair]")
    store = prepare(tmp_path, 12)
    assert capsys.readouterr().err.count("pre-training reads channel 0 (t1) of Brain") == 1
    for i in range(2):
        np.testing.assert_array_equal(store.read(i, 0, 6), store.read(2 + i, 0, 6))


def test_float64_beyond_float32_and_full_range_integers_do_not_overflow(tmp_path: Path) -> None:
    ramp = np.linspace(-1, 1, 8 * 8 * 4).reshape(8, 8, 4)
    for i, array in enumerate((ramp, (ramp * 2147483647).astype(np.int32), ramp * 1e-60)):
        save(tmp_path / f"A/{i}.npy", array)
    first, *others = (built(tmp_path).read(i, 0, 4) for i in range(3))
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-3)
    save(tmp_path / "A/4.npy", ramp * 1e300)
    assert "4.npy: its range" in refusal(tmp_path)


@pytest.mark.parametrize("order", ["C", "F"])
def test_sampled_limits_see_every_slice(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    # The plain stride, 64 * 64 * 8 / 4096 = 8, would visit one slice only.
    volume = np.asarray(np.arange(8) * 10 + RNG.normal(0, 1, (64, 64, 8)), order=order)
    exact = np.percentile(volume, [0.5, 99.5])
    assert robust_limits(volume) == tuple(exact)
    assert robust_limits(np.eye(1000)[:2]) == (0, 1)  # both percentiles are 0: minimum and maximum
    monkeypatch.setattr(render_module, "SAMPLED_VOXELS", 4096)
    assert robust_limits(volume) != tuple(exact)
    assert robust_limits(volume) == pytest.approx(exact, abs=1.4)


def test_images_of_every_mode_are_grey_in_0_to_1(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 32 * 24).reshape(32, 24)
    eight = (ramp * 255).round().astype(np.uint8)
    save(tmp_path / "A/1_grey.png", eight)
    save(tmp_path / "A/2_16bit.png", (ramp * 40000).astype(np.uint16))
    save(tmp_path / "A/4_32bit.tif", (ramp * 1e9).astype(np.int32))
    save(tmp_path / "A/5_float.tif", (ramp * 1e-3 - 5).astype(np.float32))
    save(tmp_path / "A/7_rgba.png", np.dstack([eight, eight, eight, np.full_like(eight, 255)]))
    Image.fromarray(eight).convert("P").save(tmp_path / "A/8_palette.png")
    Image.fromarray(eight).save(tmp_path / "A/9_jpeg.jpg", quality=100)
    store = built(tmp_path, 32)
    low, high = np.percentile(ramp, [0.5, 99.5])
    expected = ((ramp - low) / (high - low)).clip(0, 1)
    for i, sample in enumerate(store.samples):
        np.testing.assert_allclose(store.read(i, 0, 1)[0, :, 4:28], expected, atol=0.02, err_msg=sample.name)
    colours = np.eye(4, 3).repeat(4, axis=0)[:, None].repeat(16, axis=1)  # red, green, blue, black from above
    save(tmp_path / "B/1.png", (255 * colours).astype(np.uint8))
    found = built(tmp_path, 16).read(7, 0, 1)[0]
    assert found[[2, 10], 4] == pytest.approx([0.299 / 0.587, 0.114 / 0.587], abs=0.01)  # luminance, green is 1


def test_shrinking_averages_and_growing_interpolates(tmp_path: Path) -> None:
    # One bright column in 8: the average is 1/8. Sampling without antialiasing gives a constant 0.
    stripes = np.zeros((64, 64, 2), np.float32)
    stripes[:, ::8] = 1
    save(tmp_path / "A/stripes.npy", stripes)
    assert [content_size(*sides, 64) for sides in ((100, 50), (512, 515), (8, 4000))] == [(64, 32), (64, 64), (1, 64)]
    assert built(tmp_path).read(0, 0, 2)[:, 2:6, 2:6] == pytest.approx(np.full((2, 4, 4), 1 / 8), abs=0.01)
    # A ramp stays a ramp, and pixel centres stay where they are.
    save(tmp_path / "B/ramp.npy", np.repeat(np.arange(16.0)[:, None, None], 16, axis=1))
    (tmp_path / "B/dataset.yaml").write_text("window: [0, 15]\n")
    found = built(tmp_path, 32).read(1, 0, 1)[0, 2:-2, 7] * 15
    np.testing.assert_allclose(found, (np.arange(32) + 0.5)[2:-2] / 2 - 0.5, atol=15 * HALF)


def test_cache_is_reused_lies_in_the_data_tree_unseen_and_moves_with_it(tmp_path: Path) -> None:
    tree(tmp_path / "old", 3)
    built(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    before = cache_files(tmp_path / "new/.cache")
    assert len(before) == 3
    built(tmp_path / "new")
    assert cache_files(tmp_path / "new/.cache") == before


def test_cache_path_is_used_instead_and_trees_of_one_name_do_not_share_it(tmp_path: Path) -> None:
    for place in ("a", "b"):
        os.utime(tree(tmp_path / place / "tree") / "A/0.npy", ns=(1, 1))
    first, second = (built(tmp_path / place / "tree", cache_path=tmp_path / "fast/disk") for place in ("a", "b"))
    assert (first.read(0, 0, 8) != second.read(0, 0, 8)).any()
    assert len(cache_files(tmp_path / "fast/disk")) == 2
    assert not (tmp_path / "a/tree/.cache").exists()


def test_a_changed_source_or_setting_is_seen(tmp_path: Path) -> None:
    volume = RNG.random((8, 8, 8))
    source = save(tmp_path / "A/1.npy", volume)
    first = built(tmp_path).read(0, 0, 8)
    save(source, volume[::-1])  # the same size in bytes
    os.utime(source, ns=(1, source.stat().st_mtime_ns + 1))
    np.testing.assert_array_equal(built(tmp_path).read(0, 0, 8), first[:, ::-1])
    (tmp_path / "A/dataset.yaml").write_text("slice_axis: 0")
    np.testing.assert_array_equal(built(tmp_path).read(0, 0, 8), first[:, ::-1].transpose(1, 2, 0))
    (tmp_path / "A/dataset.yaml").write_text("window: [0.4, 0.6]")
    assert (built(tmp_path).read(0, 0, 8) == 1).mean() > 0.2


@pytest.mark.parametrize("left", [0, 40, 200])
def test_a_source_cut_while_it_is_read_is_named_and_kills_nobody(tmp_path, monkeypatch, left) -> None:
    samples = scan(tree(tmp_path, shape=(64, 64, 32)))[0]
    load = np.load

    def load_and_cut(path: Path, *args: object, **options: object) -> np.ndarray:
        array = load(path, *args, **options)
        os.truncate(path, left)
        return array

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", load_and_cut)
        assert render_module.render(samples[0], 16).shape == (32, 16, 16)
    with pytest.raises(render_module.BadSource):
        render_module.render(samples[0], 16)


@pytest.mark.parametrize("left", [None, 0, 40, -1])
def test_a_cache_file_lost_or_cut_is_a_clear_error_in_training_and_rebuilt_at_the_next_start(tmp_path, left) -> None:
    store = built(tree(tmp_path))
    good = store.files[0].read_bytes()
    if left is None:
        store.files[0].unlink()
    else:
        store.files[0].write_bytes(good[:left])
    with pytest.raises(UserError, match=r"A/0\.npy cannot be read .* start again"):
        store.read(0, 4, 8)
    built(tmp_path)
    assert store.files[0].read_bytes() == good


@pytest.mark.parametrize("damage", ["zeros", "a bit"])
def test_damage_inside_a_cached_copy_is_an_error_and_rebuilt_at_the_next_start(tmp_path: Path, damage: str) -> None:
    store = built(tree(tmp_path))
    good = store.files[0].read_bytes()
    bad = bytearray(good)
    if damage == "zeros":
        bad[128:] = bytes(len(good) - 128)  # as a file system leaves it that lost what it had not written yet
    else:
        bad[128 + 5 * (len(good) - 128) // 8] ^= 1  # in slice 5
    store.files[0].write_bytes(bad)
    if damage == "a bit":
        assert store.read(0, 0, 5).any()  # the others are whole
    with pytest.raises(UserError, match=r"A/0\.npy cannot be read \(its content is not what was written.*start again"):
        store.read(0, 4, 8)
    built(tmp_path)
    assert store.files[0].read_bytes() == good


def test_a_source_that_changes_while_the_cache_is_built_is_named(tmp_path: Path, monkeypatch) -> None:
    source = tree(tmp_path) / "A/0.npy"

    def replaced(sample, size, render=store_module.render):
        found = render(sample, size)
        os.utime(source, ns=(1, 1))
        return found

    monkeypatch.setattr(store_module, "render", replaced)
    assert "A/0.npy: has changed since it was scanned" in refusal(tmp_path)


def test_what_files_hold_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    tree(tmp_path, 2)
    first = fingerprint(built(tmp_path).samples)
    shutil.rmtree(tmp_path / ".cache")
    assert fingerprint(built(tmp_path, 16).samples) == first  # whatever the canvas
    array = np.load(tmp_path / "A/1.npy")
    array[3, 3, 3] += 1e-9
    save(tmp_path / "A/1.npy", array)
    second = fingerprint(built(tmp_path).samples)
    (tmp_path / "A/dataset.yaml").write_text("slice_axis: 1")
    assert len({first, second, fingerprint(built(tmp_path).samples)}) == 3


def test_a_cache_for_which_there_is_no_room_is_refused_with_its_size(tmp_path: Path, monkeypatch) -> None:
    tree(tmp_path, 4, (96, 64, 40))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500))
    assert "4 files need 0.9 MB more in" in refusal(tmp_path, 64)


# --- cached


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_names_the_folder_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}: .* \(No space left on device\); .* --cache_path"):
        cached(tmp_path, "k", mock.Mock(side_effect=OSError(28, "No space left on device")))
    assert files(tmp_path) == []


def _die(temporary: Path) -> None:
    temporary.write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_leaves_its_work_to_others(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=cached, args=(tmp_path, "k", _die))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert files(tmp_path) == [".k.lock", ".k.tmp.npy"]
    np.testing.assert_array_equal(np.load(cached(tmp_path, "k", lambda t: np.save(t, ARRAY))), ARRAY)
    assert files(tmp_path) == ["k.npy"]


# --- several processes


def prepare_in_two(folder: Path) -> dict[str, dict]:
    """What this process gets, job by job: (data, its cache, on_bad)."""
    rank = dist.get_rank()
    good, bad = folder / "good", folder / "bad"
    jobs = {
        "two runs": (good, "shared", "error"),
        "skip": (bad, "skip", "skip"),
        "error": (bad, "skip", "error"),
        "one bad disk": (good, ("disk2", "file")[rank], "error"),
        "different data": ((good, bad)[rank], "disk3", "error"),
    }
    results = {}
    for job, (root, cache, on_bad) in jobs.items():
        dist.barrier()  # start in the same moment
        alone = mock.patch.object(dist, "is_initialized", return_value=False) if job == "two runs" else mock.MagicMock()
        try:
            with alone:
                store = prepare(root, 32, folder / cache, on_bad, progress=False)
            sums = [float(store.read(i, 0, s.slices).sum()) for i, s in enumerate(store.samples)]
            results[job] = {"names": [s.name for s in store.samples], "sums": sums}
        except UserError as error:
            results[job] = {"error": str(error)}
    return results


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree_on_what_is_wrong(tmp_path: Path) -> None:
    for i in range(20):
        volume = RNG.random((32, 32, 6)) ** (1 + i / 10)
        save(tmp_path / f"bad/A/{i:02}.npy", np.zeros_like(volume) if i == 10 else volume)
        if i != 10:
            save(tmp_path / f"good/A/{i:02}.npy", volume)
    (tmp_path / "file").write_text("not a folder")
    first, second = run_processes(2, prepare_in_two, tmp_path)

    alone = built(tmp_path / "good", 32, cache_path=tmp_path / "alone")
    sums = [float(alone.read(i, 0, 6).sum()) for i in range(19)]
    names = [f"A/{i:02}.npy" for i in range(20) if i != 10]
    for job in ("two runs", "skip"):
        assert first[job] == second[job] == {"names": names, "sums": sums}
    assert len(cache_files(tmp_path / "shared")) == 19  # and no temporary file
    for job, wanted in (
        ("error", "A/10.npy: is constant"),
        ("one bad disk", "--cache_path"),
        ("different data", "processes see different files"),
    ):
        assert wanted in first[job]["error"]
        assert wanted in second[job]["error"]
        assert first[job] == second[job] or job == "different data"  # there each names its own folder
