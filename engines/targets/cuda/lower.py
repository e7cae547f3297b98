"""A stage's graph → its plan. Each network has a lowering of its own; what one does not know is a BuildError, never left out."""

import onnx

from engines.targets.cuda.lower_transformer import TransformerLowering
from engines.targets.cuda.lowering import Lowering
from runtime.backends.cuda.plan import Plan
from runtime.specs import StageSpec

_LOWERINGS: dict[str, type[Lowering]] = {"transformer": TransformerLowering}


def lower_stage(graph: onnx.ModelProto, stage: StageSpec) -> Plan:
    """The plan of a stage.

    Args:
        graph: the stage as traced, in float32.
        stage: the stage in the precision to build (`runtime.precision.in_precision`).

    Raises:
        BuildError: the graph holds something the `cuda` target has no kernel for.
    """
    return _LOWERINGS[stage.network](graph, stage).plan()
