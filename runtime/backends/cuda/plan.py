"""The engine file of the `cuda` target: the steps of one stage, in order, over named arrays.

Written by `engines.targets.cuda`, executed by `runtime.backends.cuda.engine`. A step names what the runtime calls (a kernel or a library,
see `CudaBackend`) and the arrays it reads and writes; arrays are the stage's inputs and weights, buffers, and views of either.
"""

from dataclasses import dataclass
from enum import StrEnum

from runtime.specs import Axis, DType

PLAN_VERSION = 3

FLAGS = frozenset(("add_one", "fast_accumulation", "outer_fast_accumulation", "gelu", "silu_input", "silu", "interleave"))
"""Numbers of a step that are 0 or 1."""
COUNTS = {
    **dict.fromkeys(("pad_top", "pad_left", "pad_bottom", "pad_right", "first_frame"), 0),
    **dict.fromkeys(("num_heads", "time_stride", "space_stride", "side", "time_factor", "space_factor"), 1),
}
"""Numbers of a step that are whole, and the least of each."""


class StepKind(StrEnum):
    """What a step calls; its arguments are named in `Step.inputs` and `Step.outputs`."""

    ADD = "add"
    CONVERT = "convert"
    GEMV = "gemv"
    NORM = "norm"
    RESIDUAL = "residual"
    RESIDUAL_NORM = "residual_norm"
    QK_NORM_ROPE = "qk_norm_rope"
    QUANTIZE_ROWS = "quantize_rows"
    LINEAR = "linear"
    FEED_FORWARD = "feed_forward"
    ATTENTION = "attention"
    QUANTIZE_CENTRED = "quantize_centred"
    RESTORE = "restore"
    FOLD_OFFSET = "fold_offset"
    GELU = "gelu"
    RMS_NORM = "rms_norm"
    RESIDUAL_RMS_NORM = "residual_rms_norm"
    LAYER_NORM = "layer_norm"
    RESIDUAL_LAYER_NORM = "residual_layer_norm"
    EMBED_TOKENS = "embed_tokens"
    GATED_GELU = "gated_gelu"
    BIASED_ATTENTION = "biased_attention"
    CHANNELS_LAST = "channels_last"
    PLANES = "planes"
    CHANNEL_NORM = "channel_norm"
    CONVOLUTION = "convolution"
    UPSAMPLE = "upsample"
    FRAME_ATTENTION = "frame_attention"
    ZEROS = "zeros"
    ADD_AVERAGE_DOWN = "add_average_down"
    ADD_DUPLICATE_UP = "add_duplicate_up"
    COLOURS = "colours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """An array the stage makes; symbolic extents as in the stage's spec."""

    name: str
    shape: tuple[Axis, ...]
    dtype: DType
    row_multiple: int = 1
    """The array gets as many spare rows as bring its first extent to a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Rows (axis 0) or columns (axis 1) `start` to `stop` of another array."""

    name: str
    source: str
    axis: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    kind: StepKind
    inputs: dict[str, str]  # argument → array
    outputs: dict[str, str]
    numbers: dict[str, float]  # epsilon, num_heads, flags as 0 or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    version: int
    stage: str
    buffers: tuple[Buffer, ...]
    views: tuple[View, ...]
    steps: tuple[Step, ...]
    outputs: dict[str, str]  # the stage's output → array
    fp8_attention: "Plan | None" = None
    """The stage when self-attention runs in fp8, if it is another one then: query, key, value and what comes of them are fp8."""
