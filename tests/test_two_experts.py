"""Two experts at work within a budget, but for the computing: real drivers, plans, allocations and transfers on a fake GPU."""

from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

from runtime.backends import RUNTIME_TARGETS
from runtime.backends.cuda import engine
from runtime.backends.cuda.copies import CopyStream
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.rehearsal import _RehearsedBackend
from runtime.backends.cuda.session import CudaSession
from runtime.memory import LIBRARY_BYTES
from runtime.residency import PAGE_BYTES
from runtime.specs import Precision
from tests.fake_gpu import FakeGpu
from tests.toy_experts import ToyExperts, predict


class SilentBackend(_RehearsedBackend):
    """Drivers, plans and allocations are real; nothing is computed."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        super().__init__({})

    def _open_device(self) -> Device:
        self.counted = cast(Any, self._gpu)
        return cast(Device, self._gpu)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ToyExperts:
    return ToyExperts(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("pages", [0, 1, 4, 1000])
def test_two_experts_at_work_take_what_was_predicted_and_no_more(experts: ToyExperts, pages: int) -> None:
    gpu, vram = FakeGpu(), experts.least_bytes + pages * PAGE_BYTES
    session = CudaSession(SilentBackend(gpu), cast(CopyStream, gpu), vram=vram, available_host_bytes=lambda: 1 << 40)
    with closing(session):
        for _ in range(2):
            experts.generate(session)
            gpu.finish()
            assert not gpu.used_bytes
            use_of_memory = session.memory_use()
            assert use_of_memory is not None
            libraries = LIBRARY_BYTES - PAGE_BYTES  # the fake has none; small arrays may be a page of their own
            assert use_of_memory.peak_bytes + libraries <= use_of_memory.predicted_peak_bytes <= vram


def test_a_plan_is_read_once_for_all_rehearsals_and_generations(experts: ToyExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def noted(path: Path, stage_name: str) -> Any:
        read.append(path)
        return read_plan(path, stage_name)

    read_plan = engine._read_plan
    monkeypatch.setattr(engine, "_read_plan", noted)
    gpu, (rehearse,) = FakeGpu(), (target.rehearse for target in RUNTIME_TARGETS if target.name == "cuda")
    assert rehearse is not None
    session = CudaSession(SilentBackend(gpu), cast(CopyStream, gpu), available_host_bytes=lambda: 1 << 40)
    with closing(session):
        for _ in range(2):
            rehearse(experts.stages, experts.engines, predict, Precision.BF16, session)
            experts.generate(session)
            gpu.finish()
    assert sorted(read) == sorted(experts.engines.values())
