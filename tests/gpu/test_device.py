"""Device memory: what goes in comes out, what is dropped is used again, and what cannot fit says so."""

import subprocess
import sys

import numpy as np
import pytest

from runtime.backends.cuda.device import Device
from runtime.errors import CudaError, DeviceMemoryError, EngineError
from runtime.specs import DType

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", list(DType))
def test_bits_come_back_as_they_went(device: Device, dtype: DType) -> None:
    host_type = {4: np.uint32, 2: np.uint16, 1: np.uint8, 8: np.int64}[dtype.itemsize]
    bits = np.arange(7 * 33, dtype=host_type).reshape(7, 33)
    array = bits if dtype is DType.I64 else bits.view({DType.F32: np.float32, DType.F16: np.float16}.get(dtype, host_type))
    sent = device.from_host(array, dtype)
    assert (sent.shape, sent.dtype, sent.row_stride, sent.nbytes) == ((7, 33), dtype, 33, 7 * 33 * dtype.itemsize)
    np.testing.assert_array_equal(device.to_host(sent).view(host_type), bits)


def test_views_of_rows_and_columns_read_the_same_memory(device: Device) -> None:
    numbers = np.arange(60, dtype=np.float32).reshape(6, 10)
    array = device.from_host(numbers)
    np.testing.assert_array_equal(device.to_host(array.columns(3, 7)), numbers[:, 3:7])
    np.testing.assert_array_equal(device.to_host(array.rows(2, 5).columns(1, 4)), numbers[2:5, 1:4])
    np.testing.assert_array_equal(device.to_host(array.rows(1, 3).reshape(4, 5)), numbers[1:3].reshape(4, 5))
    with pytest.raises(ValueError, match="columns 3:11"):
        array.columns(3, 11)
    with pytest.raises(ValueError, match="cannot see"):
        array.columns(3, 7).reshape(24)


def test_scalars_and_empty_arrays_travel(device: Device) -> None:
    assert device.to_host(device.from_host(np.array(3.5, np.float32))) == np.float32(3.5)
    assert device.to_host(device.zeros((0, 8), DType.BF16)).shape == (0, 8)


def test_zeros_are_zero_in_memory_that_was_used_before(device: Device) -> None:
    device.from_host(np.ones((1000,), np.float32)).free()
    assert not device.to_host(device.zeros((1000,), DType.F32)).any()


def test_dropped_memory_is_handed_out_again_and_counted() -> None:
    with Device() as device:
        first = device.empty((3 << 20,), DType.F8_E4M3)
        pointer = first.pointer
        assert (device.used_bytes, device.reserved_bytes) == (3 << 20, 4 << 20)  # the driver gives whole 2 MiB pages
        view = first.rows(0, 5)
        del first
        assert device.used_bytes == 3 << 20  # the view keeps it
        del view
        assert device.used_bytes == 0
        assert device.empty((4 << 20,), DType.F8_E4M3).pointer == pointer
        assert (device.peak_bytes, device.reserved_bytes) == (4 << 20, 4 << 20)
        device.trim()
        assert device.reserved_bytes == 0


def test_a_slab_goes_back_to_the_driver_when_it_is_freed() -> None:
    with Device() as device:
        slab = device.slab((2 << 20) + 1)
        assert (slab.nbytes, device.used_bytes, device.reserved_bytes) == ((2 << 20) + 1, 0, 4 << 20)
        slab.free()
        assert device.reserved_bytes == 0


def test_more_memory_than_there_is_names_what_is_needed_and_free(device: Device) -> None:
    _, total = device.memory()
    with pytest.raises(DeviceMemoryError, match=r"GiB more is needed, .* of .* GiB are free"):
        device.empty((total + 1,), DType.F8_E4M3)
    assert device.to_host(device.zeros((4,), DType.F32)).shape == (4,)  # the device still works


def test_the_limit_holds_and_what_is_kept_for_later_makes_room_first() -> None:
    with Device() as device:
        device.limit_bytes = 8 << 20
        device.empty((6 << 20,), DType.F8_E4M3).free()
        kept = device.empty((8 << 20,), DType.F8_E4M3)  # the 6 MiB go back for it
        with pytest.raises(DeviceMemoryError, match=r"8\.0 MiB of a budget of 8\.0 MiB are in use"):
            device.slab(1)
        assert kept.nbytes == device.reserved_bytes == device.peak_bytes == 8 << 20


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(CudaError, match="cuDeviceGet failed with 101: CUDA_ERROR_INVALID_DEVICE"):
        Device(ordinal=99)


def test_arrays_may_outlive_their_device() -> None:
    with Device() as device:
        array = device.zeros((4,), DType.F32)
    array.free()
    assert device.reserved_bytes == 0


def test_the_device_has_a_clean_name_and_an_architecture(device: Device) -> None:
    assert device.name.isprintable() and device.name
    assert device.arch.removeprefix("sm_").isdigit()


def test_numpy_types_that_mean_nothing_are_refused(device: Device) -> None:
    with pytest.raises(ValueError, match="float64"):
        device.from_host(np.zeros(3))
    with pytest.raises(ValueError, match="float32 cannot become BF16"):
        device.from_host(np.zeros(3, np.float32), DType.BF16)


_ALL_LIBRARIES = """
import sys
from runtime.backends.cuda.attention import Attention
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.linear import Linear
from runtime.specs import DType
with Device() as device, Linear(device) as linear, Attention(device) as attention:
    x = device.zeros((64, 256), DType.BF16)
    linear.run(x, device.zeros((256, 256), DType.BF16), None, x)
    attention.run(x, x, x, device.empty((64, 256), DType.BF16), num_heads=2)
    device.synchronize()
print(sorted({"torch", "onnx", "transformers", "cupy", "cutlass"} & sys.modules.keys()))
"""


def test_products_and_attention_import_no_framework() -> None:
    done = subprocess.run([sys.executable, "-c", _ALL_LIBRARIES], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_machine_without_a_gpu_gets_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match="needs cuda-bindings"):
        Device()
