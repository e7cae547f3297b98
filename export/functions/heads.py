"""Fused operators of attention: norm and rotation of queries and keys, softmax attention with and without a bias."""

import torch
from torch import Tensor
from torch.nn import functional

from export.functions.tracing import call, tracing

BODIES = {
    "QKNorm": """
        QKNorm <epsilon> (x, weight) => (y) {
            y = RMSNormalization <axis = -1, epsilon: float = @epsilon> (x, weight)
        }""",
    "QKNormRope": """
        QKNormRope <epsilon, num_heads> (x, weight, rope_cos, rope_sin) => (y) {
            normed = RMSNormalization <axis = -1, epsilon: float = @epsilon> (x, weight)
            batch_axis = Constant <value_ints = [0]> ()
            normed_b = Unsqueeze (normed, batch_axis)
            cos_b = Unsqueeze (rope_cos, batch_axis)
            sin_b = Unsqueeze (rope_sin, batch_axis)
            rotated = RotaryEmbedding <interleaved = 1, num_heads: int = @num_heads> (normed_b, cos_b, sin_b)
            y = Squeeze (rotated, batch_axis)
        }""",
    "Attention": """
        Attention <num_heads> (query, key, value) => (y) {
            batch_axis = Constant <value_ints = [0]> ()
            query_b = Unsqueeze (query, batch_axis)
            key_b = Unsqueeze (key, batch_axis)
            value_b = Unsqueeze (value, batch_axis)
            y_b = Attention <q_num_heads: int = @num_heads, kv_num_heads: int = @num_heads> (query_b, key_b, value_b)
            y = Squeeze (y_b, batch_axis)
        }""",
    "BiasedAttention": """
        BiasedAttention <num_heads> (query, key, value, position_table, position_buckets) => (y) {
            kept = Constant <value_ints = [0]> ()
            rest = Constant <value_ints = [-1]> ()
            heads_value = Constant <value_int: int = @num_heads> ()
            heads = Reshape (heads_value, rest)
            by_head = Concat <axis = 0> (kept, heads, rest)
            query_rows = Reshape (query, by_head)
            key_rows = Reshape (key, by_head)
            value_rows = Reshape (value, by_head)
            query_heads = Transpose <perm = [1, 0, 2]> (query_rows)
            key_columns = Transpose <perm = [1, 2, 0]> (key_rows)
            value_heads = Transpose <perm = [1, 0, 2]> (value_rows)
            table_by_head = Transpose <perm = [1, 0]> (position_table)
            bias = Gather <axis = 1> (table_by_head, position_buckets)
            products = MatMul (query_heads, key_columns)
            scores = Add (products, bias)
            weights = Softmax <axis = -1> (scores)
            y_heads = MatMul (weights, value_heads)
            y_rows = Transpose <perm = [1, 0, 2]> (y_heads)
            joined = Concat <axis = 0> (kept, rest)
            y = Reshape (y_rows, joined)
        }""",
}


def qk_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMS norm over the full width, all heads together: x [N, D], weight [D]."""
    if tracing():
        return call("QKNorm", (x, weight), like=x, shape=x.shape, epsilon=eps)
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def qk_norm_rope(x: Tensor, weight: Tensor, rope_cos: Tensor, rope_sin: Tensor, *, num_heads: int, eps: float) -> Tensor:
    """`qk_norm`, then rotation of each head's adjacent pairs: x [N, D], weight [D], tables [N, head_dim / 2]."""
    if tracing():
        return call("QKNormRope", (x, weight, rope_cos, rope_sin), like=x, shape=x.shape, epsilon=eps, num_heads=num_heads)
    pairs = functional.rms_norm(x, (x.shape[-1],), weight, eps).reshape(len(x), num_heads, -1, 2)
    real, imaginary = pairs.unbind(-1)  # [N, heads, head_dim / 2]
    cos, sin = rope_cos[:, None], rope_sin[:, None]
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(1)


def attention(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int) -> Tensor:
    """Softmax attention with scale `1/sqrt(head_dim)` and no mask: query [N, D], key and value [M, D] → [N, D]."""
    if tracing():
        return call("Attention", (query, key, value), like=query, shape=query.shape, num_heads=num_heads)
    # scaled_dot_product_attention's own default scale is 1/sqrt(head_dim)
    query, key, value = (x.reshape(len(x), num_heads, -1).transpose(0, 1) for x in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1)


def biased_attention(
    query: Tensor, key: Tensor, value: Tensor, position_table: Tensor, position_buckets: Tensor, *, num_heads: int
) -> Tensor:
    """Softmax attention with a bias by position and no scale: `softmax(q @ k.T + bias) @ v` of each head.

    Args:
        query, key, value: [S, heads·d].
        position_table: [buckets, heads]; the bias of head h is `position_table[position_buckets, h]`.
        position_buckets: int64 [S, S], query by key.

    Returns:
        [S, heads·d].
    """
    if tracing():
        inputs = (query, key, value, position_table, position_buckets)
        return call("BiasedAttention", inputs, like=query, shape=query.shape, num_heads=num_heads)
    query, key, value = (x.reshape(len(x), num_heads, -1).transpose(0, 1) for x in (query, key, value))
    scores = query @ key.transpose(1, 2) + position_table.t()[:, position_buckets]  # [heads, S, S]
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
