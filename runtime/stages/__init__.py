"""Which stages the networks of a variant consist of; one table for the exporter, the engine builders and the runtime."""

from runtime.specs import StageSpec
from runtime.stages.text_encoder import text_encoder_stages
from runtime.stages.transformer import transformer_stages
from runtime.stages.vae import vae_stages
from runtime.variants import TextEncoderArch, TransformerArch, VaeArch, Variant

NETWORKS = ("text_encoder", "transformer", "vae")
"""Networks in the order in which a generation uses them. Experts are several sets of weights for the one `transformer`."""


def network_stages(variant: Variant, network: str) -> tuple[StageSpec, ...]:
    """The declared stages of one of `NETWORKS`."""
    match network:
        case "text_encoder":
            return text_encoder_stages(variant.text_encoder)
        case "transformer":
            return transformer_stages(variant.transformer)
        case "vae":
            return vae_stages(variant.vae)
    raise ValueError(f"no network {network!r}")


def network_arch(variant: Variant, network: str) -> TextEncoderArch | TransformerArch | VaeArch:
    """The architecture numbers of one of `NETWORKS`."""
    archs: dict[str, TextEncoderArch | TransformerArch | VaeArch] = {
        "text_encoder": variant.text_encoder,
        "transformer": variant.transformer,
        "vae": variant.vae,
    }
    return archs[network]


def network_blocks(variant: Variant, network: str) -> int:
    """How many blocks the per-block stages of a network run for."""
    return {"text_encoder": variant.text_encoder.num_layers, "transformer": variant.transformer.num_layers, "vae": 0}[network]


def network_components(variant: Variant, network: str) -> tuple[str, ...]:
    """The weight components that run on a network's engines."""
    return tuple(expert.component for expert in variant.experts) if network == "transformer" else (network,)
