"""How kernels are called: the argument structs of engines/targets/cuda, field by field, and the launch itself.

Which kernel computes what, and what its arrays must look like, is said in `runtime.backends.cuda.kernels`.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.backends.cuda.calls import relocate, relocations
from runtime.backends.cuda.device import Device, DeviceArray, check
from runtime.errors import EngineError

ROWS_PER_BLOCK = 2  # kRows and kVectors of engines/targets/cuda/rows.cuh
VECTORS_PER_THREAD = 2
COLUMNS_PER_VECTOR = 8
MAX_COLUMNS = 8192

Argument = DeviceArray | int | float | None


class _Rows(ctypes.Structure):
    """`Rows<T>`: where the first row begins, and how many elements further the next one."""

    _fields_ = (("data", ctypes.c_uint64), ("stride", ctypes.c_int64))


class _Tile(ctypes.Structure):
    _fields_ = (("num_rows", ctypes.c_int32), ("num_columns", ctypes.c_int32))


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items())})


_POINTER, _FLOAT, _INT = ctypes.c_uint64, ctypes.c_float, ctypes.c_int32
NORM = _structure(
    "NormArguments", tile=_Tile, x=_Rows, residual=_Rows, residual_out=_Rows, gate=_Rows, gain=_Rows, shift=_Rows,
    num_clean=_POINTER, out=_Rows, out_scale=_POINTER, one=_FLOAT, eps=_FLOAT,
)  # fmt: skip
GATED_RESIDUAL = _structure(
    "GatedResidualArguments", tile=_Tile, x=_Rows, residual=_Rows, gate=_Rows, num_clean=_POINTER, out=_Rows
)
ROPE = _structure(
    "RopeArguments", tile=_Tile, x=_Rows, weight=_POINTER, rope_cos=_POINTER, rope_sin=_POINTER, rope_stride=ctypes.c_int64,
    out=_Rows, head_dim=_INT, head_inverse=ctypes.c_uint32, eps=_FLOAT,
)  # fmt: skip
QUANTIZE_ROWS = _structure("QuantizeRowsArguments", tile=_Tile, x=_Rows, out=_Rows, out_scale=_POINTER)
COLUMN_SPREAD = _structure("ColumnSpreadArguments", tile=_Tile, x=_Rows, partial=_POINTER, scale=_POINTER, num_parts=_INT)
COLUMN_FINISH = _structure(
    "ColumnFinishArguments", tile=_Tile, partial=_POINTER, mean=_POINTER, scale=_POINTER, spare=_Rows, num_parts=_INT,
    num_spare=_INT,
)  # fmt: skip
QUANTIZE_CENTRED = _structure("QuantizeCentredArguments", tile=_Tile, x=_Rows, scale=_POINTER, offset=_POINTER, out=_Rows)
RESTORE = _structure("RestoreArguments", tile=_Tile, x=_Rows, scale=_POINTER, offset=_POINTER, out=_Rows)
FOLD_OFFSET = _structure(
    "FoldOffsetArguments", tile=_Tile, offset=_POINTER, weight=_Rows, weight_scale=_POINTER, bias=_POINTER, out=_POINTER,
    num_outputs=_INT,
)  # fmt: skip
GELU = _structure("GeluArguments", tile=_Tile, x=_Rows, out=_Rows)
CONVERT = _structure("ConvertArguments", tile=_Tile, x=_Rows, out=_Rows)
ADD = _structure("AddArguments", tile=_Tile, a=_Rows, b=_Rows, out=_Rows)
GEMV = _structure(
    "GemvArguments", tile=_Tile, num_outputs=_INT, silu_input=_INT, x=_Rows, weight=_Rows, bias=_POINTER, out=_Rows
)  # fmt: skip
RMS_NORM = _structure(
    "RmsNormArguments", tile=_Tile, x=_Rows, residual=_Rows, residual_out=_Rows, weight=_POINTER, out=_Rows, eps=_FLOAT
)
LAYER_NORM = _structure(
    "LayerNormArguments", tile=_Tile, x=_Rows, residual=_Rows, residual_out=_Rows, first=_POINTER, weight=_POINTER, bias=_POINTER,
    out=_Rows, eps=_FLOAT,
)  # fmt: skip
GATED_GELU = _structure("GatedGeluArguments", tile=_Tile, gate=_Rows, x=_Rows, out=_Rows)
BIASED_ATTENTION = _structure(
    "BiasedAttentionArguments", tile=_Tile, query=_Rows, key=_Rows, value=_Rows, out=_Rows, position_table=_POINTER,
    position_buckets=_POINTER, num_heads=_INT, head_dim=_INT, num_buckets=_INT,
)  # fmt: skip
CHANNEL_NORM = _structure(
    "ChannelNormArguments", tile=_Tile, x=_POINTER, gamma=_POINTER, past=_POINTER, out=_POINTER,
    num_frames=_INT, past_frames=_INT, from_zero=_INT, silu=_INT, lanes=_INT, scale=_FLOAT,
)  # fmt: skip
UPSAMPLE = _structure(
    "UpsampleArguments", tile=_Tile, x=_POINTER, out=_POINTER, width=_INT, frame_positions=_INT, interleave=_INT, repeat=_INT
)
LAYOUT = _structure(
    "LayoutArguments", tile=_Tile, planes=_POINTER, frames=_POINTER, channels=_INT, width=_INT, frame_positions=_INT, side=_INT,
    num_frames=_INT, first_frame=_INT,
)  # fmt: skip
SHORTCUT = _structure(
    "ShortcutArguments", tile=_Tile, x=_POINTER, level_input=_POINTER, out=_POINTER, width=_INT, frame_positions=_INT,
    in_channels=_INT, time_factor=_INT, space_factor=_INT, offset=_INT,
)  # fmt: skip
COLOURS = _structure("ColoursArguments", tile=_Tile, planes=_POINTER, colours=_POINTER, num_pixels=_INT)
PATCHES = _structure(
    "PatchArguments", tile=_Tile, x=_POINTER, out=_POINTER, channels=_INT, frames=_INT, height=_INT, width=_INT, patch_frames=_INT,
    patch_height=_INT, patch_width=_INT,
)  # fmt: skip
SOFTMAX = _structure("SoftmaxArguments", tile=_Tile, scores=_POINTER, out=_POINTER, num_keys=_INT, scale=_FLOAT)
TRANSPOSE = _structure("TransposeArguments", tile=_Tile, x=_Rows, out=_POINTER, padded=_INT)


class Module:
    """A cubin loaded into `device`'s context, where it stays as long as the context.

    Raises:
        CudaError: the cubin is not for this GPU.
    """

    def __init__(self, device: Device, cubin: bytes) -> None:
        from cuda.bindings import driver

        self._device, self._driver = device, driver
        self._handle = check("cuModuleLoadData", driver.cuModuleLoadData(cubin))
        self._functions: dict[str, Any] = {}

    def launch(
        self,
        name: str,
        structure: type[ctypes.Structure],
        rows: DeviceArray,
        *,
        aligned: bool = True,
        period: int = COLUMNS_PER_VECTOR,
        most: int = MAX_COLUMNS,
        blocks: int | None = None,
        threads: int | None = None,
        only_aligned: bool = False,
        **arguments: Argument,
    ) -> None:
        """Queue a kernel over the rows of `rows`: by 16-byte accesses if `aligned` and every array in `arguments` allow them.

        Args:
            rows: the matrix whose extents decide the grid, unless `blocks` and `threads` say otherwise.
            period: columns after which the kernel's treatment of a row repeats; the fastest kernel needs whole periods per thread step.
            most: columns one block can hold.
            only_aligned: the kernel exists once, for arrays that 16-byte accesses can read.
            arguments: the fields of `structure` but the tile; None is a null pointer.

        Raises:
            EngineError: too many columns, not a multiple of 8, or no such kernel in the cubin.
        """
        num_rows, num_columns = rows.shape
        if num_columns % COLUMNS_PER_VECTOR or (threads is None and num_columns > most):
            raise EngineError(
                f"{name} takes rows of a multiple of {COLUMNS_PER_VECTOR} columns, up to {most}; got {num_columns}"
            )
        if num_rows == 0:
            return
        packed = structure()
        packed.tile = _Tile(num_rows, num_columns)
        pointers: dict[int, int] = {}  # by byte in the structure
        for field, kind in structure._fields_[1:]:  # type: ignore[misc]
            value = arguments[field]
            if isinstance(value, DeviceArray):
                aligned = aligned and _is_aligned(value)
                setattr(packed, field, _Rows(value.pointer, value.row_stride) if kind is _Rows else value.pointer)
                pointers[getattr(structure, field).offset] = value.pointer
            elif value is not None:
                setattr(packed, field, value)
                if kind is _POINTER:
                    pointers[getattr(structure, field).offset] = int(value)
        threads = threads or -(-num_columns // (COLUMNS_PER_VECTOR * VECTORS_PER_THREAD * 32)) * 32
        blocks = blocks or -(-num_rows // ROWS_PER_BLOCK)
        width = threads * COLUMNS_PER_VECTOR
        full = num_columns == width * VECTORS_PER_THREAD and width % period == 0
        if only_aligned and not aligned:
            raise EngineError(f"{name} takes arrays whose rows are whole 16-byte words")
        suffix = "" if only_aligned else "_unaligned" if not aligned else "" if full else "_ragged"
        function = self._function(f"{name}{suffix}")
        self._device.calls.put(
            Launch(name, self._driver.cuLaunchKernel, function, (blocks, threads), self._device.stream, packed, pointers)
        )

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            result = self._driver.cuModuleGetFunction(self._handle, name.encode())
            if int(result[0]) == _NOT_FOUND:
                raise EngineError(
                    f"no kernel {name} for {self._device.name} ({self._device.arch}); FP8 exists from sm_89 on",
                    hint="use a bf16 bundle on this GPU",
                )
            function = self._functions[name] = check("cuModuleGetFunction", result)
        return function


class Launch:
    """One kernel with its arguments (`runtime.backends.cuda.calls.Call`).

    Args:
        grid: blocks, and threads of each.
        pointers: the addresses in `packed`, by their byte in it.
    """

    def __init__(
        self,
        name: str,
        launch: Any,
        function: Any,
        grid: tuple[int, int],
        stream: int,
        packed: ctypes.Structure,
        pointers: Mapping[int, int],
    ) -> None:
        self._name, self._launch = name, launch
        self._words = (_POINTER * (ctypes.sizeof(packed) // _WORD)).from_buffer(packed)
        self._symbols = relocations((byte // _WORD, pointer) for byte, pointer in pointers.items())
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(packed))
        blocks, threads = grid
        self._arguments = (function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(self._parameters), 0)

    def queue(self, addresses: Sequence[int]) -> None:
        relocate(self._words, self._symbols, addresses)
        result = self._launch(*self._arguments)  # which copies the arguments
        if result[0] != 0:
            check(f"cuLaunchKernel({self._name})", result)


class Clearing:
    """Zeros in all of a contiguous array (`runtime.backends.cuda.calls.Call`)."""

    def __init__(self, driver: Any, array: DeviceArray, stream: int) -> None:
        self._driver = driver
        self._arguments = [array.pointer, 0, array.nbytes, stream]
        self._symbols = relocations(enumerate(self._arguments[:1]))

    def queue(self, addresses: Sequence[int]) -> None:
        relocate(self._arguments, self._symbols, addresses)
        check("cuMemsetD8Async", self._driver.cuMemsetD8Async(*self._arguments))


_WORD = 8  # bytes of a pointer; every structure has some, so it is whole words
_NOT_FOUND = 500  # CUDA_ERROR_NOT_FOUND


def _is_aligned(array: DeviceArray) -> bool:
    """Whether 8 elements of any row can be read at once, 16 bytes each time."""
    unit = min(16, COLUMNS_PER_VECTOR * array.dtype.itemsize)
    has_rows = len(array.shape) > 1 and array.shape[0] > 1
    return array.pointer % unit == 0 and (not has_rows or array.row_stride * array.dtype.itemsize % unit == 0)
