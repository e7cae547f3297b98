"""Whole generations on the GPU against the CPU target, from one bundle: text-to-video with two experts, an image with CLIP, the 5B's like."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.verification.verify import VerifyRequest, verify
from export.build import BuildRequest, build_bundle
from runtime.pipeline import Video, VideoPipeline
from runtime.precision import NOTHING_WIDE
from runtime.request import GenerateRequest
from runtime.specs import Precision
from tests.gpu.conftest import kernels_for_this_gpu
from tests.gpu.pace import far_ahead, one_by_one
from tests.harness import relative_error
from tests.tolerances import TOLERANCES
from tests.toys import IMAGE_TOY, TEXT_IMAGE_TOY, TOY, ToyConfig, make_diffusers_checkpoint

pytestmark = pytest.mark.gpu

REQUEST = GenerateRequest(
    prompt="a red panda runs on snow", negative_prompt="dog", width=64, height=96, num_frames=9, num_steps=4, seed=3
)
TOYS = {"t2v": TOY, "i2v": IMAGE_TOY, "ti2v": TEXT_IMAGE_TOY}


def widened(config: ToyConfig) -> ToyConfig:
    """A toy whose widths are multiples of what tensor cores take."""
    return replace(
        config, head_dim=128, ffn_dim=512, text_dim=64, text_head_dim=16, text_ffn_dim=96, clip_head_dim=16, clip_ffn_dim=64,
        vae_base_dim=16, num_res_blocks=1,
    )  # fmt: skip


@dataclass(frozen=True)
class Built:
    kind: str
    bundle: Path
    precision: Precision
    request: GenerateRequest

    def run(self, target: str, *, vram: int | None = None, **options: Any) -> tuple[Video, list[Any]]:
        """A generation, and the latents after every step."""
        steps: list[Any] = []
        with VideoPipeline.open(self.bundle, target=target, num_threads=2, vram=vram) as pipeline:
            video = pipeline.generate(replace(self.request, **options), on_step=lambda event: steps.append(event.latents))
        return video, steps


@pytest.fixture(scope="module", params=["t2v bf16", "t2v all fp8", "i2v bf16", "i2v fp8", "ti2v bf16"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    kind, *whole, precision = request.param.split()
    folder = tmp_path_factory.mktemp("built")
    make_diffusers_checkpoint(folder / "checkpoint", config=widened(TOYS[kind]), seed=1, experts=2 if kind == "t2v" else 1)
    asked = REQUEST
    if kind != "t2v":
        asked = replace(REQUEST, image=np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8))
    build_bundle(
        BuildRequest(
            out=folder / "bundle",
            checkpoint=folder / "checkpoint",
            targets=("cpu", "cuda"),
            precision=Precision(precision),
            architectures=tuple(kernels_for_this_gpu()),
            fp8_wide=NOTHING_WIDE if whole else None,
        )
    )
    yield Built(request.param, folder / "bundle", Precision(precision), asked)


def test_every_stage_is_near_its_float32_self(built: Built, record_property: Any) -> None:
    """Text encoder, image encoder, transformer and VAE stage by stage, wide blocks apart; FP8 attention's stages are in test_transformer.py."""
    verification = verify(VerifyRequest(bundle=built.bundle, target="cuda", num_threads=2))
    for verdict in verification.verdicts:
        if verdict.relative is not None:
            record_property(f"{built.kind} {verdict.where}/{verdict.tensor}", verdict.relative)
    assert not verification.parting, "\n".join(verification.lines())


def test_latents_after_every_step_are_those_of_the_cpu_target(built: Built, record_property: Any) -> None:
    (ours, our_steps), (expected, expected_steps) = built.run("cuda"), built.run("cpu")
    assert len(our_steps) == len(expected_steps) == REQUEST.num_steps
    for i, (latents, reference) in enumerate(zip(our_steps, expected_steps, strict=True)):
        error = relative_error(latents, reference)
        record_property(f"{built.precision} step {i + 1}", error)
        assert error < TOLERANCES[f"latents after a step, cuda {built.precision}"]
    difference = np.abs(ours.frames.astype(int) - expected.frames.astype(int)).mean()
    record_property(f"{built.precision} frames", float(difference))
    assert difference < TOLERANCES[f"mean frame, cuda {built.precision}, of 255"]


def test_the_same_seed_gives_the_same_bits(built: Built) -> None:
    (first, _), (again, _) = built.run("cuda"), built.run("cuda")
    np.testing.assert_array_equal(first.latents, again.latents)
    np.testing.assert_array_equal(first.frames, again.frames)


@pytest.mark.parametrize("attention", [Precision.BF16, Precision.FP8])
def test_the_bits_are_those_of_one_call_at_a_time(built: Built, attention: Precision) -> None:
    with pytest.MonkeyPatch.context() as patch:
        one_by_one(patch)
        expected, _ = built.run("cuda", attention=attention)
    with pytest.MonkeyPatch.context() as patch:
        in_line = far_ahead(patch)
        ours, _ = built.run("cuda", attention=attention)
    assert in_line[True] > in_line[False]  # a library's first call may wait for the GPU
    np.testing.assert_array_equal(ours.latents, expected.latents)
    np.testing.assert_array_equal(ours.frames, expected.frames)


def test_fp8_attention_is_an_option_of_the_request(built: Built) -> None:
    (narrow, _), (wide, _), (expected, _) = built.run("cuda", attention=Precision.FP8), built.run("cuda"), built.run("cpu")
    assert relative_error(narrow.latents, wide.latents) > 0
    assert relative_error(narrow.latents, expected.latents) < TOLERANCES["latents after a step, cuda fp8"]


def test_the_report_has_predicted_and_measured_device_memory(built: Built) -> None:
    report = built.run("cuda")[0].report
    assert report.device_memory is not None
    assert 0 < report.device_memory.peak_bytes <= report.device_memory.predicted_peak_bytes
