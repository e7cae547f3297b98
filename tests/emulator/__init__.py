"""A GPU of this process's memory, on which the `cuda` target's own code runs without a GPU, a driver or NVIDIA's libraries.

Replaced are four modules: NVRTC (`cuda.core`), the driver (`cuda.bindings.driver`), cuBLASLt (`nvmath.bindings.cublasLt`) and cuDNN (`cudnn`).
The kernels are the real ones, compiled by g++.

What it finds: wrong arguments, indices and layouts of kernels; work that is queued in the wrong order, or without an event between two
streams; memory that is read before it is written, after it is given back or beside it, since all such memory is NaN. What it cannot find: how
long anything takes; what NVRTC, the libraries or an architecture refuse; errors of the order in which tensor cores add, or of the fewer bits
in which Hopper keeps FP8 sums; races between the threads of a block, which take turns, or between blocks, which follow each other.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from runtime.backends.cuda.arena import Arena
from runtime.backends.cuda.device import Device
from tests.emulator import nvrtc
from tests.emulator.cublaslt import CublasLt
from tests.emulator.cudnn import Cudnn
from tests.emulator.driver import Driver
from tests.emulator.memory import Memory
from tests.emulator.streams import Streams
from tests.stand_ins import package

TOTAL_BYTES = 8 << 30


@contextmanager
def emulated_gpu(*, seed: int = 0, total_bytes: int = TOTAL_BYTES) -> Iterator[Driver]:
    """While it lasts there is one GPU, of sm_90, and what a `Device` gives back becomes NaN.

    Args:
        seed: of which stream goes on when.
        total_bytes: of device memory.
    """
    streams, memory = Streams(seed=seed), Memory(total_bytes=total_bytes)
    driver = Driver(streams, memory)
    bindings: dict[str, Any] = {
        "cuda": package("cuda"),
        "cuda.core": nvrtc,
        "cuda.bindings": package("cuda.bindings", driver=driver),
        "cuda.bindings.driver": driver,
        "nvmath": package("nvmath"),
        "nvmath.bindings": package("nvmath.bindings", cublasLt=(products := CublasLt(streams, memory))),
        "nvmath.bindings.cublasLt": products,
        "cudnn": Cudnn(streams, memory),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in bindings.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(Device, "__init__", _forgetting(Device.__init__, driver))
        yield driver


def _forgetting(opens: Any, driver: Driver) -> Any:
    """`Device.__init__`, after which memory that is given back to the device's pools is forgotten in the order of its stream."""

    def open_device(device: Device, ordinal: int = 0) -> None:
        opens(device, ordinal)
        pools: Any = device._pools
        release = pools._release

        def forget(arena: Arena, pointer: int) -> None:
            if not pools._closed:
                driver.forget(pointer, arena._used[pointer], device.stream)
            release(arena, pointer)

        pools._release = forget

    return open_device
