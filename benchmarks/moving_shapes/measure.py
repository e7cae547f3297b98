"""What a clip shows, from its frames alone: background, and of each shape its looks, its path and how steady it is.

No caption is known here; `score` compares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.moving_shapes.render import coverage
from benchmarks.moving_shapes.world import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, ClipSize

Frames = NDArray[np.uint8]
_Array = np.ndarray[Any, np.dtype[Any]]

_PALETTE = np.array(list(COLOURS.values()), np.float32)
_FARTHEST = 60.0  # of 255: a colour farther than this from every name has none; the closest two names are 89 apart
_CORE_PIXELS = 4  # a thing has at least so many pixels whose eight neighbours have its colour
_WHOLE = 0.92  # of its usual area: below this it is partly hidden
_BEST_OVERLAP = 0.75  # of a shape with what is seen; a circle overlaps the square of its area by 0.83
_MOST_SIZE_ERROR = 1.25
_SLOWEST = 0.0025  # shorter sides a frame: below this it stays where it is
_TURN = 0.05  # shorter sides a thing comes back by when it bounces
_MOST_JUMP, _MOST_FLICKER, _MOST_GROWTH = 0.02, 12.0, 0.12  # of an even path; of 255; of the mean area


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MeasuredThing:
    """One shape of a clip; None where nothing in the world is like it."""

    colour: str
    shape: str | None
    size: str | None
    direction: str | None  # where it moves at first; None when it stays
    speed: str | None
    bounces: bool
    steady: bool  # it is always there, of one colour and size, and moves evenly
    radius: float
    track: NDArray[np.float64]  # [T, 2] in shorter sides; hidden stretches interpolated


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A clip's content."""

    background: str | None
    background_steady: bool
    things: tuple[MeasuredThing, ...]
    nearest: str | None = None  # colour of the thing that covers another; None when none does


def measure(frames: Frames) -> Measured:
    """Measure a clip, uint8 RGB [T, H, W, 3]."""
    video = frames.astype(np.float32)
    labels = _labels(video)
    names, counts = np.unique(labels, return_counts=True)
    background = int(names[counts.argmax()])
    if background < 0 or counts.max() < labels.size / 3:
        return Measured(background=None, background_steady=False, things=())
    cores = _cores(labels)
    present = {c: np.array([(core == c).sum() for core in cores]) for c in np.unique(cores) if c not in (-1, background)}
    seen = [c for c, pixels in present.items() if (pixels >= _CORE_PIXELS).mean() >= 0.4]
    level = np.stack(
        [video[t][labels[t] == background].mean(axis=0) for t in range(len(video)) if (labels[t] == background).any()]
    )
    mean = level.mean(axis=0)
    things = [_thing(video, cores, int(c), mean, [other for other in seen if other != c]) for c in seen]
    measured = Measured(
        background=list(COLOURS)[background],
        background_steady=len(level) == len(video) and float(np.abs(level - mean).max()) <= _MOST_FLICKER,
        things=tuple(things),
    )
    return replace(measured, nearest=_nearest(labels, things)) if len(things) == 2 else measured


def _labels(video: _Array) -> _Array:
    """Index of each pixel's colour name, -1 for none: [T, H, W]."""
    distance = (video**2).sum(axis=-1, keepdims=True) - 2 * video @ _PALETTE.T + (_PALETTE**2).sum(axis=1)
    best = distance.argmin(axis=-1)
    return np.where(distance.min(axis=-1) <= _FARTHEST**2, best, -1)


def _cores(labels: _Array) -> _Array:
    """The labels of pixels that all eight neighbours share, -1 elsewhere."""
    cores = np.full_like(labels, -1)
    middle = labels[:, 1:-1, 1:-1]
    same = np.ones(middle.shape, bool)
    height, width = labels.shape[1:]
    for row in range(3):
        for column in range(3):
            same &= labels[:, row : height - 2 + row, column : width - 2 + column] == middle
    cores[:, 1:-1, 1:-1] = np.where(same, middle, -1)
    return cores


def _grown(mask: _Array, pixels: int) -> _Array:
    """A mask [T, H, W] and all pixels within so many of it."""
    for _ in range(pixels):
        padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        mask = padded[:, 1:-1, 1:-1] | padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1]
        mask = mask | np.pad(mask[:, :, :-1], ((0, 0), (0, 0), (1, 0))) | np.pad(mask[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    return mask


def _thing(video: _Array, cores: _Array, colour: int, background: _Array, others: Sequence[int]) -> MeasuredThing:
    size = ClipSize(width=video.shape[2], height=video.shape[1], num_frames=len(video))
    core = cores == colour
    level = video[core].mean(axis=0) - background
    alpha = ((video - background) @ level / (level @ level)).clip(0, 1) * _grown(core, 2)
    near = _grown(np.isin(cores, list(others)), 1)
    alpha = alpha * ~near
    area = alpha.sum(axis=(1, 2))
    whole = (area >= _WHOLE * np.percentile(area, 80)) & (core.sum(axis=(1, 2)) >= _CORE_PIXELS)
    side = min(size.width, size.height)
    radius = math.sqrt(float(np.median(area[whole])) / math.pi) / side
    track = _track(alpha, area, whole) / side
    path = _path(track)
    colours = np.stack([video[t][core[t]].mean(axis=0) for t in np.flatnonzero(whole)])
    jumps = np.linalg.norm(track - path.fitted, axis=1)[whole]
    hidden = (near & _within(track * side, 1.6 * radius * side, size)).any(axis=(1, 2))
    steady = (
        ((core.sum(axis=(1, 2)) >= _CORE_PIXELS) | hidden).all()
        and whole.mean() >= 0.15
        and (whole | hidden).mean() >= 0.85
        and float(np.abs(colours - colours.mean(axis=0)).max()) <= _MOST_FLICKER
        and float(area[whole].std() / area[whole].mean()) <= _MOST_GROWTH
        and float(np.sqrt((jumps**2).mean())) <= _MOST_JUMP
    )
    return MeasuredThing(
        colour=list(COLOURS)[colour],
        shape=_shape(alpha[whole], radius, track[whole], size),
        size=_closest(SIZES, radius, most=_MOST_SIZE_ERROR),
        direction=path.direction,
        speed=_closest(SPEEDS, path.speed, most=2.0),
        bounces=path.bounces,
        steady=bool(steady),
        radius=radius,
        track=track,
    )


def _track(alpha: _Array, area: _Array, whole: _Array) -> _Array:
    """Centres of mass [T, 2] in pixels; between the frames where the thing is whole, on straight lines."""
    y, x = np.arange(alpha.shape[1]) + 0.5, np.arange(alpha.shape[2]) + 0.5
    there = np.maximum(area, 1e-6)
    centres = np.stack([alpha.sum(axis=1) @ x / there, alpha.sum(axis=2) @ y / there], axis=1)
    frames, known = np.arange(len(area)), np.flatnonzero(whole)
    return np.stack([np.interp(frames, known, centres[known, axis]) for axis in range(2)], axis=1)


def _within(centres: _Array, distance: float, size: ClipSize) -> _Array:
    """The pixels no farther than this from a centre in each frame: [T, H, W]."""
    x, y = np.arange(size.width) + 0.5, np.arange(size.height) + 0.5
    nearby: _Array = np.hypot(x - centres[:, None, :1], y[:, None] - centres[:, None, 1:]) <= distance
    return nearby


@dataclass(frozen=True, slots=True, eq=False)
class _Path:
    fitted: _Array  # [T, 2]
    direction: str | None
    speed: float
    bounces: bool


def _path(track: _Array) -> _Path:
    """An even path through a track, straight or with one turn."""
    gone = np.abs(track - track[0])
    axis = int(gone.max(axis=0).argmax())
    peak = int(gone[:, axis].argmax())
    back = np.abs(track[peak:, axis] - track[peak, axis]).max()
    bounces = bool(back >= _TURN and gone[peak, axis] >= _TURN and 1 < peak < len(track) - 2)
    parts = [track[: peak + 1], track[peak:]] if bounces else [track]
    lines = [_line(part) for part in parts]
    velocity = lines[0][1]
    speed = float(np.linalg.norm(velocity))
    fitted = np.concatenate([lines[0][0], *(line[0][1:] for line in lines[1:])])
    towards = {name: float(np.dot(velocity, unit)) for name, unit in DIRECTIONS.items()}
    return _Path(fitted, max(towards, key=towards.__getitem__) if speed >= _SLOWEST else None, speed, bounces)


def _line(track: _Array) -> tuple[_Array, _Array]:
    """The straight, even path nearest to a track, and its velocity."""
    time = np.arange(len(track)) - (len(track) - 1) / 2
    velocity = time @ track / max(float(time @ time), 1.0)
    return track.mean(axis=0) + time[:, None] * velocity, velocity


def _shape(alpha: _Array, radius: float, track: _Array, size: ClipSize) -> str | None:
    """The shape that overlaps most with what is seen, over at most six frames in which the thing is whole."""
    chosen = np.unique(np.linspace(0, len(alpha) - 1, 6).round().astype(int))
    seen = alpha[chosen]
    overlaps = {}
    for index, name in enumerate(SHAPES):
        shape, radii = np.array([index], np.float32), np.array([radius], np.float32)
        drawn = coverage(shape, radii, track[None, chosen].astype(np.float32), size)[0]
        overlaps[name] = float(np.minimum(drawn, seen).sum() / np.maximum(drawn, seen).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= _BEST_OVERLAP else None


def _nearest(labels: _Array, things: Sequence[MeasuredThing]) -> str | None:
    """Whose colour is seen where two things overlap; None when they do not, or neither is."""
    size = ClipSize(width=labels.shape[2], height=labels.shape[1], num_frames=len(labels))
    both = np.ones(labels.shape, bool)
    for thing in things:
        if thing.shape is None:
            return None
        shape, radius = np.array([SHAPES.index(thing.shape)], np.float32), np.array([0.9 * thing.radius], np.float32)
        both &= coverage(shape, radius, thing.track[None].astype(np.float32), size)[0] > 0.9
    votes = {thing.colour: int((labels[both] == list(COLOURS).index(thing.colour)).sum()) for thing in things}
    first, second = sorted(votes, key=votes.__getitem__, reverse=True)
    return first if votes[first] >= _CORE_PIXELS and votes[first] > 2 * votes[second] else None


def _closest(table: dict[str, float], value: float, *, most: float) -> str | None:
    """The name whose number is nearest, by ratio; None when that ratio is more than `most`."""
    errors = {name: abs(math.log(max(value, 1e-9) / number)) for name, number in table.items()}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= math.log(most) else None
