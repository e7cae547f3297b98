"""Stages of an opened network as Polygraphy's runners, and two targets' results compared by its comparator.

The first target's outputs become inputs of its later stages, and the second gets the same: an error is one stage's own.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from engines.verification.inputs import StageInputs
from engines.verification.measure import relative_error
from runtime.backends.base import Array
from runtime.component import Component
from runtime.layouts import narrow, widen
from runtime.specs import DType, StageSpec

RunResults = Any
"""Polygraphy's outputs by runner."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """A stage that ran: its declared spec, block (None where it has none), inputs and results."""

    stage: StageSpec
    block: int | None
    inputs: Mapping[str, Array]
    results: RunResults


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far the second target's numbers are from the first's in one tensor; None where some are not finite."""

    tensor: str
    max_abs: float | None
    relative: float | None
    """‖second − first‖ / ‖first‖; of zeros, the norm of what the second has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A declared stage that is to run: for which blocks (None where it has none), and in which precisions its inputs must be exact."""

    stage: StageSpec
    blocks: Sequence[int | None]
    typed: Sequence[StageSpec]


def run_stages(component: Component, plans: Iterable[StagePlan], given: StageInputs) -> Iterator[StageRun]:
    """Run stages in their order; all blocks of one get the same inputs, and what the first of them gives goes to later stages."""
    for plan in plans:
        inputs = given.take(plan.stage, *plan.typed)
        runs = [
            StageRun(stage=plan.stage, block=block, inputs=inputs, results=_run("first", component, plan.stage, block, inputs))
            for block in plan.blocks
        ]
        given.keep(dict(runs[0].results[0][1][0].items()))
        yield from runs


def compare_run(component: Component, run: StageRun) -> list[Difference]:
    """What a second target's opened component makes of a run's inputs, beside what the first made of them."""
    results = _run("second", component, run.stage, run.block, run.inputs)
    compare = [SimpleCompareFunc(check_error_stat="max", atol=float("inf"), rtol=float("inf")), _relative_errors]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore", divide="ignore"):  # it divides by zeros
        greatest, relative = Comparator.compare_accuracy([run.results, results], compare_func=compare)
    (((maxima,),), ((errors,),)) = greatest.values(), relative.values()
    return [
        Difference(tensor=tensor, max_abs=_finite(maxima[tensor].max_absdiff), relative=_finite(error.value))
        for tensor, error in errors.items()
    ]


def run_stage(component: Component, stage: StageSpec, inputs: Mapping[str, Array], block: int | None) -> dict[str, Array]:
    """One run of a declared stage on a component that has it in some precision; float32 in and out, as declared."""
    typed, backend = component.stage(stage.name), component.backend
    sent = {spec.name: backend.to_device(narrow(inputs[spec.name], spec), spec.dtype) for spec in typed.inputs}
    made = component.run(stage.name, sent, block=block)
    return {
        spec.name: np.ascontiguousarray(
            widen(backend.to_host(made[spec.name]), spec, int(declared.shape[0]) if spec.channels_last else 0)
        )
        for spec, declared in zip(typed.outputs, stage.outputs, strict=True)
    }


class _StageRunner(BaseRunner):  # type: ignore[misc]
    """One stage of an opened component."""

    def __init__(self, name: str, component: Component, stage: StageSpec, block: int | None) -> None:
        super().__init__(name=name)
        self._component, self._stage, self._block = component, stage, block

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for tensor in self._stage.inputs:
            dtype = np.int64 if tensor.dtype is DType.I64 else np.float32
            metadata.add(tensor.name, dtype, [axis if isinstance(axis, int) else None for axis in tensor.shape])
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        started = time.perf_counter()
        outputs = run_stage(self._component, self._stage, feed_dict, self._block)
        self.inference_time = time.perf_counter() - started
        return outputs


def _run(name: str, component: Component, stage: StageSpec, block: int | None, inputs: Mapping[str, Array]) -> RunResults:
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it writes to stdout
        return Comparator.run([_StageRunner(name, component, stage, block)], data_loader=[dict(inputs)])


@dataclass(slots=True)
class _RelativeError:
    """What Polygraphy has no function for in this form; whether it is too much is not decided here."""

    value: float
    output0_name: str = ""
    output1_name: str = ""


def _relative_errors(first: IterationResult, second: IterationResult) -> dict[str, _RelativeError]:
    return {name: _RelativeError(relative_error(second[name], expected)) for name, expected in first.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
