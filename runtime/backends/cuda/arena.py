"""Where arrays lie inside the memory taken from the driver: an allocator over whole segments, without a GPU of its own.

The same sequence of allocations always gives the same places, so a sequence that is known beforehand (`runtime.backends.cuda.rehearsal`)
says how large a single segment has to be for all of it: `fit`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

from runtime.backends.cuda.array import Buffer, DeviceArray, contiguous
from runtime.backends.cuda.turns import Turns
from runtime.memory import Layout
from runtime.residency import PAGE_BYTES, whole_pages
from runtime.specs import DType

_SMALL = 1 << 20  # arrays below lie among themselves, so that they do not cut up the room of large ones
_SMALL_UNIT, _LARGE_UNIT = 512, 64 << 10
_ROUNDING = 128
"""A range is rounded up by less than this part of it, so that one array finds the place of another that had a few rows more or less."""
_GROWTH = 1.01


class Arena:
    """Ranges of device memory, cut from segments. Without `large_bytes`, a range goes to the smallest gap that holds it.

    Args:
        take: takes a segment of so many bytes from the driver; gives its address.
        unit: ranges are whole multiples of it; of large ones, of a power of two times it.
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

    @property
    def taken_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(self._segments.values())

    def allocate(self, nbytes: int) -> int:
        """Address of `nbytes` bytes; a new segment is taken when they fit nowhere. What `take` raises goes through."""
        nbytes = _whole(nbytes, self._unit)
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
        self._turns = Turns()
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes of arrays in use."""
        return self._small.used_bytes + self._large.used_bytes

    @property
    def small_bytes(self) -> int:
        """Bytes taken for small arrays, in use or not."""
        return self._small.taken_bytes

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        """An array of unset elements."""
        buffer = self.allocate(math.prod(shape) * dtype.itemsize)
        return contiguous(buffer.pointer, shape, dtype, buffer)

    def allocate(self, nbytes: int) -> Buffer:
        """Memory for an array of so many bytes."""
        with self._turns:
            if nbytes < _SMALL:
                return Buffer(self._small.allocate(nbytes), self._recycle_small)
            pointer = self._large.allocate(nbytes)
            if self._on_change is not None:
                self._on_change(nbytes, pointer)
            return Buffer(pointer, self._recycle_large)

    def reserve(self, layout: Layout) -> None:
        """Take the room of arrays to come, in one segment."""
        with self._turns:
            self._large.large_bytes = layout.large_bytes
            if layout.nbytes:
                self._large.reserve(layout.nbytes)

    def pop_empty(self) -> list[int]:
        """Forget the segments in which nothing lies: their addresses."""
        with self._turns:
            return self._small.pop_empty() + self._large.pop_empty()

    def close(self) -> None:
        """From now on, arrays that are dropped go nowhere."""
        self._closed = True

    def _recycle_small(self, pointer: int) -> None:
        self._turns.later(partial(self._release, self._small, pointer))

    def _recycle_large(self, pointer: int) -> None:
        self._turns.later(partial(self._release, self._large, pointer))

    def _release(self, arena: Arena, pointer: int) -> None:
        if not self._closed:
            arena.release(pointer)
            if arena is self._large and self._on_change is not None:
                self._on_change(-1, pointer)


def fit(changes: Sequence[tuple[int, int]]) -> Layout:
    """The segment for a sequence of `Pools.on_change`: not much more than the most that is in use at once.

    Tried are the smallest gap for each array, and an upper end for those from each size on. For the 14B's at 480p and 720p the best of
    them is 1-10% larger than the most in use; from half the largest size on, always, it was 7-19%.
    """
    most = max(accumulate(_in_use(changes)), default=0)
    if not most:
        return Layout(nbytes=0, large_bytes=None)
    best: Layout | None = None
    for large_bytes in (None, *sorted({_whole(nbytes, _LARGE_UNIT) for nbytes, _ in changes if nbytes > 0})):
        segment = whole_pages(most)
        while (best is None or segment < best.nbytes) and not _fits(changes, segment, large_bytes):
            segment = whole_pages(int(segment * _GROWTH))
        if best is None or segment < best.nbytes:
            best = Layout(nbytes=segment, large_bytes=large_bytes)
    assert best is not None
    return best


def _in_use(changes: Sequence[tuple[int, int]]) -> Iterator[int]:
    """By how many bytes each change takes more."""
    live: dict[int, int] = {}
    for nbytes, pointer in changes:
        if nbytes > 0:
            live[pointer] = _whole(nbytes, _LARGE_UNIT)
            yield live[pointer]
        else:
            yield -live.pop(pointer)


def _whole(nbytes: int, unit: int) -> int:
    """Bytes rounded up to what an arena of this unit gives for them."""
    unit <<= max(0, (nbytes // (_ROUNDING * unit)).bit_length() - 1)
    return -(-max(1, nbytes) // unit) * unit


def _fits(changes: Sequence[tuple[int, int]], segment: int, large_bytes: int | None) -> bool:
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
