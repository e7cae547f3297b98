"""Runs the same generation through this runtime and through a peer, each in its own fresh process, in turns.

Measured from outside: cold start (from just before a process starts to the end of its first denoising step), total time (to its
exit, frames written) and peak memory (what the kernel says when it has ended). One pair of runs comes first and does not count: it
fills the file cache and shows that both made the same video.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.job import Job, write_job
from benchmarks.machine import machine, num_cores, versions
from benchmarks.result_file import result_file, write_json
from benchmarks.table import METRICS, Measured, check_readme, markdown_table, rewrite_readme, summarise
from benchmarks.workload import WORKLOADS, Workload, describe, environment, prepare
from runtime.errors import RequestError, WanError

SCHEMA_VERSION = 1
MAX_FRAME_DIFFERENCE = 1  # of 255: the two round the same colour to neighbouring levels
MAX_PAIRS = 1000
_OURS = "wanrt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A peer to compare with: the packages it needs, and those whose versions belong to a result."""

    needs: tuple[str, ...]
    distributions: tuple[str, ...]


BASELINES = {
    "diffusers": Baseline(needs=("torch", "diffusers", "transformers"), distributions=("torch", "diffusers", "transformers"))
}
_OUR_DISTRIBUTIONS = ("numpy", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRequest:
    """What to measure.

    Args:
        suite: name of a workload in `WORKLOADS`.
        baseline: name of a peer in `BASELINES`.
        pairs: runs of each side that count.
        out: `.json` file or folder for the result; None for benchmarks/results/ below the current folder.
        readme: README whose benchmark block to rewrite; None for none.
    """

    suite: str = "toy"
    baseline: str = "diffusers"
    pairs: int = 5
    out: Path | None = None
    readme: Path | None = None


def run_benchmark(
    request: BenchmarkRequest, *, on_line: Callable[[str], None] = lambda _: None, workload: Workload | None = None
) -> dict[str, Any]:
    """Measure, write the result as JSON and, if asked, into a README.

    Args:
        on_line: takes a line of progress for people.
        workload: instead of the suite's.

    Returns:
        The result as written, and its markdown under `table`.

    Raises:
        RequestError: the request cannot be met: unknown names, missing packages, no block in the README.
        WanError: a peer failed, or the two made different videos: then nothing is reported.
    """
    out = _check(request)
    work = workload or WORKLOADS[request.suite]
    num_threads = num_cores()
    with tempfile.TemporaryDirectory(prefix="wanrt-benchmark-") as name:
        folder = Path(name)
        on_line("writing the toy checkpoint and building its bundle (not counted)")
        checkpoint, bundle = prepare(folder, work.model)
        models = {_OURS: bundle, request.baseline: checkpoint}
        jobs = {peer: _job(work, folder, peer, model, num_threads) for peer, model in models.items()}
        warm_up = [_run_peer(peer, job, folder) for peer, job in jobs.items()]
        on_line(f"warm-up (not counted): {_words(jobs, warm_up)}")
        difference = frame_difference(*(Path(job.frames_file) for job in jobs.values()))
        pairs = []
        for number in range(1, request.pairs + 1):
            ours, theirs = (_run_peer(peer, job, folder) for peer, job in jobs.items())
            on_line(f"pair {number}/{request.pairs}: {_words(jobs, [ours, theirs])}")
            pairs.append((ours, theirs))
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "suite": request.suite,
        "baseline": request.baseline,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions((*_OUR_DISTRIBUTIONS, *BASELINES[request.baseline].distributions)),
        "work": describe(work, num_threads=num_threads),
        "warm_up_pairs": 1,
        "largest_frame_difference": difference,
        "pairs": [{"ours": ours, "baseline": theirs} for ours, theirs in pairs],
        "summary": summarise(pairs),
    }
    result["table"] = markdown_table(result)
    write_json(out, result)
    on_line(f"result in {out}")
    if request.readme is not None:
        rewrite_readme(request.readme, result["table"])
        on_line(f"table in {request.readme}")
    return result


def frame_difference(ours: Path, theirs: Path) -> int:
    """The largest difference of two videos' colours, of 255.

    Args:
        ours, theirs: `.npy` files, uint8 [T, H, W, 3].

    Raises:
        WanError: they differ in shape, or by more than rounding.
    """
    a, b = (np.load(path).astype(np.int16) for path in (ours, theirs))
    if a.shape != b.shape:
        raise WanError(f"the two videos differ in shape: {list(a.shape)} and {list(b.shape)}; nothing is reported")
    difference = int(np.abs(a - b).max())
    if difference > MAX_FRAME_DIFFERENCE:
        raise WanError(
            f"the two videos differ by {difference} of 255, allowed is {MAX_FRAME_DIFFERENCE}; nothing is reported",
            hint="times of different results cannot be compared; find the difference first",
        )
    return difference


def _check(request: BenchmarkRequest) -> Path:
    """Refuse what cannot be met before anything runs; returns the result's file."""
    for what, asked, known in (("suite", request.suite, WORKLOADS), ("baseline", request.baseline, BASELINES)):
        if asked not in known:
            raise RequestError(f"{what} {asked!r}: there is {', '.join(known)}", hint="choose one of them")
    if not 1 <= request.pairs <= MAX_PAIRS:
        raise RequestError(f"pairs={request.pairs}: need 1 to {MAX_PAIRS}", hint="5 or more give a usable spread")
    missing = [name for name in BASELINES[request.baseline].needs if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"baseline {request.baseline} needs {', '.join(missing)}, not installed here",
            hint="install wanrt's `dev` extra: pip install '.[cpu,export,dev]'",
        )
    if request.readme is not None:
        check_readme(request.readme)
    return result_file(request.out, f"{request.suite}-{request.baseline}")


def _job(work: Workload, folder: Path, peer: str, model: Path, num_threads: int) -> Job:
    return Job(
        model=str(model),
        frames_file=str(folder / f"{peer}.npy"),
        first_step_file=str(folder / f"{peer}.first-step"),
        prompt=work.prompt,
        negative_prompt=work.negative_prompt,
        width=work.width,
        height=work.height,
        num_frames=work.num_frames,
        num_steps=work.num_steps,
        guidance=work.guidance,
        seed=work.seed,
        num_threads=num_threads,
    )


def _run_peer(peer: str, job: Job, folder: Path) -> Measured:
    """One run in a fresh process."""
    job_file, record_file, log_file = (folder / f"{peer}.{kind}" for kind in ("job.json", "launch.json", "log"))
    write_job(job_file, job)
    for written in (record_file, Path(job.first_step_file), Path(job.frames_file)):
        written.unlink(missing_ok=True)
    python = [sys.executable, "-m"]
    command = [*python, "benchmarks.launch", str(record_file), *python, f"benchmarks.peers.{peer}", str(job_file)]
    with log_file.open("w") as log:
        process = subprocess.Popen(
            command, env=environment(num_threads=job.num_threads), stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the peer, too, which is the launcher's child
            process.wait()
            raise
    record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.exists() else {"exit_code": process.returncode}
    if record["exit_code"] != 0 or not Path(job.frames_file).exists():
        tail = log_file.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
        raise WanError(f"{peer} ended with exit code {record['exit_code']}; its last words:\n{tail}")
    first_step_at = float(Path(job.first_step_file).read_text(encoding="utf-8"))
    return {
        "cold_start_s": first_step_at - record["started_at"],
        "total_s": record["ended_at"] - record["started_at"],
        "peak_memory_bytes": record["peak_memory_bytes"],
    }


def _words(peers: dict[str, Job], runs: list[Measured]) -> str:
    return "; ".join(
        f"{peer} " + ", ".join(f"{run[metric.key] / metric.per_unit:.2f} {metric.unit}" for metric in METRICS)
        for peer, run in zip(peers, runs, strict=True)
    )
