"""What is made once and kept while it is used: descriptors, graphs and prepared plans, one for each size they were made for."""

from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def recall(known: dict[K, V], key: K, make: Callable[[K], V], *, most: int) -> V:
    """`known[key]`, made now where it is missing; of more than `most`, the one that was not asked for the longest time is forgotten."""
    value = known.pop(key) if key in known else make(key)
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]
    return value
