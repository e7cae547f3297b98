"""The `cpu` target: engines run by ONNX Runtime's CPU provider. A tensor is a NumPy array."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.backends.base import Array
from runtime.errors import EngineError
from runtime.geometry import patchify, unpatchify
from runtime.specs import DType, StageSpec, match_shapes, resolve
from runtime.variants import TransformerArch

_ORT_TYPES = {
    DType.F32: "tensor(float)",
    DType.F16: "tensor(float16)",
    DType.BF16: "tensor(bfloat16)",
    DType.F8_E4M3: "tensor(float8e4m3fn)",
    DType.I64: "tensor(int64)",
    DType.U8: "tensor(uint8)",
}


class OnnxRuntimeEngine:
    """One stage in one ONNX Runtime session on the CPU."""

    def __init__(self, path: Path, stage: StageSpec, *, num_threads: int) -> None:
        self._session = _open_session(path, stage, num_threads=num_threads)
        self._stage = stage
        self._outputs = [tensor.name for tensor in stage.outputs]

    def run(self, tensors: Mapping[str, Array], *, consumed: Collection[str] = ()) -> dict[str, Array]:
        shapes = {tensor.name: self._shape(tensors[tensor.name]) for tensor in self._stage.inputs}
        extents = match_shapes(self._stage, shapes)
        try:
            outputs = self._compute(tensors)
        except Exception as exc:  # ONNX Runtime raises its own unrelated exception types
            raise EngineError(
                f"{self._stage.name}: execution failed with {shapes}: {exc}",
                hint="with too little memory, lower --size or --frames or use --tile; otherwise rebuild the bundle",
            ) from exc
        _check_outputs(self._stage, [self._shape(output) for output in outputs], extents)
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        del self._session

    def _compute(self, tensors: Mapping[str, Any]) -> Sequence[Any]:
        outputs: Sequence[Any] = self._session.run(self._outputs, tensors)
        return outputs

    def _shape(self, tensor: Any) -> tuple[int, ...]:
        shape: tuple[int, ...] = tensor.shape
        return shape


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

    def to_device(self, array: Array, dtype: DType | None = None) -> Array:
        return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))  # a mapped file may hold tensors at odd places

    def to_host(self, tensor: Array) -> Array:
        return tensor

    def fetch(self, tensor: Array) -> Callable[[], Array]:
        return lambda: tensor

    def cut_patches(self, latents: Array, arch: TransformerArch) -> Array:
        return patchify(latents, arch)

    def join_patches(self, patches: Array, grid: tuple[int, int, int], arch: TransformerArch) -> Array:
        return unpatchify(patches, grid, arch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing is held outside of engines and arrays."""


def _open_session(path: Path, stage: StageSpec, *, num_threads: int) -> Any:
    """A session of ONNX Runtime's CPU provider, its inputs and outputs compared with the stage's.

    Raises:
        EngineError: it cannot be opened, or is not the stage's.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # an arena would keep every stage's peak until the end
    options.enable_mem_pattern = False  # a decoded video's peak: 460 MiB without the planned block, 567 with it
    options.intra_op_num_threads = num_threads
    # Every session has its own threads; left to spin, they take the cores from the next stage's (0.40 s a step against 0.87).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # ONNX Runtime raises its own unrelated exception types
        raise EngineError(
            f"{stage.name}: ONNX Runtime {onnxruntime.__version__} cannot open {path.name}: {exc}",
            hint="rebuild the bundle with `wanrt build-engines`, or update onnxruntime",
        ) from exc
    _check_against_spec(session, stage)
    return session


def _check_outputs(stage: StageSpec, shapes: Sequence[tuple[int, ...]], extents: Mapping[str, int]) -> None:
    for tensor, shape in zip(stage.outputs, shapes, strict=True):
        expected = tuple(resolve(axis, extents) for axis in tensor.shape)
        if shape != expected:
            raise EngineError(
                f"{stage.name}: {tensor.name} came out as {list(shape)}, expected {list(expected)}",
                hint="the bundle is damaged or was built by another version; rebuild it",
            )


def _check_against_spec(session: Any, stage: StageSpec) -> None:
    for given, declared in (
        (session.get_inputs(), (*stage.inputs, *stage.weights)),
        (session.get_outputs(), stage.outputs),
    ):
        found = [(value.name, value.type, _axes(value.shape)) for value in given]
        wanted = [(tensor.name, _ORT_TYPES[tensor.dtype], _axes(tensor.shape)) for tensor in declared]
        if found != wanted:
            wrong = next((pair for pair in zip(found, wanted, strict=False) if pair[0] != pair[1]), (found, wanted))
            raise EngineError(
                f"{stage.name}: the engine has {wrong[0]}, this bundle's architecture needs {wrong[1]}",
                hint="the bundle is damaged or was built by another version; rebuild it",
            )


def _axes(shape: tuple[int | str, ...] | list[int | str]) -> list[int | str | None]:
    """A shape with every symbol replaced by None: the spec's names are a convention, extents are the contract."""
    return [axis if isinstance(axis, int) else None for axis in shape]
