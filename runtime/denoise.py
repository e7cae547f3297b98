"""The denoising loop: expert by timestep, guidance, solver step, one event a step."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from runtime.conditioning import NO_CONDITIONS, Conditions
from runtime.errors import CancelledError, EngineError
from runtime.geometry import Float32
from runtime.schedulers import Schedule, Solver
from runtime.schedulers.schedule import NUM_TRAIN_TIMESTEPS
from runtime.transformer import Transformer
from runtime.variants import Expert


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """What a caller learns after a step."""

    step: int  # 1 for the first
    num_steps: int
    timestep: float
    expert: str
    seconds: float
    latents: Float32  # [C, T, h, w] after the step; not to be written to


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """One expert's guidance: `unguided + scale * (guided - unguided)`; without the unguided pass when it changes nothing."""

    scale: float
    unguided_pass: bool


OpenExpert = Callable[[Expert, ExitStack], Transformer]
"""Opens an expert's transformer; whatever must be closed again is entered into the stack."""


def denoise(
    latents: Float32,
    *,
    schedule: Schedule,
    solver: Solver,
    experts: Sequence[tuple[Expert, Guidance]],
    open_expert: OpenExpert,
    prompt_embeds: Float32,
    negative_embeds: Float32 | None,
    conditions: Conditions = NO_CONDITIONS,
    on_step: Callable[[StepEvent], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Float32:
    """Run all steps of a schedule.

    Args:
        latents: initial noise, float32 [C, T, h, w], or what the schedule's first sigma leaves of a video under it.
        experts: in the variant's order; one open at a time.
        prompt_embeds, negative_embeds: [len, text_dim]; the negative one may be None when no expert needs it.
        conditions: the same for the guided and the unguided pass, as in every peer.

    Returns:
        The denoised latents, float32 [C, T, h, w].

    Raises:
        CancelledError: `cancelled` returned true between two steps.
        EngineError: an engine failed, or its numbers are not finite.
    """
    num_steps = len(schedule.timesteps)
    table = [expert for expert, _ in experts]
    latents = conditions.impose(latents)
    steps = enumerate(float(timestep) for timestep in schedule.timesteps)
    for chosen, group in groupby(steps, key=lambda step: select_expert(step[1], table)):
        (expert, guidance), expert_steps = experts[chosen], list(group)
        with ExitStack() as stack:
            transformer = open_expert(expert, stack)
            transformer.embed_times(timestep for _, timestep in expert_steps)
            prompts = [transformer.encode_text(prompt_embeds)]
            if guidance.unguided_pass:
                assert negative_embeds is not None
                prompts.append(transformer.encode_text(negative_embeds))
            features = conditions.image_features
            image = None if features is None else transformer.encode_image(features)
            for index, timestep in expert_steps:
                if cancelled is not None and cancelled():
                    raise CancelledError(f"cancelled before step {index + 1} of {num_steps}")
                started = time.perf_counter()
                predictions = transformer.predict(
                    conditions.model_input(latents), timestep, prompts, image=image, clean_frames=conditions.clean_frames
                )
                latents = conditions.impose(solver.step(_guided(predictions, guidance), index, latents))
                if not np.isfinite(latents).all():
                    raise EngineError(
                        f"{expert.component}: the latents are no longer finite after step {index + 1} of {num_steps}",
                        hint="the weights are damaged (`wanrt inspect --verify`), or shift, guidance or --latents are extreme",
                    )
                if on_step is not None:
                    seconds = time.perf_counter() - started
                    on_step(
                        StepEvent(
                            step=index + 1,
                            num_steps=num_steps,
                            timestep=timestep,
                            expert=expert.component,
                            seconds=seconds,
                            latents=latents,
                        )
                    )
            # what these hold of the device's memory must be free before the next expert's is taken
            del transformer, prompts, image
    return latents


def select_expert(timestep: float, experts: Sequence[Expert]) -> int:
    """Index of the first expert whose boundary the timestep reaches; the last one takes the rest."""
    reached = (i for i, expert in enumerate(experts) if timestep >= expert.boundary * NUM_TRAIN_TIMESTEPS)
    return next(reached, len(experts) - 1)


def _guided(predictions: Sequence[Float32], guidance: Guidance) -> Float32:
    if not guidance.unguided_pass:
        return predictions[0]
    guided, unguided = predictions
    return unguided + np.float32(guidance.scale) * (guided - unguided)
