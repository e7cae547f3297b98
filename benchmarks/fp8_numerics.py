"""What the `cuda` target's steps do to numbers, in PyTorch: every fused operator in float32, its operands and results rounded as in a plan.

What runs in FP8 can be chosen: weights, activations and attention's operands, each by itself. The steps are those of
`engines/targets/cuda/lower_transformer.py`, the kernels' rounding that of `engines/targets/cuda/kernels.cu` and `spread.cuh`.
Not imitated: the order of sums, and the fewer bits that Hopper keeps of them in FP8 (decision 6 has those errors).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from export import functions
from runtime.backends.cuda.attention import SOFTMAX_SCALE
from runtime.precision import FP8_MAX, in_precision
from runtime.specs import DType, Precision, StageSpec

PRODUCTS = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
"""The products of a block that the fp8 target computes in FP8."""
ATTENTION_PARTS = ("query and key", "probabilities", "value", "output")
_SELF_ATTENTION = "transformer.attention"
_ada_layer_norm = functions.ada_layer_norm  # before anything replaces it
_SMALLEST_AMAX = 1e-30  # as in rows.cuh: a row of zeros keeps a finite scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """What is in FP8; all else is as in the bf16 target.

    Args:
        weights: products whose weights have FP8 rows, each with its scale.
        activations: products whose inputs have FP8 rows, each with its scale.
        attention: parts of self-attention, of `ATTENTION_PARTS`.
        wide_blocks: blocks whose products stay in bf16.
        per_tensor: one scale for all rows of an input instead of one a row.
    """

    weights: frozenset[str] = frozenset()
    activations: frozenset[str] = frozenset()
    attention: frozenset[str] = frozenset()
    wide_blocks: frozenset[int] = frozenset()
    per_tensor: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight as a product reads it: float32 numbers that its dtype can hold, and in FP8 the scale of each row."""

    values: Tensor
    row_scale: Tensor | None = None
    narrow_input: bool = False  # the product's other operand is FP8


@dataclass(frozen=True, slots=True, eq=False)
class _Attended:
    """What FP8 attention wrote: `restored = values * scale + offset`."""

    restored: Tensor
    values: Tensor
    scale: Tensor
    offset: Tensor


class Operators:
    """The functions of `export.functions` that a transformer's modules call, with the target's rounding.

    What a kernel hands on without rounding stays unrounded until it is read: a norm's output goes to FP8 straight from float32.
    """

    def __init__(self, numerics: Numerics) -> None:
        self._numerics = numerics
        self._stage = ""
        self._weights: dict[int, Weight] = {}
        self._attended: _Attended | None = None

    def enter(self, stage: StageSpec, weights: Mapping[str, Weight]) -> None:
        """From here on operators are of this stage, with these weights."""
        self._stage = stage.name
        self._weights = {id(weight.values): weight for weight in weights.values()}

    def written(self, stage: StageSpec, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A stage's outputs as the target stores them."""
        declared = {tensor.name: tensor.dtype for tensor in in_precision(stage, Precision.BF16).outputs}
        given = {}
        for name, value in outputs.items():
            if name in ("query", "key") and "query and key" in self._numerics.attention:
                given[name] = to_fp8(value)
            elif declared[name] is DType.BF16 and name != "attention_output":  # `attention` rounded that one
                given[name] = to_bf16(value)
            else:
                given[name] = value
        return given

    def replacements(self) -> dict[str, Any]:
        """By the names in `export.functions`."""
        names = ("linear", "linear_gelu", "ada_layer_norm", "gated_residual", "attention")
        return {name: getattr(self, name) for name in names}  # the norms of queries and keys round nothing themselves

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return to_bf16(self._product(x, weight, bias))

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return to_bf16(functional.gelu(self._product(x, weight, bias), approximate="tanh"))

    def ada_layer_norm(self, x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        return _ada_layer_norm(to_bf16(x), shift, scale, eps=eps)

    def gated_residual(self, residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        return to_bf16(to_bf16(residual) + x * gate)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *, num_heads: int) -> Tensor:
        parts = self._numerics.attention if self._stage == _SELF_ATTENTION else frozenset[str]()
        if not parts & {"value", "output"}:
            mixed = _attend(to_bf16(query), to_bf16(key), to_bf16(value), num_heads, fp8="probabilities" in parts)
            return to_bf16(mixed)
        offset = value.mean(dim=0)
        scale = (value - offset).abs().amax().clamp(min=_SMALLEST_AMAX) / FP8_MAX
        values = to_fp8((value - offset) / scale) if "value" in parts else value
        mixed = _attend(query, key, values, num_heads, fp8="probabilities" in parts)
        if "value" not in parts:
            mixed = (mixed - offset) / scale
        if "output" not in parts:
            return to_bf16(mixed * scale + offset)
        stored = to_fp8(mixed)
        self._attended = _Attended(stored * scale + offset, stored, scale, offset)
        return self._attended.restored

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stored = self._weights[id(weight)]
        row_scale = torch.ones_like(bias) if stored.row_scale is None else stored.row_scale
        if not stored.narrow_input:
            return to_bf16(x) @ weight.T * row_scale + bias
        attended = self._attended
        if attended is not None and x is attended.restored:
            folded = to_bf16(bias + row_scale * (weight @ attended.offset))
            return attended.values @ weight.T * (attended.scale * row_scale) + folded
        values, scale = quantized_rows(x, per_tensor=self._numerics.per_tensor)
        return values @ weight.T * scale * row_scale + bias


def to_bf16(x: Tensor) -> Tensor:
    """Rounded to bf16, as float32."""
    return x.bfloat16().float()


def to_fp8(x: Tensor) -> Tensor:
    """Rounded to E4M3 and never beyond its range, as float32."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def quantized_rows(x: Tensor, *, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    """E4M3 numbers, as float32, and the scale of each row, [N, 1], or of all, [1, 1]: `x ≈ values * scale`."""
    greatest = x.abs().amax() if per_tensor else x.abs().amax(dim=1, keepdim=True)
    scale = greatest.clamp(min=_SMALLEST_AMAX).reshape(-1, 1) / FP8_MAX
    return to_fp8(x / scale), scale


def _attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, *, fp8: bool) -> Tensor:
    """Attention whose probabilities, up to their sum, are rounded to bf16 or FP8 before they meet the values; a head at a time."""
    heads = []
    for q, k, v in zip(*(x.chunk(num_heads, dim=1) for x in (query, key, value)), strict=True):
        scores = q @ k.T * q.shape[1] ** -0.5
        shares = (scores - scores.amax(dim=1, keepdim=True)).exp_()
        total = shares.sum(dim=1, keepdim=True)
        rounded = to_fp8(shares.mul_(SOFTMAX_SCALE)) / SOFTMAX_SCALE if fp8 else to_bf16(shares)
        heads.append(rounded @ v / total)
    return torch.cat(heads, dim=1)
