"""How the VAE's parts run over a video: which stage takes what, and what is let go of before more is asked for."""

import weakref
from collections.abc import Iterator
from typing import Any

from runtime.vae_stream import run_steps

PAIR = ("part.first", "part.step")


class Tensor:
    """Something on a device."""


class Noting:
    """Runs stages that make a tensor and a cache, and notes what they take."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, list[str]]] = []

    def run(self, stage: str, inputs: dict[str, Any]) -> dict[str, Any]:
        self.ran.append((stage, sorted(inputs)))
        return {"y": Tensor(), "next_cache_00": Tensor()}


def test_what_a_step_was_given_is_gone_before_the_next_is_made() -> None:
    alive: list[bool] = []

    def given() -> Iterator[dict[str, Any]]:
        for _ in range(3):
            step = {"x": Tensor()}
            tensor = weakref.ref(step["x"])
            yield step  # held here meanwhile, as by the steps of the part before
            alive.append(tensor() is not None)

    component: Any = Noting()
    made = [list(outputs) for outputs in run_steps(component, PAIR, given())]
    assert made == [["y"]] * 3
    assert component.ran == [("part.first", ["x"]), *[("part.step", ["cache_00", "x"])] * 2]
    assert alive == [False] * 3
