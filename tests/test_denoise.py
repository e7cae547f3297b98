"""The denoising loop between two experts: what one holds is gone before the next is opened."""

import weakref
from contextlib import ExitStack
from typing import Any, cast

import numpy as np

from runtime.denoise import Guidance, denoise
from runtime.schedulers import SOLVERS, Conventions, Scheduler, SolverSettings, make_schedule
from runtime.transformer import Transformer
from runtime.variants import VARIANTS, Expert


class KeyValues:
    """Stands for what a prompt leaves on a device."""


class StillTransformer:
    """Predicts that nothing moves."""

    def encode_text(self, prompt_embeds: Any) -> KeyValues:
        return KeyValues()

    def predict(self, latents: Any, timestep: float, prompts: Any, **options: Any) -> list[Any]:
        return [np.zeros_like(latents) for _ in prompts]
