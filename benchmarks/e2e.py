"""Whole generations at full size on one GPU, each in a fresh process, by stage: a `wanrt run`, and diffusers.

A bundle without weights is filled with random ones in a copy (`benchmarks.random_bundle`); having just been written they lie in the
page cache, if the machine's memory holds them. Each generation runs once. TMPDIR says where the weights go.
"""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu import OURS, Attempt, Options, Result, Suite, attentions, precisions_text
from benchmarks.workload import ROOT, environment
from runtime.bundle import Bundle
from runtime.errors import RequestError, WanError
from runtime.geometry import VideoSize
from runtime.specs import Precision

log = logging.getLogger(__name__)
PROMPT = "A red fox runs through fresh snow at sunset, cinematic light"
SEED = 1


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
    device_memory: dict[str, Any] | None = None  # this project's own account of it

    def notes(self) -> list[str]:
        """Where the time went."""
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages.items())
        return [
            f"first step done after {self.first_step_seconds:.2f} s, median step {self.median_step_seconds:.3f} s; {stages}"
        ]


def attempts(case: Case, options: Options) -> Iterator[Attempt]:
    """Every bundle in every precision of attention, then the baselines."""
    for bundle in options.bundles:
        for attention in attentions(bundle, options.attention):
            peer = f"{OURS} {precisions_text(bundle, attention)}"
            yield peer, partial(_ours, case, peer, bundle, attention, options.scratch)
    for baseline in options.baselines:
        yield baseline, partial(_diffusers, case, baseline, options)


def _ours(case: Case, peer: str, bundle: Bundle, attention: Precision, scratch: Path) -> Result:
    """One run.

    Raises:
        RequestError: the bundle has no weights, and the disk has no room for random ones.
        WanError: a run failed; the message has its last words.
    """
    seconds, report = run_once(_filled(bundle, scratch), run_options(case, attention))
    memory = report["device_memory"]
    peak = None if memory is None else memory["peak_bytes"]
    return _result(case, peer, seconds, report, peak_bytes=peak, device_memory=memory)


def _diffusers(case: Case, peer: str, options: Options) -> Result:
    from benchmarks.e2e_diffusers import run_diffusers
    from benchmarks.random_checkpoint import checkpoint_bytes

    variant = options.bundles[0].manifest.variant
    if shutil.disk_usage(options.scratch).free < checkpoint_bytes(variant):
        _empty(options.scratch)
    seconds, report = run_diffusers(variant, case.size, num_steps=case.num_steps, prompt=PROMPT, seed=SEED)
    return _result(case, peer, seconds, asdict(report), peak_bytes=report.peak_memory_bytes, output_std=report.output_std)


def _result(
    case: Case,
    peer: str,
    seconds: float,
    report: dict[str, Any],
    *,
    peak_bytes: int | None,
    output_std: float | None = None,
    device_memory: dict[str, Any] | None = None,
) -> Result:
    stages = report["stage_seconds"]
    return E2eResult(
        seconds=seconds,
        fastest=seconds,
        slowest=seconds,
        runs=1,
        warmups=0,
        first_seconds=seconds,
        output_std=output_std,
        case=case.name,
        peer=peer,
        peak_memory_gib=None if peak_bytes is None else peak_bytes / 2**30,
        tflop=None,
        num_steps=case.num_steps,
        first_step_seconds=report["first_step_seconds"],
        median_step_seconds=median(report["step_seconds"]),
        stages={**stages, "process": seconds - sum(stages.values())},  # starting Python, imports, the end
        device_memory=device_memory,
    )


def _filled(bundle: Bundle, scratch: Path) -> Path:
    """The bundle's folder, or that of a copy filled with random weights; a copy serves the cases after it, too."""
    if bundle.manifest.weights:
        return bundle.folder
    if importlib.util.find_spec("torch") is None:
        raise RequestError(
            f"{bundle.folder.name}: holds no weights, and filling it with random ones needs torch, not installed here",
            hint="fill it elsewhere: `python -m benchmarks.random_bundle BUNDLE`",
        )
    from benchmarks.random_bundle import fill_with_random_weights

    folder = scratch / f"filled-{bundle.sha256[:16]}"
    if not folder.exists():
        try:
            shutil.copytree(bundle.folder, folder)
            fill_with_random_weights(folder)
        except BaseException:  # half a copy must not serve the next case
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def _empty(scratch: Path) -> None:
    """Remove the filled copies: a later case fills them again."""
    for folder in scratch.glob("filled-*"):
        log.warning("removing %s to make room for a peer's checkpoint", folder.name)
        shutil.rmtree(folder)


def run_options(case: Case, attention: Precision) -> list[str]:
    """What `wanrt run` is told beside the bundle and where the video goes."""
    size = case.size
    sized = ["--size", f"{size.width}x{size.height}", "--frames", str(size.num_frames), "--steps", str(case.num_steps)]
    return ["--target", "cuda", *sized, "--attention", attention.value, "--prompt", PROMPT, "--seed", str(SEED)]


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
    baselines={"diffusers": ("torch", "diffusers", "transformers")},
    attempts=attempts,
    takes=frozenset({"attention"}),
    torch=False,
)
