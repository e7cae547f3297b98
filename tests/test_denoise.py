"""The denoising loop between two experts: what one of them holds is gone before the next one's memory is taken."""

import weakref
from contextlib import ExitStack
from typing import Any, cast

import numpy as np

from runtime.denoise import Guidance, denoise
from runtime.schedulers import SOLVERS, Conventions, SchedulerName, SolverSettings, make_schedule
from runtime.transformer import Transformer
from runtime.variants import VARIANTS, Expert


class KeyValues:
    """Stands for what a prompt leaves on a device."""


class StillTransformer:
    """Predicts that nothing moves."""

    def embed_times(self, timesteps: Any) -> None: ...

    def encode_text(self, prompt_embeds: Any) -> KeyValues:
        return KeyValues()

    def predict(self, latents: Any, timestep: float, prompts: Any, **options: Any) -> list[Any]:
        return [np.zeros_like(latents) for _ in prompts]


def test_an_expert_and_its_prompts_are_gone_before_the_next_expert_opens() -> None:
    held: list[weakref.ref[Any]] = []
    alive_at_opening: list[int] = []

    class Watched(StillTransformer):
        def encode_text(self, prompt_embeds: Any) -> KeyValues:
            made = super().encode_text(prompt_embeds)
            held.append(weakref.ref(made))
            return made

    def open_expert(expert: Expert, stack: ExitStack) -> Transformer:
        alive_at_opening.append(sum(reference() is not None for reference in held))
        opened = Watched()
        held.append(weakref.ref(opened))
        return cast(Transformer, opened)

    variant = VARIANTS["wan2.2-t2v-a14b"]
    schedule = make_schedule(SchedulerName.EULER, conventions=Conventions.ORIGINAL, num_steps=4, shift=5.0)
    guidance = Guidance(scale=4.0, unguided_pass=True)
    embeds = np.zeros((2, 8), np.float32)
    denoise(
        np.ones((16, 1, 2, 2), np.float32),
        schedule=schedule,
        solver=SOLVERS[SchedulerName.EULER](schedule, SolverSettings()),
        experts=[(expert, guidance) for expert in variant.experts],
        open_expert=open_expert,
        prompt_embeds=embeds,
        negative_embeds=embeds,
    )
    assert alive_at_opening == [0, 0]
    assert len(held) == 2 * 3
