"""The two small interfaces between the runtime and whatever executes engines.

Drivers (`runtime.transformer`, `runtime.vae`, …) hold tensors they do not look into: a tensor belongs to its backend and goes from
engine to engine; only `to_host` and `fetch` turn it into NumPy. A new backend is one file that passes the shared contract tests.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from runtime.memory import MemoryPlan, Need, gib
from runtime.specs import DType, Precision, StageSpec
from runtime.variants import TransformerArch

Array = np.ndarray[Any, Any]
DeviceTensor = Any
"""A backend's own tensor: a NumPy array on the CPU, a device buffer elsewhere."""


class Engine(Protocol):
    """One opened stage."""

    def run(self, tensors: Mapping[str, DeviceTensor], *, consumed: Collection[str] = ()) -> dict[str, DeviceTensor]:
        """Execute once with inputs and weights by name; returns the outputs by name.

        Args:
            consumed: inputs that nobody uses afterwards: their memory may go as soon as they are read for the last time.

        Raises:
            EngineError: the execution failed; the message names the stage.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds; it cannot run afterwards."""
        ...


class StoredWeights(Protocol):
    """A component's weights, bound to stages by name."""

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceTensor]:
        """The weights of `stage`, by the names the engine knows; `block` picks the block of a per-block stage."""
        ...

    def host_tensor(self, name: str) -> Array:
        """A weight that the host reads itself, such as an embedding table; still mapped."""
        ...


class Backend(Protocol):
    """A library that opens and runs engines on one device. Use with `with`: its tensors do not outlive it."""

    name: str

    def open_engine(self, path: Path, stage: StageSpec) -> Engine:
        """Open the engine file of `stage` and check its tensors against the spec.

        Raises:
            EngineError: the file cannot be opened here or does not match the spec.
        """
        ...

    def to_device(self, array: Array, dtype: DType | None = None) -> DeviceTensor:
        """A tensor with the array's elements; `dtype` says what bits mean that NumPy has no type for (bf16 as uint16, fp8 as uint8)."""
        ...

    def to_host(self, tensor: DeviceTensor) -> Array:
        """A tensor's elements, once everything queued before has run."""
        ...

    def fetch(self, tensor: DeviceTensor) -> Callable[[], Array]:
        """`to_host` in two steps: this queues the copy, and what it returns waits for it. The tensor may be dropped in between."""
        ...

    def cut_patches(self, latents: Array, arch: TransformerArch) -> DeviceTensor:
        """`runtime.geometry.patchify` of latents on the host, on the device."""
        ...

    def join_patches(self, patches: DeviceTensor, grid: tuple[int, int, int], arch: TransformerArch) -> DeviceTensor:
        """`runtime.geometry.unpatchify` of patches on the device, there."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release the device and everything on it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Device memory of one generation, in bytes: what it might take, was predicted to take, and took."""

    device: str  # its name; the same bits come from the same kind only
    budget_bytes: int
    predicted_peak_bytes: int
    peak_bytes: int
    driver_bytes: int
    """As the driver sees the device at the end of a component: its own context and other processes count."""
    components: tuple[str, ...]  # what of each was resident; for people
    staged: tuple[str, ...]  # components whose streamed weights were not kept in page-locked memory

    def __str__(self) -> str:
        staged = f"; read again each time, for lack of host memory: {', '.join(self.staged)}" if self.staged else ""
        return f"peak {gib(self.peak_bytes)}, {gib(self.predicted_peak_bytes)} predicted, {gib(self.driver_bytes)} as the driver counts{staged}"


class Session(Protocol):
    """A target's device for as long as a pipeline is open: all networks of all its generations share it. Use with `close`."""

    def backend(self, network: str) -> AbstractContextManager[Backend]:
        """The backend of one network, for as long as the network is open."""
        ...

    def weights(
        self, component: str, file: Path, stages: Sequence[StageSpec], *, num_blocks: int
    ) -> AbstractContextManager[StoredWeights]:
        """A component's weights on the backend that was opened last.

        Raises:
            BundleError: a declared weight is missing or misshapen.
        """
        ...

    def prepare(self, needs: Sequence[Need], *, attention: Precision) -> MemoryPlan | None:
        """Fit the next generation into the device's memory; None where the device has no memory of its own.

        Raises:
            DeviceMemoryError: it cannot fit; nothing was read or allocated.
        """
        ...

    def memory_use(self) -> MemoryUse | None:
        """Device memory of the last generation; None where the device has no memory of its own."""
        ...

    def close(self) -> None:
        """Release the device and everything on it."""
        ...
