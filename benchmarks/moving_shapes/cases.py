"""Which rows the quality suite makes: every target of the bundles, in each precision, with each scheduler and number of steps."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.moving_shapes.world import ClipSize
from runtime.backends import RUNTIME_TARGETS
from runtime.bundle import open_bundle
from runtime.errors import BundleError, RequestError
from runtime.precision import wide_text
from runtime.schedulers import SchedulerName
from runtime.specs import Precision

STEPS = (50, 30, 20, 10, 6, 4)
PROMPTS = 200
CLIP = ClipSize(width=64, height=64, num_frames=17)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRequest:
    """What to judge.

    Args:
        bundles: of the moving-shapes checkpoint. One needs a target in fp32, which the others are compared with, unless `reference` is there.
        reference: file of that target's videos; written if it is not there, else read.
        prompts: how many; seed 0, 1, … each.
        cases: names, or patterns with `*`, of the rows to make beside the reference; empty for all.
        out: `.json` file or folder for the result; None for benchmarks/results/ below the current folder.
    """

    bundles: tuple[Path, ...]
    prompts: int = PROMPTS
    cases: tuple[str, ...] = ()
    reference: Path | None = None
    out: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the report.

    Args:
        wide: what of the bundle's fp8 transformer is bf16 all the same.
        attention: precision of self-attention's products where it is not the target's default.
    """

    bundle: Path
    target: str
    precision: Precision
    wide: str = ""
    attention: Precision | None = None
    scheduler: SchedulerName = SchedulerName.UNIPC
    num_steps: int = STEPS[0]

    @property
    def build(self) -> str:
        """The target as it was built."""
        return f"{self.target} {self.precision} but {self.wide}" if self.wide else f"{self.target} {self.precision}"

    @property
    def name(self) -> str:
        attention = "" if self.attention is None else f" {self.attention}-attention"
        return f"{self.build}{attention} {self.scheduler} {self.num_steps}"

    @property
    def is_repeated(self) -> bool:
        """Whether a part of it is made twice, for the noise floor: at the default scheduler and number of steps."""
        return (self.scheduler, self.num_steps) == (SchedulerName.UNIPC, STEPS[0])


def chosen_cases(request: QualityRequest) -> list[Case]:
    """The rows to make; the reference first, unless its file is there.

    Raises:
        RequestError: no bundle, no fp32 target to compare with, no such case, or a number of prompts out of range.
        BundleError: a bundle cannot be opened, or two have the same target in the same precision.
    """
    if not request.bundles:
        raise RequestError("suite quality needs a bundle", hint="build the moving-shapes checkpoint, and name it with --bundle")
    if request.prompts < 1:
        raise RequestError(f"prompts={request.prompts}: need 1 or more", hint="200 or more tell half a percent apart")
    targets = [case for folder in request.bundles for case in _targets(folder)]
    if len({case.build for case in targets}) < len(targets):
        raise BundleError("two of the bundles have the same target in the same precision", hint="name each once")
    targets.sort(key=lambda case: case.precision is not Precision.FP32)
    made = reference_is_made(request)
    if not made and targets[0].precision is not Precision.FP32:
        raise RequestError("none of the bundles has an fp32 target to compare with", hint="build one with `--target cpu` too")
    every = [
        replace(each, attention=attention, scheduler=scheduler, num_steps=steps)
        for each in targets
        for attention in _attentions(each)
        for scheduler in SchedulerName
        for steps in STEPS
    ]
    asked = request.cases or ("*",)
    for pattern in asked:
        if not any(fnmatch(case.name, pattern) for case in every):
            raise RequestError(f"case {pattern!r}: there is {targets[0].name} and the like", hint="* stands for anything")
    return [case for case in every if (case == every[0] and not made) or any(fnmatch(case.name, pattern) for pattern in asked)]


def _targets(folder: Path) -> Iterator[Case]:
    """A bundle's targets, at their defaults."""
    manifest = open_bundle(folder).manifest
    for name, target in manifest.targets.items():
        wide = wide_text(manifest.fp8_wide, target.precision)
        yield Case(bundle=folder, target=name, precision=target.precision, wide=wide)


def _attentions(case: Case) -> tuple[Precision | None, ...]:
    """The target's default, and what else it has beside FP8 products."""
    if case.precision is not Precision.FP8:
        return (None,)
    others = (target.attention(case.precision)[1:] for target in RUNTIME_TARGETS if target.name == case.target)
    return (None, *next(others, ()))


def reference_is_made(request: QualityRequest) -> bool:
    """Whether an earlier run made the videos to compare with."""
    return request.reference is not None and request.reference.exists()
