"""A stage's graph → its plan: each fused function becomes a step, and steps that read what another writes are joined.

Joined: a residual and the norm after it; a norm (or the quantisation of any other activation) and the FP8 product after it. The
graph stays the reference: what is not recognised here is a BuildError, never left out.
"""

from collections import defaultdict
from collections.abc import Callable

import onnx
from onnx import helper, numpy_helper

from runtime.backends.cuda.plan import PLAN_VERSION, Buffer, Plan, Step, StepKind, View
from runtime.errors import BuildError
from runtime.precision import scale_name
from runtime.specs import FUNCTION_DOMAIN, DType, StageSpec

_NORMS = ("AdaLayerNorm", "LayerNormalization")
_LINEARS = ("Linear", "LinearGelu")


def lower_stage(graph: onnx.ModelProto, stage: StageSpec) -> Plan:
    """The plan of a stage.

    Args:
        graph: the stage as traced, in float32.
        stage: the stage in the precision to build (`runtime.precision.in_precision`).

    Raises:
        BuildError: the graph holds something the `cuda` target has no kernel for.
    """
    return _Lowering(graph, stage).plan()


class _Lowering:
    def __init__(self, model: onnx.ModelProto, stage: StageSpec) -> None:
        self._model, self._stage = model, stage
        tensors = (*stage.inputs, *stage.weights)
        self._dtypes = {tensor.name: tensor.dtype for tensor in tensors}
        self._shapes = {
            tensor.name: (str(tensor.shape[0]), int(tensor.shape[-1]) if len(tensor.shape) > 1 else 1) for tensor in tensors
        }
        self._constants = {array.name: numpy_helper.to_array(array) for array in model.graph.initializer}
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self._consumers[name].append(node)
        self._buffers: list[Buffer] = []
        self._views: list[View] = []
        self._steps: list[Step] = []
        self._silu: dict[str, str] = {}  # value that is the SiLU of another
        self._alias: dict[str, str] = {}
        self._done: set[str] = set()  # outputs of nodes already joined into an earlier step

    def plan(self) -> Plan:
        for node in self._model.graph.node:
            if node.output[0] not in self._done:
                self._lower(node)
        outputs = {tensor.name: self._as_dtype(tensor.name, tensor.dtype) for tensor in self._stage.outputs}
        return Plan(
            version=PLAN_VERSION,
            stage=self._stage.name,
            buffers=tuple(self._buffers),
            views=tuple(self._views),
            steps=tuple(self._steps),
            outputs=outputs,
        )

    def _lower(self, node: onnx.NodeProto) -> None:
        table: dict[tuple[str, str], Callable[[onnx.NodeProto], None]] = {
            ("", "Add"): self._add,
            ("", "Slice"): self._slice,
            ("", "Split"): self._split,
            ("", "Gemm"): self._gemv,
            ("", "Sigmoid"): lambda node: None,  # only as a part of SiLU, see _multiply
            ("", "Mul"): self._multiply,
            ("", "Reshape"): self._reshape,
            ("", "LayerNormalization"): self._norm,
            (FUNCTION_DOMAIN, "AdaLayerNorm"): self._norm,
            (FUNCTION_DOMAIN, "GatedResidual"): self._residual,
            (FUNCTION_DOMAIN, "Linear"): self._linear,
            (FUNCTION_DOMAIN, "LinearGelu"): self._linear,
            (FUNCTION_DOMAIN, "QKNorm"): self._qk_norm,
            (FUNCTION_DOMAIN, "QKNormRope"): self._qk_norm,
            (FUNCTION_DOMAIN, "Attention"): self._attention,
        }
        lower = table.get((node.domain, node.op_type))
        if lower is None:
            raise BuildError(f"{self._stage.name}: the cuda target has no kernel for {node.domain}::{node.op_type}")
        lower(node)

    def _add(self, node: onnx.NodeProto) -> None:
        a, b = node.input
        if self._dtypes[a] is DType.BF16:  # token rows: a residual without a gate
            self._residual(node)
            return
        larger = max((a, b), key=lambda name: int(self._shapes[name][0]))
        out = self._buffer(node.output[0], self._shapes[larger], DType.F32)
        self._step(StepKind.ADD, {"a": larger, "b": b if larger == a else a}, {"out": out})

    def _slice(self, node: onnx.NodeProto) -> None:
        start, stop, axis = (int(self._constants[name][0]) for name in node.input[1:4])
        rows = int(self._shapes[node.input[0]][0])
        if axis != 0:
            raise BuildError(f"{self._stage.name}: the cuda target slices rows only, not axis {axis}")
        self._view(node.output[0], node.input[0], axis=0, start=start, stop=min(stop, rows))

    def _split(self, node: onnx.NodeProto) -> None:
        axis, (rows, columns) = _attributes(node)["axis"], self._shapes[node.input[0]]
        extent = (columns if axis == 1 else int(rows)) // len(node.output)
        for i, name in enumerate(node.output):
            self._view(name, node.input[0], axis=int(axis), start=i * extent, stop=(i + 1) * extent)

    def _multiply(self, node: onnx.NodeProto) -> None:
        value = next(
            (x for x in node.input if any(c.op_type == "Sigmoid" and c.output[0] in node.input for c in self._consumers[x])),
            None,
        )
        if value is None:
            raise BuildError(f"{self._stage.name}: the cuda target multiplies only as part of SiLU")
        self._silu[node.output[0]] = value

    def _gemv(self, node: onnx.NodeProto) -> None:
        x, weight, bias = node.input
        out = self._buffer(node.output[0], ("1", int(self._shapes[weight][0])), DType.F32)
        inputs = {"x": self._silu.get(x, x), "weight": weight, "bias": bias}
        self._step(StepKind.GEMV, inputs, {"out": out}, silu_input=x in self._silu)

    def _reshape(self, node: onnx.NodeProto) -> None:
        rows = int(self._constants[node.input[1]][0])
        columns = self._shapes[node.input[0]][1] // rows
        # one row of rows*columns is the same bytes as rows rows: the buffer itself is declared in the new shape
        self._buffers = [
            Buffer(name=b.name, rows=str(rows), columns=columns, dtype=b.dtype) if b.name == node.input[0] else b
            for b in self._buffers
        ]
        self._alias[node.output[0]] = node.input[0]
        self._shapes[node.output[0]], self._dtypes[node.output[0]] = (str(rows), columns), self._dtypes[node.input[0]]

    def _norm(self, node: onnx.NodeProto) -> None:
        self._emit_norm(node, StepKind.NORM, {"x": self._as_dtype(node.input[0], DType.BF16)}, {})

    def _residual(self, node: onnx.NodeProto) -> None:
        inputs = {"residual": node.input[0], "x": node.input[1]}
        if len(node.input) == 3:
            inputs["gate"] = node.input[2]
        out = self._buffer(node.output[0], self._shapes[node.input[0]], DType.BF16)
        norm = next((c for c in self._consumers[node.output[0]] if c.op_type in _NORMS), None)
        if norm is None:
            self._step(StepKind.RESIDUAL, inputs, {"out": out})
            return
        self._emit_norm(norm, StepKind.RESIDUAL_NORM, inputs, {"residual_out": out})
        self._done.add(norm.output[0])

    def _emit_norm(self, node: onnx.NodeProto, kind: StepKind, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        ada = node.op_type == "AdaLayerNorm"
        shift, gain = (node.input[1], node.input[2]) if ada else (node.input[2], node.input[1])
        name = node.output[0]
        quantised = all(c.op_type in _LINEARS and self._dtypes[c.input[1]] is DType.F8_E4M3 for c in self._consumers[name])
        outputs = {
            **outputs,
            "out": self._buffer(name, self._shapes[node.input[0]], DType.F8_E4M3 if quantised else DType.BF16),
        }
        if quantised:
            outputs["out_scale"] = self._scale_buffer(name)
        numbers = {"add_one": float(ada), "eps": float(_attributes(node)["epsilon"])}
        self._step(kind, {**inputs, "gain": gain, "shift": shift}, outputs, **numbers)

    def _linear(self, node: onnx.NodeProto) -> None:
        x, weight, bias = node.input
        inputs = {"weight": weight, "bias": bias}
        if self._dtypes[weight] is DType.F8_E4M3:
            inputs |= {"x": self._quantised(x), "x_scale": scale_name(self._quantised(x)), "weight_scale": scale_name(weight)}
        else:
            inputs["x"] = self._as_dtype(x, DType.BF16)
        out = self._buffer(node.output[0], (self._shapes[x][0], int(self._shapes[weight][0])), DType.BF16)
        self._step(StepKind.LINEAR, inputs, {"out": out}, gelu=node.op_type == "LinearGelu")

    def _qk_norm(self, node: onnx.NodeProto) -> None:
        inputs = {"x": node.input[0], "weight": node.input[1]}
        if node.op_type == "QKNormRope":
            inputs |= {"rope_cos": node.input[2], "rope_sin": node.input[3]}
        attributes = _attributes(node)
        out = self._buffer(node.output[0], self._shapes[node.input[0]], DType.BF16)
        numbers = {"eps": float(attributes["epsilon"]), "num_heads": float(attributes.get("num_heads", 1))}
        self._step(StepKind.QK_NORM_ROPE, inputs, {"out": out}, **numbers)

    def _attention(self, node: onnx.NodeProto) -> None:
        inputs = dict(zip(("query", "key", "value"), node.input, strict=True))
        out = self._buffer(node.output[0], self._shapes[node.input[0]], DType.BF16)
        self._step(StepKind.ATTENTION, inputs, {"out": out}, num_heads=float(_attributes(node)["num_heads"]))

    def _quantised(self, name: str) -> str:
        """The FP8 form of an activation; its scales are at `scale_name` of it."""
        if self._dtypes[name] is DType.F8_E4M3:
            return name
        narrow = f"{name}.fp8"
        if narrow not in self._dtypes:
            out = self._buffer(narrow, self._shapes[name], DType.F8_E4M3)
            self._step(StepKind.QUANTIZE_ROWS, {"x": name}, {"out": out, "out_scale": self._scale_buffer(narrow)})
        return narrow

    def _as_dtype(self, name: str, dtype: DType) -> str:
        """The array `name`, converted when it has another element type."""
        if self._dtypes[name] is dtype:
            return self._alias.get(name, name)
        converted = f"{name}.{dtype.value.lower()}"
        if converted not in self._dtypes:
            self._step(StepKind.CONVERT, {"x": name}, {"out": self._buffer(converted, self._shapes[name], dtype)})
        return converted

    def _scale_buffer(self, name: str) -> str:
        return self._buffer(scale_name(name), (self._shapes[name][0], 1), DType.F32)

    def _buffer(self, name: str, shape: tuple[str, int], dtype: DType) -> str:
        self._buffers.append(Buffer(name=name, rows=shape[0], columns=shape[1], dtype=dtype))
        self._shapes[name], self._dtypes[name] = shape, dtype
        return name

    def _view(self, name: str, source: str, *, axis: int, start: int, stop: int) -> None:
        self._views.append(View(name=name, source=self._alias.get(source, source), axis=axis, start=start, stop=stop))
        rows, columns = self._shapes[source]
        self._shapes[name] = (str(stop - start), columns) if axis == 0 else (rows, stop - start)
        self._dtypes[name] = self._dtypes[source]

    def _step(self, kind: StepKind, inputs: dict[str, str], outputs: dict[str, str], **numbers: float) -> None:
        given = {argument: self._alias.get(name, name) for argument, name in inputs.items()}
        self._steps.append(Step(kind=kind, inputs=given, outputs=outputs, numbers={k: float(v) for k, v in numbers.items()}))


def _attributes(node: onnx.NodeProto) -> dict[str, float | int]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
