"""Launches the kernels around self-attention: values centred and narrowed to fp8, what comes out of it put back, spare keys filled.

Arrays are as in `runtime.backends.cuda.kernels`: matrices with any `row_stride`, columns in multiples of 8, outputs the caller's.
"""

from runtime.backends.cuda import launch
from runtime.backends.cuda.array import Unit, expect
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.errors import EngineError
from runtime.specs import DType

_SPREAD_BLOCKS = 1056  # eight for each of an H200's multiprocessors, as many as fit at once
_SPREAD_THREADS = 128
_FINISH_COLUMNS, _FINISH_THREADS = 32, 256
_FOLD_THREADS = 256


class AttentionKernels:
    """These kernels of one cubin, loaded into `device`'s context; they are unloaded with it.

    Methods raise EngineError for what a kernel cannot do, ValueError for shapes and dtypes that do not fit.

    Args:
        cubin: what `engines.targets.cuda.compile.compile_kernels` made for `device.arch`.

    Raises:
        CudaError: the cubin is not for this GPU.
    """

    def __init__(self, device: Device, cubin: bytes) -> None:
        from cuda.bindings import driver

        self._device, self._driver = device, driver
        self._module = launch.Module(device, cubin)
        self._partial = device.empty((_SPREAD_BLOCKS * _SPREAD_THREADS * launch.COLUMNS_PER_VECTOR * 3,), DType.F32)

    def quantize_centred(self, x: DeviceArray, out: DeviceArray, scale: DeviceArray, offset: DeviceArray) -> None:
        """`out = (x - offset) / scale` in fp8: offset f32 [D] is each column's mean, scale f32 [1] puts what is furthest from it at 448."""
        num_columns = x.shape[1]
        expect(x, DType.BF16, x.shape)
        expect(out, DType.F8_E4M3, x.shape)
        expect(scale, DType.F32, (1,))
        expect(offset, DType.F32, (num_columns,))
        self._spread(x, mean=offset, scale=scale)
        self._module.launch("quantize_centred", launch.QUANTIZE_CENTRED, x, x=x, scale=scale.pointer, offset=offset, out=out)

    def restore(self, x: DeviceArray, out: DeviceArray) -> None:
        """What x, fp8 with a unit, stands for, in bf16."""
        unit = _unit(x)
        expect(out, DType.BF16, x.shape)
        self._module.launch("restore", launch.RESTORE, x, x=x, scale=unit.scale.pointer, offset=unit.offset, out=out)

    def fold_offset(
        self, x: DeviceArray, weight: DeviceArray, weight_scale: DeviceArray, bias: DeviceArray, out: DeviceArray
    ) -> None:
        """The bias of a product of x, which has a unit, that makes up for leaving x's offset out: `bias + weight @ offset`.

        weight is fp8 [O, D] with scales f32 [O]; bias and out bf16 [O].
        """
        offset, num_outputs = _unit(x).offset, weight.shape[0]
        expect(weight, DType.F8_E4M3, (num_outputs, offset.size))
        expect(weight_scale, DType.F32, (num_outputs,))
        for array in (bias, out):
            expect(array, DType.BF16, (num_outputs,))
        self._module.launch(
            "fold_offset", launch.FOLD_OFFSET, offset.reshape(1, offset.size),
            blocks=-(-num_outputs // (_FOLD_THREADS // 32)), threads=_FOLD_THREADS,
            offset=offset, weight=weight, weight_scale=weight_scale.pointer, bias=bias.pointer, out=out.pointer,
            num_outputs=num_outputs,
        )  # fmt: skip

    def fill_spare_rows(self, x: DeviceArray, count: int) -> None:
        """Set the first `count` spare rows of x, bf16, to the mean of its rows."""
        expect(x, DType.BF16, x.shape)
        filled = x.with_spare_rows(count).rows(x.shape[0], x.shape[0] + count)
        self._spread(x, spare=filled)

    def clear_spare_rows(self, x: DeviceArray, count: int) -> None:
        """Set the first `count` spare rows of x, fp8 and contiguous, to zeros."""
        filled = x.with_spare_rows(count).rows(x.shape[0], x.shape[0] + count)
        if x.dtype is not DType.F8_E4M3 or not x.is_contiguous:
            raise ValueError(f"expected a contiguous array of F8_E4M3, got {x.dtype} with row stride {x.row_stride}")
        self._device.calls.put(launch.Clearing(self._driver, filled, self._device.stream))

    def _spread(
        self,
        x: DeviceArray,
        *,
        mean: DeviceArray | None = None,
        scale: DeviceArray | None = None,
        spare: DeviceArray | None = None,
    ) -> None:
        num_rows, num_columns = x.shape
        groups = -(-num_columns // (launch.COLUMNS_PER_VECTOR * _SPREAD_THREADS))
        if groups > _SPREAD_BLOCKS:
            raise EngineError(f"the mean of {num_columns} columns at once is more than there is room for")
        num_parts = max(1, min(_SPREAD_BLOCKS // groups, num_rows // 8))
        partial, scale_pointer = self._partial.pointer, None if scale is None else scale.pointer
        self._module.launch(
            "column_spread", launch.COLUMN_SPREAD, x, blocks=groups * num_parts, threads=_SPREAD_THREADS,
            x=x, partial=partial, scale=scale_pointer, num_parts=num_parts,
        )  # fmt: skip
        self._module.launch(
            "column_spread_finish", launch.COLUMN_FINISH, x, only_aligned=True,
            blocks=-(-num_columns // _FINISH_COLUMNS), threads=_FINISH_THREADS,
            partial=partial, mean=None if mean is None else mean.pointer, scale=scale_pointer, spare=spare,
            num_parts=num_parts, num_spare=0 if spare is None else spare.shape[0],
        )  # fmt: skip


def _unit(array: DeviceArray) -> Unit:
    """Check an fp8 matrix with a unit."""
    if array.dtype is not DType.F8_E4M3 or array.unit is None:
        raise ValueError(f"expected F8_E4M3 with a unit, got {array.dtype} {list(array.shape)}")
    expect(array.unit.scale, DType.F32, (1,))
    expect(array.unit.offset, DType.F32, array.shape[1:])
    return array.unit
