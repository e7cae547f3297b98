"""The table of GPU suites, and how one is run: what was asked is checked first, then peer after peer is measured.

A peer that fails is reported and the others go on. The JSON is written anew after every measurement.
"""

import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu import Attempt, NamedCase, Options, Result, Suite
from benchmarks.gpu_report import as_row, gpu_facts, markdown_table, torch_facts
from benchmarks.result_file import result_file, write_json
from runtime.bundle import Bundle, open_bundle
from runtime.errors import BundleError, DeviceMemoryError, EngineError, RequestError
from runtime.specs import Precision

SCHEMA_VERSION = 1
SUITES = {
    "dit": "benchmarks.dit",
    "vae": "benchmarks.vae",
    "text": "benchmarks.text",
    "offload": "benchmarks.offload",
    "e2e": "benchmarks.e2e",
}
"""Suite → the module whose `SUITE` it is."""
DEFAULT_SECONDS = 8.0
_EXTRAS = "pip install '.[cuda,export,dev]', and PyTorch's CUDA build"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRequest:
    """What to measure.

    Args:
        suite: a name in `SUITES`.
        cases: names of its cases; empty for all that the bundles are for.
        baselines: peers to compare with; empty for none.
        bundles: folders of bundles with a `cuda` target; without any, engines are built for this GPU into a temporary folder.
        attention, budgets_gib, seconds, profile: see `benchmarks.gpu.Options`.
        out: `.json` file or folder for the result; None for benchmarks/results/ below the current folder.
    """

    suite: str
    cases: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    bundles: tuple[Path, ...] = ()
    attention: tuple[Precision, ...] = ()
    budgets_gib: tuple[float, ...] = ()
    seconds: float | None = None
    profile: bool = False
    out: Path | None = None


@dataclass(slots=True, kw_only=True)
class _Outcome:
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
    outcome = _Outcome(results=[], refused={}, failures={})
    with ExitStack() as stack:
        bundles = [open_bundle(folder) for folder in request.bundles]
        for case in cases_with_bundles(cases, bundles, asked=bool(request.cases)):
            own = [bundle for bundle in bundles if bundle.manifest.variant.name == case.variant]
            if not own:
                own = _built(suite, case.variant, facts["arch"], stack, on_line)
                bundles += own
            for name, run in _guarded(case.name, suite.attempts(case, _options(request, own)), outcome):
                _attempt(f"{case.name} {name}", run, outcome, on_line)
                report = report_of(request.suite, suite, facts, outcome)
                write_json(out, report)
    on_line(f"result in {out}")
    return report_of(request.suite, suite, facts, outcome)


def open_suite(name: str) -> Suite[Any]:
    """A suite of the table.

    Raises:
        RequestError: there is no such suite, or it needs packages that are not installed.
    """
    if name not in SUITES:
        raise RequestError(f"suite {name!r}: there is toy, {', '.join(SUITES)}", hint="choose one of them with --suite")
    try:
        suite: Suite[Any] = importlib.import_module(SUITES[name]).SUITE
    except ModuleNotFoundError as exc:
        raise RequestError(f"suite {name} needs {exc.name}, not installed here", hint=_EXTRAS) from exc
    return suite


def chosen_cases(name: str, suite: Suite[Any], asked: Sequence[str]) -> list[NamedCase]:
    """The cases asked for, or all.

    Raises:
        RequestError: there is no such case.
    """
    known: dict[str, NamedCase] = {case.name: case for case in suite.cases}
    if unknown := [case for case in asked if case not in known]:
        raise RequestError(f"case {unknown[0]!r}: suite {name} has {', '.join(known)}", hint="choose among them with --case")
    return [known[case] for case in dict.fromkeys(asked or known)]


def check_baselines(name: str, suite: Suite[Any], asked: Sequence[str]) -> None:
    """See that a suite can be compared with these peers here.

    Raises:
        RequestError: it cannot; the message says why, or what to install.
    """
    for baseline in asked:
        if baseline not in suite.baselines:
            reason = f" ({suite.refused[baseline]})" if baseline in suite.refused else ""
            known = ", ".join(suite.baselines) or "none"
            raise RequestError(
                f"baseline {baseline!r}: suite {name} has {known}{reason}", hint="leave --baseline out, or name another"
            )
        if missing := [package for package in suite.baselines[baseline] if importlib.util.find_spec(package) is None]:
            raise RequestError(
                f"baseline {baseline} needs {', '.join(missing)}, not installed here", hint=f"pip install {' '.join(missing)}"
            )


def check_options(request: GpuRequest, suite: Suite[Any]) -> None:
    """Refuse options that a suite does nothing with.

    Raises:
        RequestError: there is one, or a number is not positive.
    """
    given = {"attention": request.attention, "budgets_gib": request.budgets_gib, "seconds": request.seconds, "profile": request.profile}
    useless = [name for name, value in given.items() if value not in ((), None, False) and name not in suite.takes]
    if useless:
        raise RequestError(
            f"suite {request.suite} does nothing with {useless[0]}; it takes {', '.join(sorted(suite.takes)) or 'none of these'}",
            hint="leave the option out",
        )
    if request.seconds is not None and not request.seconds > 0:
        raise RequestError(f"seconds={request.seconds:g}: need more than 0", hint="8 give a usable spread")


def cases_with_bundles(cases: Sequence[NamedCase], bundles: Sequence[Bundle], *, asked: bool) -> list[NamedCase]:
    """The cases to run with these bundles: all of them where none are given.

    Raises:
        BundleError: a bundle has no `cuda` target, or a case that was asked for has no bundle.
    """
    for bundle in bundles:
        if "cuda" not in bundle.manifest.targets:
            targets = ", ".join(bundle.manifest.targets)
            raise BundleError(f"{bundle.folder.name}: has target {targets}", hint="build one with `--target cuda`")
    if not bundles:
        return list(cases)
    variants = {bundle.manifest.variant.name for bundle in bundles}
    lacking = [case for case in cases if case.variant not in variants]
    if lacking and (asked or len(lacking) == len(cases)):
        raise BundleError(
            f"case {lacking[0].name}: needs a bundle of {lacking[0].variant}; given are {', '.join(sorted(variants))}",
            hint="name one with --bundle, or leave --bundle out to have it built",
        )
    return [case for case in cases if case.variant in variants]


def report_of(name: str, suite: Suite[Any], facts: dict[str, Any], outcome: "_Outcome") -> dict[str, Any]:
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


def _options(request: GpuRequest, bundles: Sequence[Bundle]) -> Options:
    return Options(
        bundles=tuple(bundles),
        baselines=request.baselines,
        attention=request.attention,
        budgets_gib=request.budgets_gib,
        seconds=request.seconds or DEFAULT_SECONDS,
        profile=request.profile,
    )


def _built(suite: Suite[Any], variant: str, arch: str, stack: ExitStack, on_line: Callable[[str], None]) -> list[Bundle]:
    """Engines of a variant in the suite's precisions, filled with random weights if it needs them."""
    if missing := [package for package in ("torch", "onnx", "onnxscript") if importlib.util.find_spec(package) is None]:
        raise RequestError(
            f"building engines needs {', '.join(missing)}, not installed here", hint=f"give bundles with --bundle, or {_EXTRAS}"
        )
    from export.build import BuildRequest, build_bundle

    bundles = []
    for precision in suite.precisions:
        on_line(f"building engines of {variant} in {precision} for {arch} (not counted)")
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="wanrt-benchmark-"))) / f"{variant}-{precision}"
        build = BuildRequest(
            out=folder, checkpoint=None, variant=variant, targets=("cuda",), precision=precision, architectures=(arch,)
        )
        build_bundle(build)
        if suite.weights:
            from benchmarks.random_bundle import fill_with_random_weights

            on_line("filling it with random weights (not counted)")
            fill_with_random_weights(folder)
        bundles.append(open_bundle(folder))
    return bundles


def _guarded(case: str, attempts: Iterator[Attempt], outcome: "_Outcome") -> Iterator[Attempt]:
    """The attempts of a case; what fails while they are prepared ends the case, not the suite."""
    try:
        yield from attempts
    except Exception as error:
        outcome.failures[case] = repr(error)


def _attempt(name: str, run: Callable[[], Result], outcome: "_Outcome", on_line: Callable[[str], None]) -> None:
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
