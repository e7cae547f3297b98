"""A request with nothing left open: defaults filled in from the bundle, and what cannot be met refused before any weight is read."""

import secrets
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from runtime.denoise import Guidance
from runtime.errors import RequestError
from runtime.geometry import Float32, SizeRange, VideoSize, check_size, latent_shape
from runtime.manifest import Manifest
from runtime.request import GenerateRequest, ResolvedRequest
from runtime.request_inputs import DEFAULT_STRENGTH, check_inputs, skipped_steps, video_size
from runtime.schedulers import Conventions, SchedulerName, SolverSettings
from runtime.schedulers.schedule import NUM_TRAIN_TIMESTEPS
from runtime.specs import Precision
from runtime.variants import Defaults

T = TypeVar("T")
MAX_STEPS = NUM_TRAIN_TIMESTEPS
MAX_SEED = 2**64 - 1
MAX_SCALE = 1000.0
"""No shift (or its inverse) and no guidance scale comes near; beyond, float32 latents overflow."""
_LOW_RESOLUTION = 832 * 480


def resolve_request(
    request: GenerateRequest,
    manifest: Manifest,
    *,
    sizes: SizeRange | None,
    attention: Sequence[Precision] = (Precision.FP32,),
) -> ResolvedRequest:
    """Fill in defaults and check everything that can be checked without weights.

    Args:
        sizes: what the chosen target's engines take; None for any.
        attention: the precisions of attention that the target has, its default first.

    Raises:
        RequestError: the first thing that cannot be met, with what is possible.
    """
    variant, defaults = manifest.variant, manifest.variant.defaults
    _check_text(request.prompt, "prompt")
    _check_text(request.negative_prompt or "", "negative_prompt")
    conventions = request.conventions or manifest.conventions
    check_inputs(request, variant, conventions)
    size = video_size(request, variant, conventions)
    check_size(size, vae=variant.vae, transformer=variant.transformer)
    if sizes is not None and not sizes.contains(size):
        raise RequestError(f"size {size}: these engines take {sizes}", hint="rebuild with a wider --size and --frames")
    if request.tile is not None:
        request.tile.check(variant.vae)
    shape = latent_shape(size, vae=variant.vae)
    # A diffusers folder brings its scheduler; its fine settings hold for that one and not for another that is asked for instead.
    own = manifest.scheduler if conventions is Conventions.DIFFUSERS else None
    scheduler = request.scheduler or (own.name if own else SchedulerName(defaults.scheduler))
    num_steps = _check_steps(_or(request.num_steps, defaults.num_steps))
    strength = _or(request.strength, DEFAULT_STRENGTH) if request.video is not None else None
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=_or(request.negative_prompt, defaults.negative_prompt if conventions is Conventions.ORIGINAL else ""),
        size=size,
        fps=defaults.fps,
        num_steps=num_steps,
        skipped_steps=0 if strength is None else skipped_steps(num_steps, strength),
        shift=_check_shift(_or(request.shift, own.shift if own else _default_shift(defaults, size))),
        guidance=_guidance(_or(request.guidance, defaults.guidance), len(variant.experts), conventions),
        scheduler=scheduler,
        solver_settings=own.settings if own and own.name is scheduler else SolverSettings(),
        seed=_check_seed(secrets.randbits(32) if request.seed is None else request.seed),
        image=request.image,
        last_image=request.last_image,
        video=request.video,
        strength=strength,
        latents=_check_latents(request.latents, shape),
        latents_shape=shape,
        conventions=conventions,
        tile=request.tile,
        # diffusers cuts what is left of the frames after folding
        encoder_fold=variant.vae.patch_size if conventions is Conventions.DIFFUSERS else 1,
        attention=_check_attention(_or(request.attention, attention[0]), attention),
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _default_shift(defaults: Defaults, size: VideoSize) -> float:
    low = defaults.low_resolution_shift
    return low if low is not None and size.width * size.height <= _LOW_RESOLUTION else defaults.shift


def _check_text(text: str, name: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):  # what bytes become that are not UTF-8
        raise RequestError(f"{name} is not valid UTF-8 text", hint="give it in UTF-8")


def _check_attention(asked: Precision, possible: Sequence[Precision]) -> Precision:
    if asked not in possible:
        raise RequestError(
            f"attention in {asked}: this target has {', '.join(possible)}",
            hint="leave --attention out, or choose another --target",
        )
    return asked


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
