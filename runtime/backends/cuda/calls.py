"""What is queued on the stream, as objects: queued at once, or noted while a plan is prepared and queued later at other addresses.

While a plan is prepared, its arrays have no memory: a *symbol* stands for the address of the array in a slot. What is added to it, as
for a view's rows and columns, goes along, and `relocate` puts the true address in.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

ALIGNMENT = 256
"""Bytes: what libraries look at of an address. A slot's address is rounded down to it; the rest is part of its symbols."""
_SYMBOL, _SLOT_SHIFT = 1 << 62, 40  # no driver gives addresses beyond 57 bits
_OFFSET = (1 << _SLOT_SHIFT) - 1

Relocation = tuple[Any, int, int]
"""Where an address goes (a key or an index), whose it is (a slot), and what is added to it."""


class Call(Protocol):
    """Something a stream can be given again and again."""

    def queue(self, addresses: Sequence[int]) -> None:
        """Queue it, with `addresses[slot]` for the symbols of a slot; returns at once.

        Raises:
            CudaError: the driver or a library refuses.
        """
        ...


class Calls:
    """Where kernels and libraries put their calls, of one device."""

    def __init__(self) -> None:
        self._noted: list[Call] | None = None

    def put(self, call: Call) -> None:
        """Queue a call, or note it while `noting`."""
        if self._noted is None:
            call.queue(())
        else:
            self._noted.append(call)

    @contextmanager
    def noting(self) -> Iterator[list[Call]]:
        """The calls that are put meanwhile; none of them is queued."""
        self._noted = noted = list[Call]()
        try:
            yield noted
        finally:
            self._noted = None


def symbol(slot: int, pointer: int = 0) -> int:
    """The address of a slot's array while it has none; `pointer` is one that it may have, of the same alignment."""
    return _SYMBOL | slot << _SLOT_SHIFT | pointer % ALIGNMENT


def slot_address(pointer: int) -> int:
    """The `addresses[slot]` of an array that lies at `pointer`."""
    return pointer & -ALIGNMENT


def slot_of(address: int) -> tuple[int, int]:
    """Slot and offset that a symbol stands for."""
    return (address & ~_SYMBOL) >> _SLOT_SHIFT, address & _OFFSET


def relocations(values: Iterable[tuple[Any, int]]) -> tuple[Relocation, ...]:
    """Which of the values, each with its place, are symbols."""
    return tuple((place, *slot_of(value)) for place, value in values if value & _SYMBOL)


def relocate(values: Any, symbols: tuple[Relocation, ...], addresses: Sequence[int]) -> None:
    """Put true addresses in the places of symbols, in a list, a dict or an array."""
    for place, slot, offset in symbols:
        values[place] = addresses[slot] + offset
