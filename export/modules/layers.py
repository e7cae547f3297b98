"""Layers that hold the weights of a fused operator; each calls its function in `export.functions`."""

import torch
from torch import Tensor, nn

from export import functions as op


class Linear(nn.Linear):
    """`wanrt::Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return op.linear(x, self.weight, self.bias)


class LinearNoBias(nn.Linear):
    """`wanrt::LinearNoBias`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return op.linear_no_bias(x, self.weight)


class LinearGelu(nn.Linear):
    """`wanrt::LinearGelu`: a linear layer and the tanh-approximated GELU after it."""

    def forward(self, x: Tensor) -> Tensor:
        return op.linear_gelu(x, self.weight, self.bias)


class QKNorm(nn.Module):
    """`wanrt::QKNorm`: RMS norm over the full width; with rotary tables `wanrt::QKNormRope`."""

    def __init__(self, dim: int, *, num_heads: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.num_heads, self.eps = num_heads, eps

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if rope is None:
            return op.qk_norm(x, self.weight, eps=self.eps)
        return op.qk_norm_rope(x, self.weight, *rope, num_heads=self.num_heads, eps=self.eps)
