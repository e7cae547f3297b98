"""The stages of the VAE: decoder and encoder, each a stream over latent frames, and what turns decoded frames into colours.

Both are cut in two. The part at the latents (low) has the attention, which sees the whole frame; the part at the pixels (high) sees only
what is near, so that it can run over strips of a frame (`runtime.strips`). A part is a pair of stages: one for the first latent frame,
which has no past, and one for each next, which takes and gives caches. Latents are un-normalised (`runtime.vae`); the batch axis exists
only inside the graph.
"""

from dataclasses import dataclass

from runtime.specs import Axis, DType, StageSpec, TensorSpec
from runtime.stages.vae_layers import (
    VIDEO_CHANNELS,
    Layer,
    LayerKind,
    cache_shapes,
    decoder_layers,
    encoder_layers,
    positions,
    weights,
)
from runtime.variants import VaeArch

Pair = tuple[str, str]
"""Names of the stages of a first and of every further latent frame."""
DECODE_LOW: Pair = ("vae.decode_low_first", "vae.decode_low_step")
DECODE_HIGH: Pair = ("vae.decode_high_first", "vae.decode_high_step")
COLOURS = "vae.colours"
ENCODE_HIGH: Pair = ("vae_encoder.encode_high_first", "vae_encoder.encode_high_step")
ENCODE_LOW: Pair = ("vae_encoder.encode_low_first", "vae_encoder.encode_low_step")
_UPSAMPLERS = (LayerKind.UPSAMPLE, LayerKind.UPSAMPLE_TIME, LayerKind.HEAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive layers of a chain.

    `hands_on` is the index of the layer whose input leaves beside what the last one makes; `takes` is the shortcut that wants such a
    tensor of the part before.
    """

    layers: tuple[Layer, ...]
    hands_on: int | None = None
    takes: Layer | None = None


def decoder_parts(arch: VaeArch) -> tuple[Part, Part]:
    """The decoder up to its first upsampling, and what follows."""
    layers = decoder_layers(arch)
    return _cut(layers, next(index for index, layer in enumerate(layers) if layer.kind in _UPSAMPLERS))


def encoder_parts(arch: VaeArch) -> tuple[Part, Part]:
    """The encoder down to the size of the latents, and what follows."""
    layers = encoder_layers(arch)
    cut = next(index for index, layer in enumerate(layers) if layer.kind is LayerKind.RES_BLOCK and layer.scale == 1)
    return _cut(layers, cut)


def vae_stages(arch: VaeArch) -> tuple[StageSpec, ...]:
    """Declared stages of the decoder."""
    low, high = decoder_parts(arch)
    num_frames = (1, arch.temporal_stride)
    frames, colours = ("frames", "height", "width"), TensorSpec("colours", ("frames", "height", "width", 3), DType.U8)
    return (
        *(_stage(low, name, _latents(arch), _hidden(low), first=name == DECODE_LOW[0]) for name in DECODE_LOW),
        *(
            _stage(high, name, _hidden(low), _frames(arch, count), first=name == DECODE_HIGH[0])
            for name, count in zip(DECODE_HIGH, num_frames, strict=True)
        ),
        StageSpec(name=COLOURS, inputs=(TensorSpec("frames", (VIDEO_CHANNELS, *frames)),), weights=(), outputs=(colours,)),
    )


def vae_encoder_stages(arch: VaeArch) -> tuple[StageSpec, ...]:
    """Declared stages of the encoder."""
    high, low = encoder_parts(arch)
    num_frames = (1, arch.temporal_stride)
    return (
        *(
            _stage(high, name, _frames(arch, count), _hidden(high), first=name == ENCODE_HIGH[0])
            for name, count in zip(ENCODE_HIGH, num_frames, strict=True)
        ),
        *(_stage(low, name, _hidden(high), _latents(arch), first=name == ENCODE_LOW[0]) for name in ENCODE_LOW),
    )


def _cut(layers: tuple[Layer, ...], cut: int) -> tuple[Part, Part]:
    """The layers before `cut` and from there on, and the level's input that a shortcut across the cut wants."""
    crossing = [
        (index - layer.span, layer) for index, layer in enumerate(layers) if layer.span and index - layer.span < cut <= index
    ]
    assert len(crossing) <= 1, crossing
    hands_on, takes = crossing[0] if crossing else (None, None)
    return Part(layers=layers[:cut], hands_on=hands_on), Part(layers=layers[cut:], takes=takes)


def _latents(arch: VaeArch) -> TensorSpec:
    return TensorSpec("latents", (arch.z_dim, 1, "height", "width"))


def _frames(arch: VaeArch, num_frames: int) -> TensorSpec:
    return TensorSpec("frames", (VIDEO_CHANNELS, num_frames, *positions(arch.spatial_stride)))


def _hidden(part: Part) -> TensorSpec:
    """What a part gives the next, at the size of the latents."""
    return TensorSpec("hidden", _one_frame(part.layers[-1].out_channels))


def _stage(part: Part, name: str, given: TensorSpec, made: TensorSpec, *, first: bool) -> StageSpec:
    """Every stage outputs every cache: the first pass leaves those of time doubling at zero."""
    shapes = [shape for layer in part.layers for shape in cache_shapes(layer)]
    caches = [TensorSpec(f"cache_{index:02}", shape) for index, shape in enumerate(shapes)]
    taken = () if part.takes is None else (_level_input(part.takes.in_channels),)
    handed_on = () if part.hands_on is None else (_level_input(part.layers[part.hands_on].in_channels),)
    return StageSpec(
        name=name,
        inputs=(given, *taken, *(() if first else caches)),
        weights=tuple(weight for layer in part.layers for weight in weights(layer, first=first)),
        outputs=(made, *handed_on, *(TensorSpec(f"next_{cache.name}", cache.shape) for cache in caches)),
    )


def _level_input(channels: int) -> TensorSpec:
    return TensorSpec("level_input", _one_frame(channels))


def _one_frame(channels: int) -> tuple[Axis, ...]:
    return (channels, 1, *positions(1))
