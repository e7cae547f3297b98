"""The fused operators: each is a torch function for eager use and an ONNX function of the domain `wanrt` in a traced graph.

The ONNX body, in standard operators, is the reference for every target: a target inlines it or has a kernel for it. The torch
function computes the same in eager mode, so that a module can be compared with its oracle before anything is traced.
"""

import math
from collections.abc import Sequence

import onnx
import torch
from onnx import parser
from torch import Tensor
from torch.nn import functional

from runtime.specs import FUNCTION_DOMAIN

Attribute = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
DOMAIN_VERSION = 1

_BODIES = {
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
    "GatedResidual": """
        GatedResidual (residual, x, gate) => (y) {
            gated = Mul (x, gate)
            y = Add (residual, gated)
        }""",
    "QKNorm": """
        QKNorm <epsilon> (x, weight) => (y) {
            y = RMSNormalization <axis = -1, epsilon: float = @epsilon> (x, weight)
        }""",
    "QKNormRope": """
        QKNormRope <epsilon, num_heads> (x, weight, rope_cos, rope_sin) => (y) {
            normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (x, weight)
            batch_axis = Constant <value_ints = [0]> ()
            normed_b = Unsqueeze (normed, batch_axis)
            cos_b = Unsqueeze (rope_cos, batch_axis)
            sin_b = Unsqueeze (rope_sin, batch_axis)
            rotated = RotaryEmbedding <interleaved = 1, num_heads: int = @num_heads> (normed_b, cos_b, sin_b)
            y = Squeeze (rotated, batch_axis)
        }""",
    "Attention": """
        Attention <num_heads> (query, key, value) => (y) {
            batch_axis = Constant <value_ints = [0]> ()
            query_b = Unsqueeze (query, batch_axis)
            key_b = Unsqueeze (key, batch_axis)
            value_b = Unsqueeze (value, batch_axis)
            y_b = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads> (query_b, key_b, value_b)
            y = Squeeze (y_b, batch_axis)
        }""",
    "CausalConv": """
        CausalConv <pads> (x, past, weight, bias) => (y, next_past) {
            window = Concat <axis = 1> (past, x)
            batch_axis = Constant <value_ints = [0]> ()
            window_b = Unsqueeze (window, batch_axis)
            y_b = Conv <pads: ints = @pads> (window_b, weight, bias)
            y = Squeeze (y_b, batch_axis)
            time_axis = Constant <value_ints = [1]> ()
            start = Constant <value_ints = [-2]> ()
            end = Constant <value_ints = [2147483647]> ()
            next_past = Slice (window, start, end, time_axis)
        }""",
    "FirstCausalConv": """
        FirstCausalConv (x, weight, bias) => (y, next_past) {
            time_axis = Constant <value_ints = [2]> ()
            start = Constant <value_ints = [-1]> ()
            end = Constant <value_ints = [2147483647]> ()
            present = Slice (weight, start, end, time_axis)
            batch_axis = Constant <value_ints = [0]> ()
            x_b = Unsqueeze (x, batch_axis)
            y_b = Conv <pads = [0, 1, 1, 0, 1, 1]> (x_b, present, bias)
            y = Squeeze (y_b, batch_axis)
            one_frame = Constant <value_ints = [0, 1, 0, 0, 0, 0, 0, 0]> ()
            next_past = Pad (x, one_frame)
        }""",
    "ChannelNormSilu": """
        ChannelNormSilu <scale> (x, gamma) => (y) {
            channel_axis = Constant <value_ints = [0]> ()
            length = ReduceL2 <keepdims = 1> (x, channel_axis)
            floor = Constant <value_float = 1e-12> ()
            floor_like = CastLike (floor, x)
            scale_value = Constant <value_float: float = @scale> ()
            scale_like = CastLike (scale_value, x)
            safe_length = Max (length, floor_like)
            gain = Div (scale_like, safe_length)
            unit = Mul (x, gain)
            normed = Mul (unit, gamma)
            gate = Sigmoid (normed)
            y = Mul (normed, gate)
        }""",
}


def function_proto(name: str) -> onnx.FunctionProto:
    """The ONNX function `wanrt::<name>` with its body in standard operators."""
    return parser.parse_function(f'<domain: "{FUNCTION_DOMAIN}", opset_import: ["" : 23]>{_BODIES[name]}')


def attach_functions(model: onnx.ModelProto) -> None:
    """Give `model` the functions it calls, once each."""
    called = {node.op_type for node in model.graph.node if node.domain == FUNCTION_DOMAIN}
    model.functions.extend(function_proto(name) for name in sorted(called))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x @ weight.T + bias`: x [N, in], weight [out, in] as checkpoints store it, bias [out]."""
    if _tracing():
        return _call("Linear", (x, weight, bias), like=x, shape=(x.shape[0], weight.shape[0]))
    return functional.linear(x, weight, bias)


def linear_no_bias(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, shapes as in `linear`."""
    if _tracing():
        return _call("LinearNoBias", (x, weight), like=x, shape=(x.shape[0], weight.shape[0]))
    return functional.linear(x, weight)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu_tanh(x @ weight.T + bias)`, shapes as in `linear`."""
    if _tracing():
        return _call("LinearGelu", (x, weight, bias), like=x, shape=(x.shape[0], weight.shape[0]))
    return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift` with no affine weights: x [N, D], shift and scale [1, D]."""
    if _tracing():
        return _call("AdaLayerNorm", (x, shift, scale), like=x, shape=x.shape, epsilon=eps)
    return functional.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale) + shift


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`residual + x * gate`: residual and x [N, D], gate [1, D]."""
    if _tracing():
        return _call("GatedResidual", (residual, x, gate), like=x, shape=x.shape)
    return residual + x * gate


def qk_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMS norm over the full width, all heads together: x [N, D], weight [D]."""
    if _tracing():
        return _call("QKNorm", (x, weight), like=x, shape=x.shape, epsilon=eps)
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def qk_norm_rope(x: Tensor, weight: Tensor, rope_cos: Tensor, rope_sin: Tensor, *, num_heads: int, eps: float) -> Tensor:
    """`qk_norm`, then rotation of each head's adjacent pairs: x [N, D], weight [D], tables [N, head_dim / 2]."""
    if _tracing():
        return _call("QKNormRope", (x, weight, rope_cos, rope_sin), like=x, shape=x.shape, epsilon=eps, num_heads=num_heads)
    pairs = functional.rms_norm(x, (x.shape[-1],), weight, eps).reshape(len(x), num_heads, -1, 2)
    real, imaginary = pairs.unbind(-1)  # [N, heads, head_dim / 2]
    cos, sin = rope_cos[:, None], rope_sin[:, None]
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(1)


def attention(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int) -> Tensor:
    """Softmax attention with scale `1/sqrt(head_dim)` and no mask: query [N, D], key and value [M, D] → [N, D]."""
    if _tracing():
        return _call("Attention", (query, key, value), like=query, shape=query.shape, num_heads=num_heads)
    # scaled_dot_product_attention's own default scale is 1/sqrt(head_dim)
    query, key, value = (x.reshape(len(x), num_heads, -1).transpose(0, 1) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)


def causal_conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Convolution over two past frames and the present ones, zero-padded in space to keep its size.

    The new past is cut from both, never from `x` alone: it depends on the old one, so that a target may give both one buffer.

    Args:
        x: [C, T, H, W]; past: [C, 2, H, W], the last frames before it.
        weight: [O, C, 3, k, k].

    Returns:
        [O, T, H, W] and the last two frames, [C, 2, H, W].
    """
    margin = weight.shape[-1] // 2
    if _tracing():
        pads = (0, margin, margin, 0, margin, margin)
        shapes = ((weight.shape[0], *x.shape[1:]), past.shape)
        return _call_pair("CausalConv", (x, past, weight, bias), shapes=shapes, pads=pads)
    window = torch.cat((past, x), dim=1)
    return functional.conv3d(window, weight, bias, padding=(0, margin, margin)), window[:, -2:]


def first_causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_conv` of one frame [C, 1, H, W] after nothing but zeros, with the last third of the kernel; weight [O, C, 3, 3, 3]."""
    if _tracing():
        shapes = ((weight.shape[0], *x.shape[1:]), (x.shape[0], 2, *x.shape[2:]))
        return _call_pair("FirstCausalConv", (x, weight, bias), shapes=shapes)
    return functional.conv3d(x, weight[:, :, -1:], bias, padding=(0, 1, 1)), functional.pad(x, (0, 0, 0, 0, 1, 0))


def channel_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """`silu(x / max(|x|, 1e-12) * sqrt(C) * gamma)`, |x| over the channels: x [C, T, H, W], gamma [C, 1, 1, 1]."""
    scale = math.sqrt(x.shape[0])
    if _tracing():
        return _call("ChannelNormSilu", (x, gamma), like=x, shape=x.shape, scale=scale)
    length = torch.linalg.vector_norm(x, dim=0, keepdim=True)
    return functional.silu(x * (scale / length.clamp_min(1e-12)) * gamma)


def _tracing() -> bool:
    return torch.compiler.is_exporting()


def _call(name: str, inputs: Sequence[Tensor], *, like: Tensor, shape: Sequence[int], **attributes: Attribute) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{FUNCTION_DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=shape, version=DOMAIN_VERSION
    )


def _call_pair(
    name: str, inputs: Sequence[Tensor], *, shapes: Sequence[Sequence[int]], **attributes: Attribute
) -> tuple[Tensor, Tensor]:
    dtypes = [inputs[0].dtype] * 2
    first, second = torch.onnx.ops.symbolic_multi_out(
        f"{FUNCTION_DOMAIN}::{name}", inputs, attributes, dtypes=dtypes, shapes=shapes, version=DOMAIN_VERSION
    )
    return first, second
