"""A generation's device memory on `rtx` and `tensorrt`, counted: arrays as they come, scratch memory as the engines say or their files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from runtime.backends.base import Array
from runtime.backends.cuda.array import DeviceArray
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.rehearsal import Counted, rehearse_on
from runtime.backends.engine_file import EnginePart, read_header
from runtime.backends.tensorrt.engine import Executable, JoinedPatches, TensorRtBackend
from runtime.backends.tensorrt.library import Library, map_file
from runtime.component import Component
from runtime.memory import Layout
from runtime.specs import Precision, StageSpec


def rehearse(
    library: Library,
    stages: tuple[StageSpec, ...],
    engine_files: Mapping[str, Path],
    drive: Callable[[Component], object],
    *,
    attention: Precision,
    opened: TensorRtBackend | None = None,
) -> Layout:
    """`runtime.backends.cuda.rehearsal.rehearse`.

    Args:
        opened: loads the engines and asks each for the scratch memory of the shapes at hand; without it, what a file says of the
            largest shapes its engine was built for counts.

    Raises:
        EngineError: an engine file cannot be opened.
        BundleError: an engine file is none.
    """
    with _RehearsedBackend(library, attention=attention) as backend:
        backend.opened = opened
        if opened is None:
            backend.counted.arch = _some_architecture(engine_files)
        else:
            opened.device.make_current()  # this may be another thread than the one that opened it
            backend.counted.arch = opened.device.arch
        return rehearse_on(backend, backend.counted, stages, engine_files, drive)


class _Uncomputed:
    """Stands in for an engine: takes its memory and does nothing."""

    def __init__(self, part: EnginePart, executable: Executable | None) -> None:
        self._most, self._executable = part.context_bytes, executable

    def scratch_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return self._most if self._executable is None else self._executable.scratch_bytes(shapes)

    def enqueue(self, pointers: Mapping[str, int], scratch: int, stream: int) -> None: ...

    def close(self) -> None: ...


class _RehearsedBackend(TensorRtBackend):
    opened: TensorRtBackend | None = None

    def _open_device(self) -> Device:
        self.counted = Counted()
        return cast(Device, self.counted)

    def _open_library(self, library: Library, cache: Path | None) -> None: ...

    def _close_library(self) -> None: ...

    def _load(self, path: Path, stage: StageSpec, part: EnginePart, data: memoryview) -> Executable:
        if self.opened is None:
            return _Uncomputed(part, None)
        return _Uncomputed(part, self.opened.open_form(path, stage, fp8_attention=part.fp8_attention).executable)

    def fetch(self, tensor: DeviceArray | JoinedPatches) -> Callable[[], Array]:
        array = self.to_host(tensor)  # not the tensor, which the caller may drop
        return lambda: array


def _some_architecture(engine_files: Mapping[str, Path]) -> str:
    """One that the engines are for, the last: it has all forms of attention."""
    header = read_header(map_file(next(iter(engine_files.values()))))
    return [name for part in header.parts for name in part.architectures][-1]
