"""What a manifest may say beyond its types: paths inside the folder, text that can be printed, numbers that a network can have.

Checked before anything is opened, allocated or computed from them; `runtime.bundle` reads the manifest and calls `check_manifest`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from runtime.manifest import Manifest
from runtime.precision import find_wide_fault
from runtime.schedulers import SchedulerName
from runtime.stages import Arch, network_blocks, network_stages, networks
from runtime.stages.vae_layers import check_levels
from runtime.variants import ImageUse, Presence, TextEncoderArch, TransformerArch, VaeArch, Variant

Refuse = Callable[[str], Exception]
"""Makes the exception to raise from a message."""

_MAX_EXTENT = 1 << 20  # no width or vocabulary of a network comes near
_MAX_DEPTH = 1 << 10
_MAX_LEVELS = 8
_MAX_PATCH = 16
_MAX_FPS = 1000
_MAX_STATISTIC = 1e6


def check_manifest(manifest: Manifest, refuse: Refuse) -> None:
    """Check everything that can be wrong in a manifest of the right types.

    Raises:
        Exception: what `refuse` makes, for the first thing that is wrong.
    """
    if not manifest.targets:
        raise refuse("holds no target")
    for text in _texts(manifest):
        if not text.isprintable() or not text:
            raise refuse(f"{text!r} is not a name")
    for artefact in manifest.artefacts():
        check_path(artefact.path, refuse)
        if artefact.bytes < 0:
            raise refuse(f"{artefact.path}: {artefact.bytes} bytes")
    _check_variant(manifest.variant, refuse)
    expected = networks(manifest.variant)
    for name, target in manifest.targets.items():
        if target.precisions.keys() != set(expected):
            raise refuse(f"target {name}: states the precision of {list(target.precisions)}, expected {list(expected)}")
    blocks = network_blocks(manifest.variant, "transformer")
    if fault := find_wide_fault(manifest.fp8_wide, network_stages(manifest.variant, "transformer"), num_blocks=blocks):
        raise refuse(f"fp8_wide: {fault}")


def check_path(path: str, refuse: Refuse) -> None:
    """Check that a path from a manifest or journal names something inside the bundle's folder, on every system.

    Raises:
        Exception: what `refuse` makes.
    """
    pure = PurePosixPath(path)
    outside = pure.is_absolute() or ".." in pure.parts or not pure.parts
    if outside or "\\" in path or ":" in path or not path.isprintable():
        raise refuse(f"path {path!r} leaves the bundle's folder")


def _texts(manifest: Manifest) -> Iterator[str]:
    """Names that are shown to people: a control character in one could rewrite a terminal."""
    yield from (manifest.variant.name, manifest.wanrt_version, *manifest.targets, *manifest.weights)
    yield from (expert.component for expert in manifest.variant.experts)
    for target in manifest.targets.values():
        yield from (*target.engines, *target.kernels, *target.tool_versions, *target.tool_versions.values())
    for files in manifest.weights.values():
        yield from files


def _check_variant(variant: Variant, refuse: Refuse) -> None:
    for component in (variant.transformer, variant.text_encoder, variant.image_encoder, variant.vae):
        if component is not None:
            _check_extents(component, refuse)
    _check_transformer(variant.transformer, refuse)
    _check_text_encoder(variant.text_encoder, variant.transformer, refuse)
    _check_vae(variant.vae, refuse)
    _check_conditioning(variant, refuse)
    if not variant.experts or len({expert.component for expert in variant.experts}) != len(variant.experts):
        raise refuse("variant: experts must be named, each once")
    if not 1 <= variant.defaults.fps <= _MAX_FPS:
        raise refuse(f"variant: {variant.defaults.fps} frames a second")
    if variant.defaults.scheduler not in list(SchedulerName):
        raise refuse(f"variant: scheduler {variant.defaults.scheduler!r}; there is {', '.join(SchedulerName)}")


def _check_extents(arch: Arch, refuse: Refuse) -> None:
    for name, value in dataclasses.asdict(arch).items():
        if name == "image_tokens" and value == 0:  # no image branch, which `_check_conditioning` makes sure of
            continue
        largest = _MAX_DEPTH if name in ("num_layers", "num_res_blocks") else _MAX_EXTENT
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, int) and not isinstance(number, bool) and not 0 < number <= largest:
                raise refuse(f"variant: {type(arch).__name__}.{name}={value} is not a size of any network")


def _check_transformer(arch: TransformerArch, refuse: Refuse) -> None:
    if arch.dim % arch.num_heads or arch.head_dim % 2:
        raise refuse(f"variant: width {arch.dim} does not split into {arch.num_heads} heads of even size")
    if arch.freq_dim % 2:
        raise refuse(f"variant: {arch.freq_dim} time features do not split into cosines and sines")
    if arch.patch_size[0] != 1 or arch.patch_volume > _MAX_EXTENT:
        raise refuse(f"variant: patches of {arch.patch_size}; no Wan model joins frames, or so many positions")


def _check_text_encoder(arch: TextEncoderArch, transformer: TransformerArch, refuse: Refuse) -> None:
    if arch.dim != transformer.text_dim:
        raise refuse(f"variant: text encoder of width {arch.dim}, the transformer takes {transformer.text_dim}")
    exact = arch.num_buckets // 4  # buckets for one distance each, see `runtime.text_encoder`
    if not 0 < exact < arch.max_distance:
        raise refuse(f"variant: {arch.num_buckets} position buckets for distances up to {arch.max_distance}")


def _check_conditioning(variant: Variant, refuse: Refuse) -> None:
    """Check that the networks take what the variant says it is conditioned on."""
    transformer, encoder, vae, takes = variant.transformer, variant.image_encoder, variant.vae, variant.conditioning
    has_image = takes.image is not Presence.NONE
    joined = vae.temporal_stride + vae.z_dim if has_image and takes.image_use is ImageUse.CHANNELS else 0
    if (transformer.in_channels, transformer.out_channels) != (vae.z_dim + joined, vae.z_dim):
        raise refuse(f"variant: the transformer's channels do not fit latents of {vae.z_dim} and {joined} for images")
    if has_image and takes.image_use is ImageUse.FIRST_FRAME and not transformer.per_token_timesteps:
        raise refuse("variant: an image as the first frame needs a timestep per token")
    if encoder is None:
        if transformer.image_dim is not None or transformer.image_tokens:
            raise refuse("variant: a transformer with an image branch, and no image encoder")
        return
    if encoder.dim % encoder.num_heads or encoder.num_layers < 2 or encoder.image_size < encoder.patch_size:
        raise refuse(f"variant: {encoder} is not an image encoder")
    images = 2 if takes.last_image is Presence.REQUIRED else 1
    if takes.image is not Presence.REQUIRED or takes.last_image is Presence.OPTIONAL:
        raise refuse("variant: an image encoder, but not always the same number of images")
    if (transformer.image_dim, transformer.image_tokens) != (encoder.dim, images * encoder.num_tokens):
        raise refuse(
            f"variant: the image branch does not fit {images} image(s) of {encoder.num_tokens} features of {encoder.dim}"
        )


def _check_vae(arch: VaeArch, refuse: Refuse) -> None:
    levels = len(arch.dim_mult)
    if not 0 < levels <= _MAX_LEVELS or len(arch.temporal_downsample) != levels - 1:
        raise refuse(f"variant: a VAE with widths {arch.dim_mult} and time flags {arch.temporal_downsample}")
    try:
        check_levels(arch)
    except ValueError as exc:
        raise refuse(f"variant: a VAE with {exc}") from exc
    if arch.patch_size > _MAX_PATCH:
        raise refuse(f"variant: a VAE that folds squares of {arch.patch_size} pixels")
    if len(arch.latents_mean) != arch.z_dim or len(arch.latents_std) != arch.z_dim:
        raise refuse(f"variant: latent statistics must have {arch.z_dim} values")
    if not all(1 / _MAX_STATISTIC < std < _MAX_STATISTIC for std in arch.latents_std):
        raise refuse(f"variant: latent deviations {arch.latents_std} are not positive numbers of usual size")
    if not all(abs(mean) < _MAX_STATISTIC for mean in arch.latents_mean):
        raise refuse(f"variant: latent means {arch.latents_mean} are not of usual size")
