"""Strips of a frame: how what only sees what is near runs over a part of a frame at a time and still gives the whole frame's numbers.

A strip is computed with a margin as wide as the layers see, which is then left out. Positions are the latents'.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from runtime.stages.vae_layers import Layer, LayerKind

_DOWN = (LayerKind.DOWNSAMPLE, LayerKind.DOWNSAMPLE_TIME)
_UP = (LayerKind.UPSAMPLE, LayerKind.UPSAMPLE_TIME)
_REACH = {LayerKind.CONV: 1, LayerKind.HEAD: 1, LayerKind.RES_BLOCK: 2}
"""Positions that a layer sees on each side; those not listed here or treated apart see one position only."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Positions `start` to `stop` of a frame's width or height, computed from those of `seen`."""

    start: int
    stop: int
    seen: slice

    @property
    def kept(self) -> slice:
        """Where the strip's own positions lie among those seen."""
        return slice(self.start - self.seen.start, self.stop - self.seen.start)


def margin_of(layers: Sequence[Layer], scale: int) -> int:
    """Latent positions on each side of a latent position that the layers see in making what belongs to it.

    Walks back from the rows [0, n) of one latent position to the rows that they are made from. Of a level's shortcut nothing is to be
    counted: it sees less than what it goes around.

    Args:
        scale: rows per latent position of what the layers make; 1 for those of an encoder.

    Raises:
        ValueError: a layer sees the whole frame.
    """
    first, end = 0, scale
    for layer in reversed(layers):
        if layer.kind is LayerKind.ATTENTION:
            raise ValueError(f"{layer.name} sees the whole frame")
        if layer.kind in _UP:  # a 3x3 convolution of repeated rows
            first, end = (first - 1) // 2, -(-(end + 1) // 2)
        elif layer.kind in _DOWN:  # rows 2i to 2i + 2
            first, end = 2 * first, 2 * end + 1
        elif layer.kind is LayerKind.UNFOLD:
            first, end = first // layer.space_factor, -(-end // layer.space_factor)
        elif layer.kind is LayerKind.FOLD:
            first, end = first * layer.space_factor, end * layer.space_factor
        else:
            reach = _REACH.get(layer.kind, 0)
            first, end = first - reach, end + reach
    rows = layers[0].scale
    return max(-(first // rows), -(-end // rows) - 1)


def cut_strips(extent: int, num_strips: int, *, margin: int) -> Iterator[Strip]:
    """`extent` positions in strips that see about equally many, those at the ends having only one margin.

    Raises:
        ValueError: no strips, or so many that some would be empty.
    """
    if num_strips != 1 and not 2 <= num_strips <= extent - 2 * margin:
        raise ValueError(f"{num_strips} strips of {extent} positions with margins of {margin}")
    inner = extent - 2 * margin
    bounds = [0, *(margin + index * inner // num_strips for index in range(1, num_strips)), extent]
    for start, stop in pairwise(bounds):
        yield Strip(start, stop, slice(max(0, start - margin), min(extent, stop + margin)))


def most_strips(extent: int, *, margin: int) -> int:
    """The most strips worth cutting: with more, margins would be more than two thirds of the work."""
    return max(1, (extent - 2 * margin) // max(1, margin))
