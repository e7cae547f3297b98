"""A strongly typed graph → a graph of float32 operators whose results are rounded where the types say so: what any CPU can run.

Inputs, weights and outputs keep the types of the typed graph, so that its weights bind unchanged. In between every narrow value is a
float32 one that has been through its type: an operator computes in float32, as tensor cores sum, and its result is rounded once.
Attention is what fused kernels make of it: scores and softmax in float32, the weights rounded before the product with the values.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper, shape_inference

from runtime.errors import BuildError

_NARROW = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN}
_EXACT = {
    "Concat", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that move numbers and make none."""


def emulated_graph(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in float32 operators with the rounding of a typed graph (`engines.precision.typed.typed_graph`), functions inlined.

    Raises:
        BuildError: a value's type cannot be told.
    """
    inlined = shape_inference.infer_shapes(inliner.inline_local_functions(graph), check_type=True)
    return _Emulation(inlined).model()


class _Emulation:
    """One graph under conversion: the nodes so far, and the type that every value has in the typed graph."""

    def __init__(self, typed: onnx.ModelProto) -> None:
        self._typed = typed
        graph = typed.graph
        self._types = {
            value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self._types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._nodes: list[onnx.NodeProto] = []

    def model(self) -> onnx.ModelProto:
        """The converted graph."""
        graph = self._typed.graph
        for value in graph.input:
            if value.type.tensor_type.elem_type in _NARROW:
                self._append("Cast", [value.name], _wide(value.name), to=TensorProto.FLOAT)
        for node in graph.node:
            self._convert(node)
        for value in graph.output:
            if (kind := value.type.tensor_type.elem_type) in _NARROW:
                self._append("Cast", [_wide(value.name)], value.name, to=kind)
        if narrow := [tensor.name for tensor in graph.initializer if tensor.data_type in _NARROW]:
            raise BuildError(f"{graph.name}: {narrow[0]} is a constant of a narrow type outside of the graph's operators")
        result = helper.make_graph(self._nodes, graph.name, graph.input, graph.output, initializer=graph.initializer)
        return helper.make_model(result, opset_imports=self._typed.opset_import, ir_version=self._typed.ir_version)

    def _convert(self, node: onnx.NodeProto) -> None:
        kind = self._type(node.output[0])
        inputs = [self._name(name) for name in node.input]
        out = self._name(node.output[0])
        match node.op_type:
            case "Cast":
                self._cast(inputs[0], out, kind)
            case "QuantizeLinear":
                self._append("Div", inputs[:2], f"{out}.scaled")
                self._round(f"{out}.scaled", out, kind)
            case "DequantizeLinear":
                self._append("Mul", inputs[:2], f"{out}.exact")
                self._round(f"{out}.exact", out, kind)
            case "Constant" if kind in _NARROW:
                self._append("Constant", [], out, value=_widened(node))
            case "Attention":
                self._attention(node, inputs, out, kind)
            case _:
                self._compute(node, inputs)

    def _compute(self, node: onnx.NodeProto, inputs: Sequence[str]) -> None:
        """The operator itself, its narrow results rounded."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = inputs
        rounded = [name for name in node.output if name and self._type(name) in _NARROW and node.op_type not in _EXACT]
        copy.output[:] = [f"{self._name(name)}.exact" if name in rounded else self._name(name) for name in node.output]
        self._nodes.append(copy)
        for name in rounded:
            self._round(f"{self._name(name)}.exact", self._name(name), self._type(name))

    def _attention(self, node: onnx.NodeProto, inputs: Sequence[str], out: str, kind: int) -> None:
        """softmax(q kᵀ · scale) v of [1, heads, N, d]."""
        query, key, value = inputs
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if attributes.keys() != {"scale"}:
            raise BuildError(f"{self._typed.graph.name}: attention with {sorted(attributes)} is not emulated")
        factor = f"{out}.factor"
        self._append("Constant", [], factor, value_float=attributes["scale"].f)
        self._append("Transpose", [key], f"{out}.columns", perm=(0, 1, 3, 2))
        self._append("MatMul", [query, f"{out}.columns"], f"{out}.products")
        self._append("Mul", [f"{out}.products", factor], f"{out}.scores")
        self._append("Softmax", [f"{out}.scores"], f"{out}.shares", axis=-1)
        self._round(f"{out}.shares", f"{out}.weights", self._type(node.input[2]))
        self._append("MatMul", [f"{out}.weights", value], f"{out}.exact")
        self._round(f"{out}.exact", out, kind)

    def _cast(self, name: str, out: str, kind: int) -> None:
        if kind in _NARROW:
            self._round(name, out, kind)
        else:
            self._append("Cast", [name], out, to=kind)

    def _round(self, name: str, out: str, kind: int) -> None:
        """To the nearest number of the type, ties to even; beyond FP8's range, to its end. Nothing happens to what is wide."""
        if kind not in _NARROW:
            self._append("Identity", [name], out)
            return
        self._append("Cast", [name], f"{out}.narrow", to=kind)
        self._append("Cast", [f"{out}.narrow"], out, to=TensorProto.FLOAT)

    def _append(self, operator: str, inputs: Iterable[str], output: str, **attributes: Any) -> None:
        self._nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))

    def _type(self, name: str) -> int:
        if kind := self._types.get(name, TensorProto.UNDEFINED):
            return int(kind)
        raise BuildError(f"{self._typed.graph.name}: the element type of {name} cannot be told")

    def _name(self, name: str) -> str:
        """Where a value's float32 copy is, if it is narrow."""
        return _wide(name) if name and self._type(name) in _NARROW else name


def _wide(name: str) -> str:
    return f"{name}.float32"


def _widened(node: onnx.NodeProto) -> TensorProto:
    values = numpy_helper.to_array(node.attribute[0].t).astype(np.float32)
    return numpy_helper.from_array(values)
