"""Safetensors files of random values at full size, written as fast as the machine's memory takes them.

Every value is drawn: random bits choose among 2^8 or 2^16 equally likely values of a normal distribution, already in the file's
element type. Several threads draw and write; one hashes behind them, in the file's order.
"""

import hashlib
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.trace import TORCH_DTYPES
from runtime.errors import RequestError
from runtime.precision import FP8_MAX
from runtime.specs import DType

_PIECE = 1 << 22  # elements drawn at once: long enough for the threads, short enough for the cache of one
_STEP = 1 << 16  # elements looked up at once
_AHEAD = 64  # pieces drawn before the first of them is hashed


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTensor:
    """A tensor of independent normal values; in FP8 they fill a quarter of its range whatever the spread."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    spread: float  # standard deviation; 0: every value is the centre
    center: float = 0.0

    @property
    def num_bytes(self) -> int:
        """What it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def random_weight(
    name: str, shape: Sequence[int], dtype: DType, *, fan_in: int | None = None, scales_fp8: bool = False
) -> RandomTensor:
    """A weight whose products keep their scale: deviation `1/sqrt(fan_in)`, gains of norms around 1, biases small.

    Args:
        fan_in: inputs that an output sums over; None: all axes but the first.
        scales_fp8: whether it scales rows of FP8 values: then all are what makes those values' deviation `1/sqrt(fan_in)`.
    """
    inputs = max(1, math.prod(shape[1:]) if fan_in is None else fan_in)
    if scales_fp8:
        return RandomTensor(name=name, shape=tuple(shape), dtype=dtype, spread=0.0, center=4 / FP8_MAX * inputs**-0.5)
    gain = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
    spread = 0.1 if gain or len(shape) == 1 else inputs**-0.5
    return RandomTensor(name=name, shape=tuple(shape), dtype=dtype, spread=spread, center=float(gain))


def write_random_file(
    file: Path, header: bytes, tensors: Iterable[RandomTensor], threads: Executor, *, seed: int, hashed: bool
) -> str:
    """Write a safetensors file.

    Args:
        header: its beginning, which says where each tensor lies (`export.pack.safetensors_header`).
        tensors: in the file's order.
        threads: draw and write; several files may share them.
        seed: of the file: tensors of one name differ between two files.
        hashed: whether the SHA-256 is wanted.

    Returns:
        SHA-256 of the file, or an empty string.

    Raises:
        OSError: the disk is full.
    """
    digest = hashlib.sha256(header)
    pending: deque[Future[NDArray[np.uint8]]] = deque()

    def take_first() -> None:
        data = pending.popleft().result()
        if hashed:
            digest.update(data.data)

    with file.open("wb") as stream:
        stream.write(header)
        stream.flush()
        try:
            for tensor, start, count, offset in _pieces(tensors, at=len(header)):
                pending.append(threads.submit(_write_piece, stream.fileno(), offset, tensor, start, count, seed))
                if len(pending) >= _AHEAD:
                    take_first()
            while pending:
                take_first()
        finally:
            for piece in pending:  # the file stays open until no thread writes to it
                if not piece.cancel():
                    piece.exception()
    return digest.hexdigest() if hashed else ""


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """See that a folder's disk has room.

    Raises:
        RequestError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RequestError(
            f"{what} takes {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free for temporary files",
            hint="name a larger place in TMPDIR, or make room",
        )


def _pieces(tensors: Iterable[RandomTensor], *, at: int) -> Iterator[tuple[RandomTensor, int, int, int]]:
    """Tensor, first element, number of elements, place in the file."""
    for tensor in tensors:
        size = math.prod(tensor.shape)
        for start in range(0, size, _PIECE):
            yield tensor, start, min(_PIECE, size - start), at + start * tensor.dtype.itemsize
        at += tensor.num_bytes


def _write_piece(descriptor: int, offset: int, tensor: RandomTensor, start: int, count: int, seed: int) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = draw(tensor, start, count, seed=seed).view(np.uint8)
    view = data.data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return data


def draw(tensor: RandomTensor, start: int, count: int, *, seed: int) -> NDArray[Any]:
    """Elements of a tensor, as unsigned integers of its element type's size; they depend on its name, `start` and the seed."""
    table = _table(tensor.dtype, tensor.spread, tensor.center)
    if not tensor.spread:
        return np.full(count, table[0])
    bits = np.dtype(np.uint8 if len(table) == 1 << 8 else np.uint16)
    random = np.random.Generator(np.random.SFC64((seed, zlib.crc32(tensor.name.encode()), start)))
    words = random.integers(0, 1 << 64, -(-count * bits.itemsize // 8), dtype=np.uint64)
    choices: NDArray[Any] = words.view(bits)[:count]
    drawn = np.empty(count, table.dtype)
    for at in range(0, count, _STEP):  # "clip" spares a copy: no choice lies outside
        np.take(table, choices[at : at + _STEP], out=drawn[at : at + _STEP], mode="clip")
    return drawn


@cache
def _table(dtype: DType, spread: float, center: float) -> NDArray[Any]:
    """The values that are drawn, in the bits of their element type."""
    if dtype is DType.F8_E4M3:
        values = torch.from_numpy(_quantiles(1 << 8) * (FP8_MAX / 4))
    else:
        values = torch.from_numpy(_quantiles(1 << 16) * spread + center)
    bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[dtype.itemsize]
    table: NDArray[Any] = values.to(TORCH_DTYPES[dtype]).view(bits).numpy()
    return table


@cache
def _quantiles(num_values: int) -> NDArray[np.float64]:
    """Equally likely values of the standard normal distribution, and of its deviation."""
    normal = NormalDist()
    values = np.array([normal.inv_cdf((i + 0.5) / num_values) for i in range(num_values)])
    normalised: NDArray[np.float64] = values / values.std()
    return normalised
