"""Every engine there is: all stages of all variants, in every precision, for every architecture. `make test-engines` runs it.

Stages of equal contents are built once. What the fast tests check on toys is checked here at the true widths.
"""

import resource
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest

from engines.plan import TARGETS, architectures
from engines.profiles import DEFAULT_SIZES, stage_profile
from engines.targets.tensorrt.build import build_engine, groups
from engines.targets.tensorrt.library import RTX, Session
from export.build import BuildRequest, build_bundle
from export.graphs import stage_graph
from runtime.precision import in_precision, is_self_attention
from runtime.specs import Precision, StageSpec
from runtime.stages import Arch, network_arch, network_stages, networks
from runtime.variants import VARIANTS, Variant

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec(RTX.module) is None, reason="tensorrt-rtx is not installed"),
]
PLAN = TARGETS["rtx"]
FP8_PRODUCTS = {"transformer.block_in": 1, "transformer.block_out": 5}
FUSED_ATTENTIONS = {"transformer.attention": 1, "transformer.block_out": 1, "image_encoder.block": 1}
"""Attention layers of a stage; with an image's keys and values, `block_out` has one more."""
IMAGE_KEYS = "image_key"


def distinct_stages() -> list[tuple[Variant, StageSpec]]:
    """Each stage with the first variant that has it with the same architecture numbers."""
    found: dict[tuple[StageSpec, Arch], Variant] = {}
    for variant in VARIANTS.values():
        for network in networks(variant):
            for stage in network_stages(variant, network):
                found.setdefault((stage, network_arch(variant, network)), variant)
    return [(variant, stage) for (stage, _), variant in found.items()]


@pytest.mark.parametrize(
    "variant, stage", distinct_stages(), ids=lambda case: case.name if isinstance(case, StageSpec | Variant) else ""
)
def test_a_stage_builds_in_every_precision_for_every_architecture(variant: Variant, stage: StageSpec) -> None:
    graph = stage_graph(variant, stage)
    with Session(RTX) as session:
        for precision in PLAN.networks[stage.network].precisions:
            for group in groups(RTX, architectures(PLAN, (), precision)):
                check_engine(session, graph, variant, stage, precision, group)
        if is_self_attention(stage):
            profile = stage_profile(stage, variant, DEFAULT_SIZES)
            narrow, group = in_precision(stage, Precision.FP8), architectures(PLAN, (), Precision.FP8)
            built = build_engine(session, graph, narrow, architectures=group, profile=profile, fp8_attention=True)
            assert sum(layer.is_fused_attention for layer in built.layers) == 1


def check_engine(
    session: Session, graph: onnx.ModelProto, variant: Variant, stage: StageSpec, precision: Precision, group: tuple[str, ...]
) -> None:
    profile = stage_profile(stage, variant, DEFAULT_SIZES)
    built = build_engine(session, graph, in_precision(stage, precision), architectures=group, profile=profile)
    assert built.part.architectures == group
    wanted = FP8_PRODUCTS.get(stage.name, 0) if precision is Precision.FP8 else 0
    assert sum(layer.is_fp8_product for layer in built.layers) == wanted
    if stage.name in FUSED_ATTENTIONS:
        attentions = FUSED_ATTENTIONS[stage.name] + any(tensor.name == IMAGE_KEYS for tensor in stage.inputs)
        assert sum(layer.is_fused_attention for layer in built.layers) == attentions


def test_a14b_in_fp8_for_two_architectures_is_built_in_90_seconds_4_gib_and_64_mb(tmp_path: Path) -> None:
    before = cpu_seconds()
    summary = build_bundle(
        BuildRequest(
            out=tmp_path,
            checkpoint=None,
            variant="wan2.2-t2v-a14b",
            targets=("rtx",),
            precision=Precision.FP8,
            architectures=("sm_89", "sm_120"),
        )
    )
    assert summary.engine_bytes < 64e6
    assert cpu_seconds() - before < 90  # work for one core; the process has two
    assert summary.peak_memory_bytes is not None and summary.peak_memory_bytes < 4 * 2**30


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
