"""Errors of the strongly typed graphs on a CPU: stage by stage at toy and at true widths, and of whole toy generations.

    python -m benchmarks.typed_errors [--out FILE] [--threads N]

Stages are compared with their float32 modules (`benchmarks.typed_stages`), generations of the target `emulated` with those of `cpu`.
All weights are random: no outliers, no peaked attention, nothing that training makes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import export.graphs
from benchmarks.machine import machine, versions
from benchmarks.result_file import result_file, write_json
from benchmarks.toy_checkpoint import KINDS, Layout, write_toy_checkpoint
from benchmarks.typed_stages import FORMS, network_errors, toy_of, what_decides
from engines.verification.measure import relative_error
from export.build import BuildRequest, build_bundle
from runtime.geometry import Float32, VideoSize
from runtime.pipeline import Frames, VideoPipeline
from runtime.precision import NOTHING_WIDE
from runtime.request import GenerateRequest
from runtime.specs import Precision
from runtime.stages import network_stages, networks
from runtime.variants import VARIANTS, Variant

PRECISIONS = (Precision.BF16, Precision.FP16, Precision.FP8)
SEED = 0
TOY_SIZE = VideoSize(width=96, height=96, num_frames=9)
TRUE_SIZE, TRUE_TILE = VideoSize(width=128, height=128, num_frames=5), 4
"""True widths on few tokens, and on a tile of so many latent positions a side."""
GENERATIONS = {
    "t2v, two experts": (replace(KINDS["t2v"], experts=2), VideoSize(width=64, height=48, num_frames=9), False),
    "i2v": (KINDS["i2v"], VideoSize(width=64, height=48, num_frames=9), True),
    "ti2v": (KINDS["ti2v"], VideoSize(width=64, height=64, num_frames=9), True),
}
"""Toy, size, and whether it is given an image."""
NUM_STEPS = 8
_PACKAGES = ("onnxruntime", "onnx", "torch", "numpy")


def stage_table(variants: Iterable[Variant], size: VideoSize, *, tile: int | None, num_threads: int) -> list[dict[str, Any]]:
    """Every distinct stage of the variants with its errors; inputs that stages measured before would make are drawn."""
    rows: dict[Hashable, dict[str, Any]] = {}
    for variant in variants:
        for network in networks(variant):
            new: dict[str, dict[str, Any]] = {}
            for stage in network_stages(variant, network):
                key = what_decides(variant, stage)
                if key not in rows:
                    rows[key] = new[stage.name] = {"stage": stage.name, "variants": []}
                rows[key]["variants"].append(variant.name)
            started = time.perf_counter()
            errors = network_errors(variant, network, size, tile=tile, seed=SEED, num_threads=num_threads, only=new)
            for name, row in new.items():
                row["errors"] = errors[name]
            seconds = time.perf_counter() - started
            print(f"{variant.name} at {size}, {network}: {len(new)} stages, {seconds:.0f} s", file=sys.stderr, flush=True)
    return list(rows.values())


def build_toy(checkpoint: Path, folder: Path) -> dict[Precision, Path]:
    """A bundle with the targets `cpu` and `emulated` for each precision."""
    bundles = {precision: folder / precision for precision in PRECISIONS}
    with patch.object(export.graphs, "stage_graph", cache(export.graphs.stage_graph)):  # a graph serves all precisions
        for precision, out in bundles.items():
            targets = ("cpu", "emulated")
            wide = NOTHING_WIDE  # a toy has two blocks
            build_bundle(BuildRequest(out=out, checkpoint=checkpoint, targets=targets, precision=precision, fp8_wide=wide))
    return bundles


def generation_errors(bundle: Path, request: GenerateRequest) -> dict[str, Any]:
    """How far a whole generation in the narrow precision is from the float32 one: latents after each step, and frames."""
    (expected, expected_frames), (found, frames) = (_generate(bundle, request, target) for target in ("cpu", "emulated"))
    return {
        "latents_after_each_step": [relative_error(a, b) for a, b in zip(found, expected, strict=True)],
        "psnr_db": psnr(frames, expected_frames),
    }


def psnr(frames: Frames, expected: Frames) -> float:
    """Peak signal-to-noise ratio of 8-bit frames, in dB; infinite where they are equal."""
    error = np.mean((frames.astype(np.float64) - expected.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _generate(bundle: Path, request: GenerateRequest, target: str) -> tuple[list[Float32], Frames]:
    steps: list[Float32] = []
    with VideoPipeline.open(bundle, target=target, num_threads=1) as pipeline:
        video = pipeline.generate(request, on_step=lambda event: steps.append(event.latents.copy()))
    return steps, video.frames


def generation_table() -> dict[str, dict[str, Any]]:
    """The toys' whole generations in each precision."""
    found: dict[str, dict[str, Any]] = {}
    for name, (model, size, takes_image) in GENERATIONS.items():
        image = np.random.default_rng(SEED).integers(0, 256, (size.height, size.width, 3), np.uint8)
        request = GenerateRequest(
            prompt="a red fox runs",
            negative_prompt="slow",
            image=image if takes_image else None,
            width=size.width,
            height=size.height,
            num_frames=size.num_frames,
            num_steps=NUM_STEPS,
            seed=SEED,
        )
        with tempfile.TemporaryDirectory() as folder:
            write_toy_checkpoint(Path(folder) / "checkpoint", model, layout=Layout.DIFFUSERS)
            for precision, bundle in build_toy(Path(folder) / "checkpoint", Path(folder)).items():
                found.setdefault(name, {})[precision] = generation_errors(bundle, request)
        print(f"generations of {name}: done", file=sys.stderr, flush=True)
    return found


def measure(*, num_threads: int) -> dict[str, Any]:
    """The whole result."""
    toys = [toy_of(variant) for variant in VARIANTS.values()]
    return {
        "schema_version": 1,
        "seed": SEED,
        "sizes": {"toy": str(TOY_SIZE), "true": str(TRUE_SIZE), "true_tile": TRUE_TILE},
        "generations": generation_table(),
        "stages": {
            "toy": stage_table(toys, TOY_SIZE, tile=None, num_threads=num_threads),
            "true": stage_table(VARIANTS.values(), TRUE_SIZE, tile=TRUE_TILE, num_threads=num_threads),
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as markdown: of each stage the greatest error over variants and tensors, toy and true; and the generations."""
    forms = [form.name for form in FORMS]
    lines = [f"| stage, toy / true widths | {' | '.join(forms)} |", "|---" * (len(forms) + 1) + "|"]
    greatest: dict[str, dict[tuple[str, str], float]] = {}
    for width, rows in result["stages"].items():
        for row in rows:
            found = greatest.setdefault(row["stage"], {})
            for form, error in (pair for errors in row["errors"].values() for pair in errors.items()):
                found[width, form] = max(error, found.get((width, form), 0.0))
    for stage, errors in greatest.items():
        cells = [" / ".join(f"{errors[w, form]:.1e}" for w in result["stages"] if (w, form) in errors) for form in forms]
        lines.append(f"| `{stage}` | {' | '.join(cells)} |")
    lines += ["", f"| generation: latents after the last step, frames | {' | '.join(PRECISIONS)} |", "|---|---|---|---|"]
    for toy, by_precision in result["generations"].items():
        cells = [
            f"{by_precision[p]['latents_after_each_step'][-1]:.1e}, {by_precision[p]['psnr_db']:.1f} dB" for p in PRECISIONS
        ]
        lines.append(f"| {toy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.typed_errors", description="Errors of typed graphs on the CPU.")
    parser.add_argument("--out", type=Path, help="JSON file or folder (default: benchmarks/results)")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    out = result_file(asked.out, "typed-errors")
    result = {"machine": machine(), "versions": versions(_PACKAGES), **measure(num_threads=asked.threads)}
    write_json(out, result)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
