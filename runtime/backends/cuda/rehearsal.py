"""The `cuda` target without a GPU: the same drivers and plans over memory that is only counted.

What a generation will allocate, and where, is thus known before it runs: the runtime's own drivers say so, not a formula beside them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from runtime.backends.base import Array, Backend
from runtime.backends.cuda.arena import Pools, fit
from runtime.backends.cuda.array import HOST_TYPES, Buffer, DeviceArray, contiguous
from runtime.backends.cuda.calls import Calls
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.libraries import Libraries
from runtime.backends.cuda.plan import Plan
from runtime.backends.cuda.vae_kernels import VaeKernels
from runtime.component import Component
from runtime.memory import Layout, gib
from runtime.residency import PAGE_BYTES, weight_units
from runtime.specs import DType, Precision, StageSpec

log = logging.getLogger(__name__)

_DEVICE_TYPES = {np.dtype(host): dtype for dtype, host in HOST_TYPES.items()}


def rehearse(
    stages: tuple[StageSpec, ...],
    engine_files: Mapping[str, Path],
    drive: Callable[[Component], object],
    *,
    attention: Precision,
    plans: dict[Path, Plan] | None = None,
) -> Layout:
    """The device memory that `drive` needs besides weights; nothing is computed.

    Args:
        drive: does with the opened network what a generation does; the numbers it gets back are zeros.
        plans: of the backend that is to run, if it is open.

    Raises:
        EngineError: an engine file cannot be opened.
    """
    with _RehearsedBackend({}, attention=attention, plans=plans) as backend:
        return rehearse_on(backend, backend.counted, stages, engine_files, drive)


def rehearse_on(
    backend: Backend,
    counted: "Counted",
    stages: tuple[StageSpec, ...],
    engine_files: Mapping[str, Path],
    drive: Callable[[Component], object],
) -> Layout:
    """`rehearse` on any backend whose device is counted memory."""
    with Component(backend, stages, engine_files, _Weights(stages, counted)) as component:
        drive(component)
        layout = replace(fit(counted.changes), small_bytes=counted.small_bytes)
    if log.isEnabledFor(logging.INFO):
        live = counted.live_at_peak()
        log.info("%s to work in, %s at once: %s", gib(layout.nbytes), gib(sum(nbytes for _, nbytes in live)), _listed(live))
    return layout


class Counted:
    """Stands in for a `Device`: hands out addresses that nothing lies at."""

    arch = name = "rehearsal"
    stream = 0

    def __init__(self) -> None:
        self._next = PAGE_BYTES
        self.changes: list[tuple[int, int]] = []
        self.stage = "inputs"
        """Whose arrays are taken now."""
        self._stages: list[str] = []  # of each change
        self._pools = Pools(self._take, on_change=self._note)
        self.calls = Calls()

    @property
    def small_bytes(self) -> int:
        return self._pools.small_bytes

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        return self._pools.empty(shape, dtype)

    zeros = empty

    def allocate(self, nbytes: int) -> Buffer:
        return self._pools.allocate(nbytes)

    def from_host(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        return self.empty(array.shape, _DEVICE_TYPES[array.dtype] if dtype is None else dtype)

    def to_host(self, array: DeviceArray) -> Array:
        return np.zeros(array.shape, HOST_TYPES[array.dtype])

    def synchronize(self) -> None: ...

    def close(self) -> None: ...

    def live_at_peak(self) -> list[tuple[str, int]]:
        """Stage and bytes of the large arrays that are in use when most is."""
        live: dict[int, tuple[str, int]] = {}
        total, most, found = 0, 0, list[tuple[str, int]]()
        for (nbytes, pointer), stage in zip(self.changes, self._stages, strict=True):
            if nbytes > 0:
                live[pointer] = stage, nbytes
                total += nbytes
                most, found = (total, list(live.values())) if total > most else (most, found)
            else:
                total -= live.pop(pointer)[1]
        return found

    def _note(self, nbytes: int, pointer: int) -> None:
        self.changes.append((nbytes, pointer))
        self._stages.append(self.stage)

    def _take(self, nbytes: int) -> int:
        self._next += nbytes
        return self._next - nbytes


def _listed(live: Sequence[tuple[str, int]]) -> str:
    """Arrays of one stage and size together, the most bytes first."""
    counts = sorted(Counter(live).items(), key=lambda item: -item[0][1] * item[1])
    return ", ".join(f"{count} x {gib(nbytes)} of {stage}" for (stage, nbytes), count in counts)


class _Silent:
    """Stands in for a library: takes every call and does nothing."""

    vae: Any

    def __getattr__(self, name: str) -> Any:
        return _Silent()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return None


class _RehearsedBackend(CudaBackend):
    def _open_device(self) -> Device:
        self.counted = Counted()
        return cast(Device, self.counted)

    def _open_libraries(self, kernels: Mapping[str, bytes]) -> Libraries:
        libraries, vae = _Silent(), VaeKernels.__new__(VaeKernels)
        vars(vae).update(
            _device=self.counted, _module=_Silent(), _linear=_Silent()
        )  # it allocates what it computes with itself
        libraries.vae = vae
        return cast(Libraries, libraries)

    def fetch(self, tensor: DeviceArray) -> Callable[[], Array]:
        array = self.to_host(tensor)  # not the tensor, which the caller may drop
        return lambda: array


class _Weights:
    """Weights that are nowhere: they are counted apart (`runtime.residency`), but for those that may pass among the arrays."""

    def __init__(self, stages: Sequence[StageSpec], device: Counted) -> None:
        self._device = device
        units = weight_units([stage for stage in stages if not stage.per_block], num_blocks=0)
        self._passing = {tensor.name: unit.nbytes for unit in units if unit.passes for tensor in unit.tensors}
        self._here: DeviceArray | None = None

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceArray]:
        self._device.stage = stage.name
        if stage.weights:
            self._here = None
            nbytes = self._passing.get(stage.weights[0].name)
            self._here = None if nbytes is None else self._device.empty((nbytes,), DType.F8_E4M3)
        return {weight.name: contiguous(0, cast(tuple[int, ...], weight.shape), weight.dtype, None) for weight in stage.weights}
