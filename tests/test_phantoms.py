"""Phantoms: deterministic, true to their labels, and with a finding that grey values alone do not give away."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from conversion.phantoms import ANATOMIES, FINDING_STRUCTURES, STRUCTURES, draw_finding, phantom, write_tree, xray
from utils.errors import UserError

TREE = Path(__file__).parent.parent / "Training_Data"
SHAPE = (48, 48, 32)


def number(anatomy: str, structure: str) -> int:
    return {name: value for value, name in STRUCTURES[anatomy].items()}[structure]


def voxels(case, anatomy: str, structure: str) -> int:
    return int((case.labels == number(anatomy, structure)).sum())


@pytest.fixture(scope="module")
def cases():
    """Six patients per anatomy, (without, with) the finding."""
    return {a: [(phantom(a, s, SHAPE, 0), phantom(a, s, SHAPE, 1)) for s in range(100, 106)] for a in ANATOMIES}


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_a_seed_is_a_case(anatomy):
    one, again, other = (phantom(anatomy, seed, (32, 32, 20)) for seed in (7, 7, 8))
    assert one.image.tobytes() == again.image.tobytes()
    assert one.labels.tobytes() == again.labels.tobytes()
    assert one.finding == again.finding
    assert (one.labels != other.labels).mean() > 0.02
    assert (one.image != other.image).mean() > 0.5


def test_xrays_are_deterministic_8_bit_and_differ():
    one, finding = xray(3, 48)
    again, _ = xray(3, 48, finding)
    assert (one.dtype, one.shape) == (np.uint8, (48, 48))
    assert one.tobytes() == again.tobytes()
    assert (one != xray(4, 48)[0]).mean() > 0.5
    assert np.ptp(one) > 120


def test_findings_are_drawn_evenly_and_apart_between_anatomies():
    drawn = np.array([[draw_finding(seed, number) for seed in range(100)] for number in range(len(ANATOMIES))])
    assert [phantom("chest", seed, (16, 16, 16)).finding for seed in range(8)] == drawn[1, :8].tolist()
    assert (np.abs(drawn.mean(axis=1) - 0.5) < 0.2).all()
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[1] != drawn[2]).any()


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_the_bundled_tree_is_what_the_generator_makes(anatomy):
    folder, case = TREE / f"Phantom_{anatomy.capitalize()}", phantom(anatomy, 0)
    np.testing.assert_array_equal(np.load(folder / f"{anatomy}_000.npy", allow_pickle=False), case.image)
    np.testing.assert_array_equal(np.load(folder / "labels" / f"{anatomy}_000.npy", allow_pickle=False), case.labels)
    with (folder / "labels" / "findings.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"file": f"{anatomy}_000.npy", "finding": str(case.finding)}
    assert {row["finding"] for row in rows} == {"0", "1"}


def test_the_bundled_xray_and_sizes():
    film, _ = xray(0)
    with Image.open(TREE / "Phantom_XRay" / "xray_000.png") as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), film)
    sizes = [path.stat().st_size for path in TREE.glob("Phantom_*/**/*") if path.is_file()]
    assert max(sizes) <= 200_000
    assert sum(sizes) < 12_000_000


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_every_structure_is_there_in_every_case(anatomy, cases):
    for healthy, ill in cases[anatomy]:
        for value, name in STRUCTURES[anatomy].items():
            assert (ill.labels == value).sum() >= 8, name
            assert ((healthy.labels == value).sum() > 0) == (name != FINDING_STRUCTURES.get(anatomy)), name
        assert healthy.labels.max() <= max(STRUCTURES[anatomy])


NEIGHBOURS = [
    ("brain", "scalp", "skull"),
    ("brain", "grey_matter", "white_matter"),
    ("brain", "white_matter", "ventricles"),
    ("brain", "lesion", "white_matter"),
    ("chest", "lung", "muscle"),
    ("chest", "lung", "heart"),
    ("chest", "nodule", "lung"),
    ("heart", "lung", "chest_wall"),
    ("heart", "left_ventricle", "myocardium"),
]


@pytest.mark.parametrize(("anatomy", "one", "other"), NEIGHBOURS)
def test_neighbouring_structures_differ_in_the_image(anatomy, one, other, cases):
    for _, case in cases[anatomy]:
        image = case.image.astype(float)
        inside = [image[case.labels == number(anatomy, name)] for name in (one, other)]
        contrast = abs(np.median(inside[0]) - np.median(inside[1]))
        assert contrast > 0.04 * np.ptp(np.percentile(image, (1, 99)))
        assert np.median(image[case.labels == 0]) < np.median(image[case.labels > 0])  # air is dark


@pytest.mark.parametrize(("anatomy", "one", "other"), [NEIGHBOURS[1], NEIGHBOURS[2], NEIGHBOURS[8]])
def test_contrast_is_inverted_in_some_cases(anatomy, one, other):
    signs = set()
    for seed in range(12):
        case = phantom(anatomy, seed, (32, 32, 20), 1)
        means = [case.image[case.labels == number(anatomy, name)].mean() for name in (one, other)]
        signs.add(means[0] > means[1])
    assert signs == {True, False}


def test_intensities_have_no_common_scale(cases):
    for anatomy in ANATOMIES:
        highs = [np.percentile(case.image, 99) for case, _ in cases[anatomy]]
        assert max(highs) > 1.3 * min(highs)


def test_the_finding_changes_the_anatomy_and_nothing_else(cases):
    for healthy, ill in cases["brain"]:
        assert voxels(ill, "brain", "ventricles") > 1.5 * voxels(healthy, "brain", "ventricles")
        outside = np.isin(healthy.labels, (1, 2))
        np.testing.assert_array_equal(ill.labels[outside], healthy.labels[outside])
    for healthy, ill in cases["chest"]:
        assert voxels(ill, "chest", "nodule") > 60
        changed = ill.labels != healthy.labels
        assert (ill.labels[changed] == number("chest", "nodule")).all()
    for healthy, ill in cases["heart"]:
        assert voxels(ill, "heart", "left_ventricle") > 1.5 * voxels(healthy, "heart", "left_ventricle")
        ratios = [voxels(c, "heart", "myocardium") / voxels(c, "heart", "left_ventricle") for c in (healthy, ill)]
        assert ratios[1] < 0.6 * ratios[0]


def test_the_finding_parts_the_classes_between_patients(cases):
    for anatomy, structure in (("brain", "ventricles"), ("heart", "left_ventricle")):
        healthy, ill = ([voxels(pair[k], anatomy, structure) for pair in cases[anatomy]] for k in (0, 1))
        assert np.median(ill) > max(healthy)


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_a_grey_value_histogram_does_not_tell_the_finding(anatomy):
    histograms, findings = [], np.arange(40) % 2
    for seed, finding in enumerate(findings, start=500):
        image = phantom(anatomy, seed, (32, 32, 20), int(finding)).image / 1.0
        low, high = np.percentile(image, (0.5, 99.5))
        histograms.append(np.histogram((image - low) / (high - low), bins=32, range=(0, 1))[0] / image.size)
    distance = np.abs(np.array(histograms)[:, None] - np.array(histograms)[None]).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (findings[distance.argmin(axis=1)] == findings).mean() < 0.8


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_slices_change_smoothly_and_keep_changing(anatomy, cases):
    for case, _ in cases[anatomy]:
        labels = case.labels
        body = [k for k in range(labels.shape[2]) if (labels[..., k] > 0).mean() > 0.1]
        assert len(body) > 0.7 * labels.shape[2]
        near = [(labels[..., k] != labels[..., k + 1]).mean() for k in body[:-1]]
        far = [(labels[..., k] != labels[..., k + 8]).mean() for k in body[:-8]]
        assert min(near) > 0
        assert max(near) < 0.35
        assert np.mean(far) > 2 * np.mean(near)


@pytest.mark.parametrize("shape", [(16, 16, 16), (40, 56, 24)])
def test_other_shapes(shape):
    for anatomy in ANATOMIES:
        case = phantom(anatomy, 1, shape)
        assert case.image.shape == case.labels.shape == shape
        assert case.image.dtype == case.labels.dtype == np.uint8


def test_the_same_patient_at_another_resolution():
    fine, coarse = (phantom("heart", 5, shape).labels for shape in ((64, 64, 32), (32, 32, 16)))
    assert (fine[::2, ::2, ::2] == coarse).mean() > 0.8


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
        ("seed", lambda: xray(-1)),
        ("volumes_per_anatomy", lambda: write_tree(Path("nowhere"), -1, 0, 0)),
        ("images", lambda: write_tree(Path("nowhere"), 0, -1, 0)),
        ("seed", lambda: write_tree(Path("nowhere"), 1, 1, -1)),
    ],
)
def test_bad_values_are_named(name, call):
    with pytest.raises(UserError, match=f"^{name}: "):
        call()
    assert not Path("nowhere").exists()
