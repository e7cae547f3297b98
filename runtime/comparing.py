"""Two targets of one bundle compared stage by stage: the first makes a video, and the second gets every stage's inputs, too.

Each stage starts from the first target's numbers, so an error is that stage's own and does not grow from stage to stage.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from runtime.backends import RuntimeTarget
from runtime.backends.base import Array, Backend, DeviceTensor, StoredWeights
from runtime.bundle import Bundle
from runtime.component import Component
from runtime.errors import RequestError
from runtime.layouts import narrow, widen
from runtime.opening import Opener
from runtime.specs import StageSpec, TensorSpec
from runtime.stages import network_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class StageError:
    """How far the second target's results of one tensor are from the first's, over all runs of the stage."""

    stage: str
    tensor: str
    runs: int
    greatest: float
    """‖second − first‖ / ‖first‖ of the worst run; NaN where a run gave numbers that are not finite on one of the two only."""
    block: int | None
    """The block of the worst run; None of a stage that is not per block."""


class ComparingOpener(Opener):
    """An opener of the first target that opens every network on the second as well. See `Opener`.

    Args:
        other: opens the second target.

    Raises:
        RequestError: both have device memory: each would plan for all of it.
    """

    def __init__(self, bundle: Bundle, runtime_target: RuntimeTarget, other: Opener, *, num_threads: int) -> None:
        super().__init__(bundle, runtime_target, reason="compared", num_threads=num_threads)
        if self.rehearse is not None and other.rehearse is not None:
            raise RequestError(
                f"{self.name} and {other.name} both run on the GPU, which has no room for two",
                hint="compare each with a target that runs on the CPU: cpu or emulated",
            )
        self._other = other
        self._errors: dict[tuple[str, str], StageError] = {}

    @property
    def errors(self) -> tuple[StageError, ...]:
        """What was found so far, in the order in which the stages first ran."""
        return tuple(self._errors.values())

    def close(self) -> None:
        """Release both targets."""
        try:
            super().close()
        finally:
            self._other.close()

    @contextmanager
    def network(self, network: str, component: str | None = None) -> Iterator[tuple[Component, StoredWeights]]:
        declared = {stage.name: stage for stage in network_stages(self.bundle.manifest.variant, network)}
        with super().network(network, component) as (first, weights), self._other.network(network, component) as (second, _):
            yield _Compared(first, second, declared, self._note), weights

    def _note(self, stage: str, tensor: str, block: int | None, error: float) -> None:
        known = self._errors.get((stage, tensor))
        runs = 1 if known is None else known.runs + 1
        if known is not None and not (np.isnan(error) or error > known.greatest):
            error, block = known.greatest, known.block
        self._errors[stage, tensor] = StageError(stage=stage, tensor=tensor, runs=runs, greatest=error, block=block)


class _Compared(Component):
    """A network on two targets; what it is asked for, the first answers."""

    def __init__(
        self,
        first: Component,
        second: Component,
        declared: Mapping[str, StageSpec],
        note: Callable[[str, str, int | None, float], None],
    ) -> None:
        self.backend: Backend = first.backend
        self._first, self._second, self._declared, self._note = first, second, declared, note

    def stage(self, name: str) -> StageSpec:
        return self._first.stage(name)

    def run(
        self, stage: str, inputs: Mapping[str, DeviceTensor], *, block: int | None = None, consumed: Collection[str] = ()
    ) -> dict[str, DeviceTensor]:
        ours, theirs = self._first.stage(stage), self._second.stage(stage)
        given = self._to_host(inputs, ours.inputs, self._declared[stage].inputs)  # first: they may be consumed
        outputs = self._first.run(stage, inputs, block=block, consumed=consumed)
        backend = self._second.backend
        sent = {spec.name: backend.to_device(narrow(given[spec.name], spec), spec.dtype) for spec in theirs.inputs}
        made = self._second.run(stage, sent, block=block)
        expected = self._to_host(outputs, ours.outputs, self._declared[stage].outputs)
        for spec, tensor in zip(theirs.outputs, self._declared[stage].outputs, strict=True):
            found = widen(backend.to_host(made[spec.name]), spec, _channels(tensor))
            self._note(stage, spec.name, block if ours.per_block else None, _relative_error(found, expected[spec.name]))
        return outputs

    def close(self) -> None:
        """Both are closed by who opened them."""

    def _to_host(
        self, tensors: Mapping[str, DeviceTensor], specs: tuple[TensorSpec, ...], declared: tuple[TensorSpec, ...]
    ) -> dict[str, Array]:
        to_host = self.backend.to_host
        return {
            spec.name: widen(to_host(tensors[spec.name]), spec, _channels(traced))
            for spec, traced in zip(specs, declared, strict=True)
        }


def _channels(declared: TensorSpec) -> int:
    first = declared.shape[0] if declared.shape else 0
    return first if isinstance(first, int) else 0


def _relative_error(found: Array, expected: Array) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; of zeros, the norm of what was found."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(difference)) / (size or 1.0)
