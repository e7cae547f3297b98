"""A stage's contract in another precision: which tensors narrow, which stay wide, which weights become FP8 with scales.

Stages are declared in float32 (`runtime.stages`); a target that computes in bf16, fp16 or fp8 takes the same stages through
`in_precision`. Stays in float32: what the host makes or reads, norm weights, modulation, the whole time embedding. FP8 is for the
products of the blocks, W8A8: each row of such a weight, [out, in], has a scale, and so has each token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from runtime.specs import Axis, DType, Precision, StageSpec, TensorSpec

CHANNEL_MULTIPLE = 8
FP8_MAX = 448.0
"""Largest E4M3 number; a row's scale maps its largest magnitude there."""
_WIDE_SUFFIX = "_wide"


@dataclass(frozen=True, slots=True, kw_only=True)
class WideParts:
    """What of an fp8 network is bf16 all the same: its first and its last blocks, and products in all blocks.

    Products are named as their weights are, less `.weight`: `self_attn.qkv`.
    """

    first_blocks: int = 0
    last_blocks: int = 0
    products: tuple[str, ...] = ()

    def blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The wide ones of so many blocks."""
        return tuple(i for i in range(num_blocks) if i < self.first_blocks or i >= num_blocks - self.last_blocks)

    def __str__(self) -> str:
        ends = {"first": self.first_blocks, "last": self.last_blocks}
        return ", ".join((*(f"{end}:{count}" for end, count in ends.items() if count), *self.products))


NOTHING_WIDE = WideParts()
"""Every block and product that can be fp8 is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What stays wide and what may become FP8 in one network."""

    float32_tensors: frozenset[str]
    float32_weights: tuple[str, ...]  # parts of their names
    fp8_stages: frozenset[str] = frozenset()
    fast_products: tuple[str, ...] = ()
    """Parts of the names of fp8 weights whose products may accumulate fast (`runtime.backends.cuda.linear`): behind a norm or an
    attention that is a relative error of 2.3e-3 to 2.6e-3 instead of 1.7e-3, where rounding the operands is 3.7e-2. Not ffn.2:
    behind the GELU sums can have one sign, and then come out 2.4% too small."""
    attention_tensors: frozenset[str] = frozenset()
    """What self-attention reads and writes: fp8 when it runs in fp8."""
    channels_last: bool = False
    """All that is not float32 has its channels last: what convolutions on tensor cores read."""
    fp16_wide_products: tuple[str, ...] = ()
    """Parts of the names of fp16 weights whose products, or what they multiply, may exceed fp16's 65,504: both are float32 then."""


_NARROW = {Precision.BF16: DType.BF16, Precision.FP16: DType.F16, Precision.FP8: DType.BF16}
_RULES = {
    "text_encoder": _Rules(
        # the residual stream: in bf16, 24 layers of the true width end 1.4 times as far from float32, and 3.3 times as far in the
        # quiet channels when a few are 60 times as loud (random weights, 24 tokens)
        float32_tensors=frozenset(("hidden_states", "next_hidden_states", "prompt_embeds")),
        float32_weights=("norm", "pos_embedding."),
        # T5's feed-forward leaves fp16's range: transformers keeps `wo` in float32 (5.23.0, `_keep_in_fp32_modules` of T5 and UMT5)
        fp16_wide_products=("attn.o.", "ffn."),
    ),
    "image_encoder": _Rules(
        # the residual stream, and what makes and feeds it: in bf16, 31 blocks of the true width end at 1.1e-2 from float32 instead of
        # 2.8e-3, and the quiet channels at 5.4 times as much when a few are 60 times as loud (random weights, 65 tokens)
        float32_tensors=frozenset(("patches", "hidden_states", "next_hidden_states")),
        float32_weights=("norm", "_embedding", "attn.proj.bias", "mlp.2.bias"),
    ),
    "transformer": _Rules(
        float32_tensors=frozenset(
            (
                "patches",
                "noise_patches",
                "encoder_hidden_states",
                "encoder_hidden_states_image",
                "timestep_features",
                "rope_cos",
                "rope_sin",
                "temb",
                "time_modulation",
            )
        ),
        float32_weights=(
            "modulation",
            "norm_q.weight",
            "norm_k.weight",
            "norm_k_img.weight",
            "norm3.weight",
            "norm3.bias",
            "img_emb.emb_pos",
            "img_emb.proj.0.",
            "img_emb.proj.4.",
            "time_embedding.",
            "time_projection.",
        ),
        fp8_stages=frozenset(("transformer.block_in", "transformer.block_out")),
        fast_products=("self_attn.", "cross_attn.", "ffn.0."),
        attention_tensors=frozenset(("query", "key", "value", "attention_output")),
    ),
    **dict.fromkeys(
        ("vae", "vae_encoder"),
        _Rules(float32_tensors=frozenset(("latents", "frames")), float32_weights=(".gamma",), channels_last=True),
    ),
}


def wide_text(wide: WideParts, precision: Precision) -> str:
    """What of a network in this precision is bf16 all the same, for people; empty for nothing."""
    return str(wide) if precision is Precision.FP8 else ""


def stages_in_precision(
    stages: Iterable[StageSpec], precision: Precision, *, num_blocks: int, wide: WideParts = NOTHING_WIDE
) -> tuple[StageSpec, ...]:
    """A network's stages as a target of this precision runs them: in fp8 those of wide blocks are stages of their own.

    Raises:
        ValueError: as `in_precision`.
    """
    found: list[StageSpec] = []
    for stage in stages:
        narrow = in_precision(stage, precision, wide_products=wide.products)
        blocks = wide.blocks(num_blocks) if precision is Precision.FP8 and stage.per_block else ()
        other = in_precision(stage, attention_precision(precision)) if blocks else narrow
        if other == narrow:
            found.append(narrow)
            continue
        narrow_blocks = tuple(i for i in range(num_blocks) if i not in blocks)
        found += [replace(narrow, blocks=narrow_blocks), replace(other, name=wide_name(stage.name), blocks=blocks)]
    return tuple(found)


def wide_name(stage: str) -> str:
    """Name of the stage that does in the wide blocks what `stage` does in the others."""
    return f"{stage}{_WIDE_SUFFIX}"


def find_wide_fault(wide: WideParts, stages: Iterable[StageSpec], *, num_blocks: int) -> str | None:
    """Why a network of these stages, in float32, cannot keep those parts wide; None when it can."""
    if min(wide.first_blocks, wide.last_blocks) < 0 or wide.first_blocks + wide.last_blocks >= max(num_blocks, 1):
        return f"{wide.first_blocks} first and {wide.last_blocks} last of {num_blocks} blocks: one at least must be fp8"
    narrow = [weight for stage in stages for weight in in_precision(stage, Precision.FP8).weights]
    products = dict.fromkeys(weight.name.removesuffix(".weight") for weight in narrow if weight.dtype is DType.F8_E4M3)
    if unknown := [name for name in wide.products if name not in products]:
        return f"product {unknown[0]!r}: fp8 has {', '.join(products) or 'none'}"
    return None


def in_precision(stage: StageSpec, precision: Precision, *, wide_products: Sequence[str] = ()) -> StageSpec:
    """The stage as a target of this precision runs it.

    Args:
        wide_products: what of an fp8 stage stays bf16; see `WideParts`.

    Raises:
        ValueError: no rule for this stage or precision.
    """
    if precision is Precision.FP32:
        return stage
    rules = _RULES.get(stage.network)
    if rules is None:
        raise ValueError(f"{stage.name} has no {precision}")
    narrow = _NARROW[precision]
    fp8 = precision is Precision.FP8 and stage.name in rules.fp8_stages
    wide_weights = {f"{product}.weight" for product in wide_products}
    return replace(
        stage,
        inputs=tuple(_activation(tensor, rules, narrow) for tensor in stage.inputs),
        outputs=tuple(_activation(tensor, rules, narrow) for tensor in stage.outputs),
        weights=tuple(
            tensor
            for weight in stage.weights
            for tensor in _weight(weight, rules, narrow, fp8=fp8 and weight.name not in wide_weights)
        ),
    )


def with_fp8_attention(stage: StageSpec) -> StageSpec:
    """The stage, already in some precision, when self-attention runs in fp8; the stage itself when it has no part in it."""
    rules = _RULES.get(stage.network)
    tensors = frozenset[str]() if rules is None else rules.attention_tensors

    def narrow(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, dtype=DType.F8_E4M3) if tensor.name in tensors else tensor

    return replace(stage, inputs=tuple(map(narrow, stage.inputs)), outputs=tuple(map(narrow, stage.outputs)))


def attention_precision(precision: Precision) -> Precision:
    """Self-attention's precision where a target has no other: that of what the products of a block are not in fp8."""
    return Precision.BF16 if precision is Precision.FP8 else precision


def is_self_attention(stage: StageSpec) -> bool:
    """Whether the stage is self-attention itself, which may run in fp8, and no neighbour of it."""
    rules = _RULES.get(stage.network)
    tensors = {tensor.name for tensor in (*stage.inputs, *stage.outputs)}
    return rules is not None and bool(rules.attention_tensors) and rules.attention_tensors <= tensors


def accumulates_fast(stage: StageSpec, weight: str) -> bool:
    """Whether the product with this fp8 weight may accumulate in fewer bits than float32."""
    rules = _RULES.get(stage.network)
    return rules is not None and any(part in weight for part in rules.fast_products)


def multiplies_wide(stage: StageSpec, weight: TensorSpec) -> bool:
    """Whether the product with this weight, of a stage already in some precision, is float32 though the weight is narrower."""
    rules = _RULES.get(stage.network)
    return weight.dtype is DType.F16 and rules is not None and any(part in weight.name for part in rules.fp16_wide_products)


def scale_name(weight: str) -> str:
    """Name of the per-row scales, float32 [out], of an FP8 weight."""
    return f"{weight}_scale"


def channels_last_shape(shape: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """[C, …] as [… , C], C rounded up to a multiple of 8: then each position is whole 16-byte words of bf16."""
    return (*shape[1:], _padded(shape[0]))


def weight_of_scales(name: str) -> str | None:
    """The weight whose scales are called `name`; None when `name` is no tensor of scales."""
    weight = name.removesuffix("_scale")
    return weight if weight != name and weight.endswith(".weight") else None


def _activation(tensor: TensorSpec, rules: _Rules, narrow: DType) -> TensorSpec:
    if tensor.name in rules.float32_tensors or tensor.dtype is not DType.F32:
        return tensor
    if rules.channels_last:
        return replace(tensor, dtype=narrow, shape=channels_last_shape(tensor.shape), channels_last=True)
    return replace(tensor, dtype=narrow)


def _weight(weight: TensorSpec, rules: _Rules, narrow: DType, *, fp8: bool) -> tuple[TensorSpec, ...]:
    if any(part in weight.name for part in rules.float32_weights):
        return (weight,)
    if fp8 and len(weight.shape) == 2:
        return replace(weight, dtype=DType.F8_E4M3), TensorSpec(scale_name(weight.name), weight.shape[:1])
    if rules.channels_last:
        outputs, *rest = weight.shape
        shape = (_padded(outputs), *(channels_last_shape(tuple(rest)) if rest else ()))
        return (replace(weight, dtype=narrow, shape=shape, channels_last=True),)
    return (replace(weight, dtype=narrow),)


def _padded(channels: Axis) -> int:
    assert isinstance(channels, int), channels
    return -(-channels // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
