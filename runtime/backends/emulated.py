"""The `emulated` target: typed graphs in float32 operators with the rounding of their types, run by ONNX Runtime's CPU provider.

It answers what the numbers of a bf16, fp16 or fp8 engine should be, not how fast one is. A tensor is an `onnxruntime.OrtValue`: NumPy
has no bf16 and no fp8.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Array
from runtime.backends.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeEngine
from runtime.geometry import patchify, unpatchify
from runtime.specs import DType, StageSpec
from runtime.variants import TransformerArch

OrtValue = Any
_AS_BITS = {DType.BF16: 16, DType.F8_E4M3: 17}
"""ONNX's numbers of the element types that travel as their bits."""
_BITS = {"tensor(bfloat16)": np.uint16, "tensor(float8e4m3fn)": np.uint8}


class EmulatedEngine(OnnxRuntimeEngine):
    """One stage in one ONNX Runtime session on the CPU, over its own tensors."""

    def _compute(self, tensors: Mapping[str, OrtValue]) -> Sequence[OrtValue]:
        outputs: Sequence[OrtValue] = self._session.run_with_ort_values(self._outputs, dict(tensors))
        return outputs

    def _shape(self, tensor: OrtValue) -> tuple[int, ...]:
        return tuple(tensor.shape())


class EmulatedBackend(OnnxRuntimeBackend):
    """ONNX Runtime on the CPU, over tensors of any element type."""

    name = "emulated"

    def open_engine(self, path: Path, stage: StageSpec) -> EmulatedEngine:
        return EmulatedEngine(path, stage, num_threads=self._num_threads)

    def to_device(self, array: Array, dtype: DType | None = None) -> OrtValue:
        from onnxruntime import OrtValue

        whole = super().to_device(array)
        if dtype in _AS_BITS:
            return OrtValue.ortvalue_from_numpy_with_onnx_type(whole, _AS_BITS[dtype])
        return OrtValue.ortvalue_from_numpy(whole)

    def to_host(self, tensor: OrtValue) -> Array:
        bits = _BITS.get(tensor.data_type())
        if bits is None:
            return np.array(tensor.numpy())  # what it gives is the tensor's own memory, and does not keep it
        found = np.empty(tuple(tensor.shape()), bits)
        ctypes.memmove(found.ctypes.data, tensor.data_ptr(), found.nbytes)
        return found

    def fetch(self, tensor: OrtValue) -> Callable[[], Array]:
        return lambda: self.to_host(tensor)

    def cut_patches(self, latents: Array, arch: TransformerArch) -> OrtValue:
        return self.to_device(patchify(latents, arch))

    def join_patches(self, patches: OrtValue, grid: tuple[int, int, int], arch: TransformerArch) -> OrtValue:
        return self.to_device(unpatchify(self.to_host(patches), grid, arch))
