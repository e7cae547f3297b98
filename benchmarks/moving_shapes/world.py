"""The world: one or two coloured shapes that move before a plain background, as data; `grammar` words a scene, `render` draws it.

Lengths are in units of a clip's shorter side, x to the right and y downwards, times in frames. A seed gives the same scene everywhere:
only Python's own generator is drawn from.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from random import Random

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (246, 224, 60),
    "green": (44, 150, 64),
    "cyan": (60, 204, 220),
    "blue": (36, 72, 200),
    "purple": (146, 52, 176),
    "white": (244, 244, 244),
    "gray": (128, 128, 128),
    "black": (16, 16, 16),
}
"""Name → mean RGB of 255; a scene's own differ from it by up to `COLOUR_JITTER`."""
COLOUR_JITTER = 6
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
SIZES = {"small": 0.115, "medium": 0.15, "large": 0.195}
"""Radius of the circle of the same area."""
SPEEDS = {"slowly": 0.007, "quickly": 0.018}
"""Shorter sides a frame."""
DIRECTIONS: dict[str, tuple[float, float]] = {
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and right": (math.sqrt(0.5), -math.sqrt(0.5)),
    "up and left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "down and right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down and left": (-math.sqrt(0.5), math.sqrt(0.5)),
}
"""Unit vectors."""
STRAIGHT = ("right", "left", "up", "down")
REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.8862, 0.8862, 0.8862),
    "triangle": (1.3468, 1.5551, 0.7776),
    "diamond": (1.2533, 1.2533, 1.2533),
    "cross": (1.1890, 1.1890, 1.1890),
}
"""How far a shape reaches from its centre of mass to the sides, up and down, in its radius."""
_JITTER = 0.06  # of radii and speeds, either way
_PASSING_TRAVEL = 0.62
_BANDS = (0.27, 0.73)


class Kind(StrEnum):
    """What happens in a scene."""

    SINGLE = "single"
    BOUNCE = "bounce"
    IN_FRONT = "in front of"
    BEHIND = "behind"
    PAIR = "pair"


_ODDS = {Kind.SINGLE: 50, Kind.BOUNCE: 15, Kind.IN_FRONT: 9, Kind.BEHIND: 9, Kind.PAIR: 17}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSize:
    """Pixels and frames of a clip."""

    width: int
    height: int
    num_frames: int

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height in units of the shorter side."""
        side = min(self.width, self.height)
        return self.width / side, self.height / side

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One shape: its looks, and where its centre of mass is in every frame."""

    shape: str
    colour: str
    size: str
    direction: str | None  # None: it stays where it is
    speed: str | None  # None: neither of `SPEEDS`
    rgb: tuple[float, float, float]  # of 255
    radius: float
    track: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A clip's content; the first of `things` is the one that captions begin with."""

    kind: Kind
    background: str
    background_rgb: tuple[float, float, float]
    things: tuple[Thing, ...]

    @property
    def painted(self) -> tuple[Thing, ...]:
        """The things from the farthest to the nearest."""
        return self.things if self.kind is Kind.BEHIND else self.things[::-1]


def sample_scene(seed: int, size: ClipSize, *, kind: Kind | None = None, kinds: tuple[Kind, ...] = tuple(Kind)) -> Scene:
    """The scene of a seed, fitted to a clip of this size; of any of these kinds unless one is named."""
    random = Random(f"{seed} {size}")
    drawn = random.choices(kinds, [_ODDS[each] for each in kinds])[0]
    kind = kind or drawn
    background, *colours = random.sample(list(COLOURS), 3)
    looks = [_Looks.draw(random, colour, kind) for colour in colours]
    return Scene(
        kind=kind,
        background=background,
        background_rgb=_jittered(random, background),
        things=_STAGINGS[kind](random, looks, size),
    )


@dataclass(frozen=True, slots=True)
class _Looks:
    shape: str
    colour: str
    size: str
    rgb: tuple[float, float, float]
    radius: float

    @classmethod
    def draw(cls, random: Random, colour: str, kind: Kind) -> "_Looks":
        fitting = list(SIZES) if kind in (Kind.SINGLE, Kind.BOUNCE) else ["small", "medium"]
        size = random.choice(fitting)
        radius = SIZES[size] * random.uniform(1 - _JITTER, 1 + _JITTER)
        return cls(random.choice(SHAPES), colour, size, _jittered(random, colour), radius)

    def bounds(self, axis: int, extent: float) -> tuple[float, float]:
        """Where the centre may be along an axis for the shape to be wholly inside."""
        side, above, below = (self.radius * reach for reach in REACH[self.shape])
        return (side, extent - side) if axis == 0 else (above, extent - below)

    def moving(self, direction: str | None, speed: str | None, track: list[tuple[float, float]]) -> Thing:
        return Thing(
            shape=self.shape, colour=self.colour, size=self.size, direction=direction, speed=speed,
            rgb=self.rgb, radius=self.radius, track=tuple(track),
        )  # fmt: skip


def _single(random: Random, looks: list[_Looks], size: ClipSize) -> tuple[Thing, ...]:
    return (_straight(random, looks[0], size, random.choice(STRAIGHT if random.random() < 0.7 else list(DIRECTIONS)[4:])),)


def _bounce(random: Random, looks: list[_Looks], size: ClipSize) -> tuple[Thing, ...]:
    direction = random.choice(STRAIGHT)
    axis = 0 if DIRECTIONS[direction][0] else 1
    sign = DIRECTIONS[direction][axis]
    pace = _pace(random, "quickly")
    low, high = looks[0].bounds(axis, size.extent[axis])
    wall = high if sign > 0 else low
    contact = random.uniform(0.35, 0.65) * (size.num_frames - 1)
    across = random.uniform(*looks[0].bounds(1 - axis, size.extent[1 - axis]))
    along = [wall - sign * pace * abs(frame - contact) for frame in range(size.num_frames)]
    track = [(place, across) if axis == 0 else (across, place) for place in along]
    return (looks[0].moving(direction, "quickly", track),)


def _passing(random: Random, looks: list[_Looks], size: ClipSize) -> tuple[Thing, ...]:
    direction = random.choice(STRAIGHT)
    axis = 0 if DIRECTIONS[direction][0] else 1
    low, high = looks[0].bounds(axis, size.extent[axis])
    travel = min(_PASSING_TRAVEL, high - low)
    start = random.uniform(low, high - travel)
    bounds = [thing.bounds(1 - axis, size.extent[1 - axis]) for thing in looks]
    across = random.uniform(max(b[0] for b in bounds), min(b[1] for b in bounds))
    centre = (start + travel / 2, across)
    beginning = centre[0] - DIRECTIONS[direction][axis] * travel / 2
    pace = DIRECTIONS[direction][axis] * travel / (size.num_frames - 1)
    track = [(beginning + pace * frame, across) for frame in range(size.num_frames)]
    turned = [place if axis == 0 else place[::-1] for place in (*track, centre)]
    mover = looks[0].moving(direction, None, turned[:-1])
    return mover, looks[1].moving(None, None, turned[-1:] * size.num_frames)


def _pair(random: Random, looks: list[_Looks], size: ClipSize) -> tuple[Thing, ...]:
    directions = random.choice((STRAIGHT[:2], STRAIGHT[2:]))
    bands = random.sample(_BANDS, 2)
    return tuple(
        _straight(random, thing, size, random.choice(directions), band=band) for thing, band in zip(looks, bands, strict=True)
    )


def _straight(random: Random, looks: _Looks, size: ClipSize, direction: str, *, band: float | None = None) -> Thing:
    """A thing that moves evenly and stays inside; in a band of the other axis where one is given."""
    speed = random.choice([name for name in SPEEDS if _fits(looks, size, direction, name)])
    pace = _pace(random, speed)
    starts, steps = [], []
    for axis, unit in enumerate(DIRECTIONS[direction]):
        low, high = looks.bounds(axis, size.extent[axis])
        travel = unit * pace * (size.num_frames - 1)
        place = random.uniform(max(low, low - travel), min(high, high - travel))
        if band is not None and not unit:
            place = band * size.extent[axis]
        starts.append(place)
        steps.append(unit * pace)
    track = [(starts[0] + frame * steps[0], starts[1] + frame * steps[1]) for frame in range(size.num_frames)]
    return looks.moving(direction, speed, track)


def _fits(looks: _Looks, size: ClipSize, direction: str, speed: str) -> bool:
    """Whether there is room for a thing's whole way."""
    most = SPEEDS[speed] * (1 + _JITTER) * (size.num_frames - 1)
    rooms = (high - low for low, high in (looks.bounds(axis, size.extent[axis]) for axis in range(2)))
    return all(abs(unit) * most <= room for unit, room in zip(DIRECTIONS[direction], rooms, strict=True))


def _pace(random: Random, speed: str) -> float:
    return SPEEDS[speed] * random.uniform(1 - _JITTER, 1 + _JITTER)


def _jittered(random: Random, colour: str) -> tuple[float, float, float]:
    red, green, blue = (
        min(255.0, max(0.0, level + random.uniform(-COLOUR_JITTER, COLOUR_JITTER))) for level in COLOURS[colour]
    )
    return red, green, blue


_STAGINGS = {
    Kind.SINGLE: _single, Kind.BOUNCE: _bounce, Kind.IN_FRONT: _passing, Kind.BEHIND: _passing, Kind.PAIR: _pair,
}  # fmt: skip
