"""What a training of each size consists of: which clips, how many at once, how much noise, how fast."""

from dataclasses import dataclass, field

from benchmarks.moving_shapes.world import ClipSize, Kind

ClipShares = tuple[tuple[int, int, int, float], ...]
"""Width, height, frames, and how often."""

_SQUARE = ClipSize(width=64, height=64, num_frames=17)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeRecipe:
    """How the VAE is trained.

    Args:
        sizes: of what it sees at once.
        windows_of: the clips that `sizes` are cut from, near the shapes' outlines; None if they are whole clips.
        kinds: of scenes; the fastest shapes, those that pass another, are the hardest to decode.
        latent_places: of a batch.
        most_noise: on the codes (`codes`); each clip has its own share of it.
    """

    sizes: ClipShares = ((32, 32, 5, 0.3), (32, 32, 9, 0.2), (48, 48, 5, 0.15), (32, 32, 17, 0.2), (64, 64, 17, 0.15))
    windows_of: ClipSize | None = _SQUARE  # outlines look alike in larger clips
    kinds: tuple[Kind, ...] = (Kind.BOUNCE, Kind.IN_FRONT, Kind.BEHIND, Kind.PAIR)
    latent_places: int = 128 * 32  # 128 windows of 32x32 and 5 frames
    most_noise: float = 0.3
    learning_rate: float = 2e-3
    muon_rate: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class DitRecipe:
    """How text encoder and transformer are trained.

    Args:
        kinds: of scenes.
        muon_rate: None leaves their matrices to AdamW.
        kept_chunks: drawn from at random.
        first_chunks: that are there before the first step.
        uses: steps for each chunk that is made.
    """

    sizes: ClipShares = (
        (64, 64, 17, 0.40), (64, 64, 33, 0.12), (96, 64, 17, 0.12), (64, 96, 17, 0.12),
        (128, 96, 17, 0.07), (96, 128, 17, 0.07), (128, 96, 33, 0.05), (96, 128, 33, 0.05),
    )  # fmt: skip
    kinds: tuple[Kind, ...] = tuple(Kind)
    latent_places: int = 256 * 320  # 256 clips of 64x64 and 17 frames
    learning_rate: float = 8e-4
    muon_rate: float | None = 0.02
    kept_chunks: int = 256
    first_chunks: int = 12
    uses: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Both stages of a training."""

    vae: VaeRecipe = field(default_factory=VaeRecipe)
    dit: DitRecipe = field(default_factory=DitRecipe)


# Measured on one core of an AMD EPYC with AVX-512 BF16, beside other work: the decoder of the size `small` takes 0.9 s a step, the transformer
# 0.6. After 2,925 steps, too few by far, most backgrounds are right, and shapes are blobs that stay together (decision 14).
_TWO_CORES = Recipe(
    vae=VaeRecipe(
        sizes=((32, 32, 5, 0.35), (32, 32, 9, 0.2), (48, 48, 5, 0.15), (32, 32, 17, 0.3)),
        latent_places=20 * 32,
        most_noise=0.4,
    ),
    dit=DitRecipe(
        sizes=((64, 64, 17, 0.5), (64, 64, 9, 0.25), (64, 64, 5, 0.25)),
        kinds=(Kind.SINGLE, Kind.BOUNCE),
        latent_places=32 * 320,
        learning_rate=1e-3,
        kept_chunks=1024,
        first_chunks=16,
        uses=12,
    ),
)

RECIPES = {"small": Recipe(), "mini": _TWO_CORES, "tiny": Recipe()}
"""By the names of `model.SIZES`."""
