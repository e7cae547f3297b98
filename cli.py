"""The command line: argv → request → one call. The only place that prints; results go to stdout, words to stderr."""

import argparse
import io
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TextIO

from runtime.errors import CancelledError, DeviceMemoryError, RequestError, WanError
from runtime.version import VERSION

SIZES_HELP = "WIDTHxHEIGHT, or a range WIDTHxHEIGHT..WIDTHxHEIGHT"
SIZES_DEFAULT = "any; rtx, tensorrt: 480x480..1280x720, either way up"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status of the error tree (`runtime.errors`), 0 when all went well."""
    _open_missing_streams()
    arguments = argparse.Namespace(on_cancel="nothing was begun", interrupted=_unwind_on_signals())
    try:
        _parser().parse_args(argv, arguments)
        logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
        return int(arguments.command(arguments) or 0)
    except (KeyboardInterrupt, CancelledError):
        print(f"cancelled; {arguments.on_cancel}", file=sys.stderr)
        return CancelledError.exit_code
    except WanError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except MemoryError as error:
        print(f"error: not enough memory: {error}", file=sys.stderr)
        print("hint: lower --size or --frames, or decode with --tile", file=sys.stderr)
        return DeviceMemoryError.exit_code


def build_engines(arguments: argparse.Namespace) -> None:
    """`wanrt build-engines`: a checkpoint becomes a bundle."""
    from export.build import BuildEvent, BuildRequest, build_bundle
    from runtime.memory import scratch_text
    from runtime.specs import Precision

    checkpoint = _checkpoint(arguments)

    def show(event: BuildEvent) -> None:
        if arguments.interrupted():
            raise KeyboardInterrupt
        quiet = arguments.json or event.reused
        _say(f"[{event.done}/{event.total}] {event.artefact}  {_size(event.bytes)}  {event.seconds:.1f} s", quiet=quiet)

    summary = build_bundle(
        BuildRequest(
            out=arguments.out,
            checkpoint=checkpoint,
            variant=arguments.variant,
            targets=tuple(dict.fromkeys(arguments.target or ["cpu"])),
            precision=Precision(arguments.precision) if arguments.precision else None,
            sizes=_size_range(arguments.size, arguments.frames),
            architectures=tuple(dict.fromkeys(arguments.arch or ())),
            fp8_wide=_wide_parts(arguments.wide),
        ),
        on_event=show,
    )
    if arguments.json:
        _result(json.dumps({**asdict(summary), "bundle": str(summary.bundle)}))
        return
    if summary.unchanged:
        _say("nothing to do: the bundle already is exactly this")
    peak = f", peak memory {_size(summary.peak_memory_bytes)}" if summary.peak_memory_bytes else ""
    _say(
        f"{summary.variant}: engines {_size(summary.engine_bytes)}, weights {_size(summary.weight_bytes)}, "
        f"{summary.num_built} built, {summary.num_reused} kept, {summary.seconds:.1f} s{peak}"
    )
    for target, stages in summary.scratch_bytes.items():
        _say(f"{target}: scratch memory for its largest shapes {scratch_text(stages)}")
    _result(str(summary.bundle))


def run(arguments: argparse.Namespace) -> None:
    """`wanrt run`: a bundle and a prompt become a video."""
    from runtime.pipeline import VideoPipeline
    from runtime.run import RunRequest, run_to_file

    progress = _StepBar(sys.stderr, quiet=arguments.json)
    request = RunRequest(generate=_generate_request(arguments), out=arguments.out, save_latents=arguments.save_latents)

    def show_memory(plan: Any) -> None:
        _say(f"device memory: {plan}", quiet=arguments.json)

    with VideoPipeline.open(
        arguments.bundle, target=arguments.target, num_threads=arguments.threads, vram=_vram(arguments.vram)
    ) as pipeline:
        _say(f"target {pipeline.target}: {pipeline.target_reason}", quiet=arguments.json)
        outcome = run_to_file(pipeline, request, on_step=progress.step, on_memory=show_memory, cancelled=arguments.interrupted)
    if arguments.json:
        _result(json.dumps({"out": str(outcome.out), "report": asdict(outcome.report)}))
        return
    seconds = ", ".join(f"{name} {spent:.1f} s" for name, spent in outcome.report.stage_seconds.items())
    _say(f"seed {outcome.report.request['seed']}; {seconds}")
    if outcome.report.device_memory is not None:
        _say(f"device memory: {outcome.report.device_memory}")
    _result(str(outcome.out))


def inspect(arguments: argparse.Namespace) -> None:
    """`wanrt inspect`: what a bundle holds, and whether this machine can run it."""
    from runtime.inspection import inspect_bundle, verify_bundle

    inspection = inspect_bundle(arguments.bundle, vram=_vram(arguments.vram))
    if arguments.verify:
        verify_bundle(arguments.bundle, on_file=lambda path: _say(f"verified {path}", quiet=arguments.json))
    if arguments.json:
        _result(json.dumps({**asdict(inspection), "verified": arguments.verify}))
        return
    _result("\n".join([*inspection.lines(), *(["hashes      all match"] if arguments.verify else [])]))


def verify(arguments: argparse.Namespace) -> None:
    """`wanrt verify`: two targets compared stage by stage on the same inputs."""
    from engines.verification.verify import VerifyRequest, verify

    verification = verify(
        VerifyRequest(
            bundle=arguments.bundle,
            target=arguments.target,
            against=arguments.against,
            stages=tuple(dict.fromkeys(arguments.stage or ())),
            size=_video_size(arguments),
            seed=arguments.seed,
            num_threads=arguments.threads,
        ),
        on_component=lambda name: _say(f"compared {name}", quiet=arguments.json),
    )
    _result(json.dumps(asdict(verification)) if arguments.json else "\n".join(verification.lines()))
    if parting := verification.parting:
        raise WanError(
            f"{len(parting)} of {len(verification.verdicts)} tensors part, the first: {parting[0].where}, {parting[0].tensor}",
            hint="a stage gets what the first target's gave, so the stage itself is at fault, or its weights",
        )


def benchmark(arguments: argparse.Namespace) -> None:
    """`wanrt benchmark`: this runtime and its peers on the same work."""
    result = {"toy": _toy_benchmark, "quality": _quality_benchmark}.get(arguments.suite, _gpu_benchmark)(arguments)
    _result(json.dumps(result, indent=1) if arguments.json else result["table"])
    if failures := result.get("failures"):
        name, reason = next(iter(failures.items()))
        raise WanError(
            f"{len(failures)} of the measurements failed, the first: {name}: {reason}",
            hint="the others are whole; what failed is under `failures` in the JSON",
        )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the options as everything else does: an error, then a hint."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(message, hint=f"see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="wanrt", description="Wan 2.1/2.2 video diffusion without PyTorch at run time.")
    parser.add_argument("--version", action="version", version=f"wanrt {VERSION}")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    common.set_defaults(on_cancel="nothing half-written was left")
    common.add_argument("--verbose", action="store_true", help="log what happens")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_build_engines(commands.add_parser("build-engines", parents=[common], help=build_engines.__doc__))
    _add_run(commands.add_parser("run", parents=[common], help=run.__doc__))
    command = commands.add_parser("inspect", parents=[common], help=inspect.__doc__)
    command.set_defaults(command=inspect)
    command.add_argument("bundle", type=Path)
    command.add_argument("--verify", action="store_true", help="read every file and check its hash")
    command.add_argument("--vram", metavar="SIZE", help="device memory to plan the default generation for, such as 12GiB")
    _add_verify(commands.add_parser("verify", parents=[common], help=verify.__doc__))
    _add_benchmark(commands.add_parser("benchmark", parents=[common], help=benchmark.__doc__))
    return parser


def _add_build_engines(command: argparse.ArgumentParser) -> None:
    command.set_defaults(
        command=build_engines, on_cancel="what is finished was kept, and the same command continues from there"
    )
    command.add_argument(
        "checkpoint", nargs="?", help="checkpoint folder in either layout, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B"
    )
    command.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    command.add_argument("--variant", help="detected from the checkpoint when left out")
    command.add_argument("--target", action="append", metavar="TARGET", help="may be given several times (default: cpu)")
    command.add_argument("--precision", choices=["fp32", "fp16", "bf16", "fp8"], help="the target's default when left out")
    command.add_argument(
        "--wide",
        action="append",
        metavar="PART",
        help="what stays bf16 in fp8: first:N or last:N blocks, or a product such as self_attn.qkv in all; may be given several times",
    )
    command.add_argument(
        "--arch", action="append", metavar="ARCH", help="GPU architecture such as sm_90; may be given several times"
    )
    command.add_argument("--size", metavar="SIZES", help=f"sizes to build for: {SIZES_HELP} (default: {SIZES_DEFAULT})")
    command.add_argument(
        "--frames", metavar="FRAMES", help="frames to build for: N, or a range N..M (default: any; rtx, tensorrt: 1..121)"
    )
    command.add_argument("--engines-only", action="store_true", help="build without a checkpoint; needs --variant")
    command.add_argument(
        "--hub", choices=["huggingface", "modelscope"], default="huggingface", help="where a hub id is downloaded from"
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=run)
    command.add_argument("bundle", type=Path)
    command.add_argument("--prompt", help="may be left out with --image")
    command.add_argument("--negative-prompt", help='the reference\'s default when left out; "" for an empty one')
    command.add_argument("--image", type=Path, help="first frame, a JPEG, PNG or WebP file, for models that take one")
    command.add_argument("--last-image", type=Path, help="last frame, for models that take one")
    command.add_argument("--video", type=Path, help="video to begin with instead of noise, for text-to-video models")
    command.add_argument("--strength", type=float, help="with --video, how much of it is made anew: up to 1 (default: 0.8)")
    command.add_argument(
        "--size", metavar="WIDTHxHEIGHT", help="default: the model's; with --image, of the image's aspect and the same area"
    )
    command.add_argument("--frames", type=int, help="default: the model's; with --video, those of the video, down to 4n+1")
    command.add_argument("--steps", type=int)
    command.add_argument("--shift", type=float)
    command.add_argument(
        "--guidance", metavar="SCALE[,SCALE]", help="one scale, or one per expert, the high-noise expert's first"
    )
    command.add_argument("--scheduler", choices=["unipc", "dpmpp", "euler"])
    command.add_argument("--seed", type=int)
    command.add_argument(
        "--out", type=Path, default=Path("video.mp4"), help="video.mp4, .gif, .npy or a folder of PNG (default: video.mp4)"
    )
    command.add_argument("--latents", type=Path, help="initial noise from a .npy file, float32 [z, T, h, w]")
    command.add_argument("--save-latents", type=Path, help="write the denoised latents to a .npy file")
    command.add_argument(
        "--tile", nargs="?", const="256/192", metavar="TILE[/STRIDE]", help="decode in tiles of this many pixels (256/192)"
    )
    command.add_argument(
        "--conventions",
        choices=["original", "diffusers"],
        help="whose behaviour to follow where the peers differ (default: the checkpoint's layout)",
    )
    command.add_argument("--target", help="the best one that runs here when left out")
    command.add_argument(
        "--vram",
        metavar="SIZE",
        help="device memory to use, such as 12GiB (default: what is free, less 1 GiB); blocks beyond it stream",
    )
    command.add_argument("--attention", choices=["bf16", "fp8"], help="precision of self-attention (default: the target's)")
    command.add_argument("--threads", type=int, default=0, help="CPU threads; 0 lets the library choose")


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=verify)
    command.add_argument("bundle", type=Path)
    command.add_argument("--target", help="what to verify (default: the best that runs here)")
    command.add_argument(
        "--against",
        metavar="BUNDLE|TARGET",
        help="what to compare with: another target of the bundle, or a bundle of the same checkpoint (default: cpu)",
    )
    command.add_argument("--stage", action="append", help="a stage or a network; may be given several times (default: all)")
    command.add_argument("--size", metavar="WIDTHxHEIGHT", help="of the video (default: as small as the engines take)")
    command.add_argument("--frames", type=int, help="with --size (default: 5)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--threads", type=int, default=0, help="CPU threads; 0 lets the library choose")


def _add_benchmark(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=benchmark)
    command.add_argument(
        "--suite",
        default="toy",
        help="toy (on a CPU; the default), quality (of videos, on any target), or on a GPU: dit, vae, text, offload, e2e, all at full size",
    )
    command.add_argument(
        "--baseline",
        action="append",
        help="diffusers, diffusers-compile, diffsynth or onnxruntime, as the suite has them; may be given several times on a GPU "
        "(default: diffusers for toy, else none)",
    )
    command.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/)")
    toy = command.add_argument_group("toy")
    toy.add_argument("--pairs", type=int, help="paired runs counted, after one warm-up pair (default: 5)")
    toy.add_argument("--readme", type=Path, help="README whose benchmark table to rewrite")
    quality = command.add_argument_group(
        "quality", "of bundles of the moving-shapes checkpoint, which --bundle names; --case chooses rows"
    )
    quality.add_argument("--prompts", type=int, help="how many (default: 200)")
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


def _toy_benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.suite import BenchmarkRequest, run_benchmark

    _refuse_options(arguments, "case", "bundle", "only_baselines", "attention", "budget", "seconds", "profile", "prompts")
    baselines = arguments.baseline or ["diffusers"]
    if len(baselines) > 1:
        raise RequestError(f"suite toy takes one baseline, not {', '.join(baselines)}", hint="measure them one after the other")
    pairs = 5 if arguments.pairs is None else arguments.pairs
    return run_benchmark(
        BenchmarkRequest(suite="toy", baseline=baselines[0], pairs=pairs, out=arguments.out, readme=arguments.readme),
        on_line=_say,
    )


def _quality_benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.moving_shapes.quality import PROMPTS, QualityRequest, run_quality

    _refuse_options(arguments, "baseline", "only_baselines", "attention", "budget", "seconds", "profile", "pairs", "readme")
    request = QualityRequest(
        bundles=tuple(arguments.bundle or ()),
        prompts=PROMPTS if arguments.prompts is None else arguments.prompts,
        cases=tuple(arguments.case or ()),
        out=arguments.out,
    )
    return run_quality(request, on_line=_say)


def _gpu_benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.gpu_run import run_gpu_benchmark
    from benchmarks.gpu_suites import GpuRequest
    from runtime.specs import Precision

    _refuse_options(arguments, "pairs", "readme", "prompts")
    return run_gpu_benchmark(
        GpuRequest(
            suite=arguments.suite,
            cases=tuple(arguments.case or ()),
            baselines=tuple(dict.fromkeys(arguments.baseline or ())),
            bundles=tuple(arguments.bundle or ()),
            only_baselines=arguments.only_baselines,
            attention=tuple(Precision(name) for name in dict.fromkeys(arguments.attention or ())),
            budgets_gib=tuple((_vram(budget) or 0) / 2**30 for budget in arguments.budget or ()),
            seconds=arguments.seconds,
            profile=arguments.profile,
            out=arguments.out,
        ),
        on_line=_say,
    )


def _refuse_options(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) not in (None, False):
            option = name.replace("_", "-")
            raise RequestError(f"--{option}: suite {arguments.suite} has no such option", hint="see `wanrt benchmark --help`")


def _generate_request(arguments: argparse.Namespace) -> Any:
    from runtime.clips import load_video
    from runtime.images import load_image
    from runtime.request import GenerateRequest
    from runtime.run import load_latents
    from runtime.schedulers import Conventions, SchedulerName
    from runtime.specs import Precision

    if arguments.prompt is None and arguments.image is None:
        raise RequestError("no prompt given", hint="give one with --prompt; only with --image it may be left out")
    width, height = _width_height(arguments.size) if arguments.size is not None else (None, None)
    return GenerateRequest(
        prompt=arguments.prompt or "",
        negative_prompt=arguments.negative_prompt,
        width=width,
        height=height,
        num_frames=arguments.frames,
        num_steps=arguments.steps,
        shift=arguments.shift,
        guidance=_guidance(arguments.guidance),
        scheduler=SchedulerName(arguments.scheduler) if arguments.scheduler else None,
        seed=arguments.seed,
        image=load_image(arguments.image) if arguments.image else None,
        last_image=load_image(arguments.last_image) if arguments.last_image else None,
        video=load_video(arguments.video, num_frames=arguments.frames) if arguments.video else None,
        strength=arguments.strength,
        latents=load_latents(arguments.latents) if arguments.latents else None,
        conventions=Conventions(arguments.conventions) if arguments.conventions else None,
        tile=_tile(arguments.tile),
        attention=Precision(arguments.attention) if arguments.attention else None,
    )


def _vram(text: str | None) -> int | None:
    from runtime.memory import parse_bytes

    return None if text is None else parse_bytes(text)


def _tile(text: str | None) -> Any:
    """`--tile` as a TileSpec; tiles overlap by a quarter when no distance is given."""
    from runtime.tiling import TileSpec

    if text is None:
        return None
    size, *distance = _integers(text, "/", "--tile", (1, 2))
    return TileSpec.square(size, distance[0] if distance else size * 3 // 4)


def _checkpoint(arguments: argparse.Namespace) -> Path | None:
    if arguments.engines_only:
        if arguments.checkpoint is not None:
            raise RequestError("--engines-only takes no checkpoint", hint="leave one of the two out")
        return None
    if arguments.checkpoint is None:
        raise RequestError("no checkpoint given", hint="name its folder or hub id, or build with --engines-only --variant NAME")
    from export.download import DownloadEvent, Hub, resolve_checkpoint

    shown = [0.0]

    def show(event: DownloadEvent) -> None:
        if time.monotonic() - shown[0] > 1:
            shown[0] = time.monotonic()
            _say(f"downloaded {_size(event.done_bytes)} of {_size(event.total_bytes)}", quiet=arguments.json)

    found: Path = resolve_checkpoint(arguments.checkpoint, hub=Hub(arguments.hub), on_progress=show)
    return found


def _size_range(size: str | None, frames: str | None) -> Any:
    """`--size` and `--frames` of build-engines as a SizeRange; None when both are left out: any size."""
    from runtime.geometry import MAX_FRAMES, MAX_SIDE, SizeRange, VideoSize

    if size is None and frames is None:
        return None
    smallest, largest = _ends(f"16x16..{MAX_SIDE}x{MAX_SIDE}" if size is None else size)
    fewest, most = _ends(f"1..{MAX_FRAMES}" if frames is None else frames)
    low, high = _width_height(smallest), _width_height(largest)
    few, many = _integer(fewest, "--frames"), _integer(most, "--frames")
    if low[0] > high[0] or low[1] > high[1] or few > many:
        raise RequestError(f"{size or frames}: the range is empty", hint="give the smaller end first")
    return SizeRange(
        smallest=VideoSize(width=low[0], height=low[1], num_frames=few),
        largest=VideoSize(width=high[0], height=high[1], num_frames=many),
    )


def _wide_parts(parts: list[str] | None) -> Any:
    """`--wide` as WideParts: `first:N`, `last:N` and names of products."""
    from runtime.precision import FP8_WIDE, WideParts

    if parts is None:
        return FP8_WIDE
    ends = {"first": 0, "last": 0}
    products: dict[str, None] = {}
    for part in parts:
        end, colon, count = part.partition(":")
        if not colon:
            products[part] = None
        elif end in ends:
            ends[end] = _integer(count, "--wide")
        else:
            raise RequestError(f"--wide {part}: blocks are counted from first or last", hint="for example --wide first:1")
    return WideParts(first_blocks=ends["first"], last_blocks=ends["last"], products=tuple(products))


def _video_size(arguments: argparse.Namespace) -> Any:
    """`--size` and `--frames` of verify as a VideoSize; None when both are left out."""
    from runtime.geometry import VideoSize

    if arguments.size is None and arguments.frames is not None:
        raise RequestError("--frames: needs --size", hint="for example --size 128x128 --frames 5")
    if arguments.size is None:
        return None
    width, height = _width_height(arguments.size)
    return VideoSize(width=width, height=height, num_frames=5 if arguments.frames is None else arguments.frames)


def _ends(text: str) -> tuple[str, str]:
    first, dots, last = text.partition("..")
    return first, last if dots else first


def _width_height(text: str) -> tuple[int, int]:
    width, height = _integers(text, "x", "--size", (2,))
    return width, height


def _integers(text: str, separator: str, option: str, counts: tuple[int, ...]) -> list[int]:
    parts = text.lower().split(separator)
    if len(parts) not in counts:
        raise RequestError(
            f"{option} {text}: expected numbers with {separator!r} between them", hint="for example 832x480 or 256/192"
        )
    return [_integer(part, option) for part in parts]


def _integer(text: str, option: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise RequestError(f"{option}: {text!r} is not a whole number", hint="for example 832x480, 81 or 256/192")
    return int(text)


def _guidance(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as exc:
        raise RequestError(f"--guidance {text}: not numbers", hint="for example 5.0, or 4.0,3.0 for two experts") from exc


def _result(text: str) -> None:
    """Print what was asked for to stdout, at once: a pipe that closed or a disk that is full shows here."""
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are not UTF-8
    try:
        print(text, flush=True)
    except OSError as exc:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it once more on leaving
        raise RequestError(
            f"standard output cannot be written: {exc.strerror}", hint="the work itself is done; keep the other end open"
        ) from exc


def _say(text: str, *, quiet: bool = False) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.2f} GiB"


def _open_missing_streams() -> None:
    """Give a process started without stdin, stdout or stderr an empty one: files opened later must not take their numbers."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _unwind_on_signals() -> Callable[[], bool]:
    """Let SIGINT and SIGTERM unwind the command as KeyboardInterrupt, so that half-written files are removed.

    Returns:
        Whether one came: a library that calls Python code may drop the exception, about once in 170 interrupted runs. A signal that
        the parent process ignores, as a shell does for its background jobs, stays ignored.
    """
    came = threading.Event()

    def interrupt(signum: int, frame: object) -> None:
        came.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    return came.is_set


class _StepBar:
    """Draws the denoising progress: a bar that redraws itself on a terminal, one line a step elsewhere."""

    def __init__(self, stream: TextIO, *, quiet: bool) -> None:
        self._stream, self._quiet = stream, quiet
        self._redraw = stream.isatty()
        self._seconds: list[float] = []

    def step(self, event: Any) -> None:
        """Show one more finished step (a `StepEvent`)."""
        if self._quiet:
            return
        self._seconds.append(event.seconds)
        left = (event.num_steps - event.step) * sum(self._seconds) / len(self._seconds)
        filled = 24 * event.step // event.num_steps
        line = f"step {event.step}/{event.num_steps} [{'#' * filled}{'.' * (24 - filled)}] {event.seconds:.2f} s, {_clock(left)} left"
        end = "\n" if not self._redraw or event.step == event.num_steps else ""
        print(f"\r{line:<78}" if self._redraw else line, end=end, file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
