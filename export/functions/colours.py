"""The fused operator that turns decoded frames into colours of 8 bits."""

import torch
from torch import Tensor

from export.functions.tracing import call_as, tracing

BODIES = {
    "FrameColours": """
        FrameColours (frames) => (colours) {
            half = Constant <value_float = 0.5> ()
            scaled = Mul (frames, half)
            shifted = Add (scaled, half)
            black = Constant <value_float = 0.0> ()
            white = Constant <value_float = 1.0> ()
            clamped = Clip (shifted, black, white)
            greatest = Constant <value_float = 255.0> ()
            levels = Mul (clamped, greatest)
            ordered = Transpose <perm = [1, 2, 3, 0]> (levels)
            colours = Cast <to = 2> (ordered)
        }""",
}


def frame_colours(frames: Tensor) -> Tensor:
    """`clamp(x / 2 + 1/2, 0, 1) * 255` in float32, truncated: [3, T, H, W] of about -1..1 → uint8 [T, H, W, 3]."""
    if tracing():
        return call_as("FrameColours", (frames,), dtype=torch.uint8, shape=(*frames.shape[1:], frames.shape[0]))
    levels = (frames * 0.5 + 0.5).clamp(0, 1) * 255
    return levels.permute(1, 2, 3, 0).to(torch.uint8)
