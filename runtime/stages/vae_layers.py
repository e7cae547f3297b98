"""The VAE as two chains of layers, encoder and decoder, in the order in which they run.

Stages (`runtime.stages.vae`, `runtime.stages.vae_encoder`) and modules (`export.modules`) both come from one walk over these chains.
Layers are named as in the original checkpoint; the widths and levels are those of Wan-Video/Wan2.2 `wan/modules/vae2_1.py` and
`vae2_2.py` (42bf4cfa).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count, pairwise

from runtime.specs import Axis, TensorSpec
from runtime.variants import VaeArch

CACHE_FRAMES = 2
"""Past frames that a convolution over three frames keeps."""
VIDEO_CHANNELS = 3


class LayerKind(StrEnum):
    """What a link of a chain does."""

    POINTWISE = "pointwise"
    """Convolution over one position; the same for every frame."""
    MEAN = "mean"
    """A pointwise convolution to mean and log-variance, of which only the mean is wanted."""
    CONV = "conv"
    RES_BLOCK = "res_block"
    ATTENTION = "attention"
    UPSAMPLE = "upsample"
    """Doubles height and width."""
    UPSAMPLE_TIME = "upsample_time"
    """Doubles the frames too, except in the first latent frame's pass."""
    DOWNSAMPLE = "downsample"
    """Halves height and width."""
    DOWNSAMPLE_TIME = "downsample_time"
    """Halves the frames too, except in the first frame's pass."""
    AVERAGE_DOWN = "average_down"
    """Adds the input of its level, averaged down to the size and width of what the level made of it."""
    DUPLICATE_UP = "duplicate_up"
    """Adds the input of its level, repeated up to the size and width of what the level made of it."""
    HEAD = "head"
    FOLD = "fold"
    """Squares of pixels into channels."""
    UNFOLD = "unfold"
    """Channels into squares of pixels."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One link of a chain.

    `name` is the prefix of its weights in the checkpoint, `scale` its input's height and width per latent position. Of a level's
    shortcut, `in_channels` and `scale` are those of the level's input, `span` is the number of links around which it goes, and
    `time_factor` and `space_factor` say how much the level changes; `space_factor` is also the side of a folded square.
    """

    kind: LayerKind
    name: str
    in_channels: int
    out_channels: int
    scale: int = 1
    span: int = 0
    time_factor: int = 1
    space_factor: int = 1


def check_levels(arch: VaeArch) -> None:
    """Check that the levels of an architecture fit together.

    Raises:
        ValueError: the flags of temporal down-sampling do not fit the levels, or a level's shortcut cannot go from its width to the next.
    """
    if len(arch.temporal_downsample) != len(arch.dim_mult) - 1:
        raise ValueError(f"{len(arch.dim_mult)} levels with {len(arch.temporal_downsample)} flags of temporal down-sampling")
    if not arch.residual_levels:
        return
    factors = [8 if halves_time else 4 for halves_time in arch.temporal_downsample]  # frames and positions that become one
    down = [arch.base_dim * multiple for multiple in (1, *arch.dim_mult)]
    up = [arch.decoder_dim * multiple for multiple in (arch.dim_mult[-1], *reversed(arch.dim_mult))]
    for (width, out), factor in zip(pairwise(down), [*factors, 1], strict=True):
        if width * factor % out:
            raise ValueError(f"no average over {factor} places leads from {width} to {out} channels")
    for (width, out), factor in zip(pairwise(up), reversed(factors), strict=False):  # the last level has no shortcut
        if out * factor % width:
            raise ValueError(f"no repetition over {factor} places leads from {width} to {out} channels")


def encoder_layers(arch: VaeArch) -> tuple[Layer, ...]:
    """The encoder's layers, from frames in -1..1 to the posterior's mean.

    Raises:
        ValueError: the levels do not fit together, see `check_levels`.
    """
    check_levels(arch)
    widths = [arch.base_dim * multiple for multiple in (1, *arch.dim_mult)]
    downsamplers = [LayerKind.DOWNSAMPLE_TIME if time else LayerKind.DOWNSAMPLE for time in arch.temporal_downsample]
    scale, colours = arch.spatial_stride // arch.patch_size, VIDEO_CHANNELS * arch.patch_size**2
    layers = [Layer(LayerKind.CONV, "encoder.conv1", colours, widths[0], scale)]
    if arch.patch_size > 1:
        fold = Layer(LayerKind.FOLD, "fold", VIDEO_CHANNELS, colours, arch.spatial_stride, space_factor=arch.patch_size)
        layers.insert(0, fold)
    levels = zip(_level_names("encoder.downsamples", arch), pairwise(widths), [*downsamplers, None], strict=True)
    for names, (width, out), downsampler in levels:
        level = _res_blocks(names, width, out, scale, number=arch.num_res_blocks)
        if downsampler is not None:
            level.append(Layer(downsampler, next(names), out, out, scale))
        if arch.residual_levels:
            level.append(_shortcut(LayerKind.AVERAGE_DOWN, level))
        layers += level
        scale //= 2 if downsampler is not None else 1
    return (
        *layers,
        *_middle("encoder.middle", widths[-1]),
        Layer(LayerKind.HEAD, "encoder.head", widths[-1], 2 * arch.z_dim),
        Layer(LayerKind.MEAN, "conv1", 2 * arch.z_dim, arch.z_dim),
    )


def decoder_layers(arch: VaeArch) -> tuple[Layer, ...]:
    """The decoder's layers, from latents to frames of about -1..1.

    Raises:
        ValueError: the levels do not fit together, see `check_levels`.
    """
    check_levels(arch)
    widths = [arch.decoder_dim * multiple for multiple in reversed(arch.dim_mult)]
    upsamplers = [LayerKind.UPSAMPLE_TIME if time else LayerKind.UPSAMPLE for time in reversed(arch.temporal_downsample)]
    layers = [
        Layer(LayerKind.POINTWISE, "conv2", arch.z_dim, arch.z_dim),
        Layer(LayerKind.CONV, "decoder.conv1", arch.z_dim, widths[0]),
        *_middle("decoder.middle", widths[0]),
    ]
    channels, scale = widths[0], 1
    for names, width, upsampler in zip(_level_names("decoder.upsamples", arch), widths, [*upsamplers, None], strict=True):
        level = _res_blocks(names, channels, width, scale, number=arch.num_res_blocks + 1)
        channels = width
        if upsampler is not None:
            channels = width if arch.residual_levels else width // 2
            level.append(Layer(upsampler, next(names), width, channels, scale))
            if arch.residual_levels:
                level.append(_shortcut(LayerKind.DUPLICATE_UP, level))
            scale *= 2
        layers += level
    colours = VIDEO_CHANNELS * arch.patch_size**2
    layers.append(Layer(LayerKind.HEAD, "decoder.head", channels, colours, scale))
    if arch.patch_size > 1:
        layers.append(Layer(LayerKind.UNFOLD, "unfold", colours, VIDEO_CHANNELS, scale, space_factor=arch.patch_size))
    return tuple(layers)


def cache_shapes(layer: Layer) -> Iterator[tuple[Axis, ...]]:
    """One cache per convolution over time, [C, frames, height, width]: the last frames of its input."""
    match layer.kind:
        case LayerKind.CONV | LayerKind.UPSAMPLE_TIME | LayerKind.HEAD:
            yield (layer.in_channels, CACHE_FRAMES, *positions(layer.scale))
        case LayerKind.RES_BLOCK:
            yield (layer.in_channels, CACHE_FRAMES, *positions(layer.scale))
            yield (layer.out_channels, CACHE_FRAMES, *positions(layer.scale))
        case LayerKind.DOWNSAMPLE_TIME:  # its convolution over time follows the halving of height and width
            yield (layer.out_channels, 1, *positions(layer.scale // 2))


def weights(layer: Layer, *, first: bool) -> Iterator[TensorSpec]:
    """The weights of a layer, by the checkpoint's names; the first frame's pass goes through no convolution that changes time."""
    name, width, out = layer.name, layer.in_channels, layer.out_channels
    match layer.kind:
        case LayerKind.POINTWISE:
            yield from _conv(name, out, width, 1, 1, 1)
        case LayerKind.MEAN:
            yield from _conv(name, 2 * out, width, 1, 1, 1)
        case LayerKind.CONV:
            yield from _conv(name, out, width, 3, 3, 3)
        case LayerKind.RES_BLOCK:
            yield TensorSpec(f"{name}.residual.0.gamma", (width, 1, 1, 1))
            yield from _conv(f"{name}.residual.2", out, width, 3, 3, 3)
            yield TensorSpec(f"{name}.residual.3.gamma", (out, 1, 1, 1))
            yield from _conv(f"{name}.residual.6", out, out, 3, 3, 3)
            if width != out:
                yield from _conv(f"{name}.shortcut", out, width, 1, 1, 1)
        case LayerKind.ATTENTION:
            yield TensorSpec(f"{name}.norm.gamma", (width, 1, 1))
            yield from _conv(f"{name}.to_qkv", 3 * width, width, 1, 1)
            yield from _conv(f"{name}.proj", width, width, 1, 1)
        case LayerKind.UPSAMPLE | LayerKind.UPSAMPLE_TIME | LayerKind.DOWNSAMPLE | LayerKind.DOWNSAMPLE_TIME:
            yield from _conv(f"{name}.resample.1", out, width, 3, 3)
            if layer.kind is LayerKind.UPSAMPLE_TIME and not first:
                yield from _conv(f"{name}.time_conv", 2 * width, width, 3, 1, 1)
            if layer.kind is LayerKind.DOWNSAMPLE_TIME and not first:
                yield from _conv(f"{name}.time_conv", out, out, 3, 1, 1)
        case LayerKind.HEAD:
            yield TensorSpec(f"{name}.0.gamma", (width, 1, 1, 1))
            yield from _conv(f"{name}.2", out, width, 3, 3, 3)


def positions(scale: int) -> tuple[Axis, Axis]:
    """Height and width at `scale` positions per latent position, as a stage's spec writes them."""
    return ("height", "width") if scale == 1 else (f"{scale}*height", f"{scale}*width")


def _level_names(prefix: str, arch: VaeArch) -> Iterator[Iterator[str]]:
    """For each level the names of its layers: one list for all levels, or one list a level where levels have shortcuts."""
    leaf = prefix.rpartition(".")[2]
    shared = _numbered(prefix)
    for level in range(len(arch.dim_mult)):
        yield _numbered(f"{prefix}.{level}.{leaf}") if arch.residual_levels else shared


def _numbered(prefix: str) -> Iterator[str]:
    return (f"{prefix}.{index}" for index in count())


def _res_blocks(names: Iterator[str], width: int, out: int, scale: int, *, number: int) -> list[Layer]:
    return [Layer(LayerKind.RES_BLOCK, next(names), width if index == 0 else out, out, scale) for index in range(number)]


def _middle(prefix: str, width: int) -> tuple[Layer, ...]:
    return (
        Layer(LayerKind.RES_BLOCK, f"{prefix}.0", width, width),
        Layer(LayerKind.ATTENTION, f"{prefix}.1", width, width),
        Layer(LayerKind.RES_BLOCK, f"{prefix}.2", width, width),
    )


def _shortcut(kind: LayerKind, level: list[Layer]) -> Layer:
    first, last = level[0], level[-1]
    changes_time = last.kind in (LayerKind.UPSAMPLE_TIME, LayerKind.DOWNSAMPLE_TIME)
    return Layer(
        kind,
        f"{last.name.rsplit('.', 2)[0]}.avg_shortcut",  # as the original calls it, though it has no weights
        first.in_channels,
        last.out_channels,
        first.scale,
        span=len(level),
        time_factor=2 if changes_time else 1,
        space_factor=1 if last.kind is LayerKind.RES_BLOCK else 2,
    )


def _conv(name: str, out_channels: int, in_channels: int, *kernel: int) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec(f"{name}.weight", (out_channels, in_channels, *kernel)), TensorSpec(f"{name}.bias", (out_channels,))
