"""The UMT5 text encoder, cut into the stages that `runtime.stages.text_encoder` declares.

Parameter names are the names inside the bundle (q, k and v fused). Formulas: Wan-Video/Wan2.2 `wan/modules/t5.py` (42bf4cfa);
checked against transformers' `UMT5EncoderModel`.
"""

from torch import Tensor, nn

from export import functions as op
from export.modules.layers import LinearNoBias
from runtime.variants import TextEncoderArch


class Block(nn.Module):
    """Self-attention and gated FFN over a prompt's real tokens: [S, dim] → [S, dim]."""

    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(arch.dim, eps=arch.eps)
        self.pos_embedding = _PositionTable(arch)
        self.attn = _SelfAttention(arch)
        self.norm2 = nn.RMSNorm(arch.dim, eps=arch.eps)
        self.ffn = _GatedFfn(arch)

    def forward(self, hidden_states: Tensor, position_buckets: Tensor) -> Tensor:
        position_table = self.pos_embedding.embedding.weight
        x = hidden_states + self.attn.forward(self.norm1(hidden_states), position_table, position_buckets)
        return x + self.ffn.forward(self.norm2(x))


class FinalNorm(nn.Module):
    """The norm after the last block: [S, dim] → prompt embeddings [S, dim]."""

    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(arch.dim, eps=arch.eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm.forward(hidden_states)


class _PositionTable(nn.Module):
    """The block's own biases, [buckets, heads]."""

    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.embedding = nn.Embedding(arch.num_buckets, arch.num_heads)


class _SelfAttention(nn.Module):
    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.num_heads = arch.num_heads
        self.qkv = LinearNoBias(arch.dim, 3 * arch.attention_dim)
        self.o = LinearNoBias(arch.attention_dim, arch.dim)

    def forward(self, x: Tensor, position_table: Tensor, position_buckets: Tensor) -> Tensor:
        query, key, value = self.qkv.forward(x).chunk(3, dim=-1)
        # no 1/sqrt(head_dim): UMT5 was trained without
        return self.o.forward(
            op.biased_attention(query, key, value, position_table, position_buckets, num_heads=self.num_heads)
        )


class _GatedFfn(nn.Module):
    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        self.gate = nn.Sequential(LinearNoBias(arch.dim, arch.ffn_dim))
        self.fc1 = LinearNoBias(arch.dim, arch.ffn_dim)
        self.fc2 = LinearNoBias(arch.ffn_dim, arch.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2.forward(op.gated_gelu(self.gate(x), self.fc1(x)))


TEXT_ENCODER_MODULES: dict[str, type[nn.Module]] = {
    "text_encoder.block": Block,
    "text_encoder.final_norm": FinalNorm,
}
