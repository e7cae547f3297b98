"""`wanrt verify`: two targets compared stage by stage on the same inputs."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from commands.console import print_result, say
from commands.values import video_size
from runtime.errors import WanError


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of this command."""
    command.set_defaults(command=execute)
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


def execute(arguments: argparse.Namespace) -> None:
    """`wanrt verify`: two targets compared stage by stage on the same inputs."""
    from engines.verification.verify import VerifyRequest, verify

    verification = verify(
        VerifyRequest(
            bundle=arguments.bundle,
            target=arguments.target,
            against=arguments.against,
            stages=tuple(dict.fromkeys(arguments.stage or ())),
            size=video_size(arguments.size, arguments.frames),
            seed=arguments.seed,
            num_threads=arguments.threads,
        ),
        on_component=lambda name: say(f"compared {name}", quiet=arguments.json),
    )
    print_result(json.dumps(asdict(verification)) if arguments.json else "\n".join(verification.lines()))
    if parting := verification.parting:
        raise WanError(
            f"{len(parting)} of {len(verification.verdicts)} tensors part, the first: {parting[0].where}, {parting[0].tensor}",
            hint="a stage gets what the first target's gave, so the stage itself is at fault, or its weights",
        )
