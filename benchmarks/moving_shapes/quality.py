"""The quality suite: the same prompts and seeds through every target, precision, scheduler and number of steps.

Every video is scored against its prompt and compared with the fp32 video of the same seed at 50 steps of UniPC, the original repositories'
default, made by this run or by an earlier one (`reference`). A part is made twice, identically: what differs then is the noise floor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np

from benchmarks.machine import machine, versions
from benchmarks.moving_shapes.cases import CLIP, Case, QualityRequest, chosen_cases, reference_is_made
from benchmarks.moving_shapes.grammar import caption_of
from benchmarks.moving_shapes.measure import Frames
from benchmarks.moving_shapes.reference import Reference, check_place, read_reference, write_reference
from benchmarks.moving_shapes.score import ATTRIBUTES, ClipScore, accuracy, score_clip
from benchmarks.moving_shapes.similarity import Similarity, compare
from benchmarks.moving_shapes.world import ClipSize, sample_scene
from benchmarks.result_file import result_file, write_json
from runtime.errors import EngineError
from runtime.pipeline import Video, VideoPipeline
from runtime.request import GenerateRequest

SCHEMA_VERSION = 1
_REPEATED = 20  # prompts made twice
_MOST_PSNR_DB = 99.0  # what equal videos count as in a mean
_DISTRIBUTIONS = ("numpy", "onnxruntime", "cuda-bindings", "nvidia-cublas", "nvidia-cudnn-cu13")


def run_quality(
    request: QualityRequest, *, on_line: Callable[[str], None] = lambda _: None, clip: ClipSize = CLIP
) -> dict[str, Any]:
    """Make the videos, judge them, and write the result as JSON after every row.

    Args:
        on_line: takes a line of progress for people.
        clip: size of the videos.

    Returns:
        The result as written, its markdown under `table`; targets and rows that do not run here are under `refused`.

    Raises:
        RequestError: no bundle, no fp32 target to compare with, no such case, or the reference's file cannot be used.
        BundleError: a bundle cannot be opened.
        EngineError: the fp32 target does not run on this machine, or none does.
    """
    cases = chosen_cases(request)
    out = result_file(request.out, "quality")
    captions = [caption_of(sample_scene(seed, clip)) for seed in range(request.prompts)]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "suite": "quality", "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(), "versions": versions(_DISTRIBUTIONS), "clip": asdict(clip), "prompts": request.prompts,
        "reference": cases[0].name, "rows": [], "refused": {}, "table": "",
    }  # fmt: skip
    reference: Reference | None = None
    if request.reference is not None and reference_is_made(request):
        reference = read_reference(request.reference, captions, clip)
        report["reference"] = reference.case
    elif request.reference is not None:
        check_place(request.reference)
    with ExitStack() as stack:
        pipeline, opened, refusal = None, None, None
        for case in cases:
            if opened != (case.bundle, case.target):
                stack.close()
                opened = case.bundle, case.target
                try:
                    pipeline = stack.enter_context(VideoPipeline.open(case.bundle, target=case.target))
                except EngineError as error:
                    if reference is None:
                        raise
                    refusal = error
                    pipeline, report["refused"][case.build] = None, error.message
            if pipeline is None:
                continue
            try:
                made = list(_videos(pipeline, case, captions, clip))
            except EngineError as error:  # FP8 attention on a GPU without it, or a device that is lost
                if reference is None:
                    raise
                refusal, report["refused"][case.name] = error, error.message
                continue
            videos = [video.frames for video in made]
            if reference is None:
                reference = Reference(case=case.name, videos=videos)
                if request.reference is not None:
                    write_reference(request.reference, reference, captions, clip)
            report["rows"].append(
                _row(case, captions, videos, reference.videos)
                | _device(made)
                | _repeated(pipeline, case, captions, clip, videos)
            )
            report["table"] = markdown_table(report["rows"])
            write_json(out, report)
            on_line(f"{case.name}: {report['rows'][-1]['accuracy']['all']:.1%} obey their prompts")
    if refusal is not None and not report["rows"]:
        raise refusal
    write_json(out, report)
    on_line(f"result in {out}")
    return report


def _videos(pipeline: VideoPipeline, case: Case, captions: Sequence[str], clip: ClipSize) -> Iterator[Video]:
    for seed, caption in enumerate(captions):
        yield pipeline.generate(
            GenerateRequest(
                prompt=caption,
                width=clip.width,
                height=clip.height,
                num_frames=clip.num_frames,
                num_steps=case.num_steps,
                scheduler=case.scheduler,
                seed=seed,
                attention=case.attention,
            )
        )


def _row(case: Case, captions: Sequence[str], videos: Sequence[Frames], reference: Sequence[Frames]) -> dict[str, Any]:
    scores = [score_clip(video, caption) for video, caption in zip(videos, captions, strict=True)]
    return {
        "case": case.name, "target": case.target, "precision": case.precision, "wide": case.wide,
        "attention": case.attention, "scheduler": case.scheduler, "num_steps": case.num_steps, "accuracy": accuracy(scores),
        "wrong": _wrong(captions, scores),
        "to_reference": _mean([compare(*pair) for pair in zip(videos, reference, strict=True)]),
    }  # fmt: skip


def _device(videos: Sequence[Video]) -> dict[str, str]:
    """Which GPU made them, if one did."""
    memory = videos[0].report.device_memory
    return {} if memory is None else {"device": memory.device}


def _repeated(
    pipeline: VideoPipeline, case: Case, captions: Sequence[str], clip: ClipSize, videos: Sequence[Frames]
) -> dict[str, Any]:
    """The noise floor."""
    if not case.is_repeated:
        return {}
    again = [video.frames for video in _videos(pipeline, case, captions[:_REPEATED], clip)]
    return {"noise_floor": _mean([compare(*pair) for pair in zip(again, videos, strict=False)])}


def _wrong(captions: Sequence[str], scores: Sequence[ClipScore], *, most: int = 20) -> dict[str, list[str]]:
    """What is wrong with the first clips that do not obey."""
    failed = [(caption, score) for caption, score in zip(captions, scores, strict=True) if not score.obeys]
    return {caption: [name for name, right in score.right.items() if not right] for caption, score in failed[:most]}


def _mean(values: Sequence[Similarity]) -> dict[str, float]:
    return {
        "psnr_db": float(np.mean([min(value.psnr_db, _MOST_PSNR_DB) for value in values])),
        "ssim": float(np.mean([value.ssim for value in values])),
        "feature_distance": float(np.mean([value.feature_distance for value in values])),
    }


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as markdown: the share of clips that have each attribute right, and the distances to the reference."""
    shown = [name for name in (*ATTRIBUTES, "all") if any(name in row["accuracy"] for row in rows)]
    header = ["case", *shown, "PSNR", "SSIM", "features", "noise floor"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        near, floor = row["to_reference"], row.get("noise_floor")
        cells = [
            row["case"],
            *(f"{100 * row['accuracy'][name]:.1f}%" if name in row["accuracy"] else "–" for name in shown),
            "equal" if near["psnr_db"] == _MOST_PSNR_DB else f"{near['psnr_db']:.1f} dB",
            f"{near['ssim']:.3f}",
            f"{near['feature_distance']:.3f}",
            "–" if floor is None else "equal" if floor["psnr_db"] == _MOST_PSNR_DB else f"{floor['psnr_db']:.1f} dB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
