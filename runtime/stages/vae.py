"""The stages of the VAE: the decoder, a stream over latent frames, and the encoder, a stream over groups of video frames.

`decode_first` turns the first latent frame into one video frame and into the caches; `decode_step` turns each next latent frame and the
caches into `temporal_stride` frames and new caches. `encode_first` and `encode_step` are their mirror images. Latents are un-normalised
(`runtime.vae`); the batch axis exists only inside the graph.
"""

from runtime.specs import StageSpec, TensorSpec
from runtime.stages.vae_layers import VIDEO_CHANNELS, Layer, cache_shapes, decoder_layers, encoder_layers, positions, weights
from runtime.variants import VaeArch

DECODE_FIRST = "vae.decode_first"
DECODE_STEP = "vae.decode_step"
ENCODE_FIRST = "vae_encoder.encode_first"
ENCODE_STEP = "vae_encoder.encode_step"


def vae_stages(arch: VaeArch) -> tuple[StageSpec, ...]:
    """Declared stages of the decoder."""
    latents = TensorSpec("latents", (arch.z_dim, 1, "height", "width"))
    return tuple(
        _stage(decoder_layers(arch), name, latents, _frames(arch, num_frames), first=name == DECODE_FIRST)
        for name, num_frames in ((DECODE_FIRST, 1), (DECODE_STEP, arch.temporal_stride))
    )


def vae_encoder_stages(arch: VaeArch) -> tuple[StageSpec, ...]:
    """Declared stages of the encoder."""
    latents = TensorSpec("latents", (arch.z_dim, 1, "height", "width"))
    return tuple(
        _stage(encoder_layers(arch), name, _frames(arch, num_frames), latents, first=name == ENCODE_FIRST)
        for name, num_frames in ((ENCODE_FIRST, 1), (ENCODE_STEP, arch.temporal_stride))
    )


def _frames(arch: VaeArch, num_frames: int) -> TensorSpec:
    return TensorSpec("frames", (VIDEO_CHANNELS, num_frames, *positions(arch.spatial_stride)))


def _stage(layers: tuple[Layer, ...], name: str, given: TensorSpec, made: TensorSpec, *, first: bool) -> StageSpec:
    """Every stage outputs every cache: the first pass leaves those of time doubling at zero."""
    shapes = [shape for layer in layers for shape in cache_shapes(layer)]
    caches = [TensorSpec(f"cache_{index:02}", shape) for index, shape in enumerate(shapes)]
    return StageSpec(
        name=name,
        inputs=(given,) if first else (given, *caches),
        weights=tuple(weight for layer in layers for weight in weights(layer, first=first)),
        outputs=(made, *(TensorSpec(f"next_{cache.name}", cache.shape) for cache in caches)),
    )
