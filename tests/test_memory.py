"""Device memory as arithmetic: what work takes, what stays resident, what goes first, and what is refused before it begins."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda.plan import PLAN_VERSION, Buffer, Plan, Step, StepKind
from runtime.backends.cuda.rehearsal import rehearse
from runtime.bundle import open_bundle
from runtime.component import Component
from runtime.errors import DeviceMemoryError, RequestError
from runtime.memory import SMALL_BYTES, Layout, Need, parse_bytes, plan_memory
from runtime.needs import generation_needs
from runtime.opening import choose_target
from runtime.request import GenerateRequest
from runtime.residency import PAGE_BYTES, Ledger, Unit, UnitTensor, choose_residency, least_bytes, weight_units
from runtime.resolving import resolve_request
from runtime.specs import DType, Precision, StageSpec, TensorSpec
from runtime.stages import network_components
from runtime.stages.text_encoder import TOKEN_EMBEDDING
from runtime.stages.transformer import transformer_stages
from runtime.strict_json import encode
from runtime.tiling import TileSpec
from runtime.variants import TransformerArch
from runtime.weights import map_safetensors
from tests.conftest import RUN, Refuses, Toy

MIB = 1 << 20
ARCH = TransformerArch(dim=256, ffn_dim=512, num_heads=2, num_layers=3, text_dim=64)


@pytest.mark.parametrize(("consumed", "mib"), [((), 10), (("x",), 6)])
def test_an_input_that_nobody_uses_afterwards_makes_room_within_its_stage(
    tmp_path: Path, consumed: tuple[str, ...], mib: int
) -> None:
    rows = MIB // 16
    stage = StageSpec(
        name="vae.twice", inputs=(TensorSpec("x", (rows, 16)),), weights=(), outputs=(TensorSpec("wide", (rows, 16)),)
    )
    steps = (
        Step(kind=StepKind.CONVERT, inputs={"x": "x"}, outputs={"out": "narrow"}, numbers={}),
        Step(kind=StepKind.CONVERT, inputs={"x": "narrow"}, outputs={"out": "wide"}, numbers={}),
    )
    buffers = tuple(
        Buffer(name=name, shape=(rows, 16), dtype=dtype) for name, dtype in (("narrow", DType.BF16), ("wide", DType.F32))
    )
    plan = Plan(version=PLAN_VERSION, stage=stage.name, buffers=buffers, views=(), steps=steps, outputs={"wide": "wide"})
    (tmp_path / "plan.json").write_text(encode(plan))

    def drive(component: Component) -> None:
        x = np.zeros((rows, 16), np.float32)  # 4 MiB, and so is the output; between them lie 2
        component.run(stage.name, {"x": component.backend.to_device(x)}, consumed=consumed)

    layout = rehearse((stage,), {stage.name: tmp_path / "plan.json"}, drive, attention=Precision.BF16)
    assert layout.nbytes == mib * MIB


def test_units_are_blocks_and_stages_that_share_no_weight() -> None:
    units = weight_units(transformer_stages(ARCH), num_blocks=3)
    assert [(unit.name, unit.block, unit.per_prompt) for unit in units] == [
        ("text_embedding", None, True),
        ("time_embedding", None, True),
        *((f"blocks.{i}", i, True) for i in range(3)),
        ("patch_embedding", None, False),
        ("head", None, False),
        *((f"blocks.{i}", i, False) for i in range(3)),
    ]
    names = [tensor.name for unit in units for tensor in unit.tensors]
    assert len(names) == len(set(names))
    assert {"blocks.1.cross_attn.kv.weight", "blocks.1.modulation", "head.modulation"} <= set(names)
    for unit in units:
        assert all(tensor.offset % 256 == 0 for tensor in unit.tensors)
        assert unit.nbytes >= sum(tensor.nbytes for tensor in unit.tensors)


def test_stages_with_a_weight_in_common_are_one_unit() -> None:
    weight, bias = TensorSpec("a.weight", (4, 4)), TensorSpec("a.bias", (4,))
    first = StageSpec(name="vae.first", inputs=(), weights=(weight,), outputs=())
    step = StageSpec(name="vae.step", inputs=(), weights=(weight, bias), outputs=())
    (unit,) = weight_units((first, step), num_blocks=0)
    assert unit.tensors == (UnitTensor("a.weight", (4, 4), DType.F32, 0), UnitTensor("a.bias", (4,), DType.F32, 256))


def block(index: int, *, pages: int = 2, per_prompt: bool = False) -> Unit:
    return Unit(name=f"blocks.{index}", tensors=(), nbytes=pages * PAGE_BYTES, block=index, per_prompt=per_prompt)


FIXED = Unit(name="head", tensors=(), nbytes=PAGE_BYTES, block=None, per_prompt=False)
UNITS = (*(block(i, pages=1, per_prompt=True) for i in range(4)), FIXED, *(block(i) for i in range(4)))  # 4·1 + 1 + 4·2 pages


@pytest.mark.parametrize(
    ("pages", "resident", "slot_pages"),
    [
        (13, {0, 1, 2, 3, 4, 5, 6, 7, 8}, 0),
        (12, {3, 4, 5, 6, 7, 8}, 1),
        (11, {4, 5, 6, 7, 8}, 1),
        (10, {4, 6, 8}, 2),
        (7, {4, 8}, 2),
        (5, {4}, 2),
    ],
)
def test_what_every_step_needs_stays_first_and_streamed_blocks_are_spread(
    pages: int, resident: set[int], slot_pages: int
) -> None:
    residency = choose_residency(UNITS, pages * PAGE_BYTES)
    assert (set(residency.resident), residency.slots) == (resident, (slot_pages * PAGE_BYTES,) * 2 if slot_pages else ())
    assert residency.device_bytes <= pages * PAGE_BYTES


def test_slots_take_the_larger_of_what_streams_for_a_prompt_and_for_a_step() -> None:
    units = (*(block(i, pages=3, per_prompt=True) for i in range(4)), FIXED, *(block(i) for i in range(4)))
    assert least_bytes(units) == 7 * PAGE_BYTES
    for pages, resident in ((7, {4}), (9, {4, 8}), (15, {4, 5, 6, 7, 8})):
        residency = choose_residency(units, pages * PAGE_BYTES)
        assert (set(residency.resident), residency.slots) == (resident, (3 * PAGE_BYTES,) * 2)


PASSING = Unit(name="time", tensors=(), nbytes=7 * PAGE_BYTES, block=None, per_prompt=True)


@pytest.mark.parametrize(
    ("pages", "resident", "slot_pages"), [(20, set(range(10)), 0), (19, set(range(1, 10)), 0), (5, {5}, 2)]
)
def test_what_may_pass_among_the_arrays_goes_first_and_needs_no_slot(pages: int, resident: set[int], slot_pages: int) -> None:
    residency = choose_residency((PASSING, *UNITS), pages * PAGE_BYTES)
    assert (set(residency.resident), residency.slots) == (resident, (slot_pages * PAGE_BYTES,) * 2 if slot_pages else ())
    assert least_bytes((PASSING, *UNITS)) == 5 * PAGE_BYTES


def test_weights_that_pass_are_counted_among_the_arrays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight = TensorSpec("linear.weight", (1024, 1024))  # 4 MiB
    stage = StageSpec(
        name="transformer.time", inputs=(TensorSpec("x", (1, 16)),), weights=(weight,), outputs=(TensorSpec("y", (1, 16)),), per_prompt=True
    )  # fmt: skip
    buffers = (Buffer(name="y", shape=(1, 16), dtype=DType.F32),)
    step = Step(kind=StepKind.ADD, inputs={"a": "x", "b": "x"}, outputs={"out": "y"}, numbers={})
    plan = Plan(version=PLAN_VERSION, stage=stage.name, buffers=buffers, views=(), steps=(step,), outputs={"y": "y"})
    (tmp_path / "plan.json").write_text(encode(plan))

    def drive(component: Component) -> None:
        for _ in range(2):
            component.run(stage.name, {"x": component.backend.to_device(np.zeros((1, 16), np.float32))})

    caplog.set_level(logging.INFO, "runtime.backends.cuda.rehearsal")
    for per_prompt, nbytes in ((True, 4 * MIB), (False, 0)):
        stages = (replace(stage, per_prompt=per_prompt),)
        layout = rehearse(stages, {stage.name: tmp_path / "plan.json"}, drive, attention=Precision.BF16)
        assert layout.nbytes == nbytes
    assert caplog.messages[0] == "4.0 MiB to work in, 4.0 MiB at once: 1 x 4.0 MiB of transformer.time"


def test_the_least_room_is_what_cannot_stream_and_two_slots() -> None:
    assert least_bytes(UNITS) == 5 * PAGE_BYTES
    with pytest.raises(ValueError, match="less than the"):
        choose_residency(UNITS, 5 * PAGE_BYTES - 1)


def test_small_arrays_are_counted_where_there_are_many() -> None:
    """The text keys of a narrow model: each below a MiB, and all of them there at once."""

    def drive(component: Component) -> None:
        kept = [component.backend.to_device(np.zeros((512, 512), np.uint16)) for _ in range(60)]
        del kept

    layout = rehearse((), {}, drive, attention=Precision.BF16)
    assert (layout.nbytes, layout.small_bytes) == (0, 30 << 20)
    counted = replace(need("transformer", 1), layout=layout)
    assert counted.work_bytes == 30 << 20
    assert replace(counted, layout=replace(layout, small_bytes=1)).work_bytes == SMALL_BYTES


def need(component: str, count: int, *, work: int = 0, network: str = "transformer") -> Need:
    units = tuple(block(i, pages=1) for i in range(count))
    return Need(network=network, component=component, units=units, layout=Layout(nbytes=work * PAGE_BYTES, large_bytes=None))


ORDER = ("text", "high", "low", "vae")


def test_what_is_needed_last_goes_first() -> None:
    ledger = Ledger()
    gone = []
    for name, count in (("text", 3), ("high", 4), ("low", 4), ("vae", 1)):
        units = need(name, count).units
        residency = choose_residency(units, 9 * PAGE_BYTES)
        gone += ledger.open(name, units, residency, room=9 * PAGE_BYTES, order=ORDER)
    # low finds text and high: high's next use is farther away than text's, so two of its blocks go; vae then takes one of low's
    assert gone == [("high", 3), ("high", 2), ("low", 3)]
    assert ledger.total_bytes == 9 * PAGE_BYTES
    units = need("high", 4).units
    gone = ledger.open("high", units, choose_residency(units, 9 * PAGE_BYTES), room=9 * PAGE_BYTES, order=ORDER)
    assert gone == [("text", 2), ("text", 1)]  # the second generation, text done: the next text is farthest away


def test_two_experts_text_encoder_and_vae_share_one_budget() -> None:
    needs = [need("text", 6), need("high", 8, work=4), need("low", 8, work=4), need("vae", 1, work=9, network="vae")]
    fixed = 8 << 20
    small = 8 * PAGE_BYTES  # what is added for arrays too small to plan
    plan = plan_memory(needs, budget_bytes=fixed + small + 12 * PAGE_BYTES, fixed_bytes=fixed)
    resident = {component.need.component: len(component.residency.resident) for component in plan.components}
    assert resident == {"text": 6, "high": 8, "low": 8, "vae": 1}
    assert plan.peak_bytes <= plan.budget_bytes
    tight = plan_memory(needs, budget_bytes=fixed + small + 10 * PAGE_BYTES, fixed_bytes=fixed)
    resident = {component.need.component: len(component.residency.resident) for component in tight.components}
    assert resident == {"text": 6, "high": 4, "low": 4, "vae": 1}
    assert tight.peak_bytes <= tight.budget_bytes


def test_weights_that_lie_there_already_make_room_before_the_vae_starts() -> None:
    needs = [need("high", 8), need("vae", 1, work=10, network="vae")]
    plan = plan_memory(needs, budget_bytes=(8 + 12) * PAGE_BYTES, fixed_bytes=0)
    assert plan.find("vae").peak_bytes == (8 + 12) * PAGE_BYTES  # 10 to work in, 1 of its own, 1 block that could stay
    held = Ledger({"high": dict.fromkeys(range(8), PAGE_BYTES)})
    assert plan_memory(needs, budget_bytes=(8 + 12) * PAGE_BYTES, fixed_bytes=0, held=held).peak_bytes == plan.peak_bytes


def test_what_cannot_fit_even_streamed_is_refused_with_what_it_takes() -> None:
    needs = [need("text", 2), need("vae", 1, work=100, network="vae")]
    with pytest.raises(DeviceMemoryError, match=r"vae needs 218\.0 MiB of device memory, 216\.0 MiB to work in") as caught:
        plan_memory(needs, budget_bytes=100 * MIB, fixed_bytes=0)
    assert "--tile" in caught.value.hint and "--vram" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "nbytes"), [("12GiB", 12 << 30), ("1.5GiB", 3 << 29), ("8GB", 8 * 10**9), ("512MiB", 512 << 20)]
)
def test_sizes_of_memory_are_read_with_their_unit(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "12", "GiB", "12gib", "-1GiB", "0GiB", "nanGiB", "infGiB", "1e99GiB", "12 G", "1TiB"])
def test_other_sizes_of_memory_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is no size of memory"):
        parse_bytes(text)


def test_a_target_without_device_memory_refuses_a_budget_and_another_attention(
    one_expert: Toy, tmp_path: Path, refuses: Refuses
) -> None:
    out = tmp_path / "a.npy"
    refuses("run", one_expert.original, *RUN, "--out", out, "--vram", "4GiB", code=2, message="target cpu has no device memory")
    refuses(
        "run", one_expert.original, *RUN, "--out", out, "--attention", "fp8", code=2, message="attention in fp8: this target"
    )
    refuses("inspect", one_expert.original, "--vram", "4GiB", code=2, message="no target of this bundle has device memory")
    assert not list(tmp_path.iterdir())


def test_the_work_that_is_counted_is_what_the_drivers_do(two_experts: Toy) -> None:
    bundle = open_bundle(two_experts.original)
    opener = choose_target(bundle, target="cpu", num_threads=1)
    video = np.zeros((17, 32, 48, 3), np.uint8)
    request = GenerateRequest(prompt="a cat", width=48, height=32, num_frames=17, video=video, tile=TileSpec.square(16, 16))
    job = resolve_request(request, bundle.manifest, sizes=None)
    driven = []

    def rehearse(stages: Any, engines: Any, drive: Callable[[Component], object], attention: Precision) -> Layout:
        network = stages[0].network
        component = network_components(bundle.manifest.variant, network)[0]
        with opener.network(network, component) as (opened, _):
            drive(opened)
        driven.append(network)
        return Layout(nbytes=0, large_bytes=None)

    needs = generation_needs(opener, job, rehearse)
    assert driven == ["text_encoder", "vae_encoder", "transformer", "vae"]
    assert [need.component for need in needs] == [
        "text_encoder", "vae_encoder", "transformer_high_noise", "transformer_low_noise", "vae",
    ]  # fmt: skip
    for need in needs:
        stored = map_safetensors(bundle.file(bundle.manifest.weights["fp32"][need.component].file))
        listed = {tensor.name for unit in need.units for tensor in unit.tensors}
        assert listed == stored.keys() - {TOKEN_EMBEDDING}
