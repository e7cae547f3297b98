"""Sessions of targets without device memory of their own: nothing is shared between networks, and all of a network's weights are mapped."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from runtime.backends.base import Backend, MemoryUse
from runtime.memory import MemoryPlan, Need
from runtime.specs import Precision, StageSpec
from runtime.weights import WeightStore


class SeparateSession:
    """Every network opens a backend of its own. See `runtime.backends.base.Session`."""

    def __init__(self, open_backend: Callable[[str], Backend]) -> None:
        self._open_backend = open_backend
        self._backend: Backend | None = None

    @contextmanager
    def backend(self, network: str) -> Iterator[Backend]:
        with self._open_backend(network) as backend:
            self._backend = backend
            try:
                yield backend
            finally:
                self._backend = None

    @contextmanager
    def weights(self, component: str, file: Path, stages: Sequence[StageSpec], *, num_blocks: int) -> Iterator[WeightStore]:
        if self._backend is None:
            raise ValueError(f"weights of {component} without an open backend")
        yield WeightStore(file, stages, self._backend, num_blocks=num_blocks)

    def prepare(self, needs: Sequence[Need], *, attention: Precision) -> MemoryPlan | None:
        return None

    def memory_use(self) -> MemoryUse | None:
        return None

    def close(self) -> None:
        """Nothing is held between networks."""
