"""One HTML file that needs nothing else: templates, pictures as data URIs, plotly.js once."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from datasets.cache import shown_size
from reporting.embed import Item, Level
from utils import files
from utils.errors import UserError

TEMPLATES = FileSystemLoader(Path(__file__).parent / "templates")
SIDE = 112  # pixels of a thumbnail
STRIP = 3  # slices of a volume side by side


def check_output(name: str) -> Path:
    """Where the page will be. Raises UserError where there is no folder for it."""
    output = Path(name).expanduser()
    if not output.parent.is_dir():
        raise UserError(f"output: {output.parent} is not a folder; create it, or name another file")
    return output


def render(template: str, output: Path, **values: Any) -> None:
    """Write the page and say so. Raises UserError where it cannot be written."""
    how = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    text = Environment(loader=TEMPLATES, **how).get_template(template).render(**values)
    # A file name may hold bytes that are no UTF-8 (surrogates in Python); they are shown as "?".
    content = text.encode("utf-8", "replace")
    files.write_text(content.decode(), output)
    print(f"wrote {output} ({shown_size(len(content))})", flush=True)


class Thumbnails:
    """Pictures, each once however often a page shows it: `add` gives the name under which the page finds it."""

    def __init__(self) -> None:
        self.uris: dict[str, str] = {}
        self.names: dict[tuple[Any, ...], str] = {}

    def add(self, item: Item) -> str:
        """A slice or image as it is; a volume as `STRIP` of its slices."""
        key = item.store.folder, item.sample.name, item.start, item.stop
        if key not in self.names:
            parts = [Image.fromarray(_bytes(part.read()[0])) for part in item.spread(STRIP)]
            small = [np.asarray(part.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for part in parts]
            self.names[key] = self._keep(np.hstack(small), quality=80)
        return self.names[key]

    def strip(self, item: Item, count: int = 8) -> list[tuple[str, int]]:
        """(picture, slice) of evenly spaced slices of a volume."""
        return [(self.add(part), part.start) for part in item.spread(count)]

    def row(self, level: Level, found: list[tuple[int, float | None]]) -> list[dict[str, Any]]:
        """What the templates show of some of a level's items, each with a cosine or none."""
        rows = []
        for item, cosine in ((level.items[i], cosine) for i, cosine in found):
            about = {"label": item.label, "dataset": item.sample.dataset, "cosine": cosine, "thumb": self.add(item)}
            rows.append(about | {"width": SIDE * min(STRIP, item.slices), "height": SIDE})
        return rows

    def pixels(self, picture: np.ndarray) -> str:
        """[H, W] in 0..1, enlarged by whole factors only and kept without loss, so that its pixels stay visible."""
        factor = max(1, SIDE // max(picture.shape))
        return self._keep(_bytes(picture).repeat(factor, axis=0).repeat(factor, axis=1), lossless=True)

    def _keep(self, picture: np.ndarray, **how: Any) -> str:
        name, buffer = f"t{len(self.uris)}", io.BytesIO()
        Image.fromarray(picture).save(buffer, "WEBP", **how)
        self.uris[name] = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return name


def _bytes(picture: np.ndarray) -> np.ndarray:
    return (255 * picture + 0.5).astype(np.uint8)
