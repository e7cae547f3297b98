"""The stages of the VAE decoder, a stream over latent frames.

`decode_first` turns the first latent frame into one video frame and into the caches; `decode_step` turns each next latent frame and the
caches into `temporal_stride` frames and new caches. Every stage and its module come from one walk over the architecture,
`decoder_layers`. Latents enter un-normalised (`runtime.vae`); the batch axis exists only inside the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from runtime.specs import Axis, StageSpec, TensorSpec
from runtime.variants import VaeArch

DECODE_FIRST = "vae.decode_first"
DECODE_STEP = "vae.decode_step"
CACHE_FRAMES = 2
"""Past frames that a convolution over three frames keeps."""
VIDEO_CHANNELS = 3


class LayerKind(StrEnum):
    """What a link of the decoder's chain does."""

    POINTWISE = "pointwise"
    """Convolution over one position; the same for every frame."""
    CONV = "conv"
    RES_BLOCK = "res_block"
    ATTENTION = "attention"
    UPSAMPLE = "upsample"
    """Doubles height and width and halves the channels."""
    UPSAMPLE_TIME = "upsample_time"
    """Doubles the frames too, except in the first latent frame's pass."""
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class Layer:
    """One link of the decoder's chain.

    `name` is the prefix of its weights in the checkpoint, `scale` its input's height and width per latent position.
    """

    kind: LayerKind
    name: str
    in_channels: int
    out_channels: int
    scale: int = 1


def decoder_layers(arch: VaeArch) -> tuple[Layer, ...]:
    """The decoder's layers in the order in which they run, named as in the original checkpoint.

    Raises:
        ValueError: the flags of temporal down-sampling do not fit the levels.
    """
    widths = [arch.base_dim * multiple for multiple in reversed(arch.dim_mult)]
    middle = widths[0]
    upsamplers = [
        LayerKind.UPSAMPLE_TIME if doubles_time else LayerKind.UPSAMPLE for doubles_time in reversed(arch.temporal_downsample)
    ]
    layers = [
        Layer(LayerKind.POINTWISE, "conv2", arch.z_dim, arch.z_dim),
        Layer(LayerKind.CONV, "decoder.conv1", arch.z_dim, middle),
        Layer(LayerKind.RES_BLOCK, "decoder.middle.0", middle, middle),
        Layer(LayerKind.ATTENTION, "decoder.middle.1", middle, middle),
        Layer(LayerKind.RES_BLOCK, "decoder.middle.2", middle, middle),
    ]
    index, channels, scale = 0, middle, 1  # index: the checkpoint numbers blocks and upsamplers of all levels in one list
    for width, upsampler in zip(widths, [*upsamplers, None], strict=True):
        for _ in range(arch.num_res_blocks + 1):
            layers.append(Layer(LayerKind.RES_BLOCK, f"decoder.upsamples.{index}", channels, width, scale))
            index, channels = index + 1, width
        if upsampler is not None:
            layers.append(Layer(upsampler, f"decoder.upsamples.{index}", width, width // 2, scale))
            index, channels, scale = index + 1, width // 2, 2 * scale
    layers.append(Layer(LayerKind.HEAD, "decoder.head", channels, VIDEO_CHANNELS, scale))
    return tuple(layers)


def vae_stages(arch: VaeArch) -> tuple[StageSpec, ...]:
    """Declared stages of the decoder. Both output every cache: the first pass leaves those of time doubling at zero."""
    layers = decoder_layers(arch)
    latents = TensorSpec("latents", (arch.z_dim, 1, "height", "width"))
    caches = [(f"cache_{i:02}", shape) for i, shape in enumerate(shape for layer in layers for shape in _cache_shapes(layer))]
    size = _pixels(arch.spatial_stride)
    return (
        StageSpec(
            name=DECODE_FIRST,
            inputs=(latents,),
            weights=tuple(weight for layer in layers for weight in _weights(layer, first=True)),
            outputs=(
                TensorSpec("frames", (VIDEO_CHANNELS, 1, *size)),
                *(TensorSpec(f"next_{name}", shape) for name, shape in caches),
            ),
        ),
        StageSpec(
            name=DECODE_STEP,
            inputs=(latents, *(TensorSpec(name, shape) for name, shape in caches)),
            weights=tuple(weight for layer in layers for weight in _weights(layer, first=False)),
            outputs=(
                TensorSpec("frames", (VIDEO_CHANNELS, arch.temporal_stride, *size)),
                *(TensorSpec(f"next_{name}", shape) for name, shape in caches),
            ),
        ),
    )


def _cache_shapes(layer: Layer) -> Iterator[tuple[Axis, ...]]:
    """One cache per convolution over time: the last frames of its input, [C, 2, height, width]."""
    widths: tuple[int, ...] = ()
    match layer.kind:
        case LayerKind.CONV | LayerKind.UPSAMPLE_TIME | LayerKind.HEAD:
            widths = (layer.in_channels,)
        case LayerKind.RES_BLOCK:
            widths = (layer.in_channels, layer.out_channels)
    for width in widths:
        yield (width, CACHE_FRAMES, *_pixels(layer.scale))


def _weights(layer: Layer, *, first: bool) -> Iterator[TensorSpec]:
    name, width, out = layer.name, layer.in_channels, layer.out_channels
    match layer.kind:
        case LayerKind.POINTWISE:
            yield from _conv(name, out, width, 1, 1, 1)
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
        case LayerKind.UPSAMPLE | LayerKind.UPSAMPLE_TIME:
            yield from _conv(f"{name}.resample.1", out, width, 3, 3)
            if layer.kind is LayerKind.UPSAMPLE_TIME and not first:
                yield from _conv(f"{name}.time_conv", 2 * width, width, 3, 1, 1)
        case LayerKind.HEAD:
            yield TensorSpec(f"{name}.0.gamma", (width, 1, 1, 1))
            yield from _conv(f"{name}.2", out, width, 3, 3, 3)


def _conv(name: str, out_channels: int, in_channels: int, *kernel: int) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec(f"{name}.weight", (out_channels, in_channels, *kernel)), TensorSpec(f"{name}.bias", (out_channels,))


def _pixels(scale: int) -> tuple[Axis, Axis]:
    return ("height", "width") if scale == 1 else (f"{scale}*height", f"{scale}*width")
