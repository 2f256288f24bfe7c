"""Phantoms: deterministic, true to their labels, and X-rays with a finding that grey values alone do not give away."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from conversion.phantoms import ANATOMIES, STRUCTURES, Config, main, phantom, xray

TREE = Path(__file__).parent.parent / "Training_Data"


@pytest.mark.slow
def test_the_bundled_tree_is_what_the_generator_makes(tmp_path):
    main(Config(str(tmp_path), volumes=1, images=2))
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")]
    assert len(made) == 4 + 4 + 2 + 1  # dataset.yaml of each, volumes and a label map, X-rays, their table
    for path in made:
        if path.name != "findings.csv":
            assert (TREE / path).read_bytes() == (tmp_path / path).read_bytes(), path
    about = yaml.safe_load((TREE / "Phantom_Heart/dataset.yaml").read_text())
    assert about["structures"] == {name: [value] for value, name in STRUCTURES["heart"].items()}
    lines = (TREE / "Phantom_XRay/labels/findings.csv").read_text().split()
    assert lines[:3] == ["file,finding", "xray_000.png,0", "xray_001.png,1"]
    with Image.open(TREE / "Phantom_XRay/xray_001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), xray(1, finding=True))
    assert sum(path.stat().st_size for path in TREE.glob("Phantom_*/**/*") if path.is_file()) < 5_000_000


@pytest.mark.parametrize("anatomy", ANATOMIES)
def test_every_structure_is_there_and_neighbours_differ_in_the_image(anatomy):
    for seed in (100, 101):
        image, labels = phantom(anatomy, seed, (40, 40, 32))
        values, counts = np.unique(labels, return_counts=True)
        assert values.tolist() == [0, *STRUCTURES[anatomy]]
        assert counts.min() >= 8
        medians = np.array([np.median(image[labels == value]) for value in values])
        assert medians[0] < np.median(medians[1:])  # air is dark
        assert len(np.unique(medians)) > len(values) // 2


@pytest.mark.slow
def test_a_finding_changes_the_lungs_and_a_histogram_does_not_tell_it():
    pairs = [[xray(seed, 64, finding) / 255 for finding in (False, True)] for seed in range(200, 212)]
    for healthy, ill in pairs:
        assert 0.002 < np.abs(ill - healthy).mean() < 0.1
    films = np.array([film for pair in pairs for film in pair])
    histograms = np.array([np.histogram(film, bins=32, range=(0, 1))[0] for film in films])
    distance = np.abs(histograms[:, None] - histograms[None]).sum(axis=-1) + 1e6 * np.eye(len(films))
    findings = np.arange(len(films)) % 2
    assert (findings[distance.argmin(axis=1)] == findings).mean() < 0.8
