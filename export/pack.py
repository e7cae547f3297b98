"""Checkpoint tensors → the bundle's weight files, streamed tensor by tensor in the layout the engines want.

Which weights a file holds is what its stages declare; a weight is one checkpoint tensor of the same name, or several fused along
their first axis. Linear weights stay [out, in]: ONNX Runtime's Gemm and cuBLASLt's FP8 product both want rows of the reduced axis.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from export.trace import TORCH_DTYPES
from runtime.errors import ExportError
from runtime.precision import CHANNEL_MULTIPLE, FP8_MAX, NOTHING_WIDE, WideParts, stages_in_precision, weight_of_scales
from runtime.specs import DType, Precision, StageSpec
from runtime.stages import network_blocks, network_stages
from runtime.stages.text_encoder import TOKEN_EMBEDDING
from runtime.variants import Variant


class PackSource(Protocol):
    """Where a component's tensors are read from; `export.checkpoint.TensorSource` is one."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> torch.Tensor: ...


_FUSED = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attn.kv_img": ("cross_attn.k_img", "cross_attn.v_img"),
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
}
_HEADER_ALIGNMENT = 64
_SLICE_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One weight of the bundle: the checkpoint tensors it is made of, joined along the first axis and reshaped.

    In FP8 each row is divided by its scale; `row_scales` marks the tensor that holds those scales instead of the weight.
    `channels_last` (see `TensorSpec`) moves axis 1 to the end, and pads it and the first one with zeros to what `shape` says.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: DType
    row_scales: bool = False
    channels_last: bool = False


def pack_plan(stages: Iterable[StageSpec], *, num_blocks: int) -> list[PackedTensor]:
    """The weights that a component's stages declare, each once, in the order in which the stages first need them."""
    plan: dict[str, PackedTensor] = {}
    for stage in stages:
        for block in stage.places(num_blocks):
            for weight in stage.weights:
                name = stage.weight_name(weight.name, block)
                shape = tuple(axis for axis in weight.shape if isinstance(axis, int))
                scaled = weight_of_scales(name)
                packed = PackedTensor(
                    name,
                    _sources(scaled or name),
                    shape,
                    weight.dtype,
                    row_scales=scaled is not None,
                    channels_last=weight.channels_last,
                )
                plan.setdefault(name, packed)
    return list(plan.values())


def weight_plan(variant: Variant, network: str, precision: Precision, *, wide: WideParts = NOTHING_WIDE) -> list[PackedTensor]:
    """Everything a weight file of one network holds: what its stages declare, and what the host reads itself."""
    num_blocks = network_blocks(variant, network)
    stages = stages_in_precision(network_stages(variant, network), precision, num_blocks=num_blocks, wide=wide)
    plan = pack_plan(stages, num_blocks=num_blocks)
    if network == "text_encoder":
        table = (variant.text_encoder.vocab_size, variant.text_encoder.dim)
        dtype = DType.F32 if precision is Precision.FP32 else DType.BF16
        plan.append(PackedTensor(TOKEN_EMBEDDING, (TOKEN_EMBEDDING,), table, dtype))
    return plan


def write_weights(
    source: PackSource, plan: Iterable[PackedTensor], path: Path, *, on_bytes: Callable[[int], None] = lambda _: None
) -> tuple[str, dict[str, str]]:
    """Write a component's safetensors file; one checkpoint tensor and a slice of its conversion are in memory at a time.

    Args:
        on_bytes: called with the number of bytes just written.

    Returns:
        SHA-256 of the file, and of each tensor's bytes by name.

    Raises:
        ExportError: a tensor's values do not fit its place.
    """
    plan = list(plan)
    digests: dict[str, str] = {}
    with path.open("wb") as file:
        whole = hashlib.sha256()
        _write(file, safetensors_header(plan), whole)
        for packed in plan:
            digest = hashlib.sha256()
            for data in _chunks(source, packed):
                digest.update(data)
                _write(file, data, whole)
                on_bytes(len(data))
            digests[packed.name] = digest.hexdigest()
        file.flush()
    return whole.hexdigest(), digests


def _sources(name: str) -> tuple[str, ...]:
    for fused, parts in _FUSED.items():
        if f".{fused}." in f".{name}":
            return tuple(name.replace(fused, part) for part in parts)
    return (name,)


def safetensors_header(plan: Iterable[PackedTensor]) -> bytes:
    """The beginning of a file that holds these tensors in this order, padded so that they start aligned in its mapping."""
    header: dict[str, object] = {}
    at = 0
    for packed in plan:
        size = packed.dtype.itemsize * math.prod(packed.shape)
        header[packed.name] = {"dtype": packed.dtype.value, "shape": packed.shape, "data_offsets": (at, at + size)}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _chunks(source: PackSource, packed: PackedTensor) -> Iterator[memoryview]:
    """The bytes of a packed tensor, slice by slice: joining along the first axis and reshaping both leave their order alone."""
    if packed.channels_last:
        yield _channels_last(source, packed)
        return
    shapes = [source.shape(name) for name in packed.sources]
    found = sum(shape[0] if packed.row_scales else math.prod(shape) for shape in shapes)
    if found != math.prod(packed.shape):
        raise ExportError(
            f"{packed.name}: the checkpoint has {[list(s) for s in shapes]}, the engines want {list(packed.shape)}"
        )
    for name in packed.sources:
        tensor = source.read(name)
        rows = tensor.reshape(len(tensor), -1) if packed.dtype is DType.F8_E4M3 or packed.row_scales else tensor.reshape(-1, 1)
        step = max(1, _SLICE_ELEMENTS // rows.shape[1])
        for start in range(0, len(rows), step):
            values = rows[start : start + step].to(torch.float32)
            if not torch.isfinite(values).all():
                raise ExportError(
                    f"{name}: holds values that are not finite", hint="the checkpoint is damaged; download it again"
                )
            data: NDArray[np.uint8] = _converted(values, packed).contiguous().view(torch.uint8).numpy()
            yield data.data


def _channels_last(source: PackSource, packed: PackedTensor) -> memoryview:
    """The bytes of a convolution's weight or bias, read whole: the largest of a VAE's is 226 MiB in float32."""
    (name,) = packed.sources
    values = source.read(name).to(torch.float32)
    if values.ndim > 1:
        values = values.movedim(1, -1)
    margins = [wanted - given for given, wanted in zip(values.shape, packed.shape, strict=False)]
    fits = values.ndim == len(packed.shape) and not any(margins[1:-1]) and all(0 <= m < CHANNEL_MULTIPLE for m in margins)
    if not fits or not torch.isfinite(values).all():
        raise ExportError(
            f"{name}: the checkpoint has {list(source.shape(name))}, the engines want {list(packed.shape)}, and finite values"
        )
    sides = [side for margin in reversed(margins) for side in (0, margin)]
    padded = _narrowed(functional.pad(values, sides), packed)
    data: NDArray[np.uint8] = padded.contiguous().view(torch.uint8).numpy()
    return data.data


def _converted(values: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    """Rows, float32, in the element type of the bundle; FP8 rows divided by their scales, or those scales."""
    if not (packed.row_scales or packed.dtype is DType.F8_E4M3):
        return _narrowed(values, packed)
    scales = values.abs().amax(dim=1, keepdim=True) / FP8_MAX
    scales[scales == 0] = 1  # a row of zeros
    return scales if packed.row_scales else (values / scales).to(torch.float8_e4m3fn)


def _narrowed(values: torch.Tensor, packed: PackedTensor) -> torch.Tensor:
    """Values, finite float32, in the element type of the bundle."""
    narrow = values.to(TORCH_DTYPES[packed.dtype])
    if packed.dtype is DType.F16 and not torch.isfinite(narrow).all():
        raise ExportError(f"{packed.name}: holds {values.abs().max():.3g}, beyond fp16's 65,504", hint="build it in bf16")
    return narrow


def _write(file: BinaryIO, data: bytes | memoryview, digest: "hashlib._Hash") -> None:
    file.write(data)
    digest.update(data)
