"""One HTML file that needs nothing else: templates, pictures as data URIs, plotly.js once."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from datasets.index import Sample
from datasets.store import SliceStore
from reporting.embed import Level
from utils import files

TEMPLATES = Path(__file__).parent / "templates"
SIDE = 112  # pixels of a thumbnail
STRIP = 3  # slices of a volume side by side


def render(template: str, output: Path, **values: Any) -> int:
    """Write the page; returns its bytes. Raises UserError where it cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**values)
    # A file name may hold bytes that are no UTF-8 (surrogates in Python); they are shown as "?".
    text = text.encode("utf-8", "replace").decode()
    files.write_text(text, output)
    return len(text.encode())


class Thumbnails:
    """Pictures, each once however often a page shows it: `add` gives the name under which the page finds it."""

    def __init__(self) -> None:
        self.uris: dict[str, str] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def add(self, store: SliceStore, item: tuple[int, int, int]) -> str:
        """A slice or image as it is; a volume as `STRIP` of its slices."""
        index, start, stop = item
        key = str(store.folder), store.samples[index].name, start, stop
        if key not in self._names:
            places = [start] if stop - start == 1 else spread(start, stop, STRIP)
            self._names[key] = self._keep(np.concatenate([self._slice(store, index, s) for s in places], axis=1))
        return self._names[key]

    def strip(self, store: SliceStore, item: tuple[int, int, int], count: int) -> list[tuple[str, int]]:
        """(picture, slice) of `count` evenly spaced slices of a volume."""
        index, start, stop = item
        return [(self.add(store, (index, s, s + 1)), s) for s in spread(start, stop, min(count, stop - start))]

    def array(self, picture: np.ndarray) -> str:
        """[H, W] in 0..1, enlarged by whole factors only, so that its pixels stay visible."""
        factor = max(1, SIDE // max(picture.shape))
        return self._keep((255 * picture + 0.5).astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1), True)

    def _slice(self, store: SliceStore, index: int, s: int) -> np.ndarray:
        picture = Image.fromarray((255 * store.read(index, s, s + 1)[0] + 0.5).astype(np.uint8))
        return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))

    def _keep(self, picture: np.ndarray, exact: bool = False) -> str:
        name = f"t{len(self.uris)}"
        self.uris[name] = data_uri(picture, exact)
        return name


def data_uri(picture: np.ndarray, exact: bool = False) -> str:
    """[H, W] uint8 -> WebP, without loss where `exact`."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=80, lossless=exact)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def spread(start: int, stop: int, count: int) -> list[int]:
    """Centres of `count` equal parts of start..stop-1."""
    return [int(start + (k + 0.5) * (stop - start) / count) for k in range(count)]


def picture(thumbs: Thumbnails, store: SliceStore, level: Level, index: int, cosine: float | None) -> dict[str, Any]:
    """What the templates show of an item."""
    item = level.items[index]
    sample = level.samples[item[0]]
    strip = item[2] - item[1] > 1
    return {
        "thumb": thumbs.add(store, item),
        "width": SIDE * (STRIP if strip else 1),
        "height": SIDE,
        "label": level.label(index),
        "short": short_label(sample, item),
        "dataset": sample.dataset,
        "cosine": cosine,
    }


def short_label(sample: Sample, item: tuple[int, int, int]) -> str:
    """File name without its folders and, of a slice, its number."""
    name = os.path.basename(sample.name)
    return f"{name} #{item[1]}" if sample.kind == "volume" and item[2] - item[1] == 1 else name
