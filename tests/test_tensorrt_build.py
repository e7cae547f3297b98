"""TensorRT-RTX builds every kind of stage without a GPU, and fuses what is meant to be fused.

What an engine consists of is read from its builder's log; no engine is executed here.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import onnx
import onnx.inliner
import pytest

from engines.precision import functions, rules
from engines.precision.functions import SCALED_ATTENTION
from engines.precision.rules import Computes
from engines.precision.typed import typed_graph
from engines.profiles import DEFAULT_SIZES, stage_profile
from engines.targets.tensorrt.build import BuiltEngine, build_engine, build_engines
from engines.targets.tensorrt.library import RTX, Session
from engines.targets.tensorrt.network import make_network
from runtime.backends.engine_file import engine_for, read_header
from runtime.geometry import SizeRange, VideoSize
from runtime.precision import in_precision
from runtime.specs import FUNCTION_DOMAIN, Precision
from runtime.variants import TransformerArch, Variant
from tests.typed_toys import TOY, stage_of, traced

has_rtx = pytest.mark.skipif(find_spec(RTX.module) is None, reason="tensorrt-rtx is not installed")
WIDE_HEADS = replace(TOY, transformer=TransformerArch(dim=256, ffn_dim=512, num_heads=2, num_layers=1, text_dim=64))
"""Heads as wide as the true ones: kernels are chosen by that."""
ADA_ON = ("sm_89", "sm_120")


@cache
def built(
    name: str,
    precision: Precision,
    architectures: tuple[str, ...] = ADA_ON,
    variant: Variant = WIDE_HEADS,
    *,
    fp8_attention: bool = False,
    wide_products: tuple[str, ...] = (),
    sizes: SizeRange = DEFAULT_SIZES,
) -> BuiltEngine:
    stage = stage_of(variant, name)
    with Session(RTX) as session:
        return build_engine(
            session,
            traced(variant, name),
            in_precision(stage, precision, wide_products=wide_products),
            architectures=architectures,
            profile=stage_profile(stage, variant, sizes),
            fp8_attention=fp8_attention,
        )


def kernels(engine: BuiltEngine) -> list[str]:
    """Kinds of an engine's kernels that work on tokens: others work on a few rows."""
    return [layer.kind for layer in engine.layers if layer.is_large]


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(RTX) as opened:
        yield opened


@has_rtx
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16, Precision.FP8])
def test_self_attention_is_one_kernel_in_every_precision(precision: Precision) -> None:
    assert [layer.is_fused_attention for layer in built("transformer.attention", precision).layers].count(True) == 1


@has_rtx
def test_fp8_attention_reads_fp8_queries_keys_and_values_in_one_kernel() -> None:
    engine = built("transformer.attention", Precision.BF16, ADA_ON, fp8_attention=True)
    (attention,) = (layer for layer in engine.layers if layer.is_fused_attention)
    assert [operand.type for operand in attention.inputs if len(operand.shape) == 3] == ["FP8"] * 3
    assert [operand.type for operand in attention.outputs] == ["BFloat16"]
    assert engine.part.context_bytes < built("transformer.attention", Precision.BF16).part.context_bytes


@has_rtx
def test_both_forms_of_attention_are_in_its_file_where_the_architecture_has_fp8() -> None:
    stage = stage_of(WIDE_HEADS, "transformer.attention")
    profile = stage_profile(stage, WIDE_HEADS, DEFAULT_SIZES)
    graph, narrow = traced(WIDE_HEADS, stage.name), in_precision(stage, Precision.BF16)
    file = memoryview(build_engines(RTX, graph, narrow, architectures=("sm_86", "sm_89"), profile=profile))
    header = read_header(file)
    assert engine_for(header, file, "sm_86", fp8_attention=True) is None
    forms = [engine_for(header, file, "sm_89", fp8_attention=narrow) for narrow in (False, True)]
    assert [form is not None and form[0].architectures for form in forms] == [("sm_86", "sm_89"), ("sm_89",)]


@has_rtx
def test_an_fp8_block_multiplies_in_fp8_and_quantises_within_the_kernels_around() -> None:
    before, after = built("transformer.block_in", Precision.FP8), built("transformer.block_out", Precision.FP8)
    assert [sum(layer.is_fp8_product for layer in engine.layers) for engine in (before, after)] == [1, 5]
    assert sum(layer.is_fused_attention for layer in after.layers) == 1
    # block_in: norm and cast to FP8 · product · scales, bias and sums of squares · norm and rotation of queries and keys
    assert len(kernels(before)) == 4
    # block_out: 5 products, 1 attention; around them casts, norms, GELU and residuals in as many as there are places
    assert len(kernels(after)) <= 14
    assert not any(layer.kind == "reformat" for layer in (*before.layers, *after.layers))


@has_rtx
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_bias_gate_residual_and_gelu_are_epilogues_of_their_products(precision: Precision) -> None:
    engine = built("transformer.block_out", precision)
    fused = [layer.name for layer in engine.layers if layer.kind == "runtime_fusion"]
    assert len(fused) == 4  # o, cross o, both of the FFN; of cross q, the norm behind it takes the bias
    assert any("Tanh" in name for name in fused)


@has_rtx
def test_turing_has_an_engine_of_its_own_as_it_would_cost_others_their_epilogues() -> None:
    def epilogues(*architectures: str) -> int:
        return [layer.kind for layer in built("transformer.block_out", Precision.FP16, architectures).layers].count(
            "runtime_fusion"
        )

    assert epilogues("sm_75") == epilogues("sm_75", "sm_89") == 0
    assert epilogues("sm_80", "sm_86", "sm_89", "sm_120", "sm_121") == epilogues("sm_120") == 4
    assert RTX.architecture_groups[0] == ("sm_75",)


@has_rtx
def test_rotation_and_attention_are_layers_of_the_network_not_arithmetic(session: Session) -> None:
    def layers(name: str) -> list[str]:
        stage = in_precision(stage_of(WIDE_HEADS, name), Precision.BF16)
        network = make_network(session, typed_graph(traced(WIDE_HEADS, name), stage), stage)
        return [network.get_layer(index).type.name for index in range(network.num_layers)]

    assert layers("transformer.block_in").count("ROTARY_EMBEDDING") == 2
    assert layers("transformer.attention").count("ATTENTION_INPUT") == 1
    assert "SOFTMAX" not in layers("transformer.attention")


@has_rtx
@pytest.mark.parametrize("name", ["vae.decode_low_first", "vae_encoder.encode_high_step", "image_encoder.block"])
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_stages_of_the_other_networks_build(name: str, precision: Precision) -> None:
    assert built(name, precision, ADA_ON, TOY).part.bytes > 0


@has_rtx
@pytest.mark.parametrize("name", ["text_encoder.block", "image_encoder.embed", "transformer.time_embed"])
def test_turing_builds_what_is_float32_elsewhere(name: str) -> None:
    assert built(name, Precision.FP16, ("sm_75",), TOY).part.bytes > 0  # it has no float32 matrix product


@has_rtx
def test_a_file_of_engines_says_what_it_is_and_gives_each_architecture_its_own() -> None:
    stage = stage_of(WIDE_HEADS, "transformer.embed")
    profile = stage_profile(stage, WIDE_HEADS, DEFAULT_SIZES)
    graph, narrow = traced(WIDE_HEADS, stage.name), in_precision(stage, Precision.FP16)
    file = memoryview(build_engines(RTX, graph, narrow, architectures=("sm_75", "sm_89", "sm_120"), profile=profile))
    header = read_header(file)
    assert (header.stage, header.library, header.profile) == ("transformer.embed", "tensorrt-rtx", profile)
    assert header.library_version == version("tensorrt-rtx")
    assert [part.architectures for part in header.parts] == [("sm_75",), ("sm_89", "sm_120")]
    turing, later = engine_for(header, file, "sm_75"), engine_for(header, file, "sm_120")
    assert turing is not None and later is not None and engine_for(header, file, "sm_90") is None
    assert (turing[0].bytes, later[0].bytes) == (len(turing[1]), len(later[1]))
    assert bytes(turing[1]) + bytes(later[1]) == bytes(file[-turing[0].bytes - later[0].bytes :])


@has_rtx
def test_the_same_stage_becomes_the_same_engine() -> None:
    stage, graph = stage_of(TOY, "transformer.head"), traced(TOY, "transformer.head")
    narrow, profile = in_precision(stage, Precision.BF16), stage_profile(stage, TOY, DEFAULT_SIZES)
    first, second = (build_engines(RTX, graph, narrow, architectures=("sm_89",), profile=profile) for _ in range(2))
    assert len(first) == len(second)
    assert read_header(memoryview(first)) == read_header(memoryview(second))


@has_rtx
def test_products_that_are_not_in_fp8_any_more_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    rescaled = """x_rescaled = CastLike (scaled, x_restored)
            product_narrow = MatMul (x_rescaled,"""  # the operand before it was rounded
    body = functions.BODIES["LinearFp8"]
    monkeypatch.setitem(functions.BODIES, "LinearFp8", body.replace("product_narrow = MatMul (x_restored,", rescaled))
    assert not any(layer.is_fp8_product for layer in built.__wrapped__("transformer.block_in", Precision.FP8).layers)


@has_rtx
def test_epilogues_that_are_lost_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules._RULES, (FUNCTION_DOMAIN, "GatedResidual"), Computes.WIDE_STREAM)  # added in float32
    layers = built.__wrapped__("transformer.block_out", Precision.BF16).layers
    assert sum(layer.kind == "runtime_fusion" for layer in layers) < 4


@has_rtx
def test_attention_that_is_spelled_out_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    spelled_out = """key_columns = Transpose <perm = [0, 1, 3, 2]> (key_b)
            scores = MatMul (query_b, key_columns)
            squares = Mul (scores, scores)
            weights = Softmax <axis = -1> (squares)
            y_b = MatMul (weights, value_b)"""

    def inline_all(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, list[object]]:
        inlined = onnx.inliner.inline_local_functions(graph)
        for node in inlined.graph.node:
            node.name = node.output[0]
        return inlined, []

    body = functions.BODIES[SCALED_ATTENTION]
    fused = "y_b = Attention <scale = 1.0> (query_b, key_b, value_b)"
    assert fused in body
    monkeypatch.setitem(functions.BODIES, SCALED_ATTENTION, body.replace(fused, spelled_out))
    monkeypatch.setattr("engines.targets.tensorrt.network._hold_attention", inline_all)
    layers = built.__wrapped__("transformer.block_out", Precision.BF16).layers
    assert not any(layer.is_fused_attention for layer in layers)
    assert len([layer for layer in layers if layer.is_large]) > 11


@has_rtx
def test_products_kept_wide_are_bf16_in_an_fp8_engine() -> None:
    before = built("transformer.block_in", Precision.FP8, wide_products=("self_attn.qkv",))
    after = built("transformer.block_out", Precision.FP8, wide_products=("ffn.2",))
    assert [sum(layer.is_fp8_product for layer in engine.layers) for engine in (before, after)] == [0, 4]
    assert kernels(before) == kernels(built("transformer.block_in", Precision.BF16))


@has_rtx
def test_the_vaes_attention_builds_at_a_fixed_size_too() -> None:
    square = VideoSize(width=120, height=120, num_frames=1)  # 60x60 positions: it has no fused kernel for them
    sizes = SizeRange(smallest=square, largest=square)
    assert built("vae.decode_low_first", Precision.BF16, ("sm_89",), TOY, sizes=sizes).part.bytes > 0
