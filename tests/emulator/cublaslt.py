"""Stands in for `nvmath.bindings.cublasLt`: products in float32, with the epilogues and scales that `runtime.backends.cuda.linear` asks for.

It offers the same kernel twice for every problem, sums in NumPy's order and uses no workspace.
Limits of the library's kernels are not known to it.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

import numpy as np
import torch

from runtime.backends.base import Array
from tests.emulator.memory import Memory
from tests.emulator.numbers import Kind, read, write
from tests.emulator.streams import Streams


class Attribute(IntEnum):
    """Of an operation."""

    TRANSA = auto()
    EPILOGUE = auto()
    BIAS_POINTER = auto()
    BIAS_DATA_TYPE = auto()
    FAST_ACCUM = auto()
    POINTER_MODE = auto()
    A_SCALE_MODE = auto()
    B_SCALE_MODE = auto()
    A_SCALE_POINTER = auto()
    B_SCALE_POINTER = auto()


class Preference(IntEnum):
    MAX_WORKSPACE_BYTES = auto()
    MIN_ALIGNMENT_A_BYTES = auto()
    MIN_ALIGNMENT_B_BYTES = auto()
    MIN_ALIGNMENT_C_BYTES = auto()
    MIN_ALIGNMENT_D_BYTES = auto()


class Epilogue(IntEnum):
    DEFAULT = auto()
    BIAS = auto()
    GELU = auto()
    GELU_BIAS = auto()


class MatrixScale(IntEnum):
    OUTER_VEC_32F = auto()


class PointerMode(IntEnum):
    HOST = 0
    DEVICE = 1


class CublasLtError(Exception):
    """Never raised here; the runtime catches it by name."""


@dataclass(frozen=True)
class _Matrix:
    """[rows, columns] with a row stride: what the library calls a column-major matrix of `columns` by `rows`."""

    kind: Kind
    columns: int
    rows: int
    stride: int

    def read(self, memory: Memory, address: int) -> Array:
        return read(memory, address, (self.rows, self.columns), (self.stride, 1), self.kind)

    def write(self, memory: Memory, address: int, values: Array) -> None:
        write(memory, address, values, (self.stride, 1), self.kind)


class CublasLt:
    """As a module."""

    MatmulDescAttribute, MatmulPreferenceAttribute = Attribute, Preference
    Epilogue, MatmulMatrixScale, PointerMode = Epilogue, MatrixScale, PointerMode
    cuBLASLtError = CublasLtError
    matmul_heuristic_result_dtype = np.dtype([("algo", np.uint64, 8), ("workspace_size", np.uint64), ("state", np.int32)])

    def __init__(self, streams: Streams, memory: Memory) -> None:
        self._streams, self._memory = streams, memory
        self._operations: dict[int, dict[int, bytes]] = {}
        self._matrices: dict[int, _Matrix] = {}
        self._next = 1

    def create(self) -> int:
        return 1

    def destroy(self, handle: int) -> None: ...

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        handle = self._new_handle()
        self._operations[handle] = {}
        return handle

    def matmul_desc_destroy(self, operation: int) -> None:
        del self._operations[operation]

    def matmul_desc_set_attribute(self, operation: int, attribute: int, source: int, nbytes: int) -> None:
        self._operations[operation][attribute] = ctypes.string_at(source, nbytes)

    def matrix_layout_create(self, kind: int, rows: int, columns: int, stride: int) -> int:
        handle = self._new_handle()
        self._matrices[handle] = _Matrix(Kind(kind), rows, columns, stride)
        return handle

    def matrix_layout_destroy(self, matrix: int) -> None:
        del self._matrices[matrix]

    def matmul_preference_create(self) -> int:
        return 1

    def matmul_preference_destroy(self, preference: int) -> None: ...

    def matmul_preference_set_attribute(self, preference: int, attribute: int, source: int, nbytes: int) -> None: ...

    def matmul_algo_get_heuristic(self, *arguments: Any) -> None:
        """Two candidates that do the same; their records are all zeros."""
        ctypes.c_int32.from_address(arguments[-1]).value = 2

    def matmul(self, *arguments: Any) -> None:
        """Queue a product; the operation's attributes are read now, what its pointers point to when it runs."""
        _, operation, alpha, a, a_layout, b, b_layout, beta, _, _, out, out_layout, _, workspace, workspace_bytes, stream = (
            arguments
        )
        self._memory.check(workspace, workspace_bytes)
        weight, x, result = (self._matrices[layout] for layout in (a_layout, b_layout, out_layout))
        attributes = dict(self._operations[operation])
        by_device = _number(attributes, Attribute.POINTER_MODE, np.int32) == PointerMode.DEVICE
        factors = () if by_device else (_float_at(alpha), _float_at(beta))

        def product() -> None:
            factor, kept = factors or (_float_at(alpha), _float_at(beta))
            assert kept == 0.0, "what is in the result already is never added here"
            values = x.read(self._memory, b) @ weight.read(self._memory, a).T
            if weight.kind is Kind.FP8_E4M3:
                values *= self._vector(attributes, Attribute.B_SCALE_POINTER, x.rows, Kind.FLOAT)[:, None]
                values *= self._vector(attributes, Attribute.A_SCALE_POINTER, weight.rows, Kind.FLOAT)
            finish = self._epilogue(attributes, weight.rows)
            result.write(self._memory, out, finish(values * np.float32(factor)))

        self._streams.put(stream, product)

    def _epilogue(self, attributes: dict[int, bytes], outputs: int) -> Callable[[Array], Array]:
        kind = Epilogue(_number(attributes, Attribute.EPILOGUE, np.uint32))

        def finish(values: Array) -> Array:
            if kind in (Epilogue.BIAS, Epilogue.GELU_BIAS):
                bias_kind = Kind(_number(attributes, Attribute.BIAS_DATA_TYPE, np.int32))
                values = values + self._vector(attributes, Attribute.BIAS_POINTER, outputs, bias_kind)
            if kind in (Epilogue.GELU, Epilogue.GELU_BIAS):
                values = torch.nn.functional.gelu(torch.from_numpy(values), approximate="tanh").numpy()
            return values

        return finish

    def _vector(self, attributes: dict[int, bytes], attribute: Attribute, size: int, kind: Kind) -> Array:
        return read(self._memory, _number(attributes, attribute, np.int64), (size,), (1,), kind)

    def _new_handle(self) -> int:
        self._next += 1
        return self._next


def _number(attributes: dict[int, bytes], attribute: Attribute, dtype: Any) -> int:
    """0 for what was not set, which is the library's default for all that is asked here."""
    return int(np.frombuffer(attributes[attribute], dtype)[0]) if attribute in attributes else 0


def _float_at(address: int) -> float:
    return ctypes.c_float.from_address(address).value
