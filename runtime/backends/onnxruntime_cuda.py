"""ONNX Runtime's CUDA provider, for the networks of the `cuda` target that are not plans. A tensor is an `OrtValue` on the GPU."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.backends.base import Array
from runtime.backends.onnxruntime import check_outputs, execution_error, open_session
from runtime.specs import DType, StageSpec, match_shapes

PROVIDER = "CUDAExecutionProvider"


class OnnxRuntimeCudaEngine:
    """One stage in one session on the GPU; inputs, weights and outputs stay there."""

    def __init__(self, path: Path, stage: StageSpec, *, num_threads: int) -> None:
        self._session = open_session(path, stage, provider=PROVIDER, num_threads=num_threads)
        self._stage = stage

    def run(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        shapes = {tensor.name: tensors[tensor.name].shape() for tensor in self._stage.inputs}
        extents = match_shapes(self._stage, shapes)
        binding = self._session.io_binding()
        for tensor in (*self._stage.inputs, *self._stage.weights):
            binding.bind_ortvalue_input(tensor.name, tensors[tensor.name])
        for tensor in self._stage.outputs:
            binding.bind_output(tensor.name, "cuda", 0)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as exc:
            raise execution_error(self._stage, shapes, exc) from exc
        outputs = binding.get_outputs()
        check_outputs(self._stage, extents, [output.shape() for output in outputs])
        return {tensor.name: output for tensor, output in zip(self._stage.outputs, outputs, strict=True)}

    def close(self) -> None:
        del self._session


class OnnxRuntimeCudaBackend:
    """ONNX Runtime on the first GPU."""

    name = "onnxruntime-cuda"

    def __init__(self, *, num_threads: int = 0) -> None:
        self._num_threads = num_threads

    def open_engine(self, path: Path, stage: StageSpec) -> OnnxRuntimeCudaEngine:
        return OnnxRuntimeCudaEngine(path, stage, num_threads=self._num_threads)

    def to_device(self, array: Array, dtype: DType | None = None) -> Any:
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)

    def to_host(self, tensor: Any) -> Array:
        host: Array = tensor.numpy()
        return host

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Tensors and sessions release their memory themselves."""
