"""The CLIP image encoder of a checkpoint, in either layout: its numbers, its tensors, and how its pixels are made."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from export.checkpoint.folders import CheckpointFolder
from export.checkpoint.settings import Settings
from export.checkpoint.sources import TensorSource
from export.layouts import Shape, image_encoder_stored_names, image_encoder_unused
from runtime.errors import ExportError
from runtime.variants import ImageEncoderArch

ORIGINAL_FILE = "models_clip_*"
FOLDER, PROCESSOR_FILE = "image_encoder", "image_processor/preprocessor_config.json"
_NUM_HEADS = 16  # of the original's `clip_xlm_roberta_vit_h_14`; no tensor shows it
_HINT = "Wan's image encoder is the ViT-H/14 of a CLIP; take it from the published checkpoint"
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def original_image_encoder(folder: CheckpointFolder) -> tuple[ImageEncoderArch, TensorSource]:
    """Read the visual half of the original's CLIP file.

    Raises:
        ExportError: missing, damaged, or not such an encoder.
    """
    file = folder.weights(ORIGINAL_FILE)
    shapes = {stored.name: stored.shape for stored in file.tensors}
    arch = _original_arch(shapes, lambda name: _shape(shapes, name))
    return arch, _source([file], arch)


def diffusers_image_encoder(folder: CheckpointFolder) -> tuple[ImageEncoderArch, TensorSource]:
    """Read `image_encoder/` of a diffusers folder, and check that its images are prepared as `runtime.conditioning` does.

    Raises:
        ExportError: missing, damaged, not such an encoder, or with images prepared in another way.
    """
    settings = Settings(str(folder.root / FOLDER / "config.json"), folder.json(f"{FOLDER}/config.json"))
    settings.check_fixed(
        {"model_type": ("clip_vision_model",), "hidden_act": ("gelu", "quick_gelu"), "num_channels": (3,)},
        hint=_HINT,
    )
    arch = ImageEncoderArch(
        dim=settings.integer("hidden_size"),
        ffn_dim=settings.integer("intermediate_size"),
        num_heads=settings.integer("num_attention_heads"),
        num_layers=settings.integer("num_hidden_layers"),
        image_size=settings.integer("image_size"),
        patch_size=settings.integer("patch_size"),
        eps=settings.number("layer_norm_eps"),
        quick_gelu=settings.values.get("hidden_act", "quick_gelu") == "quick_gelu",  # transformers' default
    )
    _check_processor(folder, arch)
    return _sound(settings.where, arch), _source(folder.shards(FOLDER, "model"), arch)


def _original_arch(names: Iterable[str], shape: Callable[[str], Shape]) -> ImageEncoderArch:
    patch = shape("visual.patch_embedding.weight")
    tokens = shape("visual.pos_embedding")[-2]
    blocks = {name.split(".")[2] for name in names if name.startswith("visual.transformer.")}
    side = math.isqrt(max(tokens - 1, 0))
    if len(patch) != 4 or patch[2] != patch[3] or side * side != tokens - 1:
        raise ExportError(f"image_encoder: patches of {list(patch)} and {tokens} positions are not an image's", hint=_HINT)
    arch = ImageEncoderArch(
        dim=patch[0],
        ffn_dim=shape("visual.transformer.0.mlp.0.weight")[0],
        num_heads=_NUM_HEADS,
        num_layers=len(blocks),
        image_size=side * patch[2],
        patch_size=patch[2],
    )
    return _sound("image_encoder", arch)


def _check_processor(folder: CheckpointFolder, arch: ImageEncoderArch) -> None:
    settings = Settings(str(folder.root / PROCESSOR_FILE), folder.json(PROCESSOR_FILE))
    side = arch.image_size
    square = {"height": side, "width": side}
    fixed: dict[str, tuple[Any, ...]] = {
        "size": ({"shortest_edge": side}, side),
        "crop_size": (square, side),
        "resample": (3,),  # Pillow's bicubic
        "rescale_factor": (1 / 255,),
        "image_mean": (_MEAN,),
        "image_std": (_STD,),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), (True,)),
        "do_convert_rgb": (True, None),
    }
    settings.check_fixed(fixed, hint="images are prepared as the published checkpoints' CLIPImageProcessor does")


def _source(files: Any, arch: ImageEncoderArch) -> TensorSource:
    stored = [tensor.name for file in files for tensor in file.tensors]
    names, unused = image_encoder_stored_names(arch), image_encoder_unused(arch, stored)
    return TensorSource("image_encoder", files, names=names, ignored=unused)


def _sound(where: str, arch: ImageEncoderArch) -> ImageEncoderArch:
    if arch.dim % arch.num_heads or arch.num_layers < 2 or arch.image_size < arch.patch_size:
        raise ExportError(
            f"{where}: width {arch.dim} in {arch.num_heads} heads, {arch.num_layers} layers, images of {arch.image_size} in "
            f"patches of {arch.patch_size} are not an image encoder",
            hint=_HINT,
        )
    return arch


def _shape(shapes: dict[str, Shape], name: str) -> Shape:
    if name not in shapes or len(shapes[name]) < 2:
        raise ExportError(f"image_encoder: tensor {name} is missing, or not what a CLIP holds", hint=_HINT)
    return shapes[name]
