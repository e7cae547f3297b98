"""A network at run time: its engines opened together, its weights bound by name."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from runtime.backends.base import Backend, DeviceTensor, Engine
from runtime.precision import wide_name
from runtime.specs import StageSpec


class Weights(Protocol):
    """Where a component's weights come from; see `runtime.weights`."""

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, DeviceTensor]:
        """The weights of `stage`, by the names the engine knows; `block` picks the block of a per-block stage."""
        ...


class Component:
    """Runs a component's stages by name. Use with `with`: the engines are released at the end.

    Args:
        backend: who runs the engines.
        stages: the component's declared stages.
        engine_files: engine file of each stage, by stage name.
        weights: source of the stages' weights.
    """

    def __init__(
        self, backend: Backend, stages: Iterable[StageSpec], engine_files: Mapping[str, Path], weights: Weights
    ) -> None:
        self.backend = backend
        self._weights = weights
        self._stages = {stage.name: stage for stage in stages}
        self._engines: dict[str, Engine] = {}
        try:
            for name, stage in self._stages.items():
                self._engines[name] = backend.open_engine(engine_files[name], stage)
        except BaseException:
            self.close()
            raise

    def stage(self, name: str) -> StageSpec:
        """A stage as it is declared in the precision in which it runs."""
        return self._stages[name]

    def run(
        self, stage: str, inputs: Mapping[str, DeviceTensor], *, block: int | None = None, consumed: Collection[str] = ()
    ) -> dict[str, DeviceTensor]:
        """Run one stage with its weights bound; returns its outputs by name. `consumed`: inputs that nobody uses afterwards."""
        spec = self._stages[stage]
        if block is not None and spec.blocks is not None and block not in spec.blocks:
            spec = self._stages[wide_name(stage)]
        weights = self._weights.stage_weights(spec, block)
        return self._engines[spec.name].run({**inputs, **weights}, consumed=consumed)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
