"""What is costly to make, made once a session: toy checkpoints with their bundles. And the command line as a user meets it."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pytest

import cli
from export.build import BuildRequest, build_bundle
from runtime.geometry import SizeRange, VideoSize
from runtime.precision import NOTHING_WIDE
from runtime.specs import Precision, StageSpec
from runtime.variants import Variant

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

    with traced_once():
        return make_toy(tmp_path_factory.mktemp("one"), config=TOY, seed=1, scheduler="unipc", flow_shift=3.0)


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    from tests.toys import NARROW_TOY

    return make_toy(tmp_path_factory.mktemp("two"), config=NARROW_TOY, seed=2, experts=2, scheduler="unipc", flow_shift=5.0)


@pytest.fixture(scope="session")
def typed_toy(one_expert: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    """A toy's bundle in each narrow precision, in fp8 every block: the targets `cpu`, `emulated` and `rtx`, this with a double's engines."""
    from tests.fake_machine import building

    folder = tmp_path_factory.mktemp("typed")
    sizes = SizeRange(
        smallest=VideoSize(width=16, height=16, num_frames=1), largest=VideoSize(width=64, height=64, num_frames=9)
    )
    bundles = {precision: folder / precision for precision in (Precision.BF16, Precision.FP16, Precision.FP8)}
    with traced_once(), building():
        for precision, out in bundles.items():
            request = BuildRequest(
                out=out, checkpoint=one_expert.folder, precision=precision, sizes=sizes, fp8_wide=NOTHING_WIDE
            )
            build_bundle(replace(request, targets=("cpu", "emulated", "rtx")))
    return bundles


@pytest.fixture
def rtx_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `tests.fake_machine.Machine`."""
    from tests.fake_machine import Machine

    return Machine(monkeypatch)


@pytest.fixture
def rtx_bundle(typed_toy: dict[Precision, Path], tmp_path: Path) -> Path:
    """The bf16 toy of `typed_toy` with a place of its own for a cache beside it."""
    return Path(shutil.copytree(typed_toy[Precision.BF16], tmp_path / "bundle", copy_function=os.link))


@contextmanager
def traced_once() -> Iterator[None]:
    """Every stage of the same numbers is traced once a session."""
    import export.graphs
    from runtime.stages import network_arch

    trace = export.graphs.stage_graph

    def kept(variant: Variant, stage: StageSpec) -> Any:
        key = network_arch(variant, stage.network), stage
        if key not in _GRAPHS:
            _GRAPHS[key] = trace(variant, stage)
        return _GRAPHS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.graphs, "stage_graph", kept)
        yield


_GRAPHS: dict[Any, Any] = {}


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
