"""Layouts of what image, control and camera variants add to the diffusion transformer; a variant's table is base `|` branches.

Sources: Wan-Video/Wan2.1 `wan/modules/{model,vace_model}.py`; modelscope/DiffSynth-Studio `diffsynth/models/wan_video_dit.py`,
`wan_video_camera_controller.py` and `wan_video_motion_controller.py` (fed7b18f).
"""

from export.layouts.tables import Table, conv, layer_norm, linear, prefixed
from export.layouts.transformer import block_tensors
from runtime.variants import TransformerArch

CLIP_DIM = 1280


def image_tensors(arch: TransformerArch, *, image_tokens: int | None = None) -> Table:
    """The CLIP branch: an embedding MLP and, per block, keys and values of the image.

    Args:
        image_tokens: rows of a learned position table, which only the first-and-last-frame model has.
    """
    table: Table = {
        **layer_norm("img_emb.proj.0", CLIP_DIM),
        **linear("img_emb.proj.1", CLIP_DIM, CLIP_DIM),
        **linear("img_emb.proj.3", arch.dim, CLIP_DIM),
        **layer_norm("img_emb.proj.4", arch.dim),
    }
    for block in range(arch.num_layers):
        attention: Table = {
            **linear("k_img", arch.dim, arch.dim),
            **linear("v_img", arch.dim, arch.dim),
            "norm_k_img.weight": (arch.dim,),
        }
        table |= prefixed(f"blocks.{block}.cross_attn", attention)
    return table | ({"img_emb.emb_pos": (1, image_tokens, CLIP_DIM)} if image_tokens else {})


def reference_tensors(arch: TransformerArch, *, latent_channels: int = 16) -> Table:
    """Patch embedding of a reference image's latent, whose tokens go in front of the video's."""
    return conv("ref_conv", arch.dim, latent_channels, kernel=arch.patch_size[1:])


def camera_tensors(arch: TransformerArch, *, plucker_channels: int = 24, stride: int = 8) -> Table:
    """The camera adapter: pixel-unshuffled Plücker maps through a patch convolution and one residual block."""
    adapter: Table = {
        **conv("conv", arch.dim, plucker_channels * stride**2, kernel=arch.patch_size[1:]),
        **conv("residual_blocks.0.conv1", arch.dim, arch.dim, kernel=(3, 3)),
        **conv("residual_blocks.0.conv2", arch.dim, arch.dim, kernel=(3, 3)),
    }
    return prefixed("control_adapter", adapter)


def vace_tensors(arch: TransformerArch, *, num_blocks: int, context_channels: int = 96) -> Table:
    """The VACE branch: full transformer blocks over the control context, each giving one hint."""
    table = conv("vace_patch_embedding", arch.dim, context_channels, kernel=arch.patch_size)
    for block in range(num_blocks):
        layers: Table = {**block_tensors(arch), **linear("after_proj", arch.dim, arch.dim)}
        if block == 0:
            layers |= linear("before_proj", arch.dim, arch.dim)
        table |= prefixed(f"vace_blocks.{block}", layers)
    return table


def speed_tensors(arch: TransformerArch) -> Table:
    """The separate speed controller, which adds to a transformer's time modulation."""
    return {
        **linear("linear.0", arch.dim, arch.freq_dim),
        **linear("linear.2", arch.dim, arch.dim),
        **linear("linear.4", 6 * arch.dim, arch.dim),
    }
