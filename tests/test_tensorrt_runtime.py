"""The runtime half of `rtx` on a double of its library and a GPU of bytes: whole generations, refusals, and what is kept between them."""

import hashlib
import inspect
import logging
import re
from dataclasses import replace
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends import RUNTIME_TARGETS
from runtime.backends.tensorrt.cache import RuntimeCache
from runtime.backends.tensorrt.library import OpenLibrary
from runtime.bundle import open_bundle
from runtime.errors import DeviceMemoryError, EngineError
from runtime.geometry import Float32
from runtime.inspection import TargetInspection, inspect_bundle
from runtime.memory import MemoryPlan
from runtime.needs import generation_needs
from runtime.opening import Opener, cache_folder
from runtime.pipeline import VideoPipeline
from runtime.request import GenerateRequest
from runtime.resolving import resolve_request
from runtime.specs import Precision
from tests import fake_tensorrt
from tests.fake_gpu import ComputingGpu
from tests.fake_machine import Machine
from tests.tolerances import TOLERANCES

RTX_TARGET = next(target for target in RUNTIME_TARGETS if target.name == "rtx")
REQUEST = GenerateRequest(
    prompt="a red panda runs on snow", negative_prompt="slow dog", width=32, height=32, num_frames=5, num_steps=2, seed=4
)


def generate(
    bundle: Path, target: str, *, vram: int | None = None, attention: Precision | None = None
) -> tuple[Float32, Any, MemoryPlan | None]:
    plans: list[MemoryPlan] = []
    with VideoPipeline.open(bundle, target=target, num_threads=1, vram=vram) as pipeline:
        video = pipeline.generate(replace(REQUEST, attention=attention), on_memory=plans.append)
        if video.report.device_memory is not None:
            assert video.report.device_memory.peak_bytes <= video.report.device_memory.predicted_peak_bytes
    return video.latents, video.frames, plans[0] if plans else None


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16, Precision.FP8])
def test_a_generation_gives_the_bits_that_its_engines_give_elsewhere(
    typed_toy: dict[Precision, Path], rtx_machine: Machine, precision: Precision
) -> None:
    expected_latents, expected_frames, _ = generate(typed_toy[precision], "emulated")
    latents, frames, _ = generate(typed_toy[precision], "rtx")
    np.testing.assert_array_equal(latents, expected_latents)
    np.testing.assert_array_equal(frames, expected_frames)
    assert rtx_machine.gpu.closed


def test_nothing_waits_for_the_device_inside_a_step(rtx_bundle: Path, rtx_machine: Machine) -> None:
    generate(rtx_bundle, "rtx")
    steps = " ".join(rtx_machine.gpu.events).split("transformer.embed")[1:]
    assert len(steps) == REQUEST.num_steps  # both predictions of a step go through the blocks between two of them
    for step in steps:
        queued, _, after = step.partition("wait")
        assert queued.split()[-1] == "transformer.head" and "transformer" not in after


def test_fp8_attention_takes_its_own_engine_of_the_stage(typed_toy: dict[Precision, Path], rtx_machine: Machine) -> None:
    wide, _, _ = generate(typed_toy[Precision.FP8], "rtx")
    rtx_machine.plug(ComputingGpu())
    narrow, _, _ = generate(typed_toy[Precision.FP8], "rtx", attention=Precision.FP8)
    error = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
    assert 0 < error < TOLERANCES["latents after a step, typed fp8"]


def test_fp8_attention_is_refused_where_the_gpu_has_none(typed_toy: dict[Precision, Path], rtx_machine: Machine) -> None:
    rtx_machine.plug(ComputingGpu(arch="sm_86"))
    with pytest.raises(EngineError, match="no FP8 attention for sm_86"):
        generate(typed_toy[Precision.BF16], "rtx", attention=Precision.FP8)
    assert not rtx_machine.gpu.copied, "before a weight is read"


def test_streamed_weights_give_the_same_bits_within_the_budget(rtx_bundle: Path, rtx_machine: Machine) -> None:
    latents, _, whole = generate(rtx_bundle, "rtx")
    assert whole is not None
    rtx_machine.plug(ComputingGpu(seed=5))
    budget = whole.fixed_bytes + max(component.need.least_bytes for component in whole.components)
    streamed, _, plan = generate(rtx_bundle, "rtx", vram=budget)
    assert plan is not None
    transformer = plan.find("transformer")
    assert len(transformer.residency.resident) < len(transformer.need.units)
    np.testing.assert_array_equal(streamed, latents)
    assert rtx_machine.gpu.peak_bytes <= budget


def test_scratch_memory_is_planned_for_the_shapes_at_hand(rtx_bundle: Path, rtx_machine: Machine) -> None:
    _, _, exact = generate(rtx_bundle, "rtx")
    opened = open_bundle(rtx_bundle)
    opener = Opener(opened, RTX_TARGET, reason="", num_threads=1)
    job = resolve_request(REQUEST, opened.manifest, sizes=None, attention=opener.attention)
    assert RTX_TARGET.rehearse is not None
    unseen = generation_needs(opener, job, RTX_TARGET.rehearse)  # as on a machine without a GPU
    assert exact is not None
    planned = [component.need.work_bytes for component in exact.components]
    assert all(here <= bound.work_bytes for here, bound in zip(planned, unseen, strict=True))
    assert sum(planned) < sum(bound.work_bytes for bound in unseen)


def test_a_second_generation_loads_no_engine_again(
    rtx_bundle: Path, rtx_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = OpenLibrary.load

    def note(library: OpenLibrary, data: memoryview, stage: str) -> Any:
        loaded.append(stage)
        return load(library, data, stage)

    monkeypatch.setattr(OpenLibrary, "load", note)
    with VideoPipeline.open(rtx_bundle, target="rtx", num_threads=1) as pipeline:
        first, again = (pipeline.generate(REQUEST) for _ in range(2))
    assert len(loaded) == len(set(loaded)), "rehearsed and run with the same ones"
    np.testing.assert_array_equal(first.latents, again.latents)


def test_a_budget_below_the_scratch_memory_is_refused_before_weights_are_read(rtx_bundle: Path, rtx_machine: Machine) -> None:
    with pytest.raises(DeviceMemoryError):
        generate(rtx_bundle, "rtx", vram=1 << 20)
    assert not rtx_machine.gpu.copied


def test_what_was_compiled_is_kept_beside_the_bundle_for_this_gpu_and_driver(rtx_bundle: Path, rtx_machine: Machine) -> None:
    generate(rtx_bundle, "rtx")
    (kept,) = cache_folder(rtx_bundle).iterdir()
    assert kept.name == f"tensorrt-rtx_{fake_tensorrt.VERSION}_Fake-RTX_sm-89_driver-13010.bin"
    assert kept.stat().st_mode & 0o777 == 0o600
    before = kept.stat().st_mtime_ns
    generate(rtx_bundle, "rtx")
    assert kept.stat().st_mtime_ns == before, "nothing new was compiled"


@pytest.mark.parametrize("state", ["damaged", "of another version", "writable by others"])
def test_a_cache_that_cannot_be_trusted_is_not_read(state: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, kept = tmp_path / "cache.bin", fake_tensorrt.IRuntimeConfig()
    first = RuntimeCache(file)
    first.attach(kept)
    assert kept.cache is not None
    kept.cache.entries.add("kernel")
    first.save()
    data = file.read_bytes()
    if state == "damaged":
        file.write_bytes(data[:-1])
    elif state == "of another version":
        file.write_bytes(hashlib.sha256(b"another").digest() + b"another")
    else:
        file.chmod(0o666)
    cache, config = RuntimeCache(file), fake_tensorrt.IRuntimeConfig()
    with caplog.at_level(logging.INFO):
        cache.attach(config)
    assert config.cache is not None and not config.cache.entries
    assert {"damaged": "damaged", "of another version": "made anew", "writable by others": "others"}[state] in caplog.text


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    cache, config = RuntimeCache(tmp_path / "file" / "cache.bin"), fake_tensorrt.IRuntimeConfig()
    cache.attach(config)
    assert config.cache is not None
    config.cache.entries.add("kernel")
    cache.save()
    assert "is not kept" in caplog.text


def test_inspect_says_that_these_engines_never_ran_here_and_what_memory_they_take(
    rtx_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> TargetInspection:
        return next(target for target in inspect_bundle(rtx_bundle).targets if target.name == "rtx")

    assert found().obstacle is not None and "never run" in found().note
    assert found().architectures == ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
    assert found().memory == "size 832x480x81: these engines take 16x16x1..64x64x9"
    monkeypatch.setattr("runtime.inspection.GenerateRequest", lambda **given: replace(REQUEST, **given))
    assert re.match(r"32x32x5 runs in [\d.]+ .iB or more", str(found().memory))


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize("double", fake_tensorrt.DOUBLES, ids=lambda double: str(double.__name__))
def test_the_double_has_nothing_that_the_library_has_not(double: Any) -> None:
    import tensorrt_rtx

    real = getattr(tensorrt_rtx, double.__name__)
    own = {name: value for name, value in vars(double).items() if not name.startswith("_") and name not in _PRIVATE}
    for name, value in own.items():
        assert hasattr(real, name), f"{double.__name__}.{name}"
        if inspect.isfunction(value):
            documented = re.findall(rf"^(?:\d+\. )?{name}\((.*?)\) ->", getattr(real, name).__doc__ or "", re.MULTILINE)
            names = [re.findall(r"(?:^|, )(\w+): ", arguments) for arguments in documented]
            assert list(inspect.signature(value).parameters) in names, f"{double.__name__}.{name}: {names}"
    if issubclass(double, IntEnum):
        assert {kind.name: kind.value for kind in double} == {name: int(kind.value) for name, kind in real.__members__.items()}


_PRIVATE = {"library"}
"""What only tests touch."""
