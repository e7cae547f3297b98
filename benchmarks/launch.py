"""Starts one process, waits for it and writes down when it started, when it ended, how, and its peak memory.

A program of its own because Linux counts the peak of whoever starts a process as the start of that process's own `ru_maxrss`
(`exec_mmap` in fs/exec.c): started from a large parent, a small program seems as large as the parent. This one is small.

    python -m benchmarks.launch RECORD.json COMMAND [ARGUMENT ...]
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A process that has ended. Times are `time.monotonic` seconds; `exit_code` is negative for a signal."""

    started_at: float
    ended_at: float
    exit_code: int
    peak_memory_bytes: int


def launch(command: list[str]) -> Launch:
    """Run a command (an absolute path and its arguments) to its end, in this process's environment."""
    started_at = time.monotonic()
    process = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(process, 0)
    ended_at = time.monotonic()
    return Launch(
        started_at=started_at,
        ended_at=ended_at,
        exit_code=os.waitstatus_to_exitcode(status),
        peak_memory_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),  # kilobytes everywhere but on macOS
    )


if __name__ == "__main__":
    record, *arguments = sys.argv[1:]
    ended = launch(arguments)
    with open(record, "w", encoding="utf-8") as file:
        json.dump(asdict(ended), file)
