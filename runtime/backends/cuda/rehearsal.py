"""The `cuda` target without a GPU: the same drivers and plans over memory that is only counted.

What a generation will allocate, and where, is thus known before it runs: the runtime's own drivers say so, not a formula beside them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from runtime.backends.base import Array
from runtime.backends.cuda.arena import Pools, fit
from runtime.backends.cuda.array import HOST_TYPES, DeviceArray, contiguous
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.engine import CudaBackend, Libraries
from runtime.backends.cuda.vae_kernels import VaeKernels
from runtime.component import Component
from runtime.memory import Layout
from runtime.residency import PAGE_BYTES
from runtime.specs import DType, Precision, StageSpec

_DEVICE_TYPES = {np.dtype(host): dtype for dtype, host in HOST_TYPES.items()}


def rehearse(
    stages: tuple[StageSpec, ...],
    engine_files: Mapping[str, Path],
    drive: Callable[[Component], object],
    *,
    attention: Precision,
) -> Layout:
    """The device memory that `drive` needs besides weights, arrays below a MiB not counted; nothing is computed.

    Args:
        drive: does with the opened network what a generation does; the numbers it gets back are zeros.

    Raises:
        EngineError: an engine file cannot be opened.
    """
    with (
        _RehearsedBackend({}, attention=attention) as backend,
        Component(backend, stages, engine_files, _Weights()) as component,
    ):
        drive(component)
        return fit(backend.counted.changes)


class _Counted:
    """Stands in for a `Device`: hands out addresses that nothing lies at."""

    arch = name = "rehearsal"
    stream = 0

    def __init__(self) -> None:
        self._next = PAGE_BYTES
        self.changes: list[tuple[int, int]] = []
        self._pools = Pools(self._take, on_change=lambda nbytes, pointer: self.changes.append((nbytes, pointer)))

    def empty(self, shape: tuple[int, ...], dtype: DType) -> DeviceArray:
        return self._pools.empty(shape, dtype)

    zeros = empty

    def from_host(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        return self.empty(array.shape, _DEVICE_TYPES[array.dtype] if dtype is None else dtype)

    def to_host(self, array: DeviceArray) -> Array:
        return np.zeros(array.shape, HOST_TYPES[array.dtype])

    def synchronize(self) -> None: ...

    def close(self) -> None: ...

    def _take(self, nbytes: int) -> int:
        self._next += nbytes
        return self._next - nbytes


class _Silent:
    """Stands in for a library: takes every call and does nothing."""

    vae: Any

    def __getattr__(self, name: str) -> Any:
        return _Silent()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return None


class _RehearsedBackend(CudaBackend):
    def _open_device(self) -> Device:
        self.counted = _Counted()
        return cast(Device, self.counted)

    def _open_libraries(self, kernels: Mapping[str, bytes]) -> Libraries:
        libraries, vae = _Silent(), VaeKernels.__new__(VaeKernels)
        vars(vae).update(
            _device=self.counted, _module=_Silent(), _linear=_Silent()
        )  # it allocates what it computes with itself
        libraries.vae = vae
        return cast(Libraries, libraries)


class _Weights:
    """Weights that are nowhere: they are counted apart (`runtime.residency`)."""

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceArray]:
        return {weight.name: contiguous(0, cast(tuple[int, ...], weight.shape), weight.dtype, None) for weight in stage.weights}
