"""`wanrt build-engines`: a checkpoint becomes a bundle."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from commands.console import print_result, say, size_text
from commands.values import size_range, wide_parts
from runtime.errors import RequestError

SIZES_HELP = "WIDTHxHEIGHT, or a range WIDTHxHEIGHT..WIDTHxHEIGHT"
SIZES_DEFAULT = "any; rtx, tensorrt: 480x480..1280x720, either way up"


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of this command."""
    command.set_defaults(command=execute, on_cancel="what is finished was kept, and the same command continues from there")
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
        help="what stays bf16 in fp8: first:N or last:N blocks, or a product such as self_attn.qkv in all; may be given several times "
        "and then replaces the default, first:1 if there are several blocks; none: all is fp8",
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


def execute(arguments: argparse.Namespace) -> None:
    """`wanrt build-engines`: a checkpoint becomes a bundle."""
    from export.build import BuildEvent, BuildRequest, build_bundle
    from runtime.memory import scratch_text
    from runtime.specs import Precision

    checkpoint = _checkpoint(arguments)

    def show(event: BuildEvent) -> None:
        if arguments.interrupted():
            raise KeyboardInterrupt
        quiet = arguments.json or event.reused
        say(f"[{event.done}/{event.total}] {event.artefact}  {size_text(event.bytes)}  {event.seconds:.1f} s", quiet=quiet)

    summary = build_bundle(
        BuildRequest(
            out=arguments.out,
            checkpoint=checkpoint,
            variant=arguments.variant,
            targets=tuple(dict.fromkeys(arguments.target or ["cpu"])),
            precision=Precision(arguments.precision) if arguments.precision else None,
            sizes=size_range(arguments.size, arguments.frames),
            architectures=tuple(dict.fromkeys(arguments.arch or ())),
            fp8_wide=wide_parts(arguments.wide),
        ),
        on_event=show,
    )
    if arguments.json:
        print_result(json.dumps({**asdict(summary), "bundle": str(summary.bundle)}))
        return
    if summary.unchanged:
        say("nothing to do: the bundle already is exactly this")
    peak = f", peak memory {size_text(summary.peak_memory_bytes)}" if summary.peak_memory_bytes else ""
    say(
        f"{summary.variant}: engines {size_text(summary.engine_bytes)}, weights {size_text(summary.weight_bytes)}, "
        f"{summary.num_built} built, {summary.num_reused} kept, {summary.seconds:.1f} s{peak}"
    )
    for target, stages in summary.scratch_bytes.items():
        say(f"{target}: scratch memory for its largest shapes {scratch_text(stages)}")
    print_result(str(summary.bundle))


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
            say(f"downloaded {size_text(event.done_bytes)} of {size_text(event.total_bytes)}", quiet=arguments.json)

    found: Path = resolve_checkpoint(arguments.checkpoint, hub=Hub(arguments.hub), on_progress=show)
    return found
