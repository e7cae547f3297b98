"""Strongly typed graphs: their borders are the stage's contract, islands stay wide, and apart from rounding they compute the same."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, shape_inference

from engines.precision.typed import ELEMENT_TYPES, typed_graph
from runtime.errors import BuildError
from runtime.precision import in_precision
from runtime.specs import DType, Precision, TensorSpec, resolve
from runtime.stages import network_stages
from runtime.variants import Variant
from tests.harness import relative_error
from tests.tolerances import TOLERANCES
from tests.typed_toys import CLEAN_TOY, TOY, stage_of, traced

TRANSFORMER = [stage.name for stage in network_stages(TOY, "transformer")]
BY_ROW = ["transformer.block_in", "transformer.block_out", "transformer.head"]
ENCODERS = ["text_encoder.block", "image_encoder.embed", "image_encoder.block"]
VAE = ["vae.decode_low_first", "vae_encoder.encode_high_step"]
CASES = [(TOY, name) for name in (*TRANSFORMER, *ENCODERS, *VAE)] + [(CLEAN_TOY, name) for name in BY_ROW]
NARROW = (Precision.BF16, Precision.FP16, Precision.FP8)


def typed(name: str, precision: Precision, variant: Variant = TOY) -> onnx.ModelProto:
    return typed_graph(traced(variant, name), in_precision(stage_of(variant, name), precision))


def borders(values: "list[onnx.ValueInfoProto]") -> list[tuple[str, int, list[int | str]]]:
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]


def declared(tensors: tuple[TensorSpec, ...]) -> list[tuple[str, int, list[int | str]]]:
    return [(tensor.name, ELEMENT_TYPES[tensor.dtype], list(tensor.shape)) for tensor in tensors]


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value of the main graph."""
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    return {
        value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.value_info, *inferred.output)
    } | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def calls(model: onnx.ModelProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == operator]


@pytest.mark.parametrize("variant, name", CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_a_typed_graph_has_the_borders_of_its_stage_and_types_that_agree(variant: Variant, name: str) -> None:
    for precision in NARROW:
        stage = in_precision(stage_of(variant, name), precision)
        model = typed_graph(traced(variant, name), stage)
        onnx.checker.check_model(model, full_check=True)
        assert borders(list(model.graph.input)) == declared((*stage.inputs, *stage.weights))
        assert borders(list(model.graph.output)) == declared(stage.outputs)
        types_of(model)  # refuses an operator whose inputs differ in type


@pytest.mark.parametrize("variant, name", CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_without_rounding_a_typed_graph_computes_what_was_traced(variant: Variant, name: str) -> None:
    stage = stage_of(variant, name)
    extents = dict.fromkeys(stage.symbols, 8)
    generator = np.random.default_rng(0)
    feeds = {
        tensor.name: np.full(shape, 3, np.int64) if tensor.dtype is DType.I64 else generator.standard_normal(shape, np.float32)
        for tensor in (*stage.inputs, *stage.weights)
        if (shape := [resolve(axis, extents) for axis in tensor.shape]) is not None
    }
    expected, given = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
        for model in (traced(variant, name), typed_graph(traced(variant, name), stage))
    )
    for one, other in zip(given, expected, strict=True):
        if np.any(other):
            assert relative_error(one, other) < TOLERANCES["stage, fp32"]


@pytest.mark.parametrize("precision", NARROW)
def test_norms_modulation_gates_and_activations_stay_in_float32(precision: Precision) -> None:
    model = typed("transformer.block_out", precision)
    types = types_of(model)
    wide = [*calls(model, "LayerNormalization"), *calls(model, "AdaLayerNorm"), *calls(model, "Gate"), *calls(model, "Gelu")]
    assert len(wide) == (4 if precision is Precision.FP8 else 5)  # of FP8, the GELU is part of its product
    for node in wide:
        assert {types[name] for name in node.input} == {TensorProto.FLOAT}, node.op_type


def test_queries_are_scaled_before_they_are_rounded() -> None:
    model = typed("transformer.attention", Precision.BF16)
    (attention,) = calls(model, "ScaledAttention")
    producers = {node.output[0]: node for node in model.graph.node}
    rounding = producers[attention.input[0]]
    scaling = producers[rounding.input[0]]
    assert (rounding.op_type, scaling.op_type) == ("Cast", "Mul")
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name in scaling.input)
    assert (scale.data_type, helper.get_attribute_value(attention.attribute[0])) == (TensorProto.FLOAT, 2)
    assert onnx.numpy_helper.to_array(scale) == np.float32(16**-0.5)  # two heads of 16


def test_fp8_attention_keeps_its_operands_size_by_powers_of_two() -> None:
    stage = in_precision(stage_of(TOY, "transformer.attention"), Precision.BF16)
    model = typed_graph(traced(TOY, stage.name), stage, fp8_attention=True)
    onnx.checker.check_model(model, full_check=True)
    assert borders(list(model.graph.output)) == declared(stage.outputs)
    (attention,) = calls(model, "ScaledAttentionFp8")
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in attention.attribute}
    assert attributes == {"num_heads": 2, "query_scale": 0.25}  # of 16: queries come as x / 4 and are x in FP8
    (body,) = (function for function in model.functions if function.name == "ScaledAttentionFp8")
    assert [node.op_type for node in body.node].count("QuantizeLinear") == 4  # the softmax's weights, too


def test_every_product_of_an_fp8_block_takes_its_weight_and_scales_as_inputs() -> None:
    model = typed("transformer.block_out", Precision.FP8)
    products = [*calls(model, "LinearFp8"), *calls(model, "LinearGeluFp8")]
    weights = {f"{name}.weight" for name in ("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")}
    assert {node.input[1] for node in products} == weights
    assert all(node.input[2] == f"{node.input[1]}_scale" for node in products)
    assert not calls(model, "Linear")
    (body,) = (function for function in model.functions if function.name == "LinearFp8")
    (quantize,) = (node for node in body.node if node.op_type == "QuantizeLinear")
    (one,) = (node for node in body.node if quantize.input[1] in node.output)
    assert helper.get_attribute_value(one.attribute[0]) == 1.0


def test_products_that_leave_fp16s_range_run_on_scaled_rows() -> None:
    model = typed("text_encoder.block", Precision.FP16)
    scaled = {node.input[1] for node in calls(model, "ScaledProduct")}
    assert scaled == {"attn.o.weight", "ffn.gate.0.weight", "ffn.fc1.weight", "ffn.fc2.weight"}
    assert not calls(typed("text_encoder.block", Precision.BF16), "ScaledProduct")


def test_the_stream_of_hidden_states_keeps_its_type_between_residuals() -> None:
    transformer, text = typed("transformer.block_out", Precision.BF16), typed("text_encoder.block", Precision.BF16)
    assert {types_of(transformer)[node.output[0]] for node in calls(transformer, "Add")[1:]} == {TensorProto.BFLOAT16}
    assert {types_of(text)[node.output[0]] for node in calls(text, "Add")} == {TensorProto.FLOAT}


def test_a_traced_cast_has_the_type_it_casts_to_and_whole_numbers_stay_whole() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(traced(TOY, "transformer.embed"))
    product = model.graph.node[-1]
    product.output[0] = "product"
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["product"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Concat", ["rows", "columns"], ["shape"], axis=0),
            helper.make_node("Reshape", ["wide", "shape"], ["hidden_states"]),
        ]
    )
    extents = {"rows": -1, "columns": TOY.transformer.dim}
    model.graph.initializer.extend(helper.make_tensor(name, TensorProto.INT64, (1,), [n]) for name, n in extents.items())
    found = typed_graph(model, in_precision(stage_of(TOY, "transformer.embed"), Precision.BF16))
    onnx.checker.check_model(found, full_check=True)
    types = types_of(found)
    assert (types["wide"], types["shape"], types["hidden_states"]) == (
        TensorProto.FLOAT, TensorProto.INT64, TensorProto.BFLOAT16,
    )  # fmt: skip


def test_an_operator_without_a_rule_is_refused_by_name() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(traced(TOY, "transformer.embed"))
    model.graph.node[0].op_type = "Erf"
    model.graph.node[0].domain = ""
    with pytest.raises(BuildError, match=r"transformer\.embed: no rule says what Erf computes in"):
        typed_graph(model, in_precision(stage_of(TOY, "transformer.embed"), Precision.BF16))
