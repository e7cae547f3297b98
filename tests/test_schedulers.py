"""Sigmas, timesteps and trajectories are the peers': diffusers' real classes, and numbers from Wan's and DiffSynth-Studio's own."""

import json
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from runtime.errors import RequestError
from runtime.schedulers import (
    SOLVERS,
    Conventions,
    Schedule,
    SchedulerName,
    make_schedule,
    parse_scheduler_config,
)

UNIPC, DPMPP, EULER = SchedulerName.UNIPC, SchedulerName.DPMPP, SchedulerName.EULER
ORIGINAL, DIFFUSERS = Conventions.ORIGINAL, Conventions.DIFFUSERS
STEPS = (1, 2, 3, 4, 5, 10, 14, 15, 16, 23, 40, 50)
SHIFTS = (1.0, 2.5, 3.0, 5.0, 8.0, 12.0)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# Largest error of a trajectory over the largest latent, at any step; measured over 1 to 50 steps and seven shifts.
TOLERANCE = {
    "unipc": 1e-6,  # 7.0e-7
    "unipc, order 1": 1e-6,  # 7.7e-7
    "unipc, no corrector at two steps": 2e-6,  # 1.1e-6
    "dpmpp": 1e-6,  # 8.4e-7
    "dpmpp, order 1": 1e-6,  # 8.2e-7
    "dpmpp, heun": 2e-6,  # 1.2e-6
    "euler": 1e-6,  # 0
}
CLASSES: dict[str, tuple[type[Any], dict[str, object]]] = {
    "unipc": (diffusers.UniPCMultistepScheduler, FLOW),
    "unipc, order 1": (diffusers.UniPCMultistepScheduler, {**FLOW, "solver_order": 1}),
    "unipc, no corrector at two steps": (diffusers.UniPCMultistepScheduler, {**FLOW, "disable_corrector": [0, 2]}),
    "dpmpp": (diffusers.DPMSolverMultistepScheduler, FLOW),
    "dpmpp, order 1": (diffusers.DPMSolverMultistepScheduler, {**FLOW, "solver_order": 1}),
    "dpmpp, heun": (diffusers.DPMSolverMultistepScheduler, {**FLOW, "solver_type": "heun"}),
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Toy latents gain nothing from more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def peer_scheduler(case: str, shift: float) -> Any:
    cls, settings = CLASSES[case]
    return cls(**settings, **{"shift" if case == "euler" else "flow_shift": shift})


def saved_config(scheduler: Any) -> dict[str, object]:
    """What the scheduler's own scheduler_config.json says."""
    config = json.loads(scheduler.to_json_string())
    assert isinstance(config, dict)
    return config


def toy_model(latents: np.ndarray, timestep: float) -> np.ndarray:
    noise_pred = 0.9 * np.tanh(1.3 * latents) - 0.2 + 0.3 * np.sin(2 * latents + timestep / 200)
    return noise_pred.astype(np.float32)


@pytest.mark.parametrize("case", CLASSES)
def test_schedules_equal_diffusers_exactly(case: str) -> None:
    for shift in SHIFTS:
        peer = peer_scheduler(case, shift)
        ours = parse_scheduler_config(saved_config(peer))
        assert ours.shift == shift
        for num_steps in range(1, 51):
            peer.set_timesteps(num_steps)
            schedule = make_schedule(ours.name, conventions=DIFFUSERS, num_steps=num_steps, shift=ours.shift)
            assert np.array_equal(schedule.sigmas, peer.sigmas.numpy())
            assert np.array_equal(schedule.timesteps, peer.timesteps.numpy())
            assert schedule.timesteps.dtype == peer.timesteps.numpy().dtype


@pytest.mark.parametrize("case", CLASSES)
def test_trajectories_equal_diffusers_at_every_step(case: str) -> None:
    start = np.random.default_rng(3).standard_normal((1, 4, 2, 3, 5), np.float32)
    for shift in SHIFTS:
        for num_steps in STEPS:
            peer = peer_scheduler(case, shift)
            peer.set_timesteps(num_steps)
            peer.set_begin_index(0)
            ours = parse_scheduler_config(saved_config(peer))
            schedule = make_schedule(ours.name, conventions=DIFFUSERS, num_steps=num_steps, shift=ours.shift)
            solver = SOLVERS[ours.name](schedule, ours.settings)
            latents, expected = start, torch.from_numpy(start)
            for i, timestep in enumerate(peer.timesteps):
                noise_pred = torch.from_numpy(toy_model(expected.numpy(), float(timestep)))
                expected = peer.step(noise_pred, timestep, expected, return_dict=False)[0]
                latents = solver.step(toy_model(latents, float(schedule.timesteps[i])), i, latents)
                assert latents.dtype == np.float32
                error = np.abs(latents - expected.numpy()).max() / expected.abs().max()
                assert error <= TOLERANCE[case], (shift, num_steps, i)


# Noise levels of Wan's own classes for 10 steps (Wan-Video/Wan2.2 42bf4cfa, torch 2.13); for Euler DiffSynth-Studio's (fed7b18f).
ORIGINAL_SIGMAS = {
    (UNIPC, 5): ".999800 .978048 .952154 .920810 .882093 .833055 .768935 .681508 .555247 .356888",
    (UNIPC, 12): ".999917 .990735 .979492 .965406 .947244 .922935 .888724 .837014 .749765 .571156",
    (DPMPP, 3): "1 .964286 .923077 .875 .818182 .75 .666667 .5625 .428571 .25",
    (DPMPP, 12): "1 .990826 .979592 .965517 .947368 .923077 .888889 .837209 .75 .571429",
    (EULER, 5): "1 .978261 .952381 .921053 .882353 .833333 .769231 .681818 .555556 .357143",
}
ORIGINAL_TIMESTEPS = {
    (UNIPC, 3): "999 963 922 874 817 749 666 562 428 249",
    (UNIPC, 5): "999 978 952 920 882 833 768 681 555 356",
    (UNIPC, 12): "999 990 979 965 947 922 888 837 749 571",
    (DPMPP, 3): "1000 964 923 874 818 750 666 562 428 249",
    (DPMPP, 5): "1000 978 952 921 882 833 769 681 555 357",
    (DPMPP, 12): "1000 990 979 965 947 923 888 837 750 571",
}
# Their latents after each step, for the toy model v = 0.8·x − 0.3 + 0.0005·t from (1.0, −0.5).
ORIGINAL_TRAJECTORIES = {
    (UNIPC, 5): (
        ".978259 .953451 .924756 .890813 .850270 .801372 .741901 .669668 .588116 .463743",
        "-.495639 -.490177 -.483210 -.474197 -.462178 -.445364 -.420509 -.381131 -.310909 -.178601",
    ),
    (UNIPC, 12): (
        ".990823 .979783 .966216 .949056 .926711 .896477 .853299 .787019 .675650 .375210",
        "-.498159 -.495854 -.492900 -.489002 -.483625 -.475722 -.463142 -.440226 -.386813 -.201787",
    ),
    (DPMPP, 5): (
        ".978261 .953116 .924059 .889860 .849121 .799980 .740163 .667756 .586284 .462167",
        "-.495652 -.490282 -.483417 -.474501 -.462523 -.445783 -.421079 -.381689 -.311410 -.179043",
    ),
    (DPMPP, 12): (
        ".990826 .979730 .966099 .948894 .926495 .896149 .852850 .786289 .674152 .374254",
        "-.498165 -.495879 -.492945 -.489066 -.483710 -.475868 -.463316 -.440483 -.387409 -.202022",
    ),
    (EULER, 5): (
        ".978261 .953112 .923705 .888895 .847116 .796196 .733121 .653903 .554518 .439452",
        "-.495652 -.490285 -.483517 -.474760 -.463062 -.446794 -.422946 -.385389 -.319807 -.185066",
    ),
}  # fmt: skip


def original(name: SchedulerName, shift: float, num_steps: int = 10) -> Schedule:
    return make_schedule(name, conventions=ORIGINAL, num_steps=num_steps, shift=shift)


@pytest.mark.parametrize(("name", "shift"), ORIGINAL_SIGMAS)
def test_original_sigmas_are_those_of_the_reference(name: SchedulerName, shift: float) -> None:
    expected = [*map(float, ORIGINAL_SIGMAS[name, int(shift)].split()), 0]
    np.testing.assert_allclose(original(name, shift).sigmas, expected, atol=6e-7)


@pytest.mark.parametrize(("name", "shift"), ORIGINAL_TIMESTEPS)
def test_original_timesteps_are_truncated_where_the_reference_truncates(name: SchedulerName, shift: float) -> None:
    timesteps = original(name, shift).timesteps
    assert timesteps.dtype == np.int64
    assert timesteps.tolist() == [*map(int, ORIGINAL_TIMESTEPS[name, int(shift)].split())]


def test_original_euler_gives_the_model_untruncated_timesteps() -> None:
    schedule = original(EULER, 5)
    assert schedule.timesteps.dtype == np.float32
    np.testing.assert_allclose(schedule.timesteps, 1000 * schedule.sigmas[:-1], rtol=1e-7)


@pytest.mark.parametrize(("name", "shift"), ORIGINAL_TRAJECTORIES)
def test_original_trajectories_are_those_of_the_reference(name: SchedulerName, shift: float) -> None:
    schedule = original(name, shift)
    solver = SOLVERS[name](schedule)
    latents = np.array([1.0, -0.5], np.float32)
    expected = np.array([[*map(float, row.split())] for row in ORIGINAL_TRAJECTORIES[name, int(shift)]]).T
    for i, timestep in enumerate(schedule.timesteps):
        noise_pred = (0.8 * latents - 0.3 + 0.0005 * float(timestep)).astype(np.float32)
        latents = solver.step(noise_pred, i, latents)
        np.testing.assert_allclose(latents, expected[i], rtol=0, atol=1.5e-6)


def test_original_unipc_equals_diffusers_solver_on_the_original_sigmas() -> None:
    start = np.random.default_rng(5).standard_normal((1, 4, 2, 3, 5), np.float32)
    for shift in SHIFTS:
        for num_steps in STEPS:
            schedule = original(UNIPC, shift, num_steps)
            peer = peer_scheduler("unipc", 1.0)
            peer.set_timesteps(sigmas=schedule.sigmas[:-1].copy())
            peer.set_begin_index(0)
            solver = SOLVERS[UNIPC](schedule)
            latents, expected = start, torch.from_numpy(start)
            for i, timestep in enumerate(peer.timesteps):
                noise_pred = torch.from_numpy(toy_model(expected.numpy(), float(timestep)))
                expected = peer.step(noise_pred, timestep, expected, return_dict=False)[0]
                latents = solver.step(toy_model(latents, float(timestep)), i, latents)
                assert np.abs(latents - expected.numpy()).max() / expected.abs().max() <= 1e-6


@pytest.mark.parametrize("conventions", Conventions)
@pytest.mark.parametrize("name", SchedulerName)
def test_the_last_step_reaches_the_predicted_clean_sample(name: SchedulerName, conventions: Conventions) -> None:
    for num_steps in (1, 2, 7):
        schedule = make_schedule(name, conventions=conventions, num_steps=num_steps, shift=5.0)
        solver = SOLVERS[name](schedule)
        latents = np.array([1.5, -0.25], np.float32)
        for i in range(num_steps):
            clean = np.array([0.5, 0.75], np.float32)
            latents = solver.step(((latents - clean) / np.float32(schedule.sigmas[i])).astype(np.float32), i, latents)
        np.testing.assert_allclose(latents, [0.5, 0.75], atol=1e-6)


@pytest.mark.parametrize("name", SchedulerName)
def test_a_solver_begins_anew_at_step_zero_and_leaves_its_inputs_alone(name: SchedulerName) -> None:
    schedule = original(name, 5.0, num_steps=6)
    solver = SOLVERS[name](schedule)
    start = np.array([1.0, -2.0, 0.5], np.float32)

    def run() -> list[float]:
        latents = start
        for i in range(6):
            before, noise_pred = latents.copy(), toy_model(latents, 500.0)
            given = noise_pred.copy()
            latents = solver.step(noise_pred, i, latents)
            assert i == 0 or not np.shares_memory(latents, start)
            assert np.array_equal(noise_pred, given) and np.array_equal(before.shape, latents.shape)
        return [float(value) for value in latents]

    assert run() == run()
    assert start.tolist() == [1.0, -2.0, 0.5]


@pytest.mark.parametrize("name", [UNIPC, DPMPP])
def test_a_multistep_solver_refuses_to_skip_a_step(name: SchedulerName) -> None:
    solver = SOLVERS[name](original(name, 5.0))
    latents = np.zeros(2, np.float32)
    solver.step(latents, 0, latents)
    with pytest.raises(ValueError, match="next step is 1"):
        solver.step(latents, 2, latents)


@pytest.mark.parametrize(
    ("num_steps", "shift", "message"),
    [
        (0, 5.0, "num_steps=0: need 1 to 1000"),
        (1001, 5.0, "num_steps=1001"),
        (10, 0.0, "shift=0.0: need a positive number"),
        (10, float("nan"), "shift=nan"),
        (1000, 1e6, "sigmas coincide"),
    ],
)
def test_an_impossible_schedule_is_refused(num_steps: int, shift: float, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        original(UNIPC, shift, num_steps)
