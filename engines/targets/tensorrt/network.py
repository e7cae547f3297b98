"""A typed graph → a TensorRT network: the parser's work, but for attention.

The parser would split attention's scale between queries and keys and round both factors (TensorRT-RTX 1.7.1); here the graph has scaled
the queries already, and the layer is made through the network API. While parsing, its place is held by an identity of the queries.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner

from engines.precision.functions import FP8_WEIGHTS_SCALE, SCALED_ATTENTION, SCALED_ATTENTION_FP8
from engines.targets.tensorrt.library import Session
from runtime.specs import StageSpec

_FUSED_HEADS, _FUSED_HEADS_FP8 = range(16, 257, 16), range(32, 257, 32)
"""Widths of a head that have a fused kernel. Others may be decomposed, such as some toys'."""
_PREFIX = "held_attention_"


@dataclass(frozen=True, slots=True)
class _Held:
    """An attention layer to be: names of its operands and its result, its heads, and the queries' scale where it is FP8."""

    query: str
    key: str
    value: str
    result: str
    heads: int
    query_scale: float | None


def make_network(session: Session, graph: onnx.ModelProto, stage: StageSpec) -> Any:
    """The strongly typed network of a stage.

    Raises:
        BuildError: the parser refused an operator.
    """
    session.constants.clear()
    plain, held = _hold_attention(graph)
    trt = session.trt
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = session.builder.create_network(flags)
    network.name = stage.name
    parser = trt.OnnxParser(network, session.logger)
    if not parser.parse(plain.SerializeToString()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        where = ", ".join(f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors[:2])
        raise session.refused(f"{stage.name}: the parser refused {where}")
    for place in held:
        _put_attention(session, network, place)
    return network


def _hold_attention(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, list[_Held]]:
    """The graph with every function inlined, and identities where attention belongs, its operands outputs of the graph."""
    held: list[_Held] = []
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    del model.graph.node[:]
    for node in graph.graph.node:
        if node.op_type not in (SCALED_ATTENTION, SCALED_ATTENTION_FP8):
            model.graph.node.append(node)
            continue
        query, key, value = names = [f"{_PREFIX}{len(held)}_{part}" for part in ("query", "key", "value")]
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        held.append(_Held(query, key, value, node.output[0], attributes["num_heads"], attributes.get("query_scale")))
        model.graph.node.extend(
            helper.make_node("Identity", [given], [name]) for given, name in zip(node.input, names, strict=True)
        )
        model.graph.node.append(helper.make_node("Identity", [query], [node.output[0]]))
        model.graph.output.extend(helper.make_tensor_value_info(name, _narrow_type(graph), None) for name in names)
    inlined = inliner.inline_local_functions(model)
    for node in inlined.graph.node:
        node.name = node.output[0]  # the parser refuses a layer whose name is taken
    return inlined, held


def _put_attention(session: Session, network: Any, place: _Held) -> None:
    """Make the layer, and let the readers of the identity read it."""
    trt = session.trt
    outputs = {network.get_output(index).name: network.get_output(index) for index in range(network.num_outputs)}
    operands = [outputs[name] for name in (place.query, place.key, place.value)]
    for tensor in operands:
        network.unmark_output(tensor)
    width = operands[0].shape[1] // place.heads
    if place.query_scale is not None:
        scales = (place.query_scale, 1.0, 1.0)
        operands = [_through_fp8(session, network, *pair) for pair in zip(operands, scales, strict=True)]
    by_head = [_by_head(trt, network, tensor, place.heads, width) for tensor in operands]
    attention = network.add_attention_v2(*by_head, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE)
    attention.name = place.result
    fused = _FUSED_HEADS if place.query_scale is None else _FUSED_HEADS_FP8
    # one head is the VAE's, 384 wide or more; a toy's has a kernel, but not at every fixed size (60x60: none in TensorRT-RTX 1.7.1)
    attention.decomposable = place.heads == 1 or width not in fused
    if place.query_scale is not None:
        attention.normalization_quantize_to_type = trt.DataType.FP8
        attention.normalization_quantize_scale = _scalar(session, network, FP8_WEIGHTS_SCALE, operands[0].dtype)
    rows = network.add_shuffle(attention.get_output(0))  # [1, heads, N, d] → [N, heads · d]
    rows.name = f"{place.result}.rows"
    rows.first_transpose = trt.Permutation([0, 2, 1, 3])
    rows.reshape_dims = trt.Dims([-1, place.heads * width])
    _reread(network, place.result, rows.get_output(0))


def _by_head(trt: Any, network: Any, tensor: Any, heads: int, width: int) -> Any:
    """[N, heads · d] → [1, heads, N, d]."""
    split = network.add_shuffle(tensor)
    split.name = f"{tensor.name}.split"
    split.reshape_dims = trt.Dims([1, -1, heads, width])
    split.second_transpose = trt.Permutation([0, 2, 1, 3])
    return split.get_output(0)


def _through_fp8(session: Session, network: Any, tensor: Any, scale: float) -> Any:
    """A tensor rounded to FP8 at a constant scale, in its type again; the library lets the layer behind read the FP8."""
    unit = _scalar(session, network, scale, tensor.dtype)
    quantized = network.add_quantize(tensor, unit, session.trt.DataType.FP8)
    quantized.name = f"{tensor.name}.fp8"
    restored = network.add_dequantize(quantized.get_output(0), unit, tensor.dtype)
    restored.name = f"{tensor.name}.restored"
    return restored.get_output(0)


def _scalar(session: Session, network: Any, value: float, kind: Any) -> Any:
    array = np.array(value, np.float32)
    session.constants.append(array)
    constant = network.add_constant((), session.trt.Weights(array))
    return network.add_cast(constant.get_output(0), kind).get_output(0)


def _reread(network: Any, name: str, tensor: Any) -> None:
    """Replace the tensor called `name` by another in all layers, and among the network's outputs."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        for index in range(layer.num_inputs):
            given = layer.get_input(index)
            if given is not None and given.name == name:
                layer.set_input(index, tensor)
    for index in range(network.num_outputs):
        if (output := network.get_output(index)).name == name:
            network.unmark_output(output)
            output.name = f"{name}.unread"
            tensor.name = name
            network.mark_output(tensor)
            return


def _narrow_type(graph: onnx.ModelProto) -> int:
    types: list[int] = [value.type.tensor_type.elem_type for value in graph.graph.input]
    return next(kind for kind in types if kind in (TensorProto.BFLOAT16, TensorProto.FLOAT16))
