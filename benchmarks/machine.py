"""Which machine and which software a result was measured with. Names nobody: no host, user or path."""

import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from runtime.version import VERSION


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str | int]:
    """Processor, usable cores, memory and operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.machine()}",
    }


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of this project, of Python, and of those distributions that are installed."""
    found = {"wanrt": VERSION, "python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
