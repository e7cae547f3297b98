"""The `cpu` target: engines run by ONNX Runtime's CPU provider. A tensor is a NumPy array."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime.backends.base import Array
from runtime.errors import EngineError
from runtime.specs import DType, StageSpec, match_shapes

log = logging.getLogger(__name__)

_ORT_TYPES = {
    DType.F32: "tensor(float)",
    DType.F16: "tensor(float16)",
    DType.BF16: "tensor(bfloat16)",
    DType.I64: "tensor(int64)",
}


class OnnxRuntimeEngine:
    """One stage in one ONNX Runtime session."""

    def __init__(self, path: Path, stage: StageSpec, *, num_threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False  # an arena would keep every stage's peak until the end
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # ONNX Runtime raises its own unrelated exception types
            raise EngineError(
                f"{stage.name}: ONNX Runtime {onnxruntime.__version__} cannot open {path.name}: {exc}",
                hint="rebuild the bundle with `wanrt build-engines`, or update onnxruntime",
            ) from exc
        self._stage = stage
        self._outputs = [tensor.name for tensor in stage.outputs]
        self._check_against_spec()

    def run(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        match_shapes(self._stage, {tensor.name: tensors[tensor.name].shape for tensor in self._stage.inputs})
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, tensors), strict=True))
        except Exception as exc:
            shapes = {tensor.name: list(tensors[tensor.name].shape) for tensor in self._stage.inputs}
            raise EngineError(f"{self._stage.name}: execution failed with {shapes}: {exc}") from exc

    def close(self) -> None:
        del self._session

    def _check_against_spec(self) -> None:
        for given, declared in (
            (self._session.get_inputs(), (*self._stage.inputs, *self._stage.weights)),
            (self._session.get_outputs(), self._stage.outputs),
        ):
            found = [(value.name, value.type, _axes(value.shape)) for value in given]
            wanted = [(tensor.name, _ORT_TYPES[tensor.dtype], _axes(tensor.shape)) for tensor in declared]
            if found != wanted:
                wrong = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), (found, wanted))
                raise EngineError(
                    f"{self._stage.name}: the engine has {wrong[0]}, this bundle's architecture needs {wrong[1]}",
                    hint="the bundle is damaged or was built by another version; rebuild it",
                )


class OnnxRuntimeBackend:
    """ONNX Runtime on the CPU.

    Args:
        num_threads: threads inside an operator; 0 lets ONNX Runtime take one per physical core.
    """

    name = "onnxruntime"

    def __init__(self, *, num_threads: int = 0) -> None:
        self._num_threads = num_threads

    def open_engine(self, path: Path, stage: StageSpec) -> OnnxRuntimeEngine:
        return OnnxRuntimeEngine(path, stage, num_threads=self._num_threads)

    def to_device(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def to_host(self, tensor: Array) -> Array:
        return tensor


def _axes(shape: tuple[int | str, ...] | list[int | str]) -> list[int | str | None]:
    """A shape with every symbol replaced by None: the spec's names are a convention, extents are the contract."""
    return [axis if isinstance(axis, int) else None for axis in shape]
