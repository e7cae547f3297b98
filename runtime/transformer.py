"""Drives the diffusion transformer's stages, block by block.

Several prompts (the guided and the unguided one) go through a block together, so a block's weights are needed once a step. What is
constant is computed once: text keys and values per prompt, rotary tables per size, one row of time embedding per timestep, all of them
before the first step, so that their weights need not stay.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.backends.base import DeviceTensor
from runtime.component import Component
from runtime.geometry import Float32, rope_tables, token_grid
from runtime.schedulers.schedule import Conventions
from runtime.variants import TransformerArch

_MAX_PERIOD = 10000.0


@dataclass(frozen=True, slots=True)
class TextKeyValues:
    """A prompt's cross-attention keys and values, one pair [text_len, D] per block."""

    keys: tuple[DeviceTensor, ...]
    values: tuple[DeviceTensor, ...]


@dataclass(frozen=True, slots=True)
class ImageKeyValues:
    """The images' cross-attention keys and values, one pair [image_tokens, D] per block."""

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
        self._times: dict[float, Mapping[str, Float32]] = {}

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

    def embed_times(self, timesteps: Iterable[float]) -> None:
        """Embed timesteps that `predict` will be asked for: before the first step there is room for the weights.

        Each takes some 150 KB of the host.
        """
        backend, arch, conventions = self._component.backend, self._arch, self._conventions
        zero = [timestep_features(0, arch.freq_dim, conventions=conventions)] if arch.per_token_timesteps else []
        for timestep in timesteps:
            rows = np.concatenate((*zero, timestep_features(timestep, arch.freq_dim, conventions=conventions)))
            time = self._component.run("transformer.time_embed", {"timestep_features": backend.to_device(rows)})
            self._times[timestep] = {name: backend.to_host(tensor) for name, tensor in time.items()}

    def encode_image(self, features: Float32) -> ImageKeyValues:
        """Keys and values of the images for every block: constant over the denoising loop, the same for all prompts.

        Args:
            features: [image_tokens, image_dim] of `runtime.image_encoder`, all images one after the other.

        Raises:
            ValueError: the architecture has no image branch.
        """
        if self._arch.image_dim is None:
            raise ValueError("this transformer has no image branch")
        inputs = {"encoder_hidden_states_image": self._component.backend.to_device(features)}
        context = self._component.run("transformer.image_embed", inputs)
        pairs = [self._component.run("transformer.image_kv", context, block=i) for i in range(self._arch.num_layers)]
        return ImageKeyValues(tuple(pair["image_key"] for pair in pairs), tuple(pair["image_value"] for pair in pairs))

    def predict(
        self,
        latents: Float32,
        timestep: float,
        prompts: Sequence[TextKeyValues],
        *,
        image: ImageKeyValues | None = None,
        clean_frames: int = 0,
    ) -> list[Float32]:
        """Predicted noise (the flow's velocity), one [C_out, T, h, w] for each prompt.

        Args:
            latents: float32 [C, T, h, w], what the variant concatenates on the channels included.
            timestep: as the scheduler gives it, 0 to 1000; embedded now unless `embed_times` has done so.
            image: what `encode_image` gave; required by an architecture with an image branch, and by no other.
            clean_frames: leading latent frames that hold no noise: their tokens are at timestep 0.

        Raises:
            ValueError: image or clean frames that the architecture does not take, or an image missing.
        """
        if (image is None) != (self._arch.image_dim is None):
            raise ValueError(f"image {'missing' if image is None else 'given'}; image_dim is {self._arch.image_dim}")
        if timestep not in self._times:
            self.embed_times([timestep])
        run, backend = self._component.run, self._component.backend
        time = {name: backend.to_device(value) for name, value in self._times[timestep].items()}
        rows = self._count_clean(clean_frames)
        embedded = run("transformer.embed", {"patches": backend.cut_patches(latents, self._arch)})["hidden_states"]
        modulation = {"time_modulation": time["time_modulation"], **rows}
        shared = self._attend(0, embedded, modulation)  # the prompts part only at the first cross-attention
        hidden = [
            self._finish(0, embedded, shared, modulation, prompt, image, is_last=i == len(prompts))
            for i, prompt in enumerate(prompts, start=1)
        ]
        del embedded, shared  # no name may outlive its use here: each is a third of a GiB of device memory at 14B and 480p
        for block in range(1, self._arch.num_layers):
            for i, prompt in enumerate(prompts):
                hidden[i] = self._finish(
                    block, hidden[i], self._attend(block, hidden[i], modulation), modulation, prompt, image
                )
        heads = [run("transformer.head", {"hidden_states": states, "temb": time["temb"], **rows}) for states in hidden]
        noise = [backend.join_patches(head["noise_patches"], self._grid, self._arch) for head in heads]
        return [fetch() for fetch in [backend.fetch(prediction) for prediction in noise]]

    def _count_clean(self, clean_frames: int) -> dict[str, DeviceTensor]:
        """What says which row of the time embedding a token takes where it has two."""
        if self._arch.per_token_timesteps:
            _, height, width = self._grid
            count = np.array([clean_frames // self._arch.patch_size[0] * height * width])
            return {"num_clean": self._component.backend.to_device(count)}
        if clean_frames:
            raise ValueError(f"clean_frames={clean_frames}: this transformer has one timestep for all tokens")
        return {}

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
        image: ImageKeyValues | None,
        *,
        is_last: bool = True,
    ) -> DeviceTensor:
        """`block_out`; `is_last`: nobody needs the hidden states and the attention's output afterwards."""
        inputs = {
            "hidden_states": hidden_states,
            "attention_output": attended,
            **modulation,
            "text_key": prompt.keys[block],
            "text_value": prompt.values[block],
        }
        if image is not None:
            inputs |= {"image_key": image.keys[block], "image_value": image.values[block]}
        consumed = ("hidden_states", "attention_output") if is_last else ()
        return self._component.run("transformer.block_out", inputs, block=block, consumed=consumed)["next_hidden_states"]


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
