"""What the GPU suites share: what a suite is, the loop that measures, the record of a measurement.

What is measured belongs to the suites (`benchmarks.gpu_suites` lists them); what a report says, to `benchmarks.gpu_report`.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from runtime.bundle import Bundle
from runtime.precision import wide_text
from runtime.specs import Precision, StageSpec

OURS = "wanrt"
"""How the names of this project's own peers begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one piece of work, again and again."""

    seconds: float  # median
    fastest: float
    slowest: float
    runs: int
    warmups: int
    first_seconds: float  # the first run, with everything that is set up by then; never among the others
    output_std: float | None  # of the last output; None where it stayed on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Timing):
    """One peer on one case; suites add fields of their own."""

    case: str
    peer: str
    peak_memory_gib: float | None
    tflop: float | None  # by formula, 2 for a multiply-add
    tokens: int | None = None

    def notes(self) -> list[str]:
        """Lines for people on what the table has no column for."""
        return []


class NamedCase(Protocol):
    """What every suite's cases have."""

    @property
    def name(self) -> str: ...
    @property
    def variant(self) -> str: ...


C = TypeVar("C", bound=NamedCase)
Attempt = tuple[str, Callable[[], Result]]
"""A peer's name, and the measurement itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a suite is told beside its case.

    Args:
        bundles: of the case's variant.
        attention: precisions of self-attention to measure; empty for all that a bundle's precision makes sense with.
        budgets_gib: budgets of device memory; empty for the suite's own.
        seconds: how long to repeat a measurement, about.
        profile: also time the steps of a forward.
        scratch: a folder for what the suite writes; it is removed after the last case.
    """

    bundles: tuple[Bundle, ...]
    scratch: Path
    baselines: tuple[str, ...] = ()
    attention: tuple[Precision, ...] = ()
    budgets_gib: tuple[float, ...] = ()
    seconds: float
    profile: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite(Generic[C]):
    """A kind of work: its cases, whom it can be compared with, and how it is measured.

    Args:
        precisions: of the bundles built when none are given.
        baselines: name → packages it needs.
        attempts: the peers of a case, each to be called when the ones before are gone.
        takes: which of the options `attention`, `budgets_gib`, `seconds` and `profile` mean something to it.
        checks: baseline → raises a RequestError where its packages are installed and still cannot do the work.
        complete: fills in what only all results of a suite together say.
        torch: whether the suite itself computes with PyTorch.
    """

    cases: tuple[C, ...]
    precisions: tuple[Precision, ...]
    baselines: Mapping[str, tuple[str, ...]]
    attempts: Callable[[C, Options], Iterator[Attempt]]
    takes: frozenset[str] = frozenset()
    checks: Mapping[str, Callable[[], None]] = field(default_factory=dict)
    complete: Callable[[list[Result]], list[Result]] = list
    torch: bool = True


def attentions(bundle: Bundle, asked: Sequence[Precision]) -> tuple[Precision, ...]:
    """Precisions of self-attention to measure a bundle with: fp8 only beside fp8 weights."""
    if bundle.manifest.targets["cuda"].precision is not Precision.FP8:
        return (Precision.BF16,)
    return tuple(asked) or (Precision.BF16, Precision.FP8)


def precisions_text(bundle: Bundle, attention: Precision) -> str:
    """How a bundle's transformer computes, for people: `fp8 but first:1, attention bf16`."""
    precision = bundle.manifest.targets["cuda"].precision
    wide = wide_text(bundle.manifest.fp8_wide, precision)
    return f"{precision}{f' but {wide}' if wide else ''}, attention {attention}"


def cuda_engines(bundle: Bundle, network: str) -> tuple[tuple[StageSpec, ...], dict[str, Path]]:
    """A network's stages as the `cuda` target runs them, and its engine files."""
    target = bundle.manifest.targets["cuda"]
    stages = bundle.manifest.stages(target, network)
    return stages, {stage.name: bundle.file(target.engines[stage.name]) for stage in stages}


def cuda_kernels(bundle: Bundle) -> dict[str, bytes]:
    """The kernels of a bundle's `cuda` target, by architecture."""
    return {name: bundle.file(file).read_bytes() for name, file in bundle.manifest.targets["cuda"].kernels.items()}


def measure(
    work: Callable[[], Any], *, seconds: float, warmups: int = 2, min_runs: int = 3, max_runs: int = 50
) -> tuple[Timing, Any]:
    """Time some work: warm-ups, then at least `min_runs` runs and about `seconds`.

    Args:
        work: returns arrays in host memory, or None where the output stays on the device. It must wait for the device.

    Returns:
        The times, and the last output.

    Raises:
        RuntimeError: the output is constant or not finite: such data runs faster than real data.
    """
    if warmups < 1:
        raise ValueError("the first run sets things up, so it cannot count")
    started = time.perf_counter()
    output = work()
    first = time.perf_counter() - started
    for _ in range(warmups - 1):
        work()
    times: list[float] = []
    while len(times) < min_runs or (sum(times) < seconds and len(times) < max_runs):
        started = time.perf_counter()
        output = work()
        times.append(time.perf_counter() - started)
    timing = Timing(
        seconds=statistics.median(times),
        fastest=min(times),
        slowest=max(times),
        runs=len(times),
        warmups=warmups,
        first_seconds=first,
        output_std=None if output is None else checked_std(output),
    )
    return timing, output


def checked_std(output: Any) -> float:
    """Standard deviation of an array, or of the first of several.

    Raises:
        RuntimeError: one of them is constant or not finite.
    """
    spreads = [float(array.std()) if np.isfinite(array).all() else 0.0 for array in _arrays(output)]
    if not spreads or not min(spreads) > 0:
        raise RuntimeError(
            "the output is constant or not finite: such data runs faster than real data, so its time means nothing"
        )
    return spreads[0]


def _arrays(output: Any) -> Sequence[Any]:
    return (output,) if isinstance(output, np.ndarray) else output


def relative_error(given: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected.

    Raises:
        RuntimeError: it is not finite.
    """
    error = float(np.linalg.norm(given - expected) / np.linalg.norm(expected))
    if not np.isfinite(error):
        raise RuntimeError("the output or what it is compared with is not finite")
    return error
