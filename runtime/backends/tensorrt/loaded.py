"""One engine as its library opened it: compared with the stage, its context made, runs queued."""

from collections.abc import Mapping
from typing import Any

from runtime.backends.tensorrt.cache import RuntimeCache
from runtime.backends.tensorrt.library import OpenLibrary
from runtime.errors import EngineError
from runtime.specs import DType, StageSpec, match_shapes, resolve

_TYPES = {
    DType.F32: "FLOAT",
    DType.F16: "HALF",
    DType.BF16: "BF16",
    DType.F8_E4M3: "FP8",
    DType.I64: "INT64",
    DType.U8: "UINT8",
}
"""The libraries' names of element types."""


class LoadedEngine:
    """An engine with one execution context, whose scratch memory is given to it run by run.

    Raises:
        EngineError: the library does not open it, or it is not the stage's.
    """

    def __init__(self, library: OpenLibrary, data: memoryview, stage: StageSpec, cache: RuntimeCache) -> None:
        self._library, self._stage = library, stage
        self._engine = library.load(data, stage.name)
        self._check_against_spec()
        with library.listening():
            self._context = self._make_context(cache)
            library.accepted(self._context, f"{stage.name}: no execution context")
        # engines are built with the names of their kernels; marking each for a profiler slows queuing down, says the library's reference
        self._context.nvtx_verbosity = library.trt.ProfilingVerbosity.NONE
        self._moving = tuple(tensor.name for tensor in stage.inputs if any(isinstance(axis, str) for axis in tensor.shape))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scratch_bytes = int(self._engine.device_memory_size_v2)  # all there is to know where nothing moves
        self._pointers: dict[str, int] = {}
        self._scratch = 0

    def scratch_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Take the extents of the inputs for the runs to come: the memory that such a run needs for itself.

        Raises:
            EngineError: the library refused; the message names the stage and the tensor.
        """
        moved = [name for name in self._moving if self._shapes.get(name) != shapes[name]]
        if not moved:
            return self._scratch_bytes
        accepted, stage = self._library.accepted, self._stage.name
        with self._library.listening():
            for name in moved:
                accepted(self._context.set_input_shape(name, shapes[name]), f"{stage}: {name} of shape {shapes[name]}")
                self._shapes[name] = shapes[name]
            self._check_outputs(match_shapes(self._stage, shapes))
            self._scratch_bytes = int(self._context.update_device_memory_size_for_shapes())
        self._scratch = 0  # laid out anew for these extents
        return self._scratch_bytes

    def enqueue(self, pointers: Mapping[str, int], scratch: int, stream: int) -> None:
        """Queue one run with the extents given last; only what changed since the last run is said again.

        Raises:
            EngineError: the library refused; the message names the stage and the tensor.
        """
        context, accepted, name_of_stage = self._context, self._library.accepted, self._stage.name
        with self._library.listening():
            for name, pointer in pointers.items():
                if self._pointers.get(name) != pointer:
                    accepted(context.set_tensor_address(name, pointer), f"{name_of_stage}: the address of {name}")
                    self._pointers[name] = pointer
            if self._scratch != scratch and self._scratch_bytes:
                context.set_device_memory(scratch, self._scratch_bytes)
                self._scratch = scratch
            accepted(context.execute_async_v3(stream), f"{name_of_stage}: execution failed with {self._shapes}")

    def close(self) -> None:
        """Release context and engine, in this order."""
        self._context = None
        self._engine = None

    def _check_outputs(self, extents: Mapping[str, int]) -> None:
        """The engine writes what it computes, whatever memory it was given."""
        for tensor in self._stage.outputs:
            given = tuple(self._context.get_tensor_shape(tensor.name))
            wanted = tuple(resolve(axis, extents) for axis in tensor.shape)
            if given != wanted:
                raise _unlike(self._stage, f"{tensor.name} of shape {given}", f"{wanted}")

    def _make_context(self, cache: RuntimeCache) -> Any:
        trt = self._library.trt
        own = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._library.library.compiles_here:
            return self._engine.create_execution_context(own)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(own)
        # at once, not meanwhile with other kernels: the same inputs give the same bits from the first run on
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache.attach(config)
        return self._engine.create_execution_context(config)

    def _check_against_spec(self) -> None:
        engine, trt, stage = self._engine, self._library.trt, self._stage
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        kinds = dict.fromkeys((t.name for t in (*stage.inputs, *stage.weights)), trt.TensorIOMode.INPUT)
        kinds |= dict.fromkeys((t.name for t in stage.outputs), trt.TensorIOMode.OUTPUT)
        if found != kinds.keys():
            raise _unlike(stage, f"tensors {sorted(found)}", f"{sorted(kinds)}")
        for tensor in (*stage.inputs, *stage.weights, *stage.outputs):
            given = (
                engine.get_tensor_mode(tensor.name),
                engine.get_tensor_dtype(tensor.name),
                tuple(engine.get_tensor_shape(tensor.name)),
            )
            shape = tuple(-1 if isinstance(axis, str) else axis for axis in tensor.shape)
            wanted = (kinds[tensor.name], getattr(trt.DataType, _TYPES[tensor.dtype]), shape)
            if not _agrees(given, wanted):
                raise _unlike(stage, f"{tensor.name} {given}", f"{wanted}")
            if engine.get_tensor_location(tensor.name) != trt.TensorLocation.DEVICE:  # it would read a pointer of the GPU's
                raise _unlike(stage, f"{tensor.name} in the host's memory", "it in the GPU's")


def _agrees(given: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """An extent that either leaves open is known once shapes are set: the profile may hold one value, or the library not follow a reshape."""
    axes = zip(given[2], wanted[2], strict=False)
    return (
        given[:2] == wanted[:2] and len(given[2]) == len(wanted[2]) and all(-1 in pair or pair[0] == pair[1] for pair in axes)
    )


def _unlike(stage: StageSpec, given: str, wanted: str) -> EngineError:
    return EngineError(
        f"{stage.name}: the engine has {given}, this bundle's architecture needs {wanted}",
        hint="the bundle is damaged or was built by another version; rebuild it",
    )
