"""The `emulated` target: a stage's strongly typed graph, its rounding spelled out, made ready for ONNX Runtime's CPU provider."""

import onnx

from engines.precision.emulated import emulated_graph
from engines.precision.typed import typed_graph
from runtime.specs import StageSpec


def build_engine(graph: onnx.ModelProto, stage: StageSpec) -> bytes:
    """The engine file of `stage`, in a narrow precision: an ONNX model without weights.

    Raises:
        BuildError: the graph holds an operator without a rule.
    """
    data: bytes = emulated_graph(typed_graph(graph, stage)).SerializeToString(deterministic=True)
    return data
