"""The command line on a GPU that fails, is shared, or whose process is killed: whole files or none, and the next run works."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from export.build import BuildRequest, build_bundle
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.test_pipeline import widened
from tests.toys import TOY, make_diffusers_checkpoint

pytestmark = pytest.mark.gpu

LONGER = ("--size", "64x96", "--frames", "17", "--steps", "6", "--seed", "3", "--prompt", "a red panda", "--target", "cuda")

# Runs the command line after its second argument; at a moment a kernel reads where nothing is, after which the device is lost.
_LOST = """
import sys
from dataclasses import replace
import cli
from commands.console import StepBar
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.libraries import Libraries
from runtime.specs import DType
from runtime.video import VideoWriter
opened = []
class Kept(Libraries):
    def __init__(self, device, kernels):
        super().__init__(device, kernels)
        opened.append((device, self.kernels))
import runtime.backends.cuda.engine as engine
engine.Libraries = Kept
def breaking(method, calls):
    left = [calls]
    def called(*arguments):
        left[0] -= 1
        if not left[0]:
            device, kernels = opened[-1]
            x = device.zeros((64, 64), DType.F32)
            kernels.convert(replace(x, pointer=1 << 44), device.empty((64, 64), DType.BF16))
        return method(*arguments)
    return called
if sys.argv[1] == "denoising":
    StepBar.step = breaking(StepBar.step, 3)
else:
    VideoWriter.write = breaking(VideoWriter.write, 2)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    make_diffusers_checkpoint(folder / "checkpoint", config=widened(TOY), seed=1)
    request = BuildRequest(
        out=folder / "bundle",
        checkpoint=folder / "checkpoint",
        targets=("cuda",),
        architectures=tuple(kernels_for_this_gpu()),
    )
    build_bundle(request)
    return folder / "bundle"


def start(*arguments: str | Path, before: Sequence[str] = ("-m", "cli")) -> subprocess.Popen[str]:
    command = [sys.executable, *before, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def succeed(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("moment", ["denoising", "decoding"])
def test_a_device_that_is_lost_on_the_way_leaves_nothing_half_written(bundle: Path, tmp_path: Path, moment: str) -> None:
    out, latents = tmp_path / "out" / "v.npy", tmp_path / "out" / "latents.npy"
    out.parent.mkdir()
    run = ("run", bundle, *LONGER, "--out", out, "--save-latents", latents)
    process = start(*run, before=("-c", _LOST, moment))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 6, errors
    assert "failed with 700" in errors and "hint: " in errors and "Traceback" not in errors
    assert [path.name for path in out.parent.iterdir()] == (["latents.npy"] if moment == "decoding" else [])


def test_a_killed_run_takes_nothing_with_it(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.npy"
    out.write_text("precious")
    process = start("run", bundle, *LONGER, "--out", out)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("step 2/"):
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert out.read_text() == "precious"
    succeed(start("run", bundle, *LONGER, "--out", out))
    assert np.load(out).shape == (17, 96, 64, 3)


def test_two_runs_at_once_give_what_each_gives_alone(bundle: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name / "v.npy" for name in ("alone", "first", "second")]
    for out in outs:
        out.parent.mkdir()
    alone, *both = [("run", bundle, *LONGER, "--vram", "2GiB", "--out", out) for out in outs]
    succeed(start(*alone))
    for process in [start(*arguments) for arguments in both]:
        succeed(process)
    expected, *found = map(np.load, outs)
    for frames in found:
        np.testing.assert_array_equal(frames, expected)
