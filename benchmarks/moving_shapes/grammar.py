"""The grammar: a scene → a caption that says all or some of it, and a caption → what it claims.

caption = motion, {"and" motion}?, " on a COLOUR background"?
motion  = thing " moves" [" slowly" | " quickly"] direction [" and bounces off the edge" | " in front of " thing | " behind " thing]
thing   = "a" [size] colour shape
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from benchmarks.moving_shapes.world import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, Kind, Scene, Thing
from runtime.errors import RequestError

BOUNCE = "bounces off the edge"
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        word
        for phrase in (
            "a an moves on background and", BOUNCE, Kind.IN_FRONT, Kind.BEHIND, *COLOURS, *SHAPES, *SIZES, *SPEEDS, *DIRECTIONS,
        )
        for word in phrase.split()
    )
)  # fmt: skip
"""Every word that a caption can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThingClaim:
    """What a caption says of one shape; None where it says nothing."""

    shape: str
    colour: str
    size: str | None = None
    direction: str | None = None
    speed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a caption says of a clip."""

    kind: Kind
    things: tuple[ThingClaim, ...]
    background: str | None = None


def caption_of(scene: Scene, *, seed: int | None = None) -> str:
    """The scene in words: all that can be said, or, with a seed, a draw of what the grammar lets one leave out."""
    random = None if seed is None else Random(seed)

    def says(chance: float) -> bool:
        return random is None or random.random() < chance

    first, *others = scene.things
    words = f"{_thing(first, with_size=says(0.6))} {_motion(first, with_speed=says(0.6))}"
    if scene.kind is Kind.BOUNCE:
        words += f" and {BOUNCE}"
    elif scene.kind is Kind.PAIR:
        words += f" and {_thing(others[0], with_size=says(0.6))} {_motion(others[0], with_speed=says(0.6))}"
    elif others:
        words += f" {scene.kind} {_thing(others[0], with_size=says(0.6))}"
    return f"{words} on {_article(scene.background)} background" if says(0.9) else words


def claims_of(caption: str) -> Claim:
    """What a caption says.

    Raises:
        RequestError: it is not one of the grammar's.
    """
    match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
    if match is None:
        raise RequestError(
            f"not a caption of moving shapes: {caption!r}",
            hint='for example "a small red circle moves quickly right and bounces off the edge on a blue background"',
        )
    said = match.groupdict()
    first = _claim(said, "1")
    if said["passed"]:
        kind, others = Kind(said["relation"]), [_claim(said, "2")]
    elif said["pair"]:
        kind, others = Kind.PAIR, [_claim(said, "3")]
    else:
        kind, others = (Kind.BOUNCE if said["bounce"] else Kind.SINGLE), []
    return Claim(kind=kind, things=(first, *others), background=said["background"])


def _thing(thing: Thing, *, with_size: bool) -> str:
    looks = f"{thing.size} {thing.colour}" if with_size else thing.colour
    return f"{_article(looks)} {thing.shape}"


def _motion(thing: Thing, *, with_speed: bool) -> str:
    return f"moves {thing.speed} {thing.direction}" if with_speed and thing.speed else f"moves {thing.direction}"


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _claim(said: dict[str, str | None], number: str) -> ThingClaim:
    shape, colour = said[f"shape{number}"], said[f"colour{number}"]
    assert shape is not None and colour is not None
    return ThingClaim(
        shape=shape, colour=colour, size=said[f"size{number}"],
        direction=said.get(f"direction{number}"), speed=said.get(f"speed{number}"),
    )  # fmt: skip


def _one_of(name: str, words: Iterable[str]) -> str:
    longest_first = sorted(words, key=len, reverse=True)
    return f"(?P<{name}>{'|'.join(longest_first)})"


def _thing_pattern(number: str) -> str:
    size, colour, shape = (
        _one_of("size" + number, SIZES),
        _one_of("colour" + number, COLOURS),
        _one_of("shape" + number, SHAPES),
    )
    return f"an? (?:{size} )?{colour} {shape}"


def _motion_pattern(number: str) -> str:
    return f" moves (?:{_one_of('speed' + number, SPEEDS)} )?{_one_of('direction' + number, DIRECTIONS)}"


_CAPTION = re.compile(
    _thing_pattern("1")
    + _motion_pattern("1")
    + f"(?P<bounce> and {BOUNCE})?(?P<passed> {_one_of('relation', (Kind.IN_FRONT, Kind.BEHIND))} {_thing_pattern('2')})?"
    + f"(?P<pair> and {_thing_pattern('3')}{_motion_pattern('3')})?"
    + f"(?: on an? {_one_of('background', COLOURS)} background)?"
)
