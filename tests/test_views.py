"""report.py --data shows the very tensors that the training scripts get."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import options

from reporting import views
from training import scripts
from utils import config
from utils.distributed import Run

pytestmark = pytest.mark.usefixtures("one_thread")


def shown(source: str, output: Path, chosen: dict[str, Any]) -> tuple[Any, str]:
    """The page's options and the page."""
    page_options, own = views.options_of(source)
    given = [part for name, value in chosen.items() for part in (f"--{name}", json.dumps(value).strip('"'))]
    cfg = config.parse(page_options, args=[*own, *given, "--output", str(output)])
    views.main(cfg)
    return cfg, output.read_text()


def pictures(html: str) -> dict[str, np.ndarray]:
    """alt text -> pixels, for every picture of a page."""
    thumbs = json.loads(re.search(r'id="thumbs">(.*?)</script>', html, re.DOTALL)[1])
    found = {}
    for name, alt in re.findall(r'<img data-thumb="(\w+)"[^>]*alt="([^"]*)"', html):
        content = base64.b64decode(thumbs[name].partition(",")[2])
        found[alt] = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
    return found


@pytest.mark.parametrize("policy", ["paper", "strong"])
def test_the_page_shows_the_pixels_of_the_loader(policy, data, tmp_path):
    chosen = options("mask_swav", data, tmp_path, policy=policy, mask_ratio=0.5, epoch=2, samples=3, slices=8)
    cfg, html = shown("mask_swav", tmp_path / "i.html", chosen)
    seen = pictures(html)
    loader = cfg.script.data(cfg, Run(0, 1, torch.device("cpu")))
    batch = next(loader.epoch(2))
    name = loader.dataset.samples[loader.dataset.items[int(batch.index[0])]].name
    start = loader.dataset[2, int(batch.index[0])]["start"]
    for view in (0, 1):
        views_of = {a: p for a, p in seen.items() if a.startswith(f"{name}, view {view + 1}, slice ")}
        assert len(views_of) == 8
        for alt, pixels in views_of.items():
            wanted = batch.views[view, 0, int(alt.rsplit(" ", 1)[1]) - start].numpy()
            factor = pixels.shape[0] // wanted.shape[0]
            np.testing.assert_array_equal(pixels[::factor, ::factor], (255 * wanted + 0.5).astype(np.uint8))
    assert len({alt.partition(", ")[0] for alt in seen}) == 3
    assert html.count('class="crop marked"') == 3 * 8  # of each volume four of eight in either view


def test_a_run_is_shown_with_its_own_options_and_those_given(data, tmp_path):
    own = scripts.load("ssl_swav2D").Config(**options("ssl_swav2D", data, tmp_path, policy="paper", seed=5))
    config.save_yaml(config.to_dict(own), tmp_path / "config.yaml")
    cfg, html = shown(str(tmp_path), tmp_path / "i.html", {"seed": 6})
    assert (cfg.stage, cfg.policy, cfg.seed, cfg.size_crops) == (1, "paper", 6, [32, 16])
    assert "policy paper" in html
    assert html.count("<h3>crop 3</h3>") == 4
