"""What the transformer's graphs become on the `cuda` target: which steps there are in bf16 and in fp8, and in either form of attention."""

from dataclasses import replace
from functools import cache

import pytest

from engines.targets.cuda.lower import lower_stage
from export.graphs import stage_graph
from runtime.backends.cuda.plan import Plan, Step, StepKind
from runtime.precision import in_precision
from runtime.specs import DType, Precision
from runtime.stages.transformer import transformer_stages
from runtime.strict_json import decode, encode
from runtime.variants import VARIANTS, TransformerArch

ARCH = TransformerArch(dim=256, ffn_dim=512, num_heads=2, num_layers=1, text_dim=64, per_token_timesteps=True)


@cache
def plan_of(stage_name: str, precision: Precision = Precision.FP8) -> Plan:
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=ARCH)
    stage = next(stage for stage in transformer_stages(ARCH) if stage.name == stage_name)
    return lower_stage(stage_graph(variant, stage), in_precision(stage, precision))


def with_fp8_attention(stage_name: str, precision: Precision = Precision.FP8) -> Plan:
    plan = plan_of(stage_name, precision).fp8_attention
    assert plan is not None
    return plan


def dtypes(plan: Plan) -> dict[str, DType]:
    """Element types of the outputs that are buffers."""
    buffers = {buffer.name: buffer.dtype for buffer in plan.buffers}
    return {name: buffers[array] for name, array in plan.outputs.items() if array in buffers}


def product(plan: Plan, weight: str) -> Step:
    return next(step for step in plan.steps if step.kind is StepKind.LINEAR and step.inputs["weight"] == weight)


def test_fp8_attentions_operands_leave_their_stage_as_fp8() -> None:
    assert dtypes(plan_of("transformer.block_in")) == {
        "query": DType.BF16,
        "key": DType.BF16,
    }  # the value is a part of the product
    narrow = with_fp8_attention("transformer.block_in")
    assert dtypes(narrow) == dict.fromkeys(("query", "key", "value"), DType.F8_E4M3)
    assert [step.kind for step in narrow.steps][-1] is StepKind.QUANTIZE_CENTRED


@pytest.mark.parametrize("narrow", [False, True])
def test_keys_and_values_have_room_for_whole_tiles(narrow: bool) -> None:
    plan = with_fp8_attention("transformer.block_in") if narrow else plan_of("transformer.block_in")
    sources = {view.name: view.source for view in plan.views}
    tiled = {sources.get(plan.outputs[name], plan.outputs[name]) for name in ("key", "value")}
    assert {buffer.name for buffer in plan.buffers if buffer.row_multiple == 256} == tiled
    assert {buffer.row_multiple for buffer in plan.buffers} == {1, 256}


def test_fp8_attentions_output_is_an_operand_without_another_pass() -> None:
    def passes(plan: Plan) -> list[str]:
        kinds = (StepKind.QUANTIZE_ROWS, StepKind.RESTORE, StepKind.FOLD_OFFSET)
        return [step.kind for step in plan.steps if step.kind in kinds and step.inputs["x"] == "attention_output"]

    assert passes(plan_of("transformer.block_out")) == [StepKind.QUANTIZE_ROWS]
    assert passes(with_fp8_attention("transformer.block_out")) == [StepKind.FOLD_OFFSET]  # of a vector
    assert passes(with_fp8_attention("transformer.block_out", Precision.BF16)) == [StepKind.RESTORE]
    into = product(with_fp8_attention("transformer.block_out"), "self_attn.o.weight").inputs
    assert into["x"] == "attention_output" and into["bias"] == "self_attn.o.bias.folded"


def test_all_fp8_products_accumulate_fast_but_the_one_behind_the_gelu() -> None:
    names = ("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
    fast = [product(plan_of("transformer.block_out"), f"{name}.weight").numbers["fast_accumulation"] for name in names]
    assert fast == [1, 1, 1, 1, 0]


def test_modulated_steps_are_told_which_rows_are_clean() -> None:
    told = [step.kind for step in plan_of("transformer.block_out").steps if "num_clean" in step.inputs]
    assert told == [
        StepKind.RESIDUAL_NORM,
        StepKind.RESIDUAL_NORM,
        StepKind.RESIDUAL,
    ]  # of one: its gate; of the next: its norm


def test_stages_beside_self_attention_have_one_form() -> None:
    assert plan_of("transformer.head").fp8_attention is None


def test_a_plan_with_both_forms_survives_its_file() -> None:
    plan = plan_of("transformer.block_in")
    assert decode(Plan, encode(plan), error=ValueError) == plan
