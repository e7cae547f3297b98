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
from export.layouts import text_encoder_tensors, transformer_tensors, vae_tensors
from runtime.errors import ExportError
from runtime.variants import VARIANTS, TransformerArch, Variant

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint whose tensors were all checked. Use with `with`.

    Args:
        variant: the variant's row with the numbers, experts and boundary of this checkpoint.
        components: tensors of `text_encoder`, `vae` and each expert's component.
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
    check_component(contents.vae[1], vae_tensors(row.vae))
    log.info("%s: %s in the %s layout", path, row.name, layout)
    sources = (contents.text_encoder[1], contents.vae[1], *(source for _, source in contents.transformers))
    return Checkpoint(
        layout=layout,
        variant=row,
        components={source.component: source for source in sources},
        tokenizer=contents.tokenizer,
        scheduler_config=contents.scheduler_config,
        fingerprint=folder.fingerprint(layout),
    )


def _variant(path: Path, asked: str | None, contents: Contents) -> Variant:
    """The variant's row with this checkpoint's numbers."""
    arch, text_encoder, vae = contents.transformers[0][0], contents.text_encoder[0], contents.vae[0]
    if any(other != arch for other, _ in contents.transformers):
        raise ExportError(f"{path}: the two transformers differ in architecture", hint="both experts must be of one checkpoint")
    if (arch.in_channels, arch.out_channels) != (vae.z_dim, vae.z_dim):
        raise ExportError(
            f"{path}: the transformer takes {arch.in_channels} and gives {arch.out_channels} channels, the VAE has {vae.z_dim}",
            hint=SUPPORTED,
        )
    if arch.text_dim != text_encoder.dim:
        raise ExportError(
            f"{path}: the transformer takes prompts of {arch.text_dim}, the text encoder gives {text_encoder.dim}"
        )
    row = _row(path, asked, arch, num_experts=len(contents.transformers))
    experts = row.experts
    if contents.boundary is not None:
        experts = (replace(experts[0], boundary=contents.boundary), *experts[1:])
    return replace(row, transformer=arch, text_encoder=text_encoder, vae=vae, experts=experts)


def _row(path: Path, asked: str | None, arch: TransformerArch, *, num_experts: int) -> Variant:
    """The row asked for, unless these files are plainly another's; else the one of nearest width."""
    rows = {name: row for name, row in VARIANTS.items() if len(row.experts) == num_experts}
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
