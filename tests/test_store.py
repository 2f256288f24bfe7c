"""The slice store: what a cache file holds, when it is rebuilt, and what it refuses."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import render as render_module
from datasets.index import scan
from datasets.render import content_size, render
from datasets.store import SliceStore, prepare, unused_files
from utils.errors import UserError

RNG = np.random.default_rng(5)
HALF = 2**-11  # largest rounding error of float16 in 0..1


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def built(root: Path, size: int, **options) -> SliceStore:
    return prepare(root, size, progress=False, **options)[1]


def cache_files(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def refusal(root: Path, size: int = 16, **options) -> str:
    with pytest.raises(UserError) as caught:
        built(root, size, **options)
    return str(caught.value)


# --- what a cache file holds


def test_percentiles_are_numpys_and_slices_come_first(tmp_path: Path) -> None:
    volume = RNG.normal(100, 30, (32, 24, 5)).astype(np.float32)
    save(tmp_path / "A/1.npy", volume)
    low, high = np.percentile(volume, [0.5, 99.5])
    expected = np.clip((np.moveaxis(volume, 2, 0) - low) / (high - low), 0, 1)
    found = built(tmp_path, 32).read(0, 0, 5)
    assert (found.shape, found.dtype) == ((5, 32, 32), np.float32)
    np.testing.assert_allclose(found[:, :, 4:28], expected, atol=HALF)
    assert not found[:, :, :4].any()
    assert not found[:, :, 28:].any()


def test_window_and_slice_axis_of_dataset_yaml_are_used(tmp_path: Path) -> None:
    volume = RNG.integers(-1500, 1500, (5, 32, 24)).astype(np.int16)
    save(tmp_path / "CT/1.npy", volume)
    (tmp_path / "CT/dataset.yaml").write_text("window: [-1000, 400]\nslice_axis: 0\n")
    found = built(tmp_path, 32).read(0, 0, 5)
    np.testing.assert_allclose(found[:, :, 4:28], ((volume + 1000.0) / 1400).clip(0, 1), atol=HALF)


@pytest.mark.parametrize("dtype", ["u1", ">i2", "<u2", ">i4", "<u8", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_dtype_and_order_do_not_change_the_result(tmp_path: Path, dtype: str, order: str) -> None:
    volume = (np.arange(16 * 12 * 40) % 201).reshape(16, 12, 40)  # more slices than are converted at once
    save(tmp_path / "A/1.npy", np.asarray(volume, dtype=dtype, order=order))
    found = built(tmp_path, 16).read(0, 0, 40)
    low, high = np.percentile(volume, [0.5, 99.5])
    expected = ((np.moveaxis(volume, 2, 0) - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(found[:, :, 2:14], expected, atol=HALF)


def test_float64_beyond_float32_and_full_range_integers_do_not_overflow(tmp_path: Path) -> None:
    ramp = np.linspace(-1, 1, 8 * 8 * 4).reshape(8, 8, 4)
    save(tmp_path / "A/1.npy", (ramp * 32767).astype(np.int16))
    save(tmp_path / "A/2.npy", (ramp * 2147483647).astype(np.int32))
    save(tmp_path / "A/3.npy", ramp * 1e-60)
    first, *others = (built(tmp_path, 8).read(i, 0, 4) for i in range(3))
    assert 0.4 < first.mean() < 0.6
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-3)
    save(tmp_path / "A/4.npy", ramp * 1e300)
    assert "4.npy: its range" in refusal(tmp_path, 8)


def test_mostly_empty_volume_falls_back_to_minimum_and_maximum(tmp_path: Path) -> None:
    volume = np.zeros((16, 16, 20), np.uint8)
    volume[4, 5, 6], volume[7, 8, 9] = 200, 50  # 2 of 5120 voxels: both percentiles are 0
    save(tmp_path / "Vessels/1.npy", volume)
    found = built(tmp_path, 16).read(0, 0, 20)
    assert found[6, 4, 5] == 1
    assert found[9, 7, 8] == pytest.approx(0.25)
    assert found.sum() == pytest.approx(1.25)


def test_subsampled_percentiles_see_every_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The plain stride, 64 * 64 * 8 / 4096 = 8, would visit one slice only.
    volume = np.broadcast_to(np.arange(8) * 10, (64, 64, 8)) + RNG.normal(0, 1, (64, 64, 8))
    save(tmp_path / "A/1.npy", volume)
    exact = render(scan(tmp_path)[0], 64).astype(np.float32)
    monkeypatch.setattr(render_module, "SAMPLED_VOXELS", 4096)
    sampled = render(scan(tmp_path)[0], 64).astype(np.float32)
    assert np.abs(sampled - exact).max() > 0  # it did subsample
    np.testing.assert_allclose(sampled, exact, atol=0.02)


# --- geometry


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(100, 50, (64, 32)), (50, 100, (32, 64)), (31, 31, (64, 64)), (512, 515, (64, 64)), (8, 4000, (1, 64))],
)
def test_longer_side_fills_the_canvas_and_aspect_is_kept(height: int, width: int, expected: tuple[int, int]) -> None:
    assert content_size(height, width, 64) == expected


def test_extents_say_where_the_content_is(tmp_path: Path) -> None:
    save(tmp_path / "A/1.npy", np.arange(40 * 20 * 3).reshape(40, 20, 3) % 251 + 1000)
    save(tmp_path / "B/1.png", (np.arange(10 * 30) % 251).reshape(10, 30).astype(np.uint8))
    store = built(tmp_path, 64)
    assert store.extents.dtype == np.int32
    assert store.extents.tolist() == [[64, 32], [21, 64]]
    for i, sample in enumerate(store.samples):
        rows, columns = np.nonzero(store.read(i, 0, sample.slices).max(axis=0))
        h, w = store.extents[i]
        assert rows.min() >= (64 - h) // 2
        assert rows.max() < (64 - h) // 2 + h
        assert columns.min() >= (64 - w) // 2
        assert columns.max() < (64 - w) // 2 + w


def test_shrinking_averages_and_growing_interpolates(tmp_path: Path) -> None:
    # One bright column in 8: the average is 1/8. Sampling without antialiasing gives a constant 0.
    stripes = np.zeros((64, 64, 2), np.float32)
    stripes[:, ::8] = 1
    save(tmp_path / "A/stripes.npy", stripes)
    assert built(tmp_path, 8).read(0, 0, 2)[:, 2:6, 2:6] == pytest.approx(np.full((2, 4, 4), 1 / 8), abs=0.01)
    # A ramp stays a ramp, and pixel centres stay where they are.
    ramp = np.broadcast_to(np.arange(16.0)[:, None, None], (16, 16, 1))
    save(tmp_path / "B/ramp.npy", np.ascontiguousarray(ramp))
    (tmp_path / "B/dataset.yaml").write_text("window: [0, 15]\n")
    found = built(tmp_path, 32).read(1, 0, 1)[0, 2:-2, 7] * 15
    np.testing.assert_allclose(found, (np.arange(32) + 0.5)[2:-2] / 2 - 0.5, atol=15 * HALF)


def test_read_of_a_part_equals_the_part_of_the_whole(tmp_path: Path) -> None:
    save(tmp_path / "A/1.npy", RNG.random((20, 30, 41)))
    store = built(tmp_path, 24)
    whole = store.read(0, 0, 41)
    for start, stop in ((0, 1), (7, 20), (30, 41), (40, 41)):
        np.testing.assert_array_equal(store.read(0, start, stop), whole[start:stop])
    for start, stop in ((-1, 3), (3, 3), (40, 42), (5, 4)):
        with pytest.raises(IndexError, match=r"1\.npy"):
            store.read(0, start, stop)


# --- images


def test_images_of_every_mode_are_grey_in_0_to_1(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 32 * 24).reshape(32, 24)
    eight = (ramp * 255).round().astype(np.uint8)
    save(tmp_path / "A/1_grey.png", eight)
    save(tmp_path / "A/2_16bit.png", (ramp * 40000).astype(np.uint16))
    save(tmp_path / "A/3_16bit.tif", (ramp * 40000).astype(np.uint16))
    save(tmp_path / "A/4_32bit.tif", (ramp * 1e9).astype(np.int32))
    save(tmp_path / "A/5_float.tif", (ramp * 1e-3 - 5).astype(np.float32))
    save(tmp_path / "A/6_rgb.bmp", np.repeat(eight[..., None], 3, axis=2))
    save(tmp_path / "A/7_rgba.png", np.dstack([eight, eight, eight, np.full_like(eight, 255)]))
    Image.fromarray(eight).convert("P").save(tmp_path / "A/8_palette.png")
    Image.fromarray(eight).save(tmp_path / "A/9_jpeg.jpg", quality=100)
    store = built(tmp_path, 32)
    low, high = np.percentile(ramp, [0.5, 99.5])
    expected = ((ramp - low) / (high - low)).clip(0, 1)
    for i, sample in enumerate(store.samples):
        found = store.read(i, 0, 1)[0, :, 4:28]
        np.testing.assert_allclose(found, expected, atol=0.02, err_msg=sample.name)


def test_colour_becomes_luminance_not_one_channel(tmp_path: Path) -> None:
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[:8, :, 0] = 255  # red above, blue below
    colour[8:, :, 2] = 255
    colour[0] = 255
    colour[1] = 0
    save(tmp_path / "A/1.png", colour)
    found = built(tmp_path, 16).read(0, 0, 1)[0]
    assert found[4, 4] == pytest.approx(0.299, abs=0.01)
    assert found[12, 4] == pytest.approx(0.114, abs=0.01)


# --- the cache


def test_cache_is_reused_and_lies_in_the_data_tree_unseen(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"A/{i}.npy", RNG.random((8, 8, 3)))
    built(tmp_path, 8)
    before = cache_files(tmp_path / ".cache")
    assert len(before) == 3
    assert len(built(tmp_path, 8).samples) == 3
    assert cache_files(tmp_path / ".cache") == before
    built(tmp_path, 16)
    assert len(cache_files(tmp_path / ".cache")) == 6


def test_cache_path_is_used_instead(tmp_path: Path) -> None:
    save(tmp_path / "tree/A/1.npy", RNG.random((8, 8, 3)))
    built(tmp_path / "tree", 8, cache_path=tmp_path / "fast/disk")
    assert len(cache_files(tmp_path / "fast/disk")) == 1
    assert not (tmp_path / "tree/.cache").exists()


def test_a_changed_source_or_setting_is_seen(tmp_path: Path) -> None:
    volume = RNG.random((8, 8, 8))
    source = save(tmp_path / "A/1.npy", volume)
    first = built(tmp_path, 8).read(0, 0, 8)
    save(source, volume[::-1])  # the same size in bytes
    os.utime(source, ns=(1, source.stat().st_mtime_ns + 1))
    np.testing.assert_array_equal(built(tmp_path, 8).read(0, 0, 8), first[:, ::-1])
    (tmp_path / "A/dataset.yaml").write_text("slice_axis: 0")
    np.testing.assert_array_equal(built(tmp_path, 8).read(0, 0, 8), first[:, ::-1].transpose(1, 2, 0))
    (tmp_path / "A/dataset.yaml").write_text("window: [0.4, 0.6]")
    assert (built(tmp_path, 8).read(0, 0, 8) == 1).mean() > 0.2


@pytest.mark.parametrize("damage", ["truncated", "empty", "other shape", "not an NPY"])
def test_a_damaged_cache_file_is_rebuilt(tmp_path: Path, damage: str) -> None:
    save(tmp_path / "A/1.npy", RNG.random((8, 8, 8)))
    store = built(tmp_path, 8)
    good = store.files[0].read_bytes()
    if damage == "other shape":
        np.save(store.files[0], np.zeros((8, 4, 8), np.float16))
    else:
        store.files[0].write_bytes({"truncated": good[:-2], "empty": b"", "not an NPY": b"x" * len(good)}[damage])
    built(tmp_path, 8)
    assert store.files[0].read_bytes() == good


def test_a_deleted_cache_file_is_a_clear_error(tmp_path: Path) -> None:
    save(tmp_path / "A/1.npy", RNG.random((8, 8, 8)))
    store = built(tmp_path, 8)
    store.files[0].unlink()
    with pytest.raises(UserError, match=r"A/1\.npy cannot be read .* start again"):
        store.read(0, 0, 1)


def test_a_folder_that_cannot_be_written_names_the_option(tmp_path: Path) -> None:
    save(tmp_path / "tree/A/1.npy", RNG.random((8, 8, 8)))
    (tmp_path / "file").write_text("not a folder")
    message = refusal(tmp_path / "tree", cache_path=tmp_path / "file")
    assert str(tmp_path / "file") in message
    assert "--cache_path" in message


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "A/1.npy", RNG.random((8, 8, 8)))

    def full(file, array, **_) -> None:
        file.write(b"\x93NUMPY half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        message = refusal(tmp_path)
    assert "No space left on device" in message
    assert "--cache_path" in message
    assert not cache_files(tmp_path / ".cache")


def test_a_moved_tree_takes_its_cache_along(tmp_path: Path) -> None:
    save(tmp_path / "old/A/1.npy", RNG.random((8, 8, 8)))
    built(tmp_path / "old", 8)
    (tmp_path / "old").rename(tmp_path / "new")
    before = cache_files(tmp_path / "new/.cache")
    assert len(before) == 1
    built(tmp_path / "new", 8)
    assert cache_files(tmp_path / "new/.cache") == before


def test_trees_of_one_name_do_not_share_a_folder_of_the_cache(tmp_path: Path) -> None:
    for place in ("a", "b"):
        source = save(tmp_path / place / "tree/A/1.npy", np.full((8, 8, 8), 1.0) + RNG.random((8, 8, 8)))
        os.utime(source, ns=(1, 1))
    first, second = (built(tmp_path / place / "tree", 8, cache_path=tmp_path / "cache") for place in ("a", "b"))
    assert (first.read(0, 0, 8) != second.read(0, 0, 8)).any()


def test_half_precision_is_the_same_numbers(tmp_path: Path) -> None:
    save(tmp_path / "A/1.npy", RNG.random((9, 12, 5)))
    store = built(tmp_path, 16)
    half = store.read(0, 1, 4, half=True)
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half.astype(np.float32), store.read(0, 1, 4))


def test_a_cache_file_cut_short_while_training_is_a_clear_error(tmp_path: Path) -> None:
    save(tmp_path / "A/1.npy", RNG.random((8, 8, 8)))
    store = built(tmp_path, 8)
    os.truncate(store.files[0], 400)
    with pytest.raises(UserError, match=r"A/1\.npy cannot be read .* start again"):
        store.read(0, 4, 8)


def test_more_threads_make_the_same_cache(tmp_path: Path) -> None:
    for i in range(12):
        save(tmp_path / f"tree/A/{i}.npy", RNG.random((20, 24, 6)))
    content = []
    for workers in (1, 4):
        store = built(tmp_path / "tree", 16, cache_path=tmp_path / str(workers), workers=workers)
        content.append([file.read_bytes() for file in store.files])
    assert content[0] == content[1]


def test_the_size_of_the_cache_is_told_in_advance_and_is_true(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for i in range(4):
        save(tmp_path / f"A/{i}.npy", RNG.random((96, 64, 40)))
    prepare(tmp_path, 64, progress=True)
    told = capsys.readouterr().out.splitlines()[0]
    size = sum(file.stat().st_size for file in cache_files(tmp_path / ".cache"))
    assert told.startswith(f"preparing 4 files: {size / 1e6:.1f} MB in {tmp_path / '.cache'}")
    prepare(tmp_path, 64, progress=True)
    assert "preparing" not in capsys.readouterr().out  # nothing is left to make


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "A/1.npy", RNG.random((8, 8, 8)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500))
    message = refusal(tmp_path)
    assert "needs 0.0 MB for 1 files, but only 0.0 MB are free" in message
    assert "--cache_path" in message
    assert not cache_files(tmp_path / ".cache")


def test_unused_files_are_those_of_changed_and_removed_sources(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"A/{i}.npy", RNG.random((8, 8, 8)))
    old = [built(tmp_path, size) for size in (8, 16)]
    assert unused_files(scan(tmp_path)) == []
    (tmp_path / "A/0.npy").unlink()
    save(tmp_path / "A/1.npy", RNG.random((8, 8, 9)))
    assert set(unused_files(scan(tmp_path))) == {store.files[i] for store in old for i in (0, 1)}


def test_a_killed_build_goes_on_and_leaves_no_trace(tmp_path: Path) -> None:
    """A process is killed while it writes the third file; the next start keeps the first two and makes the rest."""
    for i in range(5):
        save(tmp_path / f"tree/A/{i}.npy", RNG.random((16, 16, 6)))
    script = """
import os, signal, sys
import numpy as np
from datasets.store import prepare
made, write = [], np.save
def slow(file, array, **_):
    made.append(1)
    if len(made) == 3:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, array)
np.save = slow
prepare(sys.argv[1], 16, progress=False)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "tree")], env=environment, timeout=100)
    assert done.returncode == -signal.SIGKILL
    before = cache_files(tmp_path / "tree/.cache")
    assert sorted(file.suffix for file in before) == [".npy", ".npy", ".tmp"]
    store = built(tmp_path / "tree", 16)
    after = cache_files(tmp_path / "tree/.cache")
    assert sorted(after) == sorted(store.files)
    assert {file: time for file, time in before.items() if file in after}.items() <= after.items()
    for i, sample in enumerate(store.samples):
        np.testing.assert_array_equal(store.read(i, 0, 6, half=True), render(sample, 16))


def test_a_file_that_another_process_is_making_is_left_to_it(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"A/{i}.npy", RNG.random((16, 16, 6)))
    store = SliceStore(scan(tmp_path), 16)
    store.folder.mkdir(parents=True)
    target = store.files[1]
    temporary = target.with_name(f".{target.name}.tmp")
    with open(temporary, "wb") as other:  # another process has it, and finishes after a while
        fcntl.flock(other, fcntl.LOCK_EX)
        np.save(other, np.full((6, 16, 16), 0.5, np.float16))
        other.flush()
        waiting = threading.Timer(0.5, lambda: os.replace(temporary, target))
        waiting.start()
        store.build(progress=False)
    waiting.join()
    assert (store.read(1, 0, 6) == 0.5).all()  # theirs, not made again
    assert sorted(cache_files(tmp_path / ".cache")) == sorted(store.files)


# --- bad content


def test_bad_content_is_listed_in_one_error_and_the_rest_is_kept(tmp_path: Path) -> None:
    good = RNG.random((8, 8, 8))
    some = good.copy()
    some[1, 2, 3], some[4, 5, 6], some[0, 0, 0] = np.nan, np.inf, -np.inf
    save(tmp_path / "A/1_nan.npy", some)
    save(tmp_path / "A/2_good.npy", good)
    save(tmp_path / "A/3_all_nan.npy", np.full((8, 8, 8), np.nan, np.float32))
    save(tmp_path / "A/4_constant.npy", np.full((8, 8, 8), 7, np.int16))
    save(tmp_path / "B/5_black.png", np.zeros((20, 20), np.uint8))
    cut = save(tmp_path / "B/6_cut.png", RNG.integers(0, 255, (50, 50)).astype(np.uint8))
    cut.write_bytes(cut.read_bytes()[:900])
    lines = refusal(tmp_path).splitlines()
    assert "5 problems" in lines[0]
    reasons = ["3 of 512 voxels", "512 of 512 voxels", "all voxels are 7", "all pixels are 0", "broken image data"]
    for line, reason in zip(lines[1:], reasons, strict=True):
        assert reason in line
    assert "on_bad skip" in lines[1]
    kinds = sorted(file.suffix for file in cache_files(tmp_path / ".cache"))
    assert kinds == [".bad"] * 5 + [".npy"]  # the good one is done already


def test_a_verdict_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "A/1.npy", np.full((8, 8, 8), 7.0))
    save(tmp_path / "A/2.npy", RNG.random((8, 8, 8)))
    message = refusal(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(render_module, "open_volume", lambda _: pytest.fail("was read again"))
        assert refusal(tmp_path) == message
    save(source, RNG.random((8, 8, 8)))
    os.utime(source, ns=(1, source.stat().st_mtime_ns + 1))
    assert len(built(tmp_path, 16).samples) == 2


def test_a_disk_that_failed_to_answer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "A/1.npy", RNG.random((8, 8, 8)))

    def fail(_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(render_module, "open_volume", fail)
        assert "Input/output error" in refusal(tmp_path)
    assert len(built(tmp_path, 16).samples) == 1


def test_volume_outside_its_window_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "CT/1.npy", RNG.random((8, 8, 8)))
    (tmp_path / "CT/dataset.yaml").write_text("window: [1000, 2000]")
    assert "outside the window" in refusal(tmp_path)


def test_skip_leaves_bad_files_out_of_index_and_store(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = {"A/1.npy": 10, "A/2.npy": None, "A/3.npy": 30, "B/4.png": None, "B/5.png": 50}
    for name, value in values.items():
        shape = (8, 8, 3) if name.endswith("npy") else (8, 8)
        array = np.zeros(shape, np.uint8)
        if value:
            array[:4] = 100
            array[4, 4] = value  # marks the file
        save(tmp_path / name, array)
    samples, store = prepare(tmp_path, 8, on_bad="skip", progress=False)
    assert [sample.name for sample in samples] == ["A/1.npy", "A/3.npy", "B/5.png"]
    assert store.samples == samples
    assert [store.read(i, 0, 1)[0, 4, 4] for i in range(3)] == pytest.approx([0.1, 0.3, 0.5], abs=HALF)
    assert len(store.extents) == 3
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in warnings] == [
        f"left out {tmp_path / 'A/2.npy'}",
        f"left out {tmp_path / 'B/4.png'}",
    ]


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "A/1.npy", np.zeros((8, 8, 8)))
    assert "no usable file" in refusal(tmp_path, on_bad="skip")
    assert "on_bad" in refusal(tmp_path, on_bad="ignore")


@pytest.mark.parametrize("name", ["nan_inf.npy", "all_nan.npy", "constant.npy", "truncated.png"])
def test_specimens_with_bad_content_are_refused(tmp_path: Path, shared: Path, name: str) -> None:
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / name).symlink_to(shared / "bad_input" / name)
    assert str(tmp_path / "A" / name) in refusal(tmp_path)


# --- real data


def test_fortran_big_endian_specimen_reads_as_the_plain_array(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "A").mkdir()
    (tmp_path / "A/odd.npy").symlink_to(shared / "bad_input/fortran_big_endian.npy")
    odd = np.load(shared / "bad_input/fortran_big_endian.npy")
    save(tmp_path / "A/plain.npy", np.ascontiguousarray(odd, dtype="<i2"))
    store = built(tmp_path, 64)
    found = store.read(0, 0, odd.shape[2])
    np.testing.assert_array_equal(found, store.read(1, 0, odd.shape[2]))
    assert 0.05 < found.mean() < 0.9


def test_a_real_hippocampus_volume(tmp_path: Path, shared: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.load(sorted((shared / "hippocampus/imagesTr").glob("*.nii.gz"))[0])
    volume = np.asanyarray(image.dataobj)
    save(tmp_path / "Hippocampus/1.npy", volume)
    store = built(tmp_path, 64)
    whole = store.read(0, 0, volume.shape[2])
    h, w = store.extents[0]
    assert max(h, w) == 64
    assert h / w == pytest.approx(volume.shape[0] / volume.shape[1], abs=0.02)
    assert (whole.min(), whole.max()) == (0, 1)
    # Slice by slice the picture is the same: its mean brightness follows the raw one.
    means = whole.sum(axis=(1, 2)) / (h * w)
    assert np.corrcoef(means, volume.mean(axis=(0, 1)))[0, 1] > 0.99


def test_all_black_slices_of_a_real_data_set_are_found(tmp_path: Path, shared: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/Brain").symlink_to(shared / "slices_png/BraTS2018_Brain")
    assert "12 problems" in refusal(tmp_path / "tree", 32, cache_path=tmp_path / "cache")
    samples, store = prepare(tmp_path / "tree", 32, tmp_path / "cache", on_bad="skip", progress=False)
    assert len(samples) == 88
    assert all(store.read(i, 0, 1).max() > 0 for i in range(88))


def test_torch_keeps_its_threads_for_what_comes_after(tmp_path: Path) -> None:
    save(tmp_path / "tree/A/1.npy", RNG.random((32, 32, 6)))
    code = "import torch; from datasets.store import prepare; prepare(*{}); print(torch.get_num_threads())"
    command = [sys.executable, "-c", code.format((str(tmp_path / "tree"), 32, str(tmp_path / "cache")))]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == str(min(2, len(os.sched_getaffinity(0))))


# --- several processes

# Two processes prepare several trees: first as two runs that know nothing of each other, then as two ranks of one.
SCRIPT = """
import json, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from datasets.store import prepare
rank, go, jobs = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
torch.set_num_threads(1)
Path(f"{go}.{rank}").touch()
while not (Path(f"{go}.0").exists() and Path(f"{go}.1").exists()):  # start in the same moment
    time.sleep(0.001)
results = {}
for name, (root, caches, on_bad) in jobs.items():
    if name == "join":
        dist.init_process_group("gloo", init_method=f"file://{go}.group", rank=rank, world_size=2)
        continue
    try:
        samples, store = prepare(root, 32, caches[rank], on_bad, progress=False)
        sums = [float(store.read(i, 0, s.slices).sum()) for i, s in enumerate(samples)]
        results[name] = {"names": [s.name for s in samples], "sums": sums}
    except Exception as error:
        results[name] = {type(error).__name__: str(error)}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good/: 39 volumes of different brightness; bad/: the same and a constant one, number 20; file."""
    folder = tmp_path_factory.mktemp("processes")
    for i in range(40):
        volume = RNG.random((32, 32, 6)) ** (1 + i / 10)
        save(folder / f"bad/A/{i:02}.npy", np.zeros_like(volume) if i == 20 else volume)
        if i != 20:
            save(folder / f"good/A/{i:02}.npy", volume)
    (folder / "file").write_text("not a folder")
    return folder


@pytest.fixture(scope="module")
def two_processes(folder: Path) -> dict[str, list[dict]]:
    """For each job of the script the result of both processes. One start for all: importing torch takes seconds."""
    good, bad = str(folder / "good"), str(folder / "bad")
    disk = [str(folder / name) for name in ("disk0", "disk1", "disk2", "disk3", "disk4", "file")]
    jobs = {
        "two runs": (good, (disk[0], disk[0]), "error"),
        "join": (None, None, None),
        "skip": (bad, (disk[1], disk[1]), "skip"),
        "error": (bad, (disk[1], disk[1]), "error"),
        "two disks": (good, (disk[2], disk[3]), "error"),
        "one bad disk": (bad, (disk[4], disk[5]), "error"),
        "different data": (None, (disk[4], disk[4]), "error"),
        "no data": (str(folder / "nowhere"), (disk[4], disk[4]), "error"),
    }
    processes = []
    for rank in range(2):
        mine = jobs | {"different data": ((good, bad)[rank], *jobs["different data"][1:])}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(rank), str(folder / "go"), json.dumps(mine)],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        first, second = (json.loads(process.communicate(timeout=100)[0]) for process in processes)
    finally:
        for process in processes:
            process.kill()
    return {name: [first[name], second[name]] for name in first}


def test_two_runs_at_the_same_time_end_with_good_files(folder: Path, two_processes: dict) -> None:
    first, second = two_processes["two runs"]
    alone = built(folder / "good", 32, cache_path=folder / "alone")
    assert first["sums"] == [float(alone.read(i, 0, 6).sum()) for i in range(39)]
    assert first == second
    assert len(cache_files(folder / "disk0")) == 39  # and no temporary file


def test_two_ranks_skip_the_same_files_and_raise_the_same_error(folder: Path, two_processes: dict) -> None:
    first, second = two_processes["skip"]
    assert first["names"] == [f"A/{i:02}.npy" for i in range(40) if i != 20]
    assert first == second
    assert first["sums"] == two_processes["two runs"][0]["sums"]
    first, second = two_processes["error"]
    assert "A/20.npy: is constant" in first["UserError"]
    assert first == second


def test_ranks_without_a_common_disk_each_get_every_file(folder: Path, two_processes: dict) -> None:
    first, second = two_processes["two disks"]
    assert first == second == two_processes["two runs"][0]
    assert [len(cache_files(folder / name)) for name in ("disk2", "disk3")] == [39, 39]


def test_what_goes_wrong_on_one_rank_is_raised_on_both(two_processes: dict) -> None:
    for job, wanted in (
        ("one bad disk", "--cache_path"),
        ("different data", "processes see different files"),
        ("no data", "does not exist"),
    ):
        first, second = two_processes[job]
        assert wanted in first["UserError"]
        assert first == second or job == "different data"  # there each names its own folder
        assert wanted in second["UserError"]
