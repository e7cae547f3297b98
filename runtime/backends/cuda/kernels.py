"""Launches the fused kernels that `engines.targets.cuda` compiled: norms, rotary embedding, residuals, FP8 quantisation, small products.

Arrays belong to the caller, outputs too; every launch goes to the device's one stream and returns at once. Matrices have rows that are
contiguous and any `row_stride`; x, residual and their like are bf16 [N, D], vectors (gain, shift, gate, weight) f32 with D elements.
D is a multiple of 8. FP8 is E4M3: stored value = value / scale, saturating at 448.
"""

from dataclasses import replace

from runtime.backends.cuda import launch
from runtime.backends.cuda.array import expect
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.specs import DType

GEMV_ROWS = 4  # kGemvRows and kGemvOutputs of engines/targets/cuda/small.cuh
GEMV_OUTPUTS_PER_WARP = 4
GEMV_THREADS = 256
MAX_QUANTIZED_COLUMNS = 16384
AMAX_BLOCKS = 1024  # several for every multiprocessor of any GPU of today; each warp ends in one atomic


class Kernels:
    """The kernels of one cubin, loaded into `device`'s context; they are unloaded with it.

    Methods raise EngineError for what this GPU or a kernel cannot do, ValueError for shapes and dtypes that do not fit.

    Args:
        cubin: what `engines.targets.cuda.compile.compile_kernels` made for `device.arch`.

    Raises:
        CudaError: the cubin is not for this GPU.
    """

    def __init__(self, device: Device, cubin: bytes) -> None:
        self._device = device
        self._module = launch.Module(device, cubin)

    def norm(
        self,
        x: DeviceArray,
        gain: DeviceArray,
        shift: DeviceArray,
        out: DeviceArray,
        *,
        num_clean: DeviceArray | None = None,
        out_scale: DeviceArray | None = None,
        add_one: bool,
        eps: float,
    ) -> None:
        """`out = layer_norm(x) * (gain [+ 1]) + shift`, bf16 or, with its scale per row (amax / 448) in out_scale [N], fp8.

        With num_clean, int64 [1], gain and shift have two rows [2, D]: the first num_clean rows of x take the first, all others the
        second.
        """
        self._norm("norm", x, gain, shift, out, out_scale, add_one, eps, num_clean=num_clean)

    def residual_norm(
        self,
        residual: DeviceArray,
        x: DeviceArray,
        gate: DeviceArray | None = None,
        *,
        gain: DeviceArray,
        shift: DeviceArray,
        residual_out: DeviceArray,
        out: DeviceArray,
        num_clean: DeviceArray | None = None,
        out_scale: DeviceArray | None = None,
        add_one: bool,
        eps: float,
    ) -> None:
        """`residual_out = residual + x * gate` (no gate: 1), and `norm` of it, rounded to bf16 as the next reader sees it.

        residual_out may be residual itself. With num_clean, each of gate, gain and shift has one row for all, or two as in `norm`.
        """
        expect(residual, DType.BF16, x.shape)
        expect(residual_out, DType.BF16, x.shape)
        residuals = (residual, residual_out, gate)
        self._norm("residual_norm", x, gain, shift, out, out_scale, add_one, eps, residuals, num_clean=num_clean)

    def gated_residual(
        self,
        residual: DeviceArray,
        x: DeviceArray,
        gate: DeviceArray | None = None,
        *,
        out: DeviceArray,
        num_clean: DeviceArray | None = None,
    ) -> None:
        """`out = residual + x * gate` (no gate: 1; with num_clean, two rows as in `norm`); out may be residual or x."""
        for array in (x, residual, out):
            expect(array, DType.BF16, x.shape)
        by_row = "" if num_clean is None else "_by_row"
        self._module.launch(
            f"gated_residual{by_row}", launch.GATED_RESIDUAL, x, x=x, residual=residual,
            gate=_vectors(gate, x.shape[1], num_clean), num_clean=_count(num_clean), out=out,
        )  # fmt: skip

    def qk_norm_rope(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        rope_cos: DeviceArray | None = None,
        rope_sin: DeviceArray | None = None,
        *,
        out: DeviceArray,
        num_heads: int,
        eps: float,
    ) -> None:
        """RMS norm over the full width times weight, then each head's adjacent pairs rotated by f32 tables [N, head_dim / 2].

        Without tables nothing is rotated. out is bf16, or fp8 as it is: no element of a normed row exceeds sqrt(D) times the greatest
        weight, 72 at D = 5120, where E4M3 ends at 448 and is as fine for 0.1 as it is for 100 (relative error 2.65e-2 for normal
        numbers of any spread from 0.1 to 3).
        """
        expect(x, DType.BF16, x.shape)
        head_dim, rest = divmod(x.shape[1], num_heads)
        if rest or head_dim % 2:
            raise ValueError(f"{num_heads} heads of {x.shape[1]} columns")
        for table in (rope_cos, rope_sin):
            if table is not None:
                expect(table, DType.F32, (x.shape[0], head_dim // 2))
        if rope_cos is not None and (rope_sin is None or rope_sin.row_stride != rope_cos.row_stride):
            raise ValueError("rope_cos and rope_sin belong together, with the same row stride")
        expect(out, out.dtype, x.shape)
        self._module.launch(
            f"qk_norm_rope_{_suffix(out)}", launch.ROPE, x,
            period=head_dim, aligned=rope_cos is None or (head_dim % 8 == 0 and rope_cos.row_stride % 4 == 0),
            x=x, weight=_vector(weight, x.shape[1]), rope_cos=rope_cos, rope_sin=rope_sin, out=out,
            rope_stride=0 if rope_cos is None else rope_cos.row_stride,
            head_dim=head_dim, head_inverse=-(-(2**32) // head_dim), eps=eps,
        )  # fmt: skip

    def quantize_rows(self, x: DeviceArray, out: DeviceArray, out_scale: DeviceArray) -> None:
        """x as fp8 with one scale a row, amax / 448, in out_scale [N]; up to 16,384 columns."""
        expect(x, DType.BF16, x.shape)
        expect(out, DType.F8_E4M3, x.shape)
        expect(out_scale, DType.F32, x.shape[:1])
        most = MAX_QUANTIZED_COLUMNS
        self._module.launch("quantize_rows", launch.QUANTIZE_ROWS, x, most=most, x=x, out=out, out_scale=out_scale.pointer)

    def gemv(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray | None = None,
        *,
        out: DeviceArray,
        silu_input: bool = False,
    ) -> None:
        """`out = act(x) @ weight.T + bias`, act being SiLU or nothing: x f32 [M <= 4, K], weight f32 or bf16 [O, K], out f32 [M, O]."""
        num_rows, num_columns = x.shape
        if num_rows > GEMV_ROWS or weight.dtype not in (DType.F32, DType.BF16):
            raise ValueError(f"gemv takes up to {GEMV_ROWS} rows and f32 or bf16 weights, not {num_rows} and {weight.dtype}")
        num_outputs = weight.shape[0]
        expect(x, DType.F32, x.shape)
        expect(weight, weight.dtype, (num_outputs, num_columns))
        expect(out, DType.F32, (num_rows, num_outputs))
        if bias is not None:
            expect(bias, DType.F32, (num_outputs,))
        self._module.launch(
            f"gemv_{_suffix(weight)}", launch.GEMV, x,
            blocks=-(-num_outputs // (GEMV_THREADS // 32 * GEMV_OUTPUTS_PER_WARP)), threads=GEMV_THREADS,
            x=x, weight=weight, bias=None if bias is None else bias.pointer, out=out, num_outputs=num_outputs, silu_input=int(silu_input),
        )  # fmt: skip

    def add(self, a: DeviceArray, b: DeviceArray, out: DeviceArray) -> None:
        """`out = a + b`, all f32, of any width; a or b may have a single row, which is then added to every row of the other."""
        rows = max(a.shape[0], b.shape[0])
        for array in (a, b):
            expect(array, DType.F32, (array.shape[0] if array.shape[0] == 1 else rows, out.shape[1]))
        expect(out, DType.F32, (rows, out.shape[1]))
        for start in range(0, out.shape[1], launch.MAX_COLUMNS):
            parts = [array.columns(start, min(start + launch.MAX_COLUMNS, array.shape[1])) for array in (a, b, out)]
            self._module.launch("add", launch.ADD, parts[2], a=_broadcast(parts[0]), b=_broadcast(parts[1]), out=parts[2])

    def gelu(self, x: DeviceArray, out: DeviceArray) -> None:
        """The exact GELU of x, both bf16; cuBLASLt's epilogue has the tanh approximation, which is up to 4.7e-4 away from it."""
        expect(x, DType.BF16, x.shape)
        expect(out, DType.BF16, x.shape)
        self._module.launch("gelu", launch.GELU, x, x=x, out=out)

    def convert(self, x: DeviceArray, out: DeviceArray) -> None:
        """x in out's dtype: f32 to bf16 or bf16 to f32."""
        if {x.dtype, out.dtype} != {DType.F32, DType.BF16}:
            raise ValueError(f"convert goes between f32 and bf16, not from {x.dtype} to {out.dtype}")
        expect(out, out.dtype, x.shape)
        self._module.launch(f"convert_{_suffix(x)}_{_suffix(out)}", launch.CONVERT, x, x=x, out=out)

    def _norm(
        self,
        name: str,
        x: DeviceArray,
        gain: DeviceArray,
        shift: DeviceArray,
        out: DeviceArray,
        out_scale: DeviceArray | None,
        add_one: bool,
        eps: float,
        residual: tuple[DeviceArray | None, DeviceArray | None, DeviceArray | None] = (None, None, None),
        *,
        num_clean: DeviceArray | None,
    ) -> None:
        num_rows, num_columns = x.shape
        expect(x, DType.BF16, x.shape)
        expect(out, out.dtype, x.shape)
        if out.dtype is DType.F8_E4M3:
            if out_scale is None:
                raise ValueError(f"{name}: fp8 rows need out_scale")
            expect(out_scale, DType.F32, (num_rows,))
        by_row = "" if num_clean is None else "_by_row"
        gate, gain_rows, shift_rows = (_vectors(array, num_columns, num_clean) for array in (residual[2], gain, shift))
        self._module.launch(
            f"{name}{by_row}_{_suffix(out)}", launch.NORM, x,
            x=x, residual=residual[0], residual_out=residual[1], gate=gate, gain=gain_rows, shift=shift_rows,
            num_clean=_count(num_clean), out=out,
            out_scale=None if out_scale is None else out_scale.pointer, one=float(add_one), eps=eps,
        )  # fmt: skip


_SUFFIXES = {DType.BF16: "bf16", DType.F32: "f32", DType.F8_E4M3: "fp8"}


def _suffix(array: DeviceArray) -> str:
    return _SUFFIXES[array.dtype]


def _vector(array: DeviceArray | None, size: int) -> DeviceArray | None:
    """Check an f32 vector, [size] or [1, size]."""
    if array is not None and (array.dtype is not DType.F32 or array.shape not in ((size,), (1, size))):
        raise ValueError(f"expected F32 [{size}], got {array.dtype} {list(array.shape)}")
    return array


def _vectors(array: DeviceArray | None, size: int, num_clean: DeviceArray | None) -> DeviceArray | None:
    """Check an f32 vector for all rows or, with num_clean, one for each kind of rows, [2, size]."""
    if array is not None and num_clean is not None and array.dtype is DType.F32 and array.shape == (2, size):
        return array
    array = _vector(array, size)
    return None if array is None else replace(array, row_stride=0)


def _count(num_clean: DeviceArray | None) -> int | None:
    if num_clean is None:
        return None
    expect(num_clean, DType.I64, (1,))
    return num_clean.pointer


def _broadcast(array: DeviceArray) -> DeviceArray:
    return replace(array, row_stride=0) if array.shape[0] == 1 else array
