"""Random weights of a transformer on any device: plain ones, and ones with what trained transformers have and random ones lack.

No weights of a trained Wan are at hand where this runs, so what they do to FP8 is provoked, one cause at a time, with the figures that others
found in such networks:

- a few channels are 20 to 100 times as large as the rest, the same ones for all tokens: LLM.int8() (arXiv 2208.07339) found six
  such with up to 20 times, SmoothQuant (2211.10438) some with about 100 times;
- some of those are nearly the same number for every token, a bias of the network: "Massive Activations in Large Language Models"
  (2402.17762), there also in vision transformers;
- keys have a part that all tokens share: SageAttention (2410.02367), which takes it off;
- weights have longer tails than a normal distribution: LRQ-DiT (2508.03485), in diffusion transformers;
- attention looks at few tokens; how peaked it is in Wan is not published, so the spread of its scores is a guess;
- the first and last blocks of Wan2.1 14B have other magnitudes than those between: 2606.00957, which keeps 2 and 3 of 40 in bf16.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from export.layouts import transformer_tensors
from runtime.variants import TransformerArch

Tensors = dict[str, Tensor]
LEAST, MOST = 20.0, 100.0
"""How many times as large as the others an outlier channel is."""
VALUES_MOST = 10.0
SPREAD = 4.0
KEY_BIAS = 8.0
_CHANNELS_PER_OUTLIER = 256  # six of 1536
_TAIL_DEGREES = 5.0  # of Student's distribution


def plain(arch: TransformerArch, generator: torch.Generator) -> Tensors:
    """Normal weights that keep the variance, gains about 1, small biases."""
    tensors = {}
    for name, shape in transformer_tensors(arch).items():
        drawn = torch.empty(shape, device=generator.device).normal_(generator=generator)
        if name.endswith("modulation"):
            tensors[name] = drawn * 0.2
        elif name.endswith("bias"):
            tensors[name] = drawn * 0.02
        elif len(shape) == 1:
            tensors[name] = 1 + 0.1 * drawn
        else:
            tensors[name] = drawn * drawn[0].numel() ** -0.5
    return tensors


def peaked_attention(arch: TransformerArch, generator: torch.Generator) -> Tensors:
    """Plain weights but for the norms of queries and keys: scores of self-attention have a deviation of `SPREAD` instead of 1."""
    tensors = plain(arch, generator)
    for name, tensor in tensors.items():
        if name.endswith(("self_attn.norm_q.weight", "self_attn.norm_k.weight")):
            tensor *= SPREAD**0.5
    return tensors


def outlier_channels(arch: TransformerArch, generator: torch.Generator) -> Tensors:
    """Loud channels behind every norm, behind the GELU and in the values; longer tails.

    Whoever reads a loud channel takes the square root of its loudness back: it stays important, but is not all there is.
    """
    tensors = plain(arch, generator)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.startswith("blocks."):
            _lengthen_tails(tensor, generator)
    for block in range(arch.num_layers):
        prefix = f"blocks.{block}."
        channels, loudness = _outliers(arch.dim, MOST, generator)
        for row, readers in ((1, ("self_attn.q", "self_attn.k", "self_attn.v")), (4, ("ffn.0",))):
            tensors[f"{prefix}modulation"][0, row, channels] += loudness
            _quieten(tensors, [prefix + reader for reader in readers], channels, loudness)
        tensors[f"{prefix}norm3.weight"][channels] *= loudness
        _quieten(tensors, [f"{prefix}cross_attn.q"], channels, loudness)
        for writer, reader, most in (("ffn.0", "ffn.2", MOST), ("self_attn.v", "self_attn.o", VALUES_MOST)):
            _loud_rows(tensors, prefix + writer, prefix + reader, most, generator)
    return tensors


def constant_channels(arch: TransformerArch, generator: torch.Generator) -> Tensors:
    """Loud channels that are the same number for every token, from the first block to the last; keys, values and the GELU's output
    with means.

    The norms make all other channels as quiet as the loud ones are loud, and their gains put that right again. The prediction itself
    has nothing of the constants.
    """
    tensors = plain(arch, generator)
    channels, loudness = _outliers(arch.dim, MOST, generator)
    signs = torch.ones_like(loudness)
    signs[::2] = -1
    tensors["patch_embedding.bias"][channels] += signs * loudness
    spread = float((1 + (loudness**2).sum() / arch.dim).sqrt())  # of the embedded patches
    tensors["head.modulation"][0, 1] += spread - 1
    tensors["head.head.weight"][:, channels] /= loudness
    for block in range(arch.num_layers):
        prefix = f"blocks.{block}."
        tensors[f"{prefix}modulation"][0, [1, 4]] += spread - 1
        tensors[f"{prefix}norm3.weight"] *= spread
        readers = ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "ffn.0")
        _quieten(tensors, [prefix + reader for reader in readers], channels, loudness)
        keys, _ = _outliers(arch.dim, MOST, generator)
        tensors[f"{prefix}self_attn.k.bias"][keys] += KEY_BIAS
        tensors[f"{prefix}self_attn.v.bias"].normal_(generator=generator)
        tensors[f"{prefix}ffn.0.bias"].normal_(generator=generator)
    return tensors


def _outliers(width: int, most: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some channels, and how loud each is: from `LEAST`, or a fifth of the most, to `most`."""
    count = max(2, width // _CHANNELS_PER_OUTLIER)
    channels = torch.randperm(width, generator=generator, device=generator.device)[:count]
    least = min(LEAST, most / 5)
    return channels, torch.logspace(0, 1, count, base=most / least, device=generator.device) * least


def _quieten(tensors: Tensors, readers: list[str], channels: Tensor, loudness: Tensor) -> None:
    for reader in readers:
        tensors[f"{reader}.weight"][:, channels] /= loudness.sqrt()


def _loud_rows(tensors: Tensors, writer: str, reader: str, most: float, generator: torch.Generator) -> None:
    channels, loudness = _outliers(len(tensors[f"{writer}.bias"]), most, generator)
    tensors[f"{writer}.weight"][channels] *= loudness[:, None]
    _quieten(tensors, [reader], channels, loudness)


def _lengthen_tails(tensor: Tensor, generator: torch.Generator) -> None:
    """Normal numbers → Student's, of the same variance: each over the root of a mean of squares of its own."""
    squares = torch.zeros_like(tensor)
    for _ in range(int(_TAIL_DEGREES)):
        squares += torch.empty_like(tensor).normal_(generator=generator) ** 2
    tensor /= (squares / _TAIL_DEGREES).sqrt()
    tensor *= ((_TAIL_DEGREES - 2) / _TAIL_DEGREES) ** 0.5


WEIGHTS: dict[str, Callable[[TransformerArch, torch.Generator], Tensors]] = {
    "random": plain,
    "peaked attention": peaked_attention,
    "outlier channels": outlier_channels,
    "constant channels": constant_channels,
}
