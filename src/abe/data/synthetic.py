"""SyntheticVehicles: a fine-grained image set drawn by code, for runs that can download nothing.

A class is a combination of parts (`Parts`): silhouette, roof line, glazing, rims, lamps, grille and
so on. An image is such a vehicle under some `Nuisance`: paint, pose, light, blur, noise, in a
random scene with random occluders. Classes come in families that share most of their parts, so it
takes the parts to tell them apart: colour, background and place in the frame say nothing.

A vehicle is polygons in space, in metres: x forward, y away from the viewer, z up. The camera sees
its nose, its roof and the side whose y is negative. What lies on a surface (rims, lamps, windows)
is a `Stencil`: flat polygons in coordinates of their own, that the `_Hull` lays on the vehicle.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from abe.errors import InputError

Points = NDArray[np.float64]
Color = tuple[int, int, int]
Stencil = tuple[tuple[str, Points], ...]  # (tone, polygon (n, 2)), painted in this order

SUPERSAMPLING = 3
FAMILY_SIZE = 4

# --- stencils ----------------------------------------------------------------------------------


def _rect(left: float, bottom: float, right: float, top: float) -> Points:
    return np.array([(left, bottom), (right, bottom), (right, top), (left, top)], float)


def _disc(x: float = 0, y: float = 0, radius: float = 1, corners: int = 24) -> Points:
    angle = 2 * np.pi * np.arange(corners) / corners
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _polygon(*points: tuple[float, float]) -> Points:
    return np.array(points, float)


def _spokes(
    count: int, inner: float, outer: float, *, start: float = 0.15, twist: float = 0
) -> Stencil:
    """`count` metal bars from the hub to the rim, `inner` to `outer` wide, leaning by `twist`."""
    bar = _polygon((start, -inner), (start, inner), (0.93, outer + twist), (0.93, twist - outer))
    turns = 2 * np.pi * np.arange(count) / count
    cos, sin = np.cos(turns), np.sin(turns)
    turned = np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)], 1)  # (count, 2, 2)
    return tuple(("metal", bar @ matrix) for matrix in turned)


def _holes(count: int, distance: float, radius: float) -> Stencil:
    angles = 2 * np.pi * np.arange(count) / count
    return tuple(
        ("shade", _disc(distance * np.cos(a), distance * np.sin(a), radius, 10)) for a in angles
    )


_LIP: Stencil = (("metal", _disc()), ("shade", _disc(radius=0.86)))
_HUB: Stencil = (("metal", _disc(radius=0.22, corners=12)), ("shade", _disc(radius=0.1, corners=8)))
_PRESSED: Stencil = (("shade", _disc()), ("metal", _disc(radius=0.94)))

# In the unit circle.
TYRE: Stencil = (("rubber", _disc()),)
RIMS: dict[str, Stencil] = {
    "five-spoke": _LIP + _spokes(5, 0.13, 0.2) + _HUB,
    "star": _LIP + _spokes(5, 0.46, 0.02) + _HUB,
    "three-spoke": _LIP + _spokes(3, 0.18, 0.34) + _HUB,
    "cross": _LIP + _spokes(4, 0.14, 0.22) + _HUB,
    "seven-spoke": _LIP + _spokes(7, 0.06, 0.14) + _HUB,
    "wire": _LIP + _spokes(14, 0.03, 0.035) + _HUB,
    "turbine": _LIP + _spokes(8, 0.07, 0.1, twist=0.42) + _HUB,
    "steel": _PRESSED + _holes(8, 0.66, 0.15) + _HUB,
    "perforated": _PRESSED + _holes(5, 0.56, 0.24) + _HUB,
    "dish": (*_PRESSED, ("shade", _disc(radius=0.6)), ("metal", _disc(radius=0.5))),
    "moon": (*_PRESSED, ("chrome", _disc(radius=0.7)), ("metal", _disc(0.1, 0.12, 0.42))),
    "split": _LIP + _spokes(5, 0.05, 0.06, twist=0.16) + _spokes(5, 0.05, 0.06, twist=-0.16) + _HUB,
}


def _lamp(*glasses: Points) -> Stencil:
    """Each glass with a dark rim around it and a glint in it."""
    return tuple(
        (tone, glass.mean(axis=0) + scale * (glass - glass.mean(axis=0)))
        for glass in glasses
        for tone, scale in (("black", 1.22), ("lamp", 1.0), ("glint", 0.45))
    )


# The lamp on one side: x outwards and y up, both from -1 to 1.
LAMPS: dict[str, Stencil] = {
    "round": _lamp(_disc(radius=0.95)),
    "twin": _lamp(_disc(-0.62, 0, 0.55), _disc(0.62, 0, 0.55)),
    "square": _lamp(_rect(-0.85, -0.7, 0.85, 0.7)),
    "slit": _lamp(_polygon((-1.3, -0.3), (1.2, -0.05), (1.2, 0.4), (-1.3, 0.05))),
    "tall": _lamp(_rect(-0.1, -1, 0.8, 0.9)),
    "drop": _lamp(_polygon((-1.2, -0.5), (0.2, -0.75), (1, 0.1), (1, 1), (0, 0.5))),
    "diamond": _lamp(_disc(corners=4)),
    "stacked": _lamp(_rect(-0.8, 0.2, 0.9, 0.85), _rect(-0.8, -0.8, 0.9, -0.15)),
}


def _grille(outline: Points, bars: int = 0, slats: int = 0, tone: str = "chrome") -> Stencil:
    """A dark opening with `bars` across and `slats` upright, as wide as the outline's box."""
    (left, bottom), (right, top) = outline.min(axis=0), outline.max(axis=0)
    centre = outline.mean(axis=0)
    ys = np.linspace(bottom, top, bars + 2)[1:-1]
    xs = np.linspace(left, right, slats + 2)[1:-1]
    return (
        (tone, centre + 1.12 * (outline - centre)),
        ("black", outline),
        *((tone, _rect(left, y - 0.09, right, y + 0.09)) for y in ys),
        *((tone, _rect(x - 0.045, bottom, x + 0.045, top)) for x in xs),
    )


# Between the lamps: x from -1 to 1 across, y from -1 to 1 up.
GRILLES: dict[str, Stencil] = {
    "blank": (("seam", _rect(-0.9, -0.05, 0.9, 0.05)),),
    "bars": _grille(_rect(-1, -0.8, 1, 0.8), bars=3),
    "slats": _grille(_rect(-1, -0.8, 1, 0.8), slats=6),
    "mesh": _grille(_rect(-0.9, -0.8, 0.9, 0.8), bars=2, slats=5, tone="metal"),
    "kidneys": _grille(_disc(-0.5, 0, 0.42, 8) * (1, 1.9), slats=1)
    + _grille(_disc(0.5, 0, 0.42, 8) * (1, 1.9), slats=1),
    "mouth": _grille(_polygon((-0.8, -0.9), (0.8, -0.9), (1, 0.5), (-1, 0.5)), tone="black"),
    "shield": _grille(_polygon((0, -1.2), (0.6, -0.2), (0.6, 0.9), (-0.6, 0.9), (-0.6, -0.2))),
    "badge": (*_grille(_rect(-1, -0.3, 1, 0.4)), ("chrome", _disc(0, 0.05, 0.42) * (0.8, 1.8))),
}

# --- silhouettes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """A silhouette in metres: (x, z) points from tail to nose over the roof.

    `cabin` is the trapezium of the side windows: rear foot, rear top, front top, front foot.
    """

    tail: tuple[tuple[float, float], ...]
    cabin: tuple[tuple[float, float], ...]
    nose: tuple[tuple[float, float], ...]
    face: tuple[float, float]  # lamps and grille lie between these heights
    axles: tuple[float, ...]
    wheel: float  # radius
    width: float
    panes: int  # side windows
    tumblehome: float = 0.8  # the roof's width as a share of the body's
    fillet: float = 0.16  # radius of the rounded corners
    bed: bool = False  # open behind the cabin


# fmt: off
BODIES: dict[str, Body] = {
    "hatchback": Body(
        tail=((-1.6, 0.3), (-1.68, 0.75)),
        cabin=((-1.64, 1.04), (-1.2, 1.64), (0.15, 1.66), (0.72, 1.06)),
        nose=((1.52, 0.98), (1.64, 0.3)),
        face=(0.48, 0.9), axles=(-1.05, 1.02), wheel=0.41, width=1.75, panes=2),
    "sedan": Body(
        tail=((-1.95, 0.3), (-2.0, 0.75), (-1.92, 1.02)),
        cabin=((-1.35, 1.04), (-0.85, 1.52), (0.22, 1.54), (0.75, 1.04)),
        nose=((1.84, 0.96), (1.95, 0.3)),
        face=(0.47, 0.88), axles=(-1.22, 1.25), wheel=0.41, width=1.8, panes=2),
    "wagon": Body(
        tail=((-1.95, 0.3), (-2.02, 0.75)),
        cabin=((-1.98, 1.04), (-1.72, 1.58), (0.22, 1.6), (0.75, 1.04)),
        nose=((1.84, 0.96), (1.95, 0.3)),
        face=(0.47, 0.88), axles=(-1.22, 1.25), wheel=0.41, width=1.8, panes=3),
    "coupe": Body(
        tail=((-1.8, 0.28), (-1.9, 0.7), (-1.85, 0.94)),
        cabin=((-1.5, 0.95), (-0.65, 1.34), (0.05, 1.36), (0.68, 0.92)),
        nose=((1.82, 0.8), (1.96, 0.24)),
        face=(0.38, 0.74), axles=(-1.15, 1.22), wheel=0.43, width=1.88, panes=1),
    "suv": Body(
        tail=((-1.9, 0.45), (-1.98, 0.9)),
        cabin=((-1.93, 1.22), (-1.7, 1.85), (0.25, 1.87), (0.72, 1.24)),
        nose=((1.8, 1.18), (1.9, 0.42)),
        face=(0.62, 1.1), axles=(-1.2, 1.2), wheel=0.49, width=1.95, panes=3),
    "jeep": Body(
        tail=((-1.6, 0.5), (-1.62, 0.9)),
        cabin=((-1.62, 1.2), (-1.54, 1.92), (0.25, 1.94), (0.42, 1.22)),
        nose=((1.6, 1.18), (1.63, 0.48)),
        face=(0.66, 1.14), axles=(-1.05, 1.1), wheel=0.5, width=1.75, panes=2,
        tumblehome=0.9, fillet=0.07),
    "beetle": Body(
        tail=((-1.75, 0.32), (-1.82, 0.66), (-1.5, 1.0)),
        cabin=((-1.2, 1.06), (-0.6, 1.6), (0.12, 1.62), (0.55, 1.08)),
        nose=((1.42, 0.98), (1.74, 0.6), (1.74, 0.32)),
        face=(0.47, 0.84), axles=(-1.1, 1.1), wheel=0.43, width=1.6, panes=2,
        tumblehome=0.74, fillet=0.4),
    "minivan": Body(
        tail=((-1.98, 0.35), (-2.05, 0.8)),
        cabin=((-2.0, 1.1), (-1.8, 1.8), (0.45, 1.82), (1.22, 1.14)),
        nose=((1.88, 0.98), (2.0, 0.34)),
        face=(0.5, 0.92), axles=(-1.22, 1.25), wheel=0.42, width=1.85, panes=3),
    "van": Body(
        tail=((-2.05, 0.4), (-2.1, 0.8)),
        cabin=((-2.1, 1.25), (-2.05, 2.36), (0.92, 2.36), (1.46, 1.3)),
        nose=((1.92, 1.12), (2.02, 0.38)),
        face=(0.56, 1.05), axles=(-1.28, 1.28), wheel=0.44, width=1.9, panes=3, tumblehome=0.88),
    "pickup": Body(
        tail=((-2.15, 0.48), (-2.17, 1.14), (-0.72, 1.14)),
        cabin=((-0.66, 1.16), (-0.56, 1.82), (0.42, 1.84), (0.85, 1.2)),
        nose=((2.0, 1.14), (2.06, 0.44)),
        face=(0.62, 1.08), axles=(-1.35, 1.35), wheel=0.5, width=1.92, panes=1,
        fillet=0.1, bed=True),
    "truck": Body(
        tail=((-2.6, 0.6), (-2.6, 2.5), (0.72, 2.5), (0.72, 1.0)),
        cabin=((0.86, 1.24), (0.9, 2.12), (1.86, 2.12), (2.08, 1.28)),
        nose=((2.18, 1.14), (2.22, 0.42)),
        face=(0.62, 1.1), axles=(-1.6, 1.45), wheel=0.5, width=2.1, panes=1,
        tumblehome=0.97, fillet=0.08),
    "bus": Body(
        tail=((-2.9, 0.42), (-2.92, 0.8)),
        cabin=((-2.9, 1.22), (-2.84, 2.34), (2.7, 2.34), (2.84, 1.2)),
        nose=((2.92, 1.08), (2.92, 0.38)),
        face=(0.55, 1.03), axles=(-1.7, 1.8), wheel=0.48, width=2.2, panes=5,
        tumblehome=0.95, fillet=0.14),
}
# fmt: on

# Where the rear end of the roof goes, forward and up; longer roofs by more.
ROOFLINES: dict[str, tuple[float, float]] = {
    "level": (0.0, 0.0),
    "sloped": (0.2, -0.02),
    "fastback": (0.42, -0.05),
    "raised": (-0.02, 0.14),
}


@dataclass(frozen=True)
class Glazing:
    """Side windows in the cabin's unit square: x from tail to nose, y up."""

    extra_pillars: int = 0  # in units of half the body's number of panes
    low: tuple[float, float] = (0.06, 0.06)  # lower edge at the tail and at the nose
    blank: bool = False  # the rear half is sheet metal
    porthole: bool = False  # the rearmost pane is round


GLAZINGS: dict[str, Glazing] = {
    "wide": Glazing(),
    "split": Glazing(extra_pillars=1),
    "ribbed": Glazing(extra_pillars=2),
    "slim": Glazing(low=(0.46, 0.46)),
    "rising": Glazing(low=(0.6, 0.0)),
    "porthole": Glazing(blank=True, porthole=True),
    "panel": Glazing(blank=True),
}

# Under the face: x from -1 to 1 across, y from -1 (sill) to 1 (the face's lower edge).
BUMPERS: dict[str, Stencil] = {
    "plain": (("seam", _rect(-1, 0.8, 1, 1)), ("shade", _rect(-0.5, -0.8, 0.5, -0.2))),
    "plastic": (("plastic", _rect(-1.02, -1, 1.02, 0.9)),),
    "chrome": (("shade", _rect(-1, -1, 1, 0)), ("chrome", _rect(-1.02, 0, 1.02, 0.9))),
    "fog": (
        ("black", _rect(-1, -1, 1, -0.5)),
        *_lamp(_disc(-0.72, 0.2, 0.6) * (0.24, 1) + (-0.55, 0)),
        *_lamp(_disc(0.72, 0.2, 0.6) * (0.24, 1) + (0.55, 0)),
    ),
    "intake": _grille(_polygon((-0.6, -0.9), (0.6, -0.9), (0.8, 0.7), (-0.8, 0.7)), slats=4),
    "bullbar": (
        ("plastic", _rect(-1, -1, 1, 0)),
        *(("chrome", _rect(x - 0.06, -0.6, x + 0.06, 4.2)) for x in (-0.4, 0.4)),
        *(("chrome", _rect(-0.46, y, 0.46, y + 0.5)) for y in (0.4, 3.8)),
    ),
}

LICENCE_PLATE: Stencil = (
    ("glint", _rect(-0.26, -0.8, 0.26, 0.4)),
    ("shade", _rect(-0.2, -0.4, 0.2, 0.0)),
)
WINDSCREEN: Stencil = (
    ("glass", _rect(-1, -1, 1, 1)),
    ("glare", _polygon((-0.5, -1), (-0.05, -1), (0.6, 1), (0.15, 1))),
    ("black", _polygon((-0.55, -1), (-0.5, -1), (0.1, -0.4), (0.05, -0.35))),
)

# Along the side between sill and belt: x from -1 (tail) to 1 (nose), y from 0 to 1.
TRIMS: dict[str, Stencil] = {
    "none": (),
    "strip": (("black", _rect(-0.97, 0.46, 0.97, 0.58)),),
    "skirt": (("plastic", _rect(-0.99, 0, 0.99, 0.36)),),
    "band": (("accent", _rect(-0.985, 0.62, 0.985, 0.92)),),
    "pinstripes": tuple(("accent", _rect(-0.98, y, 0.98, y + 0.07)) for y in (0.6, 0.74, 0.88)),
    "swoosh": (("accent", _polygon((-0.98, 0.95), (-0.3, 0.95), (0.75, 0.12), (0.2, 0.12))),),
    "flares": (),  # wide black wheel arches
}

HANDLES: dict[str, Stencil] = {
    "bar": (("chrome", _rect(-1, -0.25, 1, 0.25)),),
    "cup": (("black", _disc(radius=0.7, corners=10)), ("chrome", _rect(-0.9, 0, 0.6, 0.3))),
    "flush": (("seam", _rect(-0.8, -0.2, 0.8, 0.2)),),
    "upright": (("black", _rect(-0.25, -0.8, 0.25, 0.8)),),
}

# Facing forward, beside the windscreen's foot.
MIRRORS: dict[str, Stencil] = {
    "square": (("plastic", _rect(-1, -0.8, 0.8, 0.8)),),
    "round": (("paint", _disc(corners=14)), ("seam", _disc(radius=0.6, corners=12))),
    "tall": (("black", _rect(-0.6, -0.8, 0.4, 1.3)),),
    "leaf": (("paint", _polygon((1, -0.5), (-1.2, -0.2), (-1, 0.7), (0.4, 0.5))),),
}

ROOF_GEAR = ("bare", "rails", "rack", "box", "sign", "beacons", "fin", "wing", "board")

# What a class can be made of: the field's name -> its values. The order is that of `Parts`.
VOCABULARY: dict[str, tuple[str, ...]] = {
    "body": tuple(BODIES),
    "roofline": tuple(ROOFLINES),
    "glazing": tuple(GLAZINGS),
    "rim": tuple(RIMS),
    "lamp": tuple(LAMPS),
    "grille": tuple(GRILLES),
    "bumper": tuple(BUMPERS),
    "trim": tuple(TRIMS),
    "roof_gear": ROOF_GEAR,
    "mirror": tuple(MIRRORS),
    "handle": tuple(HANDLES),
}
# Large enough to tell two vehicles apart by themselves in a small picture.
_TELLING = ("roofline", "glazing", "rim", "lamp", "grille", "bumper", "trim", "roof_gear")


@dataclass(frozen=True)
class Parts:
    """What makes a class: one value of `VOCABULARY` for each part."""

    body: str
    roofline: str
    glazing: str
    rim: str
    lamp: str
    grille: str
    bumper: str
    trim: str
    roof_gear: str
    mirror: str
    handle: str

    def sibling(self, rng: np.random.Generator) -> Parts:
        """These parts with one to three changed, one of them a large one; never the body."""
        others = [part for part in VOCABULARY if part != "body"]
        changed = {rng.choice(_TELLING), *rng.choice(others, rng.integers(3), replace=False)}
        return dataclasses.replace(
            self,
            **{
                part: str(rng.choice([v for v in VOCABULARY[part] if v != getattr(self, part)]))
                for part in sorted(changed)
            },
        )


def vehicle_classes(num_classes: int, seed: int) -> tuple[tuple[str, Parts], ...]:
    """(name, parts) of each class; the first n of them are the same whatever `num_classes` is.

    Families of `FAMILY_SIZE` consecutive classes: a random vehicle and its siblings. The bodies
    take turns, so that each half of the classes has them all.
    """
    rng = np.random.default_rng([seed, 0, 0, 1])  # a stream that no image has
    classes: dict[Parts, str] = {}
    while len(classes) < num_classes:
        family, member = divmod(len(classes), FAMILY_SIZE)
        if member == 0:
            drawn = {part: str(rng.choice(values)) for part, values in VOCABULARY.items()}
            drawn["body"] = VOCABULARY["body"][family % len(BODIES)]
            parts = founder = Parts(**drawn)
        else:
            parts = founder.sibling(rng)
        classes.setdefault(parts, f"{parts.body} {family:03d}{'abcd'[member]}")
    return tuple((name, parts) for parts, name in classes.items())


# --- nuisance ----------------------------------------------------------------------------------

# fmt: off
PAINTS: tuple[Color, ...] = (
    (196, 44, 48), (226, 96, 54), (240, 170, 60), (242, 206, 92), (116, 158, 84), (44, 112, 92),
    (70, 150, 160), (60, 110, 176), (44, 70, 128), (108, 80, 140), (196, 116, 144),
    (236, 232, 222), (176, 182, 188), (104, 112, 120), (60, 64, 74), (150, 112, 84),
    (222, 200, 170), (150, 198, 214),
)
SKIES: tuple[tuple[Color, Color], ...] = (  # above and at the horizon
    ((106, 162, 220), (220, 234, 240)), ((160, 172, 186), (216, 220, 222)),
    ((92, 98, 150), (246, 190, 150)), ((236, 190, 168), (250, 234, 208)),
    ((188, 206, 200), (236, 234, 216)), ((206, 206, 210), (236, 236, 236)),
    ((36, 44, 78), (104, 110, 146)),
)
GROUNDS: tuple[Color, ...] = (
    (110, 112, 116), (78, 80, 86), (168, 166, 158), (206, 188, 152), (116, 144, 88),
    (152, 112, 96), (226, 230, 232), (138, 130, 122),
)
WALLS: tuple[Color, ...] = (
    (198, 168, 140), (214, 200, 178), (150, 120, 104), (120, 132, 144), (176, 186, 190),
    (96, 106, 120), (190, 124, 100), (222, 190, 120), (140, 156, 142), (160, 140, 160),
)
LEAVES: tuple[Color, ...] = (
    (76, 122, 70), (52, 98, 72), (120, 142, 72), (190, 142, 70), (140, 160, 140),
)
# fmt: on


def _color(channels: ArrayLike) -> Color:
    r, g, b = np.clip(channels, 0, 255).astype(int).tolist()
    return r, g, b


def _near(rng: np.random.Generator, colors: Sequence[Color], spread: float = 10) -> Color:
    """One of `colors`, a little off."""
    return _color(rng.choice(colors) + rng.normal(0, spread, 3))


def _tint(color: Color, factor: float) -> Color:
    """`color` made darker (factor below 1) or lighter."""
    r, g, b = color
    return min(255, int(r * factor)), min(255, int(g * factor)), min(255, int(b * factor))


@dataclass(frozen=True)
class Nuisance:
    """What differs between the pictures of one class, and says nothing about it."""

    paint: Color
    accent: Color  # of stripes and the like; stands out from the paint
    metal: Color
    glass: Color
    mirrored: bool
    yaw: float  # radians; 0 shows the side only, pi/2 the front only
    elevation: float  # radians, of the camera above the ground
    roll: float  # radians
    distance: float  # of the camera, in vehicle lengths: small is wide-angled
    fill: float  # the vehicle's larger side, as a share of the picture's; part may be cut off
    shift: tuple[float, float]  # of the vehicle, as shares of the picture's side
    spin: float  # radians, of the wheels
    light: tuple[float, float, float]  # where light comes from, unit length, vehicle coordinates
    ambient: float  # share of the light that comes from everywhere
    brightness: float
    contrast: float
    cast: tuple[float, float, float]  # factors of R, G, B
    dapple: float  # depth of the shadows that fall over the picture
    blur: float  # pixels
    noise: float  # standard deviation, in units of 0..255

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Nuisance:
        """Draw every value; none depends on the class."""
        uniform = rng.uniform
        paint = _near(rng, PAINTS)
        standing_out = [c for c in PAINTS if abs(sum(c) - sum(paint)) > 200]
        x, y, z = uniform((-0.4, -0.9, 0.6), (0.9, 0.2, 1.2))
        length = float(np.sqrt(x * x + y * y + z * z))
        return cls(
            paint=paint,
            accent=_near(rng, standing_out),
            metal=_color(uniform(150, 228) + rng.normal(0, 6, 3)),
            glass=_near(rng, ((46, 66, 84), (62, 84, 92), (40, 46, 54))),
            mirrored=bool(rng.integers(2)),
            yaw=uniform(0.52, 0.95),
            elevation=uniform(0.1, 0.34),
            roll=rng.normal(0, 0.04),
            distance=uniform(1.8, 4.5),
            fill=uniform(0.8, 1.08),
            shift=(uniform(-0.06, 0.06), uniform(-0.05, 0.07)),
            spin=uniform(0, 2 * np.pi),
            light=(x / length, y / length, z / length),
            ambient=uniform(0.5, 0.75),
            brightness=uniform(0.85, 1.15),
            contrast=uniform(0.8, 1.15),
            cast=(uniform(0.92, 1.08), uniform(0.96, 1.03), uniform(0.9, 1.08)),
            dapple=uniform(0, 0.35) * rng.integers(2),
            blur=max(0.0, uniform(-0.8, 0.7)),
            noise=uniform(0.5, 4.5),
        )


# --- the vehicle -------------------------------------------------------------------------------


def _fillet(corners: Points, radius: float) -> Points:
    """An open line (n, 2) with its inner corners rounded, four points to each."""
    before, corner, after = corners[:-2], corners[1:-1], corners[2:]

    def towards(other: Points) -> Points:
        step = other - corner
        length = np.linalg.norm(step, axis=1, keepdims=True)
        return corner + step * np.minimum(radius / length, 0.48)

    t = np.linspace(0, 1, 4)[:, None, None]
    curves = (1 - t) ** 2 * towards(before) + 2 * t * (1 - t) * corner + t**2 * towards(after)
    rounded = curves.swapaxes(0, 1).reshape(-1, 2)
    return np.concatenate([corners[:1], rounded, corners[-1:]])


class _Hull:
    """A vehicle's surface: where flat coordinates lie in space."""

    def __init__(self, parts: Parts) -> None:
        body = self.body = BODIES[parts.body]
        cabin = self.cabin = np.array(body.cabin)
        cabin[1] += np.multiply(ROOFLINES[parts.roofline], np.sqrt(cabin[2, 0] - cabin[1, 0]))
        self.outline = _fillet(np.concatenate([body.tail, cabin, body.nose]), body.fillet)
        self.belt = float(cabin[[0, 3], 1].min())
        self.sill = body.nose[-1][1]
        self.roof = float(cabin[2, 1])
        self.rear, self.nose = (float(f(self.outline[:, 0])) for f in (np.min, np.max))
        self._tail_line = self.outline[: int(np.argmax(self.outline[:, 1] >= self.belt - 0.02)) + 1]
        self._nose_line = self.outline[self.outline[:, 0] >= cabin[2, 0] - body.fillet][::-1]

    def half_width(self, z: Points) -> Points:
        """Half the width at height `z`: all of it up to the belt, then narrowing to the roof."""
        share = np.clip((z - self.belt) / (self.roof - self.belt), 0, 1.2)
        return self.body.width / 2 * (1 - (1 - self.body.tumblehome) * share)

    def side(self, points: Points) -> Points:
        """(x, z) on the side, (n, 2) -> (n, 3)."""
        x, z = points.T
        return np.stack([x, -self.half_width(z), z], axis=1)

    def flank(self, points: Points) -> Points:
        """(-1 at the tail to 1 at the nose, 0 at the sill to 1 at the belt), (n, 2) -> (n, 3)."""
        z = self.sill + points[:, 1] * (self.belt - self.sill)
        tail = np.interp(z, self._tail_line[:, 1], self._tail_line[:, 0])
        nose = np.interp(z, self._nose_line[:, 1], self._nose_line[:, 0])
        return self.side(np.stack([tail + (points[:, 0] + 1) / 2 * (nose - tail), z], axis=1))

    def glasshouse(self, points: Points) -> Points:
        """The cabin's unit square (tail to nose, foot to roof) on the side, (n, 2) -> (n, 3)."""
        u, v = points[:, :1], points[:, 1:]
        rear_foot, rear_top, front_top, front_foot = self.cabin
        foot = rear_foot + u * (front_foot - rear_foot)
        top = rear_top + u * (front_top - rear_top)
        return self.side(foot + v * (top - foot))

    def front(self, points: Points) -> Points:
        """(share of the half width, z) on nose, bonnet and windscreen, (n, 2) -> (n, 3)."""
        u, z = points.T
        x = np.interp(z, self._nose_line[:, 1], self._nose_line[:, 0])
        return np.stack([x, u * self.half_width(z), z], axis=1)


def _framed(
    surface: Callable[[Points], Points], centre: tuple[float, float], width: float, height: float
) -> Callable[[Points], Points]:
    """A stencil's coordinates, from -1 to 1, on the part of `surface` around `centre`."""
    return lambda points: surface(np.array(centre) + points * (width, height))


class _Canvas:
    """Paints polygons in space on an image, as the nuisance's camera sees them."""

    def __init__(self, image: Image.Image, hull: _Hull, nuisance: Nuisance) -> None:
        self._draw = ImageDraw.Draw(image, "RGBA")
        cos, sin = np.cos(nuisance.yaw), np.sin(nuisance.yaw)
        yaw = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        cos, sin = np.cos(nuisance.elevation), np.sin(nuisance.elevation)
        pitch = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
        self._rotation = (pitch @ yaw).T
        self._distance = nuisance.distance * (hull.nose - hull.rear)
        self._light = np.array(nuisance.light)
        self._ambient = nuisance.ambient
        cos, sin = np.cos(nuisance.roll), np.sin(nuisance.roll)
        flip = -1 if nuisance.mirrored else 1
        self._frame = np.array([[cos * flip, sin], [sin * flip, -cos]])
        self._offset = np.zeros(2)

        half, top = hull.body.width / 2, hull.outline[:, 1].max()
        corners = [
            (x, y, z) for x in (hull.rear, hull.nose) for y in (-half, half) for z in (0, top)
        ]
        seen = self.project(np.array(corners))
        low, high = seen.min(axis=0), seen.max(axis=0)
        scale = nuisance.fill * image.width / (high - low).max()
        self._offset = (np.array(nuisance.shift) + 0.5) * image.width - scale * (low + high) / 2
        self._frame *= scale

        self.tones: dict[str, tuple[int, ...]] = {
            "paint": nuisance.paint,
            "accent": nuisance.accent,
            "seam": _tint(nuisance.paint, 0.45),
            "metal": nuisance.metal,
            "chrome": _tint(nuisance.metal, 1.2),
            "shade": _tint(nuisance.metal, 0.28),
            "glass": nuisance.glass,
            "glare": (225, 240, 250, 60),
            "black": (24, 26, 30),
            "plastic": (62, 64, 70),
            "rubber": (34, 34, 38),
            "lamp": (226, 228, 214),
            "glint": (255, 255, 255),
            "red": (196, 40, 40),
            "amber": (250, 180, 50),
            "shadow": (10, 12, 20, 70),
        }

    def project(self, points: Points) -> Points:
        """Space to pixels, (..., 3) -> (..., 2)."""
        turned = points @ self._rotation
        return turned[..., ::2] / (self._distance + turned[..., 1:2]) @ self._frame + self._offset

    def lit(self, tone: str, normals: Points) -> list[Color]:
        """A tone's colour on surfaces with these outward unit normals (n, 3)."""
        direct = np.maximum(0, normals @ self._light)[:, None]
        factor = 1.25 * (self._ambient + (1 - self._ambient) * direct)
        colors = np.array(self.tones[tone]) * factor + 70 * np.maximum(0, direct - 0.6)
        return [tuple(color) for color in colors.clip(0, 255).astype(int).tolist()]

    def polygon(self, points: Points, color: str | tuple[int, ...]) -> None:
        """Paint one polygon (n, 3) in a tone or a colour."""
        pixels = self.project(points).ravel().tolist()
        self._draw.polygon(pixels, self.tones[color] if isinstance(color, str) else color)

    def stencil(self, stencil: Stencil, place: Callable[[Points], Points]) -> None:
        """Paint a stencil that `place` lays in space, (n, 2) -> (n, 3)."""
        if not stencil:
            return
        pixels = self.project(place(np.concatenate([polygon for _, polygon in stencil])))
        start = 0
        for tone, polygon in stencil:
            end = start + len(polygon)
            self._draw.polygon(pixels[start:end].ravel().tolist(), self.tones[tone])
            start = end

    def box(self, low: Sequence[float], high: Sequence[float], tone: str) -> None:
        """Paint the faces of a box that the camera sees: top, side and front."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        faces = np.array([
            [(x0, y0, z1), (x1, y0, z1), (x1, y1, z1), (x0, y1, z1)],
            [(x0, y0, z0), (x1, y0, z0), (x1, y0, z1), (x0, y0, z1)],
            [(x1, y0, z0), (x1, y1, z0), (x1, y1, z1), (x1, y0, z1)],
        ])  # fmt: skip
        normals = np.array([(0, 0, 1), (0, -1, 0), (1, 0, 0)])
        for face, color in zip(faces, self.lit(tone, normals), strict=True):
            self.polygon(face, color)

    def loft(self, lines: Points, tone: str) -> None:
        """Paint the lit surface between neighbouring lines (lines, n, 3), from tail to nose."""
        quads = np.stack([lines[:-1, :-1], lines[:-1, 1:], lines[1:, 1:], lines[1:, :-1]], axis=2)
        quads = quads.swapaxes(0, 1).reshape(-1, 4, 3)
        normals = np.cross(quads[:, 3] - quads[:, 1], quads[:, 2] - quads[:, 0])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        from_camera = quads.mean(axis=1) @ self._rotation + (0, self._distance, 0)
        seen = ((normals @ self._rotation) * from_camera).sum(axis=1) < 0
        pixels = self.project(quads[seen]).reshape(-1, 8).tolist()
        for quad, color in zip(pixels, self.lit(tone, normals[seen]), strict=True):
            self._draw.polygon(quad, color)


def _draw_body(canvas: _Canvas, hull: _Hull) -> None:
    """The sheet metal: a strip over tail, roof and nose with bevelled edges, and the side."""
    outline, bevel = hull.outline, 0.09
    tangent = np.gradient(outline, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    inner = outline - bevel * np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    half = hull.half_width(outline[:, 1])
    edges = ((inner, half), (outline, half - bevel), (outline, bevel - half), (inner, -half))
    lines = np.stack([np.insert(line, 1, y, axis=1) for line, y in edges])  # (4, n, 3)

    cab = 0
    if hull.body.bed:
        cab = int(np.argmax(outline[:, 0] > hull.cabin[0, 0])) - 1
        canvas.loft(lines[:, : cab + 1], "paint")
        x0, x1 = hull.rear + 0.12, hull.cabin[0, 0]
        floor = _rect(x0, 0.12 - hull.body.width / 2, x1, hull.body.width / 2 - 0.12)
        canvas.polygon(np.insert(floor, 2, hull.belt - 0.02, axis=1), "shade")
    canvas.loft(lines[:, cab:], "paint")

    below, above = canvas.lit("paint", np.array([(0, -1, 0), (0, -0.94, 0.34)]))
    canvas.polygon(hull.side(inner), below)
    canvas.polygon(hull.side(np.maximum(inner, (-np.inf, hull.belt))), above)


def _draw_side(canvas: _Canvas, hull: _Hull, parts: Parts) -> None:
    body, belt, sill = hull.body, hull.belt, hull.sill
    canvas.stencil((("shadow", _rect(-0.97, 0, 0.97, 0.3)),), hull.flank)
    canvas.stencil(TRIMS[parts.trim], hull.flank)
    canvas.stencil((("red", _rect(-0.97, 0.5, -0.91, 0.8)),), hull.flank)
    flared = parts.trim == "flares"
    for axle in body.axles:
        arch = _disc(axle, body.wheel, (1.36 if flared else 1.16) * body.wheel)
        canvas.polygon(
            hull.side(np.maximum(arch, (-np.inf, sill))), "plastic" if flared else "black"
        )
    windows, doors = _windows(hull, GLAZINGS[parts.glazing])
    canvas.stencil(windows, hull.glasshouse)
    for x in doors:
        canvas.stencil((("seam", _rect(x - 0.02, sill + 0.08, x + 0.02, belt)),), hull.side)
        canvas.stencil(
            HANDLES[parts.handle], _framed(hull.side, (x + 0.22, belt - 0.16), 0.13, 0.13)
        )


def _windows(hull: _Hull, glazing: Glazing) -> tuple[Stencil, list[float]]:
    """The side windows in the cabin's unit square, and the x of the rear edges of the doors."""
    count = hull.body.panes + glazing.extra_pillars * ((hull.body.panes + 1) // 2)
    pillars = np.linspace(0.04, 0.96, count + 1)
    length = hull.cabin[3, 0] - hull.cabin[0, 0]
    rear_low, front_low = glazing.low
    layers: list[tuple[str, Points]] = []
    for left, right in zip(
        pillars[:-1] + 0.035 / length, pillars[1:] - 0.035 / length, strict=True
    ):
        if glazing.blank:
            left = max(left, 0.5)
        if right - left < 0.05:
            continue
        low_left, low_right = np.maximum(
            0.06, rear_low + (front_low - rear_low) * np.array((left, right))
        )
        pane = _polygon((left, low_left), (right, low_right), (right, 0.86), (left, 0.86))
        streak = (
            pane[0] + (pane[1] - pane[0]) * [[0.3], [0.55]],
            pane[3] + (pane[2] - pane[3]) * [[0.95], [0.7]],
        )
        layers += [("glass", pane), ("glare", np.concatenate(streak))]
    if glazing.porthole:
        aspect = (hull.roof - hull.belt) / length
        layers.append(("glass", _disc() * (0.33 * aspect, 0.33) + (0.27, 0.48)))
    doors = pillars[1:-1][-2:] if count > 1 else [0.12]
    return tuple(layers), [float(hull.cabin[0, 0] + u * length) for u in doors]


def _draw_wheel(
    canvas: _Canvas, rim: Stencil, x: float, y: float, radius: float, spin: float
) -> None:
    """A wheel that stands on the ground, its outer face at `y`."""
    cos, sin = np.cos(spin), np.sin(spin)
    turn = np.array([[cos, sin], [-sin, cos]])

    def upright(y: float, size: float) -> Callable[[Points], Points]:
        return lambda points: np.insert(points @ turn * size + (x, radius), 1, y, axis=1)

    canvas.stencil(TYRE, upright(y + 0.2, radius))
    canvas.stencil(TYRE, upright(y, radius))
    canvas.stencil(rim, upright(y, 0.76 * radius))


def _draw_front(canvas: _Canvas, hull: _Hull, parts: Parts) -> None:
    low, high = hull.body.face
    middle, size = (low + high) / 2, (high - low) / 2
    bumper = _framed(hull.front, (0, (hull.sill + low) / 2), 0.93, (low - hull.sill) / 2)
    canvas.stencil(BUMPERS[parts.bumper], bumper)
    canvas.stencil(GRILLES[parts.grille], _framed(hull.front, (0, middle), 0.37, 0.85 * size))
    reach = 2 * size / hull.body.width
    for side in (-1, 1):
        canvas.stencil(
            LAMPS[parts.lamp], _framed(hull.front, (0.68 * side, middle), reach * side, size)
        )
    canvas.stencil(LICENCE_PLATE, bumper)
    foot, top = float(hull.cabin[3, 1]) + 0.05, hull.roof - 0.09
    canvas.stencil(WINDSCREEN, _framed(hull.front, (0, (foot + top) / 2), 0.86, (top - foot) / 2))


def _draw_mirror(canvas: _Canvas, hull: _Hull, parts: Parts, side: int) -> None:
    x, z = hull.cabin[3, 0] - 0.18, hull.belt + 0.14
    y = side * (hull.body.width / 2 + 0.12)
    canvas.stencil(
        MIRRORS[parts.mirror],
        lambda p: np.insert(p * (-0.15 * side, 0.15) + (y, z), 0, x, axis=1),
    )


def _draw_roof_gear(canvas: _Canvas, hull: _Hull, gear: str) -> None:
    (x0, z0), (x1, z1) = hull.cabin[1] + (0.1, 0), hull.cabin[2] - (0.05, 0)
    z, middle, length = (z0 + z1) / 2, (x0 + x1) / 2, x1 - x0
    half = hull.body.tumblehome * hull.body.width / 2 - 0.12
    match gear:
        case "rails" | "rack":
            for y in (half, -half):
                canvas.box((x0, y - 0.04, z + 0.04), (x1, y + 0.04, z + 0.12), "chrome")
            for x in np.linspace(x0, x1 - 0.1, 4) if gear == "rack" else ():
                canvas.box((x, -half, z + 0.1), (x + 0.1, half, z + 0.2), "plastic")
        case "box":
            reach = min(0.45 * length, 0.9)
            canvas.box(
                (middle - reach, -0.45, z + 0.02), (middle + reach, 0.45, z + 0.36), "plastic"
            )
        case "sign":
            canvas.box((x1 - 0.5, -0.34, z), (x1 - 0.28, 0.34, z + 0.28), "amber")
        case "beacons":
            canvas.box((x1 - 0.42, -half, z), (x1 - 0.2, half, z + 0.08), "plastic")
            for y in (half - 0.34, -half):
                canvas.box((x1 - 0.44, y, z + 0.08), (x1 - 0.18, y + 0.34, z + 0.26), "red")
        case "fin":
            fin = _polygon((x0, z0), (x0 + 0.5, z0), (x0 + 0.12, z0 + 0.34), (x0, z0 + 0.34))
            canvas.polygon(np.insert(fin, 1, 0, axis=1), "black")
        case "wing":
            for y in (half, -half):
                canvas.box((x0 - 0.1, y - 0.03, z0 - 0.1), (x0, y + 0.03, z0 + 0.2), "black")
            canvas.box(
                (x0 - 0.28, -half - 0.1, z0 + 0.2), (x0 + 0.12, half + 0.1, z0 + 0.29), "paint"
            )
        case "board":
            deck = _disc() * (0.5 * length + 0.25, 0.28) + (middle, 0)
            for lift, tone in ((0.1, "black"), (0.16, "accent")):
                canvas.polygon(np.insert(deck, 2, z + lift, axis=1), tone)


def _draw_vehicle(image: Image.Image, parts: Parts, nuisance: Nuisance) -> None:
    """From back to front, so that what is nearer covers what is farther."""
    hull = _Hull(parts)
    canvas = _Canvas(image, hull, nuisance)
    half, wheel = hull.body.width / 2, hull.body.wheel
    for grow in (0.25, 0.1, -0.05):
        ground = _rect(hull.rear - grow, -half - grow, hull.nose + grow, half + grow)
        canvas.polygon(np.insert(ground, 2, 0, axis=1), "shadow")
    for axle in hull.body.axles:
        _draw_wheel(canvas, (), axle, half - 0.2, wheel, 0)
    _draw_mirror(canvas, hull, parts, 1)
    _draw_body(canvas, hull)
    _draw_side(canvas, hull, parts)
    for axle in hull.body.axles:
        _draw_wheel(canvas, RIMS[parts.rim], axle, -half - 0.02, wheel, nuisance.spin)
    _draw_front(canvas, hull, parts)
    _draw_mirror(canvas, hull, parts, -1)
    _draw_roof_gear(canvas, hull, parts.roof_gear)


# --- the scene ---------------------------------------------------------------------------------


class _Sketch:
    """Paints on an image in shares of its side: x to the right and y down, from 0 to 1."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self._draw = ImageDraw.Draw(image)

    def polygon(self, points: Points, color: Color) -> None:
        self._draw.polygon((points * self._image.width).ravel().tolist(), color)

    def rectangle(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        side = self._image.width
        self._draw.rectangle((left * side, top * side, right * side, bottom * side), color)

    def blob(self, x: float, y: float, radius: float, color: Color) -> None:
        self.polygon(_disc(x, y, radius), color)

    def gradient(self, top: float, bottom: float, first: Color, last: Color) -> None:
        """Rows that turn from one colour into another, over the whole width."""
        start, end = round(top * self._image.height), round(bottom * self._image.height)
        rows = np.linspace(first, last, end - start).astype(np.uint8)[:, None]
        ramp = Image.fromarray(rows).resize(
            (self._image.width, end - start), Image.Resampling.NEAREST
        )
        self._image.paste(ramp, (0, start))


def _draw_city(sketch: _Sketch, rng: np.random.Generator, horizon: float) -> None:
    x = rng.uniform(-0.15, 0)
    while x < 1:
        width, height = rng.uniform(0.12, 0.3), rng.uniform(0.15, 0.55)
        wall = _near(rng, WALLS)
        sketch.rectangle(x, horizon - height, x + width, horizon, wall)
        window = _tint(wall, rng.choice([0.65, 1.35]))
        columns, rows = rng.integers(2, 5), rng.integers(2, 6)
        for left in x + width * (np.arange(columns) + 0.25) / columns:
            for top in horizon - height * (np.arange(rows) + 0.75) / rows:
                right, bottom = left + width * 0.5 / columns, top + height * 0.5 / rows
                sketch.rectangle(left, top, right, bottom, window)
        x += width


def _draw_hills(sketch: _Sketch, rng: np.random.Generator, horizon: float) -> None:
    leaf = _near(rng, LEAVES)
    x = np.linspace(0, 1, 24)
    for layer, height in enumerate((0.3, 0.2, 0.1)):
        slow, fast = rng.uniform(0, 2 * np.pi, 2)
        ridge = np.sin(x * rng.uniform(3, 8) + slow) + 0.3 * np.sin(x * 17 + fast)
        y = horizon - height * rng.uniform(0.6, 1.2) * (0.6 + 0.35 * ridge)
        foot = _polygon((1, horizon), (0, horizon))
        sketch.polygon(
            np.concatenate([np.stack([x, y], axis=1), foot]), _tint(leaf, 1.3 - 0.2 * layer)
        )


def _draw_trees(sketch: _Sketch, rng: np.random.Generator, horizon: float) -> None:
    leaf, bark = _near(rng, LEAVES), (96, 76, 60)
    firs = rng.integers(2)
    for x in rng.uniform(0, 1, rng.integers(4, 10)):
        top, color = horizon - rng.uniform(0.18, 0.45), _tint(leaf, rng.uniform(0.8, 1.2))
        sketch.rectangle(x - 0.01, top, x + 0.01, horizon, bark)
        if firs:
            foot = horizon - 0.05
            sketch.polygon(_polygon((x - 0.09, foot), (x + 0.09, foot), (x, top - 0.1)), color)
        else:
            for dx, dy in rng.normal(0, 0.035, (3, 2)):
                sketch.blob(x + dx, top + dy, rng.uniform(0.05, 0.1), color)


def _draw_wall(sketch: _Sketch, rng: np.random.Generator, horizon: float) -> None:
    wall = _near(rng, WALLS)
    sketch.rectangle(0, 0, 1, horizon, wall)
    joint = _tint(wall, rng.choice([0.86, 1.12]))
    course = horizon / rng.integers(4, 10)
    for row, top in enumerate(np.arange(0, horizon, course)):
        sketch.rectangle(0, top, 1, top + 0.006, joint)
        for x in np.arange(row % 2 * course, 1, 2 * course):
            sketch.rectangle(x, top, x + 0.006, min(top + course, horizon), joint)
    if rng.integers(2):
        x = rng.uniform(-0.1, 0.7)
        sketch.rectangle(x, horizon * rng.uniform(0.1, 0.5), x + 0.4, horizon, _near(rng, WALLS))


def _draw_clutter(sketch: _Sketch, rng: np.random.Generator, horizon: float) -> None:
    for _ in range(rng.integers(8, 16)):
        width, height = rng.uniform(0.04, 0.16, 2)
        x, y = rng.uniform(0, 1), horizon - rng.uniform(0.3, 1) * height
        if rng.integers(3):
            sketch.rectangle(x, y, x + width, horizon, _near(rng, WALLS + PAINTS))
        else:
            sketch.blob(x, y, width / 2, _near(rng, LEAVES + PAINTS))


def _draw_studio(sketch: _Sketch, rng: np.random.Generator, horizon: float) -> None:
    sketch.blob(rng.uniform(0.2, 0.8), horizon * 0.5, rng.uniform(0.06, 0.3), _near(rng, WALLS))


SCENES = (_draw_city, _draw_hills, _draw_trees, _draw_wall, _draw_clutter, _draw_studio)


def _draw_scene(image: Image.Image, rng: np.random.Generator) -> None:
    """Sky, what stands behind the vehicle, and the ground with its lines."""
    sketch = _Sketch(image)
    horizon = rng.uniform(0.3, 0.6)
    sketch.gradient(0, horizon, *SKIES[rng.integers(len(SKIES))])
    SCENES[rng.integers(len(SCENES))](sketch, rng, horizon)
    ground = _near(rng, GROUNDS)
    sketch.gradient(horizon, 1, _tint(ground, 0.9), _tint(ground, 1.08))
    line = _tint(ground, rng.choice([0.85, 1.2]))
    vanishing, width = rng.uniform(-0.5, 1.5), rng.uniform(0.02, 0.06)
    for x in np.arange(-3, 4, rng.uniform(0.4, 1.5)) + rng.uniform(-0.3, 0.3):
        sketch.polygon(_polygon((x, 1), (x + width, 1), (vanishing, horizon)), line)


def _draw_occluder(image: Image.Image, rng: np.random.Generator) -> None:
    """In front of the vehicle: a post, a bush, a fence or a branch; nothing half the time."""
    sketch = _Sketch(image)
    x, color, leaf = rng.uniform(0, 1), _tint(_near(rng, WALLS), 0.7), _near(rng, LEAVES)
    match rng.integers(8):
        case 0:
            width = rng.uniform(0.015, 0.045)
            sketch.rectangle(x, 0, x + width, 1, color)
            sketch.rectangle(x, 0, x + width / 3, 1, _tint(color, 1.3))
        case 1:
            for dx, dy in rng.normal(0, 0.06, (9, 2)):
                shade = _tint(leaf, rng.uniform(0.7, 1.2))
                sketch.blob(x + dx, 1 + dy / 2, rng.uniform(0.04, 0.1), shade)
        case 2:
            top = rng.uniform(0.84, 0.94)
            sketch.rectangle(0, top, 1, top + 0.02, color)
            for post in np.arange(x % 0.2, 1, 0.2):
                sketch.rectangle(post, top, post + 0.02, 1, color)
        case 3:
            for dx, dy in rng.normal(0, 0.12, (14, 2)):
                shade = _tint(leaf, rng.uniform(0.6, 1.1))
                sketch.blob(x + dx, abs(dy) / 2, rng.uniform(0.015, 0.04), shade)


def _develop(image: Image.Image, nuisance: Nuisance, rng: np.random.Generator) -> Image.Image:
    """What the camera and the weather do to the whole picture."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(nuisance.blur)), np.float32)
    pixels = (pixels - 128) * nuisance.contrast + 128
    clouds = Image.fromarray(rng.uniform(0, 1, (5, 5)).astype(np.float32))
    clouds = clouds.resize(image.size, Image.Resampling.BICUBIC)
    light = nuisance.brightness * (1 - nuisance.dapple * np.asarray(clouds).clip(0, 1))
    pixels *= light[..., None] * np.array(nuisance.cast, np.float32)
    pixels += nuisance.noise * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_vehicle(parts: Parts, size: int, rng: np.random.Generator) -> Image.Image:
    """A picture of a vehicle with these parts, RGB, `size` pixels square; the rest is `rng`'s."""
    nuisance = Nuisance.sample(rng)
    image = Image.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    _draw_scene(image, rng)
    _draw_vehicle(image, parts, nuisance)
    _draw_occluder(image, rng)
    return _develop(image.reduce(SUPERSAMPLING), nuisance, rng)


# --- the data set ------------------------------------------------------------------------------


class SyntheticVehicles:
    """Pictures of vehicles drawn by code; satisfies `LabelledImages`.

    An image is a pure function of `(seed, label, number within the class)`: the same in every
    process, whatever `num_classes` and `images_per_class` are.

    Args:
        num_classes: number of classes, 2 or more.
        images_per_class: number of images of each class, 2 or more.
        size: side of the square images in pixels, 32 or more.
        seed: 0 or more; another seed gives other classes and other pictures.

    Raises:
        InputError: an argument is too small.
    """

    def __init__(
        self, num_classes: int = 200, images_per_class: int = 20, size: int = 128, seed: int = 0
    ) -> None:
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("images_per_class", images_per_class, 2),
            ("size", size, 32),
            ("seed", seed, 0),
        ):
            if value < least:
                raise InputError(
                    f"SyntheticVehicles: {name} is {value}, but it has to be {least} or more"
                )
        self.name = "synthetic vehicles"
        self.size = size
        self.seed = seed
        classes = vehicle_classes(num_classes, seed)
        self.class_names: Sequence[str] = [name for name, _ in classes]
        self.parts: Sequence[Parts] = [parts for _, parts in classes]
        self.labels = np.repeat(np.arange(num_classes, dtype=np.int64), images_per_class)
        self._numbers = np.tile(np.arange(images_per_class), num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """The image, RGB, `size` pixels square."""
        label, number = int(self.labels[index]), int(self._numbers[index])
        rng = np.random.default_rng([self.seed, label, number])
        return draw_vehicle(self.parts[label], self.size, rng)

    def describe(self, index: int) -> str:
        """Such as "synthetic class 3 image 7"."""
        return f"synthetic class {self.labels[index]} image {self._numbers[index]}"

    def select(self, indices: NDArray[np.int64]) -> Self:
        """The images at `indices`, in that order; labels and class names stay what they are."""
        chosen = copy.copy(self)
        chosen.labels, chosen._numbers = self.labels[indices], self._numbers[indices]
        return chosen
