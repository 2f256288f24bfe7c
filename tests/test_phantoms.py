"""Phantoms: deterministic, true to their labels, and with a finding that grey values alone do not give away."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from conversion.phantoms import ANATOMIES, FINDING_STRUCTURES, STRUCTURES, draw_finding, phantom, write_tree, xray
from utils.errors import UserError

TREE = Path(__file__).parent.parent / "Training_Data"
SHAPE = (48, 48, 32)


def inside(case, anatomy: str, structure: str) -> np.ndarray:
    [value] = [value for value, name in STRUCTURES[anatomy].items() if name == structure]
    return case.labels == value


@pytest.fixture(scope="module")
def cases():
    """Three patients per anatomy, (without, with) the finding."""
    return {a: [(phantom(a, s, SHAPE, 0), phantom(a, s, SHAPE, 1)) for s in range(100, 103)] for a in ANATOMIES}


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_the_bundled_tree_is_what_the_generator_makes(anatomy):
    folder, case = TREE / f"Phantom_{anatomy.capitalize()}", phantom(anatomy, 0)
    np.testing.assert_array_equal(np.load(folder / f"{anatomy}_000.npy", allow_pickle=False), case.image)
    np.testing.assert_array_equal(np.load(folder / "labels" / f"{anatomy}_000.npy", allow_pickle=False), case.labels)
    lines = (folder / "labels" / "findings.csv").read_text().split()
    assert lines[:2] == ["file,finding", f"{anatomy}_000.npy,{case.finding}"]
    assert {line[-1] for line in lines[1:]} == {"0", "1"}


def test_the_bundled_xray_and_sizes():
    with Image.open(TREE / "Phantom_XRay" / "xray_000.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), xray(0)[0])
    sizes = [path.stat().st_size for path in TREE.glob("Phantom_*/**/*") if path.is_file()]
    assert max(sizes) <= 200_000
    assert sum(sizes) < 12_000_000


def test_findings_are_drawn_evenly_and_apart_between_anatomies():
    drawn = np.array([[draw_finding(seed, number) for seed in range(100)] for number in range(len(ANATOMIES))])
    assert [phantom("chest", seed, (16, 16, 16)).finding for seed in range(4)] == drawn[1, :4].tolist()
    assert (np.abs(drawn.mean(axis=1) - 0.5) < 0.2).all()
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.3


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_every_structure_is_there_in_every_case(anatomy, cases):
    for healthy, ill in cases[anatomy]:
        for name in STRUCTURES[anatomy].values():
            assert inside(ill, anatomy, name).sum() >= 8, name
            assert inside(healthy, anatomy, name).any() == (name != FINDING_STRUCTURES.get(anatomy)), name


@pytest.mark.parametrize(
    ("anatomy", "one", "other"),
    [
        ("brain", "scalp", "skull"),
        ("brain", "grey_matter", "white_matter"),
        ("brain", "white_matter", "ventricles"),
        ("brain", "lesion", "white_matter"),
        ("chest", "lung", "muscle"),
        ("chest", "lung", "heart"),
        ("chest", "nodule", "lung"),
        ("heart", "lung", "chest_wall"),
        ("heart", "left_ventricle", "myocardium"),
    ],
)
def test_neighbouring_structures_differ_in_the_image(anatomy, one, other, cases):
    for _, case in cases[anatomy]:
        medians = [np.median(case.image[inside(case, anatomy, name)]) for name in (one, other)]
        assert abs(medians[0] - medians[1]) > 0.04 * np.ptp(np.percentile(case.image, (1, 99)))
        assert np.median(case.image[case.labels == 0]) < np.median(case.image[case.labels > 0])  # air is dark


def test_the_finding_changes_the_anatomy_and_nothing_else(cases):
    for healthy, ill in cases["brain"]:
        assert inside(ill, "brain", "ventricles").sum() > 1.5 * inside(healthy, "brain", "ventricles").sum()
        outside = np.isin(healthy.labels, (1, 2))
        np.testing.assert_array_equal(ill.labels[outside], healthy.labels[outside])
    for healthy, ill in cases["chest"]:
        assert inside(ill, "chest", "nodule").sum() > 60
        assert inside(ill, "chest", "nodule")[ill.labels != healthy.labels].all()
    for healthy, ill in cases["heart"]:
        cavity, wall = ([inside(c, "heart", n).sum() for c in (healthy, ill)] for n in ("left_ventricle", "myocardium"))
        assert cavity[1] > 1.5 * cavity[0]
        assert wall[1] / cavity[1] < 0.6 * wall[0] / cavity[0]


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_a_grey_value_histogram_does_not_tell_the_finding(anatomy):
    histograms, findings = [], np.arange(30) % 2
    for seed, finding in enumerate(findings, start=500):
        image = phantom(anatomy, seed, (24, 24, 16), int(finding)).image / 1.0
        low, high = np.percentile(image, (0.5, 99.5))
        histograms.append(np.histogram((image - low) / (high - low), bins=32, range=(0, 1))[0] / image.size)
    distance = np.abs(np.array(histograms)[:, None] - np.array(histograms)[None]).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (findings[distance.argmin(axis=1)] == findings).mean() < 0.8


def test_a_written_tree(tmp_path):
    write_tree(tmp_path, volumes_per_anatomy=1, images=1, seed=11, shape=(24, 20, 16))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    expected = ["Phantom_XRay/dataset.yaml", "Phantom_XRay/labels/findings.csv", "Phantom_XRay/xray_000.png"]
    for anatomy in ANATOMIES:
        folder = f"Phantom_{anatomy.capitalize()}"
        expected += [f"{folder}/{anatomy}_000.npy", f"{folder}/dataset.yaml"]
        expected += [f"{folder}/labels/{anatomy}_000.npy", f"{folder}/labels/findings.csv"]
        about = yaml.safe_load((tmp_path / folder / "dataset.yaml").read_text(encoding="utf-8"))
        assert about["structures"] == STRUCTURES[anatomy]
        assert (about["slice_axis"], about["spacing_mm"]) == (2, [1.0, 1.0, 1.5])
        image = np.load(tmp_path / folder / f"{anatomy}_000.npy", allow_pickle=False)
        np.testing.assert_array_equal(image, phantom(anatomy, 11, (24, 20, 16)).image)
    assert files == sorted([*expected, "README.md"])
    assert "--seed 11" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("anatomy", lambda: phantom("knee", 0)),
        ("seed", lambda: phantom("brain", -1)),
        ("shape", lambda: phantom("brain", 0, (64, 64, 15))),
        ("shape", lambda: phantom("brain", 0, (64, 64))),
        ("finding", lambda: phantom("brain", 0, finding=2)),
        ("size", lambda: xray(0, 15)),
        ("volumes_per_anatomy", lambda: write_tree(Path("nowhere"), -1, 0, 0)),
        ("images", lambda: write_tree(Path("nowhere"), 0, -1, 0)),
    ],
)
def test_bad_values_are_named(name, call):
    with pytest.raises(UserError, match=f"^{name}: "):
        call()
    assert not Path("nowhere").exists()
