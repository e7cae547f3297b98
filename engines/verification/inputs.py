"""What to run the stages of a network on, one after the other: drawn from a seed or, where an earlier stage made such a tensor, that.

So a stage sees what the stages before it give, and yet needs neither a prompt nor a whole generation.
"""

import zlib
from collections.abc import Mapping

import numpy as np

from runtime.backends.base import Array
from runtime.geometry import VideoSize, latent_shape, rope_tables, token_grid
from runtime.layouts import narrow, widen
from runtime.schedulers import Conventions
from runtime.specs import StageSpec, TensorSpec, resolve
from runtime.stages.vae import COLOURS
from runtime.text_encoder import relative_position_buckets
from runtime.transformer import timestep_features
from runtime.variants import Variant

TEXT_TOKENS = 40
"""Tokens of the prompt that the text encoder is given: that many, or all that the transformer takes."""
_NEXT = "next_"
"""What the name of an output begins with that is the same input of the next run, or of the next stage."""
_TIMESTEP = 500.0


class StageInputs:
    """Inputs of a variant's stages; declared shapes, float32 or whole numbers. The same seed gives the same numbers.

    Args:
        size: of a video that the variant makes; the VAE takes a tile of it.
        tile: latent positions of a side of that tile, at most; None: the whole frame.
    """

    def __init__(self, variant: Variant, size: VideoSize, *, seed: int, tile: int | None = None) -> None:
        self._variant, self._seed = variant, seed
        shape = latent_shape(size, vae=variant.vae)
        self._grid = token_grid(shape, variant.transformer)
        self._sides = [extent if tile is None else min(extent, tile) for extent in shape[2:]]
        self._made: dict[str, Array] = {}

    def take(self, stage: StageSpec, *typed: StageSpec) -> dict[str, Array]:
        """The inputs of a declared stage, by name.

        Args:
            typed: the same stage in some precisions: what is given is rounded, so that each of them holds it exactly.
        """
        extents = self.extents(stage)
        return {
            tensor.name: _rounded(self._of(stage, tensor, extents), [one.inputs[index] for one in typed])
            for index, tensor in enumerate(stage.inputs)
        }

    def keep(self, outputs: Mapping[str, Array]) -> None:
        """Let later stages of the network have what a stage gave."""
        self._made |= {name.removeprefix(_NEXT): array for name, array in outputs.items()}

    def extents(self, stage: StageSpec) -> dict[str, int]:
        """The value of each symbol of a stage's shapes."""
        vae = self._variant.vae
        stride = vae.spatial_stride if stage.name == COLOURS else 1
        height, width = (side * stride for side in self._sides)
        known = {
            "tokens": int(np.prod(self._grid)),
            "text_tokens": min(TEXT_TOKENS, self._variant.transformer.text_len),
            "frames": vae.temporal_stride,
            "height": height,
            "width": width,
        }
        return {name: known[name] for name in stage.symbols}

    def _of(self, stage: StageSpec, tensor: TensorSpec, extents: Mapping[str, int]) -> Array:
        shape = tuple(resolve(axis, extents) for axis in tensor.shape)
        made = self._made.get(tensor.name)
        if made is not None and made.shape == shape:
            return made
        transformer, text = self._variant.transformer, self._variant.text_encoder
        random = np.random.default_rng((self._seed, zlib.crc32(f"{stage.name}/{tensor.name}".encode())))
        match tensor.name:
            case "rope_cos" | "rope_sin":
                cos, sin = rope_tables(self._grid, transformer.head_dim)
                return cos if tensor.name == "rope_cos" else sin
            case "position_buckets":
                return relative_position_buckets(shape[0], num_buckets=text.num_buckets, max_distance=text.max_distance)
            case "timestep_features":
                times = (0.0, _TIMESTEP)[-shape[0] :]
                angles = [timestep_features(time, transformer.freq_dim, conventions=Conventions.ORIGINAL) for time in times]
                return np.concatenate(angles)
            case "num_clean":
                frames, rows, columns = self._grid
                return np.array([rows * columns if frames > 1 else 0])
            case "frames":
                return random.uniform(-1, 1, shape).astype(np.float32)
            case _:
                return random.standard_normal(shape, np.float32)


def _rounded(array: Array, specs: list[TensorSpec]) -> Array:
    for spec in specs:
        channels = array.shape[0] if array.ndim else 0
        array = widen(narrow(array, spec), spec, channels)
    return np.ascontiguousarray(array)
