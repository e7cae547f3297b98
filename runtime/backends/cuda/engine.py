"""The `cuda` target: plans executed on one stream by compiled kernels, cuBLASLt and cuDNN. A tensor is a `DeviceArray`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime import strict_json
from runtime.backends.base import Array
from runtime.backends.cuda.array import Unit
from runtime.backends.cuda.attention import Attention
from runtime.backends.cuda.attention_kernels import AttentionKernels
from runtime.backends.cuda.clip_kernels import ClipKernels
from runtime.backends.cuda.convolution import Convolution, fuses_residual
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.kernels import Kernels
from runtime.backends.cuda.linear import Linear
from runtime.backends.cuda.plan import COUNTS, FLAGS, PLAN_VERSION, Buffer, Plan, Step, StepKind, View
from runtime.backends.cuda.plan_checks import REBUILD, check_plan, view_roots
from runtime.backends.cuda.self_attention import SelfAttention
from runtime.backends.cuda.text_kernels import TextKernels
from runtime.backends.cuda.vae_kernels import VaeKernels
from runtime.errors import EngineError
from runtime.specs import DType, Precision, StageSpec, match_shapes, resolve


class CudaEngine:
    """One stage's plan. Buffers live from the step that writes them to the last that reads them."""

    def __init__(self, plan: Plan, stage: StageSpec, backend: "CudaBackend") -> None:
        self._plan, self._stage, self._backend = plan, stage, backend
        self._buffers = {buffer.name: buffer for buffer in plan.buffers}
        self._views = {view.name: view for view in plan.views}
        self._roots = view_roots(plan)
        self._dropped = self._last_uses()

    def run(self, tensors: Mapping[str, DeviceArray], *, consumed: Collection[str] = ()) -> dict[str, DeviceArray]:
        extents = match_shapes(self._stage, {tensor.name: tensors[tensor.name].shape for tensor in self._stage.inputs})
        arrays = dict(tensors)
        try:
            for step, dropped in zip(self._plan.steps, self._dropped, strict=True):
                self._run_step(step, arrays, extents)
                for name in dropped:
                    if name in self._buffers:
                        arrays.pop(name, None)
                    elif name in consumed:
                        arrays[name].free()
            return {name: self._array(arrays, array) for name, array in self._plan.outputs.items()}
        except (ValueError, TypeError, LookupError, ArithmeticError) as exc:  # a plan is a file, which may ask for anything
            raise EngineError(f"{self._stage.name}: the plan's arrays do not fit its steps: {exc}", hint=REBUILD) from exc

    def close(self) -> None:
        """Nothing is held between runs."""

    def _run_step(self, step: Step, arrays: dict[str, DeviceArray], extents: Mapping[str, int]) -> None:
        for name in step.outputs.values():
            if name in arrays:
                continue  # written in parts, by several steps
            buffer = self._buffers[name]
            arrays[name] = self._backend.allocate(tuple(resolve(axis, extents) for axis in buffer.shape), buffer)
        given = {argument: self._array(arrays, name) for argument, name in step.inputs.items()}
        made = self._backend.execute(step, given, {argument: arrays[name] for argument, name in step.outputs.items()})
        arrays |= {step.outputs[argument]: array for argument, array in made.items()}

    def _array(self, arrays: Mapping[str, DeviceArray], name: str) -> DeviceArray:
        views: list[View] = []
        while (view := self._views.get(name)) is not None:
            views.append(view)
            name = view.source
        array = arrays[name]
        for view in reversed(views):
            array = (array.rows if view.axis == 0 else array.columns)(view.start, view.stop)
        return array

    def _last_uses(self) -> list[list[str]]:
        """After each step, the buffers and inputs that nothing reads any more."""
        kept = {self._root(name) for name in self._plan.outputs.values()}
        dropped: list[list[str]] = []
        for step in reversed(self._plan.steps):
            used = {self._root(name) for name in (*step.inputs.values(), *step.outputs.values())}
            dropped.append(sorted(used - kept))
            kept |= used
        return dropped[::-1]

    def _root(self, name: str) -> str:
        return self._roots.get(name, name)


class Libraries:
    """The libraries and kernels that plans call, opened on one device; whoever opened them closes them.

    Raises:
        EngineError: no kernels for the device's architecture, or a library is missing.
    """

    def __init__(self, device: Device, kernels: Mapping[str, bytes]) -> None:
        cubin = kernels.get(device.arch)
        if cubin is None:
            raise EngineError(
                f"{device.name} is {device.arch}; this bundle has kernels for {', '.join(kernels)}",
                hint=f"rebuild it with `wanrt build-engines --target cuda --arch {device.arch}`",
            )
        self.kernels = Kernels(device, cubin)
        self.text = TextKernels(device, cubin)
        self.clip = ClipKernels(device, cubin)
        self.linear = Linear(device)
        self.attention = Attention(device)
        self.attention_kernels = AttentionKernels(device, cubin)
        self.self_attention = SelfAttention(self.attention, self.attention_kernels)
        self.convolution = Convolution(device)
        self.vae = VaeKernels(device, cubin, self.linear)

    def close(self) -> None:
        self.convolution.close()
        self.attention.close()
        self.linear.close()


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
        self.attention = attention
        self.device = self._open_device()
        try:
            self._libraries = self._open_libraries(kernels)
        except BaseException:
            self.device.close()
            raise
        libraries = self._libraries
        self._run: dict[StepKind, Callable[..., Mapping[str, DeviceArray] | None]] = {
            StepKind.ADD: self._add,
            StepKind.CONVERT: libraries.kernels.convert,
            StepKind.GEMV: self._gemv,
            StepKind.NORM: libraries.kernels.norm,
            StepKind.RESIDUAL: libraries.kernels.gated_residual,
            StepKind.RESIDUAL_NORM: libraries.kernels.residual_norm,
            StepKind.QK_NORM_ROPE: libraries.kernels.qk_norm_rope,
            StepKind.QUANTIZE_ROWS: libraries.kernels.quantize_rows,
            StepKind.LINEAR: self._linear,
            StepKind.ATTENTION: self._attend,
            StepKind.QUANTIZE_CENTRED: self._quantize_centred,
            StepKind.RESTORE: libraries.attention_kernels.restore,
            StepKind.FOLD_OFFSET: libraries.attention_kernels.fold_offset,
            StepKind.GELU: libraries.kernels.gelu,
            StepKind.RMS_NORM: libraries.text.rms_norm,
            StepKind.RESIDUAL_RMS_NORM: libraries.text.residual_rms_norm,
            StepKind.LAYER_NORM: libraries.clip.layer_norm,
            StepKind.RESIDUAL_LAYER_NORM: libraries.clip.residual_layer_norm,
            StepKind.EMBED_TOKENS: libraries.clip.embed_tokens,
            StepKind.GATED_GELU: libraries.text.gated_gelu,
            StepKind.BIASED_ATTENTION: libraries.text.biased_attention,
            StepKind.CHANNELS_LAST: libraries.vae.channels_last,
            StepKind.PLANES: libraries.vae.planes,
            StepKind.CHANNEL_NORM: libraries.vae.channel_norm,
            StepKind.CONVOLUTION: self._convolve,
            StepKind.UPSAMPLE: libraries.vae.upsample,
            StepKind.FRAME_ATTENTION: libraries.vae.frame_attention,
            StepKind.ZEROS: libraries.vae.zeros,
            StepKind.ADD_AVERAGE_DOWN: libraries.vae.add_average_down,
            StepKind.ADD_DUPLICATE_UP: libraries.vae.add_duplicate_up,
        }

    def _open_device(self) -> Device:
        return Device()

    def _open_libraries(self, kernels: Mapping[str, bytes]) -> Libraries:
        return Libraries(self.device, kernels)

    def open_engine(self, path: Path, stage: StageSpec) -> CudaEngine:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise EngineError(f"{stage.name}: {path.name} cannot be read: {exc}", hint=REBUILD) from exc
        plan = strict_json.decode(
            Plan, text, error=lambda message: EngineError(f"{stage.name}: {path.name}: {message}", hint=REBUILD)
        )
        if plan.version != PLAN_VERSION or plan.stage != stage.name:
            raise EngineError(
                f"{path.name}: plan version {plan.version} of {plan.stage}, expected {PLAN_VERSION} of {stage.name}"
            )
        if self.attention is Precision.FP8 and plan.fp8_attention is not None:
            plan = plan.fp8_attention
        check_plan(plan, stage)
        return CudaEngine(plan, stage, self)

    def to_device(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        return self.device.from_host(np.ascontiguousarray(array), dtype)

    def to_host(self, tensor: DeviceArray) -> Array:
        return self.device.to_host(tensor)

    def allocate(self, shape: tuple[int, ...], buffer: Buffer) -> DeviceArray:
        """An array for a buffer of a plan, with the spare rows that it asks for."""
        spare = -shape[0] % buffer.row_multiple if buffer.row_multiple > 1 else 0
        array = self.device.empty((shape[0] + spare, *shape[1:]) if spare else shape, buffer.dtype)
        return array.sparing_rows(spare) if spare else array

    def execute(self, step: Step, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> Mapping[str, DeviceArray]:
        """Queue one step of a plan on the stream.

        Returns:
            Outputs that are more than the array given for them, by argument: the same memory, with its unit.
        """
        return self._run[step.kind](**inputs, **outputs, **_arguments(step)) or {}

    def close(self) -> None:
        """Release libraries, kernels and all memory of the device."""
        try:
            self._libraries.close()
        finally:
            self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _attend(
        self, query: DeviceArray, key: DeviceArray, value: DeviceArray, out: DeviceArray, *, num_heads: int
    ) -> Mapping[str, DeviceArray]:
        self._libraries.self_attention.run(query, key, value, out, num_heads=num_heads)
        return {"out": replace(out, unit=value.unit)}  # a mean of values has their unit

    def _quantize_centred(
        self, x: DeviceArray, out: DeviceArray, scale: DeviceArray, offset: DeviceArray
    ) -> Mapping[str, DeviceArray]:
        self._libraries.attention_kernels.quantize_centred(x, out, scale, offset)
        return {"out": replace(out, unit=Unit(scale, offset))}

    def _linear(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        out: DeviceArray,
        *,
        bias: DeviceArray | None = None,
        x_scale: DeviceArray | None = None,
        weight_scale: DeviceArray | None = None,
        **flags: bool,
    ) -> None:
        if x.unit is not None:  # its offset is in the bias, see StepKind.FOLD_OFFSET
            x_scale = x.unit.scale
        self._libraries.linear.run(x, weight, bias, out, x_scale=x_scale, weight_scale=weight_scale, **flags)

    def _add(self, a: DeviceArray, b: DeviceArray, out: DeviceArray) -> None:
        # the six rows of a block's modulation are one row to add to each row of the time modulation
        columns = out.shape[1]
        a, b = (array if array.shape[1] == columns else array.reshape(1, columns) for array in (a, b))
        self._libraries.kernels.add(a, b, out)

    def _convolve(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        out: DeviceArray,
        *,
        residual: DeviceArray | None = None,
        pad_top: int,
        pad_left: int,
        pad_bottom: int,
        pad_right: int,
        time_stride: int,
        space_stride: int,
    ) -> None:
        fused = residual is None or fuses_residual(out)
        self._libraries.convolution.run(
            x, weight, bias, out, residual=residual if fused else None, pads=(pad_top, pad_left, pad_bottom, pad_right),
            time_stride=time_stride, space_stride=space_stride,
        )  # fmt: skip
        if residual is not None and not fused:
            rows = (out.size // out.shape[-1], out.shape[-1])
            self._libraries.kernels.gated_residual(residual.reshape(*rows), out.reshape(*rows), out=out.reshape(*rows))

    def _gemv(self, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, out: DeviceArray, *, silu_input: bool) -> None:
        # a plan may declare one row of outputs as several, as the six rows of modulation
        self._libraries.kernels.gemv(x, weight, bias, out=out.reshape(x.shape[0], weight.shape[0]), silu_input=silu_input)


def _arguments(step: Step) -> dict[str, Any]:
    """A step's numbers as the keyword arguments of what it calls."""
    return {
        name: bool(value) if name in FLAGS else int(value) if name in COUNTS else value for name, value in step.numbers.items()
    }
