"""Plans from strangers: what does not fit the stage, or itself, is said when the plan is opened or run, and nothing crashes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.targets.cuda.lower import lower_stage
from export.graphs import stage_graph
from runtime.backends.cuda.plan import PLAN_VERSION, Buffer, Plan, Step, StepKind, View
from runtime.backends.cuda.plan_checks import check_plan
from runtime.backends.cuda.rehearsal import rehearse
from runtime.component import Component
from runtime.errors import EngineError
from runtime.precision import in_precision, with_fp8_attention
from runtime.specs import DType, Precision, StageSpec, TensorSpec
from runtime.stages.transformer import transformer_stages
from runtime.strict_json import encode
from runtime.variants import VARIANTS, TransformerArch

STAGE = StageSpec(
    name="transformer.toy",
    inputs=(TensorSpec("x", ("tokens", 16)),),
    weights=(TensorSpec("gain", (16,)),),
    outputs=(TensorSpec("wide", ("tokens", 16)),),
)
PLAN = Plan(
    version=PLAN_VERSION,
    stage=STAGE.name,
    buffers=(
        Buffer(name="narrow", shape=("tokens", 16), dtype=DType.BF16),
        Buffer(name="made", shape=("tokens", 16), dtype=DType.F32),
    ),
    views=(View(name="half", source="narrow", axis=1, start=0, stop=8),),
    steps=(
        Step(kind=StepKind.CONVERT, inputs={"x": "x"}, outputs={"out": "narrow"}, numbers={}),
        Step(kind=StepKind.GELU, inputs={"x": "half"}, outputs={"out": "made"}, numbers={}),
    ),
    outputs={"wide": "made"},
)


def with_buffer(**changes: object) -> Plan:
    return replace(PLAN, buffers=(replace(PLAN.buffers[0], **changes), PLAN.buffers[1]))  # type: ignore[arg-type]


def with_views(*views: View) -> Plan:
    return replace(PLAN, views=views)


def with_numbers(**numbers: float) -> Plan:
    return replace(PLAN, steps=(replace(PLAN.steps[0], numbers=numbers), PLAN.steps[1]))


HALF = PLAN.views[0]
HOSTILE = {
    "negative extent": (with_buffer(shape=(-8, -8)), "extent of -8"),
    "extent beyond 32 bits": (with_buffer(shape=(2**31, 16)), "extent of 2147483648"),
    "negative multiple": (with_buffer(shape=("-3*tokens", 16)), "extent of -3"),
    "no number before the star": (with_buffer(shape=("a*tokens", 16)), "extent of a"),
    "unknown symbol": (with_buffer(shape=("frames", 16)), "extent of frames"),
    "no axes": (with_buffer(shape=(), row_multiple=256), "has no rows"),
    "row multiple": (with_buffer(row_multiple=0), "multiple of 0"),
    "buffer named as a weight": (with_buffer(name="gain"), "the name of another array"),
    "view named as an input": (with_views(HALF, replace(HALF, name="x")), "another array's name"),
    "view of itself": (with_views(replace(HALF, source="half")), "which does not exist"),
    "view along another axis": (with_views(replace(HALF, axis=2)), "along axis 2"),
    "no heads": (with_numbers(num_heads=0.0), "num_heads=0.0"),
    "half a head": (with_numbers(num_heads=1.5), "num_heads=1.5"),
    "negative padding": (with_numbers(pad_top=-1.0), "pad_top=-1.0"),
    "no stride": (with_numbers(space_stride=0.0), "space_stride=0.0"),
    "flag": (with_numbers(gelu=2.0), "gelu=2.0"),
    "array of a later step": (replace(PLAN, steps=PLAN.steps[::-1]), "does not exist by then"),
    "output that nobody made": (replace(PLAN, steps=PLAN.steps[:1]), "outputs are"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_means_nothing_is_refused_when_a_plan_is_opened(name: str) -> None:
    plan, message = HOSTILE[name]
    with pytest.raises(EngineError, match=message) as caught:
        check_plan(plan, STAGE)
    assert "rebuild" in caught.value.hint


def drive(component: Component) -> None:
    component.run(STAGE.name, {"x": component.backend.to_device(np.zeros((5, 16), np.float32))})


@pytest.fixture
def rehearsed(tmp_path: Path) -> Callable[[Plan], object]:
    """Run a plan without a GPU."""

    def run(plan: Plan) -> object:
        (tmp_path / "plan.json").write_text(encode(plan))
        return rehearse((STAGE,), {STAGE.name: tmp_path / "plan.json"}, drive, attention=Precision.BF16)

    return run


@pytest.mark.parametrize("plan", [replace(PLAN, version=PLAN_VERSION - 1), replace(PLAN, stage="transformer.other")])
def test_a_plan_of_another_version_or_stage_is_refused_with_a_remedy(plan: Plan, rehearsed: Callable[[Plan], object]) -> None:
    with pytest.raises(EngineError, match=f"expected {PLAN_VERSION} of transformer.toy") as caught:
        rehearsed(plan)
    assert "rebuild" in caught.value.hint


def test_a_view_beyond_its_array_is_an_engine_error(rehearsed: Callable[[Plan], object]) -> None:
    rehearsed(PLAN)
    with pytest.raises(EngineError, match=r"columns 0:17 of an array of shape \[5, 16\]"):
        rehearsed(with_views(replace(HALF, stop=17)))


def test_an_argument_that_a_step_does_not_have_is_an_engine_error(rehearsed: Callable[[Plan], object]) -> None:
    add = Step(kind=StepKind.ADD, inputs={"a": "x", "b": "x", "c": "x"}, outputs={"out": "made"}, numbers={})
    with pytest.raises(EngineError, match="unexpected keyword argument 'c'"):
        rehearsed(replace(PLAN, steps=(add,)))


def test_views_may_be_of_views_however_many(rehearsed: Callable[[Plan], object]) -> None:
    chain = [HALF, *(replace(HALF, name=f"v{i}", source="half" if i == 0 else f"v{i - 1}") for i in range(3000))]
    steps = (PLAN.steps[0], replace(PLAN.steps[1], inputs={"x": "v2999"}))
    rehearsed(replace(PLAN, views=tuple(chain), steps=steps))


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_the_plans_that_are_built_pass(precision: Precision) -> None:
    arch = TransformerArch(dim=256, ffn_dim=512, num_heads=2, num_layers=1, text_dim=64)
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=arch)
    for declared in transformer_stages(arch):
        stage = in_precision(declared, precision)
        plan = lower_stage(stage_graph(variant, declared), stage)
        check_plan(plan, stage)
        if plan.fp8_attention is not None:
            check_plan(plan.fp8_attention, with_fp8_attention(stage))
