"""The memory budget on a real GPU: streamed weights give the bits of resident ones, and what goes wrong ends cleanly."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.targets.cuda.lower import lower_stage
from export.graphs import stage_graph
from export.pack import pack_plan, write_weights
from runtime.backends.cuda.copies import CopyStream
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.rehearsal import rehearse
from runtime.backends.cuda.session import CudaSession
from runtime.component import Component
from runtime.errors import DeviceMemoryError
from runtime.memory import LIBRARY_BYTES, Need
from runtime.precision import in_precision
from runtime.residency import PAGE_BYTES, weight_units
from runtime.schedulers import Conventions
from runtime.specs import Precision, StageSpec
from runtime.stages.transformer import transformer_stages
from runtime.strict_json import encode
from runtime.transformer import Transformer
from runtime.variants import VARIANTS, TransformerArch
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.test_transformer import random_weights
from tests.harness import DictSource

pytestmark = pytest.mark.gpu

ARCH = TransformerArch(dim=256, ffn_dim=1024, num_heads=2, num_layers=5, text_dim=64)
LATENTS = (16, 5, 64, 64)  # 5,120 tokens: large enough arrays for a layout of their own


class Toy:
    """A toy transformer's plans and weights, written into a folder or found there, and what a prediction needs of the device."""

    def __init__(self, folder: Path) -> None:
        variant = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=ARCH)
        fp32 = transformer_stages(ARCH)
        self.stages: tuple[StageSpec, ...] = tuple(in_precision(stage, Precision.BF16) for stage in fp32)
        self.engines = {stage.name: folder / f"{stage.name}.plan.json" for stage in self.stages}
        self.folder, self.file = folder, folder / "weights.safetensors"
        if not self.file.exists():
            for wide, stage in zip(fp32, self.stages, strict=True):
                self.engines[stage.name].write_text(encode(lower_stage(stage_graph(variant, wide), stage)))
            plan = pack_plan(self.stages, num_blocks=ARCH.num_layers)
            write_weights(DictSource(random_weights(ARCH, seed=3)), plan, self.file)
        layout = rehearse(self.stages, self.engines, _predict, attention=Precision.BF16)
        units = weight_units(self.stages, num_blocks=ARCH.num_layers)
        self.need = Need(network="transformer", component="transformer", units=units, layout=layout)

    @property
    def least_bytes(self) -> int:
        return LIBRARY_BYTES + self.need.least_bytes

    @contextmanager
    def open(self, session: CudaSession) -> Iterator[Component]:
        with (
            session.backend("transformer") as backend,
            session.weights("transformer", self.file, self.stages, num_blocks=ARCH.num_layers) as weights,
            Component(backend, self.stages, self.engines, weights) as component,
        ):
            yield component


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@contextmanager
def open_session(kernels: Mapping[str, bytes] | None = None, **options: Any) -> Iterator[CudaSession]:
    backend = CudaBackend(kernels or kernels_for_this_gpu())
    session = CudaSession(backend, CopyStream(backend.device), **options)
    try:
        yield session
    finally:
        session.close()


def _predict(component: Component, steps: int = 2) -> list[Any]:
    latents = np.random.default_rng(0).standard_normal(LATENTS, np.float32)
    transformer = Transformer(component, ARCH, LATENTS, conventions=Conventions.ORIGINAL)
    prompts = [transformer.encode_text(np.full((length, ARCH.text_dim), 0.5, np.float32)) for length in (3, 9)]
    return [prediction for _ in range(steps) for prediction in transformer.predict(latents, 731, prompts)]


def predict(toy: Toy, **options: Any) -> tuple[list[Any], CudaSession]:
    with open_session(**options) as session:
        session.prepare([toy.need], attention=Precision.BF16)
        with toy.open(session) as component:
            return _predict(component, steps=4), session


@pytest.mark.parametrize("pages", [0, 2, 5])
@pytest.mark.parametrize("host_bytes", [1 << 40, 0], ids=["page-locked", "staged"])
def test_streamed_weights_give_the_bits_of_resident_ones(toy: Toy, pages: int, host_bytes: int) -> None:
    expected, whole = predict(toy)
    vram = toy.least_bytes + pages * PAGE_BYTES
    given, session = predict(toy, vram=vram, available_host_bytes=lambda: host_bytes)
    assert np.isfinite(expected).all()
    for ours, theirs in zip(given, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    use, whole_use = session.memory_use(), whole.memory_use()
    assert use is not None and whole_use is not None
    assert use.peak_bytes <= use.predicted_peak_bytes <= vram < whole_use.predicted_peak_bytes
    assert use.staged == (() if host_bytes else ("transformer",))


def test_a_second_generation_finds_its_weights(toy: Toy) -> None:
    with open_session() as session:
        results = []
        for _ in range(2):
            session.prepare([toy.need], attention=Precision.BF16)
            with toy.open(session) as component:
                results.append(_predict(component))
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


def test_memory_that_another_process_holds_is_a_clean_error_and_comes_back(toy: Toy) -> None:
    with open_session() as session:
        command = [sys.executable, "-c", _HOG]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
            assert hog.stdout is not None and hog.stdout.readline() == "holding\n"
            with pytest.raises(DeviceMemoryError) as caught:
                session.prepare([toy.need], attention=Precision.BF16)
            assert caught.value.hint
            hog.communicate(timeout=60)
        session.prepare([toy.need], attention=Precision.BF16)
        with toy.open(session) as component:
            assert np.isfinite(_predict(component)).all()


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
cli.inspect = fail
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
from tests.gpu.test_streaming import Toy, _predict, open_session
def run(arguments):
    toy, cubin = Toy(Path(sys.argv[1])), Path(sys.argv[2])
    with open_session({cubin.name: cubin.read_bytes()}, vram=toy.least_bytes) as session:
        session.prepare([toy.need], attention=Precision.BF16)
        with toy.open(session) as component:
            while True:
                _predict(component)
                print("step", flush=True)
cli.inspect = run
sys.exit(cli.main(["inspect", "nowhere"]))
"""


def test_a_terminated_process_ends_its_threads_while_streaming(toy: Toy, cubin: Path) -> None:
    command = [sys.executable, "-c", _ENDLESS, str(toy.folder), str(cubin)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "step\n"
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.startswith("cancelled") and "Traceback" not in errors
