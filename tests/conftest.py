"""What is costly to make, made once a session: toy checkpoints with their bundles. And the command line as a user meets it."""

import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

import cli
from export.build import BuildRequest, build_bundle

RUN = ("--prompt", "a cat runs", "--size", "16x16", "--frames", "1", "--steps", "2", "--seed", "1", "--threads", "1")
"""The smallest run of a toy with two experts."""


@dataclass(frozen=True)
class Toy:
    """A toy's checkpoint in both layouts, and a bundle built from each."""

    folder: Path
    original_checkpoint: Path
    diffusers: Path
    original: Path

    def oracle(self) -> Any:
        """diffusers' own pipeline over the same weights, of the class that the folder names."""
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def make_toy(folder: Path, *, engines_of: Toy | None = None, **options: Any) -> Toy:
    """Write a toy's checkpoints and build their bundles.

    Args:
        engines_of: a toy whose engines are kept where they fit.
        options: those of `make_diffusers_checkpoint`.
    """
    from tests.toys import (
        make_diffusers_checkpoint,
        make_original_checkpoint,
    )  # diffusers is not there on every machine with a GPU

    make_diffusers_checkpoint(folder / "diffusers", **options)
    for name in ("scheduler", "flow_shift", "boundary_ratio"):  # the original layout has no place for them
        options.pop(name, None)
    make_original_checkpoint(folder / "original", **options)
    if engines_of is not None:
        shutil.copytree(engines_of.diffusers, folder / "diffusers-bundle")
    build_bundle(BuildRequest(out=folder / "diffusers-bundle", checkpoint=folder / "diffusers"))
    shutil.copytree(folder / "diffusers-bundle", folder / "original-bundle")  # same architecture: its engines are kept
    build_bundle(BuildRequest(out=folder / "original-bundle", checkpoint=folder / "original"))
    return Toy(folder / "diffusers", folder / "original", folder / "diffusers-bundle", folder / "original-bundle")


@pytest.fixture(scope="session")
def one_expert(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    from tests.toys import TOY

    return make_toy(tmp_path_factory.mktemp("one"), config=TOY, seed=1, scheduler="unipc", flow_shift=3.0)


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    from tests.toys import NARROW_TOY

    return make_toy(tmp_path_factory.mktemp("two"), config=NARROW_TOY, seed=2, experts=2, scheduler="unipc", flow_shift=5.0)


class Refuses(Protocol):
    """Runs the command line and checks that it refuses as it should."""

    def __call__(self, *arguments: str | Path, code: int, message: str) -> str: ...


class Wanrt(Protocol):
    """Runs the command line, which must succeed; gives what it said on stdout and stderr."""

    def __call__(self, *arguments: str | Path) -> tuple[str, str]: ...


@pytest.fixture
def command_line(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`cli.main` with its status, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse leaves so
            status = int(exit.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refuses(command_line: Callable[..., tuple[int, str, str]]) -> Refuses:
    def check(*arguments: str | Path, code: int, message: str) -> str:
        status, out, err = command_line(*arguments)
        assert status == code, err
        assert out == ""
        assert "Traceback" not in err
        assert re.search(rf"^error: .*{message}", err, re.MULTILINE), err
        assert re.search(r"^hint: \S", err, re.MULTILINE), err
        return err

    return check


@pytest.fixture
def wanrt(command_line: Callable[..., tuple[int, str, str]]) -> Wanrt:
    def check(*arguments: str | Path) -> tuple[str, str]:
        status, out, err = command_line(*arguments)
        assert status == 0, err
        return out, err

    return check
