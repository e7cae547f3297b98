"""The two libraries as data, and the way to them: import, log, and what they say when they refuse."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, Self

from runtime.errors import BuildError, EngineError

log = logging.getLogger("wanrt.tensorrt")
_LAST_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One of the two. `architecture_groups`: those it compiles for without a GPU, each group sharing an engine; none: the GPU present."""

    target: str
    module: str
    distribution: str
    architecture_groups: tuple[tuple[str, ...], ...] = ()


RTX = Library(
    target="rtx",
    module="tensorrt_rtx",
    distribution="tensorrt-rtx",
    # Turing has no products with fused epilogues: an engine that is for it, too, has none on any other (TensorRT-RTX 1.7.1)
    architecture_groups=(("sm_75",), ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")),
)
TENSORRT = Library(target="tensorrt", module="tensorrt", distribution="tensorrt")


class Session:
    """A library that was imported, its log bridged into `logging` and its builder open. Use with `with`.

    The library knows one log at a time: what a second session builds while another is open is told to the first.
    """

    def __init__(self, library: Library) -> None:
        """Import the library and open its builder.

        Raises:
            BuildError: it is not installed, or does not start on this machine.
        """
        self.library = library
        self.trt = _import(library)
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self.listeners: list[Callable[[str], None]] = []
        """Called with every line of the log, whatever its severity."""
        self.constants: list[Any] = []
        """Arrays that the network under construction points to; they live until the next."""
        self.logger = _logger_class(self.trt)(self)
        try:
            self.builder = self.trt.Builder(self.logger)
        except (TypeError, RuntimeError) as exc:  # pybind11's way to say that the factory gave nothing
            raise self.refused(f"{library.module} {self.trt.__version__} does not start", hint=_start_hint(library)) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give the builder up, and with it the log."""
        self.constants.clear()
        del self.builder

    @property
    def version(self) -> str:
        """The library's version, which an engine has to be read by."""
        return str(self.trt.__version__)

    def heard(self, severity: Any, text: str) -> None:
        """Take a line of the library's log."""
        levels = self.trt.ILogger.Severity
        if severity in (levels.INTERNAL_ERROR, levels.ERROR, levels.WARNING):
            self.last_lines.append(text.strip())
        level = {
            levels.INTERNAL_ERROR: logging.ERROR,
            levels.ERROR: logging.ERROR,
            levels.WARNING: logging.INFO,  # of interest to who works on the graphs; what stops a build is an error
            levels.INFO: logging.DEBUG,
        }.get(severity)
        if level is not None:
            log.log(level, "%s", text.strip())
        for listener in self.listeners:
            listener(text)

    def refused(self, what: str, *, hint: str = "") -> BuildError:
        """The error for something the library did not do, with the last warnings and errors of its log."""
        lines = "".join(f"\n  {line[:400]}" for line in self.last_lines)
        self.last_lines.clear()
        return BuildError(
            f"{what}{':' if lines else ''}{lines}", hint=hint or f"`--verbose` shows what else {self.library.module} warned of"
        )


def architecture_present(library: Library) -> str:
    """The GPU that a library without `architecture_groups` builds for, such as `sm_90`.

    Raises:
        BuildError: there is none, or its driver cannot be asked.
    """
    from runtime.backends.cuda.device import Device

    try:
        with Device() as device:
            return device.arch
    except EngineError as exc:
        raise BuildError(
            f"target {library.target} builds for the GPU present: {exc.message}", hint=_start_hint(library)
        ) from exc


def _import(library: Library) -> Any:
    try:
        return import_module(library.module)
    except ImportError as exc:
        raise BuildError(
            f"target {library.target} is built with {library.distribution}, which is not installed",
            hint=f'`pip install "wanrt[{library.target},export]"`',
        ) from exc
    except OSError as exc:  # its shared libraries
        raise BuildError(f"{library.distribution} is installed and does not load: {exc}", hint="reinstall it") from exc


def _start_hint(library: Library) -> str:
    if library.architecture_groups:
        return f"reinstall {library.distribution}"
    return "build on the machine that is to run it; --target rtx builds anywhere, for GeForce and RTX cards"


def _logger_class(trt: Any) -> Any:
    """The library's logger interface, which exists only once it is imported, leading to a session."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self, session: Session) -> None:
            trt.ILogger.__init__(self)
            self._session = session

        def log(self, severity: Any, text: str) -> None:
            self._session.heard(severity, text)

    return Logger
