"""Engines of TensorRT-RTX and TensorRT on the device of the `cuda` target: one stream, one arena, weights as pointers.

Arrays, weights and their streaming are `runtime.backends.cuda`'s; a tensor is a `DeviceArray`. Nothing here waits for the device.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from runtime.backends.base import Array
from runtime.backends.cuda.array import DeviceArray
from runtime.backends.cuda.device import Device, driver_version
from runtime.backends.cuda.readback import Readback
from runtime.backends.engine_file import EngineHeader, EnginePart, Profile, engine_for, read_header
from runtime.backends.tensorrt.cache import RuntimeCache, cache_name
from runtime.backends.tensorrt.library import Library, OpenLibrary, map_file
from runtime.backends.tensorrt.loaded import LoadedEngine
from runtime.errors import BundleError, EngineError
from runtime.geometry import patchify, unpatchify
from runtime.precision import is_self_attention
from runtime.specs import DType, Precision, StageSpec, match_shapes, resolve
from runtime.variants import TransformerArch

log = logging.getLogger(__name__)


class Executable(Protocol):
    """What a stage's engine runs on: the library's, or, in a rehearsal, nothing."""

    def scratch_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Take the extents of the inputs for the runs to come: the memory that such a run needs for itself."""
        ...

    def enqueue(self, pointers: Mapping[str, int], scratch: int, stream: int) -> None:
        """Queue one run: where every tensor lies, where the scratch memory is."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


@dataclass(frozen=True, slots=True)
class JoinedPatches:
    """Latents as the patches that they are joined from on their way to the host."""

    patches: DeviceArray
    grid: tuple[int, int, int]
    arch: TransformerArch


class TensorRtEngine:
    """One stage.

    Scratch memory is the arena's, for the extents at hand: taken for each run and given back at once, so that all stages share it, and with
    the arrays of whatever is queued later on the one stream.
    """

    def __init__(self, stage: StageSpec, profile: Profile, executable: Executable, device: Device) -> None:
        self._stage, self._profile, self.executable, self._device = stage, profile, executable, device

    def run(self, tensors: Mapping[str, DeviceArray], *, consumed: Collection[str] = ()) -> dict[str, DeviceArray]:
        shapes = {tensor.name: tensors[tensor.name].shape for tensor in self._stage.inputs}
        extents = match_shapes(self._stage, shapes)
        self._check_profile(extents)
        if gaps := [name for name, array in tensors.items() if not array.is_contiguous]:
            raise ValueError(f"{self._stage.name}: {gaps[0]} has gaps between its rows")
        device = self._device
        outputs = {
            tensor.name: device.empty(tuple(resolve(axis, extents) for axis in tensor.shape), tensor.dtype)
            for tensor in self._stage.outputs
        }
        scratch = device.allocate(self.executable.scratch_bytes(shapes))
        pointers = {name: array.pointer for name, array in {**tensors, **outputs}.items()}
        self.executable.enqueue(pointers, scratch.pointer, device.stream)
        scratch.release()
        return outputs

    def close(self) -> None:
        """The library's engine stays its backend's, for when the network is opened again."""

    def _check_profile(self, extents: Mapping[str, int]) -> None:
        for name, extent in self._profile.items():
            if name in extents and not extent.smallest <= extents[name] <= extent.largest:
                raise EngineError(
                    f"{self._stage.name}: {name}={extents[name]}: this engine was built for {extent.smallest} to {extent.largest}",
                    hint="rebuild the bundle with a --size and --frames range that holds what you ask for",
                )


class TensorRtBackend:
    """One GPU and one of the two libraries. Use with `with`.

    Args:
        cache: folder for what the library compiles on this machine; None to keep nothing.
        attention: precision of self-attention's products; fp8 where the file of that stage has it.

    Raises:
        EngineError: no usable GPU, or the library does not load.
    """

    def __init__(self, library: Library, *, cache: Path | None = None, attention: Precision = Precision.BF16) -> None:
        self.name = library.target
        self.attention = attention
        self._executables: dict[tuple[Path, StageSpec, bool], Executable] = {}
        self.device = self._open_device()
        try:
            self._open_library(library, cache)
        except BaseException:
            self.device.close()
            raise

    def _open_device(self) -> Device:
        return Device()

    def _open_library(self, library: Library, cache: Path | None) -> None:
        self._library, self._readback = OpenLibrary(library), Readback(self.device)
        gpu, architecture = self.device.name, self.device.arch
        name = cache_name(self._library, gpu=gpu, architecture=architecture, driver=driver_version())
        self._cache = RuntimeCache(None if cache is None else cache / name)

    def _close_library(self) -> None:
        try:
            self.device.synchronize()  # an engine must not go while it runs
            self._cache.save()
        except EngineError as error:  # the device may be in any state
            log.warning("what was compiled is not kept: %s", error.message)
        for executable in self._executables.values():
            executable.close()
        self._executables.clear()
        self._readback.close()

    def open_engine(self, path: Path, stage: StageSpec) -> TensorRtEngine:
        return self.open_form(path, stage, fp8_attention=self.attention is Precision.FP8 and is_self_attention(stage))

    def open_form(self, path: Path, stage: StageSpec, *, fp8_attention: bool) -> TensorRtEngine:
        """`open_engine` of the form asked for. What the library loads stays loaded until the backend is closed.

        Raises:
            EngineError: as `open_engine`.
        """
        header, part, data = _find_part(path, stage, self.device.arch, fp8_attention=fp8_attention)
        key = path, stage, fp8_attention
        if key not in self._executables:
            self._executables[key] = self._load(path, stage, part, data)
        return TensorRtEngine(stage, header.profile, self._executables[key], self.device)

    def _load(self, path: Path, stage: StageSpec, part: EnginePart, data: memoryview) -> Executable:
        return LoadedEngine(self._library, data, stage, self._cache)

    def to_device(self, array: Array, dtype: DType | None = None) -> DeviceArray:
        return self.device.from_host(np.ascontiguousarray(array), dtype)

    def to_host(self, tensor: DeviceArray | JoinedPatches) -> Array:
        if isinstance(tensor, JoinedPatches):
            return unpatchify(self.device.to_host(tensor.patches), tensor.grid, tensor.arch)
        return self.device.to_host(tensor)

    def fetch(self, tensor: DeviceArray | JoinedPatches) -> Callable[[], Array]:
        if not isinstance(tensor, JoinedPatches):
            return self._readback.fetch(tensor)
        fetched, grid, arch = self._readback.fetch(tensor.patches), tensor.grid, tensor.arch
        return lambda: unpatchify(fetched(), grid, arch)

    def cut_patches(self, latents: Array, arch: TransformerArch) -> DeviceArray:
        return self.to_device(patchify(latents, arch))

    def join_patches(self, patches: DeviceArray, grid: tuple[int, int, int], arch: TransformerArch) -> JoinedPatches:
        return JoinedPatches(patches, grid, arch)

    def close(self) -> None:
        """Keep what was compiled; release the library and all memory of the device."""
        try:
            self._close_library()
        finally:
            self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _find_part(
    path: Path, stage: StageSpec, architecture: str, *, fp8_attention: bool
) -> tuple[EngineHeader, EnginePart, memoryview]:
    try:
        data = map_file(path)
        header = read_header(data)
        found = engine_for(header, data, architecture, fp8_attention=fp8_attention)
    except BundleError as error:
        raise EngineError(f"{stage.name}: {path.name}: {error.message}", hint=error.hint) from error
    if header.stage != stage.name or header.profile.keys() != set(stage.symbols):
        raise EngineError(f"{path.name}: engines of {header.stage}, expected {stage.name}", hint="rebuild the bundle")
    if found is None:
        raise EngineError(
            f"{stage.name}: the bundle has no {'FP8 attention' if fp8_attention else 'engine'} for {architecture}",
            hint="leave --attention out" if fp8_attention else f"rebuild it for {architecture}",
        )
    return header, *found
