"""A GPU's clock and power during a measurement, from what an nvidia-smi of the test's own prints."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_pace import Pace, watched

LINES = (
    "3, 210, 1980, 70.0, 700.0\\n99, 1400, 1980, 690.5, 700.0\\n100, 1380, 1980, 698.0, 700.0\\n"
    "98, 1390, 1980, [N/A], 700.0\\n100, 1390, 1980, 695.0, 700.0\\n100, 13"
)


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """An nvidia-smi that notes its arguments, prints, and then waits as the real one would."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys, time, pathlib\n"
        f"print(b'{text}'.decode(), end='', flush=True)\n"
        f"pathlib.Path({str(tmp_path / 'asked')!r}).write_text(' '.join(sys.argv[1:]))\n"
        "time.sleep(60)\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "asked"


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


def test_a_pace_is_the_median_of_whole_lines_of_a_busy_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = install(tmp_path, monkeypatch, LINES)
    with watched("GPU-7") as watch:
        wait_for(asked)
    assert watch.pace == Pace(sm_mhz=1390, greatest_sm_mhz=1980, watts=695, limit_watts=700, samples=3)
    assert str(watch.pace) == "1390 of 1980 MHz, 695 of 700 W"
    assert asked.read_text().startswith("-i GPU-7 --query-gpu=utilization.gpu,clocks.sm,")


@pytest.mark.parametrize("text", ["", "2, 210, 1980, 70.0, 700.0\\n", "No devices were found\\n"])
def test_a_gpu_that_was_idle_or_says_nothing_has_no_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    asked = install(tmp_path, monkeypatch, text)
    with watched("0") as watch:
        wait_for(asked)
    assert watch.pace is None


def test_without_nvidia_smi_there_is_no_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with watched("0") as watch:
        pass
    assert watch.pace is None


def test_the_watcher_ends_with_what_it_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = install(tmp_path, monkeypatch, LINES)
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), watched("0"):
        wait_for(asked)
        raise ZeroDivisionError
    assert time.monotonic() - started < 30
