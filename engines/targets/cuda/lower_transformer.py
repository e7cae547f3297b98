"""The transformer's graphs → plans: each fused function becomes a step, and steps that read what another writes are joined.

Joined: a residual and the norm after it; a norm (or the quantisation of any other activation) and the FP8 product after it. FP8
attention's operands leave the steps before it as FP8, and its output is the operand of the product behind it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import onnx

from engines.targets.cuda.lowering import Lowering, Operator, attributes
from runtime.backends.cuda.plan import Plan, StepKind
from runtime.backends.cuda.self_attention import KEY_TILES
from runtime.errors import BuildError
from runtime.precision import accumulates_fast, scale_name
from runtime.specs import FUNCTION_DOMAIN, DType

_ADA_NORMS = ("AdaLayerNorm", "AdaLayerNormByRow")
_NORMS = (*_ADA_NORMS, "LayerNormalization")
_LINEARS = ("Linear", "LinearGelu")
_TILED = ("key", "value")  # the outputs that attention reads in tiles of rows
_KEY_TILE = max(KEY_TILES.values())
_LAYER_NORM_EPSILON = 1e-5  # ONNX's default


class TransformerLowering(Lowering):
    """Rows are tokens, 2-D arrays [rows, columns]; the time embedding's few rows are float32."""

    _silu: dict[str, str]  # value that is the SiLU of another

    def operators(self) -> Mapping[Operator, Callable[[onnx.NodeProto], None]]:
        self._silu = {}
        return {
            ("", "Add"): self._add,
            ("", "Slice"): self._slice,
            ("", "Split"): self.split,
            ("", "Gemm"): self._gemv,
            ("", "Sigmoid"): lambda node: None,  # only as a part of SiLU, see _multiply
            ("", "Mul"): self._multiply,
            ("", "Reshape"): self._reshape,
            ("", "Gelu"): self._gelu,
            ("", "LayerNormalization"): self._norm,
            (FUNCTION_DOMAIN, "AdaLayerNorm"): self._norm,
            (FUNCTION_DOMAIN, "AdaLayerNormByRow"): self._norm,
            (FUNCTION_DOMAIN, "GatedResidual"): self._residual,
            (FUNCTION_DOMAIN, "GatedResidualByRow"): self._residual,
            (FUNCTION_DOMAIN, "Linear"): self._linear,
            (FUNCTION_DOMAIN, "LinearGelu"): self._linear,
            (FUNCTION_DOMAIN, "QKNorm"): self._qk_norm,
            (FUNCTION_DOMAIN, "QKNormRope"): self._qk_norm,
            (FUNCTION_DOMAIN, "Attention"): self._attention,
        }

    def plan(self) -> Plan:
        plan = super().plan()
        sources = {view.name: view.source for view in plan.views}
        tiled = {sources.get(array, array) for name, array in plan.outputs.items() if name in _TILED}
        return replace(plan, buffers=tuple(replace(b, row_multiple=_KEY_TILE) if b.name in tiled else b for b in plan.buffers))

    def as_dtype(self, name: str, dtype: DType) -> str:
        if dtype is not DType.F8_E4M3 or self.dtypes[name] is dtype:
            return super().as_dtype(name, dtype)
        out = self.buffer(f"{name}.centred", self.shapes[name], dtype)
        unit = {
            "scale": self.buffer(f"{name}.scale", (1,), DType.F32),
            "offset": self.buffer(f"{name}.offset", self.shapes[name][1:], DType.F32),
        }
        self.step(StepKind.QUANTIZE_CENTRED, {"x": name}, {"out": out, **unit})
        return out

    def _dtype_of_output(self, name: str) -> DType:
        """What the stage declares for one of its outputs; bf16 for anything else."""
        return next((tensor.dtype for tensor in self.stage.outputs if tensor.name == name), DType.BF16)

    def _add(self, node: onnx.NodeProto) -> None:
        a, b = node.input
        if self.dtypes[a] is DType.BF16:  # token rows: a residual without a gate
            self._residual(node)
            return
        larger = max((a, b), key=lambda name: int(self.shapes[name][0]))
        out = self.buffer(node.output[0], self.shapes[larger], DType.F32)
        self.step(StepKind.ADD, {"a": larger, "b": b if larger == a else a}, {"out": out})

    def _slice(self, node: onnx.NodeProto) -> None:
        start, stop, axis = (int(self.constants[name][0]) for name in node.input[1:4])
        rows = int(self.shapes[node.input[0]][0])
        if axis != 0:
            raise BuildError(f"{self.stage.name}: the cuda target slices rows only, not axis {axis}")
        self.view(node.output[0], node.input[0], axis=0, start=start, stop=min(stop, rows))

    def _multiply(self, node: onnx.NodeProto) -> None:
        value = next(
            (x for x in node.input if any(c.op_type == "Sigmoid" and c.output[0] in node.input for c in self.consumers[x])),
            None,
        )
        if value is None:
            raise BuildError(f"{self.stage.name}: the cuda target multiplies only as part of SiLU")
        self._silu[node.output[0]] = value

    def _gemv(self, node: onnx.NodeProto) -> None:
        given, weight, bias = node.input
        x = self._silu.get(given, given)
        out = self.buffer(node.output[0], (self.shapes[x][0], self.shapes[weight][0]), DType.F32)
        self.step(StepKind.GEMV, {"x": x, "weight": weight, "bias": bias}, {"out": out}, silu_input=given in self._silu)

    def _reshape(self, node: onnx.NodeProto) -> None:
        # the same bytes: a buffer is declared in the new shape; of a weight, one row for several, whoever reads it makes do
        rows, source = int(self.constants[node.input[1]][0]), node.input[0]
        shape = (rows, math.prod(int(axis) for axis in self.shapes[source]) // rows)
        if source in self._buffers:
            self.buffer(source, shape, self.dtypes[source])
        self.alias[node.output[0]] = source
        self.shapes[node.output[0]], self.dtypes[node.output[0]] = shape, self.dtypes[source]

    def _gelu(self, node: onnx.NodeProto) -> None:
        if attributes(node).get("approximate", b"none") != b"none":
            raise BuildError(f"{self.stage.name}: the cuda target has a tanh GELU only as part of a product")
        out = self.buffer(node.output[0], self.shapes[node.input[0]], DType.BF16)
        self.step(StepKind.GELU, {"x": node.input[0]}, {"out": out})

    def _norm(self, node: onnx.NodeProto) -> None:
        self._emit_norm(node, StepKind.NORM, {"x": self.as_dtype(node.input[0], DType.BF16)}, {})

    def _residual(self, node: onnx.NodeProto) -> None:
        inputs = dict(zip(("residual", "x", "gate", "num_clean"), node.input, strict=False))
        out = self.buffer(node.output[0], self.shapes[node.input[0]], DType.BF16)
        norm = next((c for c in self.consumers[node.output[0]] if c.op_type in _NORMS), None)
        if norm is None:
            self.step(StepKind.RESIDUAL, inputs, {"out": out})
            return
        self._emit_norm(norm, StepKind.RESIDUAL_NORM, inputs, {"residual_out": out})
        self.done.add(norm.output[0])

    def _emit_norm(self, node: onnx.NodeProto, kind: StepKind, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        ada = node.op_type in _ADA_NORMS
        shift, gain = (node.input[1], node.input[2]) if ada else (node.input[2], node.input[1])
        name = node.output[0]
        readers = self.consumers[name]
        quantised = bool(readers) and all(c.op_type in _LINEARS and self.dtypes[c.input[1]] is DType.F8_E4M3 for c in readers)
        dtype = DType.F8_E4M3 if quantised else DType.BF16
        outputs = {**outputs, "out": self.buffer(name, self.shapes[node.input[0]], dtype)}
        if quantised:
            outputs["out_scale"] = self.scale_buffer(name)
        inputs = {**inputs, "gain": gain, "shift": shift}
        if node.op_type == "AdaLayerNormByRow":
            inputs["num_clean"] = node.input[3]
        numbers = {"add_one": float(ada), "eps": float(attributes(node).get("epsilon", _LAYER_NORM_EPSILON))}
        self.step(kind, inputs, outputs, **numbers)

    def _linear(self, node: onnx.NodeProto) -> None:
        x, weight, bias = node.input
        inputs, numbers = {"weight": weight, "bias": bias}, {"gelu": node.op_type == "LinearGelu"}
        has_unit = self.dtypes[x] is DType.F8_E4M3 and scale_name(x) not in self.dtypes  # what fp8 attention writes
        if self.dtypes[weight] is not DType.F8_E4M3:
            inputs["x"] = self._restored(x) if has_unit else self.as_dtype(x, DType.BF16)
        else:
            inputs["weight_scale"] = scale_name(weight)
            numbers["fast_accumulation"] = accumulates_fast(self.stage, weight)
            if has_unit:
                folded = self.buffer(f"{bias}.folded", self.shapes[bias], DType.BF16)
                self.step(StepKind.FOLD_OFFSET, {"x": x, **inputs}, {"out": folded})
                inputs |= {"x": x, "bias": folded}
            else:
                inputs |= {"x": self.quantised(x), "x_scale": scale_name(self.quantised(x))}
        out = self.buffer(node.output[0], (self.shapes[x][0], self.shapes[weight][0]), DType.BF16)
        self.step(StepKind.LINEAR, inputs, {"out": out}, **numbers)

    def _restored(self, name: str) -> str:
        out = self.buffer(f"{name}.bf16", self.shapes[name], DType.BF16)
        self.step(StepKind.RESTORE, {"x": name}, {"out": out})
        return out

    def _qk_norm(self, node: onnx.NodeProto) -> None:
        inputs = {"x": node.input[0], "weight": node.input[1]}
        if node.op_type == "QKNormRope":
            inputs |= {"rope_cos": node.input[2], "rope_sin": node.input[3]}
        given = attributes(node)
        out = self.buffer(node.output[0], self.shapes[node.input[0]], self._dtype_of_output(node.output[0]))
        numbers = {"eps": float(given["epsilon"]), "num_heads": float(given.get("num_heads", 1))}
        self.step(StepKind.QK_NORM_ROPE, inputs, {"out": out}, **numbers)

    def _attention(self, node: onnx.NodeProto) -> None:
        inputs = dict(zip(("query", "key", "value"), node.input, strict=True))
        out = self.buffer(node.output[0], self.shapes[node.input[0]], self._dtype_of_output(node.output[0]))
        self.step(StepKind.ATTENTION, inputs, {"out": out}, num_heads=float(attributes(node)["num_heads"]))
