"""Random weights for toy checkpoints, spread as those of a trained model might be; each depends on the seed and its name only."""

import zlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from export.layouts import (
    Shape,
    Table,
    image_encoder_diffusers_names,
    image_encoder_stored_names,
    image_encoder_tensors,
    text_encoder_tensors,
    transformer_tensors,
    vae_tensors,
)
from export.layouts.tables import layer_norm
from runtime.variants import ImageEncoderArch, TextEncoderArch, TransformerArch, VaeArch

Tensors = dict[str, NDArray[np.float32]]
_HEAD_GAIN = 0.45 / 0.596  # pixels of standard deviation 0.45 in [-1, 1]; 0.596 is the RMS of SiLU over a standard normal


def transformer_weights(arch: TransformerArch, *, seed: int, expert: int) -> Tensors:
    """One expert, in original naming."""
    return _random_tensors(transformer_tensors(arch), seed=(seed, expert))


def text_encoder_weights(arch: TextEncoderArch, *, seed: int) -> Tensors:
    """The text encoder, in original naming; its numbers are bfloat16's."""
    tensors = _random_tensors(text_encoder_tensors(arch), seed=(seed, 2))
    for name, tensor in tensors.items():
        if name.endswith("attn.q.weight"):
            tensor /= np.sqrt(
                arch.attention_dim / arch.num_heads
            )  # UMT5 does not scale its logits; its queries are small instead
    tensors["token_embedding.weight"] *= np.sqrt(arch.dim)  # unit variance per token
    return {name: _bfloat16_values(tensor) for name, tensor in tensors.items()}


def vae_weights(arch: VaeArch, *, seed: int) -> Tensors:
    """The VAE, in original naming."""
    tensors = _random_tensors(vae_tensors(arch), seed=(seed, 3))
    tensors["decoder.head.2.weight"] *= _HEAD_GAIN
    for name, tensor in tensors.items():
        if name.startswith("decoder.") and ".time_conv." in name:
            first_frame, second_frame = np.split(tensor, 2)
            second_frame[:] = (
                first_frame  # the two frames made of one start equal: later layers move them, and nothing flickers
            )
    return tensors


def image_encoder_weights(arch: ImageEncoderArch, *, seed: int) -> Tensors:
    """The image encoder as it is in transformers' files, with the last layer and the norm that Wan does not use."""
    whole = _with_unused_layer(arch)
    names = image_encoder_diffusers_names(whole)
    table = {names[name]: shape for name, shape in image_encoder_tensors(whole, original=False).items()}
    return _random_tensors({**table, **layer_norm("post_layernorm", arch.dim)}, seed=(seed, 4))


def original_image_encoder(arch: ImageEncoderArch, tensors: Tensors) -> Tensors:
    """What of `image_encoder_weights` the original's file holds, under its names: q, k and v joined."""
    whole = _with_unused_layer(arch)
    names, shapes = image_encoder_diffusers_names(whole), image_encoder_tensors(whole, original=True)
    return {
        stored: np.concatenate([tensors[names[part]].reshape(shapes[part]) for part in _parts(parts)])
        for stored, parts in image_encoder_stored_names(whole).items()
        if stored.startswith("visual.")
    }


def _with_unused_layer(arch: ImageEncoderArch) -> ImageEncoderArch:
    """For whose tables the last layer, which is never run, counts as one that is."""
    return replace(arch, num_layers=arch.num_layers + 1)


def _parts(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _random_tensors(table: Table, *, seed: tuple[int, int]) -> Tensors:
    """Random float32 tensors of the table's shapes; each depends on the seed and its own name only."""
    return {
        name: _random_tensor(name, shape, np.random.default_rng((*seed, zlib.crc32(name.encode()))))
        for name, shape in table.items()
    }


def _random_tensor(name: str, shape: Shape, random: np.random.Generator) -> NDArray[np.float32]:
    """A tensor as it might look after training: gains about 1, small biases, weights that keep the variance."""
    normal = random.standard_normal(shape)
    if name.endswith(".bias"):
        values = 0.02 * normal
    elif name.endswith("modulation"):
        values = 0.2 * normal
    elif name.endswith("gamma") or len(shape) == 1:
        values = 1 + 0.1 * normal
    else:
        values = normal * _smooth_window(shape[2:])
        values /= np.sqrt((values**2).mean(axis=0, keepdims=True).sum())  # fan-in, window included
    return np.ascontiguousarray(values, dtype=np.float32)


def _bfloat16_values(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """The tensor cut to bfloat16's precision: the original layout stores its text encoder so, and both must hold the same."""
    return (tensor.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _smooth_window(kernel: Shape) -> NDArray[np.float64]:
    """Binomial weights [1, 2, 1] along every kernel axis of three, so that the VAE draws blobs rather than grain."""
    window = np.ones(kernel)
    for axis, size in enumerate(kernel):
        profile = np.array([1.0, 2.0, 1.0]) if size == 3 else np.ones(size)
        window = window * profile.reshape([-1 if i == axis else 1 for i in range(len(kernel))])
    return window
