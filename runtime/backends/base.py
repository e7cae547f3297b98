"""The two small interfaces between the runtime and whatever executes engines.

Drivers (`runtime.transformer`, `runtime.vae`, …) hold tensors they do not look into: a tensor belongs to its backend and goes from
engine to engine; only `to_host` turns it into NumPy. A new backend is one file that passes the shared contract tests.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from runtime.specs import DType, StageSpec

Array = np.ndarray[Any, Any]
DeviceTensor = Any
"""A backend's own tensor: a NumPy array on the CPU, a device buffer elsewhere."""


class Engine(Protocol):
    """One opened stage."""

    def run(self, tensors: Mapping[str, DeviceTensor]) -> dict[str, DeviceTensor]:
        """Execute once with inputs and weights by name; returns the outputs by name.

        Raises:
            EngineError: the execution failed; the message names the stage.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds; it cannot run afterwards."""
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

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release the device and everything on it."""
        ...
