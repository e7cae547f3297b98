"""Launches the text encoder's kernels: RMS norms of a float32 residual stream, the gated GELU, attention with a bias by position.

Arrays are as in `runtime.backends.cuda.kernels`: matrices with any `row_stride`, columns in multiples of 8, outputs the caller's.
"""

from runtime.backends.cuda import launch
from runtime.backends.cuda.array import expect
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.errors import EngineError
from runtime.specs import DType

ATTENTION_ROWS = 64  # kAttentionRows, kHeadDim and kMaxBuckets of engines/targets/cuda/text.cuh
MAX_HEAD_DIM = 64
MAX_BUCKETS = 128
MAX_GATED_COLUMNS = 16384
_ATTENTION_THREADS = 128
_NORM_OUTPUTS = {DType.BF16: "rms_norm_bf16", DType.F32: "rms_norm_f32"}


class TextKernels:
    """The text encoder's kernels of one cubin, loaded into `device`'s context; they are unloaded with it.

    Methods raise EngineError for what a kernel cannot do, ValueError for shapes and dtypes that do not fit.

    Args:
        cubin: what `engines.targets.cuda.compile.compile_kernels` made for `device.arch`.

    Raises:
        CudaError: the cubin is not for this GPU.
    """

    def __init__(self, device: Device, cubin: bytes) -> None:
        self._module = launch.Module(device, cubin)

    def rms_norm(self, x: DeviceArray, weight: DeviceArray, out: DeviceArray, *, eps: float) -> None:
        """`out = x / sqrt(mean(x²) + eps) * weight`: x f32 [N, D], weight f32 [D], out bf16 or f32."""
        if out.dtype not in _NORM_OUTPUTS:
            raise ValueError(f"rms_norm writes bf16 or f32, not {out.dtype}")
        expect(out, out.dtype, x.shape)
        self._norm(_NORM_OUTPUTS[out.dtype], x, weight, out, eps)

    def residual_rms_norm(
        self,
        residual: DeviceArray,
        x: DeviceArray,
        weight: DeviceArray,
        *,
        residual_out: DeviceArray,
        out: DeviceArray,
        eps: float,
    ) -> None:
        """`residual_out = residual + x`, all f32 [N, D], and its `rms_norm` in bf16; residual_out may be residual itself."""
        expect(residual, DType.F32, x.shape)
        expect(residual_out, DType.F32, x.shape)
        expect(out, DType.BF16, x.shape)
        self._norm("residual_rms_norm_bf16", x, weight, out, eps, residual, residual_out)

    def gated_gelu(self, gate: DeviceArray, x: DeviceArray, out: DeviceArray) -> None:
        """`out = gelu_tanh(gate) * x`, all bf16 [N, D], D up to 16,384."""
        for array in (gate, x, out):
            expect(array, DType.BF16, x.shape)
        self._module.launch("gated_gelu", launch.GATED_GELU, x, most=MAX_GATED_COLUMNS, gate=gate, x=x, out=out)

    def biased_attention(
        self,
        query: DeviceArray,
        key: DeviceArray,
        value: DeviceArray,
        position_table: DeviceArray,
        position_buckets: DeviceArray,
        out: DeviceArray,
        *,
        num_heads: int,
    ) -> None:
        """`softmax(query · keyᵀ + bias) · value` for every head, with no scale; fp32 but for the operands of the two products.

        Args:
            query, key, value, out: bf16 [S, H·d], d a multiple of 8 up to 64.
            position_table: f32 [buckets, H], at most 128 buckets; the bias of a pair is `position_table[position_buckets, head]`.
            position_buckets: i64 [S, S], query by key.
        """
        tokens, columns = query.shape
        num_buckets = position_table.shape[0]
        for array in (query, key, value, out):
            expect(array, DType.BF16, query.shape)
        expect(position_table, DType.F32, (num_buckets, num_heads))
        expect(position_buckets, DType.I64, (tokens, tokens))
        if not (position_table.is_contiguous and position_buckets.is_contiguous):
            raise ValueError("position_table and position_buckets must be contiguous")
        head_dim, rest = divmod(columns, num_heads)
        if rest or head_dim % launch.COLUMNS_PER_VECTOR or head_dim > MAX_HEAD_DIM or num_buckets > MAX_BUCKETS:
            raise EngineError(
                f"biased attention: {num_heads} heads of {columns} columns with {num_buckets} position buckets; "
                f"heads have a multiple of {launch.COLUMNS_PER_VECTOR} columns up to {MAX_HEAD_DIM}, buckets are {MAX_BUCKETS} at most",
                hint="this text encoder runs on the cpu target only",
            )
        self._module.launch(
            "biased_attention", launch.BIASED_ATTENTION, query,
            blocks=-(-tokens // ATTENTION_ROWS) * num_heads, threads=_ATTENTION_THREADS,
            query=query, key=key, value=value, out=out,
            position_table=position_table.pointer, position_buckets=position_buckets.pointer,
            num_heads=num_heads, head_dim=head_dim, num_buckets=num_buckets,
        )  # fmt: skip

    def _norm(
        self,
        name: str,
        x: DeviceArray,
        weight: DeviceArray,
        out: DeviceArray,
        eps: float,
        residual: DeviceArray | None = None,
        residual_out: DeviceArray | None = None,
    ) -> None:
        expect(x, DType.F32, x.shape)
        expect(weight, DType.F32, x.shape[1:])
        self._module.launch(
            name, launch.RMS_NORM, x,
            x=x, residual=residual, residual_out=residual_out, weight=weight, out=out, eps=eps,
        )  # fmt: skip
