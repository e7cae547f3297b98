"""Fused operators over video frames, [C, T, H, W]: norms, resampling in space and time, rows and pixels."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from export.functions.tracing import call, tracing

BODIES = {
    "UpsampleNearest": """
        UpsampleNearest (x) => (y) {
            scales = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
            y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x, , scales)
        }""",
    "InterleaveFrames": """
        InterleaveFrames (x) => (y) {
            even, odd = Split <axis = 0, num_outputs = 2> (x)
            pair_axis = Constant <value_ints = [2]> ()
            even_p = Unsqueeze (even, pair_axis)
            odd_p = Unsqueeze (odd, pair_axis)
            pairs = Concat <axis = 2> (even_p, odd_p)
            size = Shape <start = 2> (x)
            lead = Constant <value_ints = [0, -1]> ()
            shape = Concat <axis = 0> (lead, size)
            y = Reshape (pairs, shape)
        }""",
    "FrameRows": """
        FrameRows (x) => (y) {
            columns = Flatten <axis = 1> (x)
            y = Transpose <perm = [1, 0]> (columns)
        }""",
    "AddFrameRows": """
        AddFrameRows (x, rows) => (y) {
            columns = Transpose <perm = [1, 0]> (rows)
            shape = Shape (x)
            added = Reshape (columns, shape)
            y = Add (x, added)
        }""",
    "FirstChannels": """
        FirstChannels <count> (x) => (y) {
            start = Constant <value_ints = [0]> ()
            end = Constant <value_ints: ints = @count> ()
            channel_axis = Constant <value_ints = [0]> ()
            y = Slice (x, start, end, channel_axis)
        }""",
    "FoldPixels": """
        FoldPixels <side> (x) => (y) {
            sides = Constant <value_ints: ints = @side> ()
            lead = Shape <end = 2> (x)
            frames = Shape <start = 1, end = 2> (x)
            height = Shape <start = 2, end = 3> (x)
            width = Shape <start = 3, end = 4> (x)
            rows = Div (height, sides)
            columns = Div (width, sides)
            square_shape = Concat <axis = 0> (lead, rows, sides, columns, sides)
            squares = Reshape (x, square_shape)
            ordered = Transpose <perm = [0, 5, 3, 1, 2, 4]> (squares)
            rest = Constant <value_ints = [-1]> ()
            shape = Concat <axis = 0> (rest, frames, rows, columns)
            y = Reshape (ordered, shape)
        }""",
    "UnfoldPixels": """
        UnfoldPixels <side> (x) => (y) {
            sides = Constant <value_ints: ints = @side> ()
            frames = Shape <start = 1, end = 2> (x)
            rows = Shape <start = 2, end = 3> (x)
            columns = Shape <start = 3, end = 4> (x)
            rest = Constant <value_ints = [-1]> ()
            square_shape = Concat <axis = 0> (rest, sides, sides, frames, rows, columns)
            squares = Reshape (x, square_shape)
            ordered = Transpose <perm = [0, 3, 4, 2, 5, 1]> (squares)
            height = Mul (rows, sides)
            width = Mul (columns, sides)
            shape = Concat <axis = 0> (rest, frames, height, width)
            y = Reshape (ordered, shape)
        }""",
    "AddAverageDown": """
        AddAverageDown <pads, time_factor, space_factor> (x, level_input) => (y) {
            time_pads = Constant <value_ints: ints = @pads> ()
            padded = Pad (level_input, time_pads)
            time_side = Constant <value_ints: ints = @time_factor> ()
            space_side = Constant <value_ints: ints = @space_factor> ()
            channels = Shape <end = 1> (padded)
            size = Shape <start = 1> (x)
            frames, rows, columns = Split <axis = 0, num_outputs = 3> (size)
            cube_shape = Concat <axis = 0> (channels, frames, time_side, rows, space_side, columns, space_side)
            cubes = Reshape (padded, cube_shape)
            ordered = Transpose <perm = [0, 2, 4, 6, 1, 3, 5]> (cubes)
            out_channels = Shape <end = 1> (x)
            rest = Constant <value_ints = [-1]> ()
            group_shape = Concat <axis = 0> (out_channels, rest, size)
            groups = Reshape (ordered, group_shape)
            group_axis = Constant <value_ints = [1]> ()
            averages = ReduceMean <keepdims = 0> (groups, group_axis)
            y = Add (x, averages)
        }""",
    "AddDuplicateUp": """
        AddDuplicateUp <repeats, time_factor, space_factor, skipped> (x, level_input) => (y) {
            repeat_axis = Constant <value_ints = [1]> ()
            single = Unsqueeze (level_input, repeat_axis)
            repeat_shape = Constant <value_ints: ints = @repeats> ()
            repeated = Expand (single, repeat_shape)
            time_side = Constant <value_ints: ints = @time_factor> ()
            space_side = Constant <value_ints: ints = @space_factor> ()
            out_channels = Shape <end = 1> (x)
            size = Shape <start = 1> (level_input)
            cube_shape = Concat <axis = 0> (out_channels, time_side, space_side, space_side, size)
            cubes = Reshape (repeated, cube_shape)
            ordered = Transpose <perm = [0, 4, 1, 5, 2, 6, 3]> (cubes)
            factors = Concat <axis = 0> (time_side, space_side, space_side)
            larger = Mul (size, factors)
            shape = Concat <axis = 0> (out_channels, larger)
            duplicates = Reshape (ordered, shape)
            start = Constant <value_ints: ints = @skipped> ()
            end = Constant <value_ints = [2147483647]> ()
            time_axis = Constant <value_ints = [1]> ()
            kept = Slice (duplicates, start, end, time_axis)
            y = Add (x, kept)
        }""",
    "ChannelNorm": """
        ChannelNorm <scale> (x, gamma) => (y) {
            channel_axis = Constant <value_ints = [0]> ()
            length = ReduceL2 <keepdims = 1> (x, channel_axis)
            floor = Constant <value_float = 1e-12> ()
            floor_like = CastLike (floor, x)
            scale_value = Constant <value_float: float = @scale> ()
            scale_like = CastLike (scale_value, x)
            safe_length = Max (length, floor_like)
            gain = Div (scale_like, safe_length)
            unit = Mul (x, gain)
            column = Constant <value_ints = [-1, 1, 1, 1]> ()
            gamma_column = Reshape (gamma, column)
            y = Mul (unit, gamma_column)
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


def upsample_nearest(x: Tensor) -> Tensor:
    """Every position four times: [C, T, H, W] → [C, T, 2H, 2W]; for a factor of 2 "nearest" and "nearest-exact" are one."""
    if tracing():
        return call("UpsampleNearest", (x,), like=x, shape=(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))
    return functional.interpolate(x, scale_factor=2, mode="nearest")


def interleave_frames(x: Tensor) -> Tensor:
    """Channels to frames, [2C, T, H, W] → [C, 2T, H, W]: the first half of the channels are the even frames."""
    if tracing():
        return call("InterleaveFrames", (x,), like=x, shape=(x.shape[0] // 2, 2 * x.shape[1], *x.shape[2:]))
    halves = x.reshape(2, x.shape[0] // 2, *x.shape[1:])
    return halves.permute(1, 2, 0, 3, 4).flatten(1, 2)


def frame_rows(x: Tensor) -> Tensor:
    """Positions as rows: [C, T, H, W] → [T·H·W, C]."""
    if tracing():
        return call("FrameRows", (x,), like=x, shape=(x.shape[1] * x.shape[2] * x.shape[3], x.shape[0]))
    return x.flatten(1).t()


def add_frame_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The sum of x [C, T, H, W] and its positions as rows, [T·H·W, C]."""
    if tracing():
        return call("AddFrameRows", (x, rows), like=x, shape=x.shape)
    return x + rows.t().reshape(x.shape)


def first_channels(x: Tensor, count: int) -> Tensor:
    """The first `count` channels: [C, T, H, W] → [count, T, H, W]."""
    if tracing():
        return call("FirstChannels", (x,), like=x, shape=(count, *x.shape[1:]), count=(count,))
    return x[:count]


def fold_pixels(x: Tensor, *, side: int) -> Tensor:
    """Squares of pixels to channels, [C, T, H, W] → [C·side², T, H/side, W/side], by colour, then column, then row in the square."""
    channels, frames, rows, columns = x.shape[0], x.shape[1], x.shape[2] // side, x.shape[3] // side
    if tracing():
        return call("FoldPixels", (x,), like=x, shape=(channels * side**2, frames, rows, columns), side=(side,))
    squares = x.reshape(channels, frames, rows, side, columns, side)
    return squares.permute(0, 5, 3, 1, 2, 4).reshape(-1, frames, rows, columns)


def unfold_pixels(x: Tensor, *, side: int) -> Tensor:
    """Undoes `fold_pixels`: [C·side², T, h, w] → [C, T, h·side, w·side]."""
    channels, frames, height, width = x.shape[0] // side**2, x.shape[1], x.shape[2] * side, x.shape[3] * side
    if tracing():
        return call("UnfoldPixels", (x,), like=x, shape=(channels, frames, height, width), side=(side,))
    squares = x.reshape(channels, side, side, *x.shape[1:])
    return squares.permute(0, 3, 4, 2, 5, 1).reshape(channels, frames, height, width)


def add_average_down(x: Tensor, level_input: Tensor, *, time_factor: int, space_factor: int) -> Tensor:
    """Add a level's input, averaged down to the level's output.

    The input's cubes of `time_factor` frames and `space_factor`² positions become channels, by channel, then frame, row and column in
    the cube; each channel of x gets the average of its equal share of consecutive ones. A frame of zeros in front makes an odd number of
    frames even.

    Args:
        x: [O, t, h, w].
        level_input: [C, T, h·space_factor, w·space_factor] with T = t·time_factor, or one frame less.
    """
    padding = -level_input.shape[1] % time_factor
    if tracing():
        factors = {"time_factor": (time_factor,), "space_factor": (space_factor,)}
        pads = (0, padding, 0, 0, 0, 0, 0, 0)
        return call("AddAverageDown", (x, level_input), like=x, shape=x.shape, pads=pads, **factors)
    padded = functional.pad(level_input, (0, 0, 0, 0, padding, 0))
    out_channels, frames, rows, columns = x.shape
    cubes = padded.reshape(-1, frames, time_factor, rows, space_factor, columns, space_factor)
    groups = cubes.permute(0, 2, 4, 6, 1, 3, 5).reshape(out_channels, -1, frames, rows, columns)
    return x + groups.mean(dim=1)


def add_duplicate_up(x: Tensor, level_input: Tensor, *, time_factor: int, space_factor: int) -> Tensor:
    """Add a level's input, repeated up to the level's output.

    Each channel of the input is repeated so often that the channels are those of x times the places of a cube of `time_factor` frames and
    `space_factor`² positions, ordered by channel, then frame, row and column in the cube. Where x has fewer frames than that makes, the
    first ones are left out.

    Args:
        x: [O, t, h·space_factor, w·space_factor].
        level_input: [C, T, h, w] with t = T·time_factor, or one frame less.
    """
    repeats = x.shape[0] * time_factor * space_factor**2 // level_input.shape[0]
    skipped = level_input.shape[1] * time_factor - x.shape[1]
    if tracing():
        factors = {"time_factor": (time_factor,), "space_factor": (space_factor,)}
        given = {"repeats": (1, repeats, 1, 1, 1), "skipped": (skipped,), **factors}
        return call("AddDuplicateUp", (x, level_input), like=x, shape=x.shape, **given)
    repeated = level_input.repeat_interleave(repeats, dim=0)
    cubes = repeated.reshape(x.shape[0], time_factor, space_factor, space_factor, *level_input.shape[1:])
    duplicates = cubes.permute(0, 4, 1, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    return x + duplicates[:, skipped:]


def channel_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """`x / max(|x|, 1e-12) * sqrt(C) * gamma`, |x| over the channels: x [C, T, H, W], gamma [C, 1, 1, 1] or [C, 1, 1]."""
    scale = math.sqrt(x.shape[0])
    if tracing():
        return call("ChannelNorm", (x, gamma), like=x, shape=x.shape, scale=scale)
    length: Tensor = torch.linalg.vector_norm(x, dim=0, keepdim=True)
    return x * (scale / length.clamp_min(1e-12)) * gamma.reshape(-1, 1, 1, 1)


def channel_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """`silu(x / max(|x|, 1e-12) * sqrt(C) * gamma)`, |x| over the channels: x [C, T, H, W], gamma [C, 1, 1, 1]."""
    scale = math.sqrt(x.shape[0])
    if tracing():
        return call("ChannelNormSilu", (x, gamma), like=x, shape=x.shape, scale=scale)
    length = torch.linalg.vector_norm(x, dim=0, keepdim=True)
    return functional.silu(x * (scale / length.clamp_min(1e-12)) * gamma)
