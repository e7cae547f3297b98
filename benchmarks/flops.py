"""What a forward of a transformer has to do, by formula."""

import math

from runtime.geometry import VideoSize, latent_shape, token_grid
from runtime.variants import TransformerArch, Variant


def num_tokens(variant: Variant, size: VideoSize) -> int:
    """Tokens of a video."""
    return math.prod(token_grid(latent_shape(size, vae=variant.vae), variant.transformer))


def forward_tflop(arch: TransformerArch, tokens: int) -> float:
    """Floating-point operations of one forward, 2 per multiply-add: projections, attention, cross-attention, FFN.

    The text's keys and values are not in it: they are computed once a prompt.
    """
    d, f, s = arch.dim, arch.ffn_dim, arch.text_len
    block = 8 * tokens * d * d + 4 * tokens * tokens * d + 4 * tokens * d * d + 4 * s * tokens * d + 4 * tokens * d * f
    return arch.num_layers * block / 1e12
