"""Fused operators over rows of tokens, [N, D]: products, modulated norms, gated residuals."""

import torch
from torch import Tensor
from torch.nn import functional

from export.functions.tracing import call, tracing

BODIES = {
    "Linear": """
        Linear (x, weight, bias) => (y) {
            y = Gemm <transB = 1> (x, weight, bias)
        }""",
    "LinearNoBias": """
        LinearNoBias (x, weight) => (y) {
            y = Gemm <transB = 1> (x, weight)
        }""",
    "LinearGelu": """
        LinearGelu (x, weight, bias) => (y) {
            hidden = Gemm <transB = 1> (x, weight, bias)
            y = Gelu <approximate = "tanh"> (hidden)
        }""",
    "AdaLayerNorm": """
        AdaLayerNorm <epsilon> (x, shift, scale) => (y) {
            one = Constant <value_float = 1.0> ()
            one_like = CastLike (one, scale)
            gain = Add (scale, one_like)
            gain_row = Squeeze (gain)
            normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (x, gain_row)
            y = Add (normed, shift)
        }""",
    "AdaLayerNormByRow": """
        AdaLayerNormByRow <epsilon> (x, shift, scale, num_clean) => (y) {
            one = Constant <value_float = 1.0> ()
            one_like = CastLike (one, scale)
            gain = Add (scale, one_like)
            token_axis = Constant <value_ints = [0]> ()
            start = Constant <value_ints = [0]> ()
            end = Constant <value_ints = [2147483647]> ()
            clean_gain, noisy_gain = Split <axis = 0, num_outputs = 2> (gain)
            clean_shift, noisy_shift = Split <axis = 0, num_outputs = 2> (shift)
            clean_gain_row = Squeeze (clean_gain, token_axis)
            noisy_gain_row = Squeeze (noisy_gain, token_axis)
            clean = Slice (x, start, num_clean, token_axis)
            noisy = Slice (x, num_clean, end, token_axis)
            clean_normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (clean, clean_gain_row)
            noisy_normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (noisy, noisy_gain_row)
            clean_y = Add (clean_normed, clean_shift)
            noisy_y = Add (noisy_normed, noisy_shift)
            y = Concat <axis = 0> (clean_y, noisy_y)
        }""",
    "GatedResidual": """
        GatedResidual (residual, x, gate) => (y) {
            gated = Mul (x, gate)
            y = Add (residual, gated)
        }""",
    "GatedResidualByRow": """
        GatedResidualByRow (residual, x, gate, num_clean) => (y) {
            token_axis = Constant <value_ints = [0]> ()
            start = Constant <value_ints = [0]> ()
            end = Constant <value_ints = [2147483647]> ()
            clean_gate, noisy_gate = Split <axis = 0, num_outputs = 2> (gate)
            clean = Slice (x, start, num_clean, token_axis)
            noisy = Slice (x, num_clean, end, token_axis)
            clean_gated = Mul (clean, clean_gate)
            noisy_gated = Mul (noisy, noisy_gate)
            gated = Concat <axis = 0> (clean_gated, noisy_gated)
            y = Add (residual, gated)
        }""",
    "GatedGelu": """
        GatedGelu (gate, x) => (y) {
            opened = Gelu <approximate = "tanh"> (gate)
            y = Mul (x, opened)
        }""",
}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`: x [N, in], weight [out, in] as checkpoints store it, bias [out]."""
    if tracing():
        return call("Linear", (x, weight, bias), like=x, shape=(x.shape[0], weight.shape[0]))
    return functional.linear(x, weight, bias)


def linear_no_bias(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, shapes as in `linear`."""
    if tracing():
        return call("LinearNoBias", (x, weight), like=x, shape=(x.shape[0], weight.shape[0]))
    return functional.linear(x, weight)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu_tanh(x @ weight.T + bias)`, shapes as in `linear`."""
    if tracing():
        return call("LinearGelu", (x, weight, bias), like=x, shape=(x.shape[0], weight.shape[0]))
    return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift` with no affine weights: x [N, D], shift and scale [1, D]."""
    if tracing():
        return call("AdaLayerNorm", (x, shift, scale), like=x, shape=x.shape, epsilon=eps)
    return functional.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale) + shift


def ada_layer_norm_by_row(x: Tensor, shift: Tensor, scale: Tensor, num_clean: Tensor, *, eps: float) -> Tensor:
    """`ada_layer_norm` with row 0 of shift and scale [2, D] for the first `num_clean` tokens, an int64 [1], and row 1 for the rest."""
    if tracing():
        return call("AdaLayerNormByRow", (x, shift, scale, num_clean), like=x, shape=x.shape, epsilon=eps)
    rows = _rows(x, num_clean)
    return functional.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale[rows]) + shift[rows]


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`residual + x * gate`: residual and x [N, D], gate [1, D]."""
    if tracing():
        return call("GatedResidual", (residual, x, gate), like=x, shape=x.shape)
    return residual + x * gate


def gated_residual_by_row(residual: Tensor, x: Tensor, gate: Tensor, num_clean: Tensor) -> Tensor:
    """`gated_residual` with row 0 of the gate [2, D] for the first `num_clean` tokens, an int64 [1], and row 1 for the rest."""
    if tracing():
        return call("GatedResidualByRow", (residual, x, gate, num_clean), like=x, shape=x.shape)
    return residual + x * gate[_rows(x, num_clean)]


def gated_gelu(gate: Tensor, x: Tensor) -> Tensor:
    """`gelu_tanh(gate) * x`, all [N, D]."""
    if tracing():
        return call("GatedGelu", (gate, x), like=x, shape=x.shape)
    return x * functional.gelu(gate, approximate="tanh")


def _rows(x: Tensor, num_clean: Tensor) -> Tensor:
    """Which of two rows each token of x takes, [N]."""
    return torch.ge(torch.arange(len(x)), num_clean).long()
