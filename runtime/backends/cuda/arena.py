"""Where arrays lie inside the memory taken from the driver: an allocator over whole segments, without a GPU of its own.

The same sequence of allocations always gives the same places, so a sequence that is known beforehand (`runtime.backends.cuda.rehearsal`)
says how large a single segment has to be for all of it: `fit`.
"""

import math
from collections.abc import Callable, Sequence

from runtime.backends.cuda.array import Buffer, DeviceArray, contiguous
from runtime.memory import Layout
from runtime.residency import PAGE_BYTES, whole_pages
from runtime.specs import DType

_SMALL = 1 << 20  # arrays below lie among themselves, so that they do not cut up the room of large ones
_SMALL_UNIT, _LARGE_UNIT = 512, 64 << 10
_LARGEST_SHARE = 2
"""Arrays of at least half the largest one lie at the upper end. For the 14B's at 480p and 720p a segment is then 8-13% larger than what is
in use at most, against 16-23% when the lowest gap is taken for all and 9-19% with the smallest."""
_GROWTH = 1.01


class Arena:
    """Ranges of device memory, cut from segments. Without `large_bytes`, a range goes to the smallest gap that holds it.

    Args:
        take: takes a segment of so many bytes from the driver; gives its address.
        unit: ranges are whole multiples of it.
    """

    def __init__(self, take: Callable[[int], int], *, unit: int) -> None:
        self._take, self._unit = take, unit
        self._segments: dict[int, int] = {}  # start → bytes; they may lie side by side without belonging together
        self._gaps: dict[int, int] = {}  # start → bytes; never two side by side in a segment
        self._gap_ends: dict[int, int] = {}  # end → start of the same gaps
        self._used: dict[int, int] = {}  # start → bytes
        self.large_bytes: int | None = None
        """When set, ranges of at least so many bytes go as high as they can, others as low as they can: what lives long is small."""
        self.used_bytes = 0

    def allocate(self, nbytes: int) -> int:
        """Address of `nbytes` bytes; a new segment is taken when they fit nowhere. What `take` raises goes through."""
        nbytes = -(-max(1, nbytes) // self._unit) * self._unit
        fitting = [(size, start) for start, size in self._gaps.items() if size >= nbytes]
        if not fitting:
            self.reserve(nbytes)
            return self.allocate(nbytes)
        if self.large_bytes is None:
            size, start = min(fitting)
        else:
            size, start = (max if nbytes >= self.large_bytes else min)(fitting, key=lambda gap: gap[1])
        self._remove_gap(start)
        high = self.large_bytes is not None and nbytes >= self.large_bytes
        taken = start + size - nbytes if high else start
        self._add_gap(start, taken)
        self._add_gap(taken + nbytes, start + size)
        self._used[taken] = nbytes
        self.used_bytes += nbytes
        return taken

    def release(self, start: int) -> None:
        """Give a range back; its neighbours that are free join it."""
        nbytes = self._used.pop(start)
        self.used_bytes -= nbytes
        end = start + nbytes
        if start in self._gap_ends and start not in self._segments:
            start -= self._remove_gap(self._gap_ends[start])
        if end in self._gaps and end not in self._segments:
            end += self._remove_gap(end)
        self._add_gap(start, end)

    def reserve(self, nbytes: int) -> None:
        """Take a segment of at least so many bytes now."""
        nbytes = whole_pages(max(1, nbytes))
        start = self._take(nbytes)
        self._segments[start] = nbytes
        self._add_gap(start, start + nbytes)

    def pop_empty(self) -> list[int]:
        """Forget the segments in which nothing lies; their addresses, for the driver to take back."""
        empty = [start for start, nbytes in self._segments.items() if self._gaps.get(start) == nbytes]
        for start in empty:
            self._remove_gap(start)
            del self._segments[start]
        return empty

    def _add_gap(self, start: int, end: int) -> None:
        if end > start:
            self._gaps[start], self._gap_ends[end] = end - start, start

    def _remove_gap(self, start: int) -> int:
        nbytes = self._gaps.pop(start)
        del self._gap_ends[start + nbytes]
        return nbytes


class Pools:
    """Where arrays lie: small ones and large ones apart.

    Args:
        take: takes a segment of memory; gives its address.
        on_change: told of every allocation (positive) and release (negative) of a large array's bytes, with its address.
    """

    def __init__(self, take: Callable[[int], int], *, on_change: Callable[[int, int], None] | None = None) -> None:
        self._small = Arena(take, unit=_SMALL_UNIT)
        self._large = Arena(take, unit=_LARGE_UNIT)
        self._on_change = on_change
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes of arrays in use."""
        return self._small.used_bytes + self._large.used_bytes

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """An array of unset elements."""
        nbytes = math.prod(shape) * dtype.itemsize
        arena = self._small if nbytes < _SMALL else self._large
        pointer = arena.allocate(nbytes)
        if arena is self._large and self._on_change is not None:
            self._on_change(nbytes, pointer)
        return contiguous(
            pointer, shape, dtype, Buffer(pointer, self._recycle_large if arena is self._large else self._recycle_small)
        )

    def reserve(self, layout: Layout) -> None:
        """Take the room of arrays to come, in one segment."""
        self._large.large_bytes = layout.large_bytes
        if layout.nbytes:
            self._large.reserve(layout.nbytes)

    def pop_empty(self) -> list[int]:
        """Forget the segments in which nothing lies: their addresses."""
        return self._small.pop_empty() + self._large.pop_empty()

    def close(self) -> None:
        """From now on, arrays that are dropped go nowhere."""
        self._closed = True

    def _recycle_small(self, pointer: int) -> None:
        if not self._closed:
            self._small.release(pointer)

    def _recycle_large(self, pointer: int) -> None:
        if not self._closed:
            self._large.release(pointer)
            if self._on_change is not None:
                self._on_change(-1, pointer)


def fit(changes: Sequence[tuple[int, int]]) -> Layout:
    """The segment for a sequence of `Pools.on_change`: not much more than the most that is in use at once."""
    sizes = [nbytes for nbytes, _ in changes if nbytes > 0]
    if not sizes:
        return Layout(nbytes=0, large_bytes=None)
    large_bytes = max(sizes) // _LARGEST_SHARE
    live, most, live_sizes = 0, 0, dict[int, int]()
    for nbytes, pointer in changes:
        if nbytes > 0:
            live_sizes[pointer] = -(-nbytes // _LARGE_UNIT) * _LARGE_UNIT
            live += live_sizes[pointer]
            most = max(most, live)
        else:
            live -= live_sizes.pop(pointer)
    segment = whole_pages(most)
    while not _fits(changes, segment, large_bytes):
        segment = whole_pages(int(segment * _GROWTH))
    return Layout(nbytes=segment, large_bytes=large_bytes)


def _fits(changes: Sequence[tuple[int, int]], segment: int, large_bytes: int) -> bool:
    """Whether one segment is enough."""

    class Full(Exception):
        """A second segment was asked for."""

    def take(nbytes: int) -> int:
        if nbytes != segment or arena.used_bytes:
            raise Full
        return PAGE_BYTES

    arena = Arena(take, unit=_LARGE_UNIT)
    arena.large_bytes = large_bytes
    arena.reserve(segment)
    places: dict[int, int] = {}
    try:
        for nbytes, pointer in changes:
            if nbytes > 0:
                places[pointer] = arena.allocate(nbytes)
            else:
                arena.release(places.pop(pointer))
    except Full:
        return False
    return True
