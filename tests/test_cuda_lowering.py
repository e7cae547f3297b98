"""What the transformer's graphs become on the `cuda` target: which steps there are in bf16 and in fp8, and in either form of attention."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from engines.targets.cuda import lower_transformer
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


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy counts as a wide model."""
    monkeypatch.setattr(lower_transformer, "_WIDE", ARCH.dim)
    plan_of.cache_clear()
    yield
    plan_of.cache_clear()


def steps(plan: Plan, *kinds: StepKind) -> list[Step]:
    return [step for step in plan.steps if step.kind in kinds]


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_a_wide_models_parts_of_a_product_are_made_where_they_are_read(wide: None, precision: Precision) -> None:
    plan = plan_of("transformer.block_in", precision)
    products = steps(plan, StepKind.LINEAR, StepKind.QK_NORM_ROPE)
    assert [step.kind.value for step in products] == ["linear", "qk_norm_rope", "linear", "qk_norm_rope", "linear"]
    rows = {view.name: (view.source, view.axis, view.start, view.stop) for view in plan.views}
    for i, step in enumerate(steps(plan, StepKind.LINEAR)):
        for argument, name in {"weight": "weight", "bias": "bias", "weight_scale": "weight_scale"}.items():
            if argument in step.inputs:
                assert rows[step.inputs[argument]] == (f"self_attn.qkv.{name}", 0, i * ARCH.dim, (i + 1) * ARCH.dim)
        assert ("weight_scale" in step.inputs) is (precision is Precision.FP8)
    assert {buffer.name: buffer.shape for buffer in plan.buffers}[plan.outputs["value"]] == ("tokens", ARCH.dim)


def test_a_wide_models_tokens_go_through_the_feed_forward_in_pieces(wide: None) -> None:
    for precision, narrow in ((Precision.BF16, False), (Precision.FP8, True)):
        plan = plan_of("transformer.block_out", precision)
        (step,) = steps(plan, StepKind.FEED_FORWARD)
        assert not [other for other in steps(plan, StepKind.LINEAR) if "ffn" in other.inputs["weight"]]
        assert (step.inputs["weight"], step.inputs["outer_weight"]) == ("ffn.0.weight", "ffn.2.weight")
        buffers = {buffer.name: buffer for buffer in plan.buffers}
        pieces = {"inner": DType.BF16} | ({"inner_fp8": DType.F8_E4M3} if narrow else {})
        for argument, dtype in pieces.items():
            buffer = buffers[step.outputs[argument]]
            assert (buffer.shape, buffer.dtype) == ((66 * 128, ARCH.ffn_dim), dtype)
        assert step.numbers == ({"fast_accumulation": 1, "outer_fast_accumulation": 0} if narrow else {})


def test_a_narrow_models_products_stay_whole() -> None:
    (product_of_all,) = steps(plan_of("transformer.block_in"), StepKind.LINEAR)
    assert product_of_all.inputs["weight"] == "self_attn.qkv.weight"
    assert not steps(plan_of("transformer.block_out"), StepKind.FEED_FORWARD)


def test_a_prompts_keys_and_values_share_no_memory_with_what_nobody_keeps() -> None:
    plan = plan_of("transformer.text_kv")
    kept = [buffer for buffer in plan.buffers if buffer.name in plan.outputs.values()]
    assert [buffer.shape for buffer in kept] == [(ARCH.text_len, ARCH.dim)] * 2


def test_residuals_of_a_block_take_one_array_beside_its_input() -> None:
    plan = plan_of("transformer.block_out")
    residuals = steps(plan, StepKind.RESIDUAL_NORM, StepKind.RESIDUAL)
    written = [step.outputs.get("residual_out", step.outputs["out"]) for step in residuals]
    assert residuals[0].inputs["residual"] == "hidden_states"
    assert written == [plan.outputs["next_hidden_states"]] * 3
