"""A component's weights on the GPU within its share of the budget: some resident, the others in two slots that they take in turn. What
is needed once before the first step passes among the arrays, where it is fetched when it is asked for.

Order is kept by events: a copy into a slot waits until the computing that reads the slot's last unit is done, and computing waits for
the copy. What comes next is asked for one unit ahead, around the cycle of a step (or of a prompt), from step to step.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.backends.base import Array
from runtime.backends.cuda.array import DeviceArray, contiguous
from runtime.backends.cuda.copies import CopyStream, Event
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.loading import Loader, Pinned, TensorBytes, Transfer
from runtime.errors import EngineError
from runtime.residency import Residency, Unit, UnitTensor
from runtime.specs import DType, StageSpec

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Store:
    """What stays of a component between its uses: resident units on the device, streamed ones in page-locked memory."""

    units: tuple[Unit, ...]
    source: TensorBytes
    slabs: dict[int, DeviceArray] = field(default_factory=dict)
    arriving: dict[int, Transfer] = field(default_factory=dict)  # resident, asked for, not yet waited for
    loaded: set[int] = field(default_factory=set)
    pinned: dict[int, Pinned] = field(default_factory=dict)
    events: dict[tuple[str, int], Event] = field(default_factory=dict)  # by what they are for

    def event(self, kind: str, index: int, copies: CopyStream) -> Event:
        """The event for one purpose, the same in every use of the component."""
        if (kind, index) not in self.events:
            self.events[kind, index] = copies.new_event()
        return self.events[kind, index]

    def evict(self, unit: int) -> None:
        """Give a resident unit's memory back."""
        self.loaded.discard(unit)
        self.arriving.pop(unit, None)
        slab = self.slabs.pop(unit, None)
        if slab is not None:
            slab.free()

    def pin(self, units: Iterable[int], copies: CopyStream, *, available_bytes: int) -> None:
        """Set page-locked memory aside for streamed units, if half of what the machine has left holds them all."""
        missing = [unit for unit in units if unit not in self.pinned]
        needed = sum(self.units[unit].nbytes for unit in missing)
        if not missing or needed > available_bytes // 2:
            return
        try:
            for unit in missing:
                self.pinned[unit] = Pinned(copies.page_locked(self.units[unit].nbytes))
        except EngineError as error:
            log.warning("%s; what is not page-locked is staged", error.message)

    def unpin(self, copies: CopyStream) -> None:
        """Give the page-locked memory back; the loader must have settled."""
        copies.synchronize()
        for pinned in self.pinned.values():
            copies.free_page_locked(pinned.memory)
        self.pinned.clear()


@dataclass(slots=True, eq=False)
class _Slot:
    memory: DeviceArray
    ready: Event
    done: Event  # the computing that read the slot's last unit
    transfer: Transfer | None = None
    unit: int | None = None
    was_read: bool = False

    def clear(self) -> None:
        """Hold no unit any more; a transfer that has not begun does not begin."""
        if self.transfer is not None:
            self.transfer.cancelled = True
        self.unit = self.transfer = None


class StreamedWeights:
    """A component's weights while it runs (`runtime.backends.base.StoredWeights`). Use with `close`.

    Raises:
        DeviceMemoryError: the slots do not fit.
    """

    def __init__(
        self,
        store: Store,
        residency: Residency,
        stages: Sequence[StageSpec],
        *,
        device: Device,
        copies: CopyStream,
        loader: Loader,
    ) -> None:
        self._store, self._residency = store, residency
        self._copies, self._loader = copies, loader
        self._units = {tensor.name: (i, tensor) for i, unit in enumerate(store.units) for tensor in unit.tensors}
        self._bound: dict[tuple[str, int | None, int], dict[str, DeviceArray]] = {}
        self._slots = [
            _Slot(device.slab(nbytes), store.event("ready", i, copies), store.event("done", i, copies))
            for i, nbytes in enumerate(residency.slots)
        ]
        self._device = device
        self._passing: DeviceArray | None = None
        self._current: int | None = None
        self._pointer = 0
        self._prefetch(None)

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceArray]:
        """The weights of a stage, valid for what is queued until the next call with another unit's.

        Raises:
            WanError: they could not be read or copied.
        """
        if not stage.weights:
            return {}
        pointer = self._acquire(self._units[stage.weight_name(stage.weights[0].name, block)][0])
        key = (stage.name, block if stage.per_block else None, pointer)
        bound = self._bound.get(key)
        if bound is None:
            tensors = {weight.name: self._units[stage.weight_name(weight.name, block)][1] for weight in stage.weights}
            bound = self._bound[key] = {name: _view(pointer, tensor) for name, tensor in tensors.items()}
        return bound

    def host_tensor(self, name: str) -> Array:
        """A weight that the host reads itself; still mapped."""
        return self._store.source.tensor(name)

    def close(self) -> None:
        """Give the slots back; resident units stay in the store."""
        for slot in self._slots:
            slot.clear()
        self._loader.settle()
        self._passing = None
        arriving = self._store.arriving
        for unit in [unit for unit, transfer in arriving.items() if transfer.error is not None]:
            del arriving[unit]  # to be asked for again
        for slot in self._slots:
            slot.memory.free()  # a slab: the driver frees it when what is under way on the device, copies too, is done
        self._slots.clear()

    def _acquire(self, unit: int) -> int:
        """Address of a unit, once everything computed from now on is held until it is there."""
        if unit == self._current:
            return self._pointer
        self._leave()
        if unit in self._residency.resident:
            self._pointer = self._acquire_resident(unit)
        elif self._store.units[unit].passes:
            self._pointer = self._acquire_passing(unit)
        else:
            self._pointer = self._acquire_streamed(unit)
        self._current = unit
        self._prefetch(unit)
        return self._pointer

    def _acquire_resident(self, unit: int) -> int:
        store = self._store
        if unit not in store.loaded:
            if unit not in store.arriving:
                self._request_resident(unit)
            self._arrive(store.arriving.pop(unit))
            store.loaded.add(unit)
        return store.slabs[unit].pointer

    def _acquire_streamed(self, unit: int) -> int:
        slot = next((slot for slot in self._slots if slot.unit == unit), None)
        if slot is None:
            slot = self._free_slot(unit) or self._slots[-1]  # the largest
            slot.clear()
            self._request_streamed(unit, slot)
        assert slot.transfer is not None
        try:
            self._arrive(slot.transfer)
        except BaseException:
            slot.clear()
            raise
        return slot.memory.pointer

    def _acquire_passing(self, unit: int) -> int:
        """Fetch a unit to where arrays lie, behind all computing queued so far: that may still read what lay there."""
        self._passing = self._device.empty((self._store.units[unit].nbytes,), DType.F8_E4M3)
        free = self._store.event("free", 0, self._copies)
        self._copies.mark_computing(free)
        transfer = self._transfer(unit, self._passing, after=free, ready=self._store.event("passing", 0, self._copies))
        self._loader.submit(transfer)
        self._arrive(transfer)
        return self._passing.pointer

    def _arrive(self, transfer: Transfer) -> None:
        """Hold what is computed from now on until a transfer is done."""
        self._loader.wait(transfer)
        self._copies.hold_computing(transfer.ready)

    def _leave(self) -> None:
        """Everything that reads the current unit is queued: mark the point after which its slot may be overwritten."""
        current = self._current
        self._passing = self._current = None
        for slot in self._slots:
            if slot.unit is not None and slot.unit == current:
                self._copies.mark_computing(slot.done)
                slot.was_read = True
                slot.clear()

    def _prefetch(self, after: int | None) -> None:
        """Ask for the units that come next in the cycle, as far as slots are free; of resident ones for one at a time."""
        cycle = self._cycle(after)
        for slot in self._slots:
            if slot.unit is not None and slot.unit not in cycle:  # the prompts are done, or a new one came
                slot.clear()
        start = 0 if after is None else cycle.index(after) + 1
        store = self._store
        for unit in (*cycle[start:], *cycle[:start]):
            if unit == after or unit in store.loaded or any(slot.unit == unit for slot in self._slots):
                continue
            if store.units[unit].passes and unit not in self._residency.resident:
                continue
            if unit in self._residency.resident:
                if not store.arriving:
                    self._request_resident(unit)
                return
            if (free := self._free_slot(unit)) is None:
                return
            self._request_streamed(unit, free)

    def _free_slot(self, unit: int) -> _Slot | None:
        """The smallest slot that holds none and is large enough; where an odd number of blocks streams, the large one may come too late."""
        needed = self._store.units[unit].device_bytes
        return next((slot for slot in self._slots if slot.unit is None and slot.memory.nbytes >= needed), None)

    def _cycle(self, unit: int | None) -> list[int]:
        """The units that are used again and again in turn with this one."""
        units = self._store.units
        kind = units[0 if unit is None else unit].per_prompt
        return [i for i, other in enumerate(units) if other.per_prompt == kind]

    def _request_resident(self, unit: int) -> None:
        ready = self._store.event("resident", unit, self._copies)
        transfer = self._transfer(unit, self._store.slabs[unit], after=None, ready=ready)
        self._store.arriving[unit] = transfer
        self._loader.submit(transfer)

    def _request_streamed(self, unit: int, slot: _Slot) -> None:
        slot.unit = unit
        slot.transfer = self._transfer(unit, slot.memory, after=slot.done if slot.was_read else None, ready=slot.ready)
        self._loader.submit(slot.transfer)

    def _transfer(self, unit: int, into: DeviceArray, *, after: Event | None, ready: Event) -> Transfer:
        return Transfer(
            unit=self._store.units[unit],
            source=self._store.source,
            pointer=into.pointer,
            pinned=self._store.pinned.get(unit),
            after=after,
            ready=ready,
        )


def _view(pointer: int, tensor: UnitTensor) -> DeviceArray:
    return contiguous(pointer + tensor.offset, tensor.shape, tensor.dtype, None)
