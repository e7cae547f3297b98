"""The peer of `benchmarks.e2e`: diffusers over a random checkpoint of the same architecture, in a fresh process, by stage.

The checkpoint is written just before and removed right after, so that its files lie in the page cache while they are loaded.
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.workload import ROOT, environment
from runtime.errors import WanError
from runtime.geometry import VideoSize
from runtime.variants import Variant

_TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the peer's process is told. `guidance` is one scale, or the high-noise expert's and the low-noise one's."""

    model: str
    video: str
    report: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_steps: int
    guidance: tuple[float, ...]
    seed: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReport:
    """What it found. `first_step_seconds` are from just before the pipeline is loaded to the end of the first step."""

    stage_seconds: dict[str, float]
    step_seconds: list[float]
    first_step_seconds: float
    peak_memory_bytes: int | None  # reserved by PyTorch on the device
    output_std: float


def run_diffusers(
    variant: Variant, size: VideoSize, *, num_steps: int, prompt: str, seed: int, device: str = "cuda"
) -> tuple[float, PeerReport]:
    """One generation with the variant's own guidance, shift and negative prompt.

    Returns:
        Seconds from the start of its process to its end, the video written; and its report.

    Raises:
        RequestError: the disk has no room for the checkpoint.
        WanError: it failed, and the message has its last words; or its frames are constant or not finite.
    """
    with TemporaryDirectory(prefix="wanrt-peer-") as name:
        folder = Path(name)
        model = folder / "checkpoint"
        model.mkdir()
        write_random_checkpoint(model, variant)
        job = Generation(
            model=str(model),
            video=str(folder / "clip.mp4"),
            report=str(folder / "report.json"),
            prompt=prompt,
            negative_prompt=variant.defaults.negative_prompt,
            width=size.width,
            height=size.height,
            num_frames=size.num_frames,
            fps=variant.defaults.fps,
            num_steps=num_steps,
            guidance=variant.defaults.guidance,
            seed=seed,
            device=device,
        )
        return _run(job, folder)


def _run(job: Generation, folder: Path) -> tuple[float, PeerReport]:
    job_file = folder / "generation.json"
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.peers.diffusers_gpu", str(job_file)]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as exc:
        raise WanError(f"diffusers was not done after {_TIMEOUT_S} s") from exc
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise WanError(f"diffusers ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    report = PeerReport(**json.loads(Path(job.report).read_text(encoding="utf-8")))
    if not 0 < report.output_std < math.inf:  # NaN is neither
        raise WanError(
            "diffusers' frames are constant or not finite: such data runs faster than real data, so its time means nothing"
        )
    return seconds, report


def read_generation(path: str) -> Generation:
    """What the peer's process was started with."""
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    return Generation(**{**told, "guidance": tuple(told["guidance"])})


def write_report(path: str, report: PeerReport) -> None:
    """Write a report where the suite finds it."""
    Path(path).write_text(json.dumps(asdict(report)), encoding="utf-8")
