"""The sample index: what it finds, in which order, and how broken files that users have are named."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save

from datasets.check import check
from datasets.index import fingerprint, scan
from datasets.store import prepare
from utils.errors import UserError


def save_volume(path: Path, shape: tuple[int, ...] = (10, 12, 4)) -> Path:
    return save(path, (np.arange(np.prod(shape)) % 120).reshape(shape).astype("i2"))


def save_image(path: Path, height: int = 20, width: int = 30) -> Path:
    return save(path, (np.arange(height * width) % 256).reshape(height, width).astype(np.uint8))


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
    for name in ("nowhere", "file", "empty"):
        assert re.match(f"data_path: {tmp_path / name} .* --data_path Training_Data", problem(tmp_path / name))
    save_volume(tmp_path / "stray.npy")
    (tmp_path / "empty").rmdir()
    assert f"{tmp_path / 'stray.npy'}: lies outside any data set; move it into a folder" in problem(tmp_path)


def test_a_data_set_of_other_files_says_what_was_found(tmp_path: Path) -> None:
    save_volume(tmp_path / "Good/1.npy")
    (tmp_path / "Nifti").mkdir()
    for name in ("case_0.1.nii.gz", "case_0.2.nii.gz", "dataset.json"):
        (tmp_path / "Nifti" / name).write_bytes(b"x")
    assert re.match(f"{tmp_path / 'Nifti'}: .*found 2 .nii.gz, 1 .json", problem(tmp_path))


# --- dataset.yaml


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("- a\n- b\n", "mapping"),
        ("window: [", "YAML"),
        ("window: [0, .nan]", "window"),
        ("slice_axis: true", "slice_axis"),
        ("windows: [0, 1]", "window"),
        ("structures: {left atrium: 1}", "structures"),
        ("window: !!python/object/apply:os.system ['touch /tmp/never']", "YAML"),
    ],
)
def test_malformed_dataset_yaml_is_refused(tmp_path: Path, text: str, key: str) -> None:
    save_volume(tmp_path / "A/1.npy")
    (tmp_path / "A/dataset.yaml").write_text(text)
    message = problem(tmp_path)
    assert str(tmp_path / "A/dataset.yaml") in message
    assert key in message


def test_pipes_in_place_of_files_are_named_and_not_waited_for(tmp_path: Path) -> None:
    save_volume(tmp_path / "A/1.npy")
    os.mkfifo(tmp_path / "A/2.npy")
    os.mkfifo(tmp_path / "A/3.png")
    assert all("is not a regular file; remove it" in line for line in problems(tmp_path))
    os.mkfifo(tmp_path / "A/dataset.yaml")
    assert problem(tmp_path) == f"{tmp_path / 'A/dataset.yaml'}: is not a regular file; remove it"


def test_empty_dataset_yaml_means_the_defaults_and_yml_is_not_silently_ignored(tmp_path: Path) -> None:
    save_volume(tmp_path / "A/1.npy")
    (tmp_path / "A/dataset.yaml").write_text("# nothing yet\n")
    assert scan(tmp_path)[0][0].slice_axis == 2
    (tmp_path / "A/dataset.yaml").rename(tmp_path / "A/dataset.yml")
    assert "rename it to dataset.yaml" in problem(tmp_path)


# --- NPY headers


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


# --- images


def test_images_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "A/tiny.png", 7, 30)
    (tmp_path / "A/text.bmp").write_text("patient,slice")
    (tmp_path / "A/gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("L", (20, 20)).save(tmp_path / "A/postscript.eps")
    (tmp_path / "A/postscript.eps").rename(tmp_path / "A/postscript.tif")
    pages = [Image.new("L", (20, 20), i) for i in range(3)]
    pages[0].save(tmp_path / "A/stack.tif", save_all=True, append_images=pages[1:])
    wanted = ["cannot be read", "not a readable", "stack of 3 pages", "not a readable", "7 x 30"]
    for line, text in zip(problems(tmp_path), wanted, strict=True):
        assert text in line


# --- broken files: scan, cache and check each say what is wrong and what to do, and lose nothing else


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(30, 28, 20)).astype(np.float32)


def broken() -> dict[str, tuple[bytes, str, str]]:
    """name: content, what is wrong, the remedy."""
    good, partly, archive, image = volume(), volume(), io.BytesIO(), io.BytesIO()
    partly[3, 4, 5], partly[4, 5, 6], partly[5, 6, 7] = np.nan, np.inf, -np.inf
    np.savez_compressed(archive, image=good)
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40), dtype=np.uint8)).save(image, "png")
    copy = "copy it again"
    return {
        "bad_header.npy": (b"\x93NUMPY\x01\x00\xff\xff{'descr'", "has a damaged NPY header", "np.save"),
        "empty.npy": (b"", "is empty (0 bytes)", copy),
        "object.npy": (npy(good.astype(object)), "has dtype object", "never Python objects"),
        "npz_renamed.npy": (archive.getvalue(), "is a zip archive", "np.save"),
        "text_renamed.npy": (b"case,label", "is not an NPY file", "np.save or remove it"),
        "tiny.npy": (npy(good[:5, :4, :3]), "5 x 4 pixels", "remove it, or set slice_axis"),
        "truncated.npy": (npy(good)[:33_000], "is truncated", copy),
        "volume_4d.npy": (npy(np.stack([good, good], axis=-1)), "is 4D (30 x 28 x 20 x 2)", "channels: [t1, t2]"),
        "CONSTANT.npy": (npy(np.full((16, 16, 16), 42, np.int16)), "is constant", "--on_bad skip"),
        "NAN_INF.npy": (npy(partly), "3 of 16800 values are NaN or Inf", "np.nan_to_num"),
        "TRUNCATED.png": (image.getvalue()[:601], "broken image data", "export it again"),
    }


BROKEN = broken()
BY_HEADER, BY_CONTENT = (sorted(n for n in BROKEN if n.split(".")[0].isupper() == upper) for upper in (False, True))
ACCEPTED = "fortran_big_endian.npy"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two good volumes and a good image in each of two data sets."""
    for k, name in enumerate("AB"):
        save_image(tmp_path / "tree" / name / "good.png", 20 + k)
        for i in range(2):
            np.save(tmp_path / "tree" / name / f"good_{i}.npy", volume(10 * k + i))
    return tmp_path / "tree"


def assert_lines(lines: list[str], tree: Path, names: list[str]) -> None:
    """One line per file, in order, each with its file first, then what is wrong and what to do."""
    for line, name in zip(lines, names, strict=True):
        assert line.strip().startswith(f"{tree / 'A' / name}: ")
        _, wrong, remedy = BROKEN[name]
        assert remedy in line.partition(wrong)[2]


def test_scan_cache_and_check_name_each_bad_file_and_skipping_keeps_everything_else(tree: Path, capsys) -> None:
    alone = prepare(tree, 24, tree.parent / "cache", progress=False)
    for name, (content, *_) in BROKEN.items():
        (tree / "A" / name).write_bytes(content)
    np.save(tree / "A" / ACCEPTED, np.asfortranarray((900 * volume()).astype(">i2")))
    assert_lines(scan(tree)[1], tree, BY_HEADER)
    with pytest.raises(UserError, match="8 problems") as caught:
        prepare(tree, 24, progress=False)
    assert_lines(str(caught.value).splitlines()[1:], tree, BY_HEADER)

    _, findings, contents = check(tree, True, (8, 8, 8), workers=2)
    errors = [f.message for f in findings if f.level == "error"]
    assert_lines(errors, tree, BY_HEADER + BY_CONTENT)

    store = prepare(tree, 24, on_bad="skip", progress=False)
    names = {s.name: i for i, s in enumerate(store.samples)}
    assert names.keys() == {s.name for s in contents} == {f"A/{ACCEPTED}", *(s.name for s in alone.samples)}
    left_out = [line.removeprefix("warning: left out ") for line in capsys.readouterr().err.splitlines()]
    assert_lines(left_out, tree, BY_HEADER + BY_CONTENT)
    for i, s in enumerate(alone.samples):
        np.testing.assert_array_equal(store.read(names[s.name], 0, s.slices), alone.read(i, 0, s.slices))


def test_a_data_set_whose_settings_cannot_be_read_is_never_left_out(tree: Path) -> None:
    """Without its dataset.yaml a CT would be trained on without its window."""
    (tree / "B/dataset.yaml").write_text("window: [400, -1000]")
    with pytest.raises(UserError, match=r"dataset\.yaml: window"):
        prepare(tree, 24, on_bad="skip", progress=False)
