"""Toy networks with random weights, of diffusers' and transformers' own classes, and a tokenizer to go with them.

Weights depend on the config and the seed alone. No parameter keeps a value that would make it invisible (a norm weight of 1, a zero
bias), and activations stay near unit size, so that comparisons are meaningful.
"""

import math
from dataclasses import dataclass
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
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from runtime.variants import TextEncoderArch, TransformerArch, VaeArch

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
        return VaeArch(
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
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
    )
    _randomise(network, seed=seed)
    return network


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
    network = AutoencoderKLWan(
        base_dim=arch.base_dim,
        z_dim=arch.z_dim,
        dim_mult=list(arch.dim_mult),
        num_res_blocks=arch.num_res_blocks,
        temperal_downsample=list(arch.temporal_downsample),
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
            elif "shared" in name or "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
    network.eval().requires_grad_(False)
