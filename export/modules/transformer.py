"""The diffusion transformer, cut into the stages that `runtime.stages.transformer` declares.

Parameter names are the names inside the bundle (fused where the stage fuses them). Formulas: Wan-Video/Wan2.2 `wan/modules/model.py`
(42bf4cfa); checked against diffusers' `WanTransformer3DModel`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from export import functions as op
from runtime.variants import TransformerArch


class TextEmbed(nn.Module):
    """Prompt embeddings, zero-padded to text_len → context: [text_len, text_dim] → [text_len, D]."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.text_embedding = nn.ModuleDict({"0": nn.Linear(arch.text_dim, arch.dim), "2": nn.Linear(arch.dim, arch.dim)})

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        first, second = self.text_embedding["0"], self.text_embedding["2"]
        return op.linear(op.linear_gelu(encoder_hidden_states, first.weight, first.bias), second.weight, second.bias)


class TextKV(nn.Module):
    """One block's cross-attention keys and values of the context, constant over the denoising loop."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.eps = arch.eps
        self.cross_attn = nn.ModuleDict({"kv": nn.Linear(arch.dim, 2 * arch.dim), "norm_k": _Gain(arch.dim)})

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        kv = self.cross_attn["kv"]
        key, value = op.linear(context, kv.weight, kv.bias).chunk(2, dim=-1)
        return op.qk_norm(key, self.cross_attn["norm_k"].weight, eps=self.eps), value


class TimeEmbed(nn.Module):
    """Sinusoid of the timestep [1, freq_dim] → temb [1, D] and the six modulation rows [6, D] shared by all blocks."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.time_embedding = nn.ModuleDict({"0": nn.Linear(arch.freq_dim, arch.dim), "2": nn.Linear(arch.dim, arch.dim)})
        self.time_projection = nn.ModuleDict({"1": nn.Linear(arch.dim, 6 * arch.dim)})

    def forward(self, timestep_features: Tensor) -> tuple[Tensor, Tensor]:
        temb = self.time_embedding["2"](functional.silu(self.time_embedding["0"](timestep_features)))
        time_modulation = self.time_projection["1"](functional.silu(temb)).view(6, -1)
        return temb, time_modulation


class Embed(nn.Module):
    """Flattened patches [N, C·p] → hidden states [N, D]: the patch convolution, whose stride equals its kernel, as a product."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(arch.in_channels * arch.patch_volume, arch.dim)

    def forward(self, patches: Tensor) -> Tensor:
        return op.linear(patches, self.patch_embedding.weight, self.patch_embedding.bias)


class BlockIn(nn.Module):
    """Modulated norm, QKV, QK norm and RoPE: everything of a block before its self-attention."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.arch = arch
        self.modulation = nn.Parameter(torch.empty(6, arch.dim))
        self.self_attn = nn.ModuleDict(
            {"qkv": nn.Linear(arch.dim, 3 * arch.dim), "norm_q": _Gain(arch.dim), "norm_k": _Gain(arch.dim)}
        )

    def forward(
        self, hidden_states: Tensor, time_modulation: Tensor, rope_cos: Tensor, rope_sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        eps, num_heads = self.arch.eps, self.arch.num_heads
        shift, scale = (self.modulation + time_modulation)[:2].chunk(2)  # rows: shift, scale, gate of attention; then of the FFN
        qkv = self.self_attn["qkv"]
        normed = op.ada_layer_norm(hidden_states, shift, scale, eps=eps)
        query, key, value = op.linear(normed, qkv.weight, qkv.bias).chunk(3, dim=-1)
        norm_q, norm_k = self.self_attn["norm_q"].weight, self.self_attn["norm_k"].weight
        return (
            op.qk_norm_rope(query, norm_q, rope_cos, rope_sin, num_heads=num_heads, eps=eps),
            op.qk_norm_rope(key, norm_k, rope_cos, rope_sin, num_heads=num_heads, eps=eps),
            value,
        )


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
        self.arch = arch
        self.modulation = nn.Parameter(torch.empty(6, arch.dim))
        self.self_attn = nn.ModuleDict({"o": nn.Linear(arch.dim, arch.dim)})
        self.norm3 = nn.LayerNorm(arch.dim, eps=arch.eps)
        self.cross_attn = nn.ModuleDict(
            {"q": nn.Linear(arch.dim, arch.dim), "norm_q": _Gain(arch.dim), "o": nn.Linear(arch.dim, arch.dim)}
        )
        self.ffn = nn.ModuleDict({"0": nn.Linear(arch.dim, arch.ffn_dim), "2": nn.Linear(arch.ffn_dim, arch.dim)})

    def forward(
        self, hidden_states: Tensor, attention_output: Tensor, time_modulation: Tensor, text_key: Tensor, text_value: Tensor
    ) -> Tensor:
        eps, num_heads = self.arch.eps, self.arch.num_heads
        gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time_modulation)[2:].chunk(4)
        self_o, cross_q, cross_o = self.self_attn["o"], self.cross_attn["q"], self.cross_attn["o"]
        ffn_in, ffn_out = self.ffn["0"], self.ffn["2"]
        x = op.gated_residual(hidden_states, op.linear(attention_output, self_o.weight, self_o.bias), gate)
        query = op.qk_norm(op.linear(self.norm3(x), cross_q.weight, cross_q.bias), self.cross_attn["norm_q"].weight, eps=eps)
        cross = op.attention(query, text_key, text_value, num_heads=num_heads)
        x = x + op.linear(cross, cross_o.weight, cross_o.bias)  # cross-attention has no gate
        normed = op.ada_layer_norm(x, ffn_shift, ffn_scale, eps=eps)
        ffn = op.linear(op.linear_gelu(normed, ffn_in.weight, ffn_in.bias), ffn_out.weight, ffn_out.bias)
        return op.gated_residual(x, ffn, ffn_gate)


class Head(nn.Module):
    """Final modulated norm and projection to patches [N, C·p]; modulated by temb itself, not by its projection."""

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.eps = arch.eps
        self.head = _HeadWeights(arch)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        shift, scale = (self.head.modulation + temb).chunk(2)
        normed = op.ada_layer_norm(hidden_states, shift, scale, eps=self.eps)
        return op.linear(normed, self.head.head.weight, self.head.head.bias)


class _HeadWeights(nn.Module):
    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(2, arch.dim))
        self.head = nn.Linear(arch.dim, arch.out_channels * arch.patch_volume)


class _Gain(nn.Module):
    """Holds the weight of an RMS norm that a fused operator applies."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))


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
