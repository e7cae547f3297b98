"""The layers of both VAEs, as modules over one group of frames and the caches.

Activations are [C, T, H, W]. Formulas: Wan-Video/Wan2.2 `wan/modules/vae2_1.py` and `vae2_2.py` (42bf4cfa); checked against diffusers'
`AutoencoderKLWan`. The reference's chunk rules are restated with explicit caches: all start at zero, each keeps the last frames that its
convolution has seen, and the first frame passes no convolution that doubles or halves time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from export import functions as op
from runtime.stages.vae_layers import Layer, LayerKind


def build_layer(layer: Layer, *, first: bool) -> nn.Module:
    """The module of one link of a chain; `first` for the pass of the first frame.

    A level's shortcut is called with the chain's tensor and the level's input, every other layer with the chain's tensor and `Caches`.
    """
    match layer.kind:
        case LayerKind.POINTWISE:
            return Pointwise(layer.in_channels, layer.out_channels)
        case LayerKind.MEAN:
            return Mean(layer)
        case LayerKind.CONV:
            return CausalConv(layer.in_channels, layer.out_channels)
        case LayerKind.RES_BLOCK:
            return ResBlock(layer)
        case LayerKind.ATTENTION:
            return SpatialAttention(layer)
        case LayerKind.UPSAMPLE | LayerKind.UPSAMPLE_TIME:
            return Upsample(layer, doubles_time=layer.kind is LayerKind.UPSAMPLE_TIME, first=first)
        case LayerKind.DOWNSAMPLE | LayerKind.DOWNSAMPLE_TIME:
            return Downsample(layer, halves_time=layer.kind is LayerKind.DOWNSAMPLE_TIME, first=first)
        case LayerKind.AVERAGE_DOWN | LayerKind.DUPLICATE_UP:
            return LevelShortcut(layer)
        case LayerKind.HEAD:
            return Head(layer)
        case LayerKind.FOLD | LayerKind.UNFOLD:
            return Fold(layer)


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

    def halve_time(self, x: Tensor, conv: nn.Conv3d) -> Tensor:
        """A convolution over one past frame and the present ones, at every second frame: [C, 2T, H, W] → [C, T, H, W]."""
        y, past = op.causal_conv(x, next(self._past), conv.weight, _bias(conv), time_stride=2)
        self.next.append(past)
        return y

    def skip(self, frame: Tensor) -> None:
        """The cache of a convolution that the first frame does not pass and does not leave its mark in: zeros."""
        self.next.append(op.zero_past(frame))

    def keep(self, frame: Tensor) -> None:
        """The cache of a convolution that the first frame does not pass and of which it is the past."""
        self.next.append(frame)


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
        return op.pointwise_conv(x, self.weight, _bias(self))


class Mean(Pointwise):
    """1x1x1 convolution to the posterior's mean and log-variance, of which the mean goes on."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.in_channels, 2 * layer.out_channels)

    def forward(self, x: Tensor, caches: Caches) -> Tensor:  # type: ignore[override]  # same call as every other layer
        return op.first_channels(super().forward(x, caches), self.out_channels // 2)


class RmsNorm(nn.Module):
    """`wanrt::ChannelNorm`: RMS norm over the channels of one position."""

    def __init__(self, channels: int, *, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        return op.channel_norm(x, self.gamma)


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
        normed = op.frame_rows(self.norm(x))  # [C, 1, h, w] → [h·w, C]
        qkv = op.linear(normed, self.to_qkv.weight.flatten(1), _bias(self.to_qkv))
        query, key, value = qkv.chunk(3, dim=-1)
        attended = op.attention(query, key, value, num_heads=1)
        projected = op.linear(attended, self.proj.weight.flatten(1), _bias(self.proj))
        return op.add_frame_rows(x, projected)


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
            x = op.interleave_frames(caches.convolve(x, self.time_conv))
        elif self.doubles_time:
            caches.skip(x)
        conv = self.resample["1"]
        assert isinstance(conv, nn.Conv2d)
        return op.frame_conv(op.upsample_nearest(x), conv.weight, _bias(conv))


class Downsample(nn.Module):
    """Rows and columns of zeros below and on the right, a 3x3 convolution at every second position; after it, for some, ÷2 in time."""

    def __init__(self, layer: Layer, *, halves_time: bool, first: bool) -> None:
        super().__init__()
        width, out = layer.in_channels, layer.out_channels
        self.halves_time = halves_time
        self.resample = nn.ModuleDict({"1": nn.Conv2d(width, out, 3)})
        self.time_conv = nn.Conv3d(out, out, (3, 1, 1)) if halves_time and not first else None

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        conv = self.resample["1"]
        assert isinstance(conv, nn.Conv2d)
        x = op.frame_conv(x, conv.weight, _bias(conv), pads=(0, 0, 1, 1), stride=2)
        if self.time_conv is not None:
            return caches.halve_time(x, self.time_conv)
        if self.halves_time:
            caches.keep(x)
        return x


class LevelShortcut(nn.Module):
    """Adds a level's input to its output, averaged down or repeated up to its size and width; no weights."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.add = op.add_average_down if layer.kind is LayerKind.AVERAGE_DOWN else op.add_duplicate_up
        self.time_factor, self.space_factor = layer.time_factor, layer.space_factor

    def forward(self, x: Tensor, level_input: Tensor) -> Tensor:
        return self.add(x, level_input, time_factor=self.time_factor, space_factor=self.space_factor)


class Fold(nn.Module):
    """Squares of pixels to channels, or back; no weights."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.fold = op.fold_pixels if layer.kind is LayerKind.FOLD else op.unfold_pixels
        self.side = layer.space_factor

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        return self.fold(x, side=self.side)


class Head(nn.ModuleDict):
    """Norm, SiLU and the convolution to the channels that leave the chain."""

    def __init__(self, layer: Layer) -> None:
        super().__init__({"0": RmsNorm(layer.in_channels), "2": CausalConv(layer.in_channels, layer.out_channels)})

    def forward(self, x: Tensor, caches: Caches) -> Tensor:
        return _norm_silu_conv(x, self["0"], self["2"], caches)


def _norm_silu_conv(x: Tensor, norm: nn.Module, conv: nn.Module, caches: Caches) -> Tensor:
    assert isinstance(norm, RmsNorm)
    convolved: Tensor = conv(op.channel_norm_silu(x, norm.gamma), caches)
    return convolved


def _bias(conv: nn.Module) -> Tensor:
    assert isinstance(conv.bias, Tensor)
    return conv.bias
