"""Every network's stages as traced graphs."""

from collections.abc import Callable

import onnx
import torch
from torch import nn

from export.modules.image_encoder import IMAGE_ENCODER_MODULES
from export.modules.text_encoder import TEXT_ENCODER_MODULES
from export.modules.transformer import TRANSFORMER_MODULES
from export.modules.vae import VAE_MODULES
from export.trace import trace_stage
from runtime.specs import StageSpec
from runtime.stages import network_arch
from runtime.variants import Variant

_MODULES: dict[str, Callable[..., nn.Module]] = {
    **TEXT_ENCODER_MODULES,
    **IMAGE_ENCODER_MODULES,
    **TRANSFORMER_MODULES,
    **VAE_MODULES,
}


def stage_graph(variant: Variant, stage: StageSpec) -> onnx.ModelProto:
    """Trace one stage of a variant; needs no weights.

    Raises:
        ExportError: the stage could not be captured or differs from its spec.
    """
    return trace_stage(stage_module(variant, stage), stage)


def stage_module(variant: Variant, stage: StageSpec) -> nn.Module:
    """The module of one stage of a variant, its parameters without memory."""
    with torch.device("meta"):
        return _MODULES[stage.name](network_arch(variant, stage.network))
