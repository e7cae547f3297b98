"""Drives the text encoder's stages: token ids in, prompt embeddings out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.backends.base import Array
from runtime.component import Component
from runtime.errors import BundleError
from runtime.geometry import Float32
from runtime.variants import TextEncoderArch

_Int64 = np.ndarray[Any, np.dtype[np.int64]]


def encode_prompts(
    component: Component, token_embedding: Array, prompts: Sequence[_Int64], arch: TextEncoderArch
) -> list[Float32]:
    """Embeddings of several prompts' tokens. They go through each block together, so the weights are read once, not once a prompt.

    Args:
        component: the opened text encoder.
        token_embedding: [vocab_size, dim], float32 or, as uint16, bf16; only the prompts' rows are read.
        prompts: token ids [S] of each, the end-of-sequence token included, no padding.

    Returns:
        [S, dim] for each. The model wants these rows followed by zeros (not by the encoder's output for padding).

    Raises:
        BundleError: the tokenizer gives an id that the table does not have.
    """
    largest = max(int(token_ids.max(initial=0)) for token_ids in prompts)
    if largest >= len(token_embedding):
        raise BundleError(
            f"the tokenizer gives token {largest}, the text encoder has {len(token_embedding)} tokens",
            hint="tokenizer and text encoder must come from the same checkpoint; rebuild the bundle",
        )
    backend = component.backend
    buckets = [
        relative_position_buckets(len(token_ids), num_buckets=arch.num_buckets, max_distance=arch.max_distance)
        for token_ids in prompts
    ]
    position_buckets = [backend.to_device(table) for table in buckets]
    hidden = [backend.to_device(_float32_rows(token_embedding, token_ids)) for token_ids in prompts]
    for block in range(arch.num_layers):
        for i, positions in enumerate(position_buckets):
            inputs = {"hidden_states": hidden[i], "position_buckets": positions}
            hidden[i] = component.run("text_encoder.block", inputs, block=block)["next_hidden_states"]
    outputs = [component.run("text_encoder.final_norm", {"hidden_states": states}) for states in hidden]
    return [backend.to_host(output["prompt_embeds"]) for output in outputs]


def _float32_rows(table: Array, rows: _Int64) -> Float32:
    gathered = table[rows]
    if gathered.dtype != np.uint16:
        return gathered.astype(np.float32, copy=False)
    bits = gathered.astype(np.uint32)
    bits <<= 16  # bf16's bits are the upper half of a float32's
    return bits.view(np.float32)


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
    relative = np.arange(1 - num_tokens, num_tokens)  # key - query
    by_relative = by_distance[np.abs(relative)] + np.where(relative > 0, half, 0)
    # query i meets its keys at -i … S - 1 - i: its row is a window of them, one further to the left each time
    windows = np.lib.stride_tricks.sliding_window_view(by_relative, num_tokens)
    buckets: _Int64 = windows[::-1].copy()
    return buckets
