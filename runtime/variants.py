"""The table of Wan variants: architecture numbers, experts and defaults, all of it data.

A checkpoint's own config overrides the architecture numbers (`export.checkpoint`), so a toy of any width takes the same path
as the real model. Sources: Wan-Video/Wan2.1 `wan/configs` (9737cba9), Wan-Video/Wan2.2 `wan/configs` (42bf4cfa).
"""

from dataclasses import dataclass, replace
from enum import StrEnum

SHARED_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Default negative prompt of the original repositories (`sample_neg_prompt` in `wan/configs/shared_config.py`)."""
_IMAGE_NEGATIVE_PROMPT = "镜头晃动，" + SHARED_NEGATIVE_PROMPT  # Wan2.1 `wan/configs/wan_i2v_14B.py`
_FIRST_LAST_NEGATIVE_PROMPT = "镜头切换，" + _IMAGE_NEGATIVE_PROMPT  # Wan2.1 `wan/configs/__init__.py`


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
    image_dim: int | None = None  # width of the image encoder's features; None: no image branch
    image_tokens: int = 0  # rows of those features, all images of a request together
    image_positions: bool = False  # a learned table is added to those rows
    per_token_timesteps: bool = False  # leading latent frames may be clean, at timestep 0

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
class ImageEncoderArch:
    """Numbers of the CLIP image encoder (ViT-H/14). Its last layer is never run: Wan takes the features before it."""

    dim: int = 1280
    ffn_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    image_size: int = 224
    patch_size: int = 14
    eps: float = 1e-5
    quick_gelu: bool = False  # x · sigmoid(1.702 x), as some CLIPs have it, in place of the exact GELU of Wan's

    @property
    def num_blocks(self) -> int:
        """Layers that are run."""
        return self.num_layers - 1

    @property
    def num_tokens(self) -> int:
        """Rows of one image's features: its patches and the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeArch:
    """Numbers of a causal video VAE; the defaults are those of Wan2.1, `VAE_2_2` has those of TI2V-5B.

    `base_dim` is the encoder's narrowest width, `decoder_base_dim` the decoder's where it has another.
    `temporal_downsample` has one flag per down-sampling level of the encoder; the decoder uses it reversed.
    `patch_size` x `patch_size` pixels are folded into channels before the encoder and unfolded after the decoder.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    residual_levels: bool = False
    """Whether a shortcut without weights goes around each level, and up-sampling keeps its width instead of halving it."""
    patch_size: int = 1
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
        return self.patch_size * int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame after the first."""
        return int(2 ** sum(self.temporal_downsample))

    @property
    def decoder_dim(self) -> int:
        """The decoder's narrowest width."""
        return self.decoder_base_dim or self.base_dim


VAE_2_2 = VaeArch(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    residual_levels=True,
    patch_size=2,
    latents_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    latents_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)  # fmt: skip
"""The VAE of Wan2.2 TI2V-5B (Wan-Video/Wan2.2 `wan/modules/vae2_2.py`, 42bf4cfa)."""


class Presence(StrEnum):
    """Whether a request may, must or must not bring an input."""

    NONE = "none"
    OPTIONAL = "optional"
    REQUIRED = "required"


class ImageUse(StrEnum):
    """How images reach the transformer."""

    CHANNELS = "channels"
    """A mask and the latents of a clip that is empty but for the images join the noisy latents as further channels."""
    FIRST_FRAME = "first_frame"
    """The first latent frame is the image's own, without noise, at every step."""


class ImageFit(StrEnum):
    """How the original repositories bring an image to the video's size, and find a size for it."""

    STRETCH = "stretch"
    """Bicubic without antialiasing, sides scaled apart; the size keeps the area, each side rounded down."""
    COVER = "cover"
    """Lanczos to cover the frame, then cut around the centre; the size is the one of the nearest aspect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What a variant is given beside a prompt."""

    image: Presence = Presence.NONE
    last_image: Presence = Presence.NONE
    image_use: ImageUse = ImageUse.CHANNELS
    image_fit: ImageFit = ImageFit.STRETCH
    video: Presence = Presence.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request gets when it leaves an option out. A video for an image has the area of the default size."""

    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: int = 16
    num_steps: int = 50
    shift: float = 5.0
    low_resolution_shift: float | None = None  # up to the area of 832x480, where it differs
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
    """One model: its networks, what conditions them, its defaults."""

    name: str
    title: str
    transformer: TransformerArch
    text_encoder: TextEncoderArch = TextEncoderArch()
    image_encoder: ImageEncoderArch | None = None
    vae: VaeArch = VaeArch()
    experts: tuple[Expert, ...] = (Expert(component="transformer"),)
    conditioning: Conditioning = Conditioning(video=Presence.OPTIONAL)
    defaults: Defaults = Defaults()


_DIT_1_3B = TransformerArch(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
_DIT_14B = TransformerArch(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

_DIT_14B_IMAGE = replace(_DIT_14B, in_channels=36)
_DIT_14B_CLIP = replace(_DIT_14B_IMAGE, image_dim=1280, image_tokens=257)
_DIT_14B_FIRST_LAST = replace(_DIT_14B_CLIP, image_tokens=2 * 257, image_positions=True)
_DIT_5B = TransformerArch(
    dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48, per_token_timesteps=True
)
_HIGH_NOISE, _LOW_NOISE = "transformer_high_noise", "transformer_low_noise"

_ROWS = (
    Variant(
        name="wan2.1-t2v-1.3b",
        title="Wan2.1 text-to-video 1.3B",
        transformer=_DIT_1_3B,
    ),
    Variant(
        name="wan2.1-t2v-14b",
        title="Wan2.1 text-to-video 14B",
        transformer=_DIT_14B,
        defaults=Defaults(width=1280, height=720),
    ),
    Variant(
        name="wan2.1-i2v-14b-480p",
        title="Wan2.1 image-to-video 14B, trained at 480p, CLIP",
        transformer=_DIT_14B_CLIP,
        image_encoder=ImageEncoderArch(),
        conditioning=Conditioning(image=Presence.REQUIRED),
        defaults=Defaults(num_steps=40, low_resolution_shift=3.0, negative_prompt=_IMAGE_NEGATIVE_PROMPT),
    ),
    Variant(
        name="wan2.1-i2v-14b-720p",
        title="Wan2.1 image-to-video 14B, trained at 720p, CLIP",
        transformer=_DIT_14B_CLIP,
        image_encoder=ImageEncoderArch(),
        conditioning=Conditioning(image=Presence.REQUIRED),
        defaults=Defaults(
            width=1280, height=720, num_steps=40, low_resolution_shift=3.0, negative_prompt=_IMAGE_NEGATIVE_PROMPT
        ),
    ),
    Variant(
        name="wan2.1-flf2v-14b",
        title="Wan2.1 first and last frame to video 14B, CLIP",
        transformer=_DIT_14B_FIRST_LAST,
        image_encoder=ImageEncoderArch(),
        conditioning=Conditioning(image=Presence.REQUIRED, last_image=Presence.REQUIRED),
        defaults=Defaults(width=1280, height=720, shift=16.0, negative_prompt=_FIRST_LAST_NEGATIVE_PROMPT),
    ),
    Variant(
        name="wan2.2-t2v-a14b",
        title="Wan2.2 text-to-video, two 14B experts",
        transformer=_DIT_14B,
        experts=(Expert(component=_HIGH_NOISE, boundary=0.875), Expert(component=_LOW_NOISE)),
        defaults=Defaults(width=1280, height=720, num_steps=40, shift=12.0, guidance=(4.0, 3.0)),
    ),
    Variant(
        name="wan2.2-i2v-a14b",
        title="Wan2.2 image-to-video, two 14B experts",
        transformer=_DIT_14B_IMAGE,
        experts=(Expert(component=_HIGH_NOISE, boundary=0.9), Expert(component=_LOW_NOISE)),
        conditioning=Conditioning(image=Presence.REQUIRED, last_image=Presence.OPTIONAL),
        defaults=Defaults(width=1280, height=720, num_steps=40, guidance=(3.5, 3.5)),
    ),
    Variant(
        name="wan2.2-ti2v-5b",
        title="Wan2.2 text- or image-to-video 5B, VAE 2.2",
        transformer=_DIT_5B,
        vae=VAE_2_2,
        conditioning=Conditioning(image=Presence.OPTIONAL, image_use=ImageUse.FIRST_FRAME, image_fit=ImageFit.COVER),
        defaults=Defaults(width=1280, height=704, num_frames=121, fps=24),
    ),
)

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
