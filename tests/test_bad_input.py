"""Broken files that users have: scan, cache and check each say what is wrong and what to do, and lose nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import losses, run

import check_data
from datasets.check import check
from datasets.index import scan
from datasets.store import SliceStore, prepare
from utils import config
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

# What is wrong and what to do, in the words that must stand on the file's line.
BY_HEADER = {
    "complex.npy": ("is complex (complex64)", "save the magnitude"),
    "empty.npy": ("is empty (0 bytes)", "copy it again"),
    "npz_renamed.npy": ("is a zip archive", "take the array out"),
    "object_dtype.npy": ("Python objects (a pickle)", "save a plain numeric array"),
    "slice_2d.npy": ("is 2D", "save it as an image"),
    "text_renamed.npy": ("is not an NPY file", "write it with np.save or remove it"),
    "tiny.npy": ("5 x 4 pixels", "remove it, or set slice_axis"),
    "truncated.npy": ("is truncated", "copy it again"),
    "volume_4d.npy": ("is 4D", "pick one channel"),
    "zero_axis.npy": ("has an axis of length 0", "export it again"),
}
BY_CONTENT = {
    "all_nan.npy": ("are NaN or Inf", "np.nan_to_num"),
    "constant.npy": ("is constant", "--on_bad skip"),
    "nan_inf.npy": ("are NaN or Inf", "np.nan_to_num"),
    "truncated.png": ("broken image data", "export it again"),
}
ACCEPTED = "fortran_big_endian.npy"
ALL = sorted([*BY_HEADER, *BY_CONTENT])


def volume(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x, z = np.mgrid[-1:1:30j, -1:1:28j, -1:1:20j]
    return (900 * np.exp(-3 * (x**2 + y**2 + z**2)) + 30 * rng.standard_normal(x.shape)).astype(np.float32)


def make(folder: Path) -> Path:
    folder.mkdir()
    good = volume()
    partly = good.copy()
    partly[3, 4, 5], partly[4, 5, 6], partly[5, 6, 7] = np.nan, np.inf, -np.inf
    arrays = {
        "all_nan.npy": np.full((20, 20, 10), np.nan, np.float32),
        "complex.npy": good[:12, :12, :12].astype(np.complex64),
        "constant.npy": np.full((16, 16, 16), 42, np.int16),
        ACCEPTED: np.asfortranarray(good.round().astype(">i2")),
        "nan_inf.npy": partly,
        "slice_2d.npy": good[:, :, 10],
        "tiny.npy": good[:5, :4, :3],
        "truncated.npy": good,
        "volume_4d.npy": np.stack([good, good], axis=-1),
        "zero_axis.npy": good[:, :, :0],
    }
    for name, array in arrays.items():
        np.save(folder / name, array)
    cut = folder / "truncated.npy"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    mixed = np.array([good[0], {"spacing": 1.0}], dtype=object)
    np.save(folder / "object_dtype.npy", mixed, allow_pickle=True)
    (folder / "empty.npy").write_bytes(b"")
    (folder / "text_renamed.npy").write_text("case,label\n1,0\n2,1\n")
    np.savez_compressed(folder / "archive.npz", image=good)
    (folder / "archive.npz").rename(folder / "npz_renamed.npy")
    noise = np.random.default_rng(1).integers(0, 255, (40, 40), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "truncated.png")
    picture = (folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(picture[:601])
    return folder


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder with a file of each name."""
    return make(tmp_path / "bad")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Four good volumes and two good images in two data sets."""
    root = tmp_path / "tree"
    for name in ("A", "B"):
        (root / name).mkdir(parents=True)
        for i in range(2):
            np.save(root / name / f"good_{i}.npy", volume(i + 10 * (name == "B")))
        ramp = (np.arange(40 * 30) % 251).reshape(40, 30).astype(np.uint8)
        Image.fromarray(ramp if name == "A" else ramp.T.copy()).save(root / name / "good.png")
    return root


GOOD = [f"{name}/{file}" for name in "AB" for file in ("good.png", "good_0.npy", "good_1.npy")]


def put(bad: Path, tree: Path, *names: str) -> Path:
    for name in names:
        shutil.copyfile(bad / name, tree / "A" / name)
    return tree


def lines_of(error: UserError) -> list[str]:
    """The lines about files."""
    lines = str(error).splitlines()
    return [line.strip() for line in (lines[1:] if len(lines) > 1 else lines)]


def assert_lines(lines: list[str], tree: Path, expected: dict[str, tuple[str, str]]) -> None:
    """One line per file, in order, each with its file first, then what is wrong and what to do."""
    for line, name in zip(lines, sorted(expected), strict=True):
        start = f"{tree / 'A' / name}: "
        assert line.startswith(start)
        problem, remedy = expected[name]
        assert problem in line.removeprefix(start)
        assert remedy in line.split(problem)[1]


def test_scan_names_each_file_that_its_header_gives_away(bad: Path, tree: Path) -> None:
    with pytest.raises(UserError) as caught:
        scan(put(bad, tree, *ALL, ACCEPTED))
    assert_lines(lines_of(caught.value), tree, BY_HEADER)


def test_the_cache_names_each_file_whose_content_is_bad(bad: Path, tree: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(put(bad, tree, *BY_CONTENT, ACCEPTED), 24, progress=False)
    assert_lines(lines_of(caught.value), tree, BY_CONTENT)


def test_skipping_keeps_everything_else(bad: Path, tree: Path, capsys: pytest.CaptureFixture) -> None:
    alone = {s.name: store.read(i, 0, 1) for samples, store in [ready(tree)] for i, s in enumerate(samples)}
    samples, store = ready(put(bad, tree, *ALL, ACCEPTED))
    assert sorted(s.name for s in samples) == sorted([*GOOD, f"A/{ACCEPTED}"])
    left_out = [line.removeprefix("warning: left out ") for line in capsys.readouterr().err.splitlines()]
    assert_lines(left_out[: len(BY_HEADER)], tree, BY_HEADER)
    assert_lines(left_out[len(BY_HEADER) :], tree, BY_CONTENT)
    for i, s in enumerate(samples):
        first = store.read(i, 0, 1)
        assert first.min() >= 0
        assert first.max() <= 1
        if s.name in alone:
            np.testing.assert_array_equal(first, alone[s.name])


def ready(tree: Path) -> tuple[list, SliceStore]:
    return prepare(tree, 24, on_bad="skip", progress=False)


@pytest.mark.parametrize("name", ALL)
def test_one_bad_file_alone_is_one_line(bad: Path, tree: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(put(bad, tree, name), 24, progress=False)
    assert "\n" not in str(caught.value)
    assert_lines([str(caught.value)], tree, {name: (BY_HEADER | BY_CONTENT)[name]})


def test_check_names_headers_at_once_and_content_when_it_reads(bad: Path, tree: Path) -> None:
    put(bad, tree, *ALL, ACCEPTED)
    by_header = [f.message for f in check(tree, progress=False)[1] if f.level == "error"]
    assert_lines(by_header, tree, BY_HEADER)
    _, findings, contents = check(tree, full=True, workers=2, progress=False)
    errors = [f.message for f in findings if f.level == "error"]
    assert errors[: len(by_header)] == by_header
    assert_lines(errors[len(by_header) :], tree, BY_CONTENT)
    assert sorted(s.name for s in contents) == sorted([*GOOD, f"A/{ACCEPTED}"])


def test_the_script_exits_with_1_and_names_all(bad: Path, tree: Path, capsys: pytest.CaptureFixture) -> None:
    put(bad, tree, *ALL)
    with pytest.raises(SystemExit) as stop:
        config.main(check_data.main, check_data.Config, None, ["--data_path", str(tree), "--full", "true"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert [name for name in ALL if out.count(f"{tree / 'A' / name}: ") != 1] == []
    assert f"{len(ALL)} errors" in out


@pytest.mark.slow
def test_training_with_skip_ends_as_if_bad_files_were_not_there(bad: Path, tree: Path, tmp_path: Path) -> None:
    run("mask_swav", tree, tmp_path / "without", epochs=1)
    run("mask_swav", put(bad, tree, *BY_CONTENT), tmp_path / "with", epochs=1, on_bad="skip")
    folders = [tmp_path / place / "runs/mask_swav" for place in ("without", "with")]
    assert losses(folders[0]) == losses(folders[1])


def test_a_data_set_whose_settings_cannot_be_read_is_never_left_out(bad: Path, tree: Path) -> None:
    """Without its dataset.yaml a CT would be trained on without its window."""
    (tree / "B/dataset.yaml").write_text("window: [400, -1000]")
    with pytest.raises(UserError, match=r"dataset\.yaml: window"):
        prepare(put(bad, tree, *ALL), 24, on_bad="skip", progress=False)
