"""How a fused operator appears in a traced graph: one symbolic call, its output shapes stated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.specs import FUNCTION_DOMAIN

Attribute = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
DOMAIN_VERSION = 1


def tracing() -> bool:
    return torch.compiler.is_exporting()


def call(name: str, inputs: Sequence[Tensor], *, like: Tensor, shape: Sequence[int], **attributes: Attribute) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{FUNCTION_DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=shape, version=DOMAIN_VERSION
    )


def call_as(name: str, inputs: Sequence[Tensor], *, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.onnx.ops.symbolic(f"{FUNCTION_DOMAIN}::{name}", inputs, dtype=dtype, shape=shape, version=DOMAIN_VERSION)


def call_pair(
    name: str, inputs: Sequence[Tensor], *, shapes: Sequence[Sequence[int]], **attributes: Attribute
) -> tuple[Tensor, Tensor]:
    dtypes = [inputs[0].dtype] * 2
    first, second = torch.onnx.ops.symbolic_multi_out(
        f"{FUNCTION_DOMAIN}::{name}", inputs, attributes, dtypes=dtypes, shapes=shapes, version=DOMAIN_VERSION
    )
    return first, second
