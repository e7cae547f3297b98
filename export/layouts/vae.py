"""Layout of the Wan2.1 causal video VAE, encoder and decoder, and its names in diffusers' `AutoencoderKLWan`.

The original keeps one flat list of layers per half (`encoder.downsamples`, `decoder.upsamples`): a level's residual blocks, then
its resampling. diffusers keeps the encoder's list and groups the decoder's by level.
"""

from collections.abc import Iterator

from export.layouts.tables import Shape, Table, conv, prefixed, renamed
from runtime.variants import VaeArch

IMAGE_CHANNELS = 3
_CUBE: Shape = (3, 3, 3)
_POINT: Shape = (1, 1, 1)

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
    """Every tensor of the VAE, in original naming."""
    z_dim = arch.z_dim
    top = arch.base_dim * arch.dim_mult[-1]
    encoder: Table = {
        **conv("conv1", arch.base_dim, IMAGE_CHANNELS, kernel=_CUBE),
        **_flat("downsamples", encoder_layers(arch)),
        **_middle(top),
        **_head(2 * z_dim, top),
    }
    decoder: Table = {
        **conv("conv1", top, z_dim, kernel=_CUBE),
        **_middle(top),
        **_flat("upsamples", decoder_layers(arch)),
        **_head(IMAGE_CHANNELS, arch.base_dim * arch.dim_mult[0]),
    }
    return {
        **prefixed("encoder", encoder),
        **conv("conv1", 2 * z_dim, 2 * z_dim, kernel=_POINT),
        **conv("conv2", z_dim, z_dim, kernel=_POINT),
        **prefixed("decoder", decoder),
    }


def encoder_layers(arch: VaeArch) -> Iterator[Table]:
    """The layers of `encoder.downsamples` in order, each without the prefix."""
    width = arch.base_dim
    for level, multiple in enumerate(arch.dim_mult):
        for _ in range(arch.num_res_blocks):
            yield residual_block(width, arch.base_dim * multiple)
            width = arch.base_dim * multiple
        if level < len(arch.temporal_downsample):
            yield resample(width, width, time_channels=width if arch.temporal_downsample[level] else None)


def decoder_layers(arch: VaeArch) -> Iterator[Table]:
    """The layers of `decoder.upsamples` in order, each without the prefix. Upsampling halves the width."""
    temporal_upsample = arch.temporal_downsample[::-1]
    width = arch.base_dim * arch.dim_mult[-1]
    for level, multiple in enumerate(reversed(arch.dim_mult)):
        for _ in range(arch.num_res_blocks + 1):
            yield residual_block(width, arch.base_dim * multiple)
            width = arch.base_dim * multiple
        if level < len(temporal_upsample):
            yield resample(width // 2, width, time_channels=2 * width if temporal_upsample[level] else None)
            width //= 2


def residual_block(in_channels: int, out_channels: int) -> Table:
    """Two normalised convolutions, and a convolution on the shortcut where the width changes."""
    table: Table = {
        "residual.0.gamma": (in_channels, 1, 1, 1),
        **conv("residual.2", out_channels, in_channels, kernel=_CUBE),
        "residual.3.gamma": (out_channels, 1, 1, 1),
        **conv("residual.6", out_channels, out_channels, kernel=_CUBE),
    }
    return table | (conv("shortcut", out_channels, in_channels, kernel=_POINT) if in_channels != out_channels else {})


def resample(out_channels: int, in_channels: int, *, time_channels: int | None) -> Table:
    """A spatial convolution and, with `time_channels`, the convolution along time that goes with it."""
    spatial = conv("resample.1", out_channels, in_channels, kernel=(3, 3))
    return spatial | (conv("time_conv", time_channels, in_channels, kernel=(3, 1, 1)) if time_channels else {})


def attention(channels: int) -> Table:
    """Single-head attention over the positions of one frame."""
    return {
        "norm.gamma": (channels, 1, 1),
        **conv("to_qkv", 3 * channels, channels, kernel=(1, 1)),
        **conv("proj", channels, channels, kernel=(1, 1)),
    }


def vae_diffusers_names(arch: VaeArch) -> dict[str, str]:
    """Original name → name in `AutoencoderKLWan`, for every tensor of the layout."""
    return {name: _diffusers_name(name, arch) for name in vae_tensors(arch)}


def _diffusers_name(name: str, arch: VaeArch) -> str:
    half, _, rest = name.partition(".")
    if rest.startswith(("downsamples.", "upsamples.")):
        _, index, layer = rest.split(".", 2)
        if half == "encoder":
            place = f"down_blocks.{index}"
        else:
            level, position = divmod(int(index), arch.num_res_blocks + 2)
            place = f"up_blocks.{level}." + ("upsamplers.0" if position > arch.num_res_blocks else f"resnets.{position}")
        return f"{half}.{place}.{_layer_name(layer)}"
    if rest.startswith("middle."):
        part, layer = name.split(".", 3)[:3], name.split(".", 3)[3]
        return f"{_PARTS['.'.join(part)]}.{_layer_name(layer)}"
    return renamed(name, _PARTS)


def _layer_name(layer: str) -> str:
    return renamed(layer, _BLOCK_PARTS) if layer.startswith(("residual.", "shortcut.")) else layer


def _flat(prefix: str, layers: Iterator[Table]) -> Table:
    return {name: shape for index, layer in enumerate(layers) for name, shape in prefixed(f"{prefix}.{index}", layer).items()}


def _middle(channels: int) -> Table:
    return {
        **prefixed("middle.0", residual_block(channels, channels)),
        **prefixed("middle.1", attention(channels)),
        **prefixed("middle.2", residual_block(channels, channels)),
    }


def _head(out_channels: int, in_channels: int) -> Table:
    return {"head.0.gamma": (in_channels, 1, 1, 1), **conv("head.2", out_channels, in_channels, kernel=_CUBE)}
