"""The data check: what it finds by headers and by content, and what it leaves alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import save

import check_data
from datasets.check import Finding, check, header_findings, read_content
from datasets.index import Sample, scan
from datasets.store import prepare
from utils import config

pytestmark = pytest.mark.usefixtures("one_thread")

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever tests run before."""
    monkeypatch.setattr(f"{__name__}.RNG", np.random.default_rng(7))


def sample(name: str, slices: int = 40, height: int = 512, width: int = 512, **changes) -> Sample:
    """What `scan` would return for a file that need not exist."""
    kind = "volume" if name.endswith(".npy") else "image"
    size, whole_second = 128 + 2 * slices * height * width, 1_500_000_000 * 10**9
    place = Path("/nowhere") / name, name, name.split("/")[0]
    return replace(Sample(*place, kind, slices, height, width, 2, None, size, whole_second, "int16"), **changes)


def some(count: int, dataset: str = "A", **changes) -> list[Sample]:
    return [sample(f"{dataset}/usual_{i:03}.npy", **changes) for i in range(count)]


def checks(findings: list[Finding]) -> list[str]:
    return [finding.check for finding in findings]


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
    return check(root, full, (8, 8, 8), **options)[1]


# --- by headers


def test_natural_variation_raises_no_warning() -> None:
    counts = RNG.lognormal(math.log(150), 0.5, 200).astype(int).clip(40)
    varied = [sample(f"A/{i}.npy", int(n), *RNG.integers(400, 600, 2).tolist()) for i, n in enumerate(counts)]
    assert header_findings(varied + some(20, "B", slices=300, height=256, width=256), (32, 128, 128)) == []


@pytest.mark.parametrize(
    ("odd", "name", "shown"),
    [
        ({"height": 200, "width": 200}, "in-plane size", "200 x 200"),
        ({"slices": 400}, "slice count", "400"),
        ({"slices": 8}, "slice count", "8"),
        ({"size_bytes": 10**9}, "file size", "1000000000"),
    ],
)
def test_a_file_of_another_size_is_named_once(odd: dict, name: str, shown: str) -> None:
    (finding,) = header_findings([*some(12), sample("A/odd.npy", **odd)])
    assert (finding.check, finding.files, finding.level) == (name, ["A/odd.npy"], "warning")
    assert f"odd.npy ({shown})" in finding.message


@pytest.mark.parametrize(
    ("samples", "line"),
    [
        (
            [*some(9), sample("A/short.npy", 20), sample("A/shortest.npy", 14)],
            "A: 2 of 11 volumes have fewer slices than a view (32), and will be padded: shortest.npy (14), short.npy",
        ),
        (
            some(2, dtype="uint16", window=(-1000.0, 400.0)) + some(2, "B", window=(-1000.0, 400.0)),
            "A: 2 of 2 volumes have an unsigned dtype where the window (-1000.0, 400.0) begins below 0: usual_000.npy",
        ),
    ],
)
def test_training_prints_one_line_per_doubt(samples: list[Sample], line: str) -> None:
    (finding,) = header_findings(samples, (32, 128, 128))
    assert finding.message.startswith(line)


# Whole body, whole-body PET, a spine cut out, MNI, an isotropic head.
USUAL = [(512, 512, 40), (512, 512, 1800), (168, 168, 1100), (64, 64, 300), (91, 109, 91), (160, 256, 256)]
# Slices first, as SimpleITK has them, or second.
TURNED = [(40, 512, 512), (300, 512, 512), (512, 40, 512), (20, 320, 256), (32, 32, 512)]


@pytest.mark.parametrize("shape", USUAL + TURNED)
def test_slices_along_a_long_axis_beside_a_short_one_are_suspected(shape: tuple[int, int, int]) -> None:
    height, width, slices = shape
    findings = header_findings([sample("A/1.npy", slices, height, width)])
    assert checks(findings) == ["slice axis"] * (shape in TURNED)


def test_the_slice_axis_that_dataset_yaml_gives_is_believed_where_it_fits() -> None:
    turned = [sample(f"A/{i}.npy", 512, 40, 512) for i in range(3)]  # 40 x 512 x 512 read along axis 2
    assert "set slice_axis (0?)" in header_findings(turned)[0].message
    assert header_findings([sample(f"A/{i}.npy", 40, 512, 512, slice_axis=0) for i in range(3)]) == []


# --- by content


@pytest.mark.parametrize("order", ["C", "F"])
def test_measures_are_numpys_however_the_file_lies(tmp_path: Path, order: str) -> None:
    volume = blob().astype(np.float32)
    volume[:, :, 3], volume[:, :, 9] = 5, 0
    save(tmp_path / "A/1.npy", np.asarray(volume, order=order))
    content = read_content(scan(tmp_path)[0][0])
    assert (content.minimum, content.maximum, content.blank) == (volume.min(), volume.max(), 2)
    assert content.percentiles == pytest.approx(np.percentile(volume.astype(float), [0.5, 50, 99.5]))


def test_equal_content_is_found_however_it_is_stored(tmp_path: Path) -> None:
    volume = ct((16, 16, 16))
    volume[:5] = 0
    same = [np.asfortranarray(volume), volume.astype(">f8"), np.where(volume == 0, -0.0, volume)]
    changed = volume.copy()
    changed[7, 8, 9] += 1
    for i, array in enumerate([volume, *same, changed, volume[::-1], volume.transpose(1, 0, 2)]):
        save(tmp_path / f"A{i}/1.npy", array)
    save(tmp_path / "B/turned.npy", np.moveaxis(volume, 2, 0))
    (tmp_path / "B/dataset.yaml").write_text("slice_axis: 0")
    (finding,) = [f for f in found(tmp_path) if f.check == "duplicates"]
    assert finding.message.startswith("duplicates (all values agree): 4 too many, e.g. A0/1.npy = A1/1.npy = A2/1.npy;")
    assert finding.files == [*(f"A{i}/1.npy" for i in range(4)), "B/turned.npy"]


# --- intensities


def test_a_volume_on_another_scale_or_without_its_offset_is_named(tmp_path: Path) -> None:
    for i in range(15):
        save(tmp_path / f"MR/{i:02}.npy", blob(1000 * 1.15 ** (i - 7)).astype(np.float32))  # scanners differ
        save(tmp_path / f"Other/{i:02}.npy", ct())
    assert found(tmp_path) == []
    save(tmp_path / "MR/rescaled.npy", blob(1).astype(np.float32))
    save(tmp_path / "Other/raw.npy", ct() + np.int16(1024))
    scale, offset = found(tmp_path)
    assert (scale.check, scale.files) == ("intensity", ["MR/rescaled.npy"])
    assert (offset.check, offset.files) == ("intensity", ["Other/raw.npy"])


@pytest.mark.parametrize(
    ("change", "is_hu"),
    [
        (lambda hu: hu, True),
        (lambda hu: np.where(hu < -900, -3024, hu), True),  # padded around the field of view
        (lambda hu: hu.clip(-100, 300), True),  # an organ, cut out
        (lambda hu: hu + 1024, False),
        (lambda hu: (hu.clip(-1000, 400) + 1000) / 1400 * 255, False),
        (lambda hu: hu.astype(np.int16).view(np.uint16), False),  # -1000 became 64536
    ],
)
def test_ct_must_look_like_hounsfield_units(tmp_path: Path, change, is_hu: bool) -> None:
    save(tmp_path / "A/1.npy", change(ct().astype(np.float32)).astype(np.float32))
    assert "not HU" not in checks(found(tmp_path))  # nobody said that it is CT
    (tmp_path / "A/dataset.yaml").write_text("modality: CT")
    assert ("not HU" in checks(found(tmp_path))) == (not is_hu)


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
    assert code == 0
    assert out.endswith("0 errors, 0 warnings, 12 files (headers only; --full true reads everything)\n")
    assert "0 errors, 1 warning, 12 files" in run(capsys, "--data_path", data)[1]
    assert run(capsys, "--data_path", tmp_path / "nowhere")[0] == 2
    assert run(capsys, "--data_path", data, "--report", tmp_path / "no/such/folder.json")[0] == 2


def test_the_report_names_every_file_and_the_screen_the_first(tmp_path, capsys) -> None:
    for i, slices in enumerate((12, 16, 40)):
        save(tmp_path / f"tree/MR/{i}.npy", np.round(blob(shape=(20, 24, slices))).astype(np.int16))
    (tmp_path / "tree/MR/dataset.yaml").write_text("modality: MR")
    for i in range(40):
        save(tmp_path / f"tree/X/{i:02}.png", np.full((9, 9), i, np.uint8))
    file = tmp_path / "report.json"
    code, out = run(capsys, "--data_path", tmp_path / "tree", "--full", "true", "--report", file)
    assert code == 1
    assert out.count("is constant") == 30
    assert "... and 10 more; --report FILE.json lists all" in out
    report = json.loads(file.read_text())
    assert len([f for f in report["findings"] if f["level"] == "error"]) == 40
    assert report["data_sets"][0]["measured"]["slices"] == {"min": 12, "median": 16, "max": 40}


def test_working_copies_of_changed_files_are_told_and_deleted_on_demand(tmp_path, capsys) -> None:
    for i in range(3):
        save(tmp_path / f"A/{i}.npy", blob(shape=(16, 16, 80)))
    prepare(tmp_path, 16, progress=False)
    options = "--data_path", tmp_path, "--target_shape", "[8,16,16]"
    assert "cache" not in run(capsys, *options)[1]
    (tmp_path / "A/0.npy").unlink()
    save(tmp_path / "A/1.npy", blob(shape=(16, 16, 90)))
    assert "cache: 2 cached files (0.1 MB) of files that have changed or are gone" in run(capsys, *options)[1]
    assert "deleted" in run(capsys, *options, "--clean_cache", "true")[1]
    assert len(list((tmp_path / ".cache").rglob("*.npy"))) == 1


def test_cleaning_the_cache_deletes_nothing_behind_links_and_nothing_of_others(tmp_path, capsys) -> None:
    save(tmp_path / "tree/A/0.npy", blob(shape=(16, 16, 80)))
    prepare(tmp_path / "tree", 16, progress=False)
    (folder,) = (tmp_path / "tree/.cache").iterdir()
    stale = f"{'0' * 32}.npy"
    for name in (stale, "thesis.npy"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / stale).write_bytes(b"x")
    (folder.parent / "slices_32px_v2").symlink_to(tmp_path / "other")
    options = "--data_path", tmp_path / "tree", "--target_shape", "[8,16,16]", "--clean_cache", "true"
    assert "slices_32px_v2 is a link, and nothing behind links is deleted" in run(capsys, *options)[1]
    assert (tmp_path / "other" / stale).exists()
    assert sorted(file.name for file in folder.iterdir() if len(file.name) < 36) == ["thesis.npy"]
    (folder / stale).write_bytes(b"x")
    (tmp_path / "tree/.cache").rename(tmp_path / "disk")
    (tmp_path / "tree/.cache").symlink_to(tmp_path / "disk")
    assert ".cache is a link" in run(capsys, *options)[1]
    assert (tmp_path / "disk" / folder.name / stale).exists()
