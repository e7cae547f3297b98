"""Whole generations at full size on one GPU, each a `wanrt run` in a fresh process, by stage.

The bundle needs weights; random ones will do (`benchmarks.random_bundle`), and having just been written
they lie in the page cache, if the machine's memory holds them. Each generation runs once.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu import OURS, Attempt, Options, Result, Suite, attentions
from benchmarks.workload import ROOT, environment
from runtime.bundle import Bundle
from runtime.errors import BundleError, WanError
from runtime.geometry import VideoSize
from runtime.specs import Precision

PROMPT = "A red fox runs through fresh snow at sunset, cinematic light"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    variant: str
    size: VideoSize
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class E2eResult(Result):
    """`seconds` are from the start of the process to its end, the video written."""

    num_steps: int
    first_step_seconds: float  # from opening the bundle to the end of the first denoising step
    median_step_seconds: float
    stages: dict[str, float]
    device_memory: dict[str, Any] | None

    def notes(self) -> list[str]:
        """Where the time went."""
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages.items())
        return [
            f"first step done after {self.first_step_seconds:.2f} s, median step {self.median_step_seconds:.3f} s; {stages}"
        ]


def attempts(case: Case, options: Options) -> Iterator[Attempt]:
    """Every bundle in every precision of attention."""
    for bundle in options.bundles:
        for attention in attentions(bundle, options.attention):
            peer = f"{OURS} {bundle.manifest.targets['cuda'].precision}, attention {attention}"
            yield peer, partial(_measure, case, peer, bundle, attention)


def _measure(case: Case, peer: str, bundle: Bundle, attention: Precision) -> Result:
    """One run.

    Raises:
        BundleError: the bundle has no weights.
        WanError: a run failed; the message has its last words.
    """
    if not bundle.manifest.weights:
        raise BundleError(
            f"{bundle.folder.name}: holds no weights", hint="fill it: `python -m benchmarks.random_bundle BUNDLE`"
        )
    seconds, report = run_once(bundle.folder, run_options(case, attention))
    memory = report["device_memory"]
    return E2eResult(
        seconds=seconds,
        fastest=seconds,
        slowest=seconds,
        runs=1,
        warmups=0,
        first_seconds=seconds,
        output_std=None,
        case=case.name,
        peer=peer,
        peak_memory_gib=None if memory is None else memory["peak_bytes"] / 2**30,
        tflop=None,
        num_steps=case.num_steps,
        first_step_seconds=report["first_step_seconds"],
        median_step_seconds=median(report["step_seconds"]),
        stages=report["stage_seconds"],
        device_memory=memory,
    )


def run_options(case: Case, attention: Precision) -> list[str]:
    """What `wanrt run` is told beside the bundle and where the video goes."""
    size = case.size
    sized = ["--size", f"{size.width}x{size.height}", "--frames", str(size.num_frames), "--steps", str(case.num_steps)]
    return [*sized, "--attention", attention.value, "--prompt", PROMPT, "--seed", "1"]


def run_once(bundle: Path, options: list[str]) -> tuple[float, dict[str, Any]]:
    """One `wanrt run` in a fresh process.

    Returns:
        Seconds from its start to its end, and its report.

    Raises:
        WanError: it failed; the message has its last words.
    """
    with TemporaryDirectory(prefix="wanrt-e2e-") as name:
        out = Path(name) / "clip.mp4"
        command = [sys.executable, "-m", "cli", "run", str(bundle), *options, "--out", str(out)]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            raise WanError(f"the run ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        report: dict[str, Any] = json.loads(out.with_name(out.name + ".json").read_text(encoding="utf-8"))
    return seconds, report


_480P = VideoSize(width=832, height=480, num_frames=81)
SUITE = Suite(
    cases=tuple(Case(name=f"a14b-480p-{n}-steps", variant="wan2.2-t2v-a14b", size=_480P, num_steps=n) for n in (4, 40)),
    precisions=(Precision.FP8,),
    baselines={},
    refused={
        "diffusers": "it would need the random weights as a whole checkpoint in its own layout, which nothing here writes"
    },
    attempts=attempts,
    takes=frozenset({"attention"}),
    weights=True,
    torch=False,
)
