"""Layouts of what control and camera variants add to the diffusion transformer; a variant's table is base `|` branches.

Sources: Wan-Video/Wan2.1 `wan/modules/vace_model.py`; modelscope/DiffSynth-Studio `diffsynth/models/wan_video_dit.py`,
`wan_video_camera_controller.py` and `wan_video_motion_controller.py` (fed7b18f).
"""

from export.layouts.tables import Table, conv, linear, prefixed
from export.layouts.transformer import block_tensors
from runtime.variants import TransformerArch


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
