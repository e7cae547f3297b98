"""The configs of a diffusers checkpoint folder of any architecture; its weights and its tokenizer are written by others."""

import json
from pathlib import Path
from typing import Any

from runtime.variants import ImageEncoderArch, TextEncoderArch, TransformerArch, VaeArch

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS_FILE = "model.safetensors"  # of the networks that are the package transformers'
TRANSFORMERS = ("transformer", "transformer_2")
"""Folders of the experts, the high-noise one's first."""
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write_diffusers_configs(
    folder: Path,
    *,
    transformer: TransformerArch,
    text_encoder: TextEncoderArch,
    image_encoder: ImageEncoderArch | None,
    vae: VaeArch,
    experts: int,
    boundary: float,
    shift: float,
) -> None:
    """Write everything but weights and tokenizer.

    Args:
        experts: one or two, of the same architecture.
        boundary: between two experts, of 1.
        shift: of the flow's sigmas.
    """
    for place in TRANSFORMERS[:experts]:
        write_json(folder / place / CONFIG_FILE, _transformer(transformer))
    write_json(folder / "text_encoder" / CONFIG_FILE, _text_encoder(text_encoder))
    write_json(folder / "vae" / CONFIG_FILE, _vae(vae))
    if image_encoder is not None:
        write_json(folder / "image_encoder" / CONFIG_FILE, _image_encoder(image_encoder))
        write_json(folder / "image_processor" / "preprocessor_config.json", _image_processor(image_encoder))
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "num_train_timesteps": 1000, "flow_shift": shift,
    })  # fmt: skip
    write_json(folder / "model_index.json", {
        "_class_name": "WanImageToVideoPipeline" if takes_image(transformer) else "WanPipeline",
        "boundary_ratio": boundary if experts == 2 else None, "expand_timesteps": transformer.per_token_timesteps,
        **(_image_parts(image_encoder) if takes_image(transformer) else {}),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if experts == 2 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    })  # fmt: skip


def takes_image(arch: TransformerArch) -> bool:
    """Whether an image's mask and latents join the noisy latents."""
    return arch.in_channels > arch.out_channels


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a config, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _transformer(arch: TransformerArch) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel", "patch_size": arch.patch_size, "num_attention_heads": arch.num_heads,
        "attention_head_dim": arch.head_dim, "in_channels": arch.in_channels, "out_channels": arch.out_channels,
        "text_dim": arch.text_dim, "freq_dim": arch.freq_dim, "ffn_dim": arch.ffn_dim, "num_layers": arch.num_layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": arch.eps, "rope_max_seq_len": 1024,
        "image_dim": arch.image_dim, "added_kv_proj_dim": arch.dim if arch.image_dim else None,
        "pos_embed_seq_len": arch.image_tokens if arch.image_positions else None,
    }  # fmt: skip


def _text_encoder(arch: TextEncoderArch) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": arch.dim, "d_ff": arch.ffn_dim,
        "d_kv": arch.attention_dim // arch.num_heads, "num_heads": arch.num_heads, "num_layers": arch.num_layers,
        "vocab_size": arch.vocab_size, "relative_attention_num_buckets": arch.num_buckets,
        "relative_attention_max_distance": arch.max_distance, "layer_norm_epsilon": arch.eps,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip


def _vae(arch: VaeArch) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKLWan", "base_dim": arch.base_dim, "z_dim": arch.z_dim, "dim_mult": arch.dim_mult,
        "num_res_blocks": arch.num_res_blocks, "attn_scales": [], "temperal_downsample": arch.temporal_downsample, "dropout": 0.0,
        "latents_mean": arch.latents_mean, "latents_std": arch.latents_std, "decoder_base_dim": arch.decoder_base_dim,
        "is_residual": arch.residual_levels, "patch_size": arch.patch_size if arch.patch_size > 1 else None,
        "in_channels": 3 * arch.patch_size**2, "out_channels": 3 * arch.patch_size**2,
        "scale_factor_spatial": arch.spatial_stride, "scale_factor_temporal": arch.temporal_stride,
    }  # fmt: skip


def _image_encoder(arch: ImageEncoderArch) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": arch.dim,
        "intermediate_size": arch.ffn_dim, "num_attention_heads": arch.num_heads, "num_hidden_layers": arch.num_layers,
        "image_size": arch.image_size, "patch_size": arch.patch_size, "layer_norm_eps": arch.eps,
        "hidden_act": "quick_gelu" if arch.quick_gelu else "gelu",
    }  # fmt: skip


def _image_processor(arch: ImageEncoderArch) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": arch.image_size},
        "crop_size": {"height": arch.image_size, "width": arch.image_size}, "resample": 3, "rescale_factor": 1 / 255,
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD,
    }  # fmt: skip


def _image_parts(image_encoder: ImageEncoderArch | None) -> dict[str, Any]:
    """What the index of a `WanImageToVideoPipeline` names beside a `WanPipeline`'s parts."""
    there = image_encoder is not None
    return {
        "image_encoder": ["transformers", "CLIPVisionModel"] if there else [None, None],
        "image_processor": ["transformers", "CLIPImageProcessor"] if there else [None, None],
    }
