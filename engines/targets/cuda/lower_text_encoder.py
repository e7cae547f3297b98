"""The text encoder's graphs → plans: the residual stream stays float32, everything between two sums is bf16.

Joined: a residual and the norm after it. A product that is added to the stream is written in float32, straight from its accumulator.
"""

from collections.abc import Callable, Mapping

import onnx

from engines.targets.cuda.lowering import Lowering, Operator, attributes
from runtime.backends.cuda.plan import StepKind
from runtime.specs import FUNCTION_DOMAIN, DType


class TextEncoderLowering(Lowering):
    """Rows are text tokens, 2-D arrays [rows, columns]."""

    def operators(self) -> Mapping[Operator, Callable[[onnx.NodeProto], None]]:
        return {
            ("", "Add"): self._residual,
            ("", "RMSNormalization"): self._norm,
            ("", "Split"): self.split,
            (FUNCTION_DOMAIN, "LinearNoBias"): self._linear,
            (FUNCTION_DOMAIN, "BiasedAttention"): self._attention,
            (FUNCTION_DOMAIN, "GatedGelu"): self._gated_gelu,
        }

    def _norm(self, node: onnx.NodeProto) -> None:
        self._emit_norm(node, StepKind.RMS_NORM, {"x": node.input[0]}, {})

    def _residual(self, node: onnx.NodeProto) -> None:
        stream, branch = node.input
        out = self.buffer(node.output[0], self.shapes[stream], DType.F32)
        norm = next((c for c in self.consumers[node.output[0]] if c.op_type == "RMSNormalization"), None)
        if norm is None:
            self.step(StepKind.ADD, {"a": stream, "b": branch}, {"out": out})
            return
        self._emit_norm(norm, StepKind.RESIDUAL_RMS_NORM, {"residual": stream, "x": branch}, {"residual_out": out})
        self.done.add(norm.output[0])

    def _emit_norm(self, node: onnx.NodeProto, kind: StepKind, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        x, weight = node.input
        dtype = next((tensor.dtype for tensor in self.stage.outputs if tensor.name == node.output[0]), DType.BF16)
        out = self.buffer(node.output[0], self.shapes[x], dtype)
        eps = float(attributes(node)["epsilon"])
        self.step(kind, {**inputs, "weight": weight}, {**outputs, "out": out}, eps=eps)

    def _linear(self, node: onnx.NodeProto) -> None:
        x, weight = node.input
        added = all(consumer.op_type == "Add" for consumer in self.consumers[node.output[0]])
        out = self.buffer(node.output[0], (self.shapes[x][0], self.shapes[weight][0]), DType.F32 if added else DType.BF16)
        self.step(StepKind.LINEAR, {"x": x, "weight": weight}, {"out": out})

    def _attention(self, node: onnx.NodeProto) -> None:
        arguments = ("query", "key", "value", "position_table", "position_buckets")
        out = self.buffer(node.output[0], self.shapes[node.input[0]], DType.BF16)
        inputs = dict(zip(arguments, node.input, strict=True))
        self.step(StepKind.BIASED_ATTENTION, inputs, {"out": out}, num_heads=float(attributes(node)["num_heads"]))

    def _gated_gelu(self, node: onnx.NodeProto) -> None:
        gate, x = node.input
        out = self.buffer(node.output[0], self.shapes[x], DType.BF16)
        self.step(StepKind.GATED_GELU, {"gate": gate, "x": x}, {"out": out})
