"""A VAE's architecture numbers: from its tensors' shapes in the original layout, from its config file in diffusers'."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from export.checkpoint.architectures import count_blocks, ranked_shape
from export.checkpoint.settings import Settings
from export.layouts import Shape
from runtime.errors import ExportError
from runtime.stages.vae_layers import check_levels
from runtime.variants import VAE_2_2, VaeArch

_FIXED: dict[str, tuple[Any, ...]] = {"_class_name": ("AutoencoderKLWan",), "attn_scales": ([],)}
_READ = (
    "base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample", "is_residual", "patch_size",
    "latents_mean", "latents_std", "dropout",
)  # fmt: skip


def original_vae_arch(names: Iterable[str], shape: Callable[[str], Shape]) -> VaeArch:
    """Numbers of a VAE from its tensors; the latent statistics, which are not in its file, are those published for its kind.

    Raises:
        ExportError: a tensor the numbers come from is missing, or the VAE has other latents than the published one of its kind.
    """
    names = set(names)
    nested = any(name.startswith("encoder.downsamples.0.downsamples.") for name in names)
    published = VAE_2_2 if nested else VaeArch()
    base_dim = ranked_shape(shape, "encoder.conv1.weight", rank=5)[0]
    z_dim = ranked_shape(shape, "conv2.weight", rank=5)[0]
    if z_dim != published.z_dim:
        raise ExportError(
            f"vae: {z_dim} latent channels, and their mean and deviation are known for {published.z_dim} only",
            hint="a diffusers folder carries them in vae/config.json",
        )
    blocks, flags, widths = _encoder_levels(names, shape, nested=nested)
    first_multiple = max(1, widths[0] // base_dim)
    decoder_width = ranked_shape(shape, "decoder.head.0.gamma", rank=4)[0]
    if blocks == 0 or any(width % base_dim for width in widths) or decoder_width % first_multiple:
        raise ExportError(
            f"vae: widths {widths} and {decoder_width} over residual blocks of base width {base_dim} are not a Wan VAE"
        )
    arch = replace(
        published,
        base_dim=base_dim,
        decoder_base_dim=_other(decoder_width // first_multiple, base_dim),
        dim_mult=tuple(width // base_dim for width in widths),
        num_res_blocks=blocks,
        temporal_downsample=flags,
    )
    return _sound("vae", arch)


def diffusers_vae_arch(settings: Settings) -> VaeArch:
    """Numbers and latent statistics of an `AutoencoderKLWan` config.

    Raises:
        ExportError: another kind of VAE, or a setting that is not supported.
    """
    patch_size = settings.integer("patch_size") if settings.values.get("patch_size") is not None else 1
    channels = (3 * patch_size**2,)
    base_dim = settings.integer("base_dim")
    decoder_dim = settings.integer("decoder_base_dim") if settings.values.get("decoder_base_dim") is not None else base_dim
    settings.check_fixed({**_FIXED, "is_residual": (False, True)})
    settings.check_fixed({"in_channels": channels, "out_channels": channels}, hint="three colours times patch_size²")
    settings.check_known((*_READ, *_FIXED, "in_channels", "out_channels", "scale_factor_temporal", "scale_factor_spatial"))
    arch = VaeArch(
        base_dim=base_dim,
        decoder_base_dim=_other(decoder_dim, base_dim),
        z_dim=settings.integer("z_dim"),
        dim_mult=settings.sequence("dim_mult", int),
        num_res_blocks=settings.integer("num_res_blocks"),
        temporal_downsample=settings.sequence("temperal_downsample", bool),
        residual_levels=bool(settings.values.get("is_residual")),
        patch_size=patch_size,
        latents_mean=settings.sequence("latents_mean", float),
        latents_std=settings.sequence("latents_std", float),
    )
    lengths = (len(arch.latents_mean), len(arch.latents_std), len(arch.temporal_downsample) + 1)
    if lengths != (arch.z_dim, arch.z_dim, len(arch.dim_mult)) or min(arch.dim_mult) < 1 or 0.0 in arch.latents_std:
        raise ExportError(f"{settings.where}: latents_mean, latents_std, temperal_downsample, dim_mult and z_dim disagree")
    strides = {"scale_factor_spatial": (arch.spatial_stride,), "scale_factor_temporal": (arch.temporal_stride,)}
    settings.check_fixed(strides, hint="the scale factors must be those of dim_mult, patch_size and temperal_downsample")
    return _sound(settings.where, arch)


def _encoder_levels(names: set[str], shape: Callable[[str], Shape], *, nested: bool) -> tuple[int, tuple[bool, ...], list[int]]:
    """Residual blocks of a level, which levels halve time, and every level's width, from an encoder's tensors."""
    layers = _numbered(names, "encoder.downsamples")
    if nested:
        layers = [layer for level in layers for layer in _numbered(names, f"{level}.downsamples")]
    blocks, flags, widths = 0, [], []
    for layer in layers:
        if f"{layer}.resample.1.weight" in names:
            flags.append(f"{layer}.time_conv.weight" in names)
            widths.append(ranked_shape(shape, f"{layer}.resample.1.weight", rank=4)[0])
        elif not flags:
            blocks += 1
    return blocks, tuple(flags), [*widths, ranked_shape(shape, "encoder.head.0.gamma", rank=4)[0]]


def _numbered(names: set[str], prefix: str) -> list[str]:
    return [f"{prefix}.{index}" for index in range(count_blocks(names, prefix))]


def _other(decoder_dim: int, base_dim: int) -> int | None:
    return None if decoder_dim == base_dim else decoder_dim


def _sound(where: str, arch: VaeArch) -> VaeArch:
    try:
        check_levels(arch)
    except ValueError as exc:
        raise ExportError(f"{where}: {exc}", hint="this is not a VAE that AutoencoderKLWan can be") from exc
    return arch
