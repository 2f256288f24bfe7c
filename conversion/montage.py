"""montage.png: a few slices of every data set for people to look at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from conversion.table import Case
from datasets.index import MONTAGE
from datasets.render import read_grey, robust_limits
from utils.files import whole_file

TILE, TILES = 128, 48  # pixels, number
CAPTION = 12  # pixels


def montage(cases: Sequence[Case], dest: Path, window: Sequence[float] | None) -> None:
    """Slices as training sees them (window or percentiles), label maps as a red tint, with their ids."""
    tiles = [tile for case in cases[:: math.ceil(len(cases) / TILES)] for tile in _tiles(case, dest, window)]
    tiles = tiles[:: math.ceil(len(tiles) / TILES)]
    columns = min(8, len(tiles))
    sheet = Image.new("RGB", (columns * TILE, math.ceil(len(tiles) / columns) * (TILE + CAPTION)))
    draw = ImageDraw.Draw(sheet)
    for k, (text, tile) in enumerate(tiles):
        x, y = k % columns * TILE, k // columns * (TILE + CAPTION)
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y + CAPTION + (TILE - tile.height) // 2))
        draw.text((x + 2, y), text[-20:], fill=(255, 255, 0))
    with whole_file(dest / MONTAGE) as temporary:
        sheet.save(temporary, format="PNG")


def _tiles(case: Case, dest: Path, window: Sequence[float] | None) -> Iterator[tuple[str, Image.Image]]:
    if not case.is_volume:
        grey = read_grey(dest / case.file)
        yield case.id, _tile(grey, None, robust_limits(grey), (1.0, 1.0))
        return
    volume = np.load(dest / case.file, mmap_mode="r")
    volume = volume[..., 0] if volume.ndim == 4 else volume
    label = np.load(dest / case.label, mmap_mode="r") if case.label else None
    limits = window or robust_limits(volume)
    rows_mm, columns_mm, _ = map(float, (case.spacing_mm or "1 x 1 x 1").split(" x "))
    for k in (int(share * volume.shape[2]) for share in (0.5, 0.3, 0.7)):
        tint = label[:, :, k] > 0 if label is not None else None
        yield f"{case.id} {k}", _tile(volume[:, :, k], tint, limits, (rows_mm, columns_mm))


def _tile(pixels: np.ndarray, tint: np.ndarray | None, limits: Sequence[float], mm: tuple[float, float]) -> Image.Image:
    """At most TILE x TILE pixels, in the proportions that the patient has."""
    low, high = limits
    grey = ((pixels.astype(np.float32) - low) / max(high - low, 1e-20)).clip(0, 1) * 255
    rgb = np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if tint is not None:
        rgb[tint, 0] = rgb[tint, 0] // 2 + 127
    height, width = pixels.shape[0] * mm[0], pixels.shape[1] * mm[1]
    scale = TILE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR)
