"""Two experts of a toy transformer, large enough that its arrays are laid out, as plans and weights in a folder; and a generation with both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engines.targets.cuda.lower import lower_stage
from export.graphs import stage_graph
from export.pack import pack_plan, write_weights
from runtime.backends.cuda.rehearsal import rehearse
from runtime.backends.cuda.session import CudaSession
from runtime.component import Component
from runtime.memory import LIBRARY_BYTES, Need
from runtime.precision import in_precision
from runtime.residency import weight_units
from runtime.schedulers import Conventions
from runtime.specs import Precision, StageSpec
from runtime.stages.transformer import transformer_stages
from runtime.strict_json import encode
from runtime.transformer import Transformer
from runtime.variants import VARIANTS, TransformerArch
from tests.gpu.test_transformer import random_weights
from tests.harness import DictSource

ARCH = TransformerArch(dim=256, ffn_dim=1024, num_heads=2, num_layers=5, text_dim=64)
LATENTS = (16, 5, 64, 64)  # 5,120 tokens: arrays from 2.5 MiB on
EXPERTS = ("transformer_high_noise", "transformer_low_noise")


class ToyExperts:
    """Their files, written into a folder or found there, and what a prediction needs of the device."""

    def __init__(self, folder: Path) -> None:
        variant = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=ARCH)
        fp32 = transformer_stages(ARCH)
        self.stages: tuple[StageSpec, ...] = tuple(in_precision(stage, Precision.BF16) for stage in fp32)
        self.engines = {stage.name: folder / f"{stage.name}.plan.json" for stage in self.stages}
        self.folder, self.files = folder, {expert: folder / f"{expert}.safetensors" for expert in EXPERTS}
        if not self.files[EXPERTS[-1]].exists():
            for wide, stage in zip(fp32, self.stages, strict=True):
                self.engines[stage.name].write_text(encode(lower_stage(stage_graph(variant, wide), stage)))
            plan = pack_plan(self.stages, num_blocks=ARCH.num_layers)
            for seed, file in enumerate(self.files.values(), start=3):
                write_weights(DictSource(random_weights(ARCH, seed=seed)), plan, file)
        layout = rehearse(self.stages, self.engines, predict, attention=Precision.BF16)
        units = weight_units(self.stages, num_blocks=ARCH.num_layers)
        self.needs = [Need(network="transformer", component=expert, units=units, layout=layout) for expert in EXPERTS]

    @property
    def least_bytes(self) -> int:
        """The smallest budget."""
        return LIBRARY_BYTES + self.needs[0].least_bytes

    @contextmanager
    def open(self, session: CudaSession, expert: str = EXPERTS[0]) -> Iterator[Component]:
        with (
            session.backend("transformer") as backend,
            session.weights(expert, self.files[expert], self.stages, num_blocks=ARCH.num_layers) as weights,
            Component(backend, self.stages, self.engines, weights) as component,
        ):
            yield component

    def generate(self, session: CudaSession, *, steps: int = 3) -> list[Any]:
        """Some steps with each expert, as a generation takes them; what every step predicts."""
        session.prepare(self.needs, attention=Precision.BF16)
        predictions = []
        for expert in EXPERTS:
            with self.open(session, expert) as component:
                predictions += predict(component, steps=steps)
        return predictions


def predict(component: Component, steps: int = 2) -> list[Any]:
    """What each step predicts for each of two prompts."""
    latents = np.random.default_rng(0).standard_normal(LATENTS, np.float32)
    timesteps = [900.0 - 100 * step for step in range(steps)]
    transformer = Transformer(component, ARCH, LATENTS, conventions=Conventions.ORIGINAL)
    transformer.embed_times(timesteps)
    prompts = [transformer.encode_text(np.full((length, ARCH.text_dim), 0.5, np.float32)) for length in (3, 9)]
    return [prediction for timestep in timesteps for prediction in transformer.predict(latents, timestep, prompts)]
