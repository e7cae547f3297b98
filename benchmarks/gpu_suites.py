"""The table of GPU suites, what can be asked of them, and what is refused before anything is measured (`benchmarks.gpu_run` does that)."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import NamedCase, Suite
from runtime.bundle import Bundle
from runtime.errors import BundleError, RequestError
from runtime.specs import Precision

SUITES = {
    "dit": "benchmarks.dit",
    "vae": "benchmarks.vae",
    "text": "benchmarks.text",
    "offload": "benchmarks.offload",
    "e2e": "benchmarks.e2e",
}
"""Suite → the module whose `SUITE` it is."""
EXTRAS = "pip install '.[cuda,export,dev]', and PyTorch's CUDA build"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRequest:
    """What to measure.

    Args:
        suite: a name in `SUITES`.
        cases: names of its cases; empty for all that the bundles are for.
        baselines: peers to compare with; empty for none.
        bundles: folders of bundles with a `cuda` target; without any, engines are built for this GPU into a temporary folder.
        only_baselines: leave this project's own peers out.
        attention, budgets_gib, seconds, profile: see `benchmarks.gpu.Options`.
        out: `.json` file or folder for the result; None for benchmarks/results/ below the current folder.
    """

    suite: str
    cases: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    bundles: tuple[Path, ...] = ()
    only_baselines: bool = False
    attention: tuple[Precision, ...] = ()
    budgets_gib: tuple[float, ...] = ()
    seconds: float | None = None
    profile: bool = False
    out: Path | None = None


def open_suite(name: str) -> Suite[Any]:
    """A suite of the table.

    Raises:
        RequestError: there is no such suite, or it needs packages that are not installed.
    """
    if name not in SUITES:
        raise RequestError(
            f"suite {name!r}: there is toy, quality, {', '.join(SUITES)}", hint="choose one of them with --suite"
        )
    try:
        suite: Suite[Any] = importlib.import_module(SUITES[name]).SUITE
    except ModuleNotFoundError as exc:
        raise RequestError(f"suite {name} needs {exc.name}, not installed here", hint=EXTRAS) from exc
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
            known = ", ".join(suite.baselines) or "none"
            raise RequestError(f"baseline {baseline!r}: suite {name} has {known}", hint="leave --baseline out, or name another")
        if missing := [package for package in suite.baselines[baseline] if importlib.util.find_spec(package) is None]:
            raise RequestError(
                f"baseline {baseline} needs {', '.join(missing)}, not installed here", hint=f"pip install {' '.join(missing)}"
            )
        if baseline in suite.checks:
            suite.checks[baseline]()


def check_options(request: GpuRequest, suite: Suite[Any]) -> None:
    """Refuse options that a suite does nothing with.

    Raises:
        RequestError: there is one, or a number is not positive, or nothing is left to measure.
    """
    if request.only_baselines and not request.baselines:
        raise RequestError("only baselines, and none is named", hint="name one with --baseline")
    given = {
        "attention": request.attention,
        "budgets_gib": request.budgets_gib,
        "seconds": request.seconds,
        "profile": request.profile,
    }
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
