"""The transformer's graphs → plans: each fused function becomes a step, and steps that read what another writes are joined.

Joined: a residual and the norm after it; a norm (or the quantisation of any other activation) and the FP8 product after it. FP8
attention's operands leave the steps before it as FP8, and its output is the operand of the product behind it. A product and the one of its
GELU are one step, so that tokens can go through both in pieces; a wide product that is split afterwards becomes a product for each part.
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
_WIDE = 4096
"""Columns of an output from which products of tokens are cut up for the sake of memory: the parts of a product that is split afterwards
are products of their own, and tokens go through the feed-forward in pieces. Narrower ones would lose to unfinished waves: on 132
multiprocessors with tiles of 128x256, three times 1,536 columns of 32,760 tokens are 35 waves at once and 36 in parts, three times 5,120
are 117 either way."""
_PIECE_ROWS = 66 * 128
"""Tokens of a piece: with an even number of tiles side by side, as 5,120 and 13,824 columns have, its products are whole waves."""


class TransformerLowering(Lowering):
    """Rows are tokens, 2-D arrays [rows, columns]; the time embedding's few rows are float32."""

    _silu: dict[str, str]  # value that is the SiLU of another
    _parts: dict[str, tuple[onnx.NodeProto, int, int]]  # part of a product, not made yet: its node, first and last column

    def operators(self) -> Mapping[Operator, Callable[[onnx.NodeProto], None]]:
        self._silu, self._parts = {}, {}
        return {
            ("", "Add"): self._add,
            ("", "Slice"): self._slice,
            ("", "Split"): self._split,
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
        self._make_part(name)
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
        out = self._residual_place(node)
        norm = next((c for c in self.consumers[node.output[0]] if c.op_type in _NORMS), None)
        if norm is None:
            self.step(StepKind.RESIDUAL, inputs, {"out": out})
            return
        self._emit_norm(norm, StepKind.RESIDUAL_NORM, inputs, {"residual_out": out})
        self.done.add(norm.output[0])

    def _residual_place(self, node: onnx.NodeProto) -> str:
        """Where a residual's output goes: over its input where nobody reads that again."""
        given, out = str(node.input[0]), node.output[0]
        source = self.alias.get(given, given)
        waiting = [c for c in self.consumers[given] if c is not node and c.output[0] not in self.done]
        if source not in self._buffers or waiting:
            return self.buffer(out, self.shapes[given], DType.BF16)
        self.alias[out], self.shapes[out], self.dtypes[out] = source, self.shapes[given], DType.BF16
        return source

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
        x, weight, _ = node.input
        rows, columns = self.shapes[x][0], int(self.shapes[weight][0])
        split = next((c for c in self.consumers[node.output[0]] if c.op_type == "Split"), None)
        if split is not None and (isinstance(rows, int) or columns // len(split.output) >= _WIDE):
            width = columns // len(split.output)
            for i, name in enumerate(split.output):
                self._parts[name] = (node, i * width, (i + 1) * width)
                self.shapes[name], self.dtypes[name] = (rows, width), DType.BF16
            return
        outer = next((c for c in self.consumers[node.output[0]] if c.op_type == "Linear"), None)
        in_pieces = node.op_type == "LinearGelu" and not isinstance(rows, int)
        in_pieces &= outer is None or self.dtypes[outer.input[1]] is self.dtypes[weight]  # one of the two may be kept wide
        if in_pieces and outer is not None and int(self.shapes[outer.input[1]][0]) >= _WIDE:
            self._feed_forward(node, outer)
            return
        self._product(node, node.output[0], weight, node.input[2])

    def _split(self, node: onnx.NodeProto) -> None:
        if node.output[0] not in self._parts:
            self.split(node)

    def _make_part(self, name: str) -> None:
        """Emit a part of a product now, where it is first read: what the parts before it were read for is gone by then."""
        if name in self._parts:
            node, start, stop = self._parts.pop(name)
            _, weight, bias = node.input
            names = [given for given in (weight, bias, scale_name(weight)) if given in self.dtypes]
            parts = [self.view(f"{given}.{start}", given, axis=0, start=start, stop=stop) for given in names]
            self._product(node, name, *parts)

    def _product(self, node: onnx.NodeProto, name: str, weight: str, bias: str, weight_scale: str | None = None) -> None:
        """`name` = the product of a node with its weight, or with rows of it."""
        x, whole = node.input[0], node.input[1]
        inputs, numbers = {"weight": weight, "bias": bias}, {"gelu": node.op_type == "LinearGelu"}
        has_unit = self.dtypes[x] is DType.F8_E4M3 and scale_name(x) not in self.dtypes  # what fp8 attention writes
        if self.dtypes[weight] is not DType.F8_E4M3:
            inputs["x"] = self._restored(x) if has_unit else self.as_dtype(x, DType.BF16)
        else:
            inputs["weight_scale"] = weight_scale or scale_name(weight)
            numbers["fast_accumulation"] = accumulates_fast(self.stage, whole)
            if has_unit:
                folded = self.buffer(f"{bias}.folded", self.shapes[bias], DType.BF16)
                self.step(StepKind.FOLD_OFFSET, {"x": x, **inputs}, {"out": folded})
                inputs |= {"x": x, "bias": folded}
            else:
                inputs |= {"x": self.quantised(x), "x_scale": scale_name(self.quantised(x))}
        out = self.buffer(name, (self.shapes[x][0], self.shapes[weight][0]), DType.BF16)
        self.step(StepKind.LINEAR, inputs, {"out": out}, **numbers)

    def _feed_forward(self, inner: onnx.NodeProto, outer: onnx.NodeProto) -> None:
        x, width, numbers = inner.input[0], self.shapes[inner.input[1]][0], {}
        inputs = {
            "weight": inner.input[1],
            "bias": inner.input[2],
            "outer_weight": outer.input[1],
            "outer_bias": outer.input[2],
        }
        if self.dtypes[inner.input[1]] is DType.F8_E4M3:
            inputs |= {"x": self.quantised(x), "x_scale": scale_name(self.quantised(x))}
            for prefix, node in (("", inner), ("outer_", outer)):
                inputs[f"{prefix}weight_scale"] = scale_name(node.input[1])
                numbers[f"{prefix}fast_accumulation"] = accumulates_fast(self.stage, node.input[1])
        else:
            inputs["x"] = self.as_dtype(x, DType.BF16)
        outputs = {
            "out": self.buffer(outer.output[0], (self.shapes[x][0], self.shapes[outer.input[1]][0]), DType.BF16),
            "inner": self.buffer(inner.output[0], (_PIECE_ROWS, width), DType.BF16),
        }
        if "x_scale" in inputs:
            outputs["inner_fp8"] = self.buffer(f"{inner.output[0]}.fp8", (_PIECE_ROWS, width), DType.F8_E4M3)
            outputs["inner_scale"] = self.scale_buffer(outputs["inner_fp8"])
        self.step(StepKind.FEED_FORWARD, inputs, outputs, **numbers)
        self.done.add(outer.output[0])

    def _restored(self, name: str) -> str:
        out = self.buffer(f"{name}.bf16", self.shapes[name], DType.BF16)
        self.step(StepKind.RESTORE, {"x": name}, {"out": out})
        return out

    def _qk_norm(self, node: onnx.NodeProto) -> None:
        self._make_part(node.input[0])
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
