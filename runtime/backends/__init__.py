"""The table of targets this runtime can run, best first, and what each needs of the machine."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from runtime.backends.base import Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeTarget:
    """How one target runs. `obstacle` says why this machine cannot, or None when it can."""

    name: str
    needs: str
    obstacle: Callable[[], str | None]
    open_backend: Callable[[int], Backend]  # takes num_threads


def _cpu_obstacle() -> str | None:
    if find_spec("onnxruntime") is None:
        return 'ONNX Runtime is not installed; `pip install "wanrt[cpu]"`'
    return None


def _open_cpu(num_threads: int) -> Backend:
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(num_threads=num_threads)


RUNTIME_TARGETS = (RuntimeTarget(name="cpu", needs="any CPU, ONNX Runtime", obstacle=_cpu_obstacle, open_backend=_open_cpu),)
