"""The `cuda` target: plans executed on one stream by compiled kernels, cuBLASLt and cuDNN. A tensor is a `DeviceArray`."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime import strict_json
from runtime.backends.base import Array
from runtime.backends.cuda.attention import Attention
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.kernels import Kernels
from runtime.backends.cuda.linear import Linear
from runtime.backends.cuda.plan import PLAN_VERSION, Plan, Step, StepKind, View
from runtime.errors import EngineError
from runtime.precision import FP8_MAX
from runtime.specs import DType, Precision, StageSpec, TensorSpec, match_shapes, resolve

_REBUILD = "rebuild the bundle with `wanrt build-engines --target cuda`"


class CudaEngine:
    """One stage's plan. Buffers live from the step that writes them to the last that reads them."""

    def __init__(self, plan: Plan, stage: StageSpec, backend: "CudaBackend") -> None:
        self._plan, self._stage, self._backend = plan, stage, backend
        self._buffers = {buffer.name: buffer for buffer in plan.buffers}
        self._views = {view.name: view for view in plan.views}
        self._dropped = self._last_uses()

    def run(self, tensors: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        extents = match_shapes(self._stage, {tensor.name: tensors[tensor.name].shape for tensor in self._stage.inputs})
        arrays = dict(tensors)
        for step, dropped in zip(self._plan.steps, self._dropped, strict=True):
            for name in step.outputs.values():
                buffer = self._buffers[name]
                shape = tuple(resolve(axis, extents) for axis in buffer.shape)
                arrays[name] = self._backend.device.empty(shape, buffer.dtype)
            given = {argument: self._array(arrays, name) for argument, name in step.inputs.items()}
            self._backend.execute(step, given, {argument: arrays[name] for argument, name in step.outputs.items()})
            for name in dropped:
                arrays.pop(name, None)
        return {name: self._array(arrays, array) for name, array in self._plan.outputs.items()}

    def close(self) -> None:
        """Nothing is held between runs."""

    def _array(self, arrays: dict[str, DeviceArray], name: str) -> DeviceArray:
        view = self._views.get(name)
        if view is None:
            return arrays[name]
        source = self._array(arrays, view.source)
        return (source.rows if view.axis == 0 else source.columns)(view.start, view.stop)

    def _last_uses(self) -> list[list[str]]:
        """After each step, the buffers that nothing reads any more."""
        kept = {self._root(name) for name in self._plan.outputs.values()}
        dropped: list[list[str]] = []
        for step in reversed(self._plan.steps):
            used = {self._root(name) for name in (*step.inputs.values(), *step.outputs.values())}
            dropped.append(sorted((used - kept) & self._buffers.keys()))
            kept |= used
        return dropped[::-1]

    def _root(self, name: str) -> str:
        view: View | None = self._views.get(name)
        return name if view is None else self._root(view.source)


class CudaBackend:
    """One GPU with the libraries and kernels that plans call. Use with `with`.

    Args:
        kernels: compiled kernels, cubin by architecture.
        attention: precision of self-attention's products; fp8 needs sm_89 and head dim 128.

    Raises:
        EngineError: no usable GPU, or no kernels for its architecture.
    """

    name = "cuda"

    def __init__(self, kernels: Mapping[str, bytes], *, attention: Precision = Precision.BF16) -> None:
        self.device = Device()
        cubin = kernels.get(self.device.arch)
        if cubin is None:
            self.device.close()
            raise EngineError(
                f"{self.device.name} is {self.device.arch}; this bundle has kernels for {', '.join(kernels)}",
                hint=f"rebuild it with `wanrt build-engines --target cuda --arch {self.device.arch}`",
            )
        self._kernels = Kernels(self.device, cubin)
        self._linear = Linear(self.device)
        self._attention = Attention(self.device)
        self._fp8_attention = attention is Precision.FP8
        self._run: dict[StepKind, Callable[..., None]] = {
            StepKind.ADD: self._kernels.add,
            StepKind.CONVERT: self._kernels.convert,
            StepKind.GEMV: self._gemv,
            StepKind.NORM: self._kernels.norm,
            StepKind.RESIDUAL: self._kernels.gated_residual,
            StepKind.RESIDUAL_NORM: self._kernels.residual_norm,
            StepKind.QK_NORM_ROPE: self._kernels.qk_norm_rope,
            StepKind.QUANTIZE_ROWS: self._kernels.quantize_rows,
            StepKind.LINEAR: self._linear.run,
            StepKind.ATTENTION: self._attend,
        }

    def open_engine(self, path: Path, stage: StageSpec) -> CudaEngine:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise EngineError(f"{stage.name}: {path.name} cannot be read: {exc}", hint=_REBUILD) from exc
        plan = strict_json.decode(
            Plan, text, error=lambda message: EngineError(f"{stage.name}: {path.name}: {message}", hint=_REBUILD)
        )
        if plan.version != PLAN_VERSION or plan.stage != stage.name:
            raise EngineError(
                f"{path.name}: plan version {plan.version} of {plan.stage}, expected {PLAN_VERSION} of {stage.name}"
            )
        _check_names(plan, (*stage.inputs, *stage.weights), stage)
        return CudaEngine(plan, stage, self)

    def to_device(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        return self.device.from_host(np.ascontiguousarray(array), dtype)

    def to_host(self, tensor: DeviceArray) -> Array:
        return self.device.to_host(tensor)

    def execute(self, step: Step, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> None:
        """Queue one step of a plan on the stream."""
        self._run[step.kind](**inputs, **outputs, **_arguments(step))

    def close(self) -> None:
        """Release libraries, kernels and all memory of the device."""
        self._attention.close()
        self._linear.close()
        self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _attend(self, query: DeviceArray, key: DeviceArray, value: DeviceArray, out: DeviceArray, *, num_heads: int) -> None:
        # fp8 pays for long sequences; cross-attention's 512 keys are not worth the quantisation
        if not self._fp8_attention or query.shape != key.shape:
            self._attention.run(query, key, value, out, num_heads=num_heads)
            return
        (narrow_query, query_scale), (narrow_key, key_scale), (narrow_value, value_scale) = (
            self._quantised(array) for array in (query, key, value)
        )
        narrow_out = self.device.empty(out.shape, DType.F8_E4M3)  # in units of the value's scale
        self._attention.run(
            narrow_query, narrow_key, narrow_value, narrow_out, num_heads=num_heads, descale_q=query_scale, descale_k=key_scale
        )
        self._kernels.dequantize_tensor(narrow_out, value_scale, out)

    def _gemv(self, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, out: DeviceArray, *, silu_input: bool) -> None:
        # a plan may declare one row of outputs as several, as the six rows of modulation
        self._kernels.gemv(x, weight, bias, out=out.reshape(x.shape[0], weight.shape[0]), silu_input=silu_input)

    def _quantised(self, array: DeviceArray) -> tuple[DeviceArray, DeviceArray]:
        scale = self._kernels.amax(array, divide_by=FP8_MAX)
        narrow = self.device.empty(array.shape, DType.F8_E4M3)
        self._kernels.quantize_tensor(array, scale, narrow)
        return narrow, scale


_FLAGS = frozenset(("add_one", "gelu", "silu_input"))
_COUNTS = frozenset(("num_heads",))


def _arguments(step: Step) -> dict[str, Any]:
    """A step's numbers as the keyword arguments of what it calls."""
    return {
        name: bool(value) if name in _FLAGS else int(value) if name in _COUNTS else value
        for name, value in step.numbers.items()
    }


def _check_names(plan: Plan, given: Iterable[TensorSpec], stage: StageSpec) -> None:
    """Check that every array a plan reads exists by then: given, a view of one that exists, or written by an earlier step."""
    known = {tensor.name for tensor in given}
    views = {view.name: view.source for view in plan.views}
    buffers = {buffer.name for buffer in plan.buffers}

    def exists(name: str, depth: int = 0) -> bool:
        return name in known or (depth < len(views) + 1 and name in views and exists(views[name], depth + 1))

    for step in plan.steps:
        missing = [name for name in step.inputs.values() if not exists(name)] + [
            n for n in step.outputs.values() if n not in buffers
        ]
        if missing:
            raise EngineError(f"{stage.name}: the plan uses {missing[0]}, which does not exist by then", hint=_REBUILD)
        known |= set(step.outputs.values())
    if {tensor.name for tensor in stage.outputs} != plan.outputs.keys() or not all(
        exists(name) for name in plan.outputs.values()
    ):
        raise EngineError(f"{stage.name}: the plan's outputs are {sorted(plan.outputs)}", hint=_REBUILD)
