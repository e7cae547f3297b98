"""Convolutions over video frames, [C, T, H, W], with the past of those over time as an input and an output."""

import torch
from torch import Tensor
from torch.nn import functional

from export.functions.tracing import call, call_pair, tracing

BODIES = {
    "CausalConv": """
        CausalConv <pads, strides, kept> (x, past, weight, bias) => (y, next_past) {
            window = Concat <axis = 1> (past, x)
            batch_axis = Constant <value_ints = [0]> ()
            window_b = Unsqueeze (window, batch_axis)
            y_b = Conv <pads: ints = @pads, strides: ints = @strides> (window_b, weight, bias)
            y = Squeeze (y_b, batch_axis)
            time_axis = Constant <value_ints = [1]> ()
            start = Constant <value_ints: ints = @kept> ()
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
    "ZeroPast": """
        ZeroPast (x) => (past) {
            channels = Shape <start = 0, end = 1> (x)
            frames = Constant <value_ints = [2]> ()
            size = Shape <start = 2> (x)
            shape = Concat <axis = 0> (channels, frames, size)
            past = ConstantOfShape (shape)
        }""",
    "PointwiseConv": """
        PointwiseConv (x, weight, bias) => (y) {
            batch_axis = Constant <value_ints = [0]> ()
            x_b = Unsqueeze (x, batch_axis)
            y_b = Conv (x_b, weight, bias)
            y = Squeeze (y_b, batch_axis)
        }""",
    "FrameConv": """
        FrameConv <pads, strides> (x, weight, bias) => (y) {
            batch_axis = Constant <value_ints = [0]> ()
            x_b = Unsqueeze (x, batch_axis)
            time_axis = Constant <value_ints = [2]> ()
            weight_t = Unsqueeze (weight, time_axis)
            y_b = Conv <pads: ints = @pads, strides: ints = @strides> (x_b, weight_t, bias)
            y = Squeeze (y_b, batch_axis)
        }""",
}


def causal_conv(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, *, time_stride: int = 1) -> tuple[Tensor, Tensor]:
    """Convolution over the past frames and the present ones, zero-padded in space to keep its size.

    The new past is cut from both, never from `x` alone: it depends on the old one, so that a target may give both one buffer.

    Args:
        x: [C, T, H, W]; past: [C, P, H, W], the last frames before it: two, or one where `time_stride` is 2.
        weight: [O, C, 3, k, k].

    Returns:
        [O, (P + T - 3) / time_stride + 1, H, W] and the last P frames, [C, P, H, W].
    """
    margin = weight.shape[-1] // 2
    if tracing():
        num_frames = (past.shape[1] + x.shape[1] - weight.shape[2]) // time_stride + 1
        return call_pair(
            "CausalConv",
            (x, past, weight, bias),
            shapes=((weight.shape[0], num_frames, *x.shape[2:]), past.shape),
            pads=(0, margin, margin, 0, margin, margin),
            strides=(time_stride, 1, 1),
            kept=(-past.shape[1],),
        )
    window = torch.cat((past, x), dim=1)
    y = functional.conv3d(window, weight, bias, padding=(0, margin, margin), stride=(time_stride, 1, 1))
    return y, window[:, -past.shape[1] :]


def first_causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_conv` of one frame [C, 1, H, W] after nothing but zeros, with the last third of the kernel; weight [O, C, 3, 3, 3]."""
    if tracing():
        shapes = ((weight.shape[0], *x.shape[1:]), (x.shape[0], 2, *x.shape[2:]))
        return call_pair("FirstCausalConv", (x, weight, bias), shapes=shapes)
    return functional.conv3d(x, weight[:, :, -1:], bias, padding=(0, 1, 1)), functional.pad(x, (0, 0, 0, 0, 1, 0))


def zero_past(x: Tensor) -> Tensor:
    """The two frames of zeros that a convolution over time finds before the first frame: x [C, T, H, W] → [C, 2, H, W]."""
    if tracing():
        return call("ZeroPast", (x,), like=x, shape=(x.shape[0], 2, *x.shape[2:]))
    return x.new_zeros(x.shape[0], 2, *x.shape[2:])


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution over one position of one frame: x [C, T, H, W], weight [O, C, 1, 1, 1] → [O, T, H, W]."""
    if tracing():
        return call("PointwiseConv", (x, weight, bias), like=x, shape=(weight.shape[0], *x.shape[1:]))
    return functional.conv3d(x, weight, bias)


def frame_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, pads: tuple[int, int, int, int] = (1, 1, 1, 1), stride: int = 1
) -> Tensor:
    """Convolution of each frame: x [C, T, H, W], weight [O, C, k, k] → [O, T, H', W'].

    Args:
        pads: rows of zeros above, columns left, rows below, columns right.
        stride: positions from one output to the next, in both directions.
    """
    top, left, bottom, right = pads
    if tracing():
        height = (x.shape[2] + top + bottom - weight.shape[2]) // stride + 1
        width = (x.shape[3] + left + right - weight.shape[3]) // stride + 1
        shape = (weight.shape[0], x.shape[1], height, width)
        given = {"pads": (0, top, left, 0, bottom, right), "strides": (1, stride, stride)}
        return call("FrameConv", (x, weight, bias), like=x, shape=shape, **given)
    return functional.conv3d(
        functional.pad(x, (left, right, top, bottom)), weight[:, :, None], bias, stride=(1, stride, stride)
    )
