"""The two libraries as data, the way to them, and what stands in the way on this machine."""

import logging
import mmap
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.backends.engine_file import EngineHeader, engine_for, read_header
from runtime.errors import BundleError, EngineError

log = logging.getLogger("wanrt.tensorrt")
_LAST_LINES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One of the two.

    `architectures` are the GPUs it runs on; empty for those its engines were built on. `compiles_here`: an engine becomes machine code
    on the machine that runs it, which a runtime cache keeps.
    """

    target: str
    module: str
    distribution: str
    architectures: tuple[str, ...] = ()
    compiles_here: bool = False


RTX = Library(
    target="rtx",
    module="tensorrt_rtx",
    distribution="tensorrt-rtx",
    architectures=("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    compiles_here=True,
)
TENSORRT = Library(target="tensorrt", module="tensorrt", distribution="tensorrt")
LIBRARIES = {library.target: library for library in (RTX, TENSORRT)}

_FP16_ONLY = ("sm_75",)
"""Architectures without bf16 and fp8."""
_REMEDIES = {
    "VERSION_MISMATCH": "they are of another version of it; rebuild the bundle",
    "UNSUPPORTED_CC": "they are for other GPUs; rebuild the bundle with --arch {architecture}",
    "OLD_CUDA_DRIVER": "the GPU's driver is too old for it; install a newer driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it; update nvidia-cuda-runtime",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "they are damaged or of another version of it; rebuild the bundle",
    "CUDA_ERROR": "the GPU's driver does not work with it; `nvidia-smi` shows its version",
}
"""What the library's diagnosis of an engine means for whoever wants to run it."""


def find_obstacle(library: Library) -> str | None:
    """Why this machine cannot run the library's engines at all; None when it can."""
    for module, distribution in ((library.module, library.distribution), ("cuda.bindings", "cuda-bindings")):
        if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
            return f'{distribution} is not installed; `pip install "wanrt[{library.target}]"`'
    from runtime.backends.cuda.device import find_architecture
    from runtime.backends.cuda.device import find_obstacle as find_gpu_obstacle

    if obstacle := find_gpu_obstacle():
        return obstacle
    architecture = find_architecture()
    if library.architectures and architecture not in library.architectures:
        possible = ", ".join(library.architectures)
        return f"{library.distribution} runs on {possible}; this GPU is {architecture}, which target cuda or tensorrt can use"
    return None


def find_engine_obstacle(library: Library, files: Iterable[Path]) -> str | None:
    """Why this machine cannot run these engines though it could run others; None when it can. Nothing is loaded onto the GPU.

    Raises:
        BundleError: a file is none of engines.
    """
    from runtime.backends.cuda.device import find_architecture

    architecture = find_architecture()
    try:
        opened = OpenLibrary(library)
    except EngineError as error:
        return f"{' '.join(error.message.split())}; {error.hint}"
    smallest: memoryview | None = None
    for file in files:
        data = map_file(file)
        header = read_header(data)
        if obstacle := _header_obstacle(header, opened):
            return obstacle
        found = engine_for(header, data, architecture)
        if found is None:
            built = ", ".join(header.architectures)
            return f"its engines are for {built}; this GPU is {architecture}: {_rebuild_for(library, architecture)}"
        if smallest is None or len(found[1]) < len(smallest):
            smallest = found[1]
    return None if smallest is None else opened.refusal(smallest, architecture)


def map_file(path: Path) -> memoryview:
    """A file's bytes, mapped.

    Raises:
        BundleError: it cannot be read, or is empty.
    """
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as exc:  # ValueError: an empty file cannot be mapped
        raise BundleError(f"{path.name}: cannot be read: {exc}", hint="copy the bundle again or rebuild it") from exc


class OpenLibrary:
    """A library that was imported, its log bridged into `logging`.

    Raises:
        EngineError: it does not load or start.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        hint = f"install a newer driver of the GPU, or reinstall {library.distribution}"
        try:
            self.trt: Any = import_module(library.module)
        except (ImportError, OSError) as exc:
            raise EngineError(f"{library.distribution} does not load: {exc}", hint=hint) from exc
        self.version = str(self.trt.__version__)
        self._lines = _LastLines()
        with self._lines:
            try:
                self._runtime = self.trt.Runtime(_logger(self.trt.ILogger))
            except (TypeError, RuntimeError) as exc:  # pybind11's way to say that the factory gave nothing
                raise self.failed(f"{library.distribution} {self.version} does not start", hint=hint) from exc

    def refusal(self, engine: memoryview, architecture: str) -> str | None:
        """Why the library would not run an engine here, by its own diagnosis; None when it would, or cannot tell."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return None
        with self._lines:
            validity, diagnosis = self._runtime.get_engine_validity(engine)
        if validity != self.trt.EngineValidity.INVALID:
            return None
        kinds = self.trt.EngineInvalidityDiagnostics
        known = (text for name, text in _REMEDIES.items() if int(getattr(kinds, name)) & int(diagnosis))
        found = [text.format(architecture=architecture) for text in known]
        reasons = found or self._lines.taken()[-1:] or ["it does not say why; `--verbose` shows more of its log"]
        what = f"{self.library.distribution} {self.version} refuses its engines"
        return f"{what}: {'; '.join(reasons)}"

    def load(self, engine: memoryview, stage: str) -> Any:
        """The engine, deserialised.

        Raises:
            EngineError: the library refused.
        """
        with self._lines:
            loaded = self._runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise self.failed(
                f"{stage}: {self.library.distribution} {self.version} does not open the engine",
                hint="install a newer driver if the lines above name it; otherwise rebuild the bundle",
            )
        return loaded

    def accepted(self, result: Any, what: str) -> None:
        """Check what a call of the library returned: every one says False or None when it failed.

        Raises:
            EngineError: it failed; the message has the last lines of the library's log.
        """
        if result is None or result is False:
            raise self.failed(what)

    def failed(self, what: str, *, hint: str = "rebuild the bundle; `--verbose` shows more of the log") -> EngineError:
        """The error for something the library did not do, with the last warnings and errors of its log."""
        lines = "".join(f"\n  {line[:400]}" for line in self._lines.taken())
        return EngineError(f"{what}{':' if lines else ''}{lines}", hint=hint)

    def listening(self) -> "_LastLines":
        """Keeps what the library logs within a `with`, for the error that may follow."""
        return self._lines


def _rebuild_for(library: Library, architecture: str) -> str:
    if not library.architectures:
        return "rebuild it on this machine"
    return f"rebuild it with --arch {architecture}{' --precision fp16' if architecture in _FP16_ONLY else ''}"


def _header_obstacle(header: EngineHeader, opened: OpenLibrary) -> str | None:
    library = opened.library
    if header.library != library.distribution:
        return f"{header.stage} was built by {header.library}; rebuild it with --target {library.target}"
    if header.library_version != opened.version:
        return (
            f"its engines are of {library.distribution} {header.library_version} and {opened.version} is installed; "
            f"`pip install {library.distribution}=={header.library_version}`, or rebuild the bundle"
        )
    return None


class _LastLines(logging.Handler):
    """The last lines that the library logs within a `with`: it has one logger a process, whoever made it, that leads to `logging`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[str] = deque(maxlen=_LAST_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())

    def taken(self) -> list[str]:
        """The lines, which are then forgotten."""
        lines = list(self._kept)
        self._kept.clear()
        return lines

    def __enter__(self) -> None:
        self._kept.clear()
        log.addHandler(self)

    def __exit__(self, *error: object) -> None:
        log.removeHandler(self)


@cache
def _logger(interface: Any) -> Any:
    """The library's logger, leading to `logging`. One for the whole process: the library goes on with the first it was given."""

    class Logger(interface):  # type: ignore[misc]
        def __init__(self) -> None:
            interface.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            kinds = interface.Severity
            levels = {
                kinds.INTERNAL_ERROR: logging.ERROR,
                kinds.ERROR: logging.ERROR,
                kinds.WARNING: logging.WARNING,
                kinds.INFO: logging.INFO,
            }
            log.log(levels.get(severity, logging.DEBUG), "%s", text.strip())

    return Logger()
