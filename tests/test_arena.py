"""Where arrays lie in device memory, and that what is given back at any moment, by any thread, does not get in the way."""

from threading import Thread
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda.arena import Arena, Pools, fit
from runtime.backends.cuda.turns import Turns
from runtime.memory import Layout
from runtime.residency import PAGE_BYTES
from runtime.specs import DType

MIB = 1 << 20


class Segments:
    """A driver that hands out segments one after the other."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, nbytes: int) -> int:
        self.taken.append(nbytes)
        return (1 << 40) + sum(self.taken) - nbytes


def test_a_range_goes_to_the_smallest_gap_that_holds_it() -> None:
    arena = Arena(Segments().take, unit=512)
    places = [arena.allocate(size * 512) for size in (4, 1, 2, 1, 3, 1)]
    for index in (0, 2, 4):
        arena.release(places[index])
    assert arena.allocate(2 * 512) == places[2]
    assert arena.allocate(2 * 512) == places[4]
    assert arena.used_bytes == 7 * 512


def test_neighbours_that_are_free_join_but_never_across_segments() -> None:
    segments = Segments()
    arena = Arena(segments.take, unit=512)
    first, second = arena.allocate(PAGE_BYTES), arena.allocate(PAGE_BYTES)
    assert second == first + PAGE_BYTES
    arena.release(first)
    arena.release(second)
    arena.allocate(2 * PAGE_BYTES)
    assert segments.taken == [PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES]
    assert arena.pop_empty() == [first, second]


def test_random_traffic_never_overlaps_and_leaves_one_gap() -> None:
    segments, rng = Segments(), np.random.default_rng(0)
    arena = Arena(segments.take, unit=512)
    arena.large_bytes = 20 * 512
    live: dict[int, int] = {}
    for _ in range(500):
        if live and rng.random() < 0.5:
            start = list(live)[rng.integers(len(live))]
            arena.release(start)
            del live[start]
        else:
            nbytes = 512 * int(rng.integers(1, 40))
            start = arena.allocate(nbytes)
            assert all(start + nbytes <= other or other + size <= start for other, size in live.items())
            live[start] = nbytes
        assert arena.used_bytes == sum(live.values())
    for start in live:
        arena.release(start)
    assert len(arena.pop_empty()) == len(segments.taken)


def test_a_large_range_finds_the_place_of_one_with_a_few_rows_more() -> None:
    segments = Segments()
    arena = Arena(segments.take, unit=64 << 10)
    row = 10240
    padded, other = arena.allocate(75776 * row), arena.allocate(75600 * row)
    arena.release(other)
    assert arena.allocate(75776 * row) == other
    assert arena.used_bytes == 2 * 740 * MIB
    arena.release(padded)
    assert arena.allocate(5 * MIB) == padded and arena.used_bytes == 745 * MIB  # what is small is not rounded up by much


@pytest.mark.parametrize("on_another_thread", [False, True])
def test_an_array_dropped_while_another_is_placed_waits_for_its_turn(on_another_thread: bool) -> None:
    arrays: list[Any] = []
    used: list[int] = []

    def drop() -> None:
        arrays.clear()
        used.append(pools.used_bytes)

    def take(nbytes: int) -> int:
        if arrays:  # the second segment: as if the cycle collector ran now
            if on_another_thread:
                thread = Thread(target=drop)
                thread.start()
                thread.join()
            else:
                drop()
        return segments.take(nbytes)

    segments = Segments()
    pools = Pools(take)
    arrays.append(pools.empty((4 * MIB,), DType.F8_E4M3))
    kept = pools.empty((6 * MIB,), DType.F8_E4M3)
    assert used == [4 * MIB]  # not given back yet
    assert pools.used_bytes == 6 * MIB
    del kept
    assert pools.used_bytes == 0 and len(pools.pop_empty()) == 2


def test_turns_on_many_threads_lose_no_change() -> None:
    turns, counts = Turns(), [0]

    def add() -> None:
        counts[0] = counts[0] + 1

    def work() -> None:
        for _ in range(300):
            turns.later(add)
            with turns, turns:
                turns.later(add)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [2400]


def test_a_known_sequence_fits_the_segment_that_was_found_for_it() -> None:
    changes: list[tuple[int, int]] = []
    rehearsed = Pools(Segments().take, on_change=lambda nbytes, pointer: changes.append((nbytes, pointer)))

    def work(pools: Pools) -> None:
        kept = [pools.empty((size * MIB,), DType.F8_E4M3) for size in (2, 3)]
        for _ in range(3):
            wide = pools.empty((30 * MIB,), DType.F8_E4M3)
            kept.append(pools.empty((7 * MIB,), DType.F8_E4M3))
            del wide
            deep = pools.empty((25 * MIB,), DType.F8_E4M3)
            del kept[0], deep

    work(rehearsed)
    layout = fit(changes)
    assert layout == Layout(nbytes=52 * MIB, large_bytes=7 * MIB)  # at most 7 + 7 + 30 + 7 at once; pages have 2
    segments = Segments()
    pools = Pools(segments.take)
    pools.reserve(layout)
    work(pools)
    assert segments.taken == [52 * MIB]
