"""Errors of the strongly typed graphs by stage and precision, and of whole toy generations, all on the CPU.

    python -m benchmarks.typed_errors [--out FILE]

Stages run on the inputs of a toy generation of the `cpu` target, whose float32 engines are within 2.4e-6 of the modules they are traced
from. What is compared with them is the same graph in each precision, weights and inputs rounded, as the target `emulated` runs it.
`tests/tolerances.py` says how much of an error is allowed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, versions
from benchmarks.result_file import result_file, write_json
from export.build import BuildRequest, build_bundle
from runtime.backends import RUNTIME_TARGETS
from runtime.bundle import open_bundle
from runtime.comparing import ComparingOpener
from runtime.geometry import Float32
from runtime.opening import choose_target
from runtime.pipeline import Frames, VideoPipeline
from runtime.request import GenerateRequest
from runtime.specs import Precision

PRECISIONS = (Precision.BF16, Precision.FP16, Precision.FP8)
_PACKAGES = ("onnxruntime", "onnx", "torch", "numpy", "diffusers", "transformers")


def build_toy(checkpoint: Path, folder: Path) -> dict[Precision, Path]:
    """A bundle with the targets `cpu` and `emulated` for each precision."""
    bundles = {precision: folder / precision for precision in PRECISIONS}
    for precision, out in bundles.items():
        build_bundle(BuildRequest(out=out, checkpoint=checkpoint, targets=("cpu", "emulated"), precision=precision))
    return bundles


def stage_errors(bundle: Path, request: GenerateRequest) -> dict[str, float]:
    """The relative error of every result of every stage that a generation runs, by `stage/tensor`: its worst run's."""
    opened = open_bundle(bundle)
    cpu = next(target for target in RUNTIME_TARGETS if target.name == "cpu")
    other = choose_target(opened, target="emulated", num_threads=1)
    opener = ComparingOpener(opened, cpu, other, num_threads=1)
    with VideoPipeline(opened, opener) as pipeline:
        pipeline.generate(request)
    return {f"{error.stage}/{error.tensor}": error.greatest for error in opener.errors}


def generation_errors(bundle: Path, request: GenerateRequest) -> dict[str, Any]:
    """How far a whole generation in the narrow precision is from the float32 one: latents after each step, and frames."""
    (expected, expected_frames), (found, frames) = (_generate(bundle, request, target) for target in ("cpu", "emulated"))
    pairs = zip(found, expected, strict=True)
    return {
        "latents_after_each_step": [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs],
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


def measure() -> dict[str, Any]:
    """Stage errors of a text-to-video and an image-to-video toy, and their whole generations, in each precision."""
    from tests.toys import IMAGE_TOY, TEXT_IMAGE_TOY, TOY, make_diffusers_checkpoint

    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    still = {"image": image, "width": 64, "height": 48}
    toys: dict[str, tuple[Any, dict[str, Any]]] = {
        "t2v": (TOY, {"width": 64, "height": 48}),
        "i2v": (IMAGE_TOY, still),
        "ti2v": (TEXT_IMAGE_TOY, {**still, "width": 64, "height": 64}),
    }
    result: dict[str, Any] = {"stages": {}, "generations": {}}
    for name, (config, given) in toys.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = make_diffusers_checkpoint(Path(folder) / "checkpoint", config=config, seed=1)
            request = GenerateRequest(
                prompt="a red panda runs on snow", negative_prompt="slow dog", num_frames=9, num_steps=8, seed=42, **given
            )
            for precision, bundle in build_toy(checkpoint, Path(folder)).items():
                result["stages"].setdefault(name, {})[precision] = stage_errors(bundle, request)
                result["generations"].setdefault(name, {})[precision] = generation_errors(bundle, request)
    return result


def table(result: dict[str, Any]) -> str:
    """The stage errors as markdown: of each stage's results in all toys, the greatest."""
    lines = [f"| stage | {' | '.join(PRECISIONS)} |", "|---|---|---|---|"]
    greatest: dict[str, dict[str, float]] = {}
    for by_precision in result["stages"].values():
        for precision, errors in by_precision.items():
            for name, error in errors.items():
                row = greatest.setdefault(name.partition("/")[0], {})
                row[precision] = max(error, row.get(precision, 0.0))
    lines += [f"| {stage} | {' | '.join(f'{row[name]:.1e}' for name in PRECISIONS)} |" for stage, row in greatest.items()]
    lines += ["", f"| generation | {' | '.join(PRECISIONS)} |", "|---|---|---|---|"]
    for toy, found in result["generations"].items():
        cells = [f"{max(found[name]['latents_after_each_step']):.1e}, {found[name]['psnr_db']:.1f} dB" for name in PRECISIONS]
        lines.append(f"| {toy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.typed_errors", description="Errors of typed graphs on the CPU.")
    parser.add_argument("--out", type=Path, help="JSON file or folder (default: benchmarks/results)")
    asked = parser.parse_args(arguments)
    out, result = result_file(asked.out, "typed-errors"), measure()
    write_json(out, {"machine": machine(), "versions": versions(_PACKAGES), **result})
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
