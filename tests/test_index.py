"""The sample index: what it finds, in which order, and what it refuses."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.index import Sample, describe, fingerprint, scan, slice_offsets, volumes
from utils.errors import UserError


def save_volume(path: Path, shape: tuple[int, ...] = (10, 12, 4), dtype: str = "i2") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, (np.arange(np.prod(shape)) % 120).reshape(shape).astype(dtype))
    return path


def save_image(path: Path, height: int = 20, width: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.arange(height * width) % 256).reshape(height, width).astype(np.uint8)).save(path)
    return path


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        scan(root)
    return str(caught.value)


def test_order_is_by_data_set_then_relative_path_in_bytes(tmp_path: Path) -> None:
    # Written in an order that is neither; "B.x" sorts after "B" as a data set, before "B/" in a joined path.
    for name in ("B.x/1.npy", "B/b.npy", "B/a/z.npy", "B/Z.npy", "a/1.npy", "B/10.npy", "B/9.npy", "B/a.npy"):
        save_volume(tmp_path / name)
    save_image(tmp_path / "B/a/c.PNG")
    names = [sample.name for sample in scan(tmp_path)]
    assert names == [
        *("B/10.npy", "B/9.npy", "B/Z.npy", "B/a.npy", "B/a/c.PNG", "B/a/z.npy", "B/b.npy"),
        *("B.x/1.npy", "a/1.npy"),
    ]
    assert [sample.name for sample in scan(str(tmp_path), only="B.x")] == ["B.x/1.npy"]


def test_sample_fields_and_helpers(tmp_path: Path) -> None:
    save_volume(tmp_path / "CT/deep/one.npy", (10, 12, 4))
    save_image(tmp_path / "Xray/p.png", height=20, width=30)
    save_volume(tmp_path / "MR/two.npy", (9, 11, 7))
    samples = scan(tmp_path)
    ct, _, xray = samples
    status = (tmp_path / "CT/deep/one.npy").stat()
    assert ct == Sample(
        *(tmp_path / "CT/deep/one.npy", "CT/deep/one.npy", "CT", "volume", 4, 10, 12, 2, None),
        *(status.st_size, status.st_mtime_ns),
    )
    assert (xray.kind, xray.slices, xray.height, xray.width, xray.channels) == ("image", 1, 20, 30, 1)
    assert {sample.data_path for sample in samples} == {tmp_path}
    assert volumes(samples) == [0, 1]
    offsets = slice_offsets(samples)
    assert (offsets.dtype, offsets.tolist()) == (np.int64, [0, 4, 11, 12])
    table = describe(samples).splitlines()
    assert table[1].split() == ["CT", "volume", "1", "4", "10", "x", "12"]
    assert len(table) == 4


def test_fingerprint_knows_a_changed_data_set_and_ignores_where_it_lies(tmp_path: Path) -> None:
    save_volume(tmp_path / "one/A/1.npy")
    save_volume(tmp_path / "one/A/2.npy")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = fingerprint(scan(tmp_path / "one"))
    assert first.startswith("6143145b201e981e")  # runs of earlier versions go on
    assert fingerprint(scan(tmp_path / "two")) == first
    save_volume(tmp_path / "two/A/2.npy", (12, 10, 4))  # as many bytes, another shape
    assert fingerprint(scan(tmp_path / "two")) != first
    os.remove(tmp_path / "one/A/2.npy")
    assert fingerprint(scan(tmp_path / "one")) != first


def test_labels_hidden_and_side_files_are_not_read(tmp_path: Path) -> None:
    save_volume(tmp_path / "A/imagesTr/1.npy")
    for name in ("labels/1.npy", "labelsTr/1.npy", "x/labelsTs/1.npy", "masks/1.npy", ".cache/1.npy", ".2.npy"):
        save_volume(tmp_path / "A" / name)
    save_volume(tmp_path / ".cache/slices/1.npy")
    save_volume(tmp_path / "labels/1.npy")
    for name in ("A/notes.txt", "A/dataset.json", "A/scan.nii.gz", "A/scan.dcm", "README.md"):
        (tmp_path / name).write_bytes(b"anything")
    save_image(tmp_path / "A/montage.png")
    assert [sample.name for sample in scan(tmp_path)] == ["A/imagesTr/1.npy"]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    save_volume(tmp_path / "elsewhere/deep/1.npy")
    save_volume(tmp_path / "tree/A/0.npy")
    (tmp_path / "tree/A/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree/A/loop").symlink_to(tmp_path / "tree/A")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tree/B").symlink_to(tmp_path / "elsewhere")
    assert [s.name for s in scan(tmp_path / "tree")] == ["A/0.npy", "A/link/deep/1.npy", "B/deep/1.npy"]


def test_data_path_errors_name_it_and_the_example(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, wanted in (("nowhere", "does not exist"), ("file", "not a folder"), ("empty", "holds no data set")):
        message = refusal(tmp_path / name)
        assert str(tmp_path / name) in message
        assert wanted in message
        assert "Training_Data" in message
    save_volume(tmp_path / "stray.npy")
    assert f"{tmp_path / 'stray.npy'}: lies outside any data set; move it into a folder" in refusal(tmp_path)


def test_a_data_set_of_other_files_says_what_was_found(tmp_path: Path) -> None:
    save_volume(tmp_path / "Good/1.npy")
    (tmp_path / "Nifti").mkdir()
    for i in range(3):
        (tmp_path / f"Nifti/case_0.{i}.nii.gz").write_bytes(b"x")
    (tmp_path / "Nifti/dataset.json").write_text("{}")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'Nifti'}: ")
    assert "height x width x slices" in message
    assert "found 3 .nii.gz, 1 .json" in message


# --- dataset.yaml


def test_window_and_slice_axis_come_from_dataset_yaml(tmp_path: Path) -> None:
    save_volume(tmp_path / "CT/1.npy", (5, 20, 30))
    save_image(tmp_path / "CT/preview.png")
    (tmp_path / "CT/dataset.yaml").write_text(
        "modality: CT\nwindow: [-1000, 400.5]\nslice_axis: 0\nspacing_mm: [5, 0.7, 0.7]\nsource: ours\n"
    )
    volume, image = scan(tmp_path)
    assert (volume.slices, volume.height, volume.width, volume.slice_axis) == (5, 20, 30, 0)
    assert (volume.window, volume.modality) == ((-1000.0, 400.5), "CT")
    assert image.window is None  # its grey values are not HU


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("- a\n- b\n", "mapping"),
        ("just text", "mapping"),
        ("window: [", "YAML"),
        ("window: [400, -1000]", "window"),
        ("window: [1]", "window"),
        ("window: 400", "window"),
        ("window: [low, high]", "window"),
        ("window: [0, .nan]", "window"),
        ("window: [0, .inf]", "window"),
        ("slice_axis: 3", "slice_axis"),
        ("slice_axis: true", "slice_axis"),
        ("slice_axis: '2'", "slice_axis"),
        ("modality: [CT, MR]", "modality"),
        ("spacing_mm: [1, 1]", "spacing_mm"),
        ("spacing_mm: [1, 0, 1]", "spacing_mm"),
        ("channels: 4", "channels"),
        ("channels: []", "channels"),
        ("windows: [0, 1]", "window"),
        ("window: !!python/object/apply:os.system ['touch /tmp/never']", "YAML"),
    ],
)
def test_malformed_dataset_yaml_is_refused(tmp_path: Path, text: str, key: str) -> None:
    save_volume(tmp_path / "A/1.npy")
    (tmp_path / "A/dataset.yaml").write_text(text)
    message = refusal(tmp_path)
    assert str(tmp_path / "A/dataset.yaml") in message
    assert key in message


def test_empty_dataset_yaml_means_the_defaults_and_yml_is_not_silently_ignored(tmp_path: Path) -> None:
    save_volume(tmp_path / "A/1.npy")
    (tmp_path / "A/dataset.yaml").write_text("# nothing yet\n")
    assert scan(tmp_path)[0].slice_axis == 2
    (tmp_path / "A/dataset.yaml").rename(tmp_path / "A/dataset.yml")
    assert "rename it to dataset.yaml" in refusal(tmp_path)


def test_a_fourth_axis_needs_the_names_of_its_channels(tmp_path: Path) -> None:
    save_volume(tmp_path / "A/1.npy", (9, 10, 11, 2))
    assert "is 4D (9 x 10 x 11 x 2)" in refusal(tmp_path)
    assert "channels: [t1, t2]" in refusal(tmp_path)
    (tmp_path / "A/dataset.yaml").write_text("channels: [t1, t2]\nslice_axis: 0")
    (sample,) = scan(tmp_path)
    assert (sample.slices, sample.height, sample.width) == (9, 10, 11)
    assert (sample.channels, sample.channel_names) == (2, ("t1", "t2"))
    (tmp_path / "A/dataset.yaml").write_text("channels: [t1, t2, flair]")
    assert "has 2 channels (9 x 10 x 11 x 2) where dataset.yaml names 3" in refusal(tmp_path)


# --- NPY headers


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "<u2", ">u4", "<i8", ">u8", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_real_dtype_and_order_is_accepted(tmp_path: Path, dtype: str, order: str) -> None:
    (tmp_path / "A").mkdir()
    np.save(tmp_path / "A/1.npy", np.ones((9, 10, 11), dtype, order=order))
    assert [(s.height, s.width, s.slices, s.dtype) for s in scan(tmp_path)] == [(9, 10, 11, np.dtype(dtype).name)]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_of_every_version_are_read_as_numpy_reads_them(tmp_path: Path, version: int) -> None:
    (tmp_path / "A").mkdir()
    with open(tmp_path / "A/1.npy", "wb") as file:
        np.lib.format.write_array(file, np.zeros((9, 10, 11), np.int16), version=(version, 0))
    header = b'{"shape": (9,10,11), "fortran_order": True, "descr": "|u1"}\n'  # as other libraries may write it
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(990)
    (tmp_path / "A/2.npy").write_bytes(content)
    assert np.load(tmp_path / "A/2.npy").shape == (9, 10, 11)
    assert [(s.height, s.width, s.slices) for s in scan(tmp_path)] == [(9, 10, 11)] * 2


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.zeros((9, 9, 9), bool), "dtype bool"),
        (np.zeros((9, 9, 9), "U3"), "dtype <U3"),
        (np.zeros((9, 9, 9), [("a", "f4"), ("b", "f4")]), "several columns"),
        (np.zeros((9, 9, 9), "M8[s]"), "dtype datetime64"),
        (np.zeros(()), "0D (a single number)"),
        (np.zeros((9, 7, 9)), "9 x 7 pixels"),
    ],
)
def test_arrays_that_are_no_volume_are_refused(tmp_path: Path, array: np.ndarray, wanted: str) -> None:
    (tmp_path / "A").mkdir()
    np.save(tmp_path / "A/1.npy", array)
    message = refusal(tmp_path)
    assert str(tmp_path / "A/1.npy") in message
    assert wanted in message


def test_eight_pixels_and_one_slice_are_enough_and_one_byte_is_too_many(tmp_path: Path) -> None:
    file = save_volume(tmp_path / "A/1.npy", (8, 8, 1))
    assert scan(tmp_path)[0].slices == 1
    file.write_bytes(file.read_bytes() + b"\0")
    assert "trailing bytes" in refusal(tmp_path)


def test_a_header_that_claims_a_terabyte_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000, 10000, 10000)}\n"
    (tmp_path / "A/1.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    tracemalloc.start()
    message = refusal(tmp_path)
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
    assert str(tmp_path / "A/1.npy") in refusal(tmp_path)


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
    message = refusal(tmp_path / "tree")
    assert "Python objects" in message
    assert "raw.npy: is not an NPY file" in message
    assert not (tmp_path / "executed").exists()
    np.load(tmp_path / "tree/A/object.npy", allow_pickle=True)
    assert (tmp_path / "executed").exists()  # the attack works where it is let in


# --- images


def test_images_of_every_suffix_are_found_and_never_decoded(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "c.jpeg", "d.tif", "e.TIFF", "f.bmp"):
        save_image(tmp_path / "A" / name)
    png = tmp_path / "A/a.png"
    png.write_bytes(png.read_bytes()[:60])  # the header is whole, the pixels are not
    assert [(s.kind, s.slices, s.height, s.width) for s in scan(tmp_path)] == [("image", 1, 20, 30)] * 6


def bomb() -> bytes:
    """A PNG of 57 bytes that claims 50,000 x 50,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_images_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "A/tiny.png", 7, 30)
    (tmp_path / "A/empty.jpg").write_bytes(b"")
    (tmp_path / "A/text.bmp").write_text("patient,slice")
    (tmp_path / "A/bomb.png").write_bytes(bomb())
    (tmp_path / "A/gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("L", (20, 20)).save(tmp_path / "A/postscript.eps")
    (tmp_path / "A/postscript.eps").rename(tmp_path / "A/postscript.tif")
    pages = [Image.new("L", (20, 20), i) for i in range(3)]
    pages[0].save(tmp_path / "A/stack.tif", save_all=True, append_images=pages[1:])
    lines = refusal(tmp_path).splitlines()
    assert lines[0] == f"data_path {tmp_path}: 7 problems"
    wanted = ["pixels; reduce", "is empty", "cannot be read", "not a readable", "stack of 3 pages", "not a readable"]
    for line, text in zip(lines[1:], [*wanted, "7 x 30 pixels"], strict=True):
        assert text in line


def test_many_bad_files_make_one_error_with_ten_of_them_and_their_count(tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    for i in range(13):
        (tmp_path / f"A/{i:02}.npy").write_bytes(b"")
    lines = refusal(tmp_path).splitlines()
    assert "13 problems" in lines[0]
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [str(tmp_path / f"A/{i:02}.npy") for i in range(10)]
    assert lines[11:] == ["  ... and 3 more"]
