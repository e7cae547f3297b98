"""The `cuda` target: plans executed on one stream by compiled kernels, cuBLASLt and cuDNN. A tensor is a `DeviceArray`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime import strict_json
from runtime.backends.base import Array
from runtime.backends.cuda.array import Unit
from runtime.backends.cuda.convolution import fuses_residual
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.feed_forward import feed_forward
from runtime.backends.cuda.libraries import Libraries
from runtime.backends.cuda.plan import COUNTS, FLAGS, PLAN_VERSION, Plan, Step, StepKind
from runtime.backends.cuda.plan_checks import REBUILD, check_plan
from runtime.backends.cuda.prepared import CudaEngine
from runtime.errors import EngineError
from runtime.geometry import token_grid
from runtime.specs import DType, Precision, StageSpec
from runtime.variants import TransformerArch


class CudaBackend:
    """One GPU with the libraries and kernels that plans call. Use with `with`.

    Args:
        kernels: compiled kernels, cubin by architecture.
        attention: precision of self-attention's products; fp8 needs sm_89 and head dim 128.
        plans: by file, as they were when it was first opened; whoever opens the same files may share them.

    Raises:
        EngineError: no usable GPU, or no kernels for its architecture.
    """

    name = "cuda"

    def __init__(
        self,
        kernels: Mapping[str, bytes],
        *,
        attention: Precision = Precision.BF16,
        plans: dict[Path, Plan] | None = None,
    ) -> None:
        self.plans: dict[Path, Plan] = {} if plans is None else plans
        self.device = self._open_device()
        try:
            self._libraries = self._open_libraries(kernels)
        except BaseException:
            self.device.close()
            raise
        try:
            self.attention = attention
        except BaseException:
            self.close()
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
            StepKind.FEED_FORWARD: partial(feed_forward, libraries.kernels, libraries.linear),
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
            StepKind.COLOURS: libraries.vae.colours,
        }

    @property
    def attention(self) -> Precision:
        """Precision of self-attention's products.

        Raises:
            EngineError: when it is set: there are no such kernels for this GPU.
        """
        return self._attention

    @attention.setter
    def attention(self, asked: Precision) -> None:
        self._libraries.check_attention(asked)
        self._attention = asked

    def _open_device(self) -> Device:
        return Device()

    def _open_libraries(self, kernels: Mapping[str, bytes]) -> Libraries:
        return Libraries(self.device, kernels)

    def open_engine(self, path: Path, stage: StageSpec) -> CudaEngine:
        plan = self.plans.get(path)
        if plan is None:
            plan = self.plans[path] = _read_plan(path, stage.name)
        if plan.version != PLAN_VERSION or plan.stage != stage.name:
            raise EngineError(
                f"{path.name}: plan version {plan.version} of {plan.stage}, expected {PLAN_VERSION} of {stage.name}",
                hint=REBUILD,
            )
        if self.attention is Precision.FP8 and plan.fp8_attention is not None:
            plan = plan.fp8_attention
        check_plan(plan, stage)
        return CudaEngine(plan, stage, self)

    def to_device(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        return self.device.from_host(np.ascontiguousarray(array), dtype)

    def to_host(self, tensor: DeviceArray) -> Array:
        return self.device.to_host(tensor)

    def fetch(self, tensor: DeviceArray) -> Callable[[], Array]:
        return self._libraries.readback.fetch(tensor)

    def cut_patches(self, latents: Array, arch: TransformerArch) -> DeviceArray:
        source = self.to_device(latents)
        shape = math.prod(token_grid(latents.shape, arch)), latents.shape[0] * math.prod(arch.patch_size)
        patches = self.device.empty(shape, DType.F32)
        self._libraries.patches.cut(source, patches, arch.patch_size)
        return patches

    def join_patches(self, patches: DeviceArray, grid: tuple[int, int, int], arch: TransformerArch) -> DeviceArray:
        channels = patches.shape[1] // math.prod(arch.patch_size)
        extents = (extent * size for extent, size in zip(grid, arch.patch_size, strict=True))
        latents = self.device.empty((channels, *extents), DType.F32)
        self._libraries.patches.join(patches, latents, arch.patch_size)
        return latents

    def execute(self, step: Step, inputs: dict[str, DeviceArray], outputs: dict[str, DeviceArray]) -> Mapping[str, DeviceArray]:
        """Queue one step of a plan on the stream, or note its calls while the plan is prepared.

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


def _read_plan(path: Path, stage_name: str) -> Plan:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise EngineError(f"{stage_name}: {path.name} cannot be read: {exc}", hint=REBUILD) from exc
    return strict_json.decode(
        Plan, text, error=lambda message: EngineError(f"{stage_name}: {path.name}: {message}", hint=REBUILD)
    )


def _arguments(step: Step) -> dict[str, Any]:
    """A step's numbers as the keyword arguments of what it calls."""
    return {
        name: bool(value) if name in FLAGS else int(value) if name in COUNTS else value for name, value in step.numbers.items()
    }
