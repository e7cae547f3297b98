"""The `emulated` target: typed graphs in float32 operators with the rounding of their types, run by ONNX Runtime's CPU provider.

It answers what the numbers of a bf16, fp16 or fp8 engine should be, not how fast one is. A tensor is an `onnxruntime.OrtValue`: NumPy
has no bf16 and no fp8.
"""

import ctypes
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.backends.base import Array
from runtime.backends.onnxruntime import check_outputs, open_session
from runtime.errors import EngineError
from runtime.geometry import patchify, unpatchify
from runtime.specs import DType, StageSpec, match_shapes
from runtime.variants import TransformerArch

OrtValue = Any
_AS_BITS = {DType.BF16: 16, DType.F8_E4M3: 17}
"""ONNX's numbers of the element types that travel as their bits."""
_BITS = {"tensor(bfloat16)": np.uint16, "tensor(float8e4m3fn)": np.uint8}


class EmulatedEngine:
    """One stage in one ONNX Runtime session on the CPU."""

    def __init__(self, path: Path, stage: StageSpec, *, num_threads: int) -> None:
        self._session = open_session(path, stage, num_threads=num_threads)
        self._stage = stage
        self._outputs = [tensor.name for tensor in stage.outputs]

    def run(self, tensors: Mapping[str, OrtValue], *, consumed: Collection[str] = ()) -> dict[str, OrtValue]:
        shapes = {tensor.name: tuple(tensors[tensor.name].shape()) for tensor in self._stage.inputs}
        extents = match_shapes(self._stage, shapes)
        try:
            outputs = self._session.run_with_ort_values(self._outputs, dict(tensors))
        except Exception as exc:  # ONNX Runtime raises its own unrelated exception types
            raise EngineError(
                f"{self._stage.name}: execution failed with {shapes}: {exc}",
                hint="with too little memory, lower --size or --frames or use --tile; otherwise rebuild the bundle",
            ) from exc
        check_outputs(self._stage, [tuple(output.shape()) for output in outputs], extents)
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        del self._session


class EmulatedBackend:
    """ONNX Runtime on the CPU, over tensors of any element type.

    Args:
        num_threads: threads inside an operator; 0 lets ONNX Runtime take one per physical core.
    """

    name = "emulated"

    def __init__(self, *, num_threads: int = 0) -> None:
        self._num_threads = num_threads

    def open_engine(self, path: Path, stage: StageSpec) -> EmulatedEngine:
        return EmulatedEngine(path, stage, num_threads=self._num_threads)

    def to_device(self, array: Array, dtype: DType | None = None) -> OrtValue:
        from onnxruntime import OrtValue

        whole = np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))  # a mapped file may hold tensors at odd places
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing is held outside of engines and tensors."""
