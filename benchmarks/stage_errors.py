"""The `cuda` target's errors by network, stage and precision, as its own tests measure them on this machine's GPU.

    python -m benchmarks.stage_errors [--out FILE]

The tests in tests/gpu that compare with the float32 modules report what they measure; the greatest of each kind goes into one JSON.
`tests/tolerances.py` says how much of it is allowed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from benchmarks.result_file import result_file, write_json
from runtime.backends.cuda.device import Device

TESTS = Path(__file__).parents[1] / "tests" / "gpu"
NETWORKS = ("transformer", "fp8_numerics", "text_encoder", "image_encoder", "vae", "pipeline")
"""Each has its test module."""
_PACKAGES = ("nvidia-cudnn-frontend", "nvidia-cudnn-cu13", "nvidia-cublas", "nvmath-python", "torch", "numpy")


class Collector:
    """A pytest plugin: network → what was measured → the greatest error."""

    def __init__(self) -> None:
        self.errors: dict[str, dict[str, float]] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        if report.when != "call":
            return
        network = Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_")
        found = self.errors.setdefault(network, {})
        for name, value in report.user_properties:
            found[name] = max(float(value), found.get(name, 0.0))


def table(errors: Mapping[str, Mapping[str, float]]) -> str:
    """The errors as markdown, a network's greatest first."""
    lines = ["| network | measured | at most |", "|---|---|---|"]
    for network, found in errors.items():
        for name, value in sorted(found.items(), key=lambda item: -item[1]):
            lines.append(f"| {network} | {name} | {value:.1e} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module: pytest's exit status, and nothing written where tests failed.

    Raises:
        EngineError: there is no GPU that the target can use.
    """
    import pytest

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stage_errors", description="Errors by stage and precision on a GPU."
    )
    parser.add_argument("--network", choices=NETWORKS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, help="JSON file or folder (default: benchmarks/results)")
    asked = parser.parse_args(arguments)
    with Device() as device:
        gpu = f"{device.name} ({device.arch})"
    out, collector = result_file(asked.out, "stage-errors"), Collector()
    files = [str(TESTS / f"test_{network}.py") for network in asked.network or NETWORKS]
    status = int(pytest.main(["-q", "--no-header", *files], plugins=[collector]))
    print(table(collector.errors))
    if status == 0:
        facts = {"gpu": gpu, "machine": machine(), "versions": versions(_PACKAGES)}
        write_json(out, {**facts, "errors": collector.errors})
    return status


if __name__ == "__main__":
    sys.exit(main())
