"""Drives the image encoder's stages: normalised pixels in, CLIP features out."""

import numpy as np

from runtime.component import Component
from runtime.geometry import Float32
from runtime.variants import ImageEncoderArch


def encode_images(component: Component, pixels: Float32, arch: ImageEncoderArch) -> Float32:
    """Features of images: the hidden states before the encoder's last layer, without the norm after it.

    All images go through a block before the next block runs, so the weights are read once, not once an image.

    Args:
        component: the opened image encoder.
        pixels: float32 [n, 3, image_size, image_size], resized and normalised as CLIP wants them.

    Returns:
        float32 [n * num_tokens, dim]: an image's class token and patches in row-major order, then the next image's.
    """
    backend = component.backend
    patches = [backend.to_device(_cut(image, arch.patch_size)) for image in pixels]
    hidden = [component.run("image_encoder.embed", {"patches": cut})["hidden_states"] for cut in patches]
    for block in range(arch.num_blocks):
        for i, states in enumerate(hidden):
            output = component.run("image_encoder.block", {"hidden_states": states}, block=block)
            hidden[i] = output["next_hidden_states"]
    return np.concatenate([backend.to_host(states) for states in hidden])


def _cut(image: Float32, patch: int) -> Float32:
    """An image [3, H, W] → its whole patches [H/p · W/p, 3·p·p], in row-major order, each as the patch convolution's kernel lies."""
    channels, rows, columns = image.shape[0], image.shape[1] // patch, image.shape[2] // patch
    whole = image[:, : rows * patch, : columns * patch]
    cut = whole.reshape(channels, rows, patch, columns, patch).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(cut.reshape(-1, channels * patch * patch))
