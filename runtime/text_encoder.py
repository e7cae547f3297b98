"""Drives the text encoder's stages: token ids in, prompt embeddings out."""

import math
from typing import Any

import numpy as np

from runtime.backends.base import Array
from runtime.component import Component
from runtime.errors import BundleError
from runtime.variants import TextEncoderArch

_Int64 = np.ndarray[Any, np.dtype[np.int64]]
_Float32 = np.ndarray[Any, np.dtype[np.float32]]


def encode_prompt(component: Component, token_embedding: Array, token_ids: _Int64, arch: TextEncoderArch) -> _Float32:
    """Embeddings of a prompt's tokens.

    Args:
        component: the opened text encoder.
        token_embedding: [vocab_size, dim]; only the prompt's rows are read.
        token_ids: [S], the end-of-sequence token included, no padding.

    Returns:
        [S, dim]. The model wants these rows followed by zeros (not by the encoder's output for padding).

    Raises:
        BundleError: the tokenizer gives an id that the table does not have.
    """
    if token_ids.max(initial=0) >= len(token_embedding):
        raise BundleError(
            f"the tokenizer gives token {token_ids.max()}, the text encoder has {len(token_embedding)} tokens",
            hint="tokenizer and text encoder must come from the same checkpoint; rebuild the bundle",
        )
    backend = component.backend
    buckets = relative_position_buckets(len(token_ids), num_buckets=arch.num_buckets, max_distance=arch.max_distance)
    position_buckets = backend.to_device(buckets)
    hidden_states = backend.to_device(token_embedding[token_ids].astype(np.float32, copy=False))
    for block in range(arch.num_layers):
        inputs = {"hidden_states": hidden_states, "position_buckets": position_buckets}
        hidden_states = component.run("text_encoder.block", inputs, block=block)["next_hidden_states"]
    outputs = component.run("text_encoder.final_norm", {"hidden_states": hidden_states})
    return backend.to_host(outputs["prompt_embeds"])


def relative_position_buckets(num_tokens: int, *, num_buckets: int, max_distance: int) -> _Int64:
    """Row of the position table for each pair of query and key, [S, S].

    Half of the buckets are for keys after the query. Of each half, the first half holds one distance each, the others
    logarithmically growing ranges up to `max_distance`; what is farther shares the last. Formula: T5 (Raffel et al., arXiv
    1910.10683), with the reference's float32 arithmetic, which decides at the edges of the ranges.
    """
    distances = np.arange(num_tokens)
    half = num_buckets // 2
    exact = half // 2
    logs = np.log(np.maximum(distances, 1) / np.float64(exact)).astype(np.float32)
    ranges = logs / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    by_distance = np.where(distances < exact, distances, np.minimum(exact + ranges.astype(np.int64), half - 1))
    relative = distances[None, :] - distances[:, None]  # key - query
    buckets: _Int64 = by_distance[np.abs(relative)] + np.where(relative > 0, half, 0)
    return buckets
