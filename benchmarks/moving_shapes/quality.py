"""The quality suite: the same prompts and seeds through every target, precision, scheduler and number of steps.

Every video is scored against its prompt and compared with the fp32 video of the same seed at 50 steps of UniPC, the original repositories'
default, made by this run or by an earlier one (`reference`). A part is made twice, identically: what differs then is the noise floor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, versions
from benchmarks.moving_shapes.grammar import caption_of
from benchmarks.moving_shapes.measure import Frames
from benchmarks.moving_shapes.reference import Reference, check_place, read_reference, write_reference
from benchmarks.moving_shapes.score import ATTRIBUTES, ClipScore, accuracy, score_clip
from benchmarks.moving_shapes.similarity import Similarity, compare
from benchmarks.moving_shapes.world import ClipSize, sample_scene
from benchmarks.result_file import result_file, write_json
from runtime.backends import RUNTIME_TARGETS
from runtime.bundle import open_bundle
from runtime.errors import BundleError, EngineError, RequestError
from runtime.pipeline import Video, VideoPipeline
from runtime.request import GenerateRequest
from runtime.schedulers import SchedulerName
from runtime.specs import Precision

SCHEMA_VERSION = 1
STEPS = (50, 30, 20, 10, 6, 4)
CLIP = ClipSize(width=64, height=64, num_frames=17)
PROMPTS = 200
_REPEATED = 20  # prompts made twice
_MOST_PSNR_DB = 99.0  # what equal videos count as in a mean
_DISTRIBUTIONS = ("numpy", "onnxruntime", "cuda-bindings", "nvidia-cublas", "nvidia-cudnn-cu13")


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRequest:
    """What to judge.

    Args:
        bundles: of the moving-shapes checkpoint. One needs a target in fp32, which the others are compared with, unless `reference` is there.
        reference: file of that target's videos; written if it is not there, else read.
        prompts: how many; seed 0, 1, … each.
        cases: names, or patterns with `*`, of the rows to make beside the reference; empty for all.
        out: `.json` file or folder for the result; None for benchmarks/results/ below the current folder.
    """

    bundles: tuple[Path, ...]
    prompts: int = PROMPTS
    cases: tuple[str, ...] = ()
    reference: Path | None = None
    out: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the report.

    Args:
        wide: what of the bundle's fp8 transformer is bf16 all the same.
        attention: precision of self-attention's products where it is not the target's default.
    """

    bundle: Path
    target: str
    precision: Precision
    wide: str = ""
    attention: Precision | None = None
    scheduler: SchedulerName = SchedulerName.UNIPC
    num_steps: int = STEPS[0]

    @property
    def name(self) -> str:
        wide = f" but {self.wide}" if self.wide else ""
        attention = "" if self.attention is None else f" {self.attention}-attention"
        return f"{self.target} {self.precision}{wide}{attention} {self.scheduler} {self.num_steps}"


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
    if request.reference is not None and _made(request):
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
                    pipeline, report["refused"][f"{case.target} {case.precision}"] = None, error.message
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


def chosen_cases(request: QualityRequest) -> list[Case]:
    """The rows to make; the reference first, unless its file is there.

    Raises:
        RequestError: no bundle, no fp32 target to compare with, no such case, or a number of prompts out of range.
        BundleError: a bundle cannot be opened, or two have the same target in the same precision.
    """
    if not request.bundles:
        raise RequestError("suite quality needs a bundle", hint="build the moving-shapes checkpoint, and name it with --bundle")
    if request.prompts < 1:
        raise RequestError(f"prompts={request.prompts}: need 1 or more", hint="200 or more tell half a percent apart")
    targets = [case for folder in request.bundles for case in _targets(folder)]
    if len({case.name for case in targets}) < len(targets):
        raise BundleError("two of the bundles have the same target in the same precision", hint="name each once")
    targets.sort(key=lambda case: case.precision is not Precision.FP32)
    made = _made(request)
    if not made and targets[0].precision is not Precision.FP32:
        raise RequestError("none of the bundles has an fp32 target to compare with", hint="build one with `--target cpu` too")
    every = [
        replace(each, attention=attention, scheduler=scheduler, num_steps=steps)
        for each in targets
        for attention in _attentions(each)
        for scheduler in SchedulerName
        for steps in STEPS
    ]
    asked = request.cases or ("*",)
    for pattern in asked:
        if not any(fnmatch(case.name, pattern) for case in every):
            raise RequestError(f"case {pattern!r}: there is {targets[0].name} and the like", hint="* stands for anything")
    return [case for case in every if (case == every[0] and not made) or any(fnmatch(case.name, pattern) for pattern in asked)]


def _targets(folder: Path) -> Iterator[Case]:
    """A bundle's targets, at their defaults."""
    manifest = open_bundle(folder).manifest
    for name, target in manifest.targets.items():
        wide = str(manifest.fp8_wide) if target.precision is Precision.FP8 else ""
        yield Case(bundle=folder, target=name, precision=target.precision, wide=wide)


def _attentions(case: Case) -> tuple[Precision | None, ...]:
    """The target's default, and what else it has beside FP8 products."""
    if case.precision is not Precision.FP8:
        return (None,)
    others = (target.attention(case.precision)[1:] for target in RUNTIME_TARGETS if target.name == case.target)
    return (None, *next(others, ()))


def _made(request: QualityRequest) -> bool:
    """Whether an earlier run made the reference."""
    return request.reference is not None and request.reference.exists()


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
    """The noise floor, measured at the default scheduler and number of steps."""
    if (case.scheduler, case.num_steps) != (SchedulerName.UNIPC, STEPS[0]):
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
