"""The text encoder and the transformer over batches, for training; parameters have the original checkpoints' names and shapes.

`export.modules` has the same networks cut into stages, for one clip and without gradients. Formulas: see there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.geometry import rope_tables
from runtime.text_encoder import relative_position_buckets
from runtime.variants import TextEncoderArch, TransformerArch


class TextEncoder(nn.Module):
    """UMT5's encoder: ids [B, S] and their lengths [B] → embeddings [B, S, dim], zero beyond the length."""

    buckets: Tensor

    def __init__(self, arch: TextEncoderArch, *, max_tokens: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(arch.vocab_size, arch.dim)
        self.blocks = nn.ModuleList(_TextBlock(arch) for _ in range(arch.num_layers))
        self.norm = nn.RMSNorm(arch.dim, eps=arch.eps)
        buckets = relative_position_buckets(max_tokens, num_buckets=arch.num_buckets, max_distance=arch.max_distance)
        self.register_buffer("buckets", torch.from_numpy(buckets), persistent=False)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        mask = torch.zeros(real.shape, device=ids.device).masked_fill(~real, float("-inf"))[:, None, None]
        x = self.token_embedding(ids)
        buckets = self.buckets[: ids.shape[1], : ids.shape[1]]
        for block in self.blocks:
            x = block(x, buckets, mask)
        embeds: Tensor = self.norm(x).float() * real[..., None]
        return embeds


class _TextBlock(nn.Module):
    def __init__(self, arch: TextEncoderArch) -> None:
        super().__init__()
        dim, inner, self.num_heads = arch.dim, arch.attention_dim, arch.num_heads
        self.norm1, self.norm2 = nn.RMSNorm(dim, eps=arch.eps), nn.RMSNorm(dim, eps=arch.eps)
        self.attn = nn.ModuleDict({name: nn.Linear(dim, inner, bias=False) for name in "qkv"})
        self.attn["o"] = nn.Linear(inner, dim, bias=False)
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding(arch.num_buckets, arch.num_heads)})
        self.ffn = nn.ModuleDict(
            {
                "gate": nn.Sequential(nn.Linear(dim, arch.ffn_dim, bias=False)),
                "fc1": nn.Linear(dim, arch.ffn_dim, bias=False),
                "fc2": nn.Linear(arch.ffn_dim, dim, bias=False),
            }
        )
        with torch.no_grad():
            for layer, fan in (("q", dim * inner // arch.num_heads), ("k", dim), ("v", dim), ("o", inner)):
                self.attn[layer].weight.normal_(0, fan**-0.5)  # type: ignore[operator]
            self.pos_embedding["embedding"].weight.normal_(0, 0.1)  # type: ignore[operator]

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm1(x)
        query, key, value = (_heads(self.attn[name](normed), self.num_heads) for name in "qkv")
        bias = self.pos_embedding["embedding"](buckets).permute(2, 0, 1)[None] + mask
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=1.0)
        x = x + self.attn["o"](attended.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        gated = F.gelu(self.ffn["gate"](normed), approximate="tanh") * self.ffn["fc1"](normed)
        out: Tensor = x + self.ffn["fc2"](gated)
        return out


class Dit(nn.Module):
    """The diffusion transformer: latents [B, C, T, h, w], timesteps [B], text [B, S, dim] → the flow, float32 like the latents."""

    frequencies: Tensor

    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.arch, dim = arch, arch.dim
        self.patch_embedding = nn.Conv3d(arch.in_channels, dim, arch.patch_size, stride=arch.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(arch.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(arch.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(_DitBlock(arch) for _ in range(arch.num_layers))
        self.head = _Head(arch)
        frequencies = 10000.0 ** (-torch.arange(arch.freq_dim // 2, dtype=torch.float64) / (arch.freq_dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._ropes: dict[tuple[int, ...], Tensor] = {}  # by token grid; a captured CUDA graph may not copy from the host
        with torch.no_grad():
            nn.init.normal_(self.time_projection.get_parameter("1.weight"), std=0.02)
            self._turn_from_padding()

    def _turn_from_padding(self) -> None:
        """Begin with cross-attention on a prompt's words: of 512 rows some 20 are words, and an even start would leave them 4% of it.

        Embedded padding is zero then, so that its keys are the bias alone, which queries point away from: logits of about -5.
        """
        for name in ("0.bias", "2.bias"):
            nn.init.zeros_(self.text_embedding.get_parameter(name))
        for block in self.blocks:
            assert isinstance(block, _DitBlock)
            away = torch.randint(2, (self.arch.dim,)) * 2.0 - 1
            block.cross_attn.q.bias.copy_(-0.3 * away)
            block.cross_attn.k.bias.copy_(0.02 * away)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
        batch, _, *grid = latents.shape
        tokens = self.patch_embedding(latents).flatten(2).transpose(1, 2).float()
        angles = timesteps.double()[:, None] * self.frequencies
        with torch.autocast(latents.device.type, enabled=False):  # as the reference: in float32
            time = self.time_embedding(torch.cat((angles.cos(), angles.sin()), dim=-1).float())
            modulation = self.time_projection(time).view(batch, 6, -1)
        context, bias = self._context(text, lengths)
        rope = self._rope(tuple(size // patch for size, patch in zip(grid, self.arch.patch_size, strict=True)), latents.device)
        for block in self.blocks:
            tokens = block(tokens, modulation, context, bias, rope)
        return self._unpatched(self.head(tokens, time), grid)

    def _context(self, text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text and what is added to its logits. The model sees text_len rows, those beyond a prompt's all alike: one row
        with the logarithm of their number added stands for them, exactly."""
        with_pad = torch.cat((text, torch.zeros_like(text[:, :1])), dim=1)
        places = torch.arange(with_pad.shape[1], device=text.device)
        bias = torch.where(places < lengths[:, None], 0.0, float("-inf"))
        bias[:, -1] = torch.log(self.arch.text_len - lengths.float())
        return self.text_embedding(with_pad), bias[:, None, None]

    def _rope(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        if grid not in self._ropes:
            frames, height, width = grid
            cos, sin = rope_tables((frames, height, width), self.arch.head_dim)
            self._ropes[grid] = torch.stack((torch.from_numpy(cos), torch.from_numpy(sin))).to(device)
        return self._ropes[grid]

    def _unpatched(self, tokens: Tensor, grid: list[int]) -> Tensor:
        (frames, height, width), (pt, ph, pw) = grid, self.arch.patch_size
        shape = (len(tokens), frames // pt, height // ph, width // pw, pt, ph, pw, self.arch.out_channels)
        return tokens.float().view(shape).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(tokens), -1, *grid)


class _DitBlock(nn.Module):
    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        dim = arch.dim
        self.eps = arch.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn, self.cross_attn = _Attention(arch), _Attention(arch)
        self.norm3 = nn.LayerNorm(dim, eps=arch.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, arch.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(arch.ffn_dim, dim))
        with torch.no_grad():
            self.modulation[:, (2, 5)] = 1  # both gates open; the branches behind them begin small
            nn.init.normal_(self.ffn.get_parameter("2.weight"), std=0.02 / math.sqrt(2 * arch.num_layers))

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor, bias: Tensor, rope: Tensor) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + modulation).chunk(6, dim=1)
        normed = _layer_norm(x, self.eps) * (1 + scale) + shift
        x = x + self.self_attn(normed, normed, rope=rope).float() * gate
        x = x + self.cross_attn(self.norm3(x), context, bias=bias).float()
        normed = _layer_norm(x, self.eps) * (1 + ffn_scale) + ffn_shift
        out: Tensor = x + self.ffn(normed).float() * ffn_gate
        return out


class _Attention(nn.Module):
    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.num_heads = arch.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(arch.dim, arch.dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(arch.dim, eps=arch.eps), nn.RMSNorm(arch.dim, eps=arch.eps)
        with torch.no_grad():
            self.o.weight.normal_(0, 0.02 / math.sqrt(2 * arch.num_layers))

    def forward(self, x: Tensor, context: Tensor, *, rope: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        query, key = self.norm_q(self.q(x).float()), self.norm_k(self.k(context).float())
        value = self.v(context)
        query, key = (_heads(rows, self.num_heads) for rows in (query, key))
        if rope is not None:
            query, key = _rotated(query, rope), _rotated(key, rope)
        mask = None if bias is None else bias.to(value.dtype)
        heads = _heads(value, self.num_heads)
        attended = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), heads, attn_mask=mask)
        out: Tensor = self.o(attended.transpose(1, 2).flatten(2))
        return out


class _Head(nn.Module):
    def __init__(self, arch: TransformerArch) -> None:
        super().__init__()
        self.eps = arch.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, arch.dim))
        self.head = nn.Linear(arch.dim, arch.out_channels * arch.patch_volume)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, None]).chunk(2, dim=1)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.head(_layer_norm(x, self.eps) * (1 + scale) + shift)
        return out


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, D] → [B, heads, N, D / heads]."""
    return x.view(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """Adjacent pairs of each head's vector rotated by `rope`, cosines and sines [2, N, head_dim / 2]."""
    cos, sin = rope
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
