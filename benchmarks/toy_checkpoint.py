"""Writes a toy Wan checkpoint with random weights, as the original repositories or diffusers lay theirs out.

It takes the same path through wanrt as a real one and is small enough for a laptop. What it generates is noise: nothing was
ever trained. Neither diffusers nor transformers is needed to write it.

    python -m benchmarks.toy_checkpoint DIR [--kind i2v] [--layout diffusers] [--experts 2] [--dim 96] [--layers 4] [--seed 0]
"""

import argparse
import json
import shutil
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from benchmarks.diffusers_configs import (
    CONFIG_FILE,
    TRANSFORMERS,
    TRANSFORMERS_WEIGHTS_FILE,
    WEIGHTS_FILE,
    takes_image,
    write_diffusers_configs,
    write_json,
)
from benchmarks.toy_tokenizer import VOCABULARY, write_tokenizer
from benchmarks.toy_weights import (
    Tensors,
    image_encoder_weights,
    original_image_encoder,
    text_encoder_weights,
    transformer_weights,
    vae_weights,
)
from export.layouts import text_encoder_diffusers_names, transformer_diffusers_names, vae_diffusers_names
from runtime.variants import VAE_2_2, ImageEncoderArch, TextEncoderArch, TransformerArch, VaeArch


class Layout(StrEnum):
    """How a checkpoint's files and tensors are named."""

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyModel:
    """Sizes of a toy checkpoint; the defaults make a folder of about 6 MB."""

    transformer: TransformerArch = TransformerArch(dim=96, ffn_dim=256, num_heads=4, num_layers=4, text_dim=64)
    text_encoder: TextEncoderArch = TextEncoderArch(
        dim=64, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=2, vocab_size=len(VOCABULARY)
    )
    image_encoder: ImageEncoderArch | None = None
    vae: VaeArch = VaeArch(base_dim=8)
    experts: int = 1
    boundary: float = 0.875  # between two experts; only a diffusers folder has a place for it
    seed: int = 0


_DIT = ToyModel().transformer
_CLIP = ImageEncoderArch(dim=64, ffn_dim=128, num_heads=16, num_layers=3, image_size=28, patch_size=7)
_IMAGE_DIT = replace(_DIT, in_channels=36)
_CLIP_DIT = replace(_IMAGE_DIT, image_dim=_CLIP.dim, image_tokens=_CLIP.num_tokens)
KINDS = {
    "t2v": ToyModel(),
    "i2v": ToyModel(transformer=_CLIP_DIT, image_encoder=_CLIP),
    "flf2v": ToyModel(
        transformer=replace(_CLIP_DIT, image_tokens=2 * _CLIP.num_tokens, image_positions=True), image_encoder=_CLIP
    ),
    "i2v-a14b": ToyModel(transformer=_IMAGE_DIT, experts=2, boundary=0.9),
    "ti2v": ToyModel(
        transformer=replace(_DIT, in_channels=48, out_channels=48, per_token_timesteps=True),
        vae=replace(VAE_2_2, base_dim=8, decoder_base_dim=12),
    ),
}
"""A toy of every kind of model."""


def write_toy_checkpoint(folder: Path, model: ToyModel, *, layout: Layout = Layout.ORIGINAL) -> bool:
    """Write the checkpoint into `folder`, in place of another toy; the same model and seed give the same tensors in both layouts.

    Returns:
        Whether anything was written: a folder that already holds exactly this toy is left alone.

    Raises:
        FileExistsError: `folder` holds something other than a toy checkpoint.
    """
    recipe = json.dumps({"layout": layout, **asdict(model)}) + "\n"
    recipe_file = folder / "toy.json"
    if recipe_file.exists() and recipe_file.read_text(encoding="utf-8") == recipe:
        return False
    if folder.exists() and any(folder.iterdir()) and not recipe_file.exists():
        raise FileExistsError(f"{folder} is not empty and not a toy checkpoint")
    partial = folder.with_name(folder.name + ".partial")  # a killed call leaves this, never half a checkpoint
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    _WRITERS[layout](partial, model)
    (partial / "toy.json").write_text(recipe, encoding="utf-8")
    partial.rename(folder)
    return True


def _write_original(folder: Path, model: ToyModel) -> None:
    arch = model.transformer
    config = {
        "_class_name": "WanModel", "model_type": _model_type(model), "dim": arch.dim, "ffn_dim": arch.ffn_dim, "freq_dim": arch.freq_dim,
        "in_dim": arch.in_channels, "out_dim": arch.out_channels, "num_heads": arch.num_heads, "num_layers": arch.num_layers,
        "text_len": arch.text_len, "eps": arch.eps,
    }  # fmt: skip
    places = [folder] if model.experts == 1 else [folder / "high_noise_model", folder / "low_noise_model"]
    for index, place in enumerate(places):
        write_json(place / CONFIG_FILE, config)
        _write_tensors(place / WEIGHTS_FILE, transformer_weights(arch, seed=model.seed, expert=index))
    text_encoder = text_encoder_weights(model.text_encoder, seed=model.seed)
    _write_pth(folder / "models_t5_umt5-xxl-enc-bf16.pth", text_encoder, bfloat16=True)
    if model.image_encoder is not None:
        clip = original_image_encoder(model.image_encoder, image_encoder_weights(model.image_encoder, seed=model.seed))
        _write_pth(folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", clip, bfloat16=False)
    vae_file = "Wan2.2_VAE.pth" if model.vae.residual_levels else "Wan2.1_VAE.pth"
    _write_pth(folder / vae_file, vae_weights(model.vae, seed=model.seed), bfloat16=False)
    write_tokenizer(folder / "google" / "umt5-xxl")


def _write_diffusers(folder: Path, model: ToyModel) -> None:
    arch, text, vae = model.transformer, model.text_encoder, model.vae
    write_diffusers_configs(
        folder,
        transformer=arch,
        text_encoder=text,
        image_encoder=model.image_encoder,
        vae=vae,
        experts=model.experts,
        boundary=model.boundary,
        shift=3.0,
    )
    transformer_names = transformer_diffusers_names(arch)
    for index, place in enumerate(TRANSFORMERS[: model.experts]):
        tensors = transformer_weights(arch, seed=model.seed, expert=index)
        _write_tensors(folder / place / WEIGHTS_FILE, _renamed(tensors, transformer_names))
    _write_tensors(folder / "vae" / WEIGHTS_FILE, _renamed(vae_weights(vae, seed=model.seed), vae_diffusers_names(vae)))
    tensors = _renamed(text_encoder_weights(text, seed=model.seed), text_encoder_diffusers_names(text))
    _write_tensors(folder / "text_encoder" / TRANSFORMERS_WEIGHTS_FILE, tensors)
    if model.image_encoder is not None:
        tensors = image_encoder_weights(model.image_encoder, seed=model.seed)
        _write_tensors(folder / "image_encoder" / TRANSFORMERS_WEIGHTS_FILE, tensors)
    write_tokenizer(folder / "tokenizer")


def _model_type(model: ToyModel) -> str:
    if model.transformer.per_token_timesteps:
        return "ti2v"
    if takes_image(model.transformer):
        return "flf2v" if model.transformer.image_positions else "i2v"
    return "t2v"


_WRITERS = {Layout.ORIGINAL: _write_original, Layout.DIFFUSERS: _write_diffusers}


def _renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    return {names[name]: tensor for name, tensor in tensors.items()}


def _write_tensors(file: Path, tensors: Tensors) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def _write_pth(path: Path, tensors: Tensors, *, bfloat16: bool) -> None:
    import torch

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    torch.save({name: torch.from_numpy(tensor).to(dtype) for name, tensor in tensors.items()}, path)


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toy_checkpoint", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", type=Layout, choices=list(Layout), default=Layout.ORIGINAL)
    parser.add_argument("--kind", choices=list(KINDS), default="t2v")
    parser.add_argument("--experts", type=int, choices=(1, 2), help="the kind's own number when left out")
    parser.add_argument(
        "--dim", type=int, default=ToyModel().transformer.dim, help="width of the transformer, a multiple of the heads"
    )
    parser.add_argument("--heads", type=int, default=ToyModel().transformer.num_heads)
    parser.add_argument("--layers", type=int, default=ToyModel().transformer.num_layers)
    parser.add_argument("--vae-dim", type=int, default=ToyModel().vae.base_dim, help="narrowest width of the VAE's encoder")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    toy = KINDS[asked.kind]
    toy = replace(toy, experts=asked.experts or toy.experts, seed=asked.seed, vae=replace(toy.vae, base_dim=asked.vae_dim))
    arch = replace(toy.transformer, dim=asked.dim, num_heads=asked.heads, num_layers=asked.layers)
    written = write_toy_checkpoint(asked.folder, replace(toy, transformer=arch), layout=asked.layout)
    size = sum(path.stat().st_size for path in asked.folder.rglob("*") if path.is_file())
    kept = "" if written else " (kept as it was)"
    print(f"{asked.folder}: toy checkpoint, {asked.layout} layout, {size / 1e6:.1f} MB, random weights{kept}")


if __name__ == "__main__":
    main()
