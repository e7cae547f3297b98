"""A stage's graph → its plan. Each network has a lowering of its own; what one does not know is a BuildError, never left out."""

from dataclasses import replace

import onnx

from engines.targets.cuda.lower_image_encoder import ImageEncoderLowering
from engines.targets.cuda.lower_text_encoder import TextEncoderLowering
from engines.targets.cuda.lower_transformer import TransformerLowering
from engines.targets.cuda.lower_vae import ColoursLowering, VaeLowering
from engines.targets.cuda.lowering import Lowering
from runtime.backends.cuda.plan import Plan
from runtime.precision import with_fp8_attention
from runtime.specs import StageSpec
from runtime.stages.vae import COLOURS

_LOWERINGS: dict[str, type[Lowering]] = {  # by network, or by stage
    COLOURS: ColoursLowering,
    "image_encoder": ImageEncoderLowering,
    "text_encoder": TextEncoderLowering,
    "transformer": TransformerLowering,
    "vae": VaeLowering,
    "vae_encoder": VaeLowering,
}


def lower_stage(graph: onnx.ModelProto, stage: StageSpec) -> Plan:
    """The plan of a stage.

    Args:
        graph: the stage as traced, in float32.
        stage: the stage in the precision to build (`runtime.precision.in_precision`).

    Raises:
        BuildError: the graph holds something the `cuda` target has no kernel for.
    """
    lowering, narrow = _LOWERINGS.get(stage.name) or _LOWERINGS[stage.network], with_fp8_attention(stage)
    plan = lowering(graph, stage).plan()
    return plan if narrow == stage else replace(plan, fp8_attention=lowering(graph, narrow).plan())
