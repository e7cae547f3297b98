"""The two small interfaces between the runtime and whatever executes engines.

Drivers (`runtime.transformer`, `runtime.vae`, …) hold tensors they do not look into: a tensor belongs to its backend and goes from
engine to engine; only `to_host` turns it into NumPy. A new backend is one file that passes the shared contract tests.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.specs import StageSpec

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
    """A library that opens and runs engines on one device."""

    name: str

    def open_engine(self, path: Path, stage: StageSpec) -> Engine:
        """Open the engine file of `stage` and check its tensors against the spec.

        Raises:
            EngineError: the file cannot be opened here or does not match the spec.
        """
        ...

    def to_device(self, array: Array) -> DeviceTensor: ...

    def to_host(self, tensor: DeviceTensor) -> Array: ...
