"""Toy Wan checkpoints, written as they are distributed.

`make_diffusers_checkpoint` saves a `WanPipeline` or, where images condition it, a `WanImageToVideoPipeline`;
`make_original_checkpoint` writes the same weights, tensor by tensor, in the layout of the original repositories. The networks in
them are those of `tests.toy_networks`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from export.layouts import text_encoder_diffusers_names, transformer_diffusers_names, vae_diffusers_names
from tests.toy_networks import (
    DEEP_TOY,
    NARROW_TOY,
    TOY,
    TOYS,
    WIDE_TOY,
    SchedulerName,
    ToyConfig,
    make_image_encoder,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
    original_image_encoder_tensors,
)

__all__ = [
    "DEEP_TOY",
    "FIRST_LAST_TOY",
    "IMAGE_PAIR_TOY",
    "IMAGE_TOY",
    "IMAGE_TOYS",
    "NARROW_TOY",
    "TEXT_IMAGE_TOY",
    "TOY",
    "TOYS",
    "WIDE_TOY",
    "SchedulerName",
    "ToyConfig",
    "edit_json",
    "edit_tensors",
    "make_diffusers_checkpoint",
    "make_original_checkpoint",
    "make_scheduler",
    "make_text_encoder",
    "make_tokenizer",
    "make_transformer",
    "make_vae",
    "original_tensors",
]


IMAGE_TOY = ToyConfig(
    in_channels=36, num_images=1, vae_base_dim=4, num_res_blocks=1, dim_mult=(1, 2, 2), temporal_downsample=(True, True)
)
"""Like Wan2.1 I2V: an image's mask and latents as further channels, and its CLIP features."""
FIRST_LAST_TOY = replace(IMAGE_TOY, num_images=2, head_dim=16, clip_layers=2)
IMAGE_PAIR_TOY = replace(IMAGE_TOY, num_images=0, num_layers=1)
"""Like a transformer of Wan2.2 I2V-A14B: no CLIP."""
TEXT_IMAGE_TOY = replace(IMAGE_TOY, in_channels=48, out_channels=48, num_images=0, per_token_timesteps=True, vae_2_2=True)
IMAGE_TOYS = {"i2v": IMAGE_TOY, "flf2v": FIRST_LAST_TOY, "i2v-a14b": IMAGE_PAIR_TOY, "ti2v": TEXT_IMAGE_TOY}


def make_diffusers_checkpoint(
    folder: Path,
    *,
    config: ToyConfig = TOY,
    seed: int = 0,
    experts: Literal[1, 2] = 1,
    boundary_ratio: float = 0.875,
    scheduler: SchedulerName = "unipc",
    flow_shift: float = 3.0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a toy pipeline into `folder`, which its class's `from_pretrained` reads; returns `folder`."""
    transformers = [make_transformer(config, seed=seed + expert).to(dtype) for expert in range(experts)]
    image_options: dict[str, Any] = {}
    if config.num_images:
        side = config.clip_image_size
        image_options["image_encoder"] = make_image_encoder(config, seed=seed).to(dtype)
        image_options["image_processor"] = CLIPImageProcessorPil(size=side, crop_size=side)
    takes_image = config.in_channels > config.out_channels
    pipeline = (WanImageToVideoPipeline if takes_image else WanPipeline)(
        tokenizer=make_tokenizer(),
        text_encoder=make_text_encoder(config, seed=seed).to(dtype),
        vae=make_vae(config, seed=seed).to(dtype),
        scheduler=make_scheduler(scheduler, flow_shift=flow_shift),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=boundary_ratio if experts == 2 else None,
        expand_timesteps=config.per_token_timesteps,
        **image_options,
    )
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_original_checkpoint(
    folder: Path,
    *,
    config: ToyConfig = TOY,
    seed: int = 0,
    experts: Literal[1, 2] = 1,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    shard_suffix: str = "",
    safetensors_only: bool = False,
    wrap_vae: bool = False,
) -> Path:
    """Write the weights of `make_diffusers_checkpoint` with the same config and seed as the original repositories do.

    Args:
        num_shards: safetensors files of each transformer; more than one comes with an index.
        shard_suffix: what the shards' names end in, such as `-bf16`.
        safetensors_only: text encoder and VAE as safetensors, too, in place of `.pth`.
        wrap_vae: put the VAE's tensors under `model_state` in its `.pth`.
    """
    for expert, name in enumerate(("",) if experts == 1 else ("high_noise_model", "low_noise_model")):
        network = make_transformer(config, seed=seed + expert).to(dtype)
        tensors = original_tensors(network, transformer_diffusers_names(config.transformer))
        _write_transformer(folder / name, config, tensors, num_shards=num_shards, shard_suffix=shard_suffix)
    text_encoder = original_tensors(
        make_text_encoder(config, seed=seed).to(dtype), text_encoder_diffusers_names(config.text_encoder)
    )
    vae = original_tensors(make_vae(config, seed=seed).to(dtype), vae_diffusers_names(config.vae))
    vae_name = "Wan2.2_VAE" if config.vae_2_2 else "Wan2.1_VAE"
    if safetensors_only:
        save_file(text_encoder, folder / "models_t5_umt5-xxl-enc-bf16.safetensors")
        save_file(vae, folder / f"{vae_name}.safetensors")
    else:
        torch.save(text_encoder, folder / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save({"model_state": vae} if wrap_vae else vae, folder / f"{vae_name}.pth")
    if config.image_encoder is not None:
        clip = original_image_encoder_tensors(make_image_encoder(config, seed=seed).to(dtype), config.image_encoder)
        torch.save(clip, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    make_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return folder


def original_tensors(network: nn.Module, diffusers_names: Mapping[str, str]) -> dict[str, Tensor]:
    """The network's tensors under their original names."""
    state = network.state_dict()
    return {original: state[name].contiguous() for original, name in diffusers_names.items()}


def edit_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file; `edit` alters the dictionary it is given."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def _model_type(config: ToyConfig) -> str:
    if config.per_token_timesteps:
        return "ti2v"
    if config.in_channels > config.out_channels:
        return "flf2v" if config.num_images == 2 else "i2v"
    return "t2v"


def _write_transformer(
    folder: Path, config: ToyConfig, tensors: Mapping[str, Tensor], *, num_shards: int, shard_suffix: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arch = config.transformer
    settings = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": arch.dim,
        "eps": arch.eps,
        "ffn_dim": arch.ffn_dim,
        "freq_dim": arch.freq_dim,
        "in_dim": arch.in_channels,
        "model_type": _model_type(config),
        "num_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "out_dim": arch.out_channels,
        "text_len": arch.text_len,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    if num_shards == 1:
        save_file(dict(tensors), folder / f"diffusion_pytorch_model{shard_suffix}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{num_shards:05d}{shard_suffix}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
