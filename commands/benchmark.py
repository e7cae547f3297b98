"""`wanrt benchmark`: this runtime and its peers on the same work."""

import argparse
import json
from pathlib import Path
from typing import Any

from commands.console import print_result, say
from commands.values import vram_bytes
from runtime.errors import RequestError, WanError


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of this command."""
    command.set_defaults(command=execute)
    command.add_argument(
        "--suite",
        default="toy",
        help="toy (on a CPU; the default), quality (of videos, on any target), or on a GPU: dit, vae, text, offload, e2e, all at full size",
    )
    command.add_argument(
        "--baseline",
        action="append",
        help="diffusers, diffusers-compile, diffsynth, onnxruntime or torch-tensorrt, as the suite has them; "
        "may be given several times on a GPU (default: diffusers for toy, else none)",
    )
    command.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    toy = command.add_argument_group("toy")
    toy.add_argument("--pairs", type=int, help="paired runs counted, after one warm-up pair (default: 5)")
    toy.add_argument("--readme", type=Path, help="README whose benchmark table to rewrite")
    quality = command.add_argument_group(
        "quality", "of bundles of the moving-shapes checkpoint, which --bundle names; --case chooses rows"
    )
    quality.add_argument("--prompts", type=int, help="how many (default: 200)")
    quality.add_argument(
        "--reference", type=Path, metavar="FILE", help="of the videos to compare with; written if it is not there, else read"
    )
    gpu = command.add_argument_group("on a GPU")
    gpu.add_argument(
        "--case", action="append", help="of the suite's cases, such as 14b-480p; may be given several times (default: all)"
    )
    gpu.add_argument(
        "--bundle", action="append", type=Path, help="may be given several times (default: built for this GPU, then removed)"
    )
    gpu.add_argument("--only-baselines", action="store_true", help="measure the peers alone")
    gpu.add_argument("--attention", action="append", choices=["bf16", "fp8"], help="with fp8 weights (default: both)")
    gpu.add_argument(
        "--budget", action="append", metavar="SIZE", help="device memory, such as 8GiB, for offload (default: a curve)"
    )
    gpu.add_argument("--seconds", type=float, help="how long to repeat a measurement (default: 8)")
    gpu.add_argument("--profile", action="store_true", help="also time the steps of one forward more, for dit")


def execute(arguments: argparse.Namespace) -> None:
    """`wanrt benchmark`: this runtime and its peers on the same work."""
    result = {"toy": _toy_benchmark, "quality": _quality_benchmark}.get(arguments.suite, _gpu_benchmark)(arguments)
    print_result(json.dumps(result, indent=1) if arguments.json else result["table"])
    if failures := result.get("failures"):
        name, reason = next(iter(failures.items()))
        raise WanError(
            f"{len(failures)} of the measurements failed, the first: {name}: {reason}",
            hint="the others are whole; what failed is under `failures` in the JSON",
        )


def _toy_benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.suite import BenchmarkRequest, run_benchmark

    _refuse_options(
        arguments, "case", "bundle", "only_baselines", "attention", "budget", "seconds", "profile", "prompts", "reference"
    )
    baselines = arguments.baseline or ["diffusers"]
    if len(baselines) > 1:
        raise RequestError(f"suite toy takes one baseline, not {', '.join(baselines)}", hint="measure them one after the other")
    pairs = 5 if arguments.pairs is None else arguments.pairs
    return run_benchmark(
        BenchmarkRequest(suite="toy", baseline=baselines[0], pairs=pairs, out=arguments.out, readme=arguments.readme),
        on_line=say,
    )


def _quality_benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.moving_shapes.cases import PROMPTS, QualityRequest
    from benchmarks.moving_shapes.quality import run_quality

    _refuse_options(arguments, "baseline", "only_baselines", "attention", "budget", "seconds", "profile", "pairs", "readme")
    request = QualityRequest(
        bundles=tuple(arguments.bundle or ()),
        prompts=PROMPTS if arguments.prompts is None else arguments.prompts,
        cases=tuple(arguments.case or ()),
        reference=arguments.reference,
        out=arguments.out,
    )
    return run_quality(request, on_line=say)


def _gpu_benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.gpu_run import run_gpu_benchmark
    from benchmarks.gpu_suites import GpuRequest
    from runtime.specs import Precision

    _refuse_options(arguments, "pairs", "readme", "prompts", "reference")
    return run_gpu_benchmark(
        GpuRequest(
            suite=arguments.suite,
            cases=tuple(arguments.case or ()),
            baselines=tuple(dict.fromkeys(arguments.baseline or ())),
            bundles=tuple(arguments.bundle or ()),
            only_baselines=arguments.only_baselines,
            attention=tuple(Precision(name) for name in dict.fromkeys(arguments.attention or ())),
            budgets_gib=tuple((vram_bytes(budget) or 0) / 2**30 for budget in arguments.budget or ()),
            seconds=arguments.seconds,
            profile=arguments.profile,
            out=arguments.out,
        ),
        on_line=say,
    )


def _refuse_options(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) not in (None, False):
            option = name.replace("_", "-")
            raise RequestError(f"--{option}: suite {arguments.suite} has no such option", hint="see `wanrt benchmark --help`")
