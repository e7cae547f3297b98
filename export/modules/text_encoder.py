"""The UMT5 text encoder, cut into the stages that `runtime.stages.text_encoder` declares.

Parameter names are the names inside the bundle (q, k and v fused). Formulas: Wan-Video/Wan2.2 `wan/modules/t5.py` (42bf4cfa);
checked against transformers' `UMT5EncoderModel`.
"""

import torch
from torch import Tensor, nn

from export.modules.layers import LinearNoBias
from runtime.variants import TextEncoderArch


class Block(nn.Module):
    """Self-attention and gated FFN over a prompt's real tokens: [S, dim] → [S, dim]."""

    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(arch.dim, eps=arch.eps)
        self.pos_embedding = _PositionBias(arch)
        self.attn = _SelfAttention(arch)
        self.norm2 = nn.RMSNorm(arch.dim, eps=arch.eps)
        self.ffn = _GatedFfn(arch)

    def forward(self, hidden_states: Tensor, position_buckets: Tensor) -> Tensor:
        x = hidden_states + self.attn.forward(self.norm1(hidden_states), self.pos_embedding(position_buckets))
        return x + self.ffn.forward(self.norm2(x))


class FinalNorm(nn.Module):
    """The norm after the last block: [S, dim] → prompt embeddings [S, dim]."""

    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(arch.dim, eps=arch.eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm.forward(hidden_states)


class _PositionBias(nn.Module):
    """The block's own table, looked up by bucket: [S, S] → [heads, S, S]."""

    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.embedding = nn.Embedding(arch.num_buckets, arch.num_heads)

    def forward(self, position_buckets: Tensor) -> Tensor:
        num_tokens = position_buckets.shape[0]  # len() would fix the number of tokens in the graph
        by_head = self.embedding.weight.t()  # [heads, buckets]: gathered along the row, nothing large is transposed
        return torch.index_select(by_head, 1, position_buckets.flatten()).view(-1, num_tokens, num_tokens)


class _SelfAttention(nn.Module):
    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.num_heads = arch.num_heads
        self.qkv = LinearNoBias(arch.dim, 3 * arch.attention_dim)
        self.o = LinearNoBias(arch.attention_dim, arch.dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = self.qkv.forward(x).view(x.shape[0], 3, self.num_heads, -1).permute(1, 2, 0, 3)
        scores = query @ key.transpose(1, 2) + bias  # [heads, S, S]; no 1/sqrt(head_dim): UMT5 was trained without
        return self.o.forward((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))


class _GatedFfn(nn.Module):
    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.gate = nn.Sequential(LinearNoBias(arch.dim, arch.ffn_dim), nn.GELU(approximate="tanh"))
        self.fc1 = LinearNoBias(arch.dim, arch.ffn_dim)
        self.fc2 = LinearNoBias(arch.ffn_dim, arch.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2.forward(self.fc1(x) * self.gate(x))


TEXT_ENCODER_MODULES: dict[str, type[nn.Module]] = {
    "text_encoder.block": Block,
    "text_encoder.final_norm": FinalNorm,
}
