"""The data check: what it finds by headers and by content, and what it leaves alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import check_data
from datasets import check as check_module
from datasets.check import check, read_content
from datasets.headers import Finding, header_findings, header_warnings, outliers
from datasets.index import Sample, scan
from datasets.store import prepare
from utils import config
from utils.errors import UserError

RNG = np.random.default_rng(7)

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(name: str, slices: int = 40, height: int = 512, width: int = 512, **changes) -> Sample:
    """What `scan` would return for a file that need not exist."""
    path = Path("/nowhere") / name
    kind = "volume" if name.endswith(".npy") else "image"
    size = 128 + 2 * slices * height * width
    whole_second = 1_500_000_000 * 10**9
    first = Sample(
        path, name, name.split("/")[0], kind, slices, height, width, 2, None, size, whole_second, "int16", None
    )
    return replace(first, **changes)


def some(count: int, dataset: str = "A", **changes) -> list[Sample]:
    return [sample(f"{dataset}/usual_{i:03}.npy", **changes) for i in range(count)]


def checks(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings]


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def blob(scale: float = 1000.0, offset: float = 0.0, shape: tuple[int, int, int] = (24, 20, 10)) -> np.ndarray:
    """A volume that differs from every other in a natural way."""
    y, x, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    a, b = RNG.uniform(-0.3, 0.3, 2)
    field = np.exp(-3 * ((y - a) ** 2 + (x - b) ** 2 + z**2)) + 0.05 * RNG.standard_normal(shape)
    return offset + scale * RNG.uniform(0.8, 1.25) * field


def ct(shape: tuple[int, int, int] = (24, 20, 10)) -> np.ndarray:
    """Air, soft tissue and bone in HU, int16."""
    return blob(1800, -1000, shape).clip(-1024, 3071).astype(np.int16)


def found(root: Path, full: bool = True, **options) -> list[Finding]:
    return check(root, full, progress=False, **options)[1]


# --- by headers


def test_like_files_raise_no_warning() -> None:
    assert header_warnings(some(30) + some(20, "B", slices=300, height=256, width=256), (32, 128, 128)) == []


def test_volumes_with_fewer_slices_than_a_view_are_counted_and_the_worst_named() -> None:
    samples = [*some(9), sample("A/short.npy", 20), sample("A/shortest.npy", 14)]
    (line,) = header_warnings(samples, (32, 128, 128))
    assert line.startswith("A: 2 of 11 volumes have fewer slices than a view (32)")
    assert line.index("shortest.npy (14)") < line.index("short.npy (20)")
    assert "--target_shape" in line
    assert header_warnings(samples) == []  # 2D stages have no such target


def test_outliers_are_far_in_robust_deviations_and_in_what_matters() -> None:
    values = [8, 9, 10, 10, 11, 12, 13, 40]  # median 10.5, absolute deviations' median 1.5: five are 11.12
    assert outliers(values, 0).tolist() == [False] * 7 + [True]
    assert not outliers([*values[:-1], 21.6], 0).any()
    assert outliers([*values[:-1], 21.7], 0).any()
    assert not outliers(values, 30).any()
    assert outliers([5] * 7 + [6], 0.5).any()  # no deviation at all: the least difference decides
    assert not outliers([5] * 7 + [6], 1.5).any()
    assert not outliers([5] * 6 + [600], 0.5).any()  # seven files are too few


@pytest.mark.parametrize(
    ("odd", "name", "shown"),
    [
        ({"height": 200, "width": 200}, "in-plane size", "200 x 200"),
        ({"slices": 400}, "slice count", "400"),
        ({"slices": 8}, "slice count", "8"),
        ({"size_bytes": 10**9}, "file size", "1000000000 bytes"),
    ],
)
def test_a_file_of_another_size_is_named_once(odd: dict, name: str, shown: str) -> None:
    samples = [*some(12), sample("A/odd.npy", **odd)]
    (finding,) = header_findings(samples)
    assert (finding.check, finding.files, finding.level) == (name, ["A/odd.npy"], "warning")
    assert f"odd.npy ({shown})" in finding.message


def test_natural_variation_of_sizes_is_left_alone() -> None:
    counts = RNG.lognormal(math.log(150), 0.5, 200).astype(int).clip(40)
    samples = [sample(f"A/{i}.npy", int(n), *RNG.integers(400, 600, 2).tolist()) for i, n in enumerate(counts)]
    assert header_findings(samples) == []


@pytest.mark.parametrize(
    ("shape", "suspected"),
    [
        ((512, 512, 40), False),
        ((512, 512, 1800), False),  # whole body
        ((168, 168, 1100), False),  # whole-body PET
        ((64, 64, 300), False),  # a spine, cut out
        ((91, 109, 91), False),  # MNI
        ((160, 256, 256), False),  # head, isotropic
        ((208, 300, 40), False),
        ((40, 512, 512), True),  # SimpleITK's order
        ((300, 512, 512), True),
        ((512, 40, 512), True),
        ((20, 320, 256), True),
        ((32, 32, 512), True),
    ],
)
def test_slices_along_a_long_axis_beside_a_short_one_are_suspected(shape: tuple, suspected: bool) -> None:
    height, width, slices = shape
    findings = header_findings([sample("A/1.npy", slices, height, width)])
    assert checks(findings) == ["slice axis"] * suspected


def test_the_slice_axis_that_dataset_yaml_gives_is_believed_where_it_fits() -> None:
    turned = [sample(f"A/{i}.npy", 512, 40, 512) for i in range(3)]  # 40 x 512 x 512 read along axis 2
    (finding,) = header_findings(turned)
    assert "slice_axis: 0" in finding.message
    assert "0.npy (40 x 512 x 512)" in finding.message
    assert header_findings([sample(f"A/{i}.npy", 40, 512, 512, slice_axis=0) for i in range(3)]) == []
    (finding,) = header_findings(turned + some(20))
    assert finding.message.startswith("A: 3 of 23 volumes")
    assert "slice_axis:" not in finding.message  # it would turn the others


def test_a_data_set_in_simpleitk_order_is_known_by_the_side_that_varies() -> None:
    heights = [330, 350, 400, 420, 512, 600, 700, 800]  # slice counts that are no sign, one by one
    (finding,) = header_findings([sample(f"A/{i}.npy", 512, h, 512) for i, h in enumerate(heights)])
    assert (finding.check, len(finding.files)) == ("slice axis", 8)
    assert header_findings([sample(f"A/{i}.npy", h, 512, 512) for i, h in enumerate(heights)]) == []


def test_mixed_dtypes_are_counted_and_byte_order_is_no_difference(tmp_path: Path) -> None:
    for i, dtype in enumerate(["<i2", ">i2", "<i2", "<f4"]):
        save(tmp_path / f"A/{i}.npy", blob().astype(dtype))
    (finding,) = header_findings(scan(tmp_path))
    assert finding.message.startswith("A: 1 of 4 volumes has another dtype than the others (3 int16, 1 float32): 3.npy")
    assert header_findings([*some(3), *some(3, "B", dtype="float32")]) == []  # between data sets it is normal


def test_a_hu_window_on_unsigned_volumes_is_doubted() -> None:
    (finding,) = header_findings(some(2, dtype="uint16", window=(-1000.0, 400.0)))
    assert (finding.check, len(finding.files)) == ("window", 2)
    assert header_findings(some(2, window=(-1000.0, 400.0)) + some(2, "B", dtype="uint8", window=(0.0, 90.0))) == []


def test_one_data_set_with_nine_tenths_of_the_files_dominates() -> None:
    assert header_findings(some(90) + some(10, "B")) == []
    (line,) = header_warnings(some(91) + some(9, "B"))
    assert line.startswith("A: has 91 of 100 volumes")
    assert "--sampling_temperature" in line
    assert header_warnings(some(91)) == []
    images = [sample(f"C/{i}.png", 1) for i in range(900)]
    assert header_warnings(some(10) + some(10, "B") + images) == []  # images are drawn beside volumes, not for them


def test_files_equal_in_size_time_and_name_are_probably_one() -> None:
    time = 1_500_000_000_123_456_789
    pair = [sample("A/1.npy", mtime_ns=time), sample("B/1.npy", mtime_ns=time)]
    (line,) = header_warnings([*pair, sample("B/2.npy", mtime_ns=time), sample("C/1.npy", mtime_ns=time + 1)])
    assert "probable duplicates" in line
    assert "A/1.npy = B/1.npy" in line
    whole_seconds = [sample("A/1.npy"), sample("B/1.npy")]  # as an archive restores them
    assert header_warnings(whole_seconds) == []


def test_a_training_run_prints_few_lines() -> None:
    samples = [s for i in range(30) for s in some(3, f"Set_{i:02}", slices=9)]
    assert len(header_findings(samples, (32, 64, 64))) == 30
    lines = header_warnings(samples, (32, 64, 64))
    assert len(lines) == 12
    assert lines[-1].startswith("19 more warnings")
    assert max(map(len, lines)) < 400


def test_a_copy_of_equal_size_is_found_without_reading_the_whole(tmp_path: Path) -> None:
    for i in range(4):
        save(tmp_path / f"A/{i}.npy", blob())
    (tmp_path / "B").mkdir()
    shutil.copyfile(tmp_path / "A/2.npy", tmp_path / "B/other.npy")
    for i in range(2):  # vessels: all that is probed is 0 in both
        vessels = np.zeros((24, 20, 10))
        vessels[i, 0, 0] = 1
        save(tmp_path / f"C/{i}.npy", vessels)
    (finding,) = found(tmp_path, full=False)
    assert (finding.check, finding.dataset) == ("duplicates", None)
    assert finding.files == ["A/2.npy", "B/other.npy"]


# --- by content


def only(path: Path) -> Sample:
    (one,) = scan(path)
    return one


@pytest.mark.parametrize("order", ["C", "F"])
def test_measures_are_numpys_however_the_file_lies(tmp_path: Path, order: str) -> None:
    volume = blob().astype(np.float32)
    volume[:, :, 3] = 5
    volume[:, :, 9] = 0
    save(tmp_path / "A/1.npy", np.asarray(volume, order=order))
    content = read_content(only(tmp_path))
    assert (content.minimum, content.maximum) == (volume.min(), volume.max())
    assert content.percentiles == pytest.approx(np.percentile(volume.astype(float), [0.5, 50, 99.5]))
    assert content.blank == 2
    assert not content.wrapped


def digest(path: Path, array: np.ndarray, settings: str = "") -> str:
    folder = path / str(len(list(path.iterdir())))
    save(folder / "A/1.npy", array)
    (folder / "A/dataset.yaml").write_text(settings)
    return read_content(only(folder)).digest


def test_dtype_byte_order_memory_order_and_slice_axis_do_not_change_the_digest(tmp_path: Path) -> None:
    volume = ct()
    volume[:5] = 0
    plain = digest(tmp_path, volume)
    for other in (
        *(np.asfortranarray(volume), volume.astype(">i2"), volume.astype(">f8"), np.asfortranarray(volume, "<f4")),
        *(volume.astype("<i8"), np.where(volume == 0, -0.0, volume)),
    ):
        assert digest(tmp_path, other) == plain
    assert digest(tmp_path, np.moveaxis(volume, 2, 0), "slice_axis: 0") == plain


def test_every_real_change_changes_the_digest(tmp_path: Path) -> None:
    volume = RNG.integers(0, 4, (16, 16, 16)).astype(np.uint8)
    others = [
        *(volume[::-1], volume[:, ::-1], volume[:, :, ::-1]),
        *(volume.transpose(1, 0, 2), volume.transpose(0, 2, 1), volume.transpose(2, 1, 0)),
        *(np.roll(volume, 1, axis) for axis in range(3)),
        *(volume + 1, volume * 2),
    ]
    assert len({digest(tmp_path, other) for other in [volume, *others]}) == 1 + len(others)


def test_equal_content_is_found_across_data_sets_and_types(tmp_path: Path) -> None:
    volume = ct()
    save(tmp_path / "A/1.npy", volume)
    save(tmp_path / "A/2.npy", ct())
    save(tmp_path / "B/copy.npy", np.asfortranarray(volume.astype(">f8")))
    image = RNG.integers(0, 255, (20, 30)).astype(np.uint8)
    save(tmp_path / "C/1.png", image)
    save(tmp_path / "D/2.bmp", image)
    (finding,) = found(tmp_path)
    assert finding.message.startswith("duplicates (all values agree): 2 files too many: A/1.npy = B/copy.npy; C/1.png")
    assert finding.files == ["A/1.npy", "B/copy.npy", "C/1.png", "D/2.bmp"]


def test_errors_are_exactly_what_training_refuses(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    good = blob().astype(np.float32)
    for i, (value, place) in enumerate([(np.nan, 0), (np.inf, 1), (-np.inf, 2), (2e38, 3)]):
        bad = good.copy()
        bad[place, 3, 3] = value
        bad[4, 4, 4] = -value if value == 2e38 else bad[4, 4, 4]
        save(root / f"A/bad_{i}.npy", bad)
    save(root / "A/good.npy", good)
    save(root / "A/nan.npy", np.full((9, 9, 9), np.nan))
    save(root / "B/constant.npy", np.full((9, 9, 9), 3, np.uint8))
    save(root / "C/window.npy", ct())
    save(root / "C/fits.npy", ct() + np.int16(6000))
    (root / "C/dataset.yaml").write_text("window: [4000, 7000]")
    save(root / "D/black.png", np.zeros((20, 20), np.uint8))
    cut = save(root / "D/cut.png", RNG.integers(0, 255, (50, 50)).astype(np.uint8))
    cut.write_bytes(cut.read_bytes()[:900])
    errors = [finding for finding in found(root) if finding.level == "error"]
    with pytest.raises(UserError) as caught:
        prepare(root, 16, tmp_path / "cache", progress=False)
    assert [error.message for error in errors] == [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert len(errors) == 9
    kept, _ = prepare(root, 16, tmp_path / "cache", on_bad="skip", progress=False)
    assert {error.files[0] for error in errors} == {s.name for s in scan(root)} - {s.name for s in kept}


def test_a_file_that_vanishes_is_an_error_and_the_rest_is_read(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"A/{i}.npy", blob())
    samples = scan(tmp_path)
    (tmp_path / "A/1.npy").unlink()
    contents, refused = check_module._read_all(samples, 2, progress=False)
    assert [s.name for s in contents] == ["A/0.npy", "A/2.npy"]
    (error,) = refused.values()
    assert "cannot be read" in str(error)


def test_any_number_of_workers_finds_the_same(tmp_path: Path) -> None:
    for i in range(12):
        save(tmp_path / f"A/{i}.npy", blob(1 if i == 5 else 1000))
    save(tmp_path / "A/constant.npy", np.ones((9, 9, 9)))
    one, four = (found(tmp_path, workers=workers) for workers in (1, 4))
    assert one == four
    assert checks(one) == ["content", "intensity"]


# --- intensities


def test_a_volume_on_another_scale_is_named_and_scanners_differences_are_not(tmp_path: Path) -> None:
    for i in range(15):
        save(tmp_path / f"MR/{i:02}.npy", blob(1000 * RNG.lognormal(0, 0.4)).astype(np.float32))
    assert found(tmp_path) == []
    save(tmp_path / "MR/rescaled.npy", blob(1).astype(np.float32))
    (finding,) = found(tmp_path)
    assert (finding.check, finding.files) == ("intensity", ["MR/rescaled.npy"])
    assert "own percentiles" in finding.message


def test_ct_without_its_offset_is_named(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / f"A/{i}.npy", ct())
    save(tmp_path / "A/raw.npy", ct() + np.int16(1024))
    (finding,) = found(tmp_path)
    assert (finding.check, finding.files) == ("intensity", ["A/raw.npy"])


@pytest.mark.parametrize(
    ("change", "is_hu"),
    [
        (lambda hu: hu, True),
        (lambda hu: np.where(hu < -900, -3024, hu), True),  # padded around the field of view
        (lambda hu: hu.clip(-100, 300), True),  # an organ, cut out
        (lambda hu: hu + 1024, False),
        (lambda hu: hu / 1000.0, False),
        (lambda hu: (hu.clip(-1000, 400) + 1000) / 1400 * 255, False),
        (lambda hu: hu * 16.0, False),
    ],
)
def test_ct_must_look_like_hounsfield_units(tmp_path: Path, change, is_hu: bool) -> None:
    save(tmp_path / "A/1.npy", change(ct().astype(np.float32)).astype(np.float32))
    assert "not HU" not in checks(found(tmp_path))  # nobody said that it is CT
    (tmp_path / "A/dataset.yaml").write_text("modality: CT")
    assert ("not HU" in checks(found(tmp_path))) == (not is_hu)


def test_negative_numbers_stored_as_unsigned_are_recognised(tmp_path: Path) -> None:
    save(tmp_path / "A/wrapped.npy", ct().view(np.uint16))
    save(tmp_path / "A/wrapped_float.npy", ct().view(np.uint16).astype(np.float32))
    for i in range(10):
        save(tmp_path / f"A/{i}.npy", ct())
    dtypes, wrapped = found(tmp_path)  # and no second line that calls their intensities odd
    assert dtypes.check == "mixed dtypes"
    assert (wrapped.check, wrapped.files) == ("wrap-around", ["A/wrapped.npy", "A/wrapped_float.npy"])
    assert "np.int16" in wrapped.message


def test_sixteen_bit_pictures_and_masks_are_no_wrap_around(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 24 * 20 * 10).reshape(24, 20, 10)
    save(tmp_path / "A/ramp.npy", ramp.astype(np.uint16))
    save(tmp_path / "B/white.npy", np.where(blob() > 500, 65535, ramp / 3).astype(np.uint16))
    save(tmp_path / "C/mask.npy", np.where(blob() > 500, 65535, 0).astype(np.uint16))
    assert "wrap-around" not in checks(found(tmp_path))


def test_blank_slices_and_almost_constant_volumes_are_named(tmp_path: Path) -> None:
    padded, trimmed, vessels = blob(), blob(), np.zeros((24, 20, 10))
    padded[:, :, 7:], trimmed[:, :, 8:] = 0, 0
    vessels[3, 4] = 7
    for name, volume in (("padded", padded), ("trimmed", trimmed), ("vessels", vessels)):
        save(tmp_path / f"A/{name}.npy", volume)
    flat, blank = found(tmp_path)
    assert (flat.check, flat.files) == ("almost constant", ["A/vessels.npy"])
    assert (blank.check, blank.files) == ("blank slices", ["A/padded.npy"])
    assert "padded.npy (3 of 10)" in blank.message


# --- the script


def run(capsys: pytest.CaptureFixture, *args: object) -> tuple[int, str]:
    """(exit code, output)."""
    code = 0
    try:
        config.main(check_data.main, check_data.Config, check_data.__doc__, [str(arg) for arg in args])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_exit_codes_tell_errors_from_warnings_and_from_wrong_options(data, tmp_path, capsys) -> None:
    code, out = run(capsys, "--data_path", data, "--target_shape", "[8,32,32]")
    assert (code, out.splitlines()[-1]) == (
        0,
        "0 errors, 0 warnings, 12 files (headers only; --full true reads everything)",
    )
    code, out = run(capsys, "--data_path", data)
    assert code == 0
    assert "0 errors, 1 warning, 12 files" in out
    assert run(capsys, "--data_path", tmp_path / "nowhere")[0] == 2
    assert run(capsys, "--data_path", data, "--report", tmp_path / "no/such/folder.json")[0] == 2


def test_content_is_an_error_in_full_mode_only(tmp_path, capsys) -> None:
    save(tmp_path / "A/constant.npy", np.ones((9, 9, 64)))
    save(tmp_path / "A/empty.npy", blob()).write_bytes(b"")
    code, out = run(capsys, "--data_path", tmp_path)
    assert code == 1
    assert "empty.npy: is empty (0 bytes); remove it" in out
    assert "1 error, 0 warnings, 1 file (headers only" in out
    code, out = run(capsys, "--data_path", tmp_path, "--full", "true", "--workers", "2")
    assert code == 1
    assert "constant.npy: is constant (all voxels are 1)" in out
    assert "2 errors, 0 warnings, 1 file (all read)" in out


def test_the_report_names_every_file_and_the_screen_the_first(tmp_path, capsys) -> None:
    for i in range(9):
        save(tmp_path / f"tree/A/{i}.npy", blob())
    for i in range(40):
        save(tmp_path / f"tree/B/{i:02}.png", np.full((9, 9), i, np.uint8))
    file = tmp_path / "report.json"
    code, out = run(capsys, "--data_path", tmp_path / "tree", "--full", "true", "--report", file)
    assert code == 1
    assert out.count("is constant") == 30
    assert "... and 10 more; --report FILE.json lists all" in out
    report = json.loads(file.read_text())
    assert len([f for f in report["findings"] if f["level"] == "error"]) == 40
    (few,) = [f for f in report["findings"] if f["check"] == "few slices"]
    assert few["files"] == [f"A/{i}.npy" for i in range(9)]
    volumes, images = report["data_sets"]
    assert (volumes["data_set"], volumes["kind"], volumes["files"]) == ("A", "volume", 9)
    assert volumes["measured"]["slices"] == {"min": 10, "median": 10, "max": 10}
    assert "0.5 % of voxels below" in volumes["measured"]
    assert "99.5 %" not in images["measured"]  # none of them is good


def test_tables_show_the_range_of_each_measure(tmp_path, capsys) -> None:
    for i, slices in enumerate((12, 16, 40)):
        save(tmp_path / f"MR/{i}.npy", np.round(blob(shape=(20, 24, slices))).astype(np.int16))
    (tmp_path / "MR/dataset.yaml").write_text("modality: MR")
    _, out = run(capsys, "--data_path", tmp_path, "--full", "true")
    lines = out.splitlines()
    assert lines[0] == "MR: 3 volumes, 0.1 MB, int16, MR"
    assert lines[1].split() == ["min", "median", "max"]
    assert lines[2].split() == ["slices", "12", "16", "40"]
    assert any(line.split()[:2] == ["99.5", "%"] for line in lines)


def test_working_copies_of_changed_files_are_told_and_deleted_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "A").mkdir()
    for i in range(3):
        np.save(tmp_path / f"A/{i}.npy", rng.random((16, 16, 80)))
    prepare(tmp_path, 16, progress=False)
    options = {"data_path": str(tmp_path), "target_shape": (8, 16, 16)}
    check_data.main(check_data.Config(**options))
    assert "cache" not in capsys.readouterr().out
    (tmp_path / "A/0.npy").unlink()
    np.save(tmp_path / "A/1.npy", rng.random((16, 16, 90)))
    check_data.main(check_data.Config(**options))
    assert "cache: 2 working copies (0.1 MB) of files that have changed or are gone" in capsys.readouterr().out
    check_data.main(check_data.Config(**options, clean_cache=True))
    assert "deleted" in capsys.readouterr().out
    assert len(list((tmp_path / ".cache").rglob("*.npy"))) == 1


def test_names_that_are_not_utf8_are_shown_all_the_same(tmp_path):
    try:
        (tmp_path / "D").mkdir()
        with open(os.fsencode(tmp_path) + b"/D/M\xfcller.png", "wb") as file:
            file.write(b"no image")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    done = subprocess.run(
        [sys.executable, "check_data.py", "--data_path", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
    )
    assert done.returncode == 1
    assert b"/D/M\\udcfcller.png: is not a readable" in done.stdout
