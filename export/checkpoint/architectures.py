"""Architecture numbers from what a checkpoint says about itself: config files, and tensor shapes where there is no config.

A setting that the stages cannot follow is refused, never ignored: it would change the mathematics without changing a shape.
"""

from collections.abc import Callable, Iterable
from typing import Any

from export.checkpoint.settings import SUPPORTED, Settings
from export.layouts import Shape
from runtime.errors import ExportError
from runtime.variants import TextEncoderArch, TransformerArch, VaeArch

_LATENT_STATISTICS_CHANNELS = 16

_ORIGINAL_KINDS = {
    "i2v": "image-to-video",
    "flf2v": "first-and-last-frame-to-video",
    "ti2v": "text-and-image-to-video (TI2V-5B)",
    "s2v": "speech-to-video (S2V)",
    "vace": "VACE control",
    "animate": "Animate",
}
_ORIGINAL_FIXED: dict[str, tuple[Any, ...]] = {
    "patch_size": ([1, 2, 2],),
    "window_size": ([-1, -1],),
    "qk_norm": (True,),
    "cross_attn_norm": (True,),
}
_ORIGINAL_READ = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim", "text_len", "eps")
_DIFFUSERS_READ = (
    "attention_head_dim", "ffn_dim", "num_attention_heads", "num_layers", "in_channels", "out_channels", "text_dim", "freq_dim",
    "eps", "rope_max_seq_len",
)  # fmt: skip
_DIFFUSERS_FIXED: dict[str, tuple[Any, ...]] = {
    "patch_size": ([1, 2, 2],),
    "window_size": ([-1, -1],),
    "qk_norm": ("rms_norm_across_heads",),
    "cross_attn_norm": (True,),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "attn_scales": ([],),
    "is_residual": (False,),
    "in_channels": (3,),
    "out_channels": (3,),
    "patch_size": (None,),
}


def check_original_kind(settings: Settings) -> None:
    """Check that an original layout's `config.json` describes a text-to-video transformer as the stages compute it.

    Raises:
        ExportError: another kind of model, or a setting that is not supported.
    """
    kind = settings.values.get("model_type", "t2v")
    if kind != "t2v":
        means = f" ({_ORIGINAL_KINDS[kind]})" if kind in _ORIGINAL_KINDS else ""
        raise ExportError(f"{settings.where}: model_type={kind!r}{means}, supported: 't2v'", hint=SUPPORTED)
    settings.check_fixed({"_class_name": ("WanModel",), **_ORIGINAL_FIXED})
    settings.check_known((*_ORIGINAL_READ, "model_type", "text_dim", *_ORIGINAL_FIXED))


def original_transformer_arch(settings: Settings, shape: Callable[[str], Shape]) -> TransformerArch:
    """Numbers of an original layout's `config.json`; `text_dim`, which it leaves out, comes from a tensor's shape.

    Raises:
        ExportError: a number is missing, or one that the stages cannot follow.
    """
    text_dim = _shape(shape, "text_embedding.0.weight", rank=2)[-1]
    settings.check_fixed({"text_dim": (text_dim,)})
    arch = TransformerArch(
        dim=settings.integer("dim"),
        ffn_dim=settings.integer("ffn_dim"),
        num_heads=settings.integer("num_heads"),
        num_layers=settings.integer("num_layers"),
        in_channels=settings.integer("in_dim"),
        out_channels=settings.integer("out_dim"),
        text_dim=text_dim,
        text_len=settings.integer("text_len"),
        freq_dim=settings.integer("freq_dim"),
        eps=settings.number("eps"),
    )
    return _sound_transformer(settings, arch)


def diffusers_transformer_arch(settings: Settings) -> TransformerArch:
    """Numbers of a `WanTransformer3DModel` config, whose width is heads times head size.

    Raises:
        ExportError: another kind of model, or a setting that is not supported.
    """
    settings.check_fixed({"_class_name": ("WanTransformer3DModel",), **_DIFFUSERS_FIXED})
    settings.check_known((*_DIFFUSERS_READ, *_DIFFUSERS_FIXED))
    num_heads = settings.integer("num_attention_heads")
    arch = TransformerArch(
        dim=num_heads * settings.integer("attention_head_dim"),
        ffn_dim=settings.integer("ffn_dim"),
        num_heads=num_heads,
        num_layers=settings.integer("num_layers"),
        in_channels=settings.integer("in_channels"),
        out_channels=settings.integer("out_channels"),
        text_dim=settings.integer("text_dim"),
        freq_dim=settings.integer("freq_dim"),
        eps=settings.number("eps"),
    )
    return _sound_transformer(settings, arch)


def original_text_encoder_arch(names: Iterable[str], shape: Callable[[str], Shape]) -> TextEncoderArch:
    """Numbers of a UMT5 encoder from its tensors; the largest relative distance, which no tensor shows, is UMT5's.

    Raises:
        ExportError: a tensor the numbers come from is missing or has another rank.
    """
    vocab_size, dim = _shape(shape, "token_embedding.weight", rank=2)
    attention_dim, _ = _shape(shape, "blocks.0.attn.q.weight", rank=2)
    ffn_dim, _ = _shape(shape, "blocks.0.ffn.gate.0.weight", rank=2)
    num_buckets, num_heads = _shape(shape, "blocks.0.pos_embedding.embedding.weight", rank=2)
    arch = TextEncoderArch(
        dim=dim,
        attention_dim=attention_dim,
        ffn_dim=ffn_dim,
        num_heads=num_heads,
        num_layers=count_blocks(names, "blocks"),
        vocab_size=vocab_size,
        num_buckets=num_buckets,
    )
    if arch.attention_dim % arch.num_heads:
        raise ExportError(f"text_encoder: attention width {attention_dim} is not a multiple of {num_heads} heads")
    return arch


def diffusers_text_encoder_arch(settings: Settings) -> TextEncoderArch:
    """Numbers of a `UMT5EncoderModel` config.

    Raises:
        ExportError: not a UMT5, or a setting that is not supported.
    """
    settings.check_fixed({"model_type": ("umt5",), "feed_forward_proj": ("gated-gelu",)}, hint="Wan's text encoder is a UMT5")
    num_heads = settings.integer("num_heads")
    return TextEncoderArch(
        dim=settings.integer("d_model"),
        attention_dim=num_heads * settings.integer("d_kv"),
        ffn_dim=settings.integer("d_ff"),
        num_heads=num_heads,
        num_layers=settings.integer("num_layers"),
        vocab_size=settings.integer("vocab_size"),
        num_buckets=settings.integer("relative_attention_num_buckets"),
        max_distance=settings.integer("relative_attention_max_distance"),
        eps=settings.number("layer_norm_epsilon"),
    )


def original_vae_arch(names: Iterable[str], shape: Callable[[str], Shape]) -> VaeArch:
    """Numbers of a Wan2.1 VAE from its tensors; the latent statistics, which are not in its file, are the published ones.

    Raises:
        ExportError: a tensor the numbers come from is missing, or the VAE has other latents than the published one.
    """
    names = set(names)
    if any(name.startswith("encoder.downsamples.0.downsamples.") for name in names):
        raise ExportError("vae: this is the Wan2.2 VAE of TI2V-5B", hint=SUPPORTED)
    base_dim = _shape(shape, "encoder.conv1.weight", rank=5)[0]
    z_dim = _shape(shape, "conv2.weight", rank=5)[0]
    if z_dim != _LATENT_STATISTICS_CHANNELS:
        raise ExportError(
            f"vae: {z_dim} latent channels, and their mean and deviation are known for {_LATENT_STATISTICS_CHANNELS} only",
            hint="a diffusers folder carries them in vae/config.json",
        )
    blocks, flags, widths = 0, [], []
    for index in range(count_blocks(names, "encoder.downsamples")):
        layer = f"encoder.downsamples.{index}"
        if f"{layer}.resample.1.weight" in names:
            flags.append(f"{layer}.time_conv.weight" in names)
            widths.append(_shape(shape, f"{layer}.resample.1.weight", rank=4)[0])
        elif not flags:
            blocks += 1
    widths.append(_shape(shape, "encoder.head.0.gamma", rank=4)[0])
    if blocks == 0 or any(width % base_dim for width in widths):
        raise ExportError(f"vae: widths {widths} over residual blocks of base width {base_dim} are not a Wan2.1 VAE")
    return VaeArch(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=tuple(width // base_dim for width in widths),
        num_res_blocks=blocks,
        temporal_downsample=tuple(flags),
    )


def diffusers_vae_arch(settings: Settings) -> VaeArch:
    """Numbers and latent statistics of an `AutoencoderKLWan` config.

    Raises:
        ExportError: the Wan2.2 VAE, or a setting that is not supported.
    """
    if settings.values.get("is_residual"):
        raise ExportError(f"{settings.where}: is_residual=True is the Wan2.2 VAE of TI2V-5B", hint=SUPPORTED)
    base_dim = settings.integer("base_dim")
    fixed = {"_class_name": ("AutoencoderKLWan",), "decoder_base_dim": (None, base_dim), **_VAE_FIXED}
    settings.check_fixed(fixed)
    read = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "latents_mean", "latents_std", "dropout")
    settings.check_known((*read, "scale_factor_temporal", "scale_factor_spatial", *fixed))
    arch = VaeArch(
        base_dim=base_dim,
        z_dim=settings.integer("z_dim"),
        dim_mult=settings.sequence("dim_mult", int),
        num_res_blocks=settings.integer("num_res_blocks"),
        temporal_downsample=settings.sequence("temperal_downsample", bool),
        latents_mean=settings.sequence("latents_mean", float),
        latents_std=settings.sequence("latents_std", float),
    )
    lengths = (len(arch.latents_mean), len(arch.latents_std), len(arch.temporal_downsample) + 1)
    if lengths != (arch.z_dim, arch.z_dim, len(arch.dim_mult)) or min(arch.dim_mult) < 1 or 0.0 in arch.latents_std:
        raise ExportError(f"{settings.where}: latents_mean, latents_std, temperal_downsample, dim_mult and z_dim disagree")
    strides = {"scale_factor_spatial": (arch.spatial_stride,), "scale_factor_temporal": (arch.temporal_stride,)}
    settings.check_fixed(strides, hint="the scale factors must be those of dim_mult and temperal_downsample")
    return arch


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many different `prefix.{i}.` there are."""
    depth = prefix.count(".") + 1
    return len({name.split(".")[depth] for name in names if name.startswith(f"{prefix}.")})


def _sound_transformer(settings: Settings, arch: TransformerArch) -> TransformerArch:
    if arch.dim % arch.num_heads:
        raise ExportError(f"{settings.where}: width {arch.dim} is not a multiple of {arch.num_heads} heads")
    if arch.head_dim % 2 or arch.head_dim < 6:
        raise ExportError(
            f"{settings.where}: heads of {arch.head_dim}: rotary embedding on three axes needs an even size from 6"
        )
    if arch.freq_dim % 2:
        raise ExportError(f"{settings.where}: freq_dim={arch.freq_dim}: the timestep's sines and cosines need an even number")
    return arch


def _shape(shape: Callable[[str], Shape], name: str, *, rank: int) -> Shape:
    found = shape(name)
    if len(found) != rank:
        raise ExportError(f"{name} is {list(found)}, expected {rank} axes", hint="this is not a Wan checkpoint's file")
    return found
