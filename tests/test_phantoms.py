"""Phantoms: the bundled files, drawn again."""

from pathlib import Path

import pytest
import yaml

from conversion.phantoms import STRUCTURES, Config, main

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
