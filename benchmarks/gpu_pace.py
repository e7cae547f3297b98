"""How fast a GPU was allowed to run: its clock and power during a measurement, as nvidia-smi tells them ten times a second."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryFile

_COLUMNS = ("utilization.gpu", "clocks.sm", "clocks.max.sm", "power.draw.instant", "power.limit")
_BUSY = 50  # percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Medians over the moments at which the GPU was busy; a power near its limit is what lowers a clock below its greatest."""

    sm_mhz: float
    greatest_sm_mhz: float
    watts: float
    limit_watts: float
    samples: int

    def __str__(self) -> str:
        return f"{self.sm_mhz:.0f} of {self.greatest_sm_mhz:.0f} MHz, {self.watts:.0f} of {self.limit_watts:.0f} W"


@dataclass(slots=True)
class Watch:
    """`pace` is there when the block is left; None where nvidia-smi is not, or never saw the GPU busy."""

    pace: Pace | None = None


@contextmanager
def watched(gpu: str) -> Iterator[Watch]:
    """Watch a GPU while the block runs.

    Args:
        gpu: its index or UUID, as nvidia-smi takes them.
    """
    watch = Watch()
    command = ["nvidia-smi", "-i", gpu, f"--query-gpu={','.join(_COLUMNS)}", "--format=csv,noheader,nounits", "-lms", "100"]
    with TemporaryFile("w+") as lines:
        try:
            process = subprocess.Popen(command, stdout=lines, stderr=subprocess.DEVNULL)
        except OSError:
            yield watch
            return
        try:
            yield watch
        finally:
            process.terminate()
            process.wait()
        lines.seek(0)
        watch.pace = _pace(lines)


def _pace(lines: Iterator[str]) -> Pace | None:
    samples = [numbers for line in lines if (numbers := _numbers(line)) is not None and numbers[0] >= _BUSY]
    if not samples:
        return None
    _, clocks, greatest, watts, limits = (median(column) for column in zip(*samples, strict=True))
    return Pace(sm_mhz=clocks, greatest_sm_mhz=greatest, watts=watts, limit_watts=limits, samples=len(samples))


def _numbers(line: str) -> list[float] | None:
    """A line's numbers; None for one that was cut off, or has a field that the GPU does not tell."""
    try:
        numbers = [float(cell) for cell in line.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == len(_COLUMNS) and line.endswith("\n") else None
