"""Toy networks with random weights, of diffusers' and transformers' own classes, and a tokenizer to go with them.

Weights depend on the config and the seed alone. No parameter keeps a value that would make it invisible (a norm weight of 1, a zero
bias), and activations stay near unit size, so that comparisons are meaningful.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from export.layouts import image_encoder_diffusers_names, image_encoder_stored_names
from runtime.variants import VAE_2_2, ImageEncoderArch, TextEncoderArch, TransformerArch, VaeArch

SchedulerName = Literal["unipc", "dpmpp", "euler"]
TOY_WORDS = ("a", "the", "cat", "dog", "runs", "on", "grass", "red", "panda", "snow", "slow", "motion", "ing", "s", "er", "th")
_TOY_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-&/%猫走在雪é"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig:
    """Sizes of a toy model. The VAE keeps 16 latent channels, since an original VAE's latent statistics are not in its file."""

    num_heads: int = 2
    head_dim: int = 24
    ffn_dim: int = 80
    num_layers: int = 2
    freq_dim: int = 32
    eps: float = 1e-6
    in_channels: int = 16
    out_channels: int = 16
    per_token_timesteps: bool = False
    num_images: int = 0  # seen by the image branch; 0: neither branch nor image encoder; 2: with a table of positions
    clip_heads: int = 16  # an original CLIP file does not say how many
    clip_head_dim: int = 2
    clip_ffn_dim: int = 44
    clip_layers: int = 3
    clip_image_size: int = 28
    clip_patch_size: int = 7
    clip_quick_gelu: bool = False
    text_dim: int = 32
    text_heads: int = 4
    text_head_dim: int = 8
    text_ffn_dim: int = 48
    text_layers: int = 2
    num_buckets: int = 32
    vae_base_dim: int = 8
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    vae_2_2: bool = False
    """A VAE like TI2V-5B's: 48 latent channels, a decoder of another width, residual levels, squares of 2x2 pixels."""

    @property
    def transformer(self) -> TransformerArch:
        """The transformer's numbers as the project's own type."""
        return TransformerArch(
            dim=self.num_heads * self.head_dim,
            ffn_dim=self.ffn_dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            text_dim=self.text_dim,
            freq_dim=self.freq_dim,
            eps=self.eps,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            image_dim=None if self.image_encoder is None else self.image_encoder.dim,
            image_tokens=0 if self.image_encoder is None else self.num_images * self.image_encoder.num_tokens,
            image_positions=self.num_images > 1,
            per_token_timesteps=self.per_token_timesteps,
        )

    @property
    def image_encoder(self) -> ImageEncoderArch | None:
        """The image encoder's numbers as the project's own type."""
        if self.num_images == 0:
            return None
        return ImageEncoderArch(
            dim=self.clip_heads * self.clip_head_dim,
            ffn_dim=self.clip_ffn_dim,
            num_heads=self.clip_heads,
            num_layers=self.clip_layers,
            image_size=self.clip_image_size,
            patch_size=self.clip_patch_size,
            quick_gelu=self.clip_quick_gelu,
        )

    @property
    def text_encoder(self) -> TextEncoderArch:
        """The text encoder's numbers as the project's own type."""
        return TextEncoderArch(
            dim=self.text_dim,
            attention_dim=self.text_heads * self.text_head_dim,
            ffn_dim=self.text_ffn_dim,
            num_heads=self.text_heads,
            num_layers=self.text_layers,
            vocab_size=len(toy_vocabulary()) + 5,  # like UMT5's, the table has rows no token uses
            num_buckets=self.num_buckets,
        )

    @property
    def vae(self) -> VaeArch:
        """The VAE's numbers as the project's own type."""
        published = replace(VAE_2_2, decoder_base_dim=self.vae_base_dim * 3 // 2) if self.vae_2_2 else VaeArch()
        return replace(
            published,
            base_dim=self.vae_base_dim,
            dim_mult=self.dim_mult,
            num_res_blocks=self.num_res_blocks,
            temporal_downsample=self.temporal_downsample,
        )


TOY = ToyConfig()
WIDE_TOY = ToyConfig(
    num_heads=3, head_dim=28, ffn_dim=100, num_layers=1, freq_dim=48, text_dim=40, text_heads=3, text_head_dim=16
)
DEEP_TOY = ToyConfig(num_heads=5, head_dim=12, ffn_dim=52, num_layers=4, text_layers=3, num_buckets=16, vae_base_dim=12)
NARROW_TOY = ToyConfig(
    num_heads=1,
    head_dim=16,
    ffn_dim=36,
    num_layers=3,
    text_dim=20,
    text_heads=5,
    text_head_dim=6,
    text_layers=1,
    num_res_blocks=1,
)
TOYS = {"toy": TOY, "wide": WIDE_TOY, "deep": DEEP_TOY, "narrow": NARROW_TOY}


def make_transformer(config: ToyConfig, *, seed: int) -> WanTransformer3DModel:
    """A toy diffusion transformer."""
    arch = config.transformer
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
        image_dim=arch.image_dim,
        added_kv_proj_dim=None if arch.image_dim is None else arch.dim,
        pos_embed_seq_len=arch.image_tokens if arch.image_positions else None,
    )
    _randomise(network, seed=seed)
    return network


def make_image_encoder(config: ToyConfig, *, seed: int) -> CLIPVisionModel:
    """A toy CLIP image encoder, whole: with the layer and the norm that Wan does not use."""
    arch = config.image_encoder
    assert arch is not None
    network = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=arch.dim,
            intermediate_size=arch.ffn_dim,
            num_hidden_layers=arch.num_layers,
            num_attention_heads=arch.num_heads,
            image_size=arch.image_size,
            patch_size=arch.patch_size,
            hidden_act="quick_gelu" if arch.quick_gelu else "gelu",
            layer_norm_eps=arch.eps,
        )
    )
    _randomise(network, seed=seed + 3000)
    return network


def original_image_encoder_tensors(network: CLIPVisionModel, arch: ImageEncoderArch) -> dict[str, torch.Tensor]:
    """The network's tensors as the original repositories' file has them, with one each of those that Wan does not use."""
    state, diffusers_names = network.state_dict(), image_encoder_diffusers_names(arch)
    tensors: dict[str, torch.Tensor] = {
        "log_scale": torch.tensor(4.6),
        "textual.norm.weight": torch.ones(6),
        "visual.head": torch.ones(arch.dim, 6),
        "visual.post_norm.weight": state["post_layernorm.weight"],
        f"visual.transformer.{arch.num_blocks}.attn.proj.bias": torch.ones(arch.dim),
    }
    for stored, names in image_encoder_stored_names(arch).items():
        if stored.startswith("visual."):
            parts = [state[diffusers_names[name]] for name in ((names,) if isinstance(names, str) else names)]
            tensors[stored] = torch.cat(parts)
    tensors["visual.cls_embedding"] = tensors["visual.cls_embedding"][None, None]
    tensors["visual.pos_embedding"] = tensors["visual.pos_embedding"][None]
    return tensors


def make_text_encoder(config: ToyConfig, *, seed: int) -> UMT5EncoderModel:
    """A toy UMT5 encoder."""
    arch = config.text_encoder
    network = UMT5EncoderModel(
        UMT5Config(
            vocab_size=arch.vocab_size,
            d_model=arch.dim,
            d_kv=config.text_head_dim,
            d_ff=arch.ffn_dim,
            num_layers=arch.num_layers,
            num_heads=arch.num_heads,
            relative_attention_num_buckets=arch.num_buckets,
            relative_attention_max_distance=arch.max_distance,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    _randomise(network, seed=seed + 1000)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                parameter.div_(math.sqrt(config.text_head_dim))  # UMT5 does not scale its attention logits
    return network


def make_vae(config: ToyConfig, *, seed: int) -> AutoencoderKLWan:
    """A toy VAE, encoder and decoder, with the published latent statistics."""
    arch = config.vae
    channels = 3 * arch.patch_size**2
    network = AutoencoderKLWan(
        base_dim=arch.base_dim,
        decoder_base_dim=arch.decoder_base_dim,
        z_dim=arch.z_dim,
        dim_mult=list(arch.dim_mult),
        num_res_blocks=arch.num_res_blocks,
        temperal_downsample=list(arch.temporal_downsample),
        latents_mean=list(arch.latents_mean),
        latents_std=list(arch.latents_std),
        is_residual=arch.residual_levels,
        in_channels=channels,
        out_channels=channels,
        patch_size=arch.patch_size if arch.patch_size > 1 else None,
        scale_factor_temporal=arch.temporal_stride,
        scale_factor_spatial=arch.spatial_stride,
    )
    _randomise(network, seed=seed + 2000)
    return network


def make_scheduler(name: SchedulerName, *, flow_shift: float) -> Any:
    """One of the three solvers diffusers offers for Wan, set up for flow matching."""
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=flow_shift)
    solver = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    return solver(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A small Unigram tokenizer set up as UMT5's: pad 0, `</s>` 1 appended, unk 2, bytes for unknown characters."""
    tokenizer = Tokenizer(Unigram(toy_vocabulary(), unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def toy_vocabulary() -> list[tuple[str, float]]:
    """Piece and score of every token: three special ones, all bytes, some words, single characters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    raw_bytes = [(f"<0x{value:02X}>", -20.0) for value in range(256)]
    whole = [(f"▁{word}", -3.0 - 0.1 * rank) for rank, word in enumerate(TOY_WORDS)]
    inner = [(word, -5.0 - 0.1 * rank) for rank, word in enumerate(TOY_WORDS) if len(word) > 1]
    characters = [("▁", -4.0), *((character, -8.0 - 0.01 * rank) for rank, character in enumerate(_TOY_CHARACTERS))]
    return special + raw_bytes + whole + inner + characters


def _randomise(network: nn.Module, *, seed: int) -> None:
    """Give every parameter a random value fit for its role, from one generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif name.endswith("gamma") or parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "scale_shift_table" in name or "relative_attention_bias" in name:
                parameter.copy_(0.3 * noise)
            elif "shared" in name or "embed_tokens" in name or "pos_embed" in name or "position_embedding" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
    network.eval().requires_grad_(False)
