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
    cancelled: Callable[[], bool] | None = None,
) -> RunOutcome:
    """Generate a video into a file.

    Raises:
        RequestError: the request cannot be met or the output cannot be written; nothing half-written is left.
        CancelledError: `cancelled` said so.
    """
    check_output(request.out)
    if request.save_latents is not None:
        check_latents_output(request.save_latents)
    job = pipeline.resolve(request.generate)
    save = request.save_latents
    metadata = json.dumps({"bundle_sha256": pipeline.bundle.sha256, **request_facts(job)}, ensure_ascii=False)
    with open_writer(request.out, fps=job.fps, width=job.size.width, height=job.size.height, metadata=metadata) as writer:
        video = pipeline.generate(
            replace(request.generate, seed=job.seed),
            on_step=on_step,
            on_latents=None if save is None else lambda latents: _save_latents(save, latents),
            cancelled=cancelled,
            writer=writer,
        )
    report_file = request.out.with_suffix(".json")
    _write_whole(report_file, lambda file: file.write_text(video.report.to_json(), encoding="utf-8"))
    return RunOutcome(out=request.out, report_file=report_file, report=video.report)


def check_latents_output(path: Path) -> None:
    """Raises RequestError when `path` is not a .npy file in an existing folder."""
    if path.suffix != ".npy":
        raise RequestError(f"{path}: latents are saved as .npy", hint="give a name that ends in .npy")
    if not path.parent.is_dir():
        raise RequestError(f"{path.parent}: no such folder", hint="make it first")


def load_latents(path: Path) -> Float32:
    """Latents from a .npy file, as float32.

    Raises:
        RequestError: missing, or not an array of numbers.
    """
    try:
        latents = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise RequestError(f"{path}: not a readable .npy file: {exc}", hint="save latents with numpy.save") from exc
    if not isinstance(latents, np.ndarray) or latents.dtype.kind != "f":
        raise RequestError(f"{path}: holds no array of floating-point numbers", hint="save float32 latents with numpy.save")
    return np.ascontiguousarray(latents, np.float32)


def _save_latents(path: Path, latents: Float32) -> None:
    def save(file: Path) -> None:
        with file.open("wb") as stream:
            np.save(stream, latents)

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
