"""A stage's contract in another precision: which tensors narrow, which stay wide, which weights become FP8 with scales.

Stages are declared in float32 (`runtime.stages`); a target that computes in bf16 or fp8 takes the same stages through
`in_precision`. Stays in float32: what the host makes or reads, norm weights, modulation, the whole time embedding. FP8 is for the
products of the blocks, W8A8: each row of such a weight, [out, in], has a scale, and so has each token.
"""

from dataclasses import dataclass, replace

from runtime.specs import DType, Precision, StageSpec, TensorSpec

FP8_MAX = 448.0
"""Largest E4M3 number; a row's scale maps its largest magnitude there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What stays wide and what may become FP8 in one network."""

    float32_tensors: frozenset[str]
    float32_weights: tuple[str, ...]  # parts of their names
    fp8_stages: frozenset[str] = frozenset()


_RULES = {
    "transformer": _Rules(
        float32_tensors=frozenset(
            (
                "patches",
                "noise_patches",
                "encoder_hidden_states",
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
            "norm3.weight",
            "norm3.bias",
            "time_embedding.",
            "time_projection.",
        ),
        fp8_stages=frozenset(("transformer.block_in", "transformer.block_out")),
    ),
}


def in_precision(stage: StageSpec, precision: Precision) -> StageSpec:
    """The stage as a target of this precision runs it.

    Raises:
        ValueError: no rule for this stage or precision.
    """
    if precision is Precision.FP32:
        return stage
    rules = _RULES.get(stage.network)
    if precision not in (Precision.BF16, Precision.FP8) or rules is None:
        raise ValueError(f"{stage.name} has no {precision}")
    fp8 = precision is Precision.FP8 and stage.name in rules.fp8_stages
    return replace(
        stage,
        inputs=tuple(_activation(tensor, rules) for tensor in stage.inputs),
        outputs=tuple(_activation(tensor, rules) for tensor in stage.outputs),
        weights=tuple(narrow for weight in stage.weights for narrow in _weight(weight, rules, fp8=fp8)),
    )


def scale_name(weight: str) -> str:
    """Name of the per-row scales, float32 [out], of an FP8 weight."""
    return f"{weight}_scale"


def weight_of_scales(name: str) -> str | None:
    """The weight whose scales are called `name`; None when `name` is no tensor of scales."""
    weight = name.removesuffix("_scale")
    return weight if weight != name and weight.endswith(".weight") else None


def _activation(tensor: TensorSpec, rules: _Rules) -> TensorSpec:
    wide = tensor.name in rules.float32_tensors or tensor.dtype is not DType.F32
    return tensor if wide else replace(tensor, dtype=DType.BF16)


def _weight(weight: TensorSpec, rules: _Rules, *, fp8: bool) -> tuple[TensorSpec, ...]:
    if any(part in weight.name for part in rules.float32_weights):
        return (weight,)
    if fp8 and len(weight.shape) == 2:
        return replace(weight, dtype=DType.F8_E4M3), TensorSpec(scale_name(weight.name), weight.shape[:1])
    return (replace(weight, dtype=DType.BF16),)
