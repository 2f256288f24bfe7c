"""The heart phantom in its chest; see conversion/anatomy.py for what shapes and painters are."""

from __future__ import annotations

import numpy as np

from conversion.anatomy import Canvas, Coordinates, Random, common, ellipsoid, rounded, tube, union, wave_field


def paint_heart(canvas: Canvas, draw: Random, disease: Random, finding: int) -> None:
    """With the finding: a dilated left ventricle with a thin wall."""
    cage, texture = _chest(canvas, draw)
    own, moved = _axes(canvas.at, draw)
    normal = (draw.uniform(0.165, 0.205), draw.uniform(0.10, 0.125), draw.uniform(0.34, 0.38))
    dilated = (disease.uniform(0.255, 0.295), disease.uniform(0.045, 0.065), disease.uniform(0.40, 0.44))
    right, atria = draw.uniform(0.85, 1.15), draw.uniform(0.88, 1.14)

    sac = union(
        ellipsoid(own, (0.0, 0.10, 0.0), (0.50, 0.46, 0.40)),
        ellipsoid(moved, (-0.08, 0.10, 0.12), (0.46, 0.38, 0.46)),
    )
    upper = common(ellipsoid(canvas.flat, (0.0, 0.06, 0.0), (0.32, 0.46, 1.0)), -canvas.at[2])  # mediastinum above
    canvas.paint("fat", union(sac, upper) + 0.015 * texture, cage + 0.01)
    base = -0.24 - own[0]  # the valve plane cuts the ventricles off
    right_ventricle = common(ellipsoid(own, (-0.02, 0.26, 0.02), (0.38, 0.22 * right, 0.29 * right)), base + 0.02)
    outflow = tube(moved, (0.02, -0.38, 0.10, 0.11), (0.12, -0.30, 0.34, 0.09))
    canvas.paint("myocardium", union(right_ventricle - 0.035, outflow - 0.03))
    canvas.paint("right_ventricle", union(right_ventricle + 0.008 * texture, outflow))
    _atria(canvas, moved, atria)
    _left_ventricle(canvas, own, base, texture, *(dilated if finding else normal))
    _arteries(canvas, moved)


def _chest(canvas: Canvas, draw: Random) -> tuple[np.ndarray, np.ndarray]:
    """Chest wall with ribs under a layer of fat, lungs, organs, spine; returns the cage and a field of texture."""
    x, y, z = canvas.at
    side, flat = canvas.side, canvas.flat
    wall = (rounded(x / 1.02, (y - 0.02) / 0.95) - 1) * 0.95
    thick = draw.uniform(0.17, 0.22)
    cage = wall + thick
    canvas.paint("fat", wall)
    canvas.paint("chest_wall", wall + draw.uniform(0.03, 0.08))
    space = draw.uniform(0.36, 0.44)
    level = (z + 0.4 * y) / space
    between = np.abs(level - np.round(level)) * space
    ribs = (np.sqrt(((wall + thick - 0.055) / 0.042) ** 2 + (between / 0.11) ** 2) - 1) * 0.042
    canvas.paint("bone", ribs, -0.62 - y)
    canvas.paint("bone", ellipsoid(flat, (0.0, 0.09 + thick - 0.95, 0.0), (0.16, 0.05, 1.0)))  # sternum
    canvas.paint("lung", cage)
    rest = ((side[0] - 0.42) / 0.5) ** 2 + (y / 0.8) ** 2
    abdomen = common(cage, (z + draw.uniform(0.36, 0.46) - 0.06 * np.tanh(-x / 0.1) + 0.25 * rest) * 0.85)
    canvas.paint("fat", abdomen)
    organs = union(
        x - 0.25 + 0.5 * (z + 0.6) + 0.5 * (y + 0.2).clip(0, None) + 0.06 * np.sin(6 * y),
        ellipsoid(canvas.at, (0.45, -0.18, -0.95), (0.28, 0.26, 0.56)),
        ellipsoid(canvas.at, (0.58, 0.36, -0.92), (0.22, 0.20, 0.54)),
    )
    canvas.paint("upper_abdomen", abdomen + 0.03, organs)
    texture = wave_field(draw, canvas.at, 0.4, waves=6)
    ends = [(draw.uniform(0.55, 0.8), draw.uniform(-0.4, 0.6), draw.uniform(-0.5, 0.9)) for _ in range(5)]
    vessels = union(*(tube(side, (0.24, 0.28, 0.15, 0.06), (*end, 0.025)) for end in ends))
    canvas.paint("pulmonary_artery", vessels, cage + 0.05, -0.03 - abdomen)

    # Spine and the muscles beside it
    canvas.paint("chest_wall", ellipsoid(flat, (0.0, 0.80, 0.0), (0.36, 0.26, 1.0)), wall + 0.03)
    column = ellipsoid(flat, (0.0, 0.64, 0.0), (0.19, 0.15, 1.0)) + 0.015 * np.cos(2 * np.pi * z / space)
    ring = common(np.abs(np.hypot(x, y - 0.82) - 0.08) - 0.028, 0.72 - y)
    canvas.paint("bone", union(column, ring), wall + 0.02)
    return cage, texture


def _axes(at: Coordinates, draw: Random) -> tuple[Coordinates, Coordinates]:
    """(the heart's own coordinates: along, to the apex; across, from the left to the right ventricle; the third one,
    and the body's, of the heart's size)."""
    size = draw.uniform(1.08, 1.24)
    along = np.array([0.66, -0.58, -0.48]) + 0.06 * draw.standard_normal(3)
    along /= np.sqrt((along**2).sum())
    across = np.array([-0.62, -0.76, 0.1])
    across = across - along * (across * along).sum()
    across /= np.sqrt((across**2).sum())
    centre = np.array([0.13, -0.10, -0.04]) + 0.02 * draw.standard_normal(3)
    moved = tuple((a - c) / size for a, c in zip(at, centre, strict=True))
    own = tuple(sum(axis[k] * moved[k] for k in range(3)) for axis in (along, across, np.cross(along, across)))
    return own, tuple(m + c for m, c in zip(moved, centre, strict=True))


def _atria(canvas: Canvas, moved: Coordinates, size: float) -> None:
    right = ellipsoid(moved, (-0.34, -0.02, 0.0), (0.19 * size, 0.22 * size, 0.25 * size))
    cavae = union(
        tube(moved, (-0.32, 0.02, 0.1, 0.075), (-0.30, -0.02, 1.4, 0.075)),
        tube(moved, (-0.28, 0.12, -0.2, 0.085), (-0.22, 0.22, -1.4, 0.085)),
    )
    left = ellipsoid(moved, (-0.02, 0.30, 0.16), (0.25 * size, 0.16 * size, 0.20 * size))
    veins = union(
        tube(canvas.side, (0.12, 0.34, 0.22, 0.055), (0.50, 0.40, 0.34, 0.04)),
        tube(canvas.side, (0.12, 0.34, 0.06, 0.055), (0.50, 0.44, -0.02, 0.04)),
    )
    canvas.paint("myocardium", union(right, left) - 0.02)
    canvas.paint("right_atrium", union(right, cavae))
    canvas.paint("left_atrium", union(left, veins))


def _left_ventricle(
    canvas: Canvas, own: Coordinates, base: np.ndarray, texture: np.ndarray, short: float, muscle: float, long: float
) -> None:
    """short, long: radii of the cavity.  muscle: thickness of the wall."""
    cavity = ellipsoid(own, (0.0, 0.0, 0.0), (long, short, short))
    outer = ellipsoid(own, (0.0, 0.0, 0.0), (long + muscle, short + muscle, short + muscle))
    canvas.paint("myocardium", outer, base)
    canvas.paint("left_ventricle", cavity + 0.008 * texture, base)
    papillary = union(
        tube(own, (-0.02, 0.5 * short, 0.72 * short, 0.028), (0.6 * long, 0.45 * short, 0.6 * short, 0.028)),
        tube(own, (-0.02, -0.2 * short, -0.85 * short, 0.028), (0.6 * long, -0.1 * short, -0.6 * short, 0.028)),
    )
    canvas.paint("myocardium", papillary, cavity)
    canvas.paint("left_ventricle", tube(own, (-0.34, 0.0, 0.02, 0.10), (-0.2, 0.0, 0.0, 0.10)))  # mitral valve, open


def _arteries(canvas: Canvas, moved: Coordinates) -> None:
    trunk = ((0.12, -0.30, 0.36, 0.09), (0.14, -0.12, 0.56, 0.085), (-0.1, 0.06, 0.56, 0.07), (-0.34, 0.1, 0.52, 0.055))
    left = tube(moved, (0.14, -0.12, 0.56, 0.08), (0.36, 0.14, 0.56, 0.055))
    canvas.paint("pulmonary_artery", union(tube(moved, *trunk), left))
    root = (
        (0.02, 0.0, 0.06, 0.095),
        (-0.08, -0.14, 0.34, 0.105),
        (-0.10, -0.14, 0.62, 0.095),
        (-0.02, 0.0, 0.84, 0.09),
    )
    arch = ((-0.02, 0.0, 0.84, 0.09), (0.16, 0.34, 0.82, 0.085), (0.22, 0.48, 0.6, 0.08), (0.20, 0.50, -1.3, 0.07))
    canvas.paint("aorta", union(tube(moved, *root), tube(canvas.at, *arch)))
