"""In how many strips the VAE runs is decided by the budget of device memory: the least number that fits; videos do not change."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from runtime.component import Component
from runtime.errors import DeviceMemoryError
from runtime.memory import SMALL_BYTES, Layout, MemoryPlan, Need, plan_memory
from runtime.opening import Opener
from runtime.pipeline import VideoPipeline
from runtime.request import GenerateRequest
from runtime.residency import PAGE_BYTES, Unit
from runtime.specs import Precision, StageSpec
from runtime.stages import network_components
from runtime.stages.vae import DECODE_HIGH, ENCODE_HIGH
from runtime.tiling import TileSpec
from tests.conftest import Toy

MIB = 1 << 20
WEIGHTS = Unit(name="decoder", tensors=(), nbytes=PAGE_BYTES, block=None, per_prompt=False)
WHOLE_MIB = {1: 600, 2: 330, 3: 250, 4: 210, 5: 190}


def need(asked: list[int], *, most: int = 5) -> Need:
    """A VAE that needs so many MiB by the number of strips; `asked` notes whose layout was wanted."""

    def in_strips(num_strips: int) -> Layout:
        asked.append(num_strips)
        return Layout(nbytes=WHOLE_MIB[num_strips] * MIB, large_bytes=None)

    whole = Layout(nbytes=WHOLE_MIB[1] * MIB, large_bytes=None)
    return Need(network="vae", component="vae", units=(WEIGHTS,), layout=whole, most_strips=most, in_strips=in_strips)


def planned(mib: int, **options: Any) -> tuple[MemoryPlan, list[int]]:
    asked: list[int] = []
    budget = mib * MIB + SMALL_BYTES + PAGE_BYTES  # small arrays and weights come on top of the layout
    return plan_memory([need(asked, **options)], budget_bytes=budget, fixed_bytes=0), asked


@pytest.mark.parametrize(("mib", "num_strips"), [(700, 1), (600, 1), (599, 2), (330, 2), (329, 3), (210, 4), (190, 5)])
def test_the_least_number_of_strips_that_fits_is_taken(mib: int, num_strips: int) -> None:
    plan, _ = planned(mib)
    assert plan.num_strips("vae") == num_strips
    assert plan.find("vae").need.layout.nbytes == WHOLE_MIB[num_strips] * MIB
    assert plan.peak_bytes <= plan.budget_bytes
    assert (f"in {num_strips} strips" in str(plan)) == (num_strips > 1)


def test_nothing_is_rehearsed_in_strips_while_memory_is_enough() -> None:
    assert planned(600)[1] == []


def test_a_budget_that_no_number_of_strips_fits_is_refused_with_what_the_most_need() -> None:
    asked: list[int] = []
    with pytest.raises(DeviceMemoryError, match=r"vae needs 208\.0 MiB of device memory") as caught:
        plan_memory([need(asked)], budget_bytes=207 * MIB, fixed_bytes=0)
    assert asked == [5]
    assert "--tile" in caught.value.hint


def test_frames_too_small_for_strips_are_refused_whole() -> None:
    with pytest.raises(DeviceMemoryError, match=r"vae needs 0\.60 GiB"):
        planned(500, most=1)


class Noting(Component):
    """A component that notes which stages run."""

    def __init__(self, component: Component, ran: list[str]) -> None:
        self.backend, self._component, self._ran = component.backend, component, ran

    def stage(self, name: str) -> StageSpec:
        return self._component.stage(name)

    def run(self, stage: str, inputs: Any, **options: Any) -> Any:
        self._ran.append(stage)
        return self._component.run(stage, inputs, **options)


def count_strips(opener: Opener, asked: list[tuple[str, int]]) -> Callable[..., Layout]:
    """A rehearsal that does the work and counts in how many strips: the VAE then needs 64 MiB, divided by them."""

    def rehearse(stages: Any, files: Any, drive: Callable[[Component], object], attention: Precision) -> Layout:
        network, ran = stages[0].network, list[str]()
        with opener.network(network, network_components(opener.bundle.manifest.variant, network)[0]) as (component, _):
            drive(Noting(component, ran))
        strips = ran.count(DECODE_HIGH[0]) + ran.count(ENCODE_HIGH[0])
        asked.append((network, strips))
        return Layout(nbytes=64 * MIB // strips if strips else 0, large_bytes=None)

    return rehearse


@pytest.mark.parametrize("tile", [None, TileSpec.square(64, 48)], ids=["whole", "tiles"])
def test_a_generation_runs_as_planned_and_its_video_stays_the_same(
    two_experts: Toy, monkeypatch: pytest.MonkeyPatch, tile: TileSpec | None
) -> None:
    width = 224  # of pixels: four margins of seven latent positions, so two strips are worth while
    video = np.random.default_rng(0).integers(0, 256, (5, 16, width, 3), np.uint8)
    request = GenerateRequest(prompt="a cat", width=width, height=16, num_frames=5, num_steps=2, seed=1, video=video, tile=tile)
    asked: list[tuple[str, int]] = []
    plans: list[MemoryPlan] = []
    with VideoPipeline.open(two_experts.original, target="cpu", num_threads=1) as pipeline:
        expected = pipeline.generate(request)
        opener = pipeline._opener
        monkeypatch.setattr(Opener, "rehearse", property(lambda _: count_strips(opener, asked)))

        def prepare(needs: list[Need], *, attention: Precision) -> MemoryPlan:
            return plan_memory(needs, budget_bytes=100 * MIB if tile else 60 * MIB, fixed_bytes=0)

        monkeypatch.setattr(opener.session, "prepare", prepare)
        made = pipeline.generate(request, on_memory=plans.append)
    strips = 1 if tile else 2
    assert [plans[0].num_strips(network) for network in ("vae_encoder", "vae")] == [strips, strips]
    np.testing.assert_allclose(made.latents, expected.latents, atol=1e-4)
    assert np.abs(made.frames.astype(int) - expected.frames).max() <= 1
    if tile is None:
        assert {("vae_encoder", 2), ("vae", 2)} <= set(asked)
