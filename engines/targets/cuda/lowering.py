"""What every lowering of a graph shares: the arrays known so far, and how buffers, views and steps are added to a plan."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx import helper, numpy_helper

from runtime.backends.cuda.plan import PLAN_VERSION, Buffer, Plan, Step, StepKind, View
from runtime.errors import BuildError
from runtime.precision import scale_name
from runtime.specs import Axis, DType, StageSpec

Operator = tuple[str, str]
"""Domain and type of a node."""


class Lowering:
    """A stage's graph on its way to a plan. A subclass says what each operator becomes.

    Args:
        model: the stage as traced, in float32.
        stage: the stage in the precision to build (`runtime.precision.in_precision`).
    """

    def __init__(self, model: onnx.ModelProto, stage: StageSpec) -> None:
        self.model, self.stage = model, stage
        tensors = (*stage.inputs, *stage.weights)
        self.dtypes = {tensor.name: tensor.dtype for tensor in tensors}
        self.shapes: dict[str, tuple[Axis, ...]] = {tensor.name: tensor.shape for tensor in tensors}
        self.constants = {array.name: numpy_helper.to_array(array) for array in model.graph.initializer}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.consumers[name].append(node)
        self.alias: dict[str, str] = {}  # values that are another array, seen in another shape
        self.done: set[str] = set()  # outputs of nodes already joined into an earlier step
        self._buffers: dict[str, Buffer] = {}
        self._views: list[View] = []
        self._steps: list[Step] = []

    def operators(self) -> Mapping[Operator, Callable[[onnx.NodeProto], None]]:
        """How each operator is lowered."""
        raise NotImplementedError

    def plan(self) -> Plan:
        """Lower every node.

        Raises:
            BuildError: the graph holds something the `cuda` target has no kernel for.
        """
        operators = self.operators()
        for node in self.model.graph.node:
            if node.output[0] in self.done:
                continue
            lower = operators.get((node.domain, node.op_type))
            if lower is None:
                raise BuildError(f"{self.stage.name}: the cuda target has no kernel for {node.domain}::{node.op_type}")
            lower(node)
        outputs = {tensor.name: self.as_dtype(tensor.name, tensor.dtype) for tensor in self.stage.outputs}
        return Plan(
            version=PLAN_VERSION,
            stage=self.stage.name,
            buffers=tuple(self._buffers.values()),
            views=tuple(self._views),
            steps=tuple(self._steps),
            outputs=outputs,
        )

    def buffer(self, name: str, shape: tuple[Axis, ...], dtype: DType) -> str:
        """Declare an array the stage makes; declared again, it changes its shape."""
        self._buffers[name] = Buffer(name=name, shape=shape, dtype=dtype)
        self.shapes[name], self.dtypes[name] = shape, dtype
        return name

    def scale_buffer(self, name: str) -> str:
        """The scales, one a row, of an FP8 array."""
        return self.buffer(scale_name(name), self.shapes[name][:1], DType.F32)

    def view(self, name: str, source: str, *, axis: int, start: int, stop: int) -> str:
        """Declare rows or columns of another array."""
        self._views.append(View(name=name, source=self.alias.get(source, source), axis=axis, start=start, stop=stop))
        shape = list(self.shapes[source])
        shape[axis] = stop - start
        self.shapes[name], self.dtypes[name] = tuple(shape), self.dtypes[source]
        return name

    def split(self, node: onnx.NodeProto) -> None:
        """Lower a Split into equal parts: each is a view."""
        axis = int(attributes(node)["axis"])
        extent = int(self.shapes[node.input[0]][axis]) // len(node.output)
        for i, name in enumerate(node.output):
            self.view(name, node.input[0], axis=axis, start=i * extent, stop=(i + 1) * extent)

    def step(self, kind: StepKind, inputs: Mapping[str, str], outputs: Mapping[str, str], **numbers: float) -> None:
        """Add a step."""
        given = {argument: self.alias.get(name, name) for argument, name in inputs.items()}
        self._steps.append(
            Step(kind=kind, inputs=given, outputs=dict(outputs), numbers={k: float(v) for k, v in numbers.items()})
        )

    def as_dtype(self, name: str, dtype: DType) -> str:
        """The array `name`, converted when it has another element type."""
        if self.dtypes[name] is dtype:
            return self.alias.get(name, name)
        converted = f"{name}.{dtype.value.lower()}"
        if converted not in self.dtypes:
            self.step(StepKind.CONVERT, {"x": name}, {"out": self.buffer(converted, self.shapes[name], dtype)})
        return converted

    def quantised(self, name: str) -> str:
        """The FP8 form of an activation; its scales are at `scale_name` of it."""
        if self.dtypes[name] is DType.F8_E4M3:
            return name
        narrow = f"{name}.fp8"
        if narrow not in self.dtypes:
            out = self.buffer(narrow, self.shapes[name], DType.F8_E4M3)
            self.step(StepKind.QUANTIZE_ROWS, {"x": name}, {"out": out, "out_scale": self.scale_buffer(narrow)})
        return narrow


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
