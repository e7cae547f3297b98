"""Drives the VAE, one latent frame at a time: the encoder from video frames to latents, the decoder back.

Each is two parts (`runtime.stages.vae`): tensors go from one to the other on the device, or, where memory is short, over the host, so that
the part at the pixels can run in strips. `runtime.tiling` is another way to less memory; `runtime.video` writes frames.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Array
from runtime.component import Component
from runtime.geometry import Float32
from runtime.specs import TensorSpec
from runtime.stages.vae import COLOURS, DECODE_HIGH, DECODE_LOW, ENCODE_HIGH, ENCODE_LOW, decoder_parts, encoder_parts
from runtime.strips import Strip, cut_strips, margin_of, most_strips
from runtime.vae_stream import Fetch, Tensors, fetch_in_turn, run_in_strips, run_steps, upload
from runtime.variants import VaeArch

Frames = NDArray[np.uint8]


class Rounding(StrEnum):
    """How a colour in 0..1 becomes one of 256 levels."""

    TRUNCATE = "truncate"
    """Wan's `save_video` and diffusers' `export_to_video`."""
    NEAREST = "nearest"
    """diffusers' PIL output (`VaeImageProcessor.numpy_to_pil`), half to even."""


def encode_stream(component: Component, frames: Float32, arch: VaeArch, *, num_strips: int = 1) -> Float32:
    """Encode a video.

    Args:
        component: the opened VAE encoder.
        frames: float32 [3, T, H, W] in -1..1, T one more than a multiple of `temporal_stride`.
        num_strips: in how many strips the part at the pixels runs; they change memory and time, and numbers by rounding alone.

    Returns:
        The posterior's mean [z_dim, t, h, w], normalised as the transformer takes it.

    Raises:
        ValueError: another number of frames, or so many strips that some are empty.
        EngineError: an engine failed, or the size is not a multiple of the VAE's stride.
    """
    latents = _encode(component, list(frame_chunks(frames, arch)), arch, num_strips)
    return normalise(np.concatenate(list(latents), axis=1), arch)


def encode_chunks(component: Component, chunks: Iterable[Float32]) -> Iterator[Float32]:
    """Encode a video that comes in chunks [3, t, H, W], one frame and then `temporal_stride` each.

    Yields:
        For each chunk its latent frame [z_dim, 1, h, w], not normalised, once the next chunk's is under way.

    Raises:
        EngineError: an engine failed, or the frames' size is not a multiple of the VAE's stride.
    """
    return fetch_in_turn(encode_steps(component, chunks), _fetch(component, "latents"))


def encode_steps(component: Component, chunks: Iterable[Float32]) -> Iterator[Tensors]:
    """`encode_chunks` with the results left on the device, as `latents`."""
    hidden = run_steps(component, ENCODE_HIGH, upload(component, ENCODE_HIGH, ({"frames": chunk} for chunk in chunks)))
    return run_steps(component, ENCODE_LOW, hidden)


def frame_chunks(frames: Float32, arch: VaeArch) -> Iterator[Float32]:
    """Cut a video [3, T, H, W] into the chunks that make one latent frame each.

    Raises:
        ValueError: T is not one more than a multiple of `temporal_stride`.
    """
    num_frames, stride = frames.shape[1], arch.temporal_stride
    if num_frames % stride != 1 % stride:
        raise ValueError(f"{num_frames} frames: the VAE encodes {stride}n+1")
    yield frames[:, :1]
    for start in range(1, num_frames, stride):
        yield frames[:, start : start + stride]


def decode_stream(component: Component, latents: Float32, arch: VaeArch, *, num_strips: int = 1) -> Iterator[Float32]:
    """Decode latents as a stream.

    Args:
        component: the opened VAE.
        latents: float32 [z_dim, T, h, w], normalised as the transformer leaves them.
        num_strips: in how many strips the part at the pixels runs; they change memory and time, and numbers by rounding alone.

    Yields:
        Chunks [3, t, H, W] in about -1..1, not clamped: one frame, then `temporal_stride` frames per latent frame; each once the next
        one is under way. In strips they come when the last strip runs.

    Raises:
        ValueError: so many strips that some are empty.
        EngineError: an engine failed.
    """
    made = component.stage(DECODE_HIGH[0]).outputs[0]
    return _decode(component, unnormalise(latents, arch), arch, num_strips, _fetch(component, "frames"), made)


def decode_colours(component: Component, latents: Float32, arch: VaeArch, *, num_strips: int = 1) -> Iterator[Frames]:
    """`decode_stream` as `to_uint8` gives it, [t, H, W, 3], computed where the decoder runs: a quarter of the bytes leave it."""

    def fetch(outputs: Tensors) -> Callable[[], Array]:
        return component.backend.fetch(component.run(COLOURS, {"frames": outputs.pop("frames")})["colours"])

    made = component.stage(COLOURS).outputs[0]
    return _decode(component, unnormalise(latents, arch), arch, num_strips, fetch, made)


def decode_unnormalised(component: Component, latents: Float32) -> Iterator[Float32]:
    """`decode_stream`, not in strips, for latents that have their own scale back."""
    return fetch_in_turn(decode_steps(component, latents), _fetch(component, "frames"))


def decode_steps(component: Component, latents: Float32) -> Iterator[Tensors]:
    """`decode_unnormalised` with the results left on the device, as `frames`."""
    return run_steps(component, DECODE_HIGH, _decode_low(component, latents))


def most_decoder_strips(arch: VaeArch, height: int, width: int) -> int:
    """The most strips in which decoding latents of that size is worth while."""
    return most_strips(max(height, width), margin=decoder_margin(arch))


def most_encoder_strips(arch: VaeArch, height: int, width: int) -> int:
    """The same of encoding to latents of that size."""
    return most_strips(max(height, width), margin=encoder_margin(arch))


def decoder_margin(arch: VaeArch) -> int:
    """Latent positions on each side of its own that a decoded strip is made from."""
    return margin_of(decoder_parts(arch)[1].layers, arch.spatial_stride)


def encoder_margin(arch: VaeArch) -> int:
    """The same of an encoded strip, in latent positions' worth of pixels."""
    return margin_of(encoder_parts(arch)[0].layers, 1)


def normalise(latents: Float32, arch: VaeArch) -> Float32:
    """Bring the posterior's mean to the transformer's scale: `(mu - mean) * (1 / std)` in float32, as both peers compute it."""
    mean, inverse_std = _statistics(arch)
    return (latents - mean) * inverse_std


def unnormalise(latents: Float32, arch: VaeArch) -> Float32:
    """Give latents their own scale back: `z / (1 / std) + mean` in float32, as both peers compute it."""
    mean, inverse_std = _statistics(arch)
    return latents / inverse_std + mean


def to_uint8(chunk: Float32, *, rounding: Rounding = Rounding.TRUNCATE) -> Frames:
    """Decoded colours [3, t, H, W], clamped to -1..1, as uint8 [t, H, W, 3]."""
    levels = np.clip(chunk.transpose(1, 2, 3, 0) / 2 + np.float32(0.5), 0, 1) * np.float32(255)
    if rounding is Rounding.NEAREST:
        np.rint(levels, out=levels)
    return levels.astype(np.uint8, order="C")


def _decode(
    component: Component, latents: Float32, arch: VaeArch, num_strips: int, fetch: Fetch, made: TensorSpec
) -> Iterator[Array]:
    if num_strips == 1:
        yield from fetch_in_turn(decode_steps(component, latents), fetch)
        return
    axis, strips = _cut(latents.shape[2], latents.shape[3], num_strips, margin=decoder_margin(arch))
    to_host = component.backend.to_host
    chunks = [{name: to_host(tensor) for name, tensor in step.items()} for step in _decode_low(component, latents)]
    yield from run_in_strips(component, DECODE_HIGH, chunks, strips, axis=axis, made=made, fetch=fetch)


def _decode_low(component: Component, latents: Float32) -> Iterator[Tensors]:
    chunks = ({"latents": latents[:, index : index + 1]} for index in range(latents.shape[1]))
    return run_steps(component, DECODE_LOW, upload(component, DECODE_LOW, chunks))


def _encode(component: Component, frames: Sequence[Float32], arch: VaeArch, num_strips: int) -> Iterator[Float32]:
    if num_strips == 1:
        yield from encode_chunks(component, frames)
        return
    height, width = (extent // arch.spatial_stride for extent in frames[0].shape[2:])
    axis, strips = _cut(height, width, num_strips, margin=encoder_margin(arch))
    made, fetch = component.stage(ENCODE_HIGH[0]).outputs[0], _fetch(component, "hidden")
    chunks = [{"frames": chunk} for chunk in frames]
    hidden = run_in_strips(component, ENCODE_HIGH, chunks, strips, axis=axis, made=made, fetch=fetch)
    whole = upload(component, ENCODE_LOW, [{"hidden": chunk} for chunk in hidden])
    yield from fetch_in_turn(run_steps(component, ENCODE_LOW, whole), _fetch(component, "latents"))


def _cut(height: int, width: int, num_strips: int, *, margin: int) -> tuple[str, list[Strip]]:
    """Strips across the longer side: the name of the side that is cut, and the strips."""
    axis, extent = ("width", width) if width >= height else ("height", height)
    return axis, list(cut_strips(extent, num_strips, margin=margin))


def _fetch(component: Component, name: str) -> Fetch:
    return lambda outputs: component.backend.fetch(outputs.pop(name))


def _statistics(arch: VaeArch) -> tuple[Float32, Float32]:
    """The latents' mean and one over their deviation, [z_dim, 1, 1, 1]."""
    shape = (arch.z_dim, 1, 1, 1)
    mean = np.array(arch.latents_mean, np.float32).reshape(shape)
    return mean, np.float32(1) / np.array(arch.latents_std, np.float32).reshape(shape)
