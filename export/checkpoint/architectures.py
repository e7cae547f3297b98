"""Architecture numbers from what a checkpoint says about itself: config files, and tensor shapes where there is no config.

A setting that the stages cannot follow is refused, never ignored: it would change the mathematics without changing a shape.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from export.checkpoint.settings import SUPPORTED, Settings
from export.layouts import Shape
from runtime.errors import ExportError
from runtime.variants import ImageEncoderArch, TextEncoderArch, TransformerArch

_ORIGINAL_KINDS = ("t2v", "i2v", "flf2v", "ti2v")
_PER_TOKEN_KIND = "ti2v"
_IMAGE_BRANCH, _IMAGE_POSITIONS = "img_emb.proj.0.weight", "img_emb.emb_pos"
_OTHER_KINDS = {
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
    "eps", "rope_max_seq_len", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len",
)  # fmt: skip
_DIFFUSERS_FIXED: dict[str, tuple[Any, ...]] = {
    "patch_size": ([1, 2, 2],),
    "window_size": ([-1, -1],),
    "qk_norm": ("rms_norm_across_heads",),
    "cross_attn_norm": (True,),
}


def check_original_kind(settings: Settings) -> None:
    """Check that an original layout's `config.json` describes a transformer as the stages compute it.

    Raises:
        ExportError: another kind of model, or a setting that is not supported.
    """
    kind = settings.values.get("model_type", "t2v")
    if kind not in _ORIGINAL_KINDS:
        means = f" ({_OTHER_KINDS[kind]})" if kind in _OTHER_KINDS else ""
        raise ExportError(f"{settings.where}: model_type={kind!r}{means}, supported: {_ORIGINAL_KINDS}", hint=SUPPORTED)
    settings.check_fixed({"_class_name": ("WanModel",), **_ORIGINAL_FIXED})
    settings.check_known((*_ORIGINAL_READ, "model_type", "text_dim", *_ORIGINAL_FIXED))


def has_image_branch(names: Iterable[str]) -> bool:
    """Whether a transformer of the original layout takes features of an image encoder; its config does not say."""
    return _IMAGE_BRANCH in names


def original_transformer_arch(
    settings: Settings, names: Iterable[str], shape: Callable[[str], Shape], image_encoder: ImageEncoderArch | None
) -> TransformerArch:
    """Numbers of an original layout's `config.json`; what it leaves out comes from the tensors' shapes.

    Args:
        image_encoder: whose features an image branch takes; None without one.

    Raises:
        ExportError: a number is missing, or one that the stages cannot follow.
    """
    text_dim = ranked_shape(shape, "text_embedding.0.weight", rank=2)[-1]
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
        per_token_timesteps=settings.values.get("model_type") == _PER_TOKEN_KIND,
    )
    if image_encoder is not None:
        positions = ranked_shape(shape, _IMAGE_POSITIONS, rank=3)[1] if _IMAGE_POSITIONS in names else None
        arch = _with_image_branch(settings, arch, ranked_shape(shape, _IMAGE_BRANCH, rank=1)[0], positions, image_encoder)
    return _sound_transformer(settings, arch)


def diffusers_transformer_arch(
    settings: Settings, image_encoder: ImageEncoderArch | None, *, per_token_timesteps: bool
) -> TransformerArch:
    """Numbers of a `WanTransformer3DModel` config, whose width is heads times head size.

    Args:
        image_encoder: the folder's; None without one.
        per_token_timesteps: the pipeline's `expand_timesteps`.

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
        per_token_timesteps=per_token_timesteps,
    )
    image_dim = settings.optional_integer("image_dim")
    if (image_dim is None) != (image_encoder is None):
        there = "no image_encoder" if image_encoder is None else "an image_encoder"
        raise ExportError(f"{settings.where}: image_dim={image_dim}, but the folder has {there}", hint=SUPPORTED)
    settings.check_fixed({"added_kv_proj_dim": (None if image_dim is None else arch.dim,)})
    if image_dim is not None and image_encoder is not None:
        positions = settings.optional_integer("pos_embed_seq_len")
        arch = _with_image_branch(settings, arch, image_dim, positions, image_encoder)
    return _sound_transformer(settings, arch)


def original_text_encoder_arch(names: Iterable[str], shape: Callable[[str], Shape]) -> TextEncoderArch:
    """Numbers of a UMT5 encoder from its tensors; the largest relative distance, which no tensor shows, is UMT5's.

    Raises:
        ExportError: a tensor the numbers come from is missing or has another rank.
    """
    vocab_size, dim = ranked_shape(shape, "token_embedding.weight", rank=2)
    attention_dim, _ = ranked_shape(shape, "blocks.0.attn.q.weight", rank=2)
    ffn_dim, _ = ranked_shape(shape, "blocks.0.ffn.gate.0.weight", rank=2)
    num_buckets, num_heads = ranked_shape(shape, "blocks.0.pos_embedding.embedding.weight", rank=2)
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


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many different `prefix.{i}.` there are."""
    depth = prefix.count(".") + 1
    return len({name.split(".")[depth] for name in names if name.startswith(f"{prefix}.")})


def ranked_shape(shape: Callable[[str], Shape], name: str, *, rank: int) -> Shape:
    """The shape of tensor `name`.

    Raises:
        ExportError: it has another number of axes.
    """
    found = shape(name)
    if len(found) != rank:
        raise ExportError(f"{name} is {list(found)}, expected {rank} axes", hint="this is not a Wan checkpoint's file")
    return found


def _with_image_branch(
    settings: Settings, arch: TransformerArch, image_dim: int, positions: int | None, encoder: ImageEncoderArch
) -> TransformerArch:
    """The transformer with an image branch, which has a table of positions where it takes more than one image."""
    tokens = encoder.num_tokens if positions is None else positions
    if image_dim != encoder.dim or tokens not in (encoder.num_tokens, 2 * encoder.num_tokens):
        raise ExportError(
            f"{settings.where}: takes {tokens} image features of {image_dim}, the image encoder gives {encoder.num_tokens} "
            f"of {encoder.dim} an image",
            hint="transformer and image encoder must come from the same checkpoint",
        )
    return replace(arch, image_dim=image_dim, image_tokens=tokens, image_positions=positions is not None)


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
