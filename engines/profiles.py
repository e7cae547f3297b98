"""Size range → optimization profile: what each symbolic extent of a stage may be.

A profile is a box of extents. Tokens are one number; height and width of the VAE's stages are two, and the box around both orientations
also holds squares that no video has. A box for each orientation would double those engines (TensorRT-RTX 1.7.1: 43 MB become 86), and
the memory that a box bounds is not what is taken: the runtime asks for that of the shapes at hand.
"""

from dataclasses import replace

from runtime.backends.engine_file import Extent, Profile
from runtime.geometry import MAX_FRAMES, MAX_SIDE, SizeRange, VideoSize, token_pixels
from runtime.specs import StageSpec
from runtime.stages.vae import COLOURS
from runtime.variants import Variant

DEFAULT_SIZES = SizeRange(
    smallest=VideoSize(width=480, height=480, num_frames=1), largest=VideoSize(width=1280, height=720, num_frames=121)
)
"""What engines with profiles are built for when nothing is asked for."""
SMALLEST_TILE = 8
"""Latent positions along the side of the smallest tile or strip."""
_IN_PIXELS = {COLOURS}
"""Stages whose height and width are pixels, not latent positions."""


def stage_profile(stage: StageSpec, variant: Variant, sizes: SizeRange) -> Profile:
    """The extents of a stage's symbols; empty when it has none."""
    vae, defaults = variant.vae, variant.defaults
    usual = VideoSize(width=defaults.width, height=defaults.height, num_frames=defaults.num_frames)
    if not sizes.contains(usual):
        usual = sizes.largest
    side = _side(sizes, usual, stride=1 if stage.name in _IN_PIXELS else vae.spatial_stride)
    text_len = variant.transformer.text_len
    box = {
        "tokens": _ordered(*(_tokens(variant, size) for size in (sizes.smallest, usual, sizes.largest))),
        "text_tokens": Extent(smallest=1, usual=text_len, largest=text_len),
        "frames": Extent(smallest=1, usual=vae.temporal_stride, largest=vae.temporal_stride),
        "height": side,
        "width": side,
    }
    return {name: box[name] for name in stage.symbols}


def bounded(sizes: SizeRange | None) -> SizeRange:
    """The range asked for; sides or frames left out, which reach as far as positions go, are those of `DEFAULT_SIZES`."""
    if sizes is None:
        return DEFAULT_SIZES
    low, high = sizes.smallest, sizes.largest
    if high.width >= MAX_SIDE:
        low = replace(low, width=DEFAULT_SIZES.smallest.width, height=DEFAULT_SIZES.smallest.height)
        high = replace(high, width=DEFAULT_SIZES.largest.width, height=DEFAULT_SIZES.largest.height)
    if high.num_frames >= MAX_FRAMES:
        low = replace(low, num_frames=DEFAULT_SIZES.smallest.num_frames)
        high = replace(high, num_frames=DEFAULT_SIZES.largest.num_frames)
    return SizeRange(smallest=low, largest=high)


def _side(sizes: SizeRange, usual: VideoSize, *, stride: int) -> Extent:
    """Positions along either side, down to the smallest tile."""
    smallest = min(sizes.smallest.width, sizes.smallest.height, SMALLEST_TILE * stride)
    largest = max(sizes.largest.width, sizes.largest.height)
    return _ordered(smallest // stride, min(usual.width, usual.height) // stride, largest // stride)


def _tokens(variant: Variant, size: VideoSize) -> int:
    side = token_pixels(variant.vae, variant.transformer)
    frames = (size.num_frames - 1) // variant.vae.temporal_stride + 1
    return frames // variant.transformer.patch_size[0] * (size.width // side) * (size.height // side)


def _ordered(smallest: int, usual: int, largest: int) -> Extent:
    largest = max(1, largest)
    smallest = min(max(1, smallest), largest)
    return Extent(smallest=smallest, usual=min(max(smallest, usual), largest), largest=largest)
