"""Checkpoint tensors → the bundle's weight files, streamed tensor by tensor in the layout the engines want.

Which weights a file holds is what its stages declare; a weight is one checkpoint tensor of the same name, or several fused along
their first axis. Linear weights stay [out, in]: ONNX Runtime's Gemm and cuBLASLt's FP8 product both want rows of the reduced axis.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from export.checkpoint import TensorSource
from export.trace import TORCH_DTYPES
from runtime.errors import ExportError
from runtime.specs import DType, StageSpec

_FUSED = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
}
_HEADER_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One weight of the bundle: the checkpoint tensors it is made of, joined along the first axis and reshaped."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: DType


def pack_plan(stages: Iterable[StageSpec], *, num_blocks: int) -> list[PackedTensor]:
    """The weights that a component's stages declare, each once, in the order in which the stages first need them."""
    plan: dict[str, PackedTensor] = {}
    for stage in stages:
        for block in range(num_blocks) if stage.per_block else (None,):
            for weight in stage.weights:
                name = stage.weight_name(weight.name, block)
                shape = tuple(axis for axis in weight.shape if isinstance(axis, int))
                plan.setdefault(name, PackedTensor(name, _sources(name), shape, weight.dtype))
    return list(plan.values())


def write_weights(
    source: TensorSource, plan: Iterable[PackedTensor], path: Path, *, on_bytes: Callable[[int], None] = lambda _: None
) -> tuple[str, dict[str, str]]:
    """Write a component's safetensors file; one packed tensor is in memory at a time.

    Args:
        on_bytes: called with the size of each tensor once written.

    Returns:
        SHA-256 of the file, and of each tensor's bytes by name.

    Raises:
        ExportError: a tensor's values do not fit its place.
    """
    plan = list(plan)
    digests: dict[str, str] = {}
    with path.open("wb") as file:
        whole = hashlib.sha256()
        _write(file, _header(plan), whole)
        for packed in plan:
            data = memoryview(_packed_bytes(source, packed))
            digests[packed.name] = hashlib.sha256(data).hexdigest()
            _write(file, data, whole)
            on_bytes(len(data))
        file.flush()
    return whole.hexdigest(), digests


def _sources(name: str) -> tuple[str, ...]:
    for fused, parts in _FUSED.items():
        if f".{fused}." in f".{name}":
            return tuple(name.replace(fused, part) for part in parts)
    return (name,)


def _header(plan: Iterable[PackedTensor]) -> bytes:
    header: dict[str, object] = {}
    at = 0
    for packed in plan:
        size = packed.dtype.itemsize
        for extent in packed.shape:
            size *= extent
        header[packed.name] = {"dtype": packed.dtype.value, "shape": packed.shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)  # tensors then start aligned in the mapping
    return len(text).to_bytes(8, "little") + text


def _packed_bytes(source: TensorSource, packed: PackedTensor) -> bytes:
    parts = [source.read(name) for name in packed.sources]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    if joined.numel() != torch.Size(packed.shape).numel():
        raise ExportError(f"{packed.name}: checkpoint has {list(joined.shape)}, the engines want {list(packed.shape)}")
    values = joined.to(TORCH_DTYPES[packed.dtype]).reshape(packed.shape).contiguous()
    if not torch.isfinite(values).all():
        raise ExportError(
            f"{packed.name}: holds values that are not finite", hint="the checkpoint is damaged; download it again"
        )
    return values.view(torch.uint8).numpy().tobytes() if values.dtype is torch.bfloat16 else values.numpy().tobytes()


def _write(file: BinaryIO, data: bytes | memoryview, digest: "hashlib._Hash") -> None:
    file.write(data)
    digest.update(data)
