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


class TimeEmbed(nn.Module):
    """Sinusoid of the timestep [1, freq_dim] → temb [1, D] and the six modulation rows [6, D] shared by all blocks."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(arch.freq_dim, arch.dim), nn.SiLU(), nn.Linear(arch.dim, arch.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(arch.dim, 6 * arch.dim))

    def forward(self, timestep_features: Tensor) -> tuple[Tensor, Tensor]:
        temb = self.time_embedding(timestep_features)
        return temb, self.time_projection(temb).view(6, -1)


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
        self.modulation = nn.Parameter(torch.empty(6, arch.dim))
        self.self_attn = nn.ModuleDict(
            {"qkv": Linear(arch.dim, 3 * arch.dim), "norm_q": _qk_norm(arch), "norm_k": _qk_norm(arch)}
        )

    def forward(
        self, hidden_states: Tensor, time_modulation: Tensor, rope_cos: Tensor, rope_sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # rows: shift, scale and gate of the attention, then of the FFN
        shift, scale = (self.modulation + time_modulation)[:2].chunk(2)
        normed = op.ada_layer_norm(hidden_states, shift, scale, eps=self.eps)
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
    """Output projection, gated residual, cross-attention and FFN: everything of a block after its self-attention."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.eps, self.num_heads = arch.eps, arch.num_heads
        self.modulation = nn.Parameter(torch.empty(6, arch.dim))
        self.self_attn = nn.ModuleDict({"o": Linear(arch.dim, arch.dim)})
        self.norm3 = nn.LayerNorm(arch.dim, eps=arch.eps)
        self.cross_attn = nn.ModuleDict(
            {"q": Linear(arch.dim, arch.dim), "norm_q": _qk_norm(arch), "o": Linear(arch.dim, arch.dim)}
        )
        self.ffn = nn.Sequential(LinearGelu(arch.dim, arch.ffn_dim), nn.Identity(), Linear(arch.ffn_dim, arch.dim))

    def forward(
        self, hidden_states: Tensor, attention_output: Tensor, time_modulation: Tensor, text_key: Tensor, text_value: Tensor
    ) -> Tensor:
        gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time_modulation)[2:].chunk(4)
        x = op.gated_residual(hidden_states, self.self_attn["o"](attention_output), gate)
        query = self.cross_attn["norm_q"](self.cross_attn["q"](self.norm3(x)))
        cross = op.attention(query, text_key, text_value, num_heads=self.num_heads)
        x = x + self.cross_attn["o"](cross)  # cross-attention has no gate
        normed = op.ada_layer_norm(x, ffn_shift, ffn_scale, eps=self.eps)
        return op.gated_residual(x, self.ffn(normed), ffn_gate)


class Head(nn.Module):
    """Final modulated norm and projection to patches [N, C·p]; modulated by temb itself, not by its projection."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.eps = arch.eps
        self.head = _HeadWeights(arch)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        shift, scale = (self.head.modulation + temb).chunk(2)
        normed = op.ada_layer_norm(hidden_states, shift, scale, eps=self.eps)
        return self.head.head.forward(normed)


class _HeadWeights(nn.Module):
    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(2, arch.dim))
        self.head = Linear(arch.dim, arch.out_channels * arch.patch_volume)


def _qk_norm(arch: TransformerArch) -> QKNorm:
    return QKNorm(arch.dim, num_heads=arch.num_heads, eps=arch.eps)


TRANSFORMER_MODULES: dict[str, type[nn.Module]] = {
    "transformer.text_embed": TextEmbed,
    "transformer.text_kv": TextKV,
    "transformer.time_embed": TimeEmbed,
    "transformer.embed": Embed,
    "transformer.block_in": BlockIn,
    "transformer.attention": Attention,
    "transformer.block_out": BlockOut,
    "transformer.head": Head,
}
