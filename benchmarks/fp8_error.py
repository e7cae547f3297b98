"""Where FP8's error comes from: a transformer with some of its numbers in FP8, against itself in float32.

    python -m benchmarks.fp8_error [--case small] [--weights random] [--out FILE]

Weights are random, or, in the case `moving-shapes`, those of the trained model that ships, with captions and the suite's clip size.
The modules are this project's, the numbers the `cuda` target's (`benchmarks.fp8_numerics`), loop and solver the runtime's. It runs on
a GPU where torch has one. Each row of the table narrows something else; the last ones narrow all products but some. Errors are
relative, in norm: of one prediction from the latents that the float32 run has at its first, middle and last step, and of the latents
behind the last step of a generation with guidance of its own.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fp8_cases import CASES, Case, Row, rows
from benchmarks.fp8_numerics import Numerics
from benchmarks.gpu import relative_error
from benchmarks.machine import machine, versions
from benchmarks.moving_shapes import trained
from benchmarks.outliers import WEIGHTS
from benchmarks.result_file import result_file, write_json
from benchmarks.torch_backend import WeightForms, torch_component
from runtime.denoise import Guidance, denoise
from runtime.geometry import Float32
from runtime.schedulers import SOLVERS, Conventions, Schedule, SchedulerName, make_schedule
from runtime.transformer import Transformer
from runtime.variants import Expert

SHIFT, GUIDANCE = 5.0, 5.0  # Wan2.1's at 480p
PROMPT_TOKENS = (12, 40)  # of the prompt and of the negative one
TRAINED = "trained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """One row's errors, relative.

    Args:
        taken_away: where some products stay wide, the share of the squared error of the three predictions that this takes away.
        latents, cosine: None where no generation was run.
    """

    row: str
    first: float
    middle: float
    last: float
    seconds: float
    taken_away: float | None = None
    latents: float | None = None
    cosine: float | None = None

    @property
    def squared(self) -> float:
        return self.first**2 + self.middle**2 + self.last**2


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """What every run of a case starts from, and the float32 run's latents: the noise, then those after each step."""

    case: Case
    schedule: Schedule
    noise: Float32
    prompts: tuple[Float32, Float32]


def measure(case: Case, kind: str, *, seed: int = 0, device: str = "cpu") -> list[Errors]:
    """All rows of a case with one kind of weights; of several captions, the root of the mean of the squared errors.

    Raises:
        RuntimeError: a prediction is not finite.
    """
    make = trained.transformer_weights if kind == TRAINED else WEIGHTS[kind]
    forms = WeightForms(case.arch, make(case.arch, torch.Generator(device).manual_seed(seed)))
    starts = []
    for given in _inputs(case, seed):
        exact = generate(forms, None, given)
        starts.append((given, exact, predictions(forms, None, given, exact)))
    found: list[Errors] = []
    for row in rows(case.arch.num_layers):
        errors = together([_errors(forms, row, *start) for start in starts])
        if row.but:
            whole = next(earlier for earlier in found if earlier.row == "products")
            errors = replace(errors, taken_away=1 - errors.squared / whole.squared)
        found.append(errors)
    return found


def _inputs(case: Case, seed: int) -> Iterator[_Given]:
    schedule = make_schedule(SchedulerName.UNIPC, conventions=Conventions.ORIGINAL, num_steps=case.num_steps, shift=SHIFT)
    random = np.random.default_rng(seed)
    if not case.captions:
        noise = random.standard_normal(case.latents, np.float32)
        prompt, negative = (random.standard_normal((length, case.arch.text_dim), np.float32) for length in PROMPT_TOKENS)
        yield _Given(case, schedule, noise, (prompt, negative))
        return
    *embedded, negative = trained.embed([*case.captions, ""])
    for prompt in embedded:
        yield _Given(case, schedule, random.standard_normal(case.latents, np.float32), (prompt, negative))


def together(errors: Sequence[Errors]) -> Errors:
    """One row of several generations: the roots of the mean squared errors, the mean cosine, all seconds."""

    def of_all(name: str, power: int = 2) -> Any:
        found = [getattr(each, name) for each in errors]
        return None if None in found else float(np.mean(np.power(found, power)) ** (1 / power))

    first, middle, last, latents = (of_all(name) for name in ("first", "middle", "last", "latents"))
    seconds = sum(each.seconds for each in errors)
    return replace(
        errors[0], first=first, middle=middle, last=last, latents=latents, cosine=of_all("cosine", 1), seconds=seconds
    )


def _errors(forms: WeightForms, row: Row, given: _Given, exact: list[Float32], expected: list[Float32]) -> Errors:
    started = time.perf_counter()
    found = predictions(forms, row.numerics, given, exact)
    first, middle, last = (relative_error(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    of_latents = {}
    if row.main or given.case.every_generation:
        ours, theirs = generate(forms, row.numerics, given)[-1].ravel(), exact[-1].ravel()
        cosine = float(ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)))
        of_latents = {"latents": relative_error(ours, theirs), "cosine": cosine}
    seconds = time.perf_counter() - started
    return Errors(row=row.name, first=first, middle=middle, last=last, seconds=seconds, **of_latents)


def generate(forms: WeightForms, numerics: Numerics | None, given: _Given) -> list[Float32]:
    """The noise, and the latents after every step."""
    after: list[Float32] = [given.noise]

    def open_expert(expert: Expert, stack: ExitStack) -> Transformer:
        return Transformer(
            stack.enter_context(torch_component(forms, numerics)),
            given.case.arch,
            given.case.latents,
            conventions=Conventions.ORIGINAL,
        )

    denoise(
        given.noise,
        schedule=given.schedule,
        solver=SOLVERS[SchedulerName.UNIPC](given.schedule),
        experts=[(Expert(component="transformer"), Guidance(scale=GUIDANCE, unguided_pass=True))],
        open_expert=open_expert,
        prompt_embeds=given.prompts[0],
        negative_embeds=given.prompts[1],
        on_step=lambda event: after.append(event.latents),
    )
    return after


def predictions(forms: WeightForms, numerics: Numerics | None, given: _Given, trajectory: Sequence[Float32]) -> list[Float32]:
    """Predicted noise with the prompt at the first, the middle and the last step of a trajectory."""
    last = given.case.num_steps - 1
    with torch_component(forms, numerics) as component:
        transformer = Transformer(component, given.case.arch, given.case.latents, conventions=Conventions.ORIGINAL)
        prompt = transformer.encode_text(given.prompts[0])
        return [
            transformer.predict(trajectory[step], float(given.schedule.timesteps[step]), [prompt])[0]
            for step in (0, last // 2, last)
        ]


def table(found: Sequence[Errors]) -> str:
    """The rows as markdown."""
    lines = ["| in FP8 | first step | middle | last | taken away | latents | cosine |", "|---|---|---|---|---|---|---|"]
    for row in found:
        share = "" if row.taken_away is None else f"{row.taken_away:.0%}"
        latents = "" if row.latents is None else f"{row.latents:.1e}"
        cosine = "" if row.cosine is None else f"{row.cosine:.5f}"
        lines.append(f"| {row.row} | {row.first:.1e} | {row.middle:.1e} | {row.last:.1e} | {share} | {latents} | {cosine} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_error", description="Where FP8's error comes from.")
    parser.add_argument("--case", choices=CASES, default="small")
    parser.add_argument(
        "--weights", choices=WEIGHTS, action="append", help="default: all, one after the other; moving-shapes has its own"
    )
    parser.add_argument("--out", type=Path, help="JSON file or folder (default: benchmarks/results)")
    asked = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    case, tables = CASES[asked.case], {}
    if case.captions and asked.weights:
        parser.error(f"--weights: the case {asked.case} has the weights of a trained model")
    out = result_file(asked.out, f"fp8-error-{asked.case}")
    for kind in [TRAINED] if case.captions else asked.weights or WEIGHTS:
        found = measure(case, kind, device=device)
        tables[kind] = [asdict(row) for row in found]
        facts: dict[str, Any] = {"machine": machine(), "gpu": gpu, "versions": versions(("torch", "numpy"))}
        write_json(out, {"case": asked.case, **asdict(case), **facts, "weights": tables})
        print(f"{kind} weights\n\n{table(found)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
