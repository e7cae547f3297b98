"""Layouts of what Wan2.2's S2V (speech) and Animate (pose and face) models add to the diffusion transformer.

Sources: Wan-Video/Wan2.2 `wan/modules/s2v/{model_s2v,audio_utils,auxi_blocks,motioner}.py` and
`wan/modules/animate/{model_animate,motion_encoder,face_blocks}.py` (42bf4cfa). Odd spellings are the checkpoints'.
"""

import itertools

from export.layouts.tables import Table, conv, linear, prefixed
from export.layouts.transformer import attention_tensors
from runtime.variants import TransformerArch


def speech_tensors(
    arch: TransformerArch, *, num_injectors: int = 12, audio_dim: int = 1024, audio_layers: int = 25, num_local: int = 4
) -> Table:
    """S2V: the audio encoder, its injectors into some blocks, and the pose and motion-frame embeddings."""
    dim = arch.dim
    encoder: Table = {
        **conv("conv1_local.conv", num_local * dim // 4, audio_dim, kernel=(3,)),
        **conv("conv1_global.conv", dim // 4, audio_dim, kernel=(3,)),
        **conv("conv2.conv", dim // 2, dim // 4, kernel=(3,)),
        **conv("conv3.conv", dim, dim // 2, kernel=(3,)),
        **linear("final_linear", dim, dim),
        "padding_tokens": (1, 1, 1, dim),
    }
    table: Table = {
        **conv("cond_encoder", dim, arch.in_channels, kernel=arch.patch_size),
        "trainable_cond_mask.weight": (3, dim),
        "casual_audio_encoder.weights": (1, audio_layers, 1, 1),
        **prefixed("casual_audio_encoder.encoder", encoder),
    }
    for index in range(num_injectors):
        table |= prefixed(f"audio_injector.injector.{index}", attention_tensors(dim))
        table |= linear(f"audio_injector.injector_adain_layers.{index}.linear", 2 * dim, dim)
    t, h, w = arch.patch_size
    for name, scale in (("proj", 1), ("proj_2x", 2), ("proj_4x", 4)):
        table |= conv(f"frame_packer.{name}", dim, arch.in_channels, kernel=(t * scale, h * scale, w * scale))
    return table


def animate_tensors(arch: TransformerArch, *, latent_channels: int = 16, adapter_stride: int = 5) -> Table:
    """Animate: pose embedding, motion encoder, face encoder, and a face adapter every `adapter_stride` blocks."""
    table = {
        **conv("pose_patch_embedding", arch.dim, latent_channels, kernel=arch.patch_size),
        **prefixed("motion_encoder", motion_encoder_tensors()),
        **prefixed("face_encoder", face_encoder_tensors(arch.dim)),
    }
    for index in range(arch.num_layers // adapter_stride):
        adapter: Table = {
            **linear("linear1_kv", 2 * arch.dim, arch.dim),
            **linear("linear1_q", arch.dim, arch.dim),
            **linear("linear2", arch.dim, arch.dim),
            "q_norm.weight": (arch.head_dim,),  # per head, unlike the transformer's own norms
            "k_norm.weight": (arch.head_dim,),
        }
        table |= prefixed(f"face_adapter.fuser_blocks.{index}", adapter)
    return table


def motion_encoder_tensors(
    *, widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512), style_dim: int = 512, motion_dim: int = 20
) -> Table:
    """From a face image to a few motion codes: residual blocks with blurred down-sampling, then linear layers."""
    convs = _activated("0", widths[0], 3, kernel=1, position=0)
    for index, (in_channels, out_channels) in enumerate(itertools.pairwise(widths), start=1):
        block: Table = {
            **_activated("conv1", in_channels, in_channels, kernel=3, position=0),
            "conv2.0.kernel": (4, 4),
            **_activated("conv2", out_channels, in_channels, kernel=3, position=1),
            "skip.0.kernel": (4, 4),
            **conv("skip.1", out_channels, in_channels, kernel=(1, 1), bias=False),
        }
        convs |= prefixed(str(index), block)
    convs |= conv(str(len(widths)), style_dim, widths[-1], kernel=(4, 4), bias=False)
    table = prefixed("enc.net_app.convs", convs)
    for index in range(4):
        table |= linear(f"enc.fc.{index}", style_dim, style_dim)
    return table | linear("enc.fc.4", motion_dim, style_dim) | {"dec.direction.weight": (style_dim, motion_dim)}


def face_encoder_tensors(dim: int, *, motion_dim: int = 512, hidden_dim: int = 1024, num_heads: int = 4) -> Table:
    """From motion codes along time to tokens for the face adapters."""
    return {
        **conv("conv1_local.conv", num_heads * hidden_dim, motion_dim, kernel=(3,)),
        **conv("conv2.conv", hidden_dim, hidden_dim, kernel=(3,)),
        **conv("conv3.conv", hidden_dim, hidden_dim, kernel=(3,)),
        **linear("out_proj", dim, hidden_dim),
        "padding_tokens": (1, 1, 1, dim),
    }


def _activated(name: str, out_channels: int, in_channels: int, *, kernel: int, position: int) -> Table:
    """A convolution at `position` of its sequence, followed by an activation that holds the bias."""
    table = conv(f"{name}.{position}", out_channels, in_channels, kernel=(kernel, kernel), bias=False)
    return table | {f"{name}.{position + 1}.bias": (1, out_channels, 1, 1)}
