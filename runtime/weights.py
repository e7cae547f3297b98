"""Weights at run time: memory-mapped safetensors, bound to stages by name.

The mapping is read here and not through the safetensors package because its NumPy interface copies every tensor into memory.
Format: 8 bytes little-endian header length, a JSON header of name → dtype, shape, data_offsets, then the bytes.
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends.base import Array, Backend, DeviceTensor
from runtime.errors import BundleError
from runtime.specs import DType, StageSpec

_NUMPY_TYPES: dict[str, Any] = {DType.F32: np.float32, DType.F16: np.float16, DType.BF16: np.uint16, DType.F8_E4M3: np.uint8}
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_MAX_AXES = 8
_REBUILD = "the bundle is damaged; copy it again or rebuild it"


def map_safetensors(path: Path) -> dict[str, Array]:
    """Map a safetensors file: every tensor by name, read-only and without reading its bytes (bf16 as uint16, fp8 as uint8).

    Raises:
        BundleError: unreadable, truncated, overlapping, mistyped or otherwise malformed.
    """
    entries, mapped = _read_header(path)
    tensors: dict[str, Array] = {}
    at = 0
    for name, (dtype, shape, begin, end) in sorted(entries, key=lambda entry: entry[1][2]):
        count = 1
        for extent in shape:
            count *= extent
        if begin != at or end - begin != count * np.dtype(dtype).itemsize or end > mapped.size:
            raise BundleError(
                f"{path.name}: {name}: shape {list(shape)} does not fit bytes {begin}..{end} of {mapped.size}", hint=_REBUILD
            )
        tensors[name] = mapped[begin:end].view(dtype).reshape(shape)
        at = end
    if at != mapped.size:
        raise BundleError(f"{path.name}: {mapped.size - at} bytes belong to no tensor", hint=_REBUILD)
    return tensors


class WeightFile:
    """A component's weights in their file, checked against the stages that will ask for them, mapped and not yet read.

    Args:
        path: the component's safetensors file.
        stages: the stages that will ask; their weights must all be there with the declared shapes.
        num_blocks: how often per-block stages run.

    Raises:
        BundleError: a declared weight is missing or misshapen.
    """

    def __init__(self, path: Path, stages: Iterable[StageSpec], *, num_blocks: int) -> None:
        self._tensors = map_safetensors(path)
        for stage in stages:
            for block in stage.places(num_blocks):
                for weight in stage.weights:
                    name = stage.weight_name(weight.name, block)
                    found = self._tensors.get(name)
                    if found is None or found.shape != weight.shape or found.dtype != _NUMPY_TYPES[weight.dtype]:
                        given = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                        raise BundleError(
                            f"{path.name}: {name}: {given}, expected {weight.dtype} {list(weight.shape)}", hint=_REBUILD
                        )

    def tensor(self, name: str) -> Array:
        """A tensor, still mapped: read-only, and read from the file where it is touched."""
        return self._tensors[name]


class WeightStore:
    """A component's weights on a backend, all resident.

    Args:
        path, stages, num_blocks: see `WeightFile`.
        backend: where the weights go.

    Raises:
        BundleError: a declared weight is missing or misshapen.
    """

    def __init__(self, path: Path, stages: Iterable[StageSpec], backend: Backend, *, num_blocks: int) -> None:
        self._file = WeightFile(path, stages, num_blocks=num_blocks)
        self._backend = backend
        self._resident: dict[str, DeviceTensor] = {}

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceTensor]:
        """The weights of `stage`, by the names the engine knows; sent to the device when first asked for, and kept there."""
        bound = {}
        for weight in stage.weights:
            name = stage.weight_name(weight.name, block)
            if name not in self._resident:
                self._resident[name] = self._backend.to_device(self._file.tensor(name), weight.dtype)
            bound[weight.name] = self._resident[name]
        return bound

    def host_tensor(self, name: str) -> Array:
        """A weight that the host reads itself, such as an embedding table; still mapped."""
        return self._file.tensor(name)


_Entry = tuple[Any, tuple[int, ...], int, int]  # NumPy type, shape, begin, end


def _read_header(path: Path) -> tuple[list[tuple[str, _Entry]], Array]:
    """The header's entries by name, and the mapped bytes after it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
                raise BundleError(
                    f"{path.name}: not a safetensors file: header of {length} bytes in a file of {size}", hint=_REBUILD
                )
            header = json.loads(file.read(length))
            entries = [(str(name), _entry(entry)) for name, entry in header.items() if name != "__metadata__"]
            return entries, np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[8 + length :]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise BundleError(f"{path.name}: malformed safetensors header: {exc!r}", hint=_REBUILD) from exc
    except OSError as exc:
        raise BundleError(f"{path.name}: cannot be read: {exc.strerror or exc}", hint="check its permissions") from exc


def _entry(entry: Mapping[str, Any]) -> _Entry:
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > _MAX_AXES:
        raise ValueError(f"{len(shape)} axes")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"extents and offsets must be non-negative integers, got {shape}, {begin}, {end}")
    return _NUMPY_TYPES[entry["dtype"]], shape, begin, end
