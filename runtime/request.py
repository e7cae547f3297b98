"""What a user asks for, and the same with nothing left open; `runtime.resolving` makes the one into the other."""

from dataclasses import dataclass

from runtime.denoise import Guidance
from runtime.geometry import Float32, VideoSize
from runtime.images import Pixels
from runtime.schedulers import Conventions, SchedulerName, SolverSettings
from runtime.specs import Precision
from runtime.tiling import TileSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A video to make. None takes the bundle's default.

    Args:
        negative_prompt: "" for an empty one; None for the default of the conventions.
        guidance: one scale for all experts, or one per expert, the high-noise expert's first.
        seed: of the initial noise; None draws one.
        width, height: with an image, left out together, they follow from its aspect.
        image, last_image: first and last frame, uint8 RGB [H, W, 3], for variants that take them.
        video: uint8 RGB [T, H, W, 3] to begin with instead of pure noise, for variants that take one.
        strength: how much of the denoising a video goes through: 1 leaves little of it.
        latents: initial noise, float32 [z_dim, T, h, w], instead of a seed's.
        conventions: whose behaviour to follow where the peers differ; None follows the checkpoint's layout.
        tile: encode and decode frames in tiles of this size.
        attention: precision of self-attention's products, of those that the target has.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_steps: int | None = None
    shift: float | None = None
    guidance: tuple[float, ...] | None = None
    scheduler: SchedulerName | None = None
    seed: int | None = None
    image: Pixels | None = None
    last_image: Pixels | None = None
    video: Pixels | None = None
    strength: float | None = None
    latents: Float32 | None = None
    conventions: Conventions | None = None
    tile: TileSpec | None = None
    attention: Precision | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request with every choice made; see `GenerateRequest` for the fields."""

    prompt: str
    negative_prompt: str
    size: VideoSize
    fps: int
    num_steps: int
    skipped_steps: int  # left out at the beginning, for a video that is not pure noise
    shift: float
    guidance: tuple[Guidance, ...]  # one per expert
    scheduler: SchedulerName
    solver_settings: SolverSettings
    seed: int
    image: Pixels | None
    last_image: Pixels | None
    video: Pixels | None
    strength: float | None
    latents: Float32 | None
    latents_shape: tuple[int, int, int, int]
    conventions: Conventions
    tile: TileSpec | None
    encoder_fold: int  # pixels that a pixel of `tile` stands for in the VAE's encoder
    attention: Precision
