"""What commands print, and how a process that a person started behaves: results go to stdout, words to stderr."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

from runtime.errors import RequestError


def print_result(text: str) -> None:
    """Print what was asked for to stdout, at once: a pipe that closed or a disk that is full shows here."""
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are not UTF-8
    try:
        print(text, flush=True)
    except OSError as exc:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it once more on leaving
        raise RequestError(
            f"standard output cannot be written: {exc.strerror}", hint="the work itself is done; keep the other end open"
        ) from exc


def say(text: str, *, quiet: bool = False) -> None:
    """Print a line for people to stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def size_text(count: int) -> str:
    """Bytes for people: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.2f} GiB"


def open_missing_streams() -> None:
    """Give a process started without stdin, stdout or stderr an empty one: files opened later must not take their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def unwind_on_signals() -> Callable[[], bool]:
    """Let SIGINT and SIGTERM unwind the command as KeyboardInterrupt, so that half-written files are removed.

    Returns:
        Whether one came: a library that calls Python code may drop the exception, about once in 170 interrupted runs. A signal that
        the parent process ignores, as a shell does for its background jobs, stays ignored.
    """
    came = threading.Event()

    def interrupt(signum: int, frame: object) -> None:
        came.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    return came.is_set


class StepBar:
    """Draws the denoising progress: a bar that redraws itself on a terminal, one line a step elsewhere."""

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream, self._quiet = stream, quiet
        self._redraw = stream.isatty()
        self._seconds: list[float] = []

    def step(self, event: Any) -> None:
        """Show one more finished step (a `StepEvent`)."""
        if self._quiet:
            return
        self._seconds.append(event.seconds)
        left = (event.num_steps - event.step) * sum(self._seconds) / len(self._seconds)
        filled = 24 * event.step // event.num_steps
        line = f"step {event.step}/{event.num_steps} [{'#' * filled}{'.' * (24 - filled)}] {event.seconds:.2f} s, {_clock(left)} left"
        end = "\n" if not self._redraw or event.step == event.num_steps else ""
        print(f"\r{line:<78}" if self._redraw else line, end=end, file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
