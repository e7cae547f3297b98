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
from typing import Any

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

_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_CONFIG_FILE, _WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"


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

    @property
    def takes_image(self) -> bool:
        """Whether an image's mask and latents join the noisy latents."""
        return self.transformer.in_channels > self.transformer.out_channels


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
        _write_network(place, config, transformer_weights(arch, seed=model.seed, expert=index))
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
    transformer_config = {
        "_class_name": "WanTransformer3DModel", "patch_size": arch.patch_size, "num_attention_heads": arch.num_heads,
        "attention_head_dim": arch.head_dim, "in_channels": arch.in_channels, "out_channels": arch.out_channels,
        "text_dim": arch.text_dim, "freq_dim": arch.freq_dim, "ffn_dim": arch.ffn_dim, "num_layers": arch.num_layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": arch.eps, "rope_max_seq_len": 1024,
        "image_dim": arch.image_dim, "added_kv_proj_dim": arch.dim if arch.image_dim else None,
        "pos_embed_seq_len": arch.image_tokens if arch.image_positions else None,
    }  # fmt: skip
    text_config = {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": text.dim, "d_ff": text.ffn_dim,
        "d_kv": text.attention_dim // text.num_heads, "num_heads": text.num_heads, "num_layers": text.num_layers,
        "vocab_size": text.vocab_size, "relative_attention_num_buckets": text.num_buckets,
        "relative_attention_max_distance": text.max_distance, "layer_norm_epsilon": text.eps,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    vae_config = {
        "_class_name": "AutoencoderKLWan", "base_dim": vae.base_dim, "z_dim": vae.z_dim, "dim_mult": vae.dim_mult,
        "num_res_blocks": vae.num_res_blocks, "attn_scales": [], "temperal_downsample": vae.temporal_downsample, "dropout": 0.0,
        "latents_mean": vae.latents_mean, "latents_std": vae.latents_std, "decoder_base_dim": vae.decoder_base_dim,
        "is_residual": vae.residual_levels, "patch_size": vae.patch_size if vae.patch_size > 1 else None,
        "in_channels": 3 * vae.patch_size**2, "out_channels": 3 * vae.patch_size**2,
        "scale_factor_spatial": vae.spatial_stride, "scale_factor_temporal": vae.temporal_stride,
    }  # fmt: skip
    transformer_names = transformer_diffusers_names(arch)
    for index, place in enumerate(("transformer", "transformer_2")[: model.experts]):
        tensors = transformer_weights(arch, seed=model.seed, expert=index)
        _write_network(folder / place, transformer_config, _renamed(tensors, transformer_names))
    _write_network(folder / "vae", vae_config, _renamed(vae_weights(vae, seed=model.seed), vae_diffusers_names(vae)))
    tensors = _renamed(text_encoder_weights(text, seed=model.seed), text_encoder_diffusers_names(text))
    _write_network(folder / "text_encoder", text_config, tensors, "model.safetensors")
    if model.image_encoder is not None:
        _write_diffusers_image_encoder(folder, model.image_encoder, seed=model.seed)
    write_tokenizer(folder / "tokenizer")
    _write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "num_train_timesteps": 1000, "flow_shift": 3.0,
    })  # fmt: skip
    _write_json(folder / "model_index.json", {
        "_class_name": "WanImageToVideoPipeline" if model.takes_image else "WanPipeline",
        "boundary_ratio": model.boundary if model.experts == 2 else None, "expand_timesteps": arch.per_token_timesteps,
        **_image_parts(model),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if model.experts == 2 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    })  # fmt: skip


def _write_diffusers_image_encoder(folder: Path, arch: ImageEncoderArch, *, seed: int) -> None:
    config = {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": arch.dim,
        "intermediate_size": arch.ffn_dim, "num_attention_heads": arch.num_heads, "num_hidden_layers": arch.num_layers,
        "image_size": arch.image_size, "patch_size": arch.patch_size, "layer_norm_eps": arch.eps,
        "hidden_act": "quick_gelu" if arch.quick_gelu else "gelu",
    }  # fmt: skip
    _write_network(folder / "image_encoder", config, image_encoder_weights(arch, seed=seed), "model.safetensors")
    _write_json(folder / "image_processor" / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": arch.image_size},
        "crop_size": {"height": arch.image_size, "width": arch.image_size}, "resample": 3, "rescale_factor": 1 / 255,
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD,
    })  # fmt: skip


def _image_parts(model: ToyModel) -> dict[str, Any]:
    """What the index of a `WanImageToVideoPipeline` names beside a `WanPipeline`'s parts."""
    if not model.takes_image:
        return {}
    there = model.image_encoder is not None
    return {
        "image_encoder": ["transformers", "CLIPVisionModel"] if there else [None, None],
        "image_processor": ["transformers", "CLIPImageProcessor"] if there else [None, None],
    }


def _model_type(model: ToyModel) -> str:
    if model.transformer.per_token_timesteps:
        return "ti2v"
    if model.takes_image:
        return "flf2v" if model.transformer.image_positions else "i2v"
    return "t2v"


_WRITERS = {Layout.ORIGINAL: _write_original, Layout.DIFFUSERS: _write_diffusers}


def _renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    return {names[name]: tensor for name, tensor in tensors.items()}


def _write_network(folder: Path, config: dict[str, Any], tensors: Tensors, file_name: str = _WEIGHTS_FILE) -> None:
    from safetensors.numpy import save_file

    _write_json(folder / _CONFIG_FILE, config)
    save_file(tensors, folder / file_name, metadata={"format": "pt"})


def _write_pth(path: Path, tensors: Tensors, *, bfloat16: bool) -> None:
    import torch

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    torch.save({name: torch.from_numpy(tensor).to(dtype) for name, tensor in tensors.items()}, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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
