"""A plan made ready for arrays of given shapes: its memory, calls and outputs are decided once and repeated at other addresses.

Preparing runs the plan's steps over arrays without memory, whose addresses are symbols (`runtime.backends.cuda.calls`), and notes the
calls. What changes from run to run, the addresses, is put in when a call is queued.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from runtime.backends.cuda import array
from runtime.backends.cuda.array import DeviceArray, Unit, contiguous
from runtime.backends.cuda.calls import ALIGNMENT, Call, slot_address, slot_of, symbol
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.plan import Buffer, Plan, Step, StepKind, View
from runtime.backends.cuda.plan_checks import REBUILD
from runtime.backends.cuda.recent import recall
from runtime.errors import EngineError
from runtime.specs import StageSpec, match_shapes, resolve

MOST_PREPARED = 32
"""Sizes and alignments of its arrays for which an engine keeps its plan prepared, such as lengths of prompts and shapes of tiles."""
WITH_OWN_MEMORY = frozenset((StepKind.FRAME_ATTENTION,))
"""Steps that allocate what they compute with: they are not prepared but executed each time."""


class Executor(Protocol):
    """Who calls kernels and libraries: `runtime.backends.cuda.engine.CudaBackend`."""

    device: Device

    def execute(self, step: Step, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> Mapping[str, DeviceArray]:
        """Queue one step, or note its calls."""
        ...


class CudaEngine:
    """One stage's plan, prepared for what it runs on. Buffers live from the step that writes them to the last that reads them."""

    def __init__(self, plan: Plan, stage: StageSpec, executor: Executor) -> None:
        self._plan, self._stage, self._executor = plan, stage, executor
        self._names = [tensor.name for tensor in (*stage.inputs, *stage.weights)]
        self._prepared: dict[tuple[Any, ...], PreparedPlan] = {}

    def run(self, tensors: Mapping[str, DeviceArray], *, consumed: Collection[str] = ()) -> dict[str, DeviceArray]:
        key = tuple([_form(tensors[name]) for name in self._names])
        try:
            plan, stage, executor = self._plan, self._stage, self._executor
            prepared = recall(self._prepared, key, lambda _: PreparedPlan(plan, stage, executor, tensors), most=MOST_PREPARED)
            return prepared.run(tensors, consumed=consumed)
        except (ValueError, TypeError, LookupError, ArithmeticError) as exc:  # a plan is a file, which may ask for anything
            raise EngineError(f"{self._stage.name}: the plan's arrays do not fit its steps: {exc}", hint=REBUILD) from exc

    def close(self) -> None:
        """Forget what was prepared; nothing else is held between runs."""
        self._prepared.clear()


class PreparedPlan:
    """A plan for tensors of the shapes, strides, alignments and units of those it was prepared with.

    Args:
        tensors: inputs and weights by name; their memory is not read.

    Raises:
        EngineError: an input does not fit the stage, or there is no kernel for a step.
        ValueError, TypeError, LookupError, ArithmeticError: the plan's arrays do not fit its steps.
    """

    def __init__(self, plan: Plan, stage: StageSpec, executor: Executor, tensors: Mapping[str, DeviceArray]) -> None:
        self._executor = executor
        self._names = [tensor.name for tensor in (*stage.inputs, *stage.weights)]
        self._with_unit = [name for name in self._names if tensors[name].unit is not None]
        self._num_slots = 0
        preparation = _Preparation(plan, stage, self._given(tensors), executor)
        self._turns = preparation.turns()
        self._outputs = preparation.outputs()
        self._num_slots = preparation.num_slots

    def run(self, tensors: Mapping[str, DeviceArray], *, consumed: Collection[str]) -> dict[str, DeviceArray]:
        """Queue the plan on these tensors; the outputs by name. `consumed` is as in `runtime.backends.base.Engine.run`."""
        given = self._given(tensors)
        rest = self._num_slots - len(given)
        addresses = [slot_address(tensor.pointer) for tensor in given] + [0] * rest
        owners: list[array.Buffer | None] = [tensor.buffer for tensor in given] + [None] * rest
        allocate = self._executor.device.allocate
        for turn in self._turns:
            for slot, nbytes in turn.made:
                owners[slot] = buffer = allocate(nbytes)
                addresses[slot] = buffer.pointer
            for call in turn.calls:
                call.queue(addresses)
            for slot in turn.dropped:
                owners[slot] = None
            for name in turn.last_read:
                if name in consumed:
                    tensors[name].free()
        return {name: _placed(template, addresses, owners) for name, template in self._outputs.items()}

    def _given(self, tensors: Mapping[str, DeviceArray]) -> list[DeviceArray]:
        """The arrays of the first slots: the stage's tensors, then what their units are made of."""
        given = [tensors[name] for name in self._names]
        for name in self._with_unit:
            unit = tensors[name].unit
            assert unit is not None
            given += (unit.scale, unit.offset)
        return given


@dataclass(frozen=True, slots=True)
class _Turn:
    """One step: the memory taken before it, as (slot, bytes), its calls, and what nothing reads after it."""

    made: tuple[tuple[int, int], ...]
    calls: tuple[Call, ...]
    dropped: tuple[int, ...]  # slots of buffers
    last_read: tuple[str, ...]  # inputs


class _Preparation:
    """The state of preparing: which symbol stands for which array so far.

    Args:
        given: the arrays of the first slots, see `PreparedPlan._given`.
    """

    def __init__(self, plan: Plan, stage: StageSpec, given: Sequence[DeviceArray], executor: Executor) -> None:
        self._plan, self._executor = plan, executor
        self._names = [tensor.name for tensor in (*stage.inputs, *stage.weights)]
        self._buffers = {buffer.name: buffer for buffer in plan.buffers}
        self._views = {view.name: view for view in plan.views}
        self._arrays = _symbols(self._names, given)
        self._extents = match_shapes(stage, {tensor.name: self._arrays[tensor.name].shape for tensor in stage.inputs})
        self._num_given = self.num_slots = len(given)

    def turns(self) -> list[_Turn]:
        works = [self._work(step) for step in self._plan.steps]
        kept = {slot for output in self.outputs().values() for slot in _slots(output)}
        turns = []
        for made, calls, used in reversed(works):
            last, kept = sorted(used - kept), kept | used
            dropped = tuple(slot for slot in last if slot >= self._num_given)
            last_read = tuple(self._names[slot] for slot in last if slot < len(self._names))
            turns.append(_Turn(made=made, calls=calls, dropped=dropped, last_read=last_read))
        return turns[::-1]

    def outputs(self) -> dict[str, DeviceArray]:
        return {name: self._array(source) for name, source in self._plan.outputs.items()}

    def _work(self, step: Step) -> tuple[tuple[tuple[int, int], ...], tuple[Call, ...], set[int]]:
        """`_Turn.made` and `_Turn.calls` of a step, and the slots of all that it reads and writes."""
        made = [self._make(name) for name in step.outputs.values() if name not in self._arrays]
        inputs = {argument: self._array(name) for argument, name in step.inputs.items()}
        outputs = {argument: self._arrays[name] for argument, name in step.outputs.items()}
        calls: list[Call]
        if step.kind in WITH_OWN_MEMORY:
            calls = [_Executed(self._executor, step, inputs, outputs)]
        else:
            with self._executor.device.calls.noting() as calls:
                changed = self._executor.execute(step, inputs, outputs)
            self._arrays |= {step.outputs[argument]: value for argument, value in changed.items()}
        used = (*inputs.values(), *(self._arrays[name] for name in step.outputs.values()))
        return tuple(made), tuple(calls), {slot for one in used for slot in _slots(one)}

    def _make(self, name: str) -> tuple[int, int]:
        """Give a buffer a slot; it, and the bytes of the buffer with its spare rows."""
        buffer: Buffer = self._buffers[name]
        rows, *rest = (resolve(axis, self._extents) for axis in buffer.shape)
        spare = -rows % buffer.row_multiple
        slot = self.num_slots
        whole = contiguous(symbol(slot), (rows + spare, *rest), buffer.dtype, None)
        self._arrays[name] = whole.sparing_rows(spare)
        self.num_slots += 1
        return slot, whole.nbytes

    def _array(self, name: str) -> DeviceArray:
        views: list[View] = []
        while (view := self._views.get(name)) is not None:
            views.append(view)
            name = view.source
        found = self._arrays[name]
        for view in reversed(views):
            found = (found.rows if view.axis == 0 else found.columns)(view.start, view.stop)
        return found


class _Executed:
    """A step that is executed anew each time, on arrays with true addresses; the plan's run keeps their memory."""

    def __init__(
        self, executor: Executor, step: Step, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> None:
        self._executor, self._step, self._inputs, self._outputs = executor, step, inputs, outputs

    def queue(self, addresses: Sequence[int]) -> None:
        inputs, outputs = (
            {argument: _placed(template, addresses) for argument, template in arrays.items()}
            for arrays in (self._inputs, self._outputs)
        )
        self._executor.execute(self._step, inputs, outputs)


def _symbols(names: Sequence[str], given: Sequence[DeviceArray]) -> dict[str, DeviceArray]:
    """The stage's tensors, with a symbol for every address."""
    arrays = [replace(tensor, pointer=symbol(slot, tensor.pointer), buffer=None) for slot, tensor in enumerate(given)]
    parts = iter(arrays[len(names) :])
    return {
        name: tensor if tensor.unit is None else replace(tensor, unit=Unit(next(parts), next(parts)))
        for name, tensor in zip(names, arrays, strict=False)
    }


def _slots(symbolic: DeviceArray) -> set[int]:
    """The slots in which an array lies, and its unit: what is in fp8 means nothing without that."""
    unit = symbolic.unit
    parts = () if unit is None else (unit.scale, unit.offset)
    return {slot_of(part.pointer)[0] for part in (symbolic, *parts)}


def _placed(
    template: DeviceArray, addresses: Sequence[int], owners: Sequence[array.Buffer | None] | None = None
) -> DeviceArray:
    """An array with its true address and, with owners of the slots, its memory."""
    slot, offset = slot_of(template.pointer)
    unit = template.unit
    if unit is not None:
        unit = Unit(_placed(unit.scale, addresses, owners), _placed(unit.offset, addresses, owners))
    return replace(template, pointer=addresses[slot] + offset, buffer=None if owners is None else owners[slot], unit=unit)


def _form(array: DeviceArray) -> tuple[Any, ...]:
    """Everything about an array that its calls depend on, but for where it lies."""
    unit = array.unit
    parts = None if unit is None else (_form(unit.scale), _form(unit.offset))
    return array.shape, array.row_stride, array.spare_rows, id(array.dtype), array.pointer % ALIGNMENT, parts
