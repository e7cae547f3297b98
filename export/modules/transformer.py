"""The diffusion transformer, cut into the stages that `runtime.stages.transformer` declares.

Parameter names are the names inside the bundle (fused where the stage fuses them). Formulas: Wan-Video/Wan2.2 `wan/modules/model.py`
(42bf4cfa); checked against diffusers' `WanTransformer3DModel`.
"""

import torch
from torch import Tensor, nn

from export import functions as op
from export.modules.layers import Linear, LinearGelu, QKNorm
from runtime.variants import TransformerArch


class TextEmbed(nn.Module):
    """Prompt embeddings, zero-padded to text_len → context: [text_len, text_dim] → [text_len, D]."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.text_embedding = nn.Sequential(LinearGelu(arch.text_dim, arch.dim), nn.Identity(), Linear(arch.dim, arch.dim))

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        context: Tensor = self.text_embedding(encoder_hidden_states)
        return context


class TextKV(nn.Module):
    """One block's cross-attention keys and values of the context, constant over the denoising loop."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.cross_attn = nn.ModuleDict({"kv": Linear(arch.dim, 2 * arch.dim), "norm_k": _qk_norm(arch)})

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.cross_attn["kv"](context).chunk(2, dim=-1)
        return self.cross_attn["norm_k"](key), value


class ImageEmbed(nn.Module):
    """Features of the image encoder → context of the image: [image_tokens, image_dim] → [image_tokens, D].

    Both norms have torch's default epsilon, not the transformer's (Wan-Video/Wan2.1 `MLPProj`, 9737cba9).
    """

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.img_emb = _ImageEmbedding(arch)

    def forward(self, encoder_hidden_states_image: Tensor) -> Tensor:
        return self.img_emb.forward(encoder_hidden_states_image)


class _ImageEmbedding(nn.Module):
    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        assert arch.image_dim is not None
        self.emb_pos = nn.Parameter(torch.empty(arch.image_tokens, arch.image_dim)) if arch.image_positions else None
        self.proj = nn.Sequential(
            nn.LayerNorm(arch.image_dim),
            Linear(arch.image_dim, arch.image_dim),
            nn.GELU(),  # the exact one, unlike everywhere else in the transformer
            Linear(arch.image_dim, arch.dim),
            nn.LayerNorm(arch.dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        context: Tensor = self.proj(features if self.emb_pos is None else features + self.emb_pos)
        return context


class ImageKV(nn.Module):
    """One block's cross-attention keys and values of the image, constant over the denoising loop."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.cross_attn = nn.ModuleDict({"kv_img": Linear(arch.dim, 2 * arch.dim), "norm_k_img": _qk_norm(arch)})

    def forward(self, image_context: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.cross_attn["kv_img"](image_context).chunk(2, dim=-1)
        return self.cross_attn["norm_k_img"](key), value


class TimeEmbed(nn.Module):
    """Sinusoid of the timestep [1, freq_dim] → temb [1, D] and the six modulation rows [6, D] shared by all blocks.

    With timesteps per token both have two rows, of a clean token and of any other: [2, freq_dim] → [2, D] and [2, 6·D].
    """

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.per_token = arch.per_token_timesteps
        self.time_embedding = nn.Sequential(nn.Linear(arch.freq_dim, arch.dim), nn.SiLU(), nn.Linear(arch.dim, arch.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(arch.dim, 6 * arch.dim))

    def forward(self, timestep_features: Tensor) -> tuple[Tensor, Tensor]:
        temb = self.time_embedding(timestep_features)
        projected = self.time_projection(temb)
        return temb, projected if self.per_token else projected.view(6, -1)


class Embed(nn.Module):
    """Flattened patches [N, C·p] → hidden states [N, D]: the patch convolution, whose stride equals its kernel, as a product."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.patch_embedding = Linear(arch.in_channels * arch.patch_volume, arch.dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.patch_embedding.forward(patches)


class BlockIn(nn.Module):
    """Modulated norm, QKV, QK norm and RoPE: everything of a block before its self-attention."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.eps = arch.eps
        # rows: shift, scale and gate of the attention, then of the FFN
        self.modulation = nn.Parameter(torch.empty(6, arch.dim))
        self.self_attn = nn.ModuleDict(
            {"qkv": Linear(arch.dim, 3 * arch.dim), "norm_q": _qk_norm(arch), "norm_k": _qk_norm(arch)}
        )

    def forward(
        self,
        hidden_states: Tensor,
        time_modulation: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        num_clean: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if num_clean is None:
            shift, scale = (self.modulation + time_modulation)[:2].chunk(2)
        else:
            shift, scale = _two_rows(self.modulation, time_modulation)[:2]
        normed = _norm(hidden_states, shift, scale, num_clean, eps=self.eps)
        query, key, value = self.self_attn["qkv"](normed).chunk(3, dim=-1)
        rope = rope_cos, rope_sin
        return self.self_attn["norm_q"](query, rope), self.self_attn["norm_k"](key, rope), value


class Attention(nn.Module):
    """Self-attention over all tokens; no weights."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.num_heads = arch.num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return op.attention(query, key, value, num_heads=self.num_heads)


class BlockOut(nn.Module):
    """Output projection, gated residual, cross-attention and FFN: everything of a block after its self-attention.

    Its last inputs are those the architecture has of: the image's keys and values, `num_clean`.
    """

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.has_image, self.per_token = arch.image_dim is not None, arch.per_token_timesteps
        self.eps, self.num_heads = arch.eps, arch.num_heads
        self.modulation = nn.Parameter(torch.empty(6, arch.dim))
        self.self_attn = nn.ModuleDict({"o": Linear(arch.dim, arch.dim)})
        self.norm3 = nn.LayerNorm(arch.dim, eps=arch.eps)
        self.cross_attn = nn.ModuleDict(
            {"q": Linear(arch.dim, arch.dim), "norm_q": _qk_norm(arch), "o": Linear(arch.dim, arch.dim)}
        )
        self.ffn = nn.Sequential(LinearGelu(arch.dim, arch.ffn_dim), nn.Identity(), Linear(arch.ffn_dim, arch.dim))

    def forward(
        self,
        hidden_states: Tensor,
        attention_output: Tensor,
        time_modulation: Tensor,
        text_key: Tensor,
        text_value: Tensor,
        *others: Tensor,
    ) -> Tensor:
        image = others[:2] if self.has_image else None
        num_clean = others[-1] if self.per_token else None
        if num_clean is None:
            gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time_modulation)[2:].chunk(4)
        else:
            gate, ffn_shift, ffn_scale, ffn_gate = _two_rows(self.modulation, time_modulation)[2:]
        x = _residual(hidden_states, self.self_attn["o"](attention_output), gate, num_clean)
        query = self.cross_attn["norm_q"](self.cross_attn["q"](self.norm3(x)))
        cross = op.attention(query, text_key, text_value, num_heads=self.num_heads)
        if image is not None:  # a softmax of its own, over the image's tokens alone
            cross = cross + op.attention(query, *image, num_heads=self.num_heads)
        x = x + self.cross_attn["o"](cross)  # cross-attention has no gate
        normed = _norm(x, ffn_shift, ffn_scale, num_clean, eps=self.eps)
        return _residual(x, self.ffn(normed), ffn_gate, num_clean)


class Head(nn.Module):
    """Final modulated norm and projection to patches [N, C·p]; modulated by temb itself, not by its projection."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.eps = arch.eps
        self.head = _HeadWeights(arch)

    def forward(self, hidden_states: Tensor, temb: Tensor, num_clean: Tensor | None = None) -> Tensor:
        if num_clean is None:
            shift, scale = (self.head.modulation + temb).chunk(2)
        else:
            shift, scale = (row + temb for row in self.head.modulation.chunk(2))
        normed = _norm(hidden_states, shift, scale, num_clean, eps=self.eps)
        return self.head.head.forward(normed)


class _HeadWeights(nn.Module):
    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(2, arch.dim))
        self.head = Linear(arch.dim, arch.out_channels * arch.patch_volume)


def _two_rows(modulation: Tensor, time_modulation: Tensor) -> tuple[Tensor, ...]:
    """The six entries of a block's table [6, D], each added to both rows of the time modulation [2, 6·D]: six of [2, D]."""
    return (modulation.view(1, -1) + time_modulation).chunk(6, dim=1)


def _norm(x: Tensor, shift: Tensor, scale: Tensor, num_clean: Tensor | None, *, eps: float) -> Tensor:
    if num_clean is None:
        return op.ada_layer_norm(x, shift, scale, eps=eps)
    return op.ada_layer_norm_by_row(x, shift, scale, num_clean, eps=eps)


def _residual(residual: Tensor, x: Tensor, gate: Tensor, num_clean: Tensor | None) -> Tensor:
    if num_clean is None:
        return op.gated_residual(residual, x, gate)
    return op.gated_residual_by_row(residual, x, gate, num_clean)


def _qk_norm(arch: TransformerArch) -> QKNorm:
    return QKNorm(arch.dim, num_heads=arch.num_heads, eps=arch.eps)


TRANSFORMER_MODULES: dict[str, type[nn.Module]] = {
    "transformer.text_embed": TextEmbed,
    "transformer.text_kv": TextKV,
    "transformer.image_embed": ImageEmbed,
    "transformer.image_kv": ImageKV,
    "transformer.time_embed": TimeEmbed,
    "transformer.embed": Embed,
    "transformer.block_in": BlockIn,
    "transformer.attention": Attention,
    "transformer.block_out": BlockOut,
    "transformer.head": Head,
}
