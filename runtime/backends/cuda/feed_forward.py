"""A feed-forward in pieces of rows: what lies between its two products exists for one piece at a time."""

from runtime.backends.cuda.device import DeviceArray
from runtime.backends.cuda.kernels import Kernels
from runtime.backends.cuda.linear import Linear


def feed_forward(
    kernels: Kernels,
    linear: Linear,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray,
    outer_weight: DeviceArray,
    outer_bias: DeviceArray,
    out: DeviceArray,
    *,
    inner: DeviceArray,
    x_scale: DeviceArray | None = None,
    weight_scale: DeviceArray | None = None,
    outer_weight_scale: DeviceArray | None = None,
    inner_fp8: DeviceArray | None = None,
    inner_scale: DeviceArray | None = None,
    fast_accumulation: bool = False,
    outer_fast_accumulation: bool = False,
) -> None:
    """`out = gelu(x · weightᵀ + bias) · outer_weightᵀ + outer_bias`, queued on the stream; products are as in `Linear.run`.

    Args:
        x: bf16 [N, D], or fp8 with x_scale f32 [N], as then the weights are with theirs.
        out: bf16 [N, O].
        inner: bf16 [P, F]: the space of a piece of up to P rows; its contents are lost.
        inner_fp8, inner_scale: fp8 only: [P, F] and f32 [P], the same.

    Raises:
        EngineError: the shapes do not fit each other, or cuBLASLt has no kernel for them on this device.
        ValueError: no rows to go through at once.
    """
    num_rows, piece_rows = x.shape[0], inner.shape[0]
    for start in range(0, num_rows, piece_rows):
        stop = min(start + piece_rows, num_rows)
        hidden, x_piece = inner.rows(0, stop - start), x.rows(start, stop)
        linear.run(
            x_piece, weight, bias, hidden, gelu=True, fast_accumulation=fast_accumulation,
            x_scale=_rows(x_scale, start, stop), weight_scale=weight_scale,
        )  # fmt: skip
        hidden_scale = _rows(inner_scale, 0, stop - start)
        if inner_fp8 is not None and hidden_scale is not None:
            narrow = inner_fp8.rows(0, stop - start)
            kernels.quantize_rows(hidden, narrow, hidden_scale)
            hidden = narrow
        linear.run(
            hidden, outer_weight, outer_bias, out.rows(start, stop), fast_accumulation=outer_fast_accumulation,
            x_scale=hidden_scale, weight_scale=outer_weight_scale,
        )  # fmt: skip


def _rows(array: DeviceArray | None, start: int, stop: int) -> DeviceArray | None:
    return None if array is None else array.rows(start, stop)
