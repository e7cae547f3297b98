"""Trains the small Wan of the moving shapes: the two halves of the VAE, then text encoder and transformer together.

    python -m benchmarks.moving_shapes.train --out DIR [--size mini] [--resume] [--vae-minutes 4] [--dit-minutes 14]

In DIR afterwards: `checkpoint/` in Wan2.1's own layout, `training.json` with settings, loss curves and accuracy, `samples.png`, and
`state/`, which `--resume` continues from, also after SIGTERM or Ctrl-C, which end a step first. Without `--…-minutes` stages end by steps.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.moving_shapes.codes import block_codes
from benchmarks.moving_shapes.dit_stage import train_dit
from benchmarks.moving_shapes.loop import StageLength, StageLog, StopTraining, stop_when_told
from benchmarks.moving_shapes.model import SIZES, Networks, new_networks, read_checkpoint, write_checkpoint
from benchmarks.moving_shapes.recipe import RECIPES
from benchmarks.moving_shapes.render import draw, scene_arrays, to_uint8
from benchmarks.moving_shapes.sampler import judge, write_sheet
from benchmarks.moving_shapes.score import accuracy
from benchmarks.moving_shapes.similarity import compare
from benchmarks.moving_shapes.vae_stage import VaeHalf, train_half
from benchmarks.moving_shapes.world import ClipSize, sample_scene

_HALVES: tuple[VaeHalf, ...] = ("encoder", "decoder")
_STAGES = (*_HALVES, "dit")
_VAE_STEPS, _DIT_STEPS = 6000, 60_000
_ENCODER_SHARE = 0.25  # of the decoder's steps and minutes: codes are linear


def main(cancelled: Callable[[], bool] = lambda: False) -> None:
    """Command line of this module."""
    asked = _parse()
    try:
        _train(asked, cancelled)
    except StopTraining as stopped:
        sys.exit(f"train: {stopped}")


def _train(asked: argparse.Namespace, cancelled: Callable[[], bool]) -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    if asked.threads:
        torch.set_num_threads(asked.threads)
    networks, recipe = new_networks(SIZES[asked.size], seed=asked.seed), RECIPES[asked.recipe]
    for network in (networks.text_encoder, networks.transformer, networks.vae):
        network.to(asked.device)
    if asked.start_from:
        read_checkpoint(asked.start_from, networks)
    if asked.compile:
        for block in (*networks.text_encoder.blocks, *networks.transformer.blocks):
            block.compile()
    report: dict[str, Any] = {"settings": _settings(asked), "machine": _machine(asked.device), "stages": {}}
    clip = ClipSize(width=64, height=64, num_frames=17)
    common = {
        "seed": asked.seed,
        "workers": asked.workers,
        "resume": asked.resume,
        "scale": asked.scale,
        "graphs": not asked.no_graphs,
        "cancelled": cancelled,
    }
    for half in _HALVES:
        if half in asked.stages:
            length = _length(asked.vae_steps, asked.vae_minutes, _VAE_STEPS, share=_ENCODER_SHARE if half == "encoder" else 1)
            state_file = asked.out / "state" / f"{half}.pt"
            log = train_half(networks.vae, half, recipe.vae, length=length, state_file=state_file, **common)
            report["stages"][half] = {**_curve(log), **_vae_quality(networks, half, clip, count=min(32, asked.judged))}
            _say(half, log, report["stages"][half])
    kinds = recipe.dit.kinds

    def look(log: StageLog) -> None:
        with torch.compiler.set_stance("force_eager"):  # its sizes are others
            captions, clips, scores = judge(networks, clip, count=asked.judged, num_steps=asked.sample_steps, kinds=kinds)
        write_sheet(asked.out / "samples.png", captions, clips, scores)
        write_checkpoint(asked.out / "checkpoint", networks)
        report["accuracy"] = {"step": log.step, "clips": asked.judged, **accuracy(scores)}
        _say("dit", log, report["accuracy"])
        (asked.out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    log = StageLog()
    if "dit" in asked.stages:
        length = _length(asked.dit_steps, asked.dit_minutes, _DIT_STEPS)
        state_file = asked.out / "state" / "dit.pt"
        log = train_dit(
            networks,
            recipe.dit,
            length=length,
            state_file=state_file,
            every_seconds=asked.look_every,
            on_look=look,
            **common,
        )
        report["stages"]["dit"] = _curve(log)
    look(log)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moving_shapes.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from DIR/state; change lengths only in their first half",
    )
    parser.add_argument("--start-from", type=Path, metavar="CHECKPOINT", help="begin with the weights of such a folder")
    parser.add_argument(
        "--stages",
        type=lambda text: tuple(text.split(",")),
        default=_STAGES,
        help=f"of {', '.join(_STAGES)}",
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument(
        "--recipe", choices=list(RECIPES), help="of another size, such as that for CPU cores (default: the size's)"
    )
    parser.add_argument("--vae-steps", type=_count, help=f"of the decoder ({_VAE_STEPS:,}); the encoder has a quarter")
    parser.add_argument("--dit-steps", type=_count, help=f"({_DIT_STEPS:,})")
    parser.add_argument("--vae-minutes", type=_minutes, help="end the decoder by then, the encoder by a quarter of it")
    parser.add_argument("--dit-minutes", type=_minutes, help="end by then")
    parser.add_argument("--scale", type=float, default=1.0, help="of the batches")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel by itself instead of CUDA graphs")
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks of text encoder and transformer with torch.compile"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that make scenes")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU; 0: one a core")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--judged", type=int, default=128, help="clips that are sampled and scored")
    parser.add_argument("--sample-steps", type=int, default=25)
    parser.add_argument("--look-every", type=float, default=90.0, metavar="SECONDS", help="sample and score so often")
    asked = parser.parse_args()
    asked.recipe = asked.recipe or asked.size
    if unknown := set(asked.stages) - set(_STAGES):
        parser.error(f"--stages {unknown.pop()}: there is {', '.join(_STAGES)}")
    if asked.start_from is None and not set(_HALVES) <= set(asked.stages):
        parser.error("without both halves of the VAE in --stages, --start-from has to bring them")
    for stage in asked.stages:
        if not asked.resume and (state := asked.out / "state" / f"{stage}.pt").exists():
            parser.error(f"{state} is of an earlier training: go on with it by --resume, or name another --out")
    asked.out.mkdir(parents=True, exist_ok=True)
    return asked


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: need 1 or more")
    return number


def _minutes(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text}: need more than 0")
    return number


def _length(steps: int | None, minutes: float | None, usual: int, *, share: float = 1) -> StageLength:
    """What was asked for, or the usual number of steps if nothing was."""
    if steps is None and minutes is None:
        steps = usual
    return StageLength(
        steps=math.inf if steps is None else max(1, round(share * steps)),
        minutes=math.inf if minutes is None else share * minutes,
    )


@torch.no_grad()
def _vae_quality(networks: Networks, half: VaeHalf, clip: ClipSize, *, count: int) -> dict[str, float]:
    """What the decoder makes of fresh clips' codes, and the encoder's error on such clips, relative to the codes."""
    frames = draw(scene_arrays([sample_scene(seed, clip) for seed in range(count)]), clip)
    given = torch.from_numpy(frames).to(networks.vae.mean.device)
    codes = block_codes(given)
    if half == "encoder":
        return {"relative_error": float((networks.vae.encode(given) - codes).norm() / codes.norm())}
    pairs = zip(to_uint8(networks.vae.decode(codes).float().cpu().numpy()), to_uint8(frames), strict=True)
    found = [compare(ours, true) for ours, true in pairs]
    return {"psnr_db": sum(each.psnr_db for each in found) / count, "ssim": sum(each.ssim for each in found) / count}


def _curve(log: StageLog) -> dict[str, Any]:
    return {"steps": log.step, "seconds": log.seconds, "loss": log.losses[:: max(1, len(log.losses) // 200)]}


def _settings(asked: argparse.Namespace) -> dict[str, Any]:
    told = {name: value for name, value in vars(asked).items() if name not in ("out", "start_from")}
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in told.items()}


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "at": time.strftime("%Y-%m-%d", time.gmtime())}


def _say(stage: str, log: StageLog, facts: dict[str, Any]) -> None:
    numbers = " ".join(f"{name} {value:.3f}" for name, value in facts.items() if isinstance(value, float) and name != "seconds")
    loss = f"{log.losses[-1][2]:.4f}" if log.losses else "-"
    print(f"{stage}: step {log.step}, {log.seconds:.0f} s, loss {loss}; {numbers}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(stop_when_told())
