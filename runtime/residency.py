"""Which weights of a component stay on a device and which stream: the units they are kept in, and what goes first when room is needed.

Arithmetic on stages only; a target with device memory of its own does what is decided here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.specs import DType, StageSpec

ALIGNMENT = 256
"""Bytes: where a tensor of a unit may begin."""
PAGE_BYTES = 2 << 20
"""What a driver hands out: whole pages."""


@dataclass(frozen=True, slots=True)
class UnitTensor:
    name: str  # in the component's weight file
    shape: tuple[int, ...]
    dtype: DType
    offset: int  # bytes from the unit's beginning

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Weights that are loaded, kept and given up together: a block's, or those of stages outside the blocks."""

    name: str
    tensors: tuple[UnitTensor, ...]
    nbytes: int
    block: int | None
    per_prompt: bool

    @property
    def device_bytes(self) -> int:
        """What it takes on a device."""
        return whole_pages(self.nbytes)

    @property
    def passes(self) -> bool:
        """Whether it may lie among the arrays while it is used, and be gone afterwards: before the first step there is room for it."""
        return self.block is None and self.per_prompt

    @property
    def streams(self) -> bool:
        """Whether it may be fetched into a slot each time it is needed, while another block computes."""
        return self.block is not None


def weight_units(stages: Iterable[StageSpec], *, num_blocks: int) -> tuple[Unit, ...]:
    """A network's weights as units, in the order in which a generation needs them.

    The stages of a block that run at every step make one unit, those that run once a prompt another. Other stages make a unit each,
    or one together when they share weights.
    """
    groups: dict[tuple[int, int | None], dict[str, tuple[tuple[int, ...], DType]]] = {}
    singles: list[tuple[int, dict[str, tuple[tuple[int, ...], DType]]]] = []
    for stage in stages:
        for block in stage.places(num_blocks):
            named = {
                stage.weight_name(weight.name, block): (tuple(int(axis) for axis in weight.shape), weight.dtype)
                for weight in stage.weights
            }
            if block is not None:
                groups.setdefault((not stage.per_prompt, block), {}).update(named)
            elif named:
                shared = next((weights for _, weights in singles if weights.keys() & named.keys()), None)
                shared.update(named) if shared is not None else singles.append((not stage.per_prompt, named))
    units = []
    for step in (0, 1):
        own = [weights for kind, weights in singles if kind == step]
        units += [_unit(next(iter(weights)).partition(".")[0], weights, None, per_prompt=not step) for weights in own]
        blocks = sorted((block, weights) for (kind, block), weights in groups.items() if kind == step and block is not None)
        units += [_unit(f"blocks.{block}", weights, block, per_prompt=not step) for block, weights in blocks]
    return tuple(units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """Which units of a component stay on the device, by index, and the slots through which the others stream."""

    resident: frozenset[int]
    resident_bytes: int
    slots: tuple[int, ...]  # bytes of each, the smaller first; none when nothing streams

    @property
    def slot_bytes(self) -> int:
        return sum(self.slots)

    @property
    def device_bytes(self) -> int:
        return self.resident_bytes + self.slot_bytes


def least_bytes(units: Sequence[Unit]) -> int:
    """The least device memory these weights can run in."""
    whole = sum(unit.device_bytes for unit in units)
    fixed = sum(unit.device_bytes for unit in units if not (unit.streams or unit.passes))
    return min(whole, fixed + sum(_slots([unit for unit in units if unit.streams])))


def choose_residency(units: Sequence[Unit], room: int) -> Residency:
    """What to keep in `room` bytes: everything if it fits, else what every step needs first, streamed blocks spread evenly.

    First to go is what may pass among the arrays. Blocks that are larger than others stay before any of those: slots take their size.
    Evenly, because a resident block's computing time then hides the next streamed one's transfer wherever that takes longer.

    Raises:
        ValueError: less room than `least_bytes`.
    """
    sizes = [unit.device_bytes for unit in units]
    if sum(sizes) <= room:
        return Residency(resident=frozenset(range(len(units))), resident_bytes=sum(sizes), slots=())
    fixed = [i for i, unit in enumerate(units) if not (unit.streams or unit.passes)]
    steps = [i for i, unit in enumerate(units) if unit.streams and not unit.per_prompt]
    prompts = [i for i, unit in enumerate(units) if unit.streams and unit.per_prompt]
    staying = sum(sizes[i] for i in (*fixed, *steps, *prompts))
    if staying <= room:
        return Residency(resident=frozenset((*fixed, *steps, *prompts)), resident_bytes=staying, slots=())
    for same, others, kept in ((prompts, [], fixed + steps), (steps, prompts, fixed)):
        smallest = min((sizes[i] for i in same), default=0)
        larger = [i for i in same if sizes[i] > smallest]
        for first in (larger, []):
            spread = [i for i in same if i not in first]
            slots = _slots([units[i] for i in (*spread, *others)])
            left = room - sum(sizes[i] for i in (*kept, *first)) - sum(slots)
            if left < 0 or not same:
                continue
            fits = (count for count in range(len(spread), 0, -1) if sum(sizes[i] for i in _spread(spread, count)) <= left)
            chosen = frozenset((*kept, *first, *_spread(spread, next(fits, 0))))
            return Residency(resident=chosen, resident_bytes=sum(sizes[i] for i in chosen), slots=slots)
    raise ValueError(f"{room} bytes are less than the {least_bytes(units)} these weights need")


@dataclass(slots=True)
class Ledger:
    """What lies on a device, component by component; it says what has to go before the next component comes."""

    held: dict[str, dict[int, int]] = field(default_factory=dict)  # component → unit → bytes

    def open(
        self, component: str, units: Sequence[Unit], residency: Residency, *, room: int | None, order: Sequence[str]
    ) -> list[tuple[str, int]]:
        """Enter a component's resident units; returns the units that must go first, in this order.

        Those of the component itself that are not to stay, then those of the component whose next use is farthest away.

        Args:
            room: bytes for all weights while this component runs; None: enough for all.
            order: components as a generation uses them.
        """
        own = self.held.setdefault(component, {})
        gone = [(component, unit) for unit in sorted(own.keys() - residency.resident)]
        for _, unit in gone:
            del own[unit]
        own.update({unit: units[unit].device_bytes for unit in sorted(residency.resident)})
        turn = order.index(component)
        farthest = [*order[turn + 1 :], *order[:turn]][::-1]
        if room is not None:
            gone += self._give_up(farthest, room - residency.slot_bytes, keep=component)
        return gone

    def shrink(self, *, room: int, order: Sequence[str]) -> list[tuple[str, int]]:
        """The units that must go before a generation begins, if what lies there is more than `room`."""
        return self._give_up(order[::-1], room)

    def _give_up(self, farthest: Sequence[str], room: int, *, keep: str | None = None) -> list[tuple[str, int]]:
        """Forget units until the rest fits: of components not in use any more, then in the order given; a component's last ones first."""
        gone: list[tuple[str, int]] = []
        for name in (*(name for name in self.held if name not in farthest and name != keep), *farthest):
            others = self.held.get(name, {})
            for unit in sorted(others, reverse=True):
                if self.total_bytes <= room:
                    return gone
                del others[unit]
                gone.append((name, unit))
        return gone

    @property
    def total_bytes(self) -> int:
        return sum(size for units in self.held.values() for size in units.values())

    def copy(self) -> "Ledger":
        return Ledger({component: dict(units) for component, units in self.held.items()})


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _slots(streamed: Sequence[Unit]) -> tuple[int, ...]:
    """Bytes of the two places that streamed units take in turn, one computed with while the next arrives: a unit and the next fit."""
    least = 0
    for per_prompt in (True, False):
        cycle = [unit.device_bytes for unit in streamed if unit.per_prompt is per_prompt]
        least = max(least, *map(min, cycle, cycle[1:] + cycle[:1])) if cycle else least
    return (least, max(unit.device_bytes for unit in streamed)) if streamed else ()


def _spread(items: Sequence[int], count: int) -> list[int]:
    """`count` of the items, evenly spaced."""
    total = len(items)
    return [item for i, item in enumerate(items) if (i + 1) * count // total > i * count // total]


def _unit(name: str, weights: Mapping[str, tuple[tuple[int, ...], DType]], block: int | None, *, per_prompt: bool) -> Unit:
    tensors, offset = [], 0
    for tensor, (shape, dtype) in weights.items():
        tensors.append(UnitTensor(tensor, shape, dtype, offset))
        offset += -(-tensors[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return Unit(name=name, tensors=tuple(tensors), nbytes=offset, block=block, per_prompt=per_prompt)
