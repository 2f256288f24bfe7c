"""inspect_data.py shows the very tensors that the training scripts get."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import options, run

import inspect_data
from datasets.augment import window_theta
from reporting import views
from training import train
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPTS = ("ssl_swav2D", "ssl_deepcluster2D", "mask_swav", "mask_deepcluster", "ssl_swav3D", "ssl_deepcluster3D")


def training_loader(script: str, chosen: dict[str, Any], monkeypatch) -> Any:
    """The loader that the script hands to the training loop, which does not start."""
    caught = []

    class Stop(Exception):
        pass

    def fit(learner, loader, *_):
        caught.append(loader)
        raise Stop

    module = importlib.import_module(script)
    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(Stop):
        module.main(module.Config(**chosen))
    return caught[0]


@pytest.mark.parametrize("policy", ["paper", "strong"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_batches_are_those_of_the_script(script, policy, data, tmp_path, monkeypatch):
    start = {"resnet_pretrained": "none"} | ({"trans_pretrained": "none"} if "3D" in script else {})
    chosen = options(script, data, tmp_path, policy=policy, **start)
    theirs = training_loader(script, chosen, monkeypatch)
    _, own = inspect_data.training_options(inspect_data.Config(script, chosen))
    ours = inspect_data.open_loader(own, 1)
    pairs = list(zip(theirs.epoch(1), ours.epoch(1), strict=True))
    assert len(pairs) == theirs.steps
    for one, other in pairs:
        assert one.keys() == other.keys()
        assert theirs.names(one) == ours.names(other)
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def pictures(html: str) -> dict[str, np.ndarray]:
    """alt text -> pixels, for every picture of a page."""
    thumbs = json.loads(re.search(r'id="thumbs">(.*?)</script>', html, re.DOTALL)[1])
    found = {}
    for name, alt in re.findall(r'<img data-thumb="(\w+)"[^>]*alt="([^"]*)"', html):
        content = base64.b64decode(thumbs[name].partition(",")[2])
        found[alt] = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    return found


def test_the_page_shows_the_pixels_of_the_loader(data, tmp_path):
    chosen = options("mask_swav", data, tmp_path)
    cfg = inspect_data.Config("mask_swav", chosen, epoch=2, samples=3, slices=4, output=str(tmp_path / "i.html"))
    inspect_data.main(cfg)
    seen = pictures((tmp_path / "i.html").read_text())
    _, own = inspect_data.training_options(cfg)
    loader = inspect_data.open_loader(own, 1)
    batch = next(loader.epoch(2))
    name = loader.dataset.samples[loader.dataset.items[int(batch["index"][0])]].name
    start = loader.dataset[2, int(batch["index"][0])]["start"]
    for view in (0, 1):
        shown = {a: p for a, p in seen.items() if a.startswith(f"{name}, view {view + 1}, slice ")}
        assert len(shown) == 4
        for alt, pixels in shown.items():
            wanted = batch["views"][view, 0, int(alt.rsplit(" ", 1)[1]) - start].numpy()
            factor = pixels.shape[0] // wanted.shape[0]
            np.testing.assert_array_equal(pixels[::factor, ::factor], (255 * wanted + 0.5).astype(np.uint8))
    assert len({alt.partition(", ")[0] for alt in seen}) == 3


def test_hidden_slices_are_marked(data, tmp_path):
    chosen = options("mask_swav", data, tmp_path, mask_ratio=0.5)
    inspect_data.main(inspect_data.Config("mask_swav", chosen, samples=1, slices=8, output=str(tmp_path / "i.html")))
    assert (tmp_path / "i.html").read_text().count('class="crop marked"') == 8  # four of eight in either view


def test_a_run_is_shown_with_its_own_options(data, tmp_path):
    run("ssl_swav2D", data, tmp_path, epochs=1, policy="paper", seed=5)
    folder = str(tmp_path / "runs" / "ssl_swav2D")
    script, own = inspect_data.training_options(inspect_data.Config(folder, {"seed": 6}))
    assert (script, own.policy, own.seed, own.size_crops) == ("ssl_swav2D", "paper", 6, [32, 16])
    inspect_data.main(inspect_data.Config(folder, output=str(tmp_path / "i.html")))
    html = (tmp_path / "i.html").read_text()
    assert "policy paper" in html
    assert html.count("crop 3: ") >= 4


def test_images_of_stage_3_are_shown_too(data, tmp_path):
    chosen = options("ssl_swav3D", data, tmp_path)
    inspect_data.main(inspect_data.Config("ssl_swav3D", chosen, samples=4, output=str(tmp_path / "i.html")))
    seen = pictures((tmp_path / "i.html").read_text())
    assert any(alt.startswith("Images/") for alt in seen)
    assert any(alt.startswith("Volumes/") for alt in seen)


def test_what_was_done_is_named_as_it_was_drawn():
    theta = window_theta(
        100, np.array([[50.0, 50.0]]), np.array([[40.0, 80.0]]), np.array([7.0]), np.array([[False, True]])
    )
    neutral = {"blur_std": np.zeros((1, 3)), "bias": np.zeros((1, 20)), "log_gamma": [0.0], "noise_std": [0.0]}
    draws = {name: np.asarray(value) for name, value in neutral.items()} | {"theta": theta}
    assert views.describe(draws, 0, 100) == ["window 40 x 80 of 100 px", "turned by +7.0°", "mirrored left and right"]
    theta = window_theta(
        100, np.array([[50.0, 50.0]]), np.array([[50.0, 50.0]]), np.array([-9.0]), np.array([[True, False]])
    )
    draws |= {"theta": theta, "log_gamma": np.array([0.1]), "downsampling": np.array([[1.0, 2.5, 1.0]])}
    assert views.describe(draws, 0, 100) == [
        "window 50 x 50 of 100 px",
        "turned by -9.0°",
        "mirrored top and bottom",
        "rows coarser by 2.5",
        "gamma 1.11",
    ]


def test_what_cannot_be_shown_is_named(data, tmp_path):
    with pytest.raises(UserError, match="neither the folder of a run nor one of"):
        inspect_data.main(inspect_data.Config(str(tmp_path)))
    with pytest.raises(UserError, match=r"data_path: .* does not exist"):
        inspect_data.main(inspect_data.Config("mask_swav", {"data_path": str(tmp_path / "no")}))
    with pytest.raises(UserError, match="is not a folder"):
        inspect_data.main(inspect_data.Config("mask_swav", output=str(tmp_path / "no" / "i.html")))


def test_the_source_comes_before_options():
    assert inspect_data.arguments(["runs/a", "--epoch", "3"]) == ["--source=runs/a", "--epoch", "3"]
    assert inspect_data.arguments(["--help"]) == ["--help"]


def test_real_data(shared: Path, tmp_path):
    images = tmp_path / "data" / "Lung"
    images.mkdir(parents=True)
    for file in sorted((shared / "slices_png" / "LUNA2016_Lung").glob("*.png"))[:4]:
        (images / file.name).symlink_to(file)
    chosen = options("ssl_swav2D", tmp_path / "data", tmp_path)
    inspect_data.main(inspect_data.Config("ssl_swav2D", chosen, output=str(tmp_path / "i.html")))
    seen = pictures((tmp_path / "i.html").read_text())
    assert len(seen) == 4 * (1 + 3)
    assert all(picture.max() > 100 for picture in seen.values())
