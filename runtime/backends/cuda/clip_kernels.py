"""Launches the image encoder's kernel: layer norms of a float32 residual stream.

Arrays are as in `runtime.backends.cuda.kernels`: matrices with any `row_stride`, columns in multiples of 8, outputs the caller's.
"""

from runtime.backends.cuda import launch
from runtime.backends.cuda.array import expect
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.specs import DType


class ClipKernels:
    """The image encoder's kernels of one cubin, loaded into `device`'s context; they are unloaded with it.

    Methods raise EngineError for what a kernel cannot do, ValueError for shapes and dtypes that do not fit.

    Args:
        cubin: what `engines.targets.cuda.compile.compile_kernels` made for `device.arch`.

    Raises:
        CudaError: the cubin is not for this GPU.
    """

    def __init__(self, device: Device, cubin: bytes) -> None:
        self._module = launch.Module(device, cubin)

    def layer_norm(self, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, out: DeviceArray, *, eps: float) -> None:
        """`out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`: x f32 [N, D], weight and bias f32 [D], out bf16."""
        expect(x, DType.F32, x.shape)
        expect(out, DType.BF16, x.shape)
        self._norm("layer_norm_bf16", x, weight, bias, out, eps, x=x)

    def residual_layer_norm(
        self,
        residual: DeviceArray,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        *,
        residual_out: DeviceArray,
        out: DeviceArray,
        eps: float,
    ) -> None:
        """`residual_out = residual + x`, all f32 [N, D], and its `layer_norm` in bf16; residual_out may be residual itself."""
        for array in (residual, x, residual_out):
            expect(array, DType.F32, x.shape)
        expect(out, DType.BF16, x.shape)
        given = {"x": x, "residual": residual, "residual_out": residual_out}
        self._norm("residual_layer_norm_bf16", x, weight, bias, out, eps, **given)

    def embed_tokens(
        self,
        first: DeviceArray,
        x: DeviceArray,
        positions: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        out: DeviceArray,
        *,
        eps: float,
    ) -> None:
        """The layer norm of `concat(first, x) + positions`, all f32: first [1, D], x [N, D], positions and out [N + 1, D]."""
        (rows, columns) = x.shape
        expect(first, DType.F32, (1, columns))
        expect(x, DType.F32, (rows, columns))
        for array in (positions, out):
            expect(array, DType.F32, (rows + 1, columns))
        self._norm("embed_tokens_f32", positions, weight, bias, out, eps, x=x, residual=positions, first=first)

    def _norm(
        self,
        name: str,
        rows: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        out: DeviceArray,
        eps: float,
        *,
        x: DeviceArray,
        residual: DeviceArray | None = None,
        residual_out: DeviceArray | None = None,
        first: DeviceArray | None = None,
    ) -> None:
        for vector in (weight, bias):
            expect(vector, DType.F32, rows.shape[1:])
        self._module.launch(
            name, launch.LAYER_NORM, rows,
            x=x, residual=residual, residual_out=residual_out, first=first, weight=weight, bias=bias, out=out, eps=eps,
        )  # fmt: skip
