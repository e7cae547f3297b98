"""The table of targets this runtime can run, best first, and what each needs of the machine."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from runtime.backends.base import Backend, Session
from runtime.backends.engine_file import EngineHeader, read_file_header
from runtime.memory import Layout
from runtime.precision import attention_precision
from runtime.specs import Precision, StageSpec

if TYPE_CHECKING:  # a component opens backends' engines, so it imports this package
    from runtime.backends.cuda.session import DeviceBackend
    from runtime.backends.tensorrt.library import Library
    from runtime.component import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """What sessions are opened with; each target takes what concerns it."""

    num_threads: int
    read_kernels: Callable[[], Mapping[str, bytes]]
    """Compiled kernels of the bundle's target, by GPU architecture."""
    vram: int | None = None
    """Bytes of device memory to use; None: what is free, less a margin."""
    cache: Path | None = None
    """Folder for what a target compiles on this machine; None to keep nothing."""


Rehearse = Callable[[tuple[StageSpec, ...], Mapping[str, Path], Callable[["Component"], object], Precision], Layout]
"""Device memory that work on a network needs besides its weights: its stages, its engine files, the work, attention's precision."""


class RehearseOn(Protocol):
    """A `Rehearse` that may ask the target's own device, in the session given, what its engines take."""

    def __call__(
        self,
        stages: tuple[StageSpec, ...],
        engine_files: Mapping[str, Path],
        drive: Callable[["Component"], object],
        attention: Precision,
        session: Session | None = None,
        /,
    ) -> Layout: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeTarget:
    """How one target runs. `obstacle` says why this machine cannot, or None when it can."""

    name: str
    needs: str
    obstacle: Callable[[], str | None]
    open_session: Callable[[BackendOptions], Session]
    attention: Callable[[Precision], tuple[Precision, ...]]
    """Precisions that self-attention can be asked for in a bundle of this precision, the default first."""
    engine_obstacle: Callable[[Iterable[Path], Iterable[str]], str | None] = lambda files, kernels: None
    """Why this machine, which runs the target, cannot run these engine files, with kernels for these architectures; None when it can."""
    rehearse: RehearseOn | None = None
    """None for a target without device memory of its own."""
    note: str = ""
    """What to know of it even where it runs."""
    header: Callable[[Path], EngineHeader] | None = None
    """What an engine file says of itself: architectures, scratch memory; None where engines say nothing."""


def _cpu_obstacle() -> str | None:
    if find_spec("onnxruntime") is None:
        return 'ONNX Runtime is not installed; `pip install "wanrt[cpu]"`'
    return None


def _attention_as_built(precision: Precision) -> tuple[Precision, ...]:
    return (attention_precision(precision),)


def _attention_as_built_or_fp8(precision: Precision) -> tuple[Precision, ...]:
    own = attention_precision(precision)
    return (own, Precision.FP8) if own is Precision.BF16 else (own,)


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


def _cuda_engine_obstacle(files: Iterable[Path], kernels: Iterable[str]) -> str | None:
    from runtime.architectures import KERNELS_FROM, nearest
    from runtime.backends.cuda.device import find_architecture

    if nearest(own := find_architecture(), built := tuple(kernels)) is not None:
        return None
    return f"its kernels are for {', '.join(built)}, this GPU is {own}: {KERNELS_FROM}"


def _open_cuda(options: BackendOptions) -> Session:
    from runtime.backends.cuda.engine import CudaBackend

    return _session_over(CudaBackend(options.read_kernels()), options)


def _session_over(backend: "DeviceBackend", options: BackendOptions) -> Session:
    """The session that a backend's GPU is held by; the backend is closed where there comes none."""
    from runtime.backends.cuda.copies import CopyStream
    from runtime.backends.cuda.session import CudaSession

    try:
        return CudaSession(backend, CopyStream(backend.device), vram=options.vram)
    except BaseException:
        backend.close()
        raise


def _rehearse_cuda(
    stages: tuple[StageSpec, ...],
    engines: Mapping[str, Path],
    drive: Callable[["Component"], object],
    attention: Precision,
    session: Session | None = None,
) -> Layout:
    from runtime.backends.cuda.engine import CudaBackend
    from runtime.backends.cuda.rehearsal import rehearse

    with _opened(session) as opened:
        plans = None if opened is None else cast(CudaBackend, opened).plans
        return rehearse(stages, engines, drive, attention=attention, plans=plans)


def _opened(session: Session | None) -> AbstractContextManager[Backend | None]:
    """The backend that a rehearsal may share with what is to run, if it is open."""
    return nullcontext() if session is None else session.backend("rehearsal")


def _tensorrt_target(name: str, needs: str) -> RuntimeTarget:
    """`rtx` and `tensorrt`, which differ in the library."""

    def library() -> "Library":
        from runtime.backends.tensorrt.library import LIBRARIES

        return LIBRARIES[name]

    def obstacle() -> str | None:
        from runtime.backends.tensorrt.library import find_obstacle

        return find_obstacle(library())

    def engine_obstacle(files: Iterable[Path], kernels: Iterable[str]) -> str | None:
        from runtime.backends.tensorrt.library import find_engine_obstacle

        return find_engine_obstacle(library(), files)

    def open_session(options: BackendOptions) -> Session:
        from runtime.backends.tensorrt.engine import TensorRtBackend

        return _session_over(TensorRtBackend(library(), cache=options.cache), options)

    def rehearse(
        stages: tuple[StageSpec, ...],
        engines: Mapping[str, Path],
        drive: Callable[["Component"], object],
        attention: Precision,
        session: Session | None = None,
    ) -> Layout:
        from runtime.backends.tensorrt.engine import TensorRtBackend
        from runtime.backends.tensorrt.rehearsal import rehearse

        with _opened(session) as opened:
            backend = cast(TensorRtBackend | None, opened)
            return rehearse(library(), stages, engines, drive, attention=attention, opened=backend)

    return RuntimeTarget(
        name=name,
        needs=needs,
        obstacle=obstacle,
        engine_obstacle=engine_obstacle,
        open_session=open_session,
        attention=_attention_as_built_or_fp8,
        rehearse=rehearse,
        note="its engines were built, but have never run: this project has no GPU that runs them",
        header=read_file_header,
    )


RUNTIME_TARGETS = (
    RuntimeTarget(
        name="cuda",
        needs="an NVIDIA GPU of sm_80 or later and its driver",
        obstacle=_cuda_obstacle,
        engine_obstacle=_cuda_engine_obstacle,
        open_session=_open_cuda,
        attention=lambda _: (Precision.BF16, Precision.FP8),
        rehearse=_rehearse_cuda,
    ),
    _tensorrt_target("tensorrt", "the NVIDIA GPU that its engines were built on, and TensorRT"),
    _tensorrt_target("rtx", "a GeForce or RTX GPU of sm_75 or later, not sm_90, and TensorRT-RTX"),
    RuntimeTarget(
        name="cpu",
        needs="any CPU, ONNX Runtime",
        obstacle=_cpu_obstacle,
        open_session=_open_cpu,
        attention=_attention_as_built,
    ),
    RuntimeTarget(
        name="emulated",
        needs="any CPU, ONNX Runtime, and time",
        obstacle=_cpu_obstacle,
        open_session=_open_emulated,
        attention=_attention_as_built,
        note="emulates the rounding of narrow types in float32, slowly: to compare with, not to make videos",
    ),
)
