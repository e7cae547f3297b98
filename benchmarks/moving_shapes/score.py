"""A clip against its caption: each thing that the caption says, true or false."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.moving_shapes.grammar import Claim, ThingClaim, claims_of
from benchmarks.moving_shapes.measure import Frames, Measured, MeasuredThing, measure
from benchmarks.moving_shapes.world import Kind

ATTRIBUTES = ("background", "count", "colour", "shape", "size", "direction", "speed", "event", "steady")
"""`event` is the bounce, or which of two shapes passes before the other; `steady`: nothing flickers, jumps or grows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipScore:
    """Of each attribute that a caption says something about, whether the clip does as it says; of two shapes, both must."""

    right: dict[str, bool]

    @property
    def obeys(self) -> bool:
        """Whether everything is as the caption says."""
        return all(self.right.values())


def score_clip(frames: Frames, caption: str) -> ClipScore:
    """Score a clip, uint8 RGB [T, H, W, 3].

    Raises:
        RequestError: the caption is not one of the grammar's.
    """
    return score_measured(measure(frames), claims_of(caption))


def score_measured(clip: Measured, claim: Claim) -> ClipScore:
    """Score what was measured of a clip."""
    pairs = _matched(claim.things, clip.things)
    right = {
        "count": len(clip.things) == len(claim.things),
        "colour": all(found is not None and found.colour == said.colour for said, found in pairs),
        "steady": clip.background_steady and all(found is not None and found.steady for _, found in pairs),
    }
    if claim.background is not None:
        right["background"] = clip.background == claim.background
    for name in ("shape", "size", "direction", "speed"):
        if any(getattr(said, name) is not None for said, _ in pairs):
            right[name] = all(_agrees(said, found, name) for said, found in pairs)
    right["direction"] = right["direction"] and all(
        found is not None and found.direction is None for said, found in pairs if said.direction is None
    )
    event = _event(clip, claim, [found for _, found in pairs])
    return ClipScore(right=right if event is None else {**right, "event": event})


def accuracy(scores: Sequence[ClipScore]) -> dict[str, float]:
    """The share of clips that have each attribute right, of those whose captions say it; `all` is the share that obeys wholly."""
    shares = {}
    for name in ATTRIBUTES:
        said = [score.right[name] for score in scores if name in score.right]
        if said:
            shares[name] = _share(said)
    return {**shares, "all": _share(score.obeys for score in scores)}


def _matched(said: Sequence[ThingClaim], found: Sequence[MeasuredThing]) -> list[tuple[ThingClaim, MeasuredThing | None]]:
    """Each claim with the shape of its colour; shapes of other colours go to the claims that are left."""
    by_colour = {thing.colour: thing for thing in found}
    names = {claim.colour for claim in said}
    spare = [thing for thing in found if thing.colour not in names]
    return [(claim, by_colour.get(claim.colour) or (spare.pop(0) if spare else None)) for claim in said]


def _agrees(said: ThingClaim, found: MeasuredThing | None, name: str) -> bool:
    claimed = getattr(said, name)
    return claimed is None or (found is not None and getattr(found, name) == claimed)


def _event(clip: Measured, claim: Claim, found: Sequence[MeasuredThing | None]) -> bool | None:
    """Whether what the caption lets happen happens; None where it lets nothing happen."""
    match claim.kind:
        case Kind.BOUNCE:
            return found[0] is not None and found[0].bounces
        case Kind.IN_FRONT | Kind.BEHIND:
            nearest = found[0] if claim.kind is Kind.IN_FRONT else found[1]
            return nearest is not None and clip.nearest == nearest.colour
        case _:
            return None


def _share(values: Iterable[bool]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0
