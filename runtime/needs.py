"""What a generation asks of device memory: which components it opens, in order, and the work each of them is opened for.

The work is the drivers' own, done once in small on a target that only counts; its numbers are zeros.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from runtime.backends import Rehearse
from runtime.component import Component
from runtime.image_encoder import encode_images
from runtime.memory import Layout, Need
from runtime.opening import Opener
from runtime.request import ResolvedRequest
from runtime.residency import weight_units
from runtime.stages import network_blocks, network_components
from runtime.text_encoder import encode_prompts
from runtime.tiling import decode_tiled, encode_tiled
from runtime.transformer import Transformer
from runtime.vae import decode_colours, encode_stream, most_decoder_strips, most_encoder_strips
from runtime.variants import Variant

Drive = Callable[[Component, int], None]
"""A network's work on its opened component, in so many strips of a frame; what cannot be cut takes no notice of them."""
_LATENT_FRAMES = 3
"""The first, one that finds the first's caches, and one that finds a step's: every further one is like it."""


def generation_needs(opener: Opener, job: ResolvedRequest, rehearse: Rehearse) -> list[Need]:
    """The components of a generation in the order of their use, with what each needs.

    Raises:
        BundleError: an engine is missing or not what the manifest says.
        EngineError: an engine cannot be opened.
    """
    variant = opener.bundle.manifest.variant
    most_strips = _most_strips(variant, job)
    needs = []
    for network, drive in _drives(variant, job).items():
        units = weight_units(opener.stages(network), num_blocks=network_blocks(variant, network))
        in_strips = _layouts(opener, network, drive, job, rehearse)
        whole = in_strips(1)
        for component in network_components(variant, network):
            need = Need(network=network, component=component, units=units, layout=whole)
            most = most_strips.get(network, 1)
            needs.append(replace(need, most_strips=most, in_strips=in_strips) if most > 1 else need)
    return needs


def _layouts(opener: Opener, network: str, drive: Drive, job: ResolvedRequest, rehearse: Rehearse) -> Callable[[int], Layout]:
    """The layout of a network's work by the number of strips."""
    stages, files = opener.stages(network), opener.engine_files(network)
    return lambda num_strips: rehearse(stages, files, lambda component: drive(component, num_strips), job.attention)


def _most_strips(variant: Variant, job: ResolvedRequest) -> dict[str, int]:
    """In how many strips a network's frames may be cut where memory is short. What is tiled stays so: tiles change the result."""
    if job.tile:
        return {}
    _, _, rows, columns = job.latents_shape
    return {
        "vae": most_decoder_strips(variant.vae, rows, columns),
        "vae_encoder": most_encoder_strips(variant.vae, rows, columns),
    }


def _drives(variant: Variant, job: ResolvedRequest) -> dict[str, Drive]:
    num_prompts = 1 + any(guidance.unguided_pass for guidance in job.guidance)
    z_dim, latent_frames, rows, columns = job.latents_shape
    few = min(latent_frames, _LATENT_FRAMES)

    def encode_text(component: Component, _: int) -> None:
        table = np.zeros((1, variant.text_encoder.dim), np.float32)
        encode_prompts(component, table, [np.zeros(variant.transformer.text_len, np.int64)] * num_prompts, variant.text_encoder)

    def encode_image(component: Component, _: int) -> None:
        arch = variant.image_encoder
        assert arch is not None
        count = 1 + (job.last_image is not None)
        encode_images(component, np.zeros((count, 3, arch.image_size, arch.image_size), np.float32), arch)

    def encode_frames(component: Component, num_strips: int) -> None:
        shape = (3, 1 + (few - 1) * variant.vae.temporal_stride, job.size.height, job.size.width)
        frames = np.zeros(shape, np.float32)
        if job.tile:
            encode_tiled(component, frames, variant.vae, job.tile, fold=job.encoder_fold)
        else:
            encode_stream(component, frames, variant.vae, num_strips=num_strips)

    def denoise(component: Component, _: int) -> None:
        arch = variant.transformer
        transformer = Transformer(component, arch, job.latents_shape, conventions=job.conventions)
        transformer.embed_times([1.0])
        prompts = [transformer.encode_text(np.zeros((1, arch.text_dim), np.float32)) for _ in range(num_prompts)]
        image = None
        if arch.image_dim is not None:
            image = transformer.encode_image(np.zeros((arch.image_tokens, arch.image_dim), np.float32))
        latents = np.zeros((arch.in_channels, latent_frames, rows, columns), np.float32)
        for _ in range(2):  # the second finds what the first leaves
            transformer.predict(latents, 1.0, prompts, image=image)

    def decode(component: Component, num_strips: int) -> None:
        latents = np.zeros((z_dim, few, rows, columns), np.float32)
        for _ in (
            decode_tiled(component, latents, variant.vae, job.tile)
            if job.tile
            else decode_colours(component, latents, variant.vae, num_strips=num_strips)
        ):
            pass

    drives: dict[str, Drive] = {"text_encoder": encode_text}
    if job.image is not None and variant.image_encoder is not None:
        drives["image_encoder"] = encode_image
    if job.image is not None or job.video is not None:
        drives["vae_encoder"] = encode_frames
    return {**drives, "transformer": denoise, "vae": decode}
