"""Engines of `rtx` and `tensorrt` on a GPU that runs them: every stage against the float32 one, and whole generations.

No machine of this project could run these tests yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.verification.verify import VerifyRequest, verify
from export.build import BuildRequest, build_bundle
from runtime.backends import RUNTIME_TARGETS
from runtime.backends.cuda.device import find_architecture
from runtime.bundle import open_bundle
from runtime.errors import EngineError
from runtime.geometry import SizeRange, VideoSize
from runtime.opening import cache_folder
from runtime.pipeline import Video, VideoPipeline
from runtime.precision import NOTHING_WIDE
from runtime.request import GenerateRequest
from runtime.specs import Precision
from tests.gpu.test_pipeline import TOYS, widened
from tests.harness import relative_error
from tests.tolerances import TOLERANCES
from tests.toys import make_diffusers_checkpoint

pytestmark = pytest.mark.gpu

SIZES = SizeRange(smallest=VideoSize(width=32, height=32, num_frames=1), largest=VideoSize(width=96, height=96, num_frames=17))
REQUEST = GenerateRequest(
    prompt="a red panda runs on snow", negative_prompt="dog", width=64, height=96, num_frames=9, num_steps=4, seed=3
)


@dataclass(frozen=True)
class Built:
    bundle: Path
    target: str
    precision: Precision
    request: GenerateRequest

    def run(self, target: str, *, vram: int | None = None, **options: Any) -> tuple[Video, list[Any], list[Any]]:
        """A generation, the latents after every step, and what was planned for memory."""
        steps: list[Any] = []
        plans: list[Any] = []
        with VideoPipeline.open(self.bundle, target=target, num_threads=2, vram=vram) as pipeline:
            video = pipeline.generate(
                replace(self.request, **options), on_step=lambda event: steps.append(event.latents), on_memory=plans.append
            )
        return video, steps, plans


@pytest.fixture(scope="module", params=["rtx", "tensorrt"])
def target(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    runtime_target = next(target for target in RUNTIME_TARGETS if target.name == name)
    if obstacle := runtime_target.obstacle():
        pytest.skip(obstacle)
    return name


@pytest.fixture(scope="module", params=["t2v bf16", "t2v fp16", "t2v all fp8", "i2v bf16", "ti2v bf16"])
def built(request: pytest.FixtureRequest, target: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    kind, *whole, precision = request.param.split()
    folder = tmp_path_factory.mktemp("built")
    make_diffusers_checkpoint(folder / "checkpoint", config=widened(TOYS[kind]), seed=1)
    asked = REQUEST
    if kind != "t2v":
        asked = replace(REQUEST, image=np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8))
    build_bundle(
        BuildRequest(
            out=folder / "bundle",
            checkpoint=folder / "checkpoint",
            targets=("cpu", target),
            precision=Precision(precision),
            architectures=(find_architecture(),),
            sizes=SIZES,
            fp8_wide=NOTHING_WIDE if whole else None,
        )
    )
    yield Built(folder / "bundle", target, Precision(precision), asked)


def test_every_stage_is_near_its_float32_self(built: Built, record_property: Any) -> None:
    verification = verify(VerifyRequest(bundle=built.bundle, target=built.target, num_threads=2))
    for verdict in verification.verdicts:
        record_property(f"{built.target} {built.precision} {verdict.where}/{verdict.tensor}", verdict.relative)
    assert not verification.parting, "\n".join(verification.lines())


def test_latents_after_every_step_are_those_of_the_cpu_target(built: Built, record_property: Any) -> None:
    (_, our_steps, _), (_, expected_steps, _) = built.run(built.target), built.run("cpu")
    assert len(our_steps) == len(expected_steps) == REQUEST.num_steps
    for i, (latents, reference) in enumerate(zip(our_steps, expected_steps, strict=True)):
        error = relative_error(latents, reference)
        record_property(f"{built.target} {built.precision} step {i + 1}", error)
        assert error < TOLERANCES[f"latents after a step, typed {built.precision}"]


def test_the_same_seed_gives_the_same_bits_with_the_least_memory(built: Built) -> None:
    first, _, (whole,) = built.run(built.target)
    budget = whole.fixed_bytes + max(component.need.least_bytes for component in whole.components)
    least, _, (plan,) = built.run(built.target, vram=budget)
    assert plan.peak_bytes <= budget
    np.testing.assert_array_equal(first.latents, least.latents)
    np.testing.assert_array_equal(first.frames, least.frames)


def test_no_more_memory_is_taken_than_was_predicted(built: Built) -> None:
    use = built.run(built.target)[0].report.device_memory
    assert use is not None and 0 < use.peak_bytes <= use.predicted_peak_bytes


def test_fp8_attention_is_an_option_of_the_request(built: Built) -> None:
    if built.precision is Precision.FP16 or int(find_architecture().removeprefix("sm_")) < 89:
        pytest.skip("FP8 attention is for bf16 tensors, on sm_89 and later")
    (narrow, _, _), (wide, _, _) = built.run(built.target, attention=Precision.FP8), built.run(built.target)
    assert 0 < relative_error(narrow.latents, wide.latents) < TOLERANCES["latents after a step, typed fp8"]


def test_what_was_compiled_is_kept_beside_the_bundle(built: Built) -> None:
    if built.target != "rtx":
        pytest.skip("TensorRT's engines are machine code already")
    built.run(built.target)
    (kept,) = cache_folder(built.bundle).iterdir()
    before = kept.stat().st_mtime_ns
    built.run(built.target)
    assert kept.stat().st_mtime_ns == before, "compiled again"


def test_a_damaged_engine_is_refused_before_weights_are_read(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.backends.cuda.session import CudaSession

    bundle = open_bundle(built.bundle)
    file = bundle.file(bundle.manifest.targets[built.target].engines["transformer.head"])
    whole = file.read_bytes()
    monkeypatch.setattr("runtime.opening.check_hash", lambda *_: None)
    monkeypatch.setattr(CudaSession, "weights", lambda *_, **__: pytest.fail("weights were opened"))
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    try:
        with pytest.raises(EngineError):
            built.run(built.target)
    finally:
        file.write_bytes(whole)
