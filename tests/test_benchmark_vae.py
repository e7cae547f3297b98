"""What the VAE suite measures, on a toy without a GPU: every frame, in whichever way."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import vae
from export.layouts import vae_diffusers_names
from runtime.stages.vae import vae_encoder_stages, vae_stages
from runtime.vae import most_decoder_strips, most_encoder_strips, normalise, to_uint8
from runtime.variants import VARIANTS, VaeArch
from tests.harness import relative_error
from tests.toys import make_vae, original_tensors
from tests.vaes import CONFIGS, EagerVae, random_frames, random_latents


@pytest.fixture(params=list(vae.NETWORKS))
def work(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(work: str) -> tuple[VaeArch, Any, Any]:
    """A toy whose latents have a scale of their own, its network, and three latent frames' worth of data."""
    config = CONFIGS["no time"]
    arch = replace(config.vae, latents_mean=(1.0,) * config.vae.z_dim, latents_std=(2.0,) * config.vae.z_dim)
    tensors = original_tensors(make_vae(config, seed=1), vae_diffusers_names(arch))
    if work == "decode":
        return arch, EagerVae(arch, vae_stages(arch), tensors), random_latents(arch, 3, (2, 9)).numpy()
    return arch, EagerVae(arch, vae_encoder_stages(arch), tensors), random_frames(arch, 3, (2, 9)).numpy()


def test_on_the_device_both_parts_run_for_every_latent_frame_before_the_clock_stops(work: str) -> None:
    arch, network, data = opened(work)
    ran: list[str] = []
    run = network.run

    def note_and_run(stage: str, inputs: Any) -> Any:
        ran.append(stage)
        return run(stage, inputs)

    network.run = note_and_run
    network.backend.device = SimpleNamespace(synchronize=lambda: ran.append("synchronize"))
    vae.on_device(network, work, data, arch)
    assert len(ran) == 2 * 3 + 1
    assert ran[-1] == "synchronize"


def test_strips_make_what_the_whole_makes_and_the_host_gets_what_a_generation_takes(work: str) -> None:
    arch, network, data = opened(work)
    whole, strips = (vae._as_theirs(network, work, data, arch, num_strips) for num_strips in (1, 2))
    assert relative_error(strips, whole) < 1e-5
    expected = to_uint8(whole) if work == "decode" else normalise(whole, arch)
    for num_strips in (1, 2):
        made = vae._to_host(network, work, data, arch, num_strips)
        assert made.dtype == expected.dtype
        np.testing.assert_allclose(made, expected, atol=1 if work == "decode" else 1e-4)


def test_the_strips_of_every_case_are_possible() -> None:
    for case in vae.SUITE.cases:
        arch = VARIANTS[case.variant].vae
        size = (case.size.height // arch.spatial_stride, case.size.width // arch.spatial_stride)
        assert max(case.strips, default=1) <= min(most_decoder_strips(arch, *size), most_encoder_strips(arch, *size))
