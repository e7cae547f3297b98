"""`wanrt inspect`: what a bundle holds, and whether this machine can run it."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from commands.console import print_result, say
from commands.values import vram_bytes


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of this command."""
    command.set_defaults(command=execute)
    command.add_argument("bundle", type=Path)
    command.add_argument("--verify", action="store_true", help="read every file and check its hash")
    command.add_argument("--vram", metavar="SIZE", help="device memory to plan the default generation for, such as 12GiB")


def execute(arguments: argparse.Namespace) -> None:
    """`wanrt inspect`: what a bundle holds, and whether this machine can run it."""
    from runtime.inspection import inspect_bundle, verify_bundle

    inspection = inspect_bundle(arguments.bundle, vram=vram_bytes(arguments.vram))
    if arguments.verify:
        verify_bundle(arguments.bundle, on_file=lambda path: say(f"verified {path}", quiet=arguments.json))
    if arguments.json:
        print_result(json.dumps({**asdict(inspection), "verified": arguments.verify}))
        return
    print_result("\n".join([*inspection.lines(), *(["hashes      all match"] if arguments.verify else [])]))
