"""Opens a checkpoint folder: which variant it is, where its tensors are, and proof that they all fit."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from export.checkpoint.contents import Contents, Layout, diffusers_contents, layout_of, original_contents
from export.checkpoint.folders import CheckpointFolder
from export.checkpoint.settings import SUPPORTED
from export.checkpoint.sources import TensorSource, check_component
from export.layouts import image_encoder_tensors, text_encoder_tensors, transformer_tensors, vae_tensors
from runtime.errors import ExportError
from runtime.variants import VARIANTS, TransformerArch, Variant

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint whose tensors were all checked. Use with `with`.

    Args:
        variant: the variant's row with the numbers, experts and boundary of this checkpoint.
        components: tensors of `text_encoder`, `image_encoder` where there is one, `vae`, `vae_encoder` and each expert's component.
        tokenizer: the `tokenizer.json`.
        scheduler_config: diffusers' scheduler settings as they are; None in the original layout, which has none.
        fingerprint: changes when a used file's name, size or time does.
    """

    layout: Layout
    variant: Variant
    components: Mapping[str, TensorSource]
    tokenizer: Path
    scheduler_config: dict[str, Any] | None
    fingerprint: str

    def close(self) -> None:
        """Release what the sources keep in memory."""
        for source in self.components.values():
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_checkpoint(path: Path, *, variant: str | None = None) -> Checkpoint:
    """Open a checkpoint folder and check every tensor in it against its architecture's layout.

    Args:
        path: a folder in the original repositories' or in diffusers' layout.
        variant: the variant it is taken for; found out when None.

    Raises:
        ExportError: not a checkpoint, incomplete, damaged, of an unsupported kind, or not the variant asked for.
    """
    folder = CheckpointFolder(path)
    layout = layout_of(folder)
    contents = diffusers_contents(folder) if layout is Layout.DIFFUSERS else original_contents(folder)
    row = _variant(path, variant, contents)
    for arch, source in contents.transformers:
        check_component(source, transformer_tensors(arch))
    check_component(contents.text_encoder[1], text_encoder_tensors(row.text_encoder))
    if contents.image_encoder is not None:
        image_arch, image_source = contents.image_encoder
        check_component(image_source, image_encoder_tensors(image_arch, original=layout is Layout.ORIGINAL))
    check_component(contents.vae[1], vae_tensors(row.vae))
    log.info("%s: %s in the %s layout", path, row.name, layout)
    image_sources = [contents.image_encoder[1]] if contents.image_encoder else []
    sources = (contents.text_encoder[1], *image_sources, contents.vae[1], *(source for _, source in contents.transformers))
    components = {source.component: source for source in sources}
    components["vae_encoder"] = contents.vae[1]  # one file holds both halves
    return Checkpoint(
        layout=layout,
        variant=row,
        components=components,
        tokenizer=contents.tokenizer,
        scheduler_config=contents.scheduler_config,
        fingerprint=folder.fingerprint(layout),
    )


def _variant(path: Path, asked: str | None, contents: Contents) -> Variant:
    """The variant's row with this checkpoint's numbers."""
    arch, text_encoder, vae = contents.transformers[0][0], contents.text_encoder[0], contents.vae[0]
    if any(other != arch for other, _ in contents.transformers):
        raise ExportError(f"{path}: the two transformers differ in architecture", hint="both experts must be of one checkpoint")
    with_image = arch.out_channels + vae.temporal_stride + vae.z_dim  # mask and latents of the image join the noisy latents
    if arch.out_channels != vae.z_dim or arch.in_channels not in (vae.z_dim, with_image):
        raise ExportError(
            f"{path}: the transformer takes {arch.in_channels} and gives {arch.out_channels} channels, the VAE has {vae.z_dim}",
            hint=SUPPORTED,
        )
    if arch.text_dim != text_encoder.dim:
        raise ExportError(
            f"{path}: the transformer takes prompts of {arch.text_dim}, the text encoder gives {text_encoder.dim}"
        )
    row = _row(path, asked, arch, num_experts=len(contents.transformers))
    image_encoder = contents.image_encoder[0] if contents.image_encoder else None
    experts = row.experts
    if contents.boundary is not None:
        experts = (replace(experts[0], boundary=contents.boundary), *experts[1:])
    return replace(row, transformer=arch, text_encoder=text_encoder, image_encoder=image_encoder, vae=vae, experts=experts)


def _row(path: Path, asked: str | None, arch: TransformerArch, *, num_experts: int) -> Variant:
    """The row asked for, unless these files are plainly another's; else, of those that work alike, the one of nearest width."""
    rows = {
        name: row
        for name, row in VARIANTS.items()
        if len(row.experts) == num_experts and _inputs(row.transformer) == _inputs(arch)
    }
    if not rows:
        raise ExportError(
            f"{path}: {num_experts} transformer(s): the transformer takes {arch.in_channels} and gives {arch.out_channels} channels, "
            f"with {arch.image_tokens} image tokens: there is no such variant",
            hint=SUPPORTED,
        )
    if asked is None:
        return min(rows.values(), key=lambda row: abs(row.transformer.dim - arch.dim))
    if asked not in VARIANTS:
        raise ExportError(
            f"variant {asked!r}: there is {', '.join(VARIANTS)}", hint="leave the variant out to have it detected"
        )
    exact = [name for name, row in rows.items() if row.transformer == arch]
    if asked not in rows or (exact and asked not in exact):
        raise ExportError(
            f"{path}: has {num_experts} transformer(s) of width {arch.dim}, which is not {asked}",
            hint=f"it can be {' or '.join(exact or rows)}",
        )
    return rows[asked]


def _inputs(arch: TransformerArch) -> tuple[bool, ...]:
    """What tells variants of one architecture apart: what their transformer takes."""
    joined = arch.in_channels > arch.out_channels
    return joined, arch.image_dim is not None, arch.image_positions, arch.per_token_timesteps
