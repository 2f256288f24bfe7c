"""The sample index: what it finds, in which order, and how broken files that users have are named."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import losses, run

from datasets.check import check
from datasets.index import Sample, describe, fingerprint, scan, volumes
from datasets.store import prepare
from utils.errors import UserError


def save_volume(path: Path, shape: tuple[int, ...] = (10, 12, 4), dtype: str = "i2") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, (np.arange(np.prod(shape)) % 120).reshape(shape).astype(dtype))
    return path


def save_image(path: Path, height: int = 20, width: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.arange(height * width) % 256).reshape(height, width).astype(np.uint8)).save(path)
    return path


def problems(root: Path) -> list[str]:
    """What is wrong, file by file or with a whole data set."""
    try:
        return scan(root)[1]
    except UserError as error:
        return [str(error)]


def problem(root: Path) -> str:
    (text,) = problems(root)
    return text


def test_order_is_by_data_set_then_relative_path_in_bytes(tmp_path: Path) -> None:
    # Written in an order that is neither; "B.x" sorts after "B" as a data set, before "B/" in a joined path.
    for name in ("B.x/1.npy", "B/b.npy", "B/a/z.npy", "B/Z.npy", "a/1.npy", "B/10.npy", "B/9.npy", "B/a.npy"):
        save_volume(tmp_path / name)
    save_image(tmp_path / "B/a/c.PNG")
    names = [sample.name for sample in scan(tmp_path)[0]]
    assert names == [
        *("B/10.npy", "B/9.npy", "B/Z.npy", "B/a.npy", "B/a/c.PNG", "B/a/z.npy", "B/b.npy"),
        *("B.x/1.npy", "a/1.npy"),
    ]
    assert [sample.name for sample in scan(str(tmp_path), only="B.x")[0]] == ["B.x/1.npy"]


def test_sample_fields_and_helpers(tmp_path: Path) -> None:
    save_volume(tmp_path / "CT/deep/one.npy", (10, 12, 4))
    save_image(tmp_path / "Xray/p.png", height=20, width=30)
    ct, xray = samples = scan(tmp_path)[0]
    status = (tmp_path / "CT/deep/one.npy").stat()
    assert ct == Sample(
        *(tmp_path / "CT/deep/one.npy", "CT/deep/one.npy", "CT", "volume", 4, 10, 12, 2, None),
        *(status.st_size, status.st_mtime_ns),
    )
    assert (xray.kind, xray.slices, xray.height, xray.width) == ("image", 1, 20, 30)
    assert {sample.data_path for sample in samples} == {tmp_path}
    assert volumes(samples) == [0]
    lines = describe(samples).splitlines()
    assert lines == ["CT: 1 volume, 4 slices, 10 x 12 pixels", "Xray: 1 image, 20 x 30 pixels"]


def test_fingerprint_knows_a_changed_data_set_and_ignores_where_it_lies(tmp_path: Path) -> None:
    save_volume(tmp_path / "one/A/1.npy")
    save_volume(tmp_path / "one/A/2.npy")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = fingerprint(scan(tmp_path / "one")[0])
    assert first.startswith("6143145b201e981e")  # runs of earlier versions go on
    assert fingerprint(scan(tmp_path / "two")[0]) == first
    save_volume(tmp_path / "two/A/2.npy", (12, 10, 4))  # as many bytes, another shape
    assert fingerprint(scan(tmp_path / "two")[0]) != first
    os.remove(tmp_path / "one/A/2.npy")
    assert fingerprint(scan(tmp_path / "one")[0]) != first


def test_labels_hidden_and_side_files_are_not_read(tmp_path: Path) -> None:
    save_volume(tmp_path / "A/imagesTr/1.npy")
    for name in ("labels/1.npy", "labelsTr/1.npy", "x/labelsTs/1.npy", "masks/1.npy", ".cache/1.npy", ".2.npy"):
        save_volume(tmp_path / "A" / name)
    save_volume(tmp_path / ".cache/slices/1.npy")
    save_volume(tmp_path / "labels/1.npy")
    for name in ("A/notes.txt", "A/dataset.json", "A/scan.nii.gz", "A/scan.dcm", "README.md"):
        (tmp_path / name).write_bytes(b"anything")
    save_image(tmp_path / "A/montage.png")
    assert [sample.name for sample in scan(tmp_path)[0]] == ["A/imagesTr/1.npy"]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    save_volume(tmp_path / "elsewhere/deep/1.npy")
    save_volume(tmp_path / "tree/A/0.npy")
    (tmp_path / "tree/A/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree/A/loop").symlink_to(tmp_path / "tree/A")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree/B").symlink_to(tmp_path / "elsewhere")
    assert [s.name for s in scan(tmp_path / "tree")[0]] == ["A/0.npy", "A/link/deep/1.npy", "B/deep/1.npy"]


def test_data_path_errors_name_it_and_the_example(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, wanted in (("nowhere", "does not exist"), ("file", "Not a directory"), ("empty", "holds no data set")):
        message = problem(tmp_path / name)
        assert str(tmp_path / name) in message
        assert wanted in message
        assert "Training_Data" in message
    save_volume(tmp_path / "stray.npy")
    (tmp_path / "empty").rmdir()
    assert f"{tmp_path / 'stray.npy'}: lies outside any data set; move it into a folder" in problem(tmp_path)


def test_a_data_set_of_other_files_says_what_was_found(tmp_path: Path) -> None:
    save_volume(tmp_path / "Good/1.npy")
    (tmp_path / "Nifti").mkdir()
    for i in range(3):
        (tmp_path / f"Nifti/case_0.{i}.nii.gz").write_bytes(b"x")
    (tmp_path / "Nifti/dataset.json").write_text("{}")
    message = problem(tmp_path)
    assert message.startswith(f"{tmp_path / 'Nifti'}: ")
    assert "found 3 .nii.gz, 1 .json" in message


# --- dataset.yaml


def test_window_and_slice_axis_come_from_dataset_yaml(tmp_path: Path) -> None:
    save_volume(tmp_path / "CT/1.npy", (5, 20, 30))
    save_image(tmp_path / "CT/preview.png")
    (tmp_path / "CT/dataset.yaml").write_text(
        "modality: CT\nwindow: [-1000, 400.5]\nslice_axis: 0\nspacing_mm: [5, 0.7, 0.7]\nsource: ours\n"
    )
    volume, image = scan(tmp_path)[0]
    assert (volume.slices, volume.height, volume.width, volume.slice_axis) == (5, 20, 30, 0)
    assert (volume.window, volume.modality) == ((-1000.0, 400.5), "CT")
    assert image.window is None  # its grey values are not HU


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("- a\n- b\n", "mapping"),
        ("window: [", "YAML"),
        ("window: [400, -1000]", "window"),
        ("window: [1]", "window"),
        ("window: [0, .nan]", "window"),
        ("slice_axis: 3", "slice_axis"),
        ("slice_axis: true", "slice_axis"),
        ("modality: [CT, MR]", "modality"),
        ("spacing_mm: [1, 0, 1]", "spacing_mm"),
        ("channels: 4", "channels"),
        ("windows: [0, 1]", "window"),
        ("window: !!python/object/apply:os.system ['touch /tmp/never']", "YAML"),
    ],
)
def test_malformed_dataset_yaml_is_refused(tmp_path: Path, text: str, key: str) -> None:
    save_volume(tmp_path / "A/1.npy")
    (tmp_path / "A/dataset.yaml").write_text(text)
    message = problem(tmp_path)
    assert str(tmp_path / "A/dataset.yaml") in message
    assert key in message


def test_empty_dataset_yaml_means_the_defaults_and_yml_is_not_silently_ignored(tmp_path: Path) -> None:
    save_volume(tmp_path / "A/1.npy")
    (tmp_path / "A/dataset.yaml").write_text("# nothing yet\n")
    assert scan(tmp_path)[0][0].slice_axis == 2
    (tmp_path / "A/dataset.yaml").rename(tmp_path / "A/dataset.yml")
    assert "rename it to dataset.yaml" in problem(tmp_path)


def test_a_fourth_axis_needs_the_names_of_its_channels(tmp_path: Path) -> None:
    save_volume(tmp_path / "A/1.npy", (9, 10, 11, 2))
    assert "is 4D (9 x 10 x 11 x 2)" in problem(tmp_path)
    assert "channels: [t1, t2]" in problem(tmp_path)
    (tmp_path / "A/dataset.yaml").write_text("channels: [t1, t2]\nslice_axis: 0")
    (sample,) = scan(tmp_path)[0]
    assert (sample.slices, sample.height, sample.width) == (9, 10, 11)
    assert sample.channel_names == ("t1", "t2")
    (tmp_path / "A/dataset.yaml").write_text("channels: [t1, t2, flair]")
    assert "has 2 channels (9 x 10 x 11 x 2) where dataset.yaml names 3" in problem(tmp_path)


# --- NPY headers


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "<u2", ">u4", "<i8", ">u8", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_real_dtype_and_order_is_accepted(tmp_path: Path, dtype: str, order: str) -> None:
    (tmp_path / "A").mkdir()
    np.save(tmp_path / "A/1.npy", np.ones((9, 10, 11), dtype, order=order))
    assert [(s.height, s.width, s.slices, s.dtype) for s in scan(tmp_path)[0]] == [(9, 10, 11, np.dtype(dtype).name)]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_of_every_version_are_read_as_numpy_reads_them(tmp_path: Path, version: int) -> None:
    (tmp_path / "A").mkdir()
    with open(tmp_path / "A/1.npy", "wb") as file:
        np.lib.format.write_array(file, np.zeros((9, 10, 11), np.int16), version=(version, 0))
    header = b'{"shape": (9,10,11), "fortran_order": True, "descr": "|u1"}\n'  # as other libraries may write it
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(990)
    (tmp_path / "A/2.npy").write_bytes(content)
    assert np.load(tmp_path / "A/2.npy").shape == (9, 10, 11)
    assert [(s.height, s.width, s.slices) for s in scan(tmp_path)[0]] == [(9, 10, 11)] * 2


def test_a_header_that_claims_a_terabyte_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000, 10000, 10000)}\n"
    (tmp_path / "A/1.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    tracemalloc.start()
    message = problem(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert "is truncated" in message


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{'descr'",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 5000,
        b"\x93NUMPY\x01\x00\x00\x20" + b"(" * 0x2000,
        b"\x93NUMPY\x01\x00\x02\x00{}",
        b"\x93NUMPY\x01\x00\x26\x00{'descr': 'q9q', 'shape': (9, 9, 9)}    ",
        pickle.dumps([1, 2, 3]),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "A").mkdir()
    (tmp_path / "A/1.npy").write_bytes(content)
    assert str(tmp_path / "A/1.npy") in problem(tmp_path)


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    (tmp_path / "tree/A").mkdir(parents=True)
    attack = np.full((9, 9, 9), None, dtype=object)
    attack[0, 0, 0] = Malicious(tmp_path / "executed")
    np.save(tmp_path / "tree/A/object.npy", attack)
    (tmp_path / "tree/A/raw.npy").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    pickled, raw = problems(tmp_path / "tree")
    assert "Python objects" in pickled
    assert "raw.npy: is not an NPY file" in raw
    assert not (tmp_path / "executed").exists()
    np.load(tmp_path / "tree/A/object.npy", allow_pickle=True)
    assert (tmp_path / "executed").exists()  # the attack works where it is let in


# --- images


def test_images_of_every_suffix_are_found_and_never_decoded(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "c.jpeg", "d.tif", "e.TIFF", "f.bmp"):
        save_image(tmp_path / "A" / name)
    png = tmp_path / "A/a.png"
    png.write_bytes(png.read_bytes()[:60])  # the header is whole, the pixels are not
    assert [(s.kind, s.slices, s.height, s.width) for s in scan(tmp_path)[0]] == [("image", 1, 20, 30)] * 6


def bomb() -> bytes:
    """A PNG of 57 bytes that claims 50,000 x 50,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_images_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "A/tiny.png", 7, 30)
    (tmp_path / "A/text.bmp").write_text("patient,slice")
    (tmp_path / "A/bomb.png").write_bytes(bomb())
    (tmp_path / "A/gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("L", (20, 20)).save(tmp_path / "A/postscript.eps")
    (tmp_path / "A/postscript.eps").rename(tmp_path / "A/postscript.tif")
    pages = [Image.new("L", (20, 20), i) for i in range(3)]
    pages[0].save(tmp_path / "A/stack.tif", save_all=True, append_images=pages[1:])
    wanted = ["pixels; reduce", "cannot be read", "not a readable", "stack of 3 pages", "not a readable", "7 x 30"]
    for line, text in zip(problems(tmp_path), wanted, strict=True):
        assert text in line


# --- broken files: scan, cache and check each say what is wrong and what to do, and lose nothing else


# What is wrong and what to do, in the words that must stand on the file's line.
BY_HEADER = {
    "bool.npy": ("has dtype bool", "astype"),
    "complex.npy": ("has dtype complex64", "the magnitude"),
    "empty.npy": ("is empty (0 bytes)", "copy it again"),
    "npz_renamed.npy": ("is a zip archive", "np.save"),
    "object_dtype.npy": ("has dtype object", "never Python objects"),
    "slice_2d.npy": ("is 2D", "as images"),
    "text_renamed.npy": ("is not an NPY file", "np.save or remove it"),
    "tiny.npy": ("5 x 4 pixels", "remove it, or set slice_axis"),
    "trailing.npy": ("has trailing bytes", "copy it again"),
    "truncated.npy": ("is truncated", "copy it again"),
    "volume_4d.npy": ("is 4D", "channels: [t1, t2]"),
    "zero_axis.npy": ("has 0 slices", "remove it"),
}
BY_CONTENT = {
    "all_nan.npy": ("are NaN or Inf", "np.nan_to_num"),
    "constant.npy": ("is constant", "--on_bad skip"),
    "nan_inf.npy": ("3 of 16800 values are NaN or Inf", "np.nan_to_num"),
    "truncated.png": ("broken image data", "export it again"),
}
ACCEPTED = "fortran_big_endian.npy"


def volume(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x, z = np.mgrid[-1:1:30j, -1:1:28j, -1:1:20j]
    return (900 * np.exp(-3 * (x**2 + y**2 + z**2)) + 30 * rng.standard_normal(x.shape)).astype(np.float32)


def write_bad(folder: Path, names: Iterable[str]) -> None:
    """These of the files above."""
    good = volume()
    partly = good.copy()
    partly[3, 4, 5], partly[4, 5, 6], partly[5, 6, 7] = np.nan, np.inf, -np.inf
    arrays = {
        "all_nan.npy": np.full((20, 20, 10), np.nan, np.float32),
        "bool.npy": good > 0,
        "complex.npy": good.astype(np.complex64),
        "constant.npy": np.full((16, 16, 16), 42, np.int16),
        ACCEPTED: np.asfortranarray(good.round().astype(">i2")),
        "nan_inf.npy": partly,
        "object_dtype.npy": np.array([good[0], {"spacing": 1.0}], dtype=object),
        "slice_2d.npy": good[:, :, 10],
        "tiny.npy": good[:5, :4, :3],
        "trailing.npy": good,
        "truncated.npy": good,
        "volume_4d.npy": np.stack([good, good], axis=-1),
        "zero_axis.npy": good[:, :, :0],
    }
    for name in names:
        if name in arrays:
            np.save(folder / name, arrays[name], allow_pickle=True)
        elif name == "npz_renamed.npy":
            with open(folder / name, "wb") as file:
                np.savez_compressed(file, image=good)
        elif name == "truncated.png":
            Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40), dtype=np.uint8)).save(folder / name)
        else:
            (folder / name).write_text("" if name.startswith("empty") else "case,label\n1,0\n2,1\n")
    for name, size in (("truncated.npy", 33_000), ("truncated.png", 601), ("trailing.npy", 67_329)):
        if name in names:
            os.truncate(folder / name, size)


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


def assert_lines(lines: list[str], tree: Path, expected: dict[str, tuple[str, str]]) -> None:
    """One line per file, in order, each with its file first, then what is wrong and what to do."""
    for line, name in zip(lines, sorted(expected), strict=True):
        start = f"{tree / 'A' / name}: "
        assert line.strip().startswith(start)
        wrong, remedy = expected[name]
        assert wrong in line.replace(start, "")
        assert remedy in line.split(wrong)[1]


def test_scan_cache_and_check_name_each_bad_file_and_skipping_keeps_everything_else(tree: Path, capsys) -> None:
    alone = prepare(tree, 24, tree.parent / "cache", progress=False)
    write_bad(tree / "A", [*BY_HEADER, *BY_CONTENT, ACCEPTED])
    assert_lines(scan(tree)[1], tree, BY_HEADER)
    with pytest.raises(UserError, match="12 problems") as caught:
        prepare(tree, 24, progress=False)
    assert str(caught.value).endswith("... and 2 more")
    assert_lines(str(caught.value).splitlines()[1:-1], tree, dict(sorted(BY_HEADER.items())[:10]))

    _, findings, contents = check(tree, full=True, workers=2, progress=False)
    errors = [f.message for f in findings if f.level == "error"]
    assert_lines(errors[: len(BY_HEADER)], tree, BY_HEADER)
    assert_lines(errors[len(BY_HEADER) :], tree, BY_CONTENT)

    store = prepare(tree, 24, on_bad="skip", progress=False)
    names = {s.name: i for i, s in enumerate(store.samples)}
    assert names.keys() == {s.name for s in contents} == {f"A/{ACCEPTED}", *(s.name for s in alone.samples)}
    left_out = [line.removeprefix("warning: left out ") for line in capsys.readouterr().err.splitlines()]
    assert_lines(left_out[: len(BY_HEADER)], tree, BY_HEADER)
    assert_lines(left_out[len(BY_HEADER) :], tree, BY_CONTENT)
    for i, s in enumerate(alone.samples):
        np.testing.assert_array_equal(store.read(names[s.name], 0, s.slices), alone.read(i, 0, s.slices))


def test_one_bad_file_alone_is_one_line_and_nothing_left_to_train_on_an_error(tree: Path) -> None:
    write_bad(tree / "A", ["constant.npy"])
    with pytest.raises(UserError) as caught:
        prepare(tree, 24, progress=False)
    assert_lines([str(caught.value)], tree, {"constant.npy": BY_CONTENT["constant.npy"]})
    (tree / "B").rename(tree / ".B")
    for good in (tree / "A").glob("good*"):
        good.unlink()
    with pytest.raises(UserError, match="is constant"):
        prepare(tree, 24, on_bad="skip", progress=False)


def test_a_data_set_whose_settings_cannot_be_read_is_never_left_out(tree: Path) -> None:
    """Without its dataset.yaml a CT would be trained on without its window."""
    (tree / "B/dataset.yaml").write_text("window: [400, -1000]")
    with pytest.raises(UserError, match=r"dataset\.yaml: window"):
        prepare(tree, 24, on_bad="skip", progress=False)


@pytest.mark.slow
def test_training_with_skip_ends_as_if_bad_files_were_not_there(tree: Path, tmp_path: Path) -> None:
    run("mask_swav", tree, tmp_path / "without", epochs=1)
    write_bad(tree / "A", BY_CONTENT)
    run("mask_swav", tree, tmp_path / "with", epochs=1, on_bad="skip")
    folders = [tmp_path / place / "runs/mask_swav" for place in ("without", "with")]
    assert losses(folders[0]) == losses(folders[1])
