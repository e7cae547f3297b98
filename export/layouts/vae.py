"""Layout of both causal video VAEs, encoder and decoder, and its names in diffusers' `AutoencoderKLWan`.

The layers of a half, residual blocks and then resampling of one level after the other, are one flat list in Wan2.1 (`encoder.downsamples`,
`decoder.upsamples`) and a list of lists in Wan2.2. diffusers keeps Wan2.1's flat encoder and groups everything else by level.
"""

from export.layouts.tables import Table, renamed
from runtime.stages.vae_layers import decoder_layers, encoder_layers, weights
from runtime.variants import VaeArch

_PARTS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{half}.{original}": f"{half}.{name}"
        for half in ("encoder", "decoder")
        for original, name in {
            "conv1": "conv_in",
            "middle.0": "mid_block.resnets.0",
            "middle.1": "mid_block.attentions.0",
            "middle.2": "mid_block.resnets.1",
            "head.0": "norm_out",
            "head.2": "conv_out",
        }.items()
    },
}
_BLOCK_PARTS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def vae_tensors(arch: VaeArch) -> Table:
    """Every tensor of the VAE, in original naming: the checkpoint holds what the stages take and nothing more."""
    table: Table = {}
    for layer in (*encoder_layers(arch), *decoder_layers(arch)):
        for weight in weights(layer, first=False):
            table[weight.name] = tuple(axis for axis in weight.shape if isinstance(axis, int))
    return table


def vae_diffusers_names(arch: VaeArch) -> dict[str, str]:
    """Original name → name in `AutoencoderKLWan`, for every tensor of the layout."""
    return {name: _diffusers_name(name, arch) for name in vae_tensors(arch)}


def _diffusers_name(name: str, arch: VaeArch) -> str:
    half, _, rest = name.partition(".")
    if rest.startswith(("downsamples.", "upsamples.")):
        if arch.residual_levels:
            _, level, _, position, layer = rest.split(".", 4)
            place = _place_in_level(half, int(level), int(position), arch)
        else:
            _, index, layer = rest.split(".", 2)
            place = f"down_blocks.{index}"
            if half == "decoder":
                place = _place_in_level(half, *divmod(int(index), arch.num_res_blocks + 2), arch)
        return f"{half}.{place}.{_layer_name(layer)}"
    if rest.startswith("middle."):
        part, layer = name.split(".", 3)[:3], name.split(".", 3)[3]
        return f"{_PARTS['.'.join(part)]}.{_layer_name(layer)}"
    return renamed(name, _PARTS)


def _place_in_level(half: str, level: int, position: int, arch: VaeArch) -> str:
    """Where diffusers has the layer at a position of a level: after the residual blocks comes the resampling."""
    blocks, place = (arch.num_res_blocks, "down_blocks") if half == "encoder" else (arch.num_res_blocks + 1, "up_blocks")
    if position < blocks:
        return f"{place}.{level}.resnets.{position}"
    resampling = ("downsampler" if half == "encoder" else "upsampler") if arch.residual_levels else "upsamplers.0"
    return f"{place}.{level}.{resampling}"


def _layer_name(layer: str) -> str:
    return renamed(layer, _BLOCK_PARTS) if layer.startswith(("residual.", "shortcut.")) else layer
