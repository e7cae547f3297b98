"""What a user asks for, and the same with nothing left open.

A `GenerateRequest` may leave everything but the prompt out; `resolve_request` fills it from the bundle and refuses what cannot be met,
before any weight is read.
"""

import secrets
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from runtime.denoise import Guidance
from runtime.errors import RequestError
from runtime.geometry import Float32, SizeRange, VideoSize, check_size, latent_shape
from runtime.manifest import Manifest
from runtime.schedulers import Conventions, SchedulerName, SolverSettings
from runtime.schedulers.schedule import NUM_TRAIN_TIMESTEPS
from runtime.tiling import TileSpec

T = TypeVar("T")
MAX_STEPS = NUM_TRAIN_TIMESTEPS
MAX_SEED = 2**64 - 1
MAX_SCALE = 1000.0
"""No shift (or its inverse) and no guidance scale comes near; beyond, float32 latents overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A video to make. None takes the bundle's default.

    Args:
        negative_prompt: "" for an empty one; None for the default of the conventions.
        guidance: one scale for all experts, or one per expert, the high-noise expert's first.
        seed: of the initial noise; None draws one.
        latents: initial noise, float32 [z_dim, T, h, w], instead of a seed's.
        conventions: whose behaviour to follow where the peers differ; None follows the checkpoint's layout.
        tile: decode the frames in tiles of this size.
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
    latents: Float32 | None = None
    conventions: Conventions | None = None
    tile: TileSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """A request with every choice made; see `GenerateRequest` for the fields."""

    prompt: str
    negative_prompt: str
    size: VideoSize
    fps: int
    num_steps: int
    shift: float
    guidance: tuple[Guidance, ...]  # one per expert
    scheduler: SchedulerName
    solver_settings: SolverSettings
    seed: int
    latents: Float32 | None
    latents_shape: tuple[int, int, int, int]
    conventions: Conventions
    tile: TileSpec | None


def resolve_request(request: GenerateRequest, manifest: Manifest, *, sizes: SizeRange | None) -> ResolvedRequest:
    """Fill in defaults and check everything that can be checked without weights.

    Args:
        sizes: what the chosen target's engines take; None for any.

    Raises:
        RequestError: the first thing that cannot be met, with what is possible.
    """
    variant, defaults = manifest.variant, manifest.variant.defaults
    _check_text(request.prompt, "prompt")
    _check_text(request.negative_prompt or "", "negative_prompt")
    conventions = request.conventions or manifest.conventions
    size = VideoSize(
        width=_or(request.width, defaults.width),
        height=_or(request.height, defaults.height),
        num_frames=_or(request.num_frames, defaults.num_frames),
    )
    check_size(size, vae=variant.vae, transformer=variant.transformer)
    if sizes is not None and not sizes.contains(size):
        raise RequestError(f"size {size}: these engines take {sizes}", hint="rebuild with a wider --size and --frames")
    if request.tile is not None:
        request.tile.check(variant.vae)
    shape = latent_shape(size, vae=variant.vae)
    # A diffusers folder brings its scheduler; its fine settings hold for that one and not for another that is asked for instead.
    own = manifest.scheduler if conventions is Conventions.DIFFUSERS else None
    scheduler = request.scheduler or (own.name if own else SchedulerName(defaults.scheduler))
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=_or(request.negative_prompt, defaults.negative_prompt if conventions is Conventions.ORIGINAL else ""),
        size=size,
        fps=defaults.fps,
        num_steps=_check_steps(_or(request.num_steps, defaults.num_steps)),
        shift=_check_shift(_or(request.shift, own.shift if own else defaults.shift)),
        guidance=_guidance(_or(request.guidance, defaults.guidance), len(variant.experts), conventions),
        scheduler=scheduler,
        solver_settings=own.settings if own and own.name is scheduler else SolverSettings(),
        seed=_check_seed(secrets.randbits(32) if request.seed is None else request.seed),
        latents=_check_latents(request.latents, shape),
        latents_shape=shape,
        conventions=conventions,
        tile=request.tile,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _check_text(text: str, name: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):  # what bytes become that are not UTF-8
        raise RequestError(f"{name} is not valid UTF-8 text", hint="give it in UTF-8")


def _check_steps(num_steps: int) -> int:
    if not 1 <= num_steps <= MAX_STEPS:
        raise RequestError(f"num_steps={num_steps}: need 1 to {MAX_STEPS}", hint="20 to 50 is usual")
    return num_steps


def _check_shift(shift: float) -> float:
    if not 1 / MAX_SCALE <= shift <= MAX_SCALE:
        raise RequestError(f"shift={shift}: need {1 / MAX_SCALE:g} to {MAX_SCALE:g}", hint="3 to 12 is usual")
    return shift


def _check_seed(seed: int) -> int:
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"seed={seed}: need 0 to {MAX_SEED}", hint="leave it out for a random one")
    return seed


def _check_latents(latents: Float32 | None, shape: tuple[int, ...]) -> Float32 | None:
    if latents is None:
        return None
    if latents.shape != shape or latents.dtype != np.float32:
        raise RequestError(
            f"latents are {latents.dtype} {list(latents.shape)}; this size needs float32 {list(shape)}",
            hint="give latents of that shape, or the size they were made for",
        )
    if not np.isfinite(latents).all():
        raise RequestError("latents hold values that are not finite", hint="save them again")
    return latents


def _guidance(scales: tuple[float, ...], num_experts: int, conventions: Conventions) -> tuple[Guidance, ...]:
    """One guidance per expert.

    The original repositories always make the unguided pass, which at scale 1 changes nothing and is left out here; diffusers makes
    it for all experts when the first scale is above 1, and for none otherwise (`WanPipeline.do_classifier_free_guidance`).
    """
    if not all(abs(scale) <= MAX_SCALE for scale in scales):
        raise RequestError(f"guidance={scales}: need numbers up to {MAX_SCALE:g}", hint="3 to 6 is usual")
    if len(scales) not in (1, num_experts):
        raise RequestError(
            f"guidance has {len(scales)} scales; this model has {num_experts} expert{'s' if num_experts > 1 else ''}",
            hint="give one scale, or one per expert, the high-noise expert's first",
        )
    scales = scales * num_experts if len(scales) == 1 else scales
    if conventions is Conventions.DIFFUSERS:
        return tuple(Guidance(scale=scale, unguided_pass=scales[0] > 1) for scale in scales)
    return tuple(Guidance(scale=scale, unguided_pass=scale != 1) for scale in scales)
