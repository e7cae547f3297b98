"""Launches the kernels around the VAE's convolutions, and attention over a frame's positions.

Frames are bf16 [T, H, W, C], contiguous, C a multiple of 8; outputs belong to the caller. What each kernel computes is an ONNX function
of `export.functions`, which has the channels first.
"""

import ctypes
import math
from typing import Any

from runtime.backends.cuda import launch
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.linear import Linear
from runtime.errors import EngineError
from runtime.specs import DType
from runtime.stages.vae_layers import VIDEO_CHANNELS

MAX_PAST = 2  # kMaxPast and kTransposeSide of engines/targets/cuda/vae.cuh
TRANSPOSE_SIDE = 32
PIXELS_PER_THREAD = 4  # kPixelsPerThread there
_THREADS = 256
_VECTOR = launch.COLUMNS_PER_VECTOR
_NORM_VECTORS = (1, 2, 4)  # of 8 channels a thread: there is a kernel for each
_SCORE_BYTES = 96 << 20  # as many queries at a time as keep their scores below


class VaeKernels:
    """The VAE's kernels of one cubin, loaded into `device`'s context; they are unloaded with it.

    Methods raise EngineError for what a kernel cannot do, ValueError for shapes and dtypes that do not fit.

    Args:
        cubin: what `engines.targets.cuda.compile.compile_kernels` made for `device.arch`.
        linear: the products of attention.

    Raises:
        CudaError: the cubin is not for this GPU.
    """

    def __init__(self, device: Device, cubin: bytes, linear: Linear) -> None:
        self._device, self._linear = device, linear
        self._module = launch.Module(device, cubin)

    def channel_norm(
        self,
        x: DeviceArray,
        out: DeviceArray,
        *,
        gamma: DeviceArray | None = None,
        past: DeviceArray | None = None,
        next_past: DeviceArray | None = None,
        silu: bool = False,
    ) -> None:
        """`x / max(|x|, 1e-12) * sqrt(C) * gamma` of every position, with SiLU after it, behind the past frames.

        Args:
            x: [T, H, W, C].
            out: [T, H, W, C]; [P + T, H, W, C] with a past.
            gamma: f32, C elements; None copies the frames as they are.
            past: [P, H, W, C], P up to 2: goes to the beginning of `out`, and is then replaced by its last P frames.
            next_past: the same, where there is no past yet: zeros go to the beginning of `out`.
        """
        num_frames, height, width, channels = x.shape
        kept = past if past is not None else next_past
        past_frames = 0 if kept is None else kept.shape[0]
        _expect(out, DType.BF16, (past_frames + num_frames, *x.shape[1:]))
        _expect(x, DType.BF16, x.shape)
        if kept is not None:
            _expect(kept, DType.BF16, (past_frames, *x.shape[1:]))
        if past_frames > MAX_PAST or (gamma is not None and (gamma.dtype is not DType.F32 or gamma.size != channels)):
            raise ValueError(f"channel_norm takes up to {MAX_PAST} past frames and {channels} f32 gains")
        vectors = channels // _VECTOR
        lanes = min(32, 1 << (vectors - 1).bit_length())
        count = next((count for count in _NORM_VECTORS if count * lanes >= vectors), None)
        if count is None:
            raise EngineError(f"channel_norm takes up to {32 * max(_NORM_VECTORS) * _VECTOR} channels, got {channels}")
        positions = height * width
        self._launch(
            f"channel_norm_{count}", launch.CHANNEL_NORM, x.reshape(num_frames * positions, channels).rows(0, positions),
            elements=positions * lanes, x=x, gamma=None if gamma is None else gamma.reshape(channels), past=kept, out=out,
            num_frames=num_frames, past_frames=past_frames,
            from_zero=int(past is None), silu=int(silu), lanes=lanes, scale=math.sqrt(channels),
        )  # fmt: skip

    def upsample(self, x: DeviceArray, out: DeviceArray, *, interleave: bool = False) -> None:
        """Every position four times, [T, H, W, C] → [T, 2H, 2W, C]; or, interleaved, channels to frames → [2T, H, W, C / 2].

        Both at once where `out` is [2T, 2H, 2W, C / 2].
        """
        num_frames, height, width, channels = x.shape
        halves = 2 if interleave else 1
        repeat = out.shape[1] // height
        _expect(x, DType.BF16, x.shape)
        _expect(out, DType.BF16, (num_frames * halves, height * repeat, width * repeat, channels // halves))
        if channels % (halves * _VECTOR):
            raise EngineError(f"upsample takes a multiple of {halves * _VECTOR} channels, got {channels}")
        rows = x.reshape(num_frames * height * width, channels)
        self._launch(
            "upsample", launch.UPSAMPLE, rows, elements=rows.size // _VECTOR,
            x=x, out=out, width=width, frame_positions=height * width, interleave=int(interleave), repeat=repeat,
        )  # fmt: skip

    def channels_last(self, x: DeviceArray, out: DeviceArray, *, side: int = 1) -> None:
        """f32 [C, T, H·side, W·side] → bf16 [T, H, W, D]: squares of pixels to channels, D at least C·side², further ones zeros."""
        num_frames, height, width, _ = out.shape
        _expect(x, DType.F32, (x.shape[0], num_frames, height * side, width * side))
        _expect(out, DType.BF16, out.shape)
        self._layout("to_channels_last", x, out, colours=x.shape[0], side=side)

    def planes(self, x: DeviceArray, out: DeviceArray, *, side: int = 1, first_frame: int = 0) -> None:
        """bf16 [T, H, W, D] → f32 [C, N, H·side, W·side], T of its frames: the first C·side² channels, reverse of `channels_last`."""
        num_frames, height, width, _ = x.shape
        _expect(x, DType.BF16, x.shape)
        _expect(out, DType.F32, (*out.shape[:2], height * side, width * side))
        if not 0 <= first_frame <= out.shape[1] - num_frames:
            raise ValueError(f"{num_frames} frames from {first_frame} on do not fit {out.shape[1]}")
        self._layout("to_planes", out, x, colours=out.shape[0], side=side, first_frame=first_frame)

    def colours(self, x: DeviceArray, out: DeviceArray) -> None:
        """f32 [3, T, H, W] of about -1..1 → u8 [T, H, W, 3], truncated: `export.functions.frame_colours`."""
        colours, num_frames, height, width = x.shape
        pixels = num_frames * height * width
        _expect(x, DType.F32, (VIDEO_CHANNELS, num_frames, height, width))
        _expect(out, DType.U8, (num_frames, height, width, colours))
        if pixels % _VECTOR:
            raise EngineError(f"colours takes frames of a multiple of {_VECTOR} pixels, got {pixels}")
        self._launch(
            "colours", launch.COLOURS, x.reshape(x.size // _VECTOR, _VECTOR), elements=pixels // PIXELS_PER_THREAD,
            planes=x.pointer, colours=out.pointer, num_pixels=pixels,
        )  # fmt: skip

    def zeros(self, out: DeviceArray) -> None:
        """bf16 [T, H, W, C] of zeros."""
        _expect(out, DType.BF16, out.shape)
        self._layout("to_channels_last", None, out, colours=0, side=1)

    def add_average_down(
        self, x: DeviceArray, level_input: DeviceArray, out: DeviceArray, *, time_factor: int, space_factor: int
    ) -> None:
        """`out = x` plus the level's input averaged down, as `export.functions.add_average_down` does it; all bf16."""
        offset = x.shape[0] * time_factor - level_input.shape[0]
        smaller = (x.shape[1] * space_factor, x.shape[2] * space_factor)
        is_even = level_input.shape[3] * time_factor * space_factor**2 % x.shape[3] == 0
        if level_input.shape[1:3] != smaller or not 0 <= offset < time_factor or not is_even:
            raise ValueError(f"{list(level_input.shape)} is no level's input for {list(x.shape)}")
        self._shortcut("add_average_down", x, level_input, out, time_factor, space_factor, offset)

    def add_duplicate_up(
        self, x: DeviceArray, level_input: DeviceArray, out: DeviceArray, *, time_factor: int, space_factor: int
    ) -> None:
        """`out = x` plus the level's input repeated, as `export.functions.add_duplicate_up` does it; all bf16."""
        offset = level_input.shape[0] * time_factor - x.shape[0]
        larger = (level_input.shape[1] * space_factor, level_input.shape[2] * space_factor)
        is_even = x.shape[3] * time_factor * space_factor**2 % level_input.shape[3] == 0
        if x.shape[1:3] != larger or not 0 <= offset < time_factor or not is_even:
            raise ValueError(f"{list(level_input.shape)} is no level's input for {list(x.shape)}")
        self._shortcut("add_duplicate_up", x, level_input, out, time_factor, space_factor, offset)

    def frame_attention(self, qkv: DeviceArray, out: DeviceArray) -> None:
        """One head of attention over the positions of one frame, scaled by 1/√C: qkv [1, H, W, 3C] → out [1, H, W, C].

        Two products and a softmax, as many queries at a time as keep the scores small; the scores are f32, their softmax bf16.
        """
        _, height, width, channels = out.shape
        keys = height * width
        _expect(qkv, DType.BF16, (1, height, width, 3 * channels))
        _expect(out, DType.BF16, (1, height, width, channels))
        rows, out_rows = qkv.reshape(keys, 3 * channels), out.reshape(keys, channels)
        query, key, value = (rows.columns(i * channels, (i + 1) * channels) for i in range(3))
        padded = -(-keys // _VECTOR) * _VECTOR
        turned = self._device.empty((channels, padded), DType.BF16)
        self._transpose(value, turned)
        count = min(max(1, _SCORE_BYTES // (padded * DType.F32.itemsize)), keys)
        scores = self._device.empty((count, padded), DType.F32)
        weights = self._device.empty((count, padded), DType.BF16)
        for start in range(0, keys, count):
            stop = min(start + count, keys)
            some_scores, some_weights = scores.rows(0, stop - start), weights.rows(0, stop - start)
            self._linear.run(query.rows(start, stop), key, None, some_scores.columns(0, keys))
            self._softmax(some_scores, some_weights, keys, 1.0 / math.sqrt(channels))
            self._linear.run(some_weights, turned, None, out_rows.rows(start, stop))

    def _softmax(self, scores: DeviceArray, out: DeviceArray, num_keys: int, scale: float) -> None:
        self._module.launch(
            "softmax", launch.SOFTMAX, scores, blocks=scores.shape[0], threads=_THREADS, only_aligned=True,
            scores=scores, out=out, num_keys=num_keys, scale=scale,
        )  # fmt: skip

    def _transpose(self, x: DeviceArray, out: DeviceArray) -> None:
        tiles = -(-out.shape[1] // TRANSPOSE_SIDE) * -(-x.shape[1] // TRANSPOSE_SIDE)
        self._module.launch(
            "transpose",
            launch.TRANSPOSE,
            x,
            blocks=tiles,
            threads=_THREADS,
            only_aligned=True,
            x=x,
            out=out,
            padded=out.shape[1],
        )

    def _layout(
        self, name: str, planes: DeviceArray | None, frames: DeviceArray, *, colours: int, side: int, first_frame: int = 0
    ) -> None:
        num_frames, height, width, channels = frames.shape
        if colours * side**2 > channels:
            raise ValueError(f"{colours} colours of {side}x{side} pixels do not fit {channels} channels")
        rows = frames.reshape(num_frames * height * width, channels)
        self._launch(
            name, launch.LAYOUT, rows, elements=rows.shape[0], planes=None if planes is None else planes.pointer, frames=frames,
            channels=colours * side**2, width=width, frame_positions=height * width, side=side,
            num_frames=num_frames if planes is None else planes.shape[1], first_frame=first_frame,
        )  # fmt: skip

    def _shortcut(
        self,
        name: str,
        x: DeviceArray,
        level_input: DeviceArray,
        out: DeviceArray,
        time_factor: int,
        space_factor: int,
        offset: int,
    ) -> None:
        num_frames, height, width, channels = x.shape
        for array, shape in ((x, x.shape), (out, x.shape), (level_input, level_input.shape)):
            _expect(array, DType.BF16, shape)
        rows = x.reshape(num_frames * height * width, channels)
        self._launch(
            name, launch.SHORTCUT, rows, elements=rows.size // _VECTOR, x=x, level_input=level_input, out=out, width=width,
            frame_positions=height * width, in_channels=level_input.shape[3], time_factor=time_factor, space_factor=space_factor,
            offset=offset,
        )  # fmt: skip

    def _launch(
        self, name: str, structure: type[ctypes.Structure], rows: DeviceArray, *, elements: int, **arguments: Any
    ) -> None:
        blocks = -(-elements // _THREADS)
        self._module.launch(name, structure, rows, blocks=blocks, threads=_THREADS, only_aligned=True, **arguments)


def _expect(array: DeviceArray, dtype: DType, shape: tuple[int, ...]) -> None:
    if array.dtype is not dtype or array.shape != shape or not array.is_contiguous:
        raise ValueError(f"expected contiguous {dtype} {list(shape)}, got {array.dtype} {list(array.shape)}")
