"""What the VAE's graphs become on the `cuda` target, without a GPU: steps, layouts, caches in place, frames a few at a time."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.targets.cuda.compile import SOURCE
from engines.targets.cuda.lower import lower_stage
from export.graphs import stage_graph
from export.pack import pack_plan, write_weights
from runtime.backends.cuda.plan import Plan, Step, StepKind
from runtime.backends.cuda.vae_kernels import MAX_PAST, PIXELS_PER_THREAD, TRANSPOSE_SIDE
from runtime.errors import BuildError, ExportError
from runtime.precision import in_precision
from runtime.specs import DType, Precision, StageSpec, TensorSpec
from runtime.stages.vae import COLOURS, DECODE_HIGH, DECODE_LOW, ENCODE_HIGH, ENCODE_LOW, vae_encoder_stages, vae_stages
from runtime.variants import VARIANTS, VaeArch
from runtime.weights import map_safetensors
from tests.harness import DictSource

ARCHS = {
    "2.1": VaeArch(base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)),
    "2.2": replace(
        VARIANTS["wan2.2-ti2v-5b"].vae,
        base_dim=8,
        decoder_base_dim=16,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temporal_downsample=(False, True),
    ),
}


def stage_of(arch: VaeArch, name: str) -> StageSpec:
    return next(stage for stage in (*vae_stages(arch), *vae_encoder_stages(arch)) if stage.name == name)


@cache
def plan_of(arch_name: str, stage_name: str) -> Plan:
    return lower(ARCHS[arch_name], stage_name)


def lower(arch: VaeArch, stage_name: str) -> Plan:
    stage = stage_of(arch, stage_name)
    variant = replace(VARIANTS["wan2.1-t2v-1.3b"], vae=arch)
    return lower_stage(stage_graph(variant, stage), in_precision(stage, Precision.BF16))


def steps_of(plan: Plan, kind: StepKind) -> list[Step]:
    return [step for step in plan.steps if step.kind is kind]


def shapes(plan: Plan) -> dict[str, tuple[int | str, ...]]:
    return {buffer.name: buffer.shape for buffer in plan.buffers}


@pytest.mark.parametrize("stage", [DECODE_LOW[1], DECODE_HIGH[1], ENCODE_HIGH[1], ENCODE_LOW[1]])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_leaves_every_cache_where_it_found_it(arch: str, stage: str) -> None:
    plan = plan_of(arch, stage)
    caches = {name for name in plan.outputs if name.startswith("next_cache_")}
    assert caches and all(plan.outputs[name] == name.removeprefix("next_") for name in caches)
    updated = {step.inputs["past"] for step in steps_of(plan, StepKind.CHANNEL_NORM) if "past" in step.inputs}
    assert updated == {name.removeprefix("next_") for name in caches}


@pytest.mark.parametrize("stage", [DECODE_LOW[0], DECODE_HIGH[0]])
def test_the_first_pass_makes_every_cache(stage: str) -> None:
    plan = plan_of("2.1", stage)
    made = {step.outputs["next_past"] for step in steps_of(plan, StepKind.CHANNEL_NORM) if "next_past" in step.outputs}
    made |= {step.outputs["out"] for step in steps_of(plan, StepKind.ZEROS)}
    assert made == {name for name in plan.outputs if name.startswith("next_cache_")}


def test_sums_happen_in_convolutions() -> None:
    low, high = (plan_of("2.1", pair[0]) for pair in (DECODE_LOW, DECODE_HIGH))
    # four residual blocks and the attention, two residual blocks
    assert [sum("residual" in step.inputs for step in steps_of(plan, StepKind.CONVOLUTION)) for plan in (low, high)] == [5, 2]
    shared = {StepKind.CONVOLUTION, StepKind.CHANNEL_NORM}
    assert {step.kind for step in low.steps} == {StepKind.CHANNELS_LAST, StepKind.FRAME_ATTENTION, *shared}
    assert {step.kind for step in high.steps} == {StepKind.ZEROS, StepKind.UPSAMPLE, StepKind.PLANES, *shared}


def test_the_first_level_of_2_2_hands_its_input_over_the_cut() -> None:
    low, high = plan_of("2.2", DECODE_LOW[1]), plan_of("2.2", DECODE_HIGH[1])
    assert set(low.outputs) - {"hidden", "level_input"} == {name for name in low.outputs if name.startswith("next_cache_")}
    assert low.outputs["hidden"] != low.outputs["level_input"]
    first = steps_of(high, StepKind.ADD_DUPLICATE_UP)[0]
    assert first.inputs["level_input"] == "level_input"


def test_frames_that_a_shortcut_still_wants_whole_are_not_cut() -> None:
    arch = replace(ARCHS["2.2"], temporal_downsample=(True, True))
    time_doubles_last = replace(arch, dim_mult=(1, 1), temporal_downsample=(True,))
    for each in (arch, time_doubles_last):
        plan = lower(each, DECODE_HIGH[1])
        shortcuts = steps_of(plan, StepKind.ADD_DUPLICATE_UP)
        assert len(shortcuts) == sum(each.temporal_downsample)
        assert shortcuts[0].inputs["level_input"] == "level_input"


def test_colours_are_one_step_between_planes_and_bytes() -> None:
    plan = plan_of("2.1", COLOURS)
    (step,) = plan.steps
    assert (step.kind, step.inputs) == (StepKind.COLOURS, {"x": "frames"})
    (buffer,) = plan.buffers
    assert (buffer.shape, buffer.dtype) == (("frames", "height", "width", 3), DType.U8)


def test_frames_go_two_at_a_time_through_what_follows_the_last_doubling_of_time() -> None:
    arch = replace(ARCHS["2.1"], dim_mult=(1, 2, 2), temporal_downsample=(True, True))
    plan = lower(arch, DECODE_HIGH[1])
    planes = steps_of(plan, StepKind.PLANES)
    assert [step.numbers["first_frame"] for step in planes] == [0, 2]
    assert {step.outputs["out"] for step in planes} == {plan.outputs["frames"]}
    heads = [step for step in steps_of(plan, StepKind.CONVOLUTION) if step.inputs["weight"] == "decoder.head.2.weight"]
    assert [shapes(plan)[step.outputs["out"]] for step in heads] == [(2, "4*height", "4*width", 8)] * 2
    pasts = [step.inputs["past"] for step in steps_of(plan, StepKind.CHANNEL_NORM) if "past" in step.inputs]
    assert pasts[-1] in pasts[:-1]  # the second part finds what the first has left


def test_pixels_are_folded_while_the_layout_changes() -> None:
    (entry,) = steps_of(plan_of("2.2", ENCODE_HIGH[1]), StepKind.CHANNELS_LAST)
    assert entry.numbers["side"] == 2
    assert shapes(plan_of("2.2", ENCODE_HIGH[1]))[entry.outputs["out"]] == (2, "4*height", "4*width", 16)
    assert {step.numbers["side"] for step in steps_of(plan_of("2.2", DECODE_HIGH[1]), StepKind.PLANES)} == {2}


def test_widths_that_are_no_multiple_of_8_are_refused() -> None:
    with pytest.raises(BuildError, match="multiples of 8, not 12"):
        lower(VaeArch(base_dim=12, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(False,)), DECODE_HIGH[0])


def test_declared_tensors_have_their_channels_last_in_multiples_of_8() -> None:
    low, high = (in_precision(stage_of(VaeArch(), pair[1]), Precision.BF16) for pair in (DECODE_LOW, DECODE_HIGH))
    given = {tensor.name: tensor for stage in (low, high) for tensor in (*stage.inputs, *stage.weights, *stage.outputs)}
    assert given["hidden"] == TensorSpec("hidden", (1, "height", "width", 384), DType.BF16, channels_last=True)
    assert given["cache_01"] == TensorSpec("cache_01", (2, "2*height", "2*width", 192), DType.BF16, channels_last=True)
    assert given["decoder.head.2.weight"].shape == (8, 3, 3, 3, 96)
    assert given["decoder.head.2.bias"].shape == (8,)
    assert given["decoder.middle.1.to_qkv.weight"].shape == (1152, 1, 1, 384)
    assert given["latents"] == TensorSpec("latents", (16, 1, "height", "width"))
    assert given["decoder.head.0.gamma"] == TensorSpec("decoder.head.0.gamma", (96, 1, 1, 1))


def test_packed_weights_are_turned_and_padded_with_zeros(tmp_path: Path) -> None:
    weight, bias = torch.arange(3 * 2 * 3 * 3, dtype=torch.float32).reshape(3, 2, 3, 3), torch.tensor([1.0, 2.0, 3.0])
    stage = StageSpec(
        name="vae.toy", inputs=(), outputs=(), weights=(TensorSpec("c.weight", (3, 2, 3, 3)), TensorSpec("c.bias", (3,)))
    )
    plan = pack_plan([in_precision(stage, Precision.BF16)], num_blocks=0)
    write_weights(DictSource({"c.weight": weight, "c.bias": bias}), plan, tmp_path / "w.safetensors")
    read = {
        name: torch.from_numpy(array.copy()).view(torch.bfloat16)
        for name, array in map_safetensors(tmp_path / "w.safetensors").items()
    }
    assert read["c.weight"].shape == (8, 3, 3, 8)
    np.testing.assert_array_equal(read["c.weight"][:3, :, :, :2].float(), weight.permute(0, 2, 3, 1))
    assert not read["c.weight"][3:].any() and not read["c.weight"][:, :, :, 2:].any()
    assert read["c.bias"].tolist() == [1, 2, 3, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(3, 2, 3), (3, 2, 3, 5), (3, 9, 3, 3), (9, 2, 3, 3), (0, 2, 3, 3)])
def test_a_convolution_of_another_size_is_not_padded_to_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stage = StageSpec(name="vae.toy", inputs=(), outputs=(), weights=(TensorSpec("c.weight", (3, 2, 3, 3)),))
    plan = pack_plan([in_precision(stage, Precision.BF16)], num_blocks=0)
    with pytest.raises(ExportError, match=re.escape(f"the checkpoint has {list(shape)}")):
        write_weights(DictSource({"c.weight": torch.zeros(shape)}), plan, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("constant", "value"),
    [("kMaxPast", MAX_PAST), ("kTransposeSide", TRANSPOSE_SIDE), ("kPixelsPerThread", PIXELS_PER_THREAD)],
)
def test_launches_and_kernels_agree_on_their_constants(constant: str, value: int) -> None:
    source = SOURCE.with_name("vae.cuh").read_text(encoding="utf-8")
    assert re.findall(rf"constexpr int {constant} = (\d+);", source) == [str(value)]
