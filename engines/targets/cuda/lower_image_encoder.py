"""The image encoder's graphs → plans: the residual stream stays float32, everything between two sums is bf16.

Joined: a residual and the norm after it; the class token, the positions and the norm after them; a GELU and the product before it.
What is added to the stream is written in float32, straight from a product's accumulator, and so are the few patches' embeddings.
"""

from collections.abc import Callable, Mapping

import onnx

from engines.targets.cuda.lowering import Lowering, Operator, attributes
from runtime.backends.cuda.plan import StepKind
from runtime.errors import BuildError
from runtime.specs import FUNCTION_DOMAIN, DType


class ImageEncoderLowering(Lowering):
    """Rows are an image's tokens, 2-D arrays [rows, columns]."""

    def operators(self) -> Mapping[Operator, Callable[[onnx.NodeProto], None]]:
        return {
            ("", "Add"): self._residual,
            ("", "Concat"): self._concat,
            ("", "LayerNormalization"): self._norm,
            ("", "Split"): self.split,
            ("", "Mul"): self._refuse_activation,
            ("", "Sigmoid"): self._refuse_activation,
            (FUNCTION_DOMAIN, "Linear"): self._linear,
            (FUNCTION_DOMAIN, "LinearNoBias"): self._linear,
            (FUNCTION_DOMAIN, "Attention"): self._attention,
        }

    def _concat(self, node: onnx.NodeProto) -> None:
        first, rest = node.input
        add = self._reader(node, "Add")
        norm = self._reader(add, "LayerNormalization")
        positions = next(name for name in add.input if name != node.output[0])
        self.shapes[norm.input[0]] = self.shapes[positions]
        inputs = {"first": first, "x": rest, "positions": positions}
        self._emit_norm(norm, StepKind.EMBED_TOKENS, inputs, {}, DType.F32)
        self.done |= {add.output[0], norm.output[0]}

    def _reader(self, node: onnx.NodeProto, op_type: str) -> onnx.NodeProto:
        readers = self.consumers[node.output[0]]
        if [reader.op_type for reader in readers] != [op_type]:
            raise BuildError(f"{self.stage.name}: the cuda target has no {node.op_type} without {op_type} after it")
        return readers[0]

    def _norm(self, node: onnx.NodeProto) -> None:
        self._emit_norm(node, StepKind.LAYER_NORM, {"x": node.input[0]}, {}, DType.BF16)

    def _residual(self, node: onnx.NodeProto) -> None:
        stream, branch = node.input
        out = self.buffer(node.output[0], self.shapes[stream], DType.F32)
        norm = next((c for c in self.consumers[node.output[0]] if c.op_type == "LayerNormalization"), None)
        if norm is None:
            self.step(StepKind.ADD, {"a": stream, "b": branch}, {"out": out})
            return
        inputs = {"residual": stream, "x": branch}
        self._emit_norm(norm, StepKind.RESIDUAL_LAYER_NORM, inputs, {"residual_out": out}, DType.BF16)
        self.done.add(norm.output[0])

    def _emit_norm(
        self, node: onnx.NodeProto, kind: StepKind, inputs: dict[str, str], outputs: dict[str, str], dtype: DType
    ) -> None:
        x, weight, bias = node.input
        out = self.buffer(node.output[0], self.shapes[x], dtype)
        eps = float(attributes(node)["epsilon"])
        self.step(kind, {**inputs, "weight": weight, "bias": bias}, {**outputs, "out": out}, eps=eps)

    def _linear(self, node: onnx.NodeProto) -> None:
        x, weight, *bias = node.input
        name, readers = node.output[0], self.consumers[node.output[0]]
        gelu = next((reader for reader in readers if reader.op_type == "Gelu"), None)
        if gelu is not None:
            # The exact GELU is asked for, the epilogue's tanh is taken: of itself it moves the end of 31 blocks of the true width by
            # 1.9e-4, and behind an unrounded product it ends nearer to float32 (2.8e-3) than the exact one behind a bf16 product
            # (3.2e-3); with a few loud channels 3.1e-4, 3.6e-3 and 5.3e-3 (random weights, 65 tokens).
            name = gelu.output[0]
            self.done.add(name)
        wide = all(reader.op_type in ("Add", "Concat") for reader in readers)
        out = self.buffer(name, (self.shapes[x][0], self.shapes[weight][0]), DType.F32 if wide else DType.BF16)
        inputs = {"x": x, "weight": weight, **dict(zip(("bias",), bias, strict=False))}
        self.step(StepKind.LINEAR, inputs, {"out": out}, gelu=gelu is not None)

    def _attention(self, node: onnx.NodeProto) -> None:
        inputs = dict(zip(("query", "key", "value"), node.input, strict=True))
        out = self.buffer(node.output[0], self.shapes[node.input[0]], DType.BF16)
        self.step(StepKind.ATTENTION, inputs, {"out": out}, num_heads=float(attributes(node)["num_heads"]))

    def _refuse_activation(self, node: onnx.NodeProto) -> None:
        raise BuildError(
            f"{self.stage.name}: the cuda target has the image encoder's GELU only, not x · sigmoid(1.702 x)",
            hint="build it with `--target cpu`",
        )
