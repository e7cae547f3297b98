"""Matrix products on cuBLASLt: `out = epilogue(x · weightᵀ + bias)`, in bf16, fp16 or fp32, or in fp8 with scales on both sides.

cuBLASLt is column-major, so it is asked for outᵀ [O, M] = weight [O, K] · xᵀ [K, M]: its A is our weight, its B our x, and its bias,
one value a row of outᵀ, is ours. That is also the only layout (TN) in which Hopper multiplies fp8.
"""

import math
from types import TracebackType
from typing import Self

import numpy as np

from runtime.backends.cuda.cublaslt import WORKSPACE_BYTES, Problem, Product, ProductPlan, open_library
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.recent import recall
from runtime.errors import EngineError
from runtime.specs import DType

_MOST_PLANS = 1024
_FP8_MULTIPLE = 16  # bytes: cuBLASLt refuses fp8 operands whose rows are not whole 16-byte words


class Linear:
    """Matrix products on a device's stream. Use with `with`: the library's handle and descriptors are released at the end.

    Args:
        device: where the arrays live.

    Raises:
        EngineError: nvmath-python or cuBLAS is not installed.
    """

    def __init__(self, device: Device) -> None:
        self._library = open_library()
        self._device = device
        try:
            self._handle = self._library.create()
        except Exception as exc:  # nvmath raises its own types for a missing library
            raise EngineError(
                f"cuBLASLt cannot be opened: {exc}", hint='`pip install "wanrt[cuda]"` brings nvidia-cublas'
            ) from exc
        self._plans: dict[Problem, ProductPlan] = {}
        self._workspace = device.empty((WORKSPACE_BYTES,), DType.F8_E4M3)
        self._host_scalars = np.array([1.0, 0.0], np.float32)  # alpha, beta
        self._device_zero = device.zeros((1,), DType.F32)
        self._ones = device.from_host(np.ones(1, np.float32))

    def run(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray | None,
        out: DeviceArray,
        *,
        x_scale: DeviceArray | None = None,
        weight_scale: DeviceArray | None = None,
        gelu: bool = False,
        fast_accumulation: bool = False,
        choice: int = 0,
    ) -> None:
        """`out = gelu(x_scale · weight_scale · (x · weightᵀ) + bias)`, queued on the stream; accumulated in fp32.

        Args:
            x: [M, K], any row stride.
            weight: [O, K] of the same dtype.
            bias: [O], or None; of out's dtype.
            out: [M, O], any row stride; bf16 for fp8 operands.
            x_scale: fp8 only: f32 [M], one factor a row, or [1] for all rows.
            weight_scale: fp8 only: f32 [O], one factor an output channel.
            gelu: apply the tanh approximation of GELU.
            fast_accumulation: fp8 only: let Hopper's tensor cores keep sums in their own registers, which hold fewer bits than fp32.
                One H200: 8-21% faster; relative error 2.3e-3 to 2.6e-3 after a norm or after attention (exact sums: 1.7e-3, all of
                it bf16's rounding; fp8 operands: 3.7e-2), 3.6e-3 after a GELU, but 2.5e-2, all of it too small, where the weights
                behind a GELU have a mean and sums thus one sign.
            choice: which of the library's candidates runs; 0 is its favourite. It is the caller's and never measured here,
                because another kernel may sum in another order, and results must be the same in every run.

        Raises:
            EngineError: the shapes do not fit each other, or cuBLASLt has no kernel for them on this device.
        """
        problem = self._problem(x, weight, bias, out, x_scale, weight_scale, gelu, fast_accumulation)
        plan = recall(self._plans, problem, self._plan, most=_MOST_PLANS)
        if choice >= plan.num_choices:
            raise EngineError(f"{problem}: choice {choice} of {plan.num_choices} kernels")
        attribute = self._library.MatmulDescAttribute
        pointers = {} if bias is None else {attribute.BIAS_POINTER: bias.pointer}
        alpha, beta = int(self._host_scalars.ctypes.data), int(self._host_scalars.ctypes.data) + 4
        row_scale = x_scale  # a name of its own: x_scale must not be given back before the product is queued
        if problem.scalar_x_scale and x_scale is not None:
            alpha, beta = x_scale.pointer, self._device_zero.pointer
            row_scale = self._ones_of(problem.tokens)
        if row_scale is not None and weight_scale is not None:
            pointers |= {attribute.A_SCALE_POINTER: weight_scale.pointer, attribute.B_SCALE_POINTER: row_scale.pointer}
        weight_layout, x_layout, out_layout = plan.layouts
        arguments = (
            *(self._handle, plan.operation, alpha, weight.pointer, weight_layout, x.pointer, x_layout, beta),
            *(out.pointer, out_layout, out.pointer, out_layout, plan.algorithm(choice)),
            *(self._workspace.pointer, WORKSPACE_BYTES, self._device.stream),
        )
        self._device.calls.put(Product(self._library, problem, plan, pointers, arguments, kept=row_scale))

    def num_choices(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray | None,
        out: DeviceArray,
        *,
        x_scale: DeviceArray | None = None,
        weight_scale: DeviceArray | None = None,
        gelu: bool = False,
        fast_accumulation: bool = False,
    ) -> int:
        """How many kernels `run` can choose from for these arrays."""
        problem = self._problem(x, weight, bias, out, x_scale, weight_scale, gelu, fast_accumulation)
        return recall(self._plans, problem, self._plan, most=_MOST_PLANS).num_choices

    def close(self) -> None:
        for plan in self._plans.values():
            plan.close()
        self._plans.clear()
        if self._handle:
            self._library.destroy(self._handle)
            self._handle = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _problem(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray | None,
        out: DeviceArray,
        x_scale: DeviceArray | None,
        weight_scale: DeviceArray | None,
        gelu: bool,
        fast_accumulation: bool,
    ) -> Problem:
        (tokens, features), outputs = x.shape, weight.shape[0]
        scales = {"x_scale": (x_scale, {tokens, 1}), "weight_scale": (weight_scale, {outputs})}
        fp8 = x.dtype is DType.F8_E4M3
        if weight.shape != (outputs, features) or out.shape != (tokens, outputs) or weight.dtype is not x.dtype:
            raise EngineError(
                f"linear: x {x.dtype} {list(x.shape)}, weight {weight.dtype} {list(weight.shape)} and out {list(out.shape)} do not fit"
            )
        if bias is not None and bias.shape != (outputs,):
            raise EngineError(f"linear: bias {list(bias.shape)}, expected [{outputs}]")
        for name, (scale, sizes) in scales.items():
            if (scale is not None) != fp8 or (scale is not None and (scale.size not in sizes or scale.dtype is not DType.F32)):
                given = "none" if scale is None else f"{scale.dtype} {list(scale.shape)}"
                raise EngineError(
                    f"linear: {name} is {given}; {x.dtype} operands need {f'F32 {sorted(sizes)}' if fp8 else 'none'}"
                )
        if fp8 and (features % _FP8_MULTIPLE or outputs % _FP8_MULTIPLE):
            raise EngineError(
                f"linear: fp8 needs K and O in multiples of {_FP8_MULTIPLE}, got K={features}, O={outputs}",
                hint="use bf16 for this network",
            )
        return Problem(
            tokens=tokens,
            features=features,
            outputs=outputs,
            dtypes=(x.dtype, weight.dtype, out.dtype),
            strides=(x.row_stride, weight.row_stride, out.row_stride),
            alignments=(_alignment(x.pointer), _alignment(weight.pointer), _alignment(out.pointer)),
            bias=None if bias is None else bias.dtype,
            gelu=gelu,
            fast_accumulation=fp8 and fast_accumulation,
            scalar_x_scale=x_scale is not None and x_scale.size == 1 and tokens > 1,
        )

    def _plan(self, problem: Problem) -> ProductPlan:
        try:
            plan = ProductPlan(
                self._library,
                self._handle,
                problem,
                anywhere=self._workspace.pointer,
            )
        except self._library.cuBLASLtError as exc:
            raise EngineError(f"{problem}: cuBLASLt has no kernel for it on {self._device.name}: {exc}") from exc
        if not plan.num_choices:
            plan.close()
            raise EngineError(f"{problem}: cuBLASLt has no kernel for it on {self._device.name} ({self._device.arch})")
        return plan

    def _ones_of(self, count: int) -> DeviceArray:
        if self._ones.size < count:
            self._ones = self._device.from_host(np.ones(count, np.float32))
        return self._ones


def _alignment(pointer: int) -> int:
    return math.gcd(pointer, 256)
