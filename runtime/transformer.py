"""Drives the diffusion transformer's stages, block by block.

Several prompts (the guided and the unguided one) go through a block together, so a block's weights are needed once a step. What is
constant is computed once: text keys and values per prompt, rotary tables per size, one row of time embedding per step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.backends.base import DeviceTensor
from runtime.component import Component
from runtime.geometry import Float32, patchify, rope_tables, token_grid, unpatchify
from runtime.schedulers.schedule import Conventions
from runtime.variants import TransformerArch

_MAX_PERIOD = 10000.0


@dataclass(frozen=True, slots=True)
class TextKeyValues:
    """A prompt's cross-attention keys and values, one pair [text_len, D] per block."""

    keys: tuple[DeviceTensor, ...]
    values: tuple[DeviceTensor, ...]


class Transformer:
    """One expert, ready to predict noise for latents of one shape.

    Args:
        component: engines and weights of the expert.
        latents_shape: [C, T, h, w].
        conventions: whose arithmetic the timestep's sinusoid follows.
    """

    def __init__(
        self, component: Component, arch: TransformerArch, latents_shape: tuple[int, ...], *, conventions: Conventions
    ) -> None:
        self._component = component
        self._arch = arch
        self._conventions = conventions
        self._grid = token_grid(latents_shape, arch)
        cos, sin = rope_tables(self._grid, arch.head_dim)
        backend = component.backend
        self._rope = {"rope_cos": backend.to_device(cos), "rope_sin": backend.to_device(sin)}

    def encode_text(self, prompt_embeds: Float32) -> TextKeyValues:
        """Keys and values of a prompt for every block: constant over the denoising loop.

        Args:
            prompt_embeds: [len, text_dim]; padded here with zeros to text_len, as every peer does.
        """
        padded = np.zeros((self._arch.text_len, self._arch.text_dim), np.float32)
        padded[: len(prompt_embeds)] = prompt_embeds
        inputs = {"encoder_hidden_states": self._component.backend.to_device(padded)}
        context = self._component.run("transformer.text_embed", inputs)
        pairs = [self._component.run("transformer.text_kv", context, block=i) for i in range(self._arch.num_layers)]
        return TextKeyValues(tuple(pair["text_key"] for pair in pairs), tuple(pair["text_value"] for pair in pairs))

    def predict(self, latents: Float32, timestep: float, prompts: Sequence[TextKeyValues]) -> list[Float32]:
        """Predicted noise (the flow's velocity), one [C_out, T, h, w] for each prompt.

        Args:
            latents: float32 [C, T, h, w].
            timestep: as the scheduler gives it, 0 to 1000.
        """
        run, backend = self._component.run, self._component.backend
        features = timestep_features(timestep, self._arch.freq_dim, conventions=self._conventions)
        time = run("transformer.time_embed", {"timestep_features": backend.to_device(features)})
        embedded = run("transformer.embed", {"patches": backend.to_device(patchify(latents, self._arch))})["hidden_states"]
        modulation = {"time_modulation": time["time_modulation"]}
        shared = self._attend(0, embedded, modulation)  # the prompts part only at the first cross-attention
        hidden = [self._finish(0, embedded, shared, modulation, prompt) for prompt in prompts]
        for block in range(1, self._arch.num_layers):
            for i, prompt in enumerate(prompts):
                attended = self._attend(block, hidden[i], modulation)
                hidden[i] = self._finish(block, hidden[i], attended, modulation, prompt)
        heads = [run("transformer.head", {"hidden_states": states, "temb": time["temb"]}) for states in hidden]
        return [unpatchify(backend.to_host(head["noise_patches"]), self._grid, self._arch) for head in heads]

    def _attend(self, block: int, hidden_states: DeviceTensor, modulation: dict[str, DeviceTensor]) -> DeviceTensor:
        qkv = self._component.run(
            "transformer.block_in", {"hidden_states": hidden_states, **modulation, **self._rope}, block=block
        )
        return self._component.run("transformer.attention", qkv)["attention_output"]

    def _finish(
        self,
        block: int,
        hidden_states: DeviceTensor,
        attended: DeviceTensor,
        modulation: dict[str, DeviceTensor],
        prompt: TextKeyValues,
    ) -> DeviceTensor:
        inputs = {
            "hidden_states": hidden_states,
            "attention_output": attended,
            **modulation,
            "text_key": prompt.keys[block],
            "text_value": prompt.values[block],
        }
        return self._component.run("transformer.block_out", inputs, block=block)["next_hidden_states"]


def timestep_features(timestep: float, freq_dim: int, *, conventions: Conventions) -> Float32:
    """Sinusoid of a timestep, [1, freq_dim], cosines first: angle i is timestep · 10000^(-i / (freq_dim / 2)).

    The original repositories take the angles in float64 (`sinusoidal_embedding_1d`), diffusers in float32 (`get_timestep_embedding`):
    at timestep 999 the two differ by up to 6e-5.
    """
    exponents = -np.arange(freq_dim // 2) / (freq_dim // 2)
    frequencies = _MAX_PERIOD**exponents
    dtype = np.dtype(np.float32 if conventions is Conventions.DIFFUSERS else np.float64)
    angles = np.array(timestep, dtype) * frequencies.astype(dtype)
    return np.concatenate((np.cos(angles), np.sin(angles)))[None].astype(np.float32)
