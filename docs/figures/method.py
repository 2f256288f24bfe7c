"""Draw the README's overview of the method, for light and dark pages.

    python docs/figures/method.py  # -> docs/figures/method_light.png, docs/figures/method_dark.png

One unit is one pixel of the README's column, and y grows downwards. Blue is f_intra and what slices and images do,
orange f_inter and what volumes do, green the prediction of masked slices. The pictures are the bundled phantoms.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Polygon, Rectangle
from PIL import Image

DATA = Path(__file__).parents[2] / "Training_Data"
WIDTH, HEIGHT = 850, 440
INTER, MASK, INTRA = 76, 190, 312  # y of the middle of each loss's row
F_INTRA, F_INTER = r"$f_\mathrm{intra}$", r"$f_\mathrm{inter}$"
COLOURS = {  # on a light page, on a dark page
    "page": ("#ffffff", "#0d1117"),
    "text": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa4af"),
    "line": ("#8c959f", "#768390"),
    "blue": ("#2563c9", "#74a9ff"),
    "green": ("#1a7f4e", "#57c78f"),
    "orange": ("#c2570c", "#f2a25c"),
}


class Drawing:
    """The few shapes that the figure is made of, in the colours of one theme."""

    def __init__(self, axes: Axes, colours: dict[str, str]) -> None:
        self.axes, self.colours = axes, colours

    def text(self, x: float, y: float, words: str, size: float = 7.5, colour: str = "text", **style: object) -> None:
        style = {"ha": "center", "va": "center", "linespacing": 1.35, "color": self.colours[colour]} | style
        self.axes.text(x, y, words, size=size, **style)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>,head_length=3.2,head_width=1.7", "shrinkA": 0, "shrinkB": 0, "lw": 1.1}
        self.axes.add_patch(FancyArrowPatch(start, end, color=self.colours["line"], **style))

    def tinted(self, kind: type[Patch], *place: object, colour: str, **more: object) -> None:
        """A shape with an outline in a colour and a thin wash of it inside."""
        self.axes.add_patch(kind(*place, facecolor=self.colours[colour], alpha=0.13, lw=0, **more))
        self.axes.add_patch(kind(*place, fill=False, edgecolor=self.colours[colour], lw=1.2, **more))

    def box(self, left: float, right: float, top: float, bottom: float, colour: str) -> None:
        style = {"colour": colour, "boxstyle": "round,pad=0,rounding_size=6"}
        self.tinted(FancyBboxPatch, (left, top), right - left, bottom - top, **style)

    def stack(self, left: float, bottom: float, side: float, pictures: list[np.ndarray], step: float = 0) -> None:
        """Pictures behind each other, the first in front, at the lower left."""
        for k in reversed(range(len(pictures))):
            x, y = left + k * step, bottom - side - k * step
            style = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "bicubic", "zorder": 2}
            self.axes.imshow(pictures[k], extent=(x, x + side, y + side, y), **style)
            self.axes.add_patch(Rectangle((x, y), side, side, fill=False, ec=self.colours["line"], lw=0.9, zorder=2))

    def tokens(self, left: float, y: float, colours: list[str], width: float = 8) -> None:
        """A row of embeddings; `muted` ones are empty and dashed."""
        for k, colour in enumerate(colours):
            style = {"fill": False, "lw": 0.9, "ls": (0, (2, 1.4))} if colour == "muted" else {"lw": 0}
            self.axes.add_patch(Rectangle((left + 12 * k, y - 9), width, 18, color=self.colours[colour], **style))

    def badge(self, x: float, y: float, stage: int) -> None:
        colour = {1: "blue", 2: "green", 3: "orange"}[stage]
        self.axes.add_patch(Circle((x, y), 8, facecolor=self.colours[colour], lw=0))
        self.text(x, y, str(stage), 8, "page", weight="bold")

    def marker(self, x: float, y: float, shape: str, colour: str, filled: bool = True) -> None:
        face, edge = self.colours[colour if filled else "page"], self.colours[colour]
        self.axes.plot(x, y, marker=shape, ms=4.5, mfc=face, mec=edge, mew=shape == "o")

    def sphere(self, x: float, y: float, colour: str, seed: int) -> None:
        """Embeddings of two views on the unit sphere, which agree on their prototypes."""
        self.tinted(Circle, (x, y), 45, colour=colour)
        random = np.random.default_rng(seed)
        for angle in np.deg2rad([90, 210, 330]) + 0.25 * seed:
            centre = complex(x, y) + 25 * np.exp(-1j * angle)
            self.marker(centre.real, centre.imag, "D", "text")
            for around in angle + np.deg2rad([30, 150, 270]):
                apart = 3 * np.exp(-1j * random.uniform(0, np.pi))
                for place, filled in ((apart, True), (-apart, False)):
                    place += centre + 11 * np.exp(-1j * around)
                    self.marker(place.real, place.imag, "o", colour, filled)


def view(picture: np.ndarray, which: str) -> np.ndarray:
    """A crop of another contrast, mirrored or not: augmentation, much simplified."""
    return picture[4:-10, 2:-12] ** 0.75 if which == "s" else picture[10:-4, 12:-2][:, ::-1] ** 1.35


def draw_inputs(d: Drawing) -> None:
    volume = np.load(DATA / "Phantom_Heart/heart_000.npy")
    heart = [np.clip((volume[:, :, k] - 17.0) / 104, 0, 1) for k in (20, 17, 14, 11, 7)]
    image = np.asarray(Image.open(DATA / "Phantom_XRay/xray_005.png")) / 255
    middle = (INTER + MASK) / 2
    d.text(60, middle - 66, "volumes", 8.5, weight="bold")
    d.stack(12, middle + 48, 72, heart, 6)
    d.text(60, INTRA - 55, "2D images", 8.5, weight="bold")
    d.stack(24, INTRA + 36, 72, [image])
    for name, y in (("s", INTER + 5), ("t", MASK - 8)):
        d.stack(144, y + 29, 44, [view(x, name) for x in heart[:4]], 5)
        d.text(166, y + 39, f"view {name}", colour="muted")
        d.arrow((112, middle + (y - middle) * 0.1), (139, middle + (y - middle) * 0.62))
        d.arrow((208, y), (243, y))
    for name, x in (("s", 130), ("t", 182)):
        d.stack(x, INTRA + 22, 44, [view(image, name)])
        d.text(x + 22, INTRA + 32, f"view {name}", colour="muted")
    for start, end in ((101, 125), (231, 243)):
        d.arrow((start, INTRA), (end, INTRA))


def draw_networks(d: Drawing) -> None:
    d.tinted(Polygon, [(248, 16), (322, 42), (322, 338), (248, 364)], colour="blue", joinstyle="round")
    d.text(285, 172, F_INTRA, 14, "blue")
    d.text(285, 205, "ResNet, on\nevery slice\nand image")
    d.box(472, 566, 30, 226, "orange")
    d.text(519, 112, F_INTER, 14, "orange")
    d.text(519, 145, "deformable\ntransformer\nover slices")
    d.box(472, 566, INTRA - 22, INTRA + 22, "blue")
    d.text(519, INTRA, "projection\nhead")


def draw_branches(d: Drawing) -> None:
    masked = (2, 5, 6)
    for y, words in ((INTER - 19, "slice embeddings"), (MASK, "some are masked"), (INTRA, "slices and images")):
        d.text(399, y - 21, words, colour="muted")
    for y in (INTER - 13, INTER + 13, INTRA):
        d.tokens(353, y, ["blue"] * 8)
    d.tokens(353, MASK, ["muted" if k in masked else "blue" for k in range(8)])
    for y, end in ((INTER, 585), (MASK, 585), (INTRA, 641)):
        d.arrow((327, y), (347, y))
        d.arrow((450, y), (467, y))
        d.arrow((571, y), (end, y))
    d.text(604, INTER - 45, "volume\nembeddings", colour="muted")
    for y in (INTER - 13, INTER + 13):
        d.tokens(591, y, ["orange"], 26)
    d.arrow((623, INTER), (641, INTER))
    for y, colour, name in ((MASK - 13, "green", "predicted"), (MASK + 13, "blue", "target")):
        d.tokens(591, y, [colour if k in masked else "muted" for k in range(8)])
        d.text(691, y, name, colour="muted", ha="left")


def draw_losses(d: Drawing) -> None:
    d.sphere(692, INTER, "orange", 1)
    d.sphere(692, INTRA, "blue", 2)
    legend = (610, "o", True, "view s"), (666, "o", False, "view t"), (722, "D", True, "prototype")
    for x, shape, filled, word in legend:
        d.marker(x, INTER + 58, shape, "text", filled)
        d.text(x + 8, INTER + 56.5, word, colour="muted", ha="left", va="center_baseline")
    for y, name, colour, words, stages in (
        (INTER, "inter", "orange", "volume\nclusters", [3]),
        (MASK, "mask", "green", "mean squared\nerror", [2]),
        (INTRA, "intra", "blue", "slice and image\nclusters", [1, 3]),
    ):
        d.text(758, y - 24, rf"$L_\mathrm{{{name}}}$", 13, colour, ha="left")
        d.text(758, y + 3, words, colour="muted", ha="left")
        for k, stage in enumerate(stages):
            d.badge(766 + 20 * k, y + 28, stage)


def draw_stages(d: Drawing) -> None:
    for stage, colour, script, words in (
        (1, "blue", "ssl_*2D.py", f"{F_INTRA} learns, from slices and images"),
        (2, "green", "mask_*.py", f"{F_INTER} learns, {F_INTRA} is frozen"),
        (3, "orange", "ssl_*3D.py", f"{F_INTRA} and {F_INTER} learn together"),
    ):
        left = 281 * stage - 269
        d.box(left, left + 264, 388, 434, colour)
        d.badge(left + 20, 411, stage)
        d.text(left + 38, 402, f"Stage {stage}: {script}", 8.5, ha="left", weight="bold")
        d.text(left + 38, 420, words, ha="left")
    for x in (278, 559):
        d.arrow((x, 411), (x + 13, 411))


def draw(theme: str) -> None:
    colours = {name: pair[theme == "dark"] for name, pair in COLOURS.items()}
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor=colours["page"])
    axes = figure.add_axes((0, 0, 1, 1))
    for part in (draw_inputs, draw_networks, draw_branches, draw_losses, draw_stages):
        part(Drawing(axes, colours))
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="equal")
    axes.axis("off")
    figure.savefig(path := Path(__file__).with_name(f"method_{theme}.png"))
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    matplotlib.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    for theme in ("light", "dark"):
        draw(theme)
