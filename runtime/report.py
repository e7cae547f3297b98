"""The record of one generation: enough to make the same video again, and what it cost."""

import dataclasses
import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import MemoryUse
from runtime.opening import Opener
from runtime.request import ResolvedRequest
from runtime.version import VERSION

T = TypeVar("T")
_END = object()
_DISTRIBUTIONS = (
    *("numpy", "onnxruntime", "tokenizers", "av", "ftfy", "pillow"),
    *("cuda-bindings", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cudnn-frontend", "nvmath-python"),
)


@dataclass(slots=True)
class StageClock:
    """Seconds spent in each named stage of a generation, and in each denoising step.

    Args:
        opening_seconds: what opening the pipeline took, if this is its first generation.
    """

    opening_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    first_step_seconds: float | None = None
    _started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.opening_seconds:
            self.seconds["open"] = self.opening_seconds

    def step(self, seconds: float) -> None:
        """A denoising step that took so long has just ended."""
        if not self.step_seconds:
            self.first_step_seconds = self.opening_seconds + time.perf_counter() - self._started
        self.step_seconds.append(seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, the time spent on making each added to `name`."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                item = next(iterator, _END)
            if item is _END:
                return
            yield cast(T, item)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was made, from what, by what, and at what cost.

    `step_seconds` has one number for each denoising step. `first_step_seconds` is what came before the second one: opening the
    bundle, unless an earlier generation found it open, and everything from the request to the end of the first step.
    """

    request: dict[str, Any]
    bundle_sha256: str
    variant: str
    target: str
    precision: str
    versions: dict[str, str]
    stage_seconds: dict[str, float]
    step_seconds: tuple[float, ...]
    first_step_seconds: float | None
    peak_memory_bytes: int | None
    device_memory: MemoryUse | None
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1)


def make_report(opener: Opener, job: ResolvedRequest, clock: StageClock, *, warnings: tuple[str, ...]) -> Report:
    """The report of a generation that just ended."""
    return Report(
        request=request_facts(job),
        bundle_sha256=opener.bundle.sha256,
        variant=opener.bundle.manifest.variant.name,
        target=opener.name,
        precision=opener.target.precision.value,
        versions=_versions(),
        stage_seconds={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        step_seconds=tuple(round(seconds, 4) for seconds in clock.step_seconds),
        first_step_seconds=None if clock.first_step_seconds is None else round(clock.first_step_seconds, 3),
        peak_memory_bytes=peak_memory_bytes(),
        device_memory=opener.session.memory_use(),
        warnings=warnings,
    )


def request_facts(job: ResolvedRequest) -> dict[str, Any]:
    """A resolved request as JSON values: with the same bundle, enough to make the same video again."""
    return {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "width": job.size.width,
        "height": job.size.height,
        "num_frames": job.size.num_frames,
        "fps": job.fps,
        "num_steps": job.num_steps,
        "strength": job.strength,
        "shift": job.shift,
        "guidance": [guidance.scale for guidance in job.guidance],
        "scheduler": job.scheduler.value,
        "conventions": job.conventions.value,
        "seed": job.seed if job.latents is None else None,
        "initial_latents_sha256": _sha256(job.latents),
        "image_sha256": _sha256(job.image),
        "last_image_sha256": _sha256(job.last_image),
        "video_sha256": _sha256(None if job.video is None else job.video[: job.size.num_frames]),
        "tile": dataclasses.asdict(job.tile) if job.tile else None,
        "attention": job.attention.value,
    }


def _sha256(array: NDArray[Any] | None) -> str | None:
    """Hash of an array's elements: an image's is of its decoded pixels, not of its file."""
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def peak_memory_bytes() -> int | None:
    """The most memory this process has had resident so far; None where the system does not tell (Windows)."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage also counts what the parent had before it started this program
        peaks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(peaks[0].split()[1]) * 1024 if peaks else None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _versions() -> dict[str, str]:
    known = {"wanrt": VERSION, "python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known
