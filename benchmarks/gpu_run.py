"""Runs a GPU suite: what was asked is checked first, then peer after peer is measured.

A peer that fails is reported and the others go on. The JSON is written anew after every measurement.
"""

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu import OURS, Attempt, Options, Result, Suite
from benchmarks.gpu_report import as_row, gpu_facts, markdown_table, torch_facts
from benchmarks.gpu_suites import (
    EXTRAS,
    GpuRequest,
    cases_with_bundles,
    check_baselines,
    check_options,
    chosen_cases,
    open_suite,
)
from benchmarks.result_file import result_file, write_json
from runtime.bundle import Bundle, open_bundle
from runtime.errors import DeviceMemoryError, EngineError, RequestError

SCHEMA_VERSION = 1
DEFAULT_SECONDS = 8.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    results: list[Result]
    refused: dict[str, str]  # what did not fit the device's memory, and what it would take
    failures: dict[str, str]


def run_gpu_benchmark(request: GpuRequest, *, on_line: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure, and write the result as JSON.

    Args:
        on_line: takes a line of progress for people.

    Returns:
        The result as written, with its markdown under `table`; what failed is under `failures`.

    Raises:
        RequestError: the request cannot be met: unknown names, missing packages.
        EngineError: there is no GPU to use.
        BundleError: a bundle cannot be opened, or is not for this work.
        BuildError: engines could not be built.
    """
    suite = open_suite(request.suite)
    cases = chosen_cases(request.suite, suite, request.cases)
    check_baselines(request.suite, suite, request.baselines)
    check_options(request, suite)
    facts = _facts(suite)
    out = result_file(request.out, request.suite)
    outcome = Outcome(results=[], refused={}, failures={})
    with TemporaryDirectory(prefix="wanrt-benchmark-") as scratch_name:
        scratch = Path(scratch_name)
        bundles = [open_bundle(folder) for folder in request.bundles]
        for case in cases_with_bundles(cases, bundles, asked=bool(request.cases)):
            own = [bundle for bundle in bundles if bundle.manifest.variant.name == case.variant]
            if not own:
                own = _built(suite, case.variant, facts["arch"], scratch, on_line)
                bundles += own
            for name, run in _guarded(case.name, suite.attempts(case, _options(request, own, scratch)), outcome):
                if request.only_baselines and OURS in name.split():
                    continue
                _attempt(f"{case.name} {name}", run, outcome, on_line)
                report = report_of(request.suite, suite, facts, outcome)
                write_json(out, report)
    on_line(f"result in {out}")
    return report_of(request.suite, suite, facts, outcome)


def report_of(name: str, suite: Suite[Any], facts: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    """Everything measured so far, as JSON holds it."""
    rows = [as_row(result, facts["gpu"]) for result in suite.complete(outcome.results)]
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": name,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "results": rows,
        "refused": outcome.refused,
        "failures": outcome.failures,
        "table": markdown_table(rows),
    }


def _facts(suite: Suite[Any]) -> dict[str, Any]:
    from runtime.backends.cuda.device import find_obstacle

    if obstacle := find_obstacle():
        raise EngineError(f"this suite needs an NVIDIA GPU: {obstacle}", hint="`--suite toy` runs on a CPU")
    return gpu_facts() | (torch_facts() if suite.torch else {})


def _options(request: GpuRequest, bundles: Sequence[Bundle], scratch: Path) -> Options:
    return Options(
        bundles=tuple(bundles),
        scratch=scratch,
        baselines=request.baselines,
        attention=request.attention,
        budgets_gib=request.budgets_gib,
        seconds=request.seconds or DEFAULT_SECONDS,
        profile=request.profile,
    )


def _built(suite: Suite[Any], variant: str, arch: str, scratch: Path, on_line: Callable[[str], None]) -> list[Bundle]:
    """Engines of a variant in the suite's precisions."""
    if missing := [package for package in ("torch", "onnx", "onnxscript") if importlib.util.find_spec(package) is None]:
        raise RequestError(
            f"building engines needs {', '.join(missing)}, not installed here", hint=f"give bundles with --bundle, or {EXTRAS}"
        )
    from export.build import BuildRequest, build_bundle

    bundles = []
    for precision in suite.precisions:
        on_line(f"building engines of {variant} in {precision} for {arch} (not counted)")
        folder = scratch / f"{variant}-{precision}"
        build = BuildRequest(
            out=folder, checkpoint=None, variant=variant, targets=("cuda",), precision=precision, architectures=(arch,)
        )
        build_bundle(build)
        bundles.append(open_bundle(folder))
    return bundles


def _guarded(case: str, attempts: Iterator[Attempt], outcome: Outcome) -> Iterator[Attempt]:
    """The attempts of a case; what fails while they are prepared ends the case, not the suite."""
    try:
        yield from attempts
    except Exception as error:
        outcome.failures[case] = repr(error)


def _attempt(name: str, run: Callable[[], Result], outcome: Outcome, on_line: Callable[[str], None]) -> None:
    try:
        result = run()
    except DeviceMemoryError as error:
        outcome.refused[name] = error.message
        on_line(f"{name}: {error.message}")
    except Exception as error:
        outcome.failures[name] = repr(error)
        on_line(f"{name}: {error!r}")
    else:
        outcome.results.append(result)
        on_line(f"{name}: {result.seconds:.4g} s ({result.fastest:.4g}-{result.slowest:.4g}, {result.runs} runs)")
        for note in result.notes():
            on_line(f"  {note}")
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
