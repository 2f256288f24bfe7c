"""The brain, the chest and the heart as implicit shapes, painted one over the other.

A shape is f(x, y, z), negative inside, and near its surface |f| is about the distance to it. x runs from the patient's
right (-1) to left (+1), y from front (-1) to back (+1), z from feet (-1) to head (+1). What varies between cases is
drawn from `draw`, and what a finding needs from `disease`, whatever the finding is: the same seed with and without it
is the same patient.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import numpy as np

STRUCTURES: dict[str, dict[int, str]] = {
    anatomy: dict(enumerate(names.split(), start=1))
    for anatomy, names in {
        "brain": "scalp skull csf grey_matter white_matter deep_grey cerebellum brainstem ventricles eyes lesion",
        "chest": "fat muscle ribs spine_and_sternum lung lung_vessels mediastinum heart great_vessels airways "
        "upper_abdomen nodule",
        "heart": "chest_wall lung bone fat upper_abdomen myocardium left_ventricle right_ventricle left_atrium "
        "right_atrium aorta pulmonary_artery",
    }.items()
}

Coordinates = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, y, z; any common shape
Point = tuple[float, float, float]
Random = np.random.Generator


class Canvas:
    """Label map and image of one case, filled by painting structures over each other."""

    def __init__(self, anatomy: str, at: Coordinates, tissues: np.ndarray, voxel: float) -> None:
        """at: coordinates of the voxels.  tissues: value per label.  voxel: its width, over which edges are soft."""
        self.at, self.tissues, self.voxel = at, tissues, voxel
        self.label = {name: value for value, name in STRUCTURES[anatomy].items()}
        self.image = np.full(at[0].shape, tissues[0])  # float64
        self.labels = np.zeros(at[0].shape, np.uint8)

    def paint(self, structure: str, *shapes: np.ndarray) -> None:
        """Fill what lies in all of the shapes."""
        shape = common(*shapes)
        share = (0.5 - shape / self.voxel).clip(0, 1)  # how much of the voxel is inside
        self.image += share * (self.tissues[self.label[structure]] - self.image)
        self.labels[shape < 0] = self.label[structure]

    @property
    def side(self) -> Coordinates:
        """Coordinates that are equal on the right and on the left."""
        return np.abs(self.at[0]), *self.at[1:]

    @property
    def flat(self) -> Coordinates:
        """Coordinates for columns along the body."""
        return *self.at[:2], np.zeros(())


def ellipsoid(at: Coordinates, centre: Point, radii: Point) -> np.ndarray:
    square = sum(((a - c) / r) ** 2 for a, c, r in zip(at, centre, radii, strict=True))
    return (np.sqrt(square) - 1) * min(radii)


def tube(at: Coordinates, *points: tuple[float, float, float, float]) -> np.ndarray:
    """A round tube through points (x, y, z, radius), linear in between; 1 where it is farther than 0.15."""
    return union(*(_capsule(at, a[:3], b[:3], a[3], b[3]) for a, b in pairwise(points)))


def _capsule(at: Coordinates, start: Point, end: Point, radius: float, radius_end: float) -> np.ndarray:
    reach = max(radius, radius_end) + 0.15
    close = True
    for p, a, b in zip(at, start, end, strict=True):  # tubes fill little of a volume: work in their box only
        close = close & (p > min(a, b) - reach) & (p < max(a, b) + reach)
    axis = [b - a for a, b in zip(start, end, strict=True)]
    offset = [np.broadcast_to(p, close.shape)[close] - a for p, a in zip(at, start, strict=True)]
    length = sum(v * v for v in axis)
    share = (sum(o * v for o, v in zip(offset, axis, strict=True)) / length).clip(0, 1)
    square = sum((o - share * v) ** 2 for o, v in zip(offset, axis, strict=True))
    shape = np.ones(close.shape)
    shape[close] = np.sqrt(square) - (radius + share * (radius_end - radius))
    return shape


def rounded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Radius in a plane that is 1 on an outline between a circle and a square, as a trunk has."""
    a, b = a * a, b * b
    return 0.6 * np.sqrt(a + b) + 0.4 * np.sqrt(np.sqrt(a * a + b * b))


def union(*shapes: np.ndarray) -> np.ndarray:
    return reduce(np.minimum, shapes)


def common(*shapes: np.ndarray) -> np.ndarray:
    """What lies in all of the shapes."""
    return reduce(np.maximum, shapes)


def wave_field(draw: Random, at: Coordinates, length: float, waves: int = 8) -> np.ndarray:
    """A random field of unit variance whose folds are `length` apart: plane waves of that length in all directions."""
    directions = draw.standard_normal((waves, 3))
    directions *= 2 * np.pi / length / np.sqrt((directions**2).sum(axis=1, keepdims=True))
    phases = draw.uniform(0, 2 * np.pi, waves)
    field = np.zeros(at[0].shape)
    for (a, b, c), phase in zip(directions, phases, strict=True):
        field += np.cos(a * at[0] + b * at[1] + c * at[2] + phase)
    return field * np.sqrt(2 / waves)


def paint_brain(canvas: Canvas, draw: Random, disease: Random, finding: int) -> None:
    """With the finding: enlarged ventricles, and a lesion."""
    x, y, z = canvas.at
    egg = x * (1 - draw.uniform(0.06, 0.16) * y)  # narrower in front
    low = np.where(z < -0.15, 0.6, 1.0) * (z + 0.15)  # the base is cut off, not round
    radius = np.sqrt((egg / 0.78) ** 2 + (y / 0.94) ** 2 + (low / 1.12) ** 2)
    skin = (1 - radius) * 0.78  # depth below it
    scalp, skull = draw.uniform(0.05, 0.075), draw.uniform(0.055, 0.075)
    depth = skin - scalp - skull  # below the inner table of the skull
    canvas.paint("scalp", -skin)
    canvas.paint("skull", scalp - skin)
    canvas.paint("csf", -depth)

    # Grey and white matter by their distance to fluid: outer surface, sulci (sheets on which a field is zero), fissures
    spacing = draw.uniform(0.34, 0.42)
    folds = wave_field(draw, canvas.at, spacing)
    sulci = common(np.abs(folds) * (spacing / (2 * np.pi)), depth - draw.uniform(0.17, 0.24))
    wobble = 0.012 * folds
    midline = common(np.abs(x + wobble), depth - 0.36, -0.02 - z)
    sylvian = common(np.abs(y + 0.2 - 0.6 * (z + 0.2) + wobble), depth - 0.3, np.abs(z + 0.3) - 0.4)
    to_fluid = union(depth - 0.01, sulci, midline, sylvian)
    atrophy = draw.uniform(0.004, 0.02)  # half the width of a sulcus, in both classes alike
    cortex = draw.uniform(0.065, 0.085)
    canvas.paint("grey_matter", atrophy - to_fluid, -depth)
    canvas.paint("white_matter", atrophy + cortex - to_fluid)
    wide = draw.uniform(0.85, 1.15) * (disease.uniform(1.7, 2.1) if finding else 1.0)
    _deep_brain(canvas, 0.02 - depth, 0.052 * wide)

    face = ellipsoid(canvas.side, (0.27, -0.76, -0.98), (0.36, 0.42, 0.38))  # fat, in which the orbits lie
    canvas.paint("skull", face - 0.045, scalp - skin)
    canvas.paint("scalp", face, -skin)
    canvas.paint("eyes", ellipsoid(canvas.side, (0.30, -0.62, -0.86), (0.15, 0.16, 0.15)), -skin)

    right_or_left = disease.choice([-1.0, 1.0]) * disease.uniform(0.26, 0.42)
    centre = (right_or_left, disease.uniform(-0.42, 0.46), disease.uniform(0.12, 0.48))
    radii = tuple(disease.uniform(0.10, 0.17, 3))
    if finding:
        canvas.paint("lesion", ellipsoid(canvas.at, centre, radii) + 0.025 * folds, 0.03 - depth)


def _deep_brain(canvas: Canvas, inside: np.ndarray, r: float) -> None:
    """Nuclei, cerebellum, brainstem and ventricles, whose horns have the radius r."""
    x, y, z = canvas.at
    side = canvas.side
    nuclei = union(
        ellipsoid(side, (0.19, -0.26, 0.10), (0.055, 0.14, 0.13)),  # caudate
        ellipsoid(side, (0.31, -0.06, -0.04), (0.075, 0.20, 0.18)),  # lentiform
        ellipsoid(side, (0.12, 0.12, 0.00), (0.095, 0.16, 0.16)),  # thalamus
        tube(side, (0.24, 0.26, -0.14, 0.05), (0.36, -0.08, -0.42, 0.07)),  # hippocampus
    )
    canvas.paint("deep_grey", nuclei)
    back = ellipsoid(canvas.at, (0.0, 0.44, -0.92), (0.52, 0.36, 0.40))
    folia = 0.02 * np.sin(38 * np.sqrt((x / 1.3) ** 2 + (y - 0.15) ** 2 + (z + 0.7) ** 2))
    canvas.paint("csf", back - 0.035, inside - 0.02)
    canvas.paint("cerebellum", back + folia, inside)
    stem = tube(canvas.at, (0.0, 0.16, -1.2, 0.11), (0.0, 0.04, -0.40, 0.15))
    cistern = union(common(stem - 0.045, z + 0.36), ellipsoid(canvas.at, (0.0, -0.16, -0.52), (0.15, 0.11, 0.10)))
    canvas.paint("csf", cistern, inside)
    canvas.paint("brainstem", stem)

    front = ((0.13, -0.42, 0.10, r), (0.06, -0.14, 0.20, 1.1 * r), (0.10, 0.16, 0.26, r))  # of the lateral horns
    lateral = tube(side, *front, (0.25, 0.36, 0.08, 1.3 * r), (0.18, 0.60, 0.02, 0.7 * r))
    temporal = tube(side, (0.26, 0.36, 0.04, r), (0.38, 0.00, -0.32, 0.5 * r))
    third = common(ellipsoid(canvas.at, (0.0, 0.04, -0.08), (0.02 + 0.3 * r, 0.20, 0.20)), -0.3 - z)
    fourth = ellipsoid(canvas.at, (0.0, 0.22, -0.74), (0.05 + 0.5 * r, 0.05, 0.10))
    canvas.paint("ventricles", union(lateral, temporal, third, fourth))


def paint_chest(canvas: Canvas, draw: Random, disease: Random, finding: int) -> None:
    """With the finding: lung nodules."""
    x, y, z = canvas.at
    broad, deep = draw.uniform(0.88, 0.95), draw.uniform(0.62, 0.70)
    shoulders = 1 + 0.5 * (z - 0.45).clip(0, None)
    body = (rounded(x / (broad * shoulders), y / deep) - 1) * deep
    taper = np.sqrt(1 - 0.94 * ((z + 0.25).clip(0, 1.45) / 1.48) ** 2)  # of the cage, to the apex
    cage = (np.sqrt((x / (broad - 0.16)) ** 2 + ((y - 0.01) / (deep - 0.14)) ** 2) / taper - 1) * 0.5 * taper
    space, diaphragm = _walls(canvas, draw, body, cage)

    # Lungs: what the cage leaves beside the mediastinum, the heart and the spine
    size = draw.uniform(0.9, 1.12)
    radii = (0.34 * size, 0.26 * size, 0.36 * size)
    own = (x, y, z + 0.35 * (x - 0.12))
    heart = ellipsoid(own, (0.14, -0.14, -0.28), radii)
    middle = 0.14 + 0.06 * (z - 0.2).clip(0, 1) + 0.05 * np.tanh((y - 0.1) / 0.1) - canvas.side[0]
    spine_bed = -ellipsoid(canvas.flat, (0.0, 0.42, 0.0), (0.19, 0.19, 1.0))
    lungs = common(cage + 0.035, middle, 0.02 - heart, spine_bed, (diaphragm - z) * 0.8 + 0.02)
    canvas.paint("lung", lungs)
    blobs = wave_field(draw, canvas.at, 0.5, waves=5)
    canvas.image *= np.where(lungs < 0, 1 + 0.12 * blobs, 1.0)
    canvas.paint("lung_vessels", _lung_vessels(draw, canvas.at, lungs), lungs + 0.01)

    canvas.paint("heart", heart)
    chambers = ellipsoid(own, (0.16, -0.15, -0.28), tuple(0.62 * r for r in radii))
    septum = 0.03 - np.abs(x - 0.13 + 0.6 * (y + 0.14))
    canvas.paint("great_vessels", chambers, septum)
    _middle(canvas, body, deep, space)

    count = int(disease.integers(3, 5))
    places = disease.uniform(-1, 1, (4, 3))
    sizes = disease.uniform(0.10, 0.14, 4)  # radius 5 to 7 % of the width
    for k in range(count if finding else 0):  # by turns in the two lungs, each in a height of its own
        sign = 1.0 if (k + int(places[0, 0] > 0)) % 2 else -1.0
        across = sign * (0.47 + 0.06 * places[k, 0])
        back = 0.10 + 0.06 * sign + 0.16 * places[k, 1]  # on the left, behind the heart
        up = (-0.20, 0.30, 0.05, -0.05)[k] + 0.1 * places[k, 2]
        nodule = ellipsoid(canvas.at, (across, back, up), (sizes[k],) * 3) + 0.012 * blobs
        canvas.paint("nodule", nodule, cage + 0.02)


def _walls(canvas: Canvas, draw: Random, body: np.ndarray, cage: np.ndarray) -> tuple[float, np.ndarray]:
    """Fat, muscle, ribs, abdomen; returns the distance from rib to rib, and the height of the diaphragm."""
    x, y, z = canvas.at
    side = canvas.side
    canvas.paint("fat", body)
    canvas.paint("muscle", body + draw.uniform(0.03, 0.08) - 0.02 * z)
    space = draw.uniform(0.26, 0.31)
    level = (z + draw.uniform(0.32, 0.42) * y + 0.10 * side[0]) / space  # ribs slope down to the front
    between = np.abs(level - np.round(level)) * space
    ribs = (np.sqrt(((cage - 0.025) / 0.036) ** 2 + (between / 0.065) ** 2) - 1) * 0.036
    canvas.paint("ribs", ribs, -0.42 - y, body + 0.02)  # in front they are cartilage
    canvas.paint("ribs", tube(side, (0.06, -0.42, 0.72, 0.05), (0.66, -0.16, 0.86, 0.05)), body + 0.02)  # clavicles
    blade = (np.abs(cage - 0.105) - 0.018, np.abs(side[0] - 0.52 - 0.08 * z) - 0.16, 0.05 - y, 0.10 - z)
    canvas.paint("ribs", *blade, body + 0.03)

    # Liver, stomach and spleen in fat below the diaphragm, whose right dome is the higher one
    canvas.paint("mediastinum", cage + 0.02)
    dome = draw.uniform(-0.62, -0.5)
    rest = ((side[0] - 0.36) / 0.42) ** 2 + ((y + 0.05) / 0.5) ** 2
    diaphragm = dome + 0.07 * np.tanh(-x / 0.1) - 0.30 * rest
    abdomen = common(cage + 0.03, (z - diaphragm) * 0.8)
    canvas.paint("fat", abdomen)
    organs = union(
        x - 0.12 + 0.5 * (z + 0.6) + 0.5 * (y + 0.25).clip(0, None) + 0.06 * np.sin(7 * y),
        ellipsoid(canvas.at, (0.36, -0.16, -0.80), (0.24, 0.20, 0.36)),
        ellipsoid(canvas.at, (0.50, 0.22, -0.84), (0.20, 0.15, 0.34)),
    )
    canvas.paint("upper_abdomen", abdomen + 0.02, organs)
    return space, diaphragm


def _lung_vessels(draw: Random, at: Coordinates, lungs: np.ndarray) -> np.ndarray:
    """Two branching trees that grow from the hila: [H, W, C], negative inside a vessel, 1 far from any."""
    distance = np.ones(lungs.shape)
    for sign in (-1.0, 1.0):
        here = (lungs < 0.05) & (sign * at[0] > 0)
        where = tuple(a[here] for a in at)
        nearest = np.ones(where[0].shape)
        for trunk in range(4):
            angle = 2 * np.pi * (trunk + draw.uniform(-0.25, 0.25)) / 4 + 0.5
            way = np.array([sign * draw.uniform(0.5, 0.8), 0.5 * np.cos(angle), np.sin(angle)])
            tips = [(np.array([sign * 0.17, 0.06, 0.08]), way, 0.05, 0.26)]
            for _ in range(3):
                grown = []
                for start, direction, radius, length in tips:
                    direction = direction / np.sqrt((direction**2).sum())
                    end = start + length * direction
                    nearest = np.minimum(nearest, tube(where, (*start, radius), (*end, 0.75 * radius)))
                    for _ in range(2):
                        turned = direction + 0.55 * draw.standard_normal(3)
                        grown.append((end, turned, 0.7 * radius, 0.8 * length))
                tips = grown
        distance[here] = nearest
    return distance


def _middle(canvas: Canvas, body: np.ndarray, deep: float, space: float) -> None:
    """Spine and sternum, great vessels, airways."""
    x, y, z = at = canvas.at
    flat, side = canvas.flat, (canvas.side[0], *canvas.flat[1:])
    vertebra = ellipsoid(flat, (0.0, 0.37, 0.0), (0.13, 0.10, 1.0)) + 0.02 * np.cos(2 * np.pi * z / (0.8 * space))
    arch = union(
        common(np.abs(np.hypot(x, y - 0.50) - 0.065) - 0.022, 0.43 - y),
        tube(flat, (0.0, 0.55, 0.0, 0.028), (0.0, 0.60, 0.0, 0.028)),
        tube(side, (0.06, 0.49, 0.0, 0.025), (0.17, 0.53, 0.0, 0.025)),
    )
    sternum = common(ellipsoid(flat, (0.0, 0.16 - deep, 0.0), (0.12, 0.04, 1.0)), -0.45 - z, z - 0.7)
    canvas.paint("spine_and_sternum", union(vertebra, arch, sternum), body + 0.03)

    aorta = ((-0.08, -0.16, 0.25, 0.085), (0.0, -0.04, 0.48, 0.08), (0.13, 0.2, 0.4, 0.07), (0.14, 0.26, -1.2, 0.065))
    vessels = union(
        tube(at, (-0.05, -0.12, -0.1, 0.085), *aorta),
        tube(at, (0.06, -0.2, -0.02, 0.08), (0.06, -0.08, 0.2, 0.075), (-0.18, 0.04, 0.12, 0.05)),
        tube(at, (0.06, -0.08, 0.2, 0.07), (0.22, 0.06, 0.16, 0.05)),
        tube(at, (-0.16, -0.08, 0.0, 0.05), (-0.15, -0.1, 1.2, 0.05)),
        tube(at, (0.08, -0.02, 0.45, 0.03), (0.16, -0.02, 1.2, 0.03)),
    )
    canvas.paint("great_vessels", vessels)
    airways = union(
        tube(at, (0.0, 0.06, 1.2, 0.06), (0.0, 0.12, 0.30, 0.06)),
        tube(at, (0.0, 0.12, 0.30, 0.048), (-0.2, 0.1, 0.08, 0.035)),
        tube(at, (0.0, 0.12, 0.30, 0.045), (0.2, 0.12, 0.06, 0.035)),
    )
    canvas.paint("airways", airways)
