"""The table of Wan variants: architecture numbers, experts and defaults, all of it data.

A checkpoint's own config overrides the architecture numbers (`export.checkpoint`), so a toy of any width takes the same path
as the real model. Sources: Wan-Video/Wan2.1 `wan/configs` (9737cba9), Wan-Video/Wan2.2 `wan/configs` (42bf4cfa).
"""

from dataclasses import dataclass

SHARED_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Default negative prompt of the original repositories (`sample_neg_prompt` in `wan/configs/shared_config.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerArch:
    """Numbers of the diffusion transformer (DiT)."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        """Latent positions folded into one token."""
        t, h, w = self.patch_size
        return t * h * w


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderArch:
    """Numbers of the UMT5 encoder."""

    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    vocab_size: int = 256384
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeArch:
    """Numbers of the causal video VAE (Wan2.1 family).

    `temporal_downsample` has one flag per down-sampling level of the encoder; the decoder uses it reversed.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position along height and width."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame after the first."""
        return int(2 ** sum(self.temporal_downsample))


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request gets when it leaves an option out."""

    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: int = 16
    num_steps: int = 50
    shift: float = 5.0
    guidance: tuple[float, ...] = (5.0,)  # one per expert, in the order of Variant.experts
    scheduler: str = "unipc"
    negative_prompt: str = SHARED_NEGATIVE_PROMPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One diffusion transformer of a variant, named by its weight component.

    It takes the steps whose timestep is at least `boundary * 1000` and that no earlier expert of the variant took.
    """

    component: str
    boundary: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    name: str
    transformer: TransformerArch
    text_encoder: TextEncoderArch = TextEncoderArch()
    vae: VaeArch = VaeArch()
    experts: tuple[Expert, ...] = (Expert(component="transformer"),)
    defaults: Defaults = Defaults()


_DIT_1_3B = TransformerArch(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_DIT_14B = TransformerArch(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

_ROWS = (
    Variant(name="wan2.1-t2v-1.3b", transformer=_DIT_1_3B),
    Variant(name="wan2.1-t2v-14b", transformer=_DIT_14B, defaults=Defaults(width=1280, height=720)),
    Variant(
        name="wan2.2-t2v-a14b",
        transformer=_DIT_14B,
        experts=(
            Expert(component="transformer_high_noise", boundary=0.875),
            Expert(component="transformer_low_noise"),
        ),
        defaults=Defaults(width=1280, height=720, num_steps=40, shift=12.0, guidance=(4.0, 3.0)),
    ),
)

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
