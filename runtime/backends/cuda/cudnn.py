"""Opens cuDNN on a device's stream, and executes its graphs there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.backends.cuda.calls import relocate, relocations
from runtime.backends.cuda.device import Device
from runtime.errors import CudaError, EngineError

MOST_GRAPHS = 1024
"""Graphs that are kept: a VAE has some 40 convolutions, for every shape of a tile anew, and building one takes a tenth of a second."""

MOST_WORKSPACE_BYTES = 56 << 20
"""Of attention and of convolutions, each: with cuBLASLt's 64 MiB and 16 of arrays that libraries keep, `runtime.memory.LIBRARY_BYTES`. A
candidate that asks for more is passed over."""


def open_cudnn(device: Device) -> tuple[Any, Any]:
    """The library's frontend and a handle on the device's stream; whoever asked destroys the handle.

    Raises:
        EngineError: nvidia-cudnn-frontend or cuDNN is not installed.
    """
    try:
        import cudnn
    except ImportError as exc:
        raise EngineError(f"the cuda target needs nvidia-cudnn-frontend: {exc}", hint='`pip install "wanrt[cuda]"`') from exc
    try:
        handle = cudnn.create_handle()
        cudnn.set_stream(handle=handle, stream=device.stream)
    except Exception as exc:  # the frontend raises RuntimeError for a missing library
        raise EngineError(
            f"cuDNN cannot be opened: {exc}", hint='`pip install "wanrt[cuda]"` brings nvidia-cudnn-cu13'
        ) from exc
    return cudnn, handle


class GraphCall:
    """One execution of a graph (`runtime.backends.cuda.calls.Call`).

    Args:
        problem: what the graph computes, for an error.
        execute: takes addresses by tensor id.
        pointers: the addresses.
    """

    def __init__(self, problem: object, execute: Callable[[dict[int, int]], None], pointers: Mapping[int, int]) -> None:
        self._problem, self._execute, self._pointers = problem, execute, dict(pointers)
        self._symbols = relocations(pointers.items())

    def queue(self, addresses: Sequence[int]) -> None:
        relocate(self._pointers, self._symbols, addresses)
        try:
            self._execute(self._pointers)
        except RuntimeError as exc:
            raise CudaError(f"{self._problem}: cuDNN failed: {exc}") from exc
