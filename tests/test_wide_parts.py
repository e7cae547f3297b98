"""Parts of an fp8 transformer that stay bf16: stages and weights follow from the rule, and whoever runs blocks takes the right ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from commands.values import wide_parts
from engines.plan import TARGETS
from engines.targets.cuda.lower import lower_stage
from export.build import BuildRequest, _fp8_wide
from export.graphs import stage_graph
from export.pack import pack_plan, weight_plan, write_weights
from runtime.backends.base import Backend, DeviceTensor
from runtime.backends.cuda.plan import Plan, StepKind
from runtime.backends.cuda.rehearsal import rehearse
from runtime.backends.emulated import EmulatedBackend
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.component import Component
from runtime.geometry import Float32
from runtime.precision import NOTHING_WIDE, WideParts, find_wide_fault, in_precision, stages_in_precision
from runtime.residency import PAGE_BYTES, Unit, choose_residency, least_bytes
from runtime.schedulers import Conventions
from runtime.specs import DType, Precision, StageSpec
from runtime.stages.transformer import transformer_stages
from runtime.transformer import Transformer
from runtime.variants import VARIANTS, TransformerArch
from runtime.weights import WeightStore
from tests.conftest import Refuses
from tests.gpu.test_transformer import random_weights
from tests.harness import DictSource, relative_error

ARCH = TransformerArch(dim=32, ffn_dim=64, num_heads=2, num_layers=4, text_dim=16, text_len=6, freq_dim=16)
VARIANT = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=ARCH)
DECLARED = {stage.name: stage for stage in transformer_stages(ARCH)}
LATENTS = (16, 2, 8, 8)
ENDS = WideParts(first_blocks=1, last_blocks=1)


def stages(precision: Precision, wide: WideParts = NOTHING_WIDE) -> dict[str, StageSpec]:
    found = stages_in_precision(DECLARED.values(), precision, num_blocks=ARCH.num_layers, wide=wide)
    return {stage.name: stage for stage in found}


@cache
def traced(name: str) -> onnx.ModelProto:
    return stage_graph(VARIANT, DECLARED[name])


def write_engines(target: str, built: dict[str, StageSpec], folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in built}
    plan = TARGETS[target].networks["transformer"]
    for name, stage in built.items():
        files[name].write_bytes(plan.build_engine(traced(name.removesuffix("_wide")), stage))
    return files


def predict(component: Component) -> Float32:
    transformer = Transformer(component, ARCH, LATENTS, conventions=Conventions.ORIGINAL)
    text, latents = (np.random.default_rng(i).standard_normal(shape, np.float32) for i, shape in enumerate([(5, 16), LATENTS]))
    (noise,) = transformer.predict(latents, 500.0, [transformer.encode_text(text)])
    return noise


def prediction(target: str, backend: Backend, folder: Path, precision: Precision, wide: WideParts = NOTHING_WIDE) -> Float32:
    built, file = stages(precision, wide), folder / "weights"
    folder.mkdir()
    write_weights(DictSource(random_weights(ARCH, seed=5)), pack_plan(built.values(), num_blocks=ARCH.num_layers), file)
    files = write_engines(target, built, folder)
    with backend:
        store = WeightStore(file, built.values(), backend, num_blocks=ARCH.num_layers)
        with Component(backend, built.values(), files, store) as component:
            return predict(component)


def test_wide_blocks_have_stages_of_their_own_where_their_weights_differ() -> None:
    plain, wide = stages(Precision.FP8), stages(Precision.FP8, ENDS)
    assert wide.keys() - plain.keys() == {"transformer.block_in_wide", "transformer.block_out_wide"}
    bf16 = in_precision(DECLARED["transformer.block_in"], Precision.BF16)
    assert wide["transformer.block_in_wide"] == replace(bf16, name="transformer.block_in_wide", blocks=(0, 3))
    assert wide["transformer.block_in"] == replace(plain["transformer.block_in"], blocks=(1, 2))
    assert {name: stage for name, stage in wide.items() if stage.blocks is None} == {
        name: stage for name, stage in plain.items() if not name.startswith("transformer.block")
    }
    assert stages(Precision.BF16, ENDS) == stages(Precision.BF16)
    only_out = stages(Precision.FP8, replace(ENDS, products=("self_attn.qkv",)))
    assert "transformer.block_in_wide" not in only_out and only_out["transformer.block_in"] == bf16


def test_weights_of_wide_blocks_and_products_are_bf16_without_scales() -> None:
    def types(wide: WideParts) -> dict[str, DType]:
        plan = weight_plan(VARIANT, "transformer", Precision.FP8, wide=wide)
        return {packed.name: packed.dtype for packed in plan if packed.name.endswith((".weight", ".weight_scale"))}

    plain, ends = types(NOTHING_WIDE), types(ENDS)
    changed = {name for name in plain if ends.get(name) is not plain[name]}
    assert changed == {name for name in plain if name.startswith(("blocks.0.", "blocks.3.")) and in_fp8(plain, name)}
    assert all(ends.get(name, DType.BF16) is DType.BF16 for name in changed)
    qkv = types(WideParts(products=("self_attn.qkv",)))
    assert {name for name in plain if qkv.get(name) is not plain[name]} == {
        f"blocks.{i}.self_attn.qkv.weight{suffix}" for i in range(ARCH.num_layers) for suffix in ("", "_scale")
    }


def in_fp8(types: dict[str, DType], name: str) -> bool:
    return types[name.removesuffix("_scale")] is DType.F8_E4M3


def test_with_wide_ends_a_toy_lies_between_bf16_and_fp8(tmp_path: Path) -> None:
    exact = prediction("cpu", OnnxRuntimeBackend(num_threads=1), tmp_path / "fp32", Precision.FP32)
    cases = {"bf16": (Precision.BF16, NOTHING_WIDE), "ends": (Precision.FP8, ENDS), "fp8": (Precision.FP8, NOTHING_WIDE)}
    errors = {
        name: relative_error(prediction("emulated", EmulatedBackend(num_threads=1), tmp_path / name, *case), exact)
        for name, case in cases.items()
    }
    assert 1.2 * errors["bf16"] < errors["ends"] < errors["fp8"] / 1.2, errors


@pytest.mark.parametrize("attention", [Precision.BF16, Precision.FP8])
def test_on_cuda_each_block_runs_the_plan_of_its_type(tmp_path: Path, attention: Precision) -> None:
    built = stages(Precision.FP8, ENDS)
    files = write_engines("cuda", built, tmp_path)
    ran: list[tuple[str, int]] = []

    def drive(component: Component) -> None:
        weights = component._weights

        class Weights:
            def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceTensor]:
                if block is not None and "block" in stage.name:
                    ran.append((stage.name, block))
                return weights.stage_weights(stage, block)

        component._weights = Weights()
        predict(component)

    rehearse(tuple(built.values()), files, drive, attention=attention)
    assert ran == [
        (f"transformer.{part}{'_wide' if block in (0, 3) else ''}", block)
        for block in range(ARCH.num_layers)
        for part in ("block_in", "block_out")
    ]


def test_blocks_that_stay_resident_are_counted_by_their_own_sizes() -> None:
    """With wide ends of 4 pages and others of 2: the ends stay first, then slots need 2; where they cannot, the slots are theirs."""
    pages = (4, 2, 2, 2, 2, 4)
    units = [
        Unit(name=f"blocks.{i}", tensors=(), nbytes=n * PAGE_BYTES, block=i, per_prompt=False) for i, n in enumerate(pages)
    ]

    def chosen(room: int, units: Sequence[Unit]) -> tuple[set[int], list[int]]:
        residency = choose_residency(units, room * PAGE_BYTES)
        assert residency.device_bytes <= room * PAGE_BYTES
        return set(residency.resident), [nbytes // PAGE_BYTES for nbytes in residency.slots]

    assert chosen(14, units) == ({0, 4, 5}, [2, 2])
    assert chosen(13, units) == chosen(12, units) == ({0, 5}, [2, 2])
    assert chosen(8, units) == (set(), [4, 4])  # the last and the first follow each other
    assert chosen(8, units[:5]) == ({0}, [2, 2])
    assert chosen(7, units[:5]) == chosen(6, units[:5]) == (set(), [2, 4])
    assert least_bytes(units) == 8 * PAGE_BYTES and least_bytes(units[:5]) == 6 * PAGE_BYTES


def test_fp8_attention_takes_the_operands_of_wide_blocks_as_fp8() -> None:
    before, after = (lowered(f"transformer.{name}_wide", ENDS).fp8_attention for name in ("block_in", "block_out"))
    assert before is not None and after is not None
    types = {buffer.name: buffer.dtype for buffer in before.buffers}
    assert {types[before.outputs[name]] for name in ("query", "key", "value")} == {DType.F8_E4M3}
    assert [step.kind for step in after.steps].count(StepKind.RESTORE) == 1  # a bf16 product wants attention's output in bf16


def test_a_wide_half_of_the_feed_forward_is_a_product_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.targets.cuda.lower_transformer._WIDE", 1)
    joined, apart = (
        [step.kind for step in lowered("transformer.block_out", wide).steps]
        for wide in (NOTHING_WIDE, WideParts(products=("ffn.2",)))
    )
    assert StepKind.FEED_FORWARD in joined and StepKind.FEED_FORWARD not in apart
    assert apart.count(StepKind.LINEAR) == joined.count(StepKind.LINEAR) + 2
    assert apart.count(StepKind.QUANTIZE_ROWS) == joined.count(
        StepKind.QUANTIZE_ROWS
    )  # attention's output; norms do it themselves


def lowered(name: str, wide: WideParts) -> Plan:
    return lower_stage(traced(name.removesuffix("_wide")), stages(Precision.FP8, wide)[name])


def test_what_cannot_be_kept_wide_is_named() -> None:
    def fault(**parts: Any) -> str | None:
        return find_wide_fault(WideParts(**parts), DECLARED.values(), num_blocks=ARCH.num_layers)

    assert fault() is None and fault(first_blocks=1, last_blocks=2, products=("ffn.0",)) is None
    assert fault(first_blocks=2, last_blocks=2) == "2 first and 2 last of 4 blocks: one at least must be fp8"
    assert fault(last_blocks=-1) is not None
    named = fault(products=("ffn.1",))
    assert named is not None and named.startswith("product 'ffn.1': fp8 has self_attn.qkv, self_attn.o")


@pytest.mark.parametrize(
    ("options", "precision", "blocks", "expected"),
    [
        (None, Precision.FP8, 4, "first:1"),
        (None, Precision.FP8, 1, ""),
        (None, Precision.BF16, 4, ""),
        (["none"], Precision.FP8, 4, ""),
        (["none"], Precision.BF16, 4, ""),
        (["last:1"], Precision.FP8, 4, "last:1"),
    ],
)
def test_the_first_of_several_blocks_is_wide_unless_the_build_says_otherwise(
    options: list[str] | None, precision: Precision, blocks: int, expected: str
) -> None:
    variant = replace(VARIANT, transformer=replace(ARCH, num_layers=blocks))
    request = BuildRequest(out=Path(), checkpoint=None, precision=precision, fp8_wide=wide_parts(options))
    assert str(_fp8_wide(request, [TARGETS["emulated"]], variant)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--wide", "first:1"), "--wide: of fp8, and the transformer is built in bf16"),
        (("--precision", "fp8", "--wide", "none", "--wide", "first:1"), "--wide none: nothing stays bf16 then"),
        (("--precision", "fp8", "--wide", "middle:1"), "--wide middle:1: blocks are counted from first or last"),
        (("--precision", "fp8", "--wide", "last:x"), "--wide: 'x' is not a whole number"),
        (("--precision", "fp8", "--wide", "first:30"), "--wide: 30 first and 0 last of 30 blocks"),
        (("--precision", "fp8", "--wide", "cross_attn.k"), "--wide: product 'cross_attn.k': fp8 has"),
    ],
)
def test_wide_parts_that_do_not_exist_are_refused(
    refuses: Refuses, tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    command = ("build-engines", "--engines-only", "--variant", "wan2.1-t2v-1.3b", "--target", "emulated", "--out")
    refuses(*command, tmp_path / "bundle", *arguments, code=2, message=message)
    assert not (tmp_path / "bundle").exists()
