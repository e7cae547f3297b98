"""The command line: argv → request → one call. Each command is a module of `commands`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from commands import benchmark, build_engines, inspect, run, verify
from commands.console import open_missing_streams, unwind_on_signals
from runtime.errors import CancelledError, DeviceMemoryError, RequestError, WanError
from runtime.version import VERSION

_COMMANDS = {"build-engines": build_engines, "run": run, "inspect": inspect, "verify": verify, "benchmark": benchmark}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status of the error tree (`runtime.errors`), 0 when all went well."""
    open_missing_streams()
    arguments = argparse.Namespace(on_cancel="nothing was begun", interrupted=unwind_on_signals())
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
    for name, command in _COMMANDS.items():
        command.add_options(commands.add_parser(name, parents=[common], help=command.execute.__doc__))
    return parser


if __name__ == "__main__":
    sys.exit(main())
