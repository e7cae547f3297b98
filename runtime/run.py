"""One generation into files: the output is checked first, everything appears whole or not at all, the report lies beside it."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime.denoise import StepEvent
from runtime.errors import RequestError
from runtime.geometry import Float32
from runtime.memory import MemoryPlan
from runtime.pipeline import VideoPipeline
from runtime.report import Report, request_facts
from runtime.request import GenerateRequest
from runtime.video import check_output, open_writer


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A generation and where its results go.

    Args:
        out: `.mp4`, `.gif`, `.npy`, or a folder of PNG.
        save_latents: `.npy` for the denoised latents; written before decoding starts.
    """

    generate: GenerateRequest
    out: Path
    save_latents: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    out: Path
    report_file: Path
    report: Report


def run_to_file(
    pipeline: VideoPipeline,
    request: RunRequest,
    *,
    on_step: Callable[[StepEvent], None] | None = None,
    on_memory: Callable[[MemoryPlan], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> RunOutcome:
    """Generate a video into a file.

    Raises:
        RequestError: the request cannot be met or the output cannot be written; nothing half-written is left.
        CancelledError: `cancelled` said so.
    """
    job = pipeline.resolve(request.generate)
    report_file = request.out.with_name(request.out.name + ".json")  # not clip.json: that could be anybody's
    check_outputs(request, report_file)
    save = request.save_latents
    metadata = json.dumps({"bundle_sha256": pipeline.bundle.sha256, **request_facts(job)}, ensure_ascii=False)
    with open_writer(request.out, fps=job.fps, width=job.size.width, height=job.size.height, metadata=metadata) as writer:
        video = pipeline.generate(
            replace(request.generate, seed=job.seed),
            on_step=on_step,
            on_latents=None if save is None else lambda latents: _save_latents(save, latents),
            on_memory=on_memory,
            cancelled=cancelled,
            writer=writer,
        )
    _write_whole(report_file, lambda file: file.write_text(video.report.to_json(), encoding="utf-8"))
    return RunOutcome(out=request.out, report_file=report_file, report=video.report)


def check_outputs(request: RunRequest, report_file: Path) -> None:
    """Check, before anything expensive, every place that a run writes to.

    Raises:
        RequestError: a place cannot be written, or two results would land in one.
    """
    check_output(request.out)
    if report_file.is_dir():
        raise RequestError(f"{report_file}: is a folder; the report would go there", hint="choose another --out")
    latents = request.save_latents
    if latents is None:
        return
    if latents.suffix != ".npy":
        raise RequestError(f"{latents}: latents are saved as .npy", hint="give a name that ends in .npy")
    check_output(latents)
    if latents.resolve().is_relative_to(request.out.resolve()):
        raise RequestError(f"{latents}: the video goes to {request.out}", hint="save the latents in another place")


def load_latents(path: Path) -> Float32:
    """Latents from a .npy file, float32, mapped: nothing is allocated for a header that promises more than the file has.

    Raises:
        RequestError: missing, damaged, or not an array of float32.
    """
    try:
        with np.errstate(over="ignore"):  # of sizes in a hostile header
            latents = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as exc:  # damaged headers make NumPy raise errors of tokenize, zipfile and others
        raise RequestError(f"{path}: not a readable .npy file: {exc}", hint="save latents with numpy.save") from exc
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32:
        found = latents.dtype if isinstance(latents, np.ndarray) else "an archive"
        raise RequestError(f"{path}: holds {found}, latents are float32", hint="save them as float32 with numpy.save")
    return np.ascontiguousarray(latents)


def _save_latents(path: Path, latents: Float32) -> None:
    def save(file: Path) -> None:
        with file.open("wb") as stream:
            whole = np.ascontiguousarray(latents)
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(whole))
            stream.write(whole.data)  # numpy.save says nothing when a full disk takes only part of them

    _write_whole(path, save)


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as exc:
        raise RequestError(
            f"{path}: could not be written: {exc.strerror or exc}", hint="free some space or choose another place"
        ) from exc
    finally:
        partial.unlink(missing_ok=True)
