"""cuBLASLt's own objects for one matrix product: what is asked, the descriptors that say so, and the kernels offered for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.backends.base import Array
from runtime.backends.cuda.calls import relocate, relocations
from runtime.errors import CudaError, EngineError
from runtime.specs import DType

WORKSPACE_BYTES = 64 << 20
_CUDA_TYPES = {DType.F32: 0, DType.F16: 2, DType.BF16: 14, DType.F8_E4M3: 28}  # cudaDataType_t
_COMPUTE_32F = 68  # cublasComputeType_t: fp32 accumulation, and no TF32 for fp32 operands
_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that cuBLASLt's choice of a kernel depends on."""

    tokens: int  # M
    features: int  # K
    outputs: int  # O
    dtypes: tuple[DType, DType, DType]  # x, weight, out
    strides: tuple[int, int, int]
    alignments: tuple[int, int, int]  # bytes
    bias: DType | None
    gelu: bool
    fast_accumulation: bool
    scalar_x_scale: bool

    @property
    def is_fp8(self) -> bool:
        return self.dtypes[0] is DType.F8_E4M3

    def __str__(self) -> str:
        kinds = " × ".join(self.dtypes[:2]) + f" → {self.dtypes[2]}"
        return (
            f"linear [{self.tokens}, {self.features}] · [{self.outputs}, {self.features}]ᵀ, {kinds}, row strides {self.strides}"
        )


class ProductPlan:
    """One problem's descriptors and the kernels that cuBLASLt offers for it, its favourite first."""

    def __init__(self, library: Any, handle: int, problem: Problem, *, anywhere: int) -> None:
        self._library = library
        self._pointer = np.zeros(1, np.int64)
        self.operation, self.layouts = 0, list[int]()
        self.operation = library.matmul_desc_create(_COMPUTE_32F, _CUDA_TYPES[DType.F32])
        try:
            self._describe(problem)
            if problem.is_fp8:  # the heuristic refuses vector scales that have no address yet
                self.point(library.MatmulDescAttribute.A_SCALE_POINTER, anywhere)
                self.point(library.MatmulDescAttribute.B_SCALE_POINTER, anywhere)
            self._results = self._candidates(handle, problem)
        except BaseException:
            self.close()
            raise

    @property
    def num_choices(self) -> int:
        return len(self._results)

    def algorithm(self, choice: int) -> int:
        """Address of a candidate's algorithm; it is the record's first field."""
        return int(self._results.ctypes.data + choice * self._results.itemsize)

    def point(self, attribute: Any, pointer: int) -> None:
        """Set a pointer of the operation: bias, or a scale."""
        self._pointer[0] = pointer
        self._library.matmul_desc_set_attribute(self.operation, attribute, self._pointer.ctypes.data, 8)

    def close(self) -> None:
        """Release the descriptors; no call that is still to be queued may use them."""
        if self.operation:
            for layout in self.layouts:
                self._library.matrix_layout_destroy(layout)
            self._library.matmul_desc_destroy(self.operation)
        self.operation, self.layouts = 0, []

    def __del__(self) -> None:
        self.close()  # host memory, of a plan that nobody asked for in a long time and that no prepared call uses

    def _describe(self, problem: Problem) -> None:
        library = self._library
        attribute, epilogue = library.MatmulDescAttribute, library.Epilogue
        kind = {
            (False, False): epilogue.DEFAULT,
            (True, False): epilogue.BIAS,
            (False, True): epilogue.GELU,  # cuBLASLt's GELU is the tanh approximation, as Wan's feed-forward is
            (True, True): epilogue.GELU_BIAS,
        }[problem.bias is not None, problem.gelu]
        self._set(attribute.TRANSA, np.int32(1))
        self._set(attribute.EPILOGUE, np.uint32(kind))
        if problem.bias is not None:
            self._set(attribute.BIAS_DATA_TYPE, np.int32(_CUDA_TYPES[problem.bias]))
        if problem.is_fp8:
            self._set(attribute.FAST_ACCUM, np.int8(problem.fast_accumulation))
            for mode in (attribute.A_SCALE_MODE, attribute.B_SCALE_MODE):
                self._set(mode, np.int32(library.MatmulMatrixScale.OUTER_VEC_32F))
        if problem.scalar_x_scale:
            self._set(attribute.POINTER_MODE, np.int32(library.PointerMode.DEVICE))
        x_type, weight_type, out_type = (_CUDA_TYPES[dtype] for dtype in problem.dtypes)
        x_stride, weight_stride, out_stride = problem.strides
        for layout in (
            (weight_type, problem.features, problem.outputs, weight_stride),
            (x_type, problem.features, problem.tokens, x_stride),
            (out_type, problem.outputs, problem.tokens, out_stride),
        ):
            self.layouts.append(library.matrix_layout_create(*layout))

    def _set(self, attribute: Any, value: Any) -> None:
        record = np.array([value])
        self._library.matmul_desc_set_attribute(self.operation, attribute, record.ctypes.data, record.nbytes)

    def _candidates(self, handle: int, problem: Problem) -> Array:
        library = self._library
        attribute = library.MatmulPreferenceAttribute
        preference = library.matmul_preference_create()
        x_align, weight_align, out_align = problem.alignments
        limits = {
            attribute.MAX_WORKSPACE_BYTES: np.uint64(WORKSPACE_BYTES),
            attribute.MIN_ALIGNMENT_A_BYTES: np.uint32(weight_align),
            attribute.MIN_ALIGNMENT_B_BYTES: np.uint32(x_align),
            attribute.MIN_ALIGNMENT_C_BYTES: np.uint32(out_align),
            attribute.MIN_ALIGNMENT_D_BYTES: np.uint32(out_align),
        }
        results: Array = np.zeros(_CANDIDATES, library.matmul_heuristic_result_dtype)
        found = np.zeros(1, np.int32)
        weight, x, out = self.layouts
        try:
            for name, value in limits.items():
                record = np.array([value])
                library.matmul_preference_set_attribute(preference, name, record.ctypes.data, record.nbytes)
            library.matmul_algo_get_heuristic(
                handle, self.operation, weight, x, out, out, preference, _CANDIDATES, results.ctypes.data, found.ctypes.data
            )
        finally:
            library.matmul_preference_destroy(preference)
        usable: Array = results[: int(found[0])]
        return np.ascontiguousarray(usable[usable["state"] == 0])


class Product:
    """One product of a plan (`runtime.backends.cuda.calls.Call`).

    Args:
        pointers: of the operation: bias and scales, by attribute.
        arguments: of cublasLtMatmul.
        kept: what has to live as long as this.
    """

    def __init__(
        self,
        library: Any,
        problem: Problem,
        plan: ProductPlan,
        pointers: Mapping[Any, int],
        arguments: Sequence[int],
        kept: Any,
    ) -> None:
        self._library, self._problem, self._plan, self._kept = library, problem, plan, kept
        self._pointers, self._arguments = dict(pointers), list(arguments)
        self._symbols = relocations(enumerate(arguments))
        self._pointer_symbols = relocations(pointers.items())

    def queue(self, addresses: Sequence[int]) -> None:
        relocate(self._pointers, self._pointer_symbols, addresses)
        for attribute, pointer in self._pointers.items():
            self._plan.point(attribute, pointer)
        relocate(self._arguments, self._symbols, addresses)
        try:
            self._library.matmul(*self._arguments)
        except self._library.cuBLASLtError as exc:
            raise CudaError(f"{self._problem}: cublasLtMatmul failed: {exc}") from exc


def open_library() -> Any:
    """The bindings of cuBLASLt.

    Raises:
        EngineError: nvmath-python is not installed.
    """
    try:
        from nvmath.bindings import cublasLt
    except ImportError as exc:
        raise EngineError(f"the cuda target needs nvmath-python: {exc}", hint='`pip install "wanrt[cuda]"`') from exc
    return cublasLt
