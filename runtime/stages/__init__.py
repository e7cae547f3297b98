"""Which stages the networks of a variant consist of; one table for the exporter, the engine builders and the runtime."""

from runtime.specs import StageSpec
from runtime.stages.image_encoder import image_encoder_stages
from runtime.stages.text_encoder import text_encoder_stages
from runtime.stages.transformer import transformer_stages
from runtime.stages.vae import vae_encoder_stages, vae_stages
from runtime.variants import ImageEncoderArch, TextEncoderArch, TransformerArch, VaeArch, Variant

NETWORKS = ("text_encoder", "image_encoder", "vae_encoder", "transformer", "vae")
"""Networks in the order in which a generation uses them. Experts are several sets of weights for the one `transformer`."""

Arch = TextEncoderArch | ImageEncoderArch | TransformerArch | VaeArch


def networks(variant: Variant) -> tuple[str, ...]:
    """Those of `NETWORKS` that a variant has."""
    return tuple(network for network, arch in _archs(variant).items() if arch is not None)


def network_stages(variant: Variant, network: str) -> tuple[StageSpec, ...]:
    """The declared stages of one of `NETWORKS`; none for a network that the variant does not have."""
    match network:
        case "text_encoder":
            return text_encoder_stages(variant.text_encoder)
        case "image_encoder":
            return () if variant.image_encoder is None else image_encoder_stages(variant.image_encoder)
        case "vae_encoder":
            return vae_encoder_stages(variant.vae)
        case "transformer":
            return transformer_stages(variant.transformer)
        case "vae":
            return vae_stages(variant.vae)
    raise ValueError(f"no network {network!r}")


def network_arch(variant: Variant, network: str) -> Arch:
    """The architecture numbers of one of the variant's `networks`."""
    arch = _archs(variant)[network]
    if arch is None:
        raise ValueError(f"{variant.name} has no {network}")
    return arch


def network_blocks(variant: Variant, network: str) -> int:
    """How many blocks the per-block stages of a network run for."""
    blocks = {"text_encoder": variant.text_encoder.num_layers, "transformer": variant.transformer.num_layers}
    if variant.image_encoder is not None:
        blocks["image_encoder"] = variant.image_encoder.num_blocks
    return blocks.get(network, 0)


def network_components(variant: Variant, network: str) -> tuple[str, ...]:
    """The weight components that run on a network's engines."""
    return tuple(expert.component for expert in variant.experts) if network == "transformer" else (network,)


def _archs(variant: Variant) -> dict[str, Arch | None]:
    """Numbers of each of `NETWORKS`, in their order; None for one that the variant does not have."""
    archs = (variant.text_encoder, variant.image_encoder, variant.vae, variant.transformer, variant.vae)
    return dict(zip(NETWORKS, archs, strict=True))
