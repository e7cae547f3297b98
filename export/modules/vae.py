"""The VAE decoder as the two stages that `runtime.stages.vae` declares, built from the same walk over the architecture.

Activations are [C, T, H, W]. Formulas: Wan-Video/Wan2.2 `wan/modules/vae2_1.py` (42bf4cfa); checked against diffusers'
`AutoencoderKLWan`. The reference's chunk rules are restated with explicit caches: all start at zero, each keeps the last two frames
that its convolution has seen, and the first latent frame passes no time doubling.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from export import functions as op
from runtime.stages.vae import CACHE_FRAMES, DECODE_FIRST, DECODE_STEP, Layer, LayerKind, decoder_layers
from runtime.variants import VaeArch


class Caches:
    """Hands each convolution over time its past, in the order in which they run, and collects what it leaves behind.

    Args:
        past: the caches of the previous latent frame; None for the first one, which has no past.
    """

    def __init__(self, past: Sequence[Tensor] | None) -> None:
        self.first = past is None
        self._past: Iterator[Tensor] = iter(past or ())
        self.next: list[Tensor] = []

    def convolve(self, x: Tensor, conv: nn.Conv3d) -> Tensor:
        """One convolution over time: [C, T, H, W] → [O, T, H, W]."""
        if self.first:  # the past is zero, so only the kernel's last frame counts: a third of the work
            y, past = op.first_causal_conv(x, conv.weight, _bias(conv))
        else:
            y, past = op.causal_conv(x, next(self._past), conv.weight, _bias(conv))
        self.next.append(past)
        return y

    def skip(self, frame: Tensor) -> None:
        """The cache of a convolution that the first frame does not pass: zeros."""
        self.next.append(torch.zeros_like(frame).repeat(1, CACHE_FRAMES, 1, 1))


class CausalConv(nn.Conv3d):
    """3x3 convolution over the present and two past frames."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:  # type: ignore[override]  # the caches are this layer's second input
        return caches.convolve(x, self)


class Pointwise(nn.Conv3d):
    """1x1x1 convolution; it needs no past."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:  # type: ignore[override]  # same call as every other layer
        return functional.conv3d(x, self.weight, self.bias)


class RmsNorm(nn.Module):
    """`x / max(|x|, 1e-12) * sqrt(C) * gamma`, |x| over the channels of one position."""

    def __init__(self, channels: int, *, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * axes))
        self.scale = math.sqrt(channels)

    def forward(self, x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=0, keepdim=True)
        return x * (self.scale / length.clamp_min(1e-12)) * self.gamma


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; a pointwise shortcut where the width changes."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        width, out = layer.in_channels, layer.out_channels
        self.residual = nn.ModuleDict(
            {"0": RmsNorm(width), "2": CausalConv(width, out), "3": RmsNorm(out), "6": CausalConv(out, out)}
        )
        self.shortcut = Pointwise(width, out) if width != out else None

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        hidden = _norm_silu_conv(x, self.residual["0"], self.residual["2"], caches)
        hidden = _norm_silu_conv(hidden, self.residual["3"], self.residual["6"], caches)
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(x, caches)
        return hidden + shortcut


class SpatialAttention(nn.Module):
    """One head of attention over the positions of one frame."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        width = layer.in_channels
        self.norm = RmsNorm(width, axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        normed = self.norm(x.squeeze(1)).flatten(1).t()  # [C, 1, h, w] → [h·w, C]
        qkv = op.linear(normed, self.to_qkv.weight.flatten(1), _bias(self.to_qkv))
        query, key, value = qkv.chunk(3, dim=-1)
        attended = op.attention(query, key, value, num_heads=1)
        projected = op.linear(attended, self.proj.weight.flatten(1), _bias(self.proj))
        return x + projected.t().reshape(x.shape)


class Upsample(nn.Module):
    """Nearest ×2 in space and a 3x3 convolution per frame; before it, for some, ×2 in time."""

    def __init__(self, layer: Layer, *, doubles_time: bool, first: bool) -> None:
        super().__init__()
        width = layer.in_channels
        self.doubles_time = doubles_time
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, layer.out_channels, 3)})
        self.time_conv = nn.Conv3d(width, 2 * width, (3, 1, 1)) if doubles_time and not first else None

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        if self.time_conv is not None:
            both = caches.convolve(x, self.time_conv)
            halves = both.reshape(2, x.shape[0], *both.shape[1:])  # [2, C, T, h, w]: even frames, odd frames
            x = halves.permute(1, 2, 0, 3, 4).flatten(1, 2)  # [C, 2T, h, w]
        elif self.doubles_time:
            caches.skip(x)
        x = functional.interpolate(x, scale_factor=2, mode="nearest")  # for a factor of 2 the same as "nearest-exact"
        conv = self.resample["1"]
        assert isinstance(conv, nn.Conv2d)
        return functional.conv3d(x, conv.weight[:, :, None], _bias(conv), padding=(0, 1, 1))


class Head(nn.ModuleDict):
    """Norm, SiLU and the convolution to RGB."""

    def __init__(self, layer: Layer) -> None:
        super().__init__({"0": RmsNorm(layer.in_channels), "2": CausalConv(layer.in_channels, layer.out_channels)})

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        return _norm_silu_conv(x, self["0"], self["2"], caches)


class _Decoder(nn.Module):
    """The chain of layers; parameters carry the checkpoint's names because layers hang where their names say."""

    first: bool

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()
        layers = decoder_layers(arch)
        for layer in layers:
            _hang(self, layer.name, _build(layer, first=self.first))
        self.layer_names = [layer.name for layer in layers]

    def _decode(self, latents: Tensor, caches: Caches) -> tuple[Tensor, ...]:
        x = latents
        for name in self.layer_names:
            x = self.get_submodule(name)(x, caches)
        return x, *caches.next


class DecodeFirst(_Decoder):
    """First latent frame [z, 1, h, w] → one video frame and all caches."""

    first = True

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return self._decode(latents, Caches(None))


class DecodeStep(_Decoder):
    """A later latent frame and the caches → `temporal_stride` video frames and the new caches."""

    first = False

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        return self._decode(latents, Caches(caches))


def _build(layer: Layer, *, first: bool) -> nn.Module:
    match layer.kind:
        case LayerKind.POINTWISE:
            return Pointwise(layer.in_channels, layer.out_channels)
        case LayerKind.CONV:
            return CausalConv(layer.in_channels, layer.out_channels)
        case LayerKind.RES_BLOCK:
            return ResBlock(layer)
        case LayerKind.ATTENTION:
            return SpatialAttention(layer)
        case LayerKind.UPSAMPLE | LayerKind.UPSAMPLE_TIME:
            return Upsample(layer, doubles_time=layer.kind is LayerKind.UPSAMPLE_TIME, first=first)
        case LayerKind.HEAD:
            return Head(layer)


def _hang(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the submodule `name` of `root`, with the containers that the dots in the name ask for."""
    *containers, leaf = name.split(".")
    for container in containers:
        if container not in dict(root.named_children()):
            root.add_module(container, nn.Module())
        root = root.get_submodule(container)
    root.add_module(leaf, module)


def _norm_silu_conv(x: Tensor, norm: nn.Module, conv: nn.Module, caches: Caches) -> Tensor:
    assert isinstance(norm, RmsNorm)
    convolved: Tensor = conv(op.channel_norm_silu(x, norm.gamma), caches)
    return convolved


def _bias(conv: nn.Module) -> Tensor:
    assert isinstance(conv.bias, Tensor)
    return conv.bias


VAE_MODULES: dict[str, type[nn.Module]] = {DECODE_FIRST: DecodeFirst, DECODE_STEP: DecodeStep}
