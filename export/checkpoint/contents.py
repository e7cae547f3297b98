"""What a checkpoint folder holds, read from either layout: architecture numbers and tensors of each network, tokenizer, scheduler."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from export.checkpoint.architectures import (
    check_original_kind,
    count_blocks,
    diffusers_text_encoder_arch,
    diffusers_transformer_arch,
    has_image_branch,
    original_text_encoder_arch,
    original_transformer_arch,
)
from export.checkpoint.folders import CheckpointFolder
from export.checkpoint.image_encoders import diffusers_image_encoder, original_image_encoder
from export.checkpoint.readers import TensorFile
from export.checkpoint.settings import Settings
from export.checkpoint.sources import TensorSource
from export.checkpoint.vae_architectures import diffusers_vae_arch, original_vae_arch
from export.layouts import text_encoder_diffusers_names, transformer_diffusers_names, vae_diffusers_names
from runtime.errors import ExportError
from runtime.variants import VARIANTS, ImageEncoderArch, TextEncoderArch, TransformerArch, VaeArch

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline")
_EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
_DIT = "diffusion_pytorch_model"
_SHARED_EMBEDDING = "shared.weight"
_EMBEDDING_ALIAS = "encoder.embed_tokens.weight"
_UNUSED_NORM = "norm_added_q"


class Layout(StrEnum):
    """Whose folder it is. Where the two behave differently, the layout decides which behaviour is right."""

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What either layout holds; transformers from the high-noise to the low-noise one."""

    transformers: tuple[tuple[TransformerArch, TensorSource], ...]
    text_encoder: tuple[TextEncoderArch, TensorSource]
    image_encoder: tuple[ImageEncoderArch, TensorSource] | None
    vae: tuple[VaeArch, TensorSource]
    tokenizer: Path
    scheduler_config: dict[str, Any] | None = None
    boundary: float | None = None


def layout_of(folder: CheckpointFolder) -> Layout:
    """Which layout a folder has, judged by its config files.

    Raises:
        ExportError: neither.
    """
    if folder.has("model_index.json"):
        return Layout.DIFFUSERS
    if any(folder.has(name) for name in ("config.json", *_EXPERT_FOLDERS)):
        return Layout.ORIGINAL
    nothing = "has neither model_index.json (diffusers) nor config.json or high_noise_model/ (original)"
    reason = nothing if folder.root.is_dir() else "is not a folder"
    raise ExportError(f"{folder.root}: {reason}", hint="give the folder of a whole Wan checkpoint")


def check_kind(folder: CheckpointFolder) -> None:
    """Check that the folder's top config files describe a supported kind of model; no weights need be there.

    Raises:
        ExportError: no checkpoint, or one of another kind; the message says which.
    """
    if layout_of(folder) is Layout.DIFFUSERS:
        _settings(folder, "model_index.json").check_fixed({"_class_name": _PIPELINES, "expand_timesteps": (False, True, None)})
        return
    for place in _original_places(folder):
        check_original_kind(_settings(folder, f"{place}/config.json"))


def original_contents(folder: CheckpointFolder) -> Contents:
    """Read a folder of the original repositories; what has no config there comes from the tensors' shapes.

    Raises:
        ExportError: incomplete, damaged, or another kind of model.
    """
    check_kind(folder)
    places = _original_places(folder)
    components = _expert_components(len(places))
    sources = [TensorSource(component, folder.shards(place, _DIT)) for place, component in zip(places, components, strict=True)]
    image_encoder = original_image_encoder(folder) if has_image_branch(sources[0].names()) else None
    image_arch = image_encoder[0] if image_encoder else None
    transformers = []
    for place, source in zip(places, sources, strict=True):
        settings = _settings(folder, f"{place}/config.json")
        arch = original_transformer_arch(settings, source.names(), source.shape, image_arch)
        _check_depth(settings, "num_layers", arch.num_layers, count_blocks(source.names(), "blocks"))
        transformers.append((arch, source))
    text_encoder = TensorSource("text_encoder", [folder.weights("models_t5_*")])
    vae = TensorSource("vae", [folder.weights("Wan2.[12]_VAE")])
    return Contents(
        transformers=tuple(transformers),
        text_encoder=(original_text_encoder_arch(text_encoder.names(), text_encoder.shape), text_encoder),
        image_encoder=image_encoder,
        vae=(original_vae_arch(vae.names(), vae.shape), vae),
        tokenizer=folder.file("google/umt5-xxl/tokenizer.json"),
    )


def diffusers_contents(folder: CheckpointFolder) -> Contents:
    """Read a folder saved by diffusers, whose `transformer` is the high-noise expert and `transformer_2` the low-noise one.

    Raises:
        ExportError: incomplete, damaged, or another kind of model.
    """
    check_kind(folder)
    index = _settings(folder, "model_index.json")
    two_experts = index.values.get("transformer_2") not in (None, [None, None])
    boundary = index.number("boundary_ratio") if index.values.get("boundary_ratio") is not None else None
    if two_experts != (boundary is not None):
        raise ExportError(
            f"{index.where}: boundary_ratio={boundary} with {1 + two_experts} transformer(s)",
            hint="two transformers need the boundary between them, and one has none",
        )
    places = ("transformer", "transformer_2") if two_experts else ("transformer",)
    components = _expert_components(len(places))
    has_image_encoder = index.values.get("image_encoder") not in (None, [None, None])
    image_encoder = diffusers_image_encoder(folder) if has_image_encoder else None
    per_token = bool(index.values.get("expand_timesteps"))
    image_arch = image_encoder[0] if image_encoder else None
    return Contents(
        transformers=tuple(
            _diffusers_transformer(folder, place, component, image_arch, per_token_timesteps=per_token)
            for place, component in zip(places, components, strict=True)
        ),
        text_encoder=_diffusers_text_encoder(folder),
        image_encoder=image_encoder,
        vae=_diffusers_vae(folder),
        tokenizer=folder.file("tokenizer/tokenizer.json"),
        scheduler_config=folder.json("scheduler/scheduler_config.json"),
        boundary=boundary,
    )


def _original_places(folder: CheckpointFolder) -> tuple[str, ...]:
    """Where the transformers are, from the high-noise to the low-noise one."""
    return _EXPERT_FOLDERS if any(folder.has(name) for name in _EXPERT_FOLDERS) else (".",)


def _diffusers_transformer(
    folder: CheckpointFolder, place: str, component: str, image_encoder: ImageEncoderArch | None, *, per_token_timesteps: bool
) -> tuple[TransformerArch, TensorSource]:
    settings = _settings(folder, f"{place}/config.json")
    arch = diffusers_transformer_arch(settings, image_encoder, per_token_timesteps=per_token_timesteps)
    files = folder.shards(place, _DIT)
    stored = _stored_names(files)
    _check_depth(settings, "num_layers", arch.num_layers, count_blocks(stored, "blocks"))
    names = _inverse(transformer_diffusers_names(arch))
    return arch, TensorSource(component, files, names=names, ignored={name for name in stored if _UNUSED_NORM in name})


def _diffusers_text_encoder(folder: CheckpointFolder) -> tuple[TextEncoderArch, TensorSource]:
    settings = _settings(folder, "text_encoder/config.json")
    arch = diffusers_text_encoder_arch(settings)
    files = folder.shards("text_encoder", "model")
    stored = _stored_names(files)
    _check_depth(settings, "num_layers", arch.num_layers, count_blocks(stored, "encoder.block"))
    names = _inverse(text_encoder_diffusers_names(arch))
    if _EMBEDDING_ALIAS not in stored:
        return arch, TensorSource("text_encoder", files, names=names)
    # Where both are stored and differ, transformers (5.23) computes with the alias, whatever tie_word_embeddings says.
    token_embedding = names.pop(_SHARED_EMBEDDING)
    return arch, TensorSource(
        "text_encoder", files, names={**names, _EMBEDDING_ALIAS: token_embedding}, ignored={_SHARED_EMBEDDING}
    )


def _diffusers_vae(folder: CheckpointFolder) -> tuple[VaeArch, TensorSource]:
    settings = _settings(folder, "vae/config.json")
    arch = diffusers_vae_arch(settings)
    files = folder.shards("vae", _DIT)
    found = count_blocks(_stored_names(files), "decoder.up_blocks.0.resnets") - 1
    _check_depth(settings, "num_res_blocks", arch.num_res_blocks, found)
    return arch, TensorSource("vae", files, names=_inverse(vae_diffusers_names(arch)))


def _expert_components(num_experts: int) -> tuple[str, ...]:
    """What the variants with that many experts call their components, from high noise to low."""
    row = next(row for row in VARIANTS.values() if len(row.experts) == num_experts)
    return tuple(expert.component for expert in row.experts)


def _settings(folder: CheckpointFolder, name: str) -> Settings:
    return Settings(str(folder.root / name), folder.json(name))


def _check_depth(settings: Settings, key: str, declared: int, found: int) -> None:
    if declared != found:
        raise ExportError(
            f"{settings.where}: {key}={declared}, but the weights beside it hold {found}",
            hint="a shard is missing, or the config does not belong to these weights",
        )


def _stored_names(files: Iterable[TensorFile]) -> list[str]:
    return [stored.name for file in files for stored in file.tensors]


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {stored: original for original, stored in names.items()}
