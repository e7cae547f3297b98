"""`wanrt run`: a bundle and a prompt become a video."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from commands.console import StepBar, print_result, say
from commands.values import guidance_scales, tile_spec, vram_bytes, width_height
from runtime.errors import RequestError


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of this command."""
    command.set_defaults(command=execute)
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


def execute(arguments: argparse.Namespace) -> None:
    """`wanrt run`: a bundle and a prompt become a video."""
    from runtime.pipeline import VideoPipeline
    from runtime.run import RunRequest, run_to_file

    progress = StepBar(sys.stderr, quiet=arguments.json)
    request = RunRequest(generate=_generate_request(arguments), out=arguments.out, save_latents=arguments.save_latents)

    def show_memory(plan: Any) -> None:
        say(f"device memory: {plan}", quiet=arguments.json)

    with VideoPipeline.open(
        arguments.bundle, target=arguments.target, num_threads=arguments.threads, vram=vram_bytes(arguments.vram)
    ) as pipeline:
        say(f"target {pipeline.target}: {pipeline.target_reason}", quiet=arguments.json)
        outcome = run_to_file(pipeline, request, on_step=progress.step, on_memory=show_memory, cancelled=arguments.interrupted)
    if arguments.json:
        print_result(json.dumps({"out": str(outcome.out), "report": asdict(outcome.report)}))
        return
    seconds = ", ".join(f"{name} {spent:.1f} s" for name, spent in outcome.report.stage_seconds.items())
    say(f"seed {outcome.report.request['seed']}; {seconds}")
    if outcome.report.device_memory is not None:
        say(f"device memory: {outcome.report.device_memory}")
    print_result(str(outcome.out))


def _generate_request(arguments: argparse.Namespace) -> Any:
    from runtime.clips import load_video
    from runtime.images import load_image
    from runtime.request import GenerateRequest
    from runtime.run import load_latents
    from runtime.schedulers import Conventions, SchedulerName
    from runtime.specs import Precision

    if arguments.prompt is None and arguments.image is None:
        raise RequestError("no prompt given", hint="give one with --prompt; only with --image it may be left out")
    width, height = width_height(arguments.size) if arguments.size is not None else (None, None)
    return GenerateRequest(
        prompt=arguments.prompt or "",
        negative_prompt=arguments.negative_prompt,
        width=width,
        height=height,
        num_frames=arguments.frames,
        num_steps=arguments.steps,
        shift=arguments.shift,
        guidance=guidance_scales(arguments.guidance),
        scheduler=SchedulerName(arguments.scheduler) if arguments.scheduler else None,
        seed=arguments.seed,
        image=load_image(arguments.image) if arguments.image else None,
        last_image=load_image(arguments.last_image) if arguments.last_image else None,
        video=load_video(arguments.video, num_frames=arguments.frames) if arguments.video else None,
        strength=arguments.strength,
        latents=load_latents(arguments.latents) if arguments.latents else None,
        conventions=Conventions(arguments.conventions) if arguments.conventions else None,
        tile=tile_spec(arguments.tile),
        attention=Precision(arguments.attention) if arguments.attention else None,
    )
