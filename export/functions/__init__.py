"""The fused operators: each is a torch function for eager use and an ONNX function of the domain `wanrt` in a traced graph.

The ONNX body, in standard operators, is the reference for every target: a target inlines it or has a kernel for it. The torch
function computes the same in eager mode, so that a module can be compared with its oracle before anything is traced.
"""

import onnx
from onnx import parser

from export.functions import colours, convolutions, frames, heads, rows
from export.functions.colours import frame_colours
from export.functions.convolutions import causal_conv, first_causal_conv, frame_conv, pointwise_conv, zero_past
from export.functions.frames import (
    add_average_down,
    add_duplicate_up,
    add_frame_rows,
    channel_norm,
    channel_norm_silu,
    first_channels,
    fold_pixels,
    frame_rows,
    interleave_frames,
    unfold_pixels,
    upsample_nearest,
)
from export.functions.heads import attention, biased_attention, qk_norm, qk_norm_rope
from export.functions.rows import (
    ada_layer_norm,
    ada_layer_norm_by_row,
    gated_gelu,
    gated_residual,
    gated_residual_by_row,
    linear,
    linear_gelu,
    linear_no_bias,
)
from runtime.specs import FUNCTION_DOMAIN

__all__ = [
    "ada_layer_norm",
    "ada_layer_norm_by_row",
    "add_average_down",
    "add_duplicate_up",
    "add_frame_rows",
    "attach_functions",
    "attention",
    "biased_attention",
    "causal_conv",
    "channel_norm",
    "channel_norm_silu",
    "first_causal_conv",
    "first_channels",
    "fold_pixels",
    "frame_colours",
    "frame_conv",
    "frame_rows",
    "function_proto",
    "gated_gelu",
    "gated_residual",
    "gated_residual_by_row",
    "interleave_frames",
    "linear",
    "linear_gelu",
    "linear_no_bias",
    "pointwise_conv",
    "qk_norm",
    "qk_norm_rope",
    "unfold_pixels",
    "upsample_nearest",
    "zero_past",
]

BODIES = {**rows.BODIES, **heads.BODIES, **convolutions.BODIES, **frames.BODIES, **colours.BODIES}
"""ONNX text of every function, by its name."""


def function_proto(name: str) -> onnx.FunctionProto:
    """The ONNX function `wanrt::<name>` with its body in standard operators."""
    return parser.parse_function(f'<domain: "{FUNCTION_DOMAIN}", opset_import: ["" : 23]>{BODIES[name]}')


def attach_functions(model: onnx.ModelProto) -> None:
    """Give `model` the functions it calls, once each."""
    called = {node.op_type for node in model.graph.node if node.domain == FUNCTION_DOMAIN}
    model.functions.extend(function_proto(name) for name in sorted(called))
