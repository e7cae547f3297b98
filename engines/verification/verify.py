"""`wanrt verify`: two targets of a bundle, or of two bundles of one checkpoint, stage by stage on the same inputs.

Which targets, on what, and what counts as parting is said here; running and comparing is `comparison`'s work.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from engines.profiles import SMALLEST_TILE
from engines.verification.inputs import StageInputs
from engines.verification.pair import open_pair
from runtime.component import Component
from runtime.errors import RequestError
from runtime.geometry import VideoSize, check_size
from runtime.memory import Need
from runtime.opening import Opener
from runtime.precision import attention_precision, wide_name
from runtime.residency import weight_units
from runtime.specs import DType, Precision, StageSpec
from runtime.stages import network_blocks, network_components, network_stages, networks
from runtime.variants import Variant

if TYPE_CHECKING:  # Polygraphy is loaded only when it is there
    from engines.verification.comparison import StagePlan

_SMALL = VideoSize(width=128, height=128, num_frames=5)
"""Where engines take any size."""
_CACHE = "next_cache"
TOLERANCES = {Precision.FP32: 1e-5, Precision.BF16: 1.5e-2, Precision.FP16: 2.5e-3, Precision.FP8: 8e-2}
"""Relative error that a stage may have beside its float32 module: about twice what random weights gave, at most, in a table of all stages
(`benchmarks/results/typed-errors.json`)."""
LONG_TOLERANCES = {Precision.FP32: 1e-5, Precision.BF16: 2.5e-2, Precision.FP16: 3e-3}
"""The same of a VAE's stages, in which errors of many layers add up."""
_LONG = ("vae", "vae_encoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What to compare.

    Args:
        target, against: see `engines.verification.pair.open_pair`.
        stages: names of stages or networks; empty for all.
        size: of the video whose stages run; None: as small as the engines take, the VAE on a tile.
    """

    bundle: Path
    target: str | None = None
    against: str | None = None
    stages: tuple[str, ...] = ()
    size: VideoSize | None = None
    seed: int = 0
    num_threads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorVerdict:
    """One tensor that a stage gives, on the second target beside the first."""

    component: str
    stage: str
    block: int | None
    tensor: str
    max_abs: float | None
    relative: float | None
    """See `engines.verification.comparison.Difference`."""
    tolerance: float

    @property
    def parts(self) -> bool:
        """Whether it is farther away than rounding explains; what is not finite always is."""
        return self.relative is None or self.relative > self.tolerance

    @property
    def where(self) -> str:
        return f"{self.component}: {self.stage.partition('.')[2]}" + ("" if self.block is None else f" of block {self.block}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All of a comparison, in the order in which the stages run."""

    expected: str
    found: str
    size: VideoSize
    seed: int
    verdicts: tuple[TensorVerdict, ...]

    @property
    def parting(self) -> tuple[TensorVerdict, ...]:
        """Where the two part."""
        return tuple(verdict for verdict in self.verdicts if verdict.parts)

    def lines(self) -> list[str]:
        """The comparison as an aligned table; of a stage's many caches only the worst."""
        rows = [("stage", "tensor", "max abs", "relative", "tolerance", "")]
        marks = chain(["parts here first"], repeat("parts"))
        for verdict in self._shown():
            numbers = (_number(verdict.max_abs), _number(verdict.relative), _number(verdict.tolerance))
            rows.append((verdict.where, verdict.tensor, *numbers, next(marks) if verdict.parts else ""))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        table = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows]
        return [f"{self.found} beside {self.expected}, {self.size}, seed {self.seed}", *(line.rstrip() for line in table)]

    def _shown(self) -> Iterator[TensorVerdict]:
        for _, group in groupby(
            self.verdicts, lambda verdict: (verdict.where, verdict.tensor.startswith(_CACHE) or verdict.tensor)
        ):
            yield max(group, key=lambda verdict: float("inf") if verdict.relative is None else verdict.relative)


def verify(request: VerifyRequest, *, on_component: Callable[[str], None] = lambda _: None) -> Verification:
    """Compare two targets.

    Args:
        on_component: called with the name of each component when it has been compared.

    Raises:
        RequestError: Polygraphy is not installed, there is nothing to compare with, or an unknown stage or size.
        BundleError: a bundle is not whole, or the two hold different models.
        EngineError: a target does not run here, or failed.
    """
    if find_spec("polygraphy") is None:
        raise RequestError("verify compares with Polygraphy, which is not installed", hint='`pip install "wanrt[verify]"`')
    if request.seed < 0:
        raise RequestError(f"seed={request.seed}: need 0 or more", hint="leave --seed out for 0")
    reference, opener = open_pair(
        request.bundle, target=request.target, against=request.against, num_threads=request.num_threads
    )
    variant = opener.bundle.manifest.variant
    wanted = _wanted(variant, request.stages)
    size = _size(request.size, variant, (reference, opener))
    tile = SMALLEST_TILE if request.size is None else None
    verdicts = []
    for network, stages in wanted.items():
        for component in network_components(variant, network):
            given = StageInputs(variant, size, seed=request.seed, tile=tile)
            for verdict in _compare(reference, opener, network, component, given):
                if verdict.stage in stages:
                    verdicts.append(verdict)
            on_component(component)
    return Verification(
        expected=_describe(reference), found=_describe(opener), size=size, seed=request.seed, verdicts=tuple(verdicts)
    )


def _compare(reference: Opener, opener: Opener, network: str, component: str, given: StageInputs) -> Iterator[TensorVerdict]:
    """All stages of a component; one target is closed before the other opens, since both may want the whole device."""
    from engines.verification.comparison import compare_run, run_stages

    both = reference, opener
    plans = _plans(both, network)
    with _opened(reference, network, component, plans, given) as opened:
        runs = list(run_stages(opened, plans, given))
    with _opened(opener, network, component, plans, given) as opened:
        for run in runs:
            allowed = sum(_tolerance(one, run.stage, run.block) for one in both)
            for difference in compare_run(opened, run):
                yield TensorVerdict(
                    component=component,
                    stage=run.stage.name,
                    block=run.block,
                    tensor=difference.tensor,
                    max_abs=difference.max_abs,
                    relative=difference.relative,
                    tolerance=allowed,
                )


def _plans(both: Sequence[Opener], network: str) -> "list[StagePlan]":
    """Every declared stage; of blocks the first and the last of each kind that a target has."""
    from engines.verification.comparison import StagePlan

    variant = both[0].bundle.manifest.variant
    plans = []
    for stage in network_stages(variant, network):
        served = [spec for opener in both for spec in _serving(opener, stage)]
        places = [spec.places(network_blocks(variant, network)) for spec in served]
        blocks = dict.fromkeys(block for place in places for block in (place[0], place[-1]))
        plans.append(StagePlan(stage=stage, blocks=sorted(blocks, key=lambda block: block or 0), typed=served))
    return plans


def _serving(opener: Opener, stage: StageSpec) -> list[StageSpec]:
    """What a target has for a declared stage: one, or another besides for wide blocks."""
    return [spec for spec in opener.stages(stage.network) if spec.name in (stage.name, wide_name(stage.name))]


def _tolerance(opener: Opener, stage: StageSpec, block: int | None) -> float:
    """What a target's rounding may do to a stage; in fp8 only where products are."""
    num_blocks = network_blocks(opener.bundle.manifest.variant, stage.network)
    spec = next(spec for spec in _serving(opener, stage) if block in spec.places(num_blocks))
    precision = opener.target.precisions[stage.network]
    if all(weight.dtype is not DType.F8_E4M3 for weight in spec.weights):
        precision = attention_precision(precision)
    return (LONG_TOLERANCES if stage.network in _LONG else TOLERANCES)[precision]


@contextmanager
def _opened(
    opener: Opener, network: str, component: str, plans: "Sequence[StagePlan]", given: StageInputs
) -> Iterator[Component]:
    """A network open on its target, which is closed afterwards."""
    try:
        _prepare(opener, network, component, plans, given)
        with opener.network(network, component) as (opened, _):
            yield opened
    finally:
        opener.close()


def _prepare(opener: Opener, network: str, component: str, plans: "Sequence[StagePlan]", given: StageInputs) -> None:
    """Fit the work into the device's memory, where the target has any."""
    if opener.rehearse is None:
        return
    from engines.verification.comparison import run_stage

    def drive(opened: Component) -> None:
        for plan in plans:
            for block in plan.blocks:
                run_stage(opened, plan.stage, given.take(plan.stage), block)

    stages, attention = opener.stages(network), opener.attention[0]
    layout = opener.rehearse(stages, opener.engine_files(network), drive, attention)
    units = weight_units(stages, num_blocks=network_blocks(opener.bundle.manifest.variant, network))
    opener.session.prepare([Need(network=network, component=component, units=units, layout=layout)], attention=attention)


def _wanted(variant: Variant, names: Sequence[str]) -> dict[str, set[str]]:
    """Stages asked for, by network, in the order of their use; all of them when none is named."""
    stages = {network: {stage.name for stage in network_stages(variant, network)} for network in networks(variant)}
    known = {*stages, *(name for group in stages.values() for name in group)}
    if unknown := [name for name in names if name not in known]:
        raise RequestError(
            f"stage {unknown[0]}: {variant.name} has {', '.join(sorted(known))}",
            hint="name a stage, or a network for all of its stages",
        )
    if not names:
        return stages
    chosen = {network: group if network in names else group & set(names) for network, group in stages.items()}
    return {network: group for network, group in chosen.items() if group}


def _size(asked: VideoSize | None, variant: Variant, openers: Sequence[Opener]) -> VideoSize:
    """The size to run at: as asked, or as small as all engines take."""
    ranges = [opener.target.sizes for opener in openers if opener.target.sizes is not None]
    few = variant.vae.temporal_stride + 1
    frames = [min(max(few, one.smallest.num_frames), one.largest.num_frames) for one in ranges]
    smallest = [replace(one.smallest, num_frames=count) for one, count in zip(ranges, frames, strict=True)] or [_SMALL]
    fitting = (size for size in (smallest if asked is None else [asked]) if all(one.contains(size) for one in ranges))
    size = next(fitting, None)
    if size is None:
        names = ", ".join(f"{opener.name} {opener.target.sizes or 'any'}" for opener in openers)
        raise RequestError(f"{asked or smallest[0]}: the engines take {names}", hint="choose another --size or --frames")
    check_size(size, vae=variant.vae, transformer=variant.transformer)
    return size


def _describe(opener: Opener) -> str:
    return f"{opener.name} ({opener.target.precision})"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"
