"""The table of targets this runtime can run, best first, and what each needs of the machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from runtime.backends.base import Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """What backends are opened with; each takes what concerns it."""

    num_threads: int
    read_kernels: Callable[[], Mapping[str, bytes]]
    """Compiled kernels of the bundle's target, by GPU architecture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeTarget:
    """How one target runs. `obstacle` says why this machine cannot, or None when it can."""

    name: str
    needs: str
    obstacle: Callable[[], str | None]
    open_backend: Callable[[str, BackendOptions], Backend]
    """Opens the backend of one network (`runtime.stages.NETWORKS`)."""


def _cpu_obstacle() -> str | None:
    if find_spec("onnxruntime") is None:
        return 'ONNX Runtime is not installed; `pip install "wanrt[cpu]"`'
    return None


def _open_cpu(network: str, options: BackendOptions) -> Backend:
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(num_threads=options.num_threads)


def _cuda_obstacle() -> str | None:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return 'cuda-bindings is not installed; `pip install "wanrt[cuda]"`'
    from runtime.backends.cuda.device import find_obstacle

    return find_obstacle() or _cpu_obstacle()


def _open_cuda(network: str, options: BackendOptions) -> Backend:
    if network == "transformer":
        from runtime.backends.cuda.engine import CudaBackend

        return CudaBackend(options.read_kernels())
    from runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    return OnnxRuntimeCudaBackend(num_threads=options.num_threads)


RUNTIME_TARGETS = (
    RuntimeTarget(
        name="cuda", needs="an NVIDIA GPU of sm_80 or later and its driver", obstacle=_cuda_obstacle, open_backend=_open_cuda
    ),
    RuntimeTarget(name="cpu", needs="any CPU, ONNX Runtime", obstacle=_cpu_obstacle, open_backend=_open_cpu),
)
