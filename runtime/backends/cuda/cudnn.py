"""Opens cuDNN on a device's stream."""

from typing import Any

from runtime.backends.cuda.device import Device
from runtime.errors import EngineError


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
