"""The table of targets this runtime can run, best first, and what each needs of the machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.backends.base import Session
from runtime.memory import Layout
from runtime.specs import Precision, StageSpec

if TYPE_CHECKING:  # a component opens backends' engines, so it imports this package
    from runtime.component import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """What sessions are opened with; each target takes what concerns it."""

    num_threads: int
    read_kernels: Callable[[], Mapping[str, bytes]]
    """Compiled kernels of the bundle's target, by GPU architecture."""
    vram: int | None = None
    """Bytes of device memory to use; None: what is free, less a margin."""


Rehearse = Callable[[tuple[StageSpec, ...], Mapping[str, Path], Callable[["Component"], object], Precision], Layout]
"""Device memory that work on a network needs besides its weights: its stages, its engine files, the work, attention's precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeTarget:
    """How one target runs. `obstacle` says why this machine cannot, or None when it can."""

    name: str
    needs: str
    obstacle: Callable[[], str | None]
    open_session: Callable[[BackendOptions], Session]
    attention: tuple[Precision, ...] = ()
    """Precisions that self-attention can be asked for, the default first; empty where the engines decide it."""
    note: str = ""
    """What to know of it even where it runs."""
    rehearse: Rehearse | None = None
    """None for a target without device memory of its own."""


def _cpu_obstacle() -> str | None:
    if find_spec("onnxruntime") is None:
        return 'ONNX Runtime is not installed; `pip install "wanrt[cpu]"`'
    return None


def _open_cpu(options: BackendOptions) -> Session:
    from runtime.backends.onnxruntime import OnnxRuntimeBackend
    from runtime.backends.separate import SeparateSession

    return SeparateSession(lambda network: OnnxRuntimeBackend(num_threads=options.num_threads))


def _open_emulated(options: BackendOptions) -> Session:
    from runtime.backends.emulated import EmulatedBackend
    from runtime.backends.separate import SeparateSession

    return SeparateSession(lambda network: EmulatedBackend(num_threads=options.num_threads))


def _cuda_obstacle() -> str | None:
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return 'cuda-bindings is not installed; `pip install "wanrt[cuda]"`'
    from runtime.backends.cuda.device import find_obstacle

    return find_obstacle()


def _open_cuda(options: BackendOptions) -> Session:
    from runtime.backends.cuda.copies import CopyStream
    from runtime.backends.cuda.engine import CudaBackend
    from runtime.backends.cuda.session import CudaSession

    backend = CudaBackend(options.read_kernels())
    try:
        return CudaSession(backend, CopyStream(backend.device), vram=options.vram)
    except BaseException:
        backend.close()
        raise


def _rehearse_cuda(
    stages: tuple[StageSpec, ...], engines: Mapping[str, Path], drive: Callable[["Component"], object], attention: Precision
) -> Layout:
    from runtime.backends.cuda.rehearsal import rehearse

    return rehearse(stages, engines, drive, attention=attention)


RUNTIME_TARGETS = (
    RuntimeTarget(
        name="cuda",
        needs="an NVIDIA GPU of sm_80 or later and its driver",
        obstacle=_cuda_obstacle,
        open_session=_open_cuda,
        attention=(Precision.BF16, Precision.FP8),
        rehearse=_rehearse_cuda,
    ),
    RuntimeTarget(
        name="cpu",
        needs="any CPU, ONNX Runtime",
        obstacle=_cpu_obstacle,
        open_session=_open_cpu,
        attention=(Precision.FP32,),
    ),
    RuntimeTarget(
        name="emulated",
        needs="any CPU, ONNX Runtime, and time",
        obstacle=_cpu_obstacle,
        open_session=_open_emulated,
        note="emulates the rounding of narrow types in float32, slowly: to compare with, not to make videos",
    ),
)
