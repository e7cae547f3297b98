"""The CLIP image encoder, cut into the stages that `runtime.stages.image_encoder` declares.

Parameter names are the names inside the bundle (q, k and v fused). Formulas: Wan-Video/Wan2.1 `wan/modules/clip.py` (9737cba9);
checked against transformers' `CLIPVisionModel`.
"""

import torch
from torch import Tensor, nn

from export import functions as op
from export.modules.layers import Linear, LinearNoBias
from runtime.variants import ImageEncoderArch

_IMAGE_CHANNELS = 3


class Embed(nn.Module):
    """An image's patches [P, 3·p·p] → hidden states [1 + P, dim]: class token in front, positions added, normed."""

    def __init__(self, arch: ImageEncoderArch) -> None:
        super().__init__()
        self.cls_embedding = nn.Parameter(torch.empty(1, arch.dim))
        self.pos_embedding = nn.Parameter(torch.empty(arch.num_tokens, arch.dim))
        self.patch_embedding = LinearNoBias(_IMAGE_CHANNELS * arch.patch_size**2, arch.dim)
        self.pre_norm = nn.LayerNorm(arch.dim, eps=arch.eps)

    def forward(self, patches: Tensor) -> Tensor:
        tokens = torch.cat((self.cls_embedding, self.patch_embedding(patches)))
        return self.pre_norm.forward(tokens + self.pos_embedding)


class Block(nn.Module):
    """Self-attention and MLP over one image's tokens: [T, dim] → [T, dim]."""

    def __init__(self, arch: ImageEncoderArch) -> None:
        super().__init__()
        self.num_heads = arch.num_heads
        self.norm1 = nn.LayerNorm(arch.dim, eps=arch.eps)
        self.attn = nn.ModuleDict({"qkv": Linear(arch.dim, 3 * arch.dim), "proj": Linear(arch.dim, arch.dim)})
        self.norm2 = nn.LayerNorm(arch.dim, eps=arch.eps)
        activation = _QuickGelu() if arch.quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(Linear(arch.dim, arch.ffn_dim), activation, Linear(arch.ffn_dim, arch.dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(hidden_states)).chunk(3, dim=-1)
        attended = op.attention(query, key, value, num_heads=self.num_heads)
        x = hidden_states + self.attn["proj"](attended)
        next_hidden_states: Tensor = x + self.mlp(self.norm2(x))
        return next_hidden_states


class _QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


IMAGE_ENCODER_MODULES: dict[str, type[nn.Module]] = {
    "image_encoder.embed": Embed,
    "image_encoder.block": Block,
}
