"""A stage's float32 graph → the same graph with every tensor's element type stated: what a strongly typed builder takes.

Only the main graph changes: inputs get the types of the stage's contract (`runtime.precision`), each operator the type it computes in
(`engines.precision.rules`), and a Cast stands where the two differ; the bodies of functions take any type. A tensor that the contract
lays out with its channels last enters and leaves so, and is [C, …] in between.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from engines.precision import functions
from engines.precision.rules import Computes, computes
from runtime.errors import BuildError
from runtime.precision import multiplies_wide, scale_name
from runtime.specs import FUNCTION_DOMAIN, Axis, DType, StageSpec, TensorSpec

ELEMENT_TYPES = {
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.BF16: TensorProto.BFLOAT16,
    DType.F8_E4M3: TensorProto.FLOAT8E4M3FN,
    DType.I64: TensorProto.INT64,
    DType.U8: TensorProto.UINT8,
}
"""ONNX's number of each element type."""
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_GELU = "Gelu"
_END = 2**31 - 1


def typed_graph(graph: onnx.ModelProto, stage: StageSpec, *, fp8_attention: bool = False) -> onnx.ModelProto:
    """The strongly typed graph of a stage.

    Args:
        graph: the traced graph, float32, with its functions (`export.graphs.stage_graph`).
        stage: the stage in the precision wanted (`runtime.precision.in_precision`).
        fp8_attention: let attention multiply in FP8; what it reads and gives keeps its type.

    Returns:
        A model whose inputs are the stage's inputs and then its weights, scales of FP8 weights included, in the types and layouts
        that the stage declares.

    Raises:
        BuildError: the graph holds an operator without a rule.
    """
    return _Typing(graph, stage, fp8_attention=fp8_attention).model()


class _Typing:
    """One graph under conversion: the nodes so far, and every value's element type and name."""

    def __init__(self, graph: onnx.ModelProto, stage: StageSpec, *, fp8_attention: bool) -> None:
        self._traced, self._stage, self._fp8_attention = graph, stage, fp8_attention
        self._weights = {weight.name: weight for weight in stage.weights}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._functions: set[str] = set()
        values = (*graph.graph.input, *graph.graph.value_info, *graph.graph.output)
        self._shapes = {value.name: _shape(value) for value in values}  # as traced
        self._types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
        self._names: dict[str, str] = {}  # a traced value's name here, where it has another
        self._casts: dict[tuple[str, int], str] = {}
        self._outputs: dict[str, str] = {}  # value here → the stage's name for it
        tensors = (*stage.inputs, *stage.weights)
        narrow = [ELEMENT_TYPES[t.dtype] for t in tensors if t.dtype in (DType.BF16, DType.F16)]
        self._narrow: int = narrow[0] if narrow else TensorProto.FLOAT
        outputs = {tensor.name: ELEMENT_TYPES[tensor.dtype] for tensor in stage.outputs}
        self._whole = {name: kind for name, kind in outputs.items() if kind not in _FLOATS}  # colours of 8 bits
        for tensor in tensors:
            self._types[tensor.name] = ELEMENT_TYPES[tensor.dtype]

    def model(self) -> onnx.ModelProto:
        """The converted graph."""
        for tensor in (*self._stage.inputs, *self._stage.weights):
            if tensor.channels_last:
                self._enter_channels_last(tensor)
        for node in self._traced.graph.node:
            self._convert(node)
        for tensor in self._stage.outputs:
            self._leave(tensor)
        return self._assembled()

    def _convert(self, node: onnx.NodeProto) -> None:
        inputs = [self._names.get(name, name) for name in node.input]
        match rule := computes(node):
            case None:
                name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                raise BuildError(f"{self._stage.name}: no rule says what {name} computes in")
            case Computes.PRODUCT:
                self._product(node, *inputs)
            case Computes.BIASED_ATTENTION:
                self._biased_attention(node, *inputs)
            case Computes.ATTENTION:
                self._attention(node, *inputs)
            case Computes.RESIDUAL:
                self._residual(node, *inputs)
            case _:
                floats = [self._types[name] for name in inputs if name and self._types[name] in _FLOATS]
                given = _widest(floats) if floats else self._types[inputs[0]]
                inside = {Computes.AS_GIVEN: given, Computes.NARROW: self._narrow}.get(rule, TensorProto.FLOAT)
                self._emit(node, inputs, inside)
                if rule is Computes.WIDE_STREAM:
                    self._round(node.output[0], floats[0])

    def _product(self, node: onnx.NodeProto, x: str, weight: str, *biases: str) -> None:
        """In the weight's type, wide where the rules want so or the bias is float32; an activation behind it is always wide."""
        gelu = node.op_type.endswith(_GELU)
        out = f"{node.output[0]}.hidden" if gelu else node.output[0]
        spec = self._weights.get(node.input[1])
        wide = any(self._types[bias] == TensorProto.FLOAT for bias in biases) or (spec and multiplies_wide(self._stage, spec))
        weight_type = self._types[weight]
        if weight_type == TensorProto.FLOAT8E4M3FN:
            self._fused(f"{node.op_type}Fp8", [x, weight, scale_name(weight), *biases], node.output[0], TensorProto.FLOAT)
            if not gelu:
                self._round(node.output[0], self._narrow)
            return
        if weight_type == TensorProto.FLOAT or wide:
            self._wide_product(x, weight, biases, out)
        else:
            product = helper.make_node(node.op_type.removesuffix(_GELU), node.input, [out], domain=node.domain)
            self._emit(product, [x, weight, *biases], weight_type)
        if gelu:
            hidden = self._cast(out, TensorProto.FLOAT)
            self._append(helper.make_node(_GELU, [hidden], node.output, approximate="tanh"), TensorProto.FLOAT)

    def _wide_product(self, x: str, weight: str, biases: Sequence[str], out: str) -> None:
        """A float32 product: of a float32 weight as a sum, of bf16 operands in float32, of fp16 ones on scaled rows."""
        product = f"{out}.unbiased" if biases else out
        kind = self._types[weight]
        if kind == TensorProto.FLOAT:
            self._fused("SumOfProducts", [self._cast(x, kind), weight], product, TensorProto.FLOAT)
        elif kind == TensorProto.FLOAT16:
            self._fused("ScaledProduct", [x, weight], product, TensorProto.FLOAT)
        else:
            operands = [self._cast(self._cast(x, kind), TensorProto.FLOAT), self._cast(weight, TensorProto.FLOAT)]
            self._append(helper.make_node("Gemm", operands, [product], transB=1), TensorProto.FLOAT)
        for bias in biases:
            self._append(helper.make_node("Add", [product, self._cast(bias, TensorProto.FLOAT)], [out]), TensorProto.FLOAT)

    def _biased_attention(self, node: onnx.NodeProto, *inputs: str) -> None:
        if self._narrow != TensorProto.FLOAT16:
            self._emit(node, inputs, TensorProto.FLOAT)
            return
        operands = [self._cast(name, self._narrow) for name in inputs[:3]]
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        self._fused("BiasedAttentionFp16", [*operands, *inputs[3:]], node.output[0], self._narrow, **attributes)

    def _residual(self, node: onnx.NodeProto, residual: str, *gated: str) -> None:
        """Gate in float32, round to the stream's type, then add."""
        stream, out = self._types[residual], f"{node.output[0]}.gated"
        wide = [self._cast(name, TensorProto.FLOAT) if self._types[name] in _FLOATS else name for name in gated]
        self._fused(node.op_type.replace("GatedResidual", "Gate"), wide, out, TensorProto.FLOAT)
        self._append(helper.make_node("Add", [residual, self._cast(out, stream)], node.output), stream)

    def _attention(self, node: onnx.NodeProto, query: str, key: str, value: str) -> None:
        (heads,) = (attribute.i for attribute in node.attribute if attribute.name == "num_heads")
        scale, scaled = f"{node.output[0]}.scale", f"{node.output[0]}.query"
        head_dim = _extent(self._shapes[node.input[0]][-1]) // heads
        self._constants.append(helper.make_tensor(scale, TensorProto.FLOAT, (), [head_dim**-0.5]))
        self._append(helper.make_node("Mul", [self._cast(query, TensorProto.FLOAT), scale], [scaled]), TensorProto.FLOAT)
        operands = [self._cast(name, self._narrow) for name in (scaled, key, value)]
        function, unit = functions.SCALED_ATTENTION, {}
        if self._fp8_attention:  # a power of two near the scale gives the queries their size again
            function, unit = functions.SCALED_ATTENTION_FP8, {"query_scale": 2.0 ** math.floor(-math.log2(head_dim) / 2)}
        self._fused(function, operands, node.output[0], self._narrow, num_heads=heads, **unit)

    def _fused(self, function: str, inputs: Sequence[str], out: str, result: int, **attributes: Any) -> None:
        """Append a call of one of this package's functions; its inputs are of the types it wants."""
        self._functions.add(function)
        self._append(helper.make_node(function, inputs, [out], domain=FUNCTION_DOMAIN, **attributes), result)

    def _emit(self, node: onnx.NodeProto, inputs: Iterable[str], inside: int) -> None:
        """Append a copy of `node` whose float inputs are of type `inside`."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(self._cast(name, inside) if name and self._types[name] in _FLOATS else name for name in inputs)
        if copy.domain == FUNCTION_DOMAIN:
            self._functions.add(copy.op_type)
        self._append(copy, inside)

    def _append(self, node: onnx.NodeProto, result: int) -> None:
        self._nodes.append(node)
        if node.op_type == "Cast":
            (result,) = (attribute.i for attribute in node.attribute if attribute.name == "to")
        self._types |= {name: self._whole.get(name, result) for name in node.output}

    def _cast(self, name: str, wanted: int) -> str:
        """The value in another type: one Cast, whoever asks."""
        if self._types[name] == wanted:
            return name
        if (name, wanted) not in self._casts:
            self._casts[name, wanted] = cast = f"{name}.{TensorProto.DataType.Name(wanted).lower()}"
            self._append(helper.make_node("Cast", [name], [cast], to=wanted), wanted)
        return self._casts[name, wanted]

    def _round(self, name: str, wanted: int) -> None:
        """Let all later readers of a value find it in another type."""
        self._names[name] = self._cast(name, wanted)

    def _enter_channels_last(self, tensor: TensorSpec) -> None:
        """From [T, H, W, C'] to the traced [C, T, H, W]; of a weight, from [O', t, h, w, C'] to [O, C, t, h, w]."""
        traced = self._shapes[tensor.name]
        axis = len(traced) - 1
        lead = 1 if tensor.name in self._weights and axis else 0
        name = self._slice(tensor.name, axis=axis, given=tensor.shape[axis], stop=traced[lead])
        if lead:
            name = self._slice(name, axis=0, given=tensor.shape[0], stop=traced[0])
        order = (*range(lead), axis, *range(lead, axis))
        self._names[tensor.name] = self._insert("Transpose", [name], "channels_first", perm=order) if axis else name

    def _leave(self, tensor: TensorSpec) -> None:
        """Bring an output into its type and layout, under its name."""
        name = self._cast(self._names.get(tensor.name, tensor.name), ELEMENT_TYPES[tensor.dtype])
        if tensor.channels_last:
            axis = len(tensor.shape) - 1
            name = self._insert("Transpose", [name], "channels_last", perm=(*range(1, axis + 1), 0))
            if missing := _extent(tensor.shape[axis]) - _extent(self._shapes[tensor.name][0]):
                margins = [0] * (2 * axis + 1) + [missing]
                name = self._insert("Pad", [name, self._integers(margins)], "padded")
        assert name not in self._outputs, f"{self._stage.name}: {self._outputs[name]} and {tensor.name} are one value"
        self._outputs[name] = tensor.name

    def _slice(self, name: str, *, axis: int, given: Axis, stop: Axis) -> str:
        if given == stop:
            return name
        bounds = (self._integers(values) for values in ([0], [_extent(stop)], [axis]))
        return self._insert("Slice", [name, *bounds], f"kept_{axis}")

    def _insert(self, operator: str, inputs: Sequence[str], suffix: str, **attributes: Any) -> str:
        """Append an operator of this conversion; its result has its first input's type."""
        out = f"{inputs[0]}.{suffix}"
        self._append(helper.make_node(operator, inputs, [out], **attributes), self._types[inputs[0]])
        return out

    def _integers(self, values: Sequence[int]) -> str:
        name = f"integers_{'_'.join(map(str, values))}"
        if name not in self._types:
            self._types[name] = TensorProto.INT64
            self._constants.append(helper.make_tensor(name, TensorProto.INT64, (len(values),), values))
        return name

    def _assembled(self) -> onnx.ModelProto:
        """The model; what has the name of an output but is not yet the output gets another."""
        taken = set(self._outputs.values())
        renamed = {name: self._outputs.get(name, f"{name}.inner") for name in {*taken, *self._outputs} if name in self._types}
        for node in self._nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        graph = helper.make_graph(
            self._nodes,
            self._stage.name,
            [_value(tensor) for tensor in (*self._stage.inputs, *self._stage.weights)],
            [_value(tensor) for tensor in self._stage.outputs],
            initializer=[*self._traced.graph.initializer, *self._constants],
        )
        traced = {function.name: function for function in self._traced.functions}
        bodies = [
            functions.function_proto(name) if name in functions.BODIES else traced[name] for name in sorted(self._functions)
        ]
        opsets = {opset.domain: opset for opset in (*self._traced.opset_import, helper.make_opsetid(FUNCTION_DOMAIN, 1))}
        return helper.make_model(
            graph, functions=bodies, opset_imports=list(opsets.values()), ir_version=self._traced.ir_version
        )


def _widest(types: Sequence[int]) -> int:
    return TensorProto.FLOAT if TensorProto.FLOAT in types else types[0]


def _value(tensor: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, ELEMENT_TYPES[tensor.dtype], tensor.shape)


def _shape(value: onnx.ValueInfoProto) -> tuple[Axis, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)


def _extent(axis: Axis) -> int:
    assert isinstance(axis, int), axis
    return axis
