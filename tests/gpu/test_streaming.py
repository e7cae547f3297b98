"""The memory budget on a real GPU: streamed weights give the bits of resident ones, and what goes wrong ends cleanly."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends.cuda.copies import CopyStream
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.session import CudaSession
from runtime.errors import DeviceMemoryError
from runtime.residency import PAGE_BYTES
from runtime.specs import Precision
from tests.gpu.conftest import kernels_for_this_gpu
from tests.toy_experts import EXPERTS, ToyExperts

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyExperts:
    return ToyExperts(tmp_path_factory.mktemp("toy"))


@contextmanager
def open_session(kernels: Mapping[str, bytes] | None = None, **options: Any) -> Iterator[CudaSession]:
    backend = CudaBackend(kernels or kernels_for_this_gpu())
    session = CudaSession(backend, CopyStream(backend.device), **options)
    try:
        yield session
    finally:
        session.close()


@pytest.mark.parametrize("pages", [0, 2, 5])
@pytest.mark.parametrize("host_bytes", [1 << 40, 0], ids=["page-locked", "staged"])
def test_two_experts_within_a_budget_give_the_bits_of_resident_ones(toy: ToyExperts, pages: int, host_bytes: int) -> None:
    vram = toy.least_bytes + pages * PAGE_BYTES
    with open_session() as whole, open_session(vram=vram, available_host_bytes=lambda: host_bytes) as session:
        expected = toy.generate(whole)
        assert np.isfinite(expected).all()
        for _ in range(2):  # the second finds what the first left
            for ours, theirs in zip(toy.generate(session), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            use, whole_use = session.memory_use(), whole.memory_use()
            assert use is not None and whole_use is not None
            assert use.peak_bytes <= use.predicted_peak_bytes <= vram < whole_use.predicted_peak_bytes
            assert use.staged == (() if host_bytes else EXPERTS)


def test_a_second_generation_finds_its_weights(toy: ToyExperts) -> None:
    with open_session() as session:
        results = []
        for _ in range(2):
            results.append(toy.generate(session))
            reserved = session._device.reserved_bytes
        np.testing.assert_array_equal(results[0], results[1])
        assert session._device.reserved_bytes == reserved


_HOG = """
import sys
from runtime.backends.cuda.device import Device
with Device() as device:
    free, _ = device.memory()
    slab = device.slab(free - (700 << 20))
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_memory_that_another_process_holds_is_a_clean_error_and_comes_back(toy: ToyExperts) -> None:
    with open_session() as session:
        command = [sys.executable, "-c", _HOG]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
            assert hog.stdout is not None and hog.stdout.readline() == "holding\n"
            with pytest.raises(DeviceMemoryError) as caught:
                session.prepare(toy.needs, attention=Precision.BF16)
            assert caught.value.hint
            hog.communicate(timeout=60)
        assert np.isfinite(toy.generate(session)).all()


_LOST = """
import sys
from dataclasses import replace
import cli
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.kernels import Kernels
from runtime.specs import DType
def fail(arguments):
    with Device() as device, open(sys.argv[1], "rb") as cubin:
        kernels = Kernels(device, cubin.read())
        x = device.zeros((64, 64), DType.F32)
        kernels.convert(replace(x, pointer=1 << 44), device.empty((64, 64), DType.BF16))
        device.synchronize()
cli.inspect.execute = fail
sys.exit(cli.main(["inspect", "nowhere"]))
"""


@pytest.fixture
def cubin(tmp_path: Path) -> Path:
    """This GPU's kernels in a file named after its architecture."""
    ((architecture, content),) = kernels_for_this_gpu().items()
    (tmp_path / architecture).write_bytes(content)
    return tmp_path / architecture


def test_a_device_that_is_lost_ends_with_the_exit_code_of_its_kind(cubin: Path) -> None:
    command = [sys.executable, "-c", _LOST, str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 6, done.stderr
    assert "cuStreamSynchronize failed with 700" in done.stderr and "hint: " in done.stderr and "Traceback" not in done.stderr


_ENDLESS = """
import sys
from pathlib import Path
import cli
from runtime.memory import LIBRARY_BYTES
from runtime.specs import Precision
from tests.gpu.test_streaming import open_session
from tests.toy_experts import ToyExperts, predict
def run(arguments):
    toy, cubin = ToyExperts(Path(sys.argv[1])), Path(sys.argv[2])
    with open_session({cubin.name: cubin.read_bytes()}, vram=toy.least_bytes) as session:
        session.prepare(toy.needs, attention=Precision.BF16)
        with toy.open(session) as component:
            while True:
                predict(component)
                print("step", flush=True)
cli.inspect.execute = run
sys.exit(cli.main(["inspect", "nowhere"]))
"""


def test_a_terminated_process_ends_its_threads_while_streaming(toy: ToyExperts, cubin: Path) -> None:
    command = [sys.executable, "-c", _ENDLESS, str(toy.folder), str(cubin)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "step\n"
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.startswith("cancelled") and "Traceback" not in errors
