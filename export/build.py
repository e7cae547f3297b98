"""Builds a bundle: a checkpoint's weights packed, every stage traced and made an engine, what is already there left alone."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.plan import TARGETS, TargetPlan, architectures, network_precisions
from engines.store import BundleStore
from export.builder import Builder, BuildEvent, BuildRequest
from runtime.errors import ExportError, RequestError, WanError
from runtime.geometry import check_size
from runtime.manifest import SCHEMA_VERSION, Manifest, WeightFile
from runtime.precision import NOTHING_WIDE, WideParts, find_wide_fault, stages_in_precision
from runtime.report import peak_memory_bytes
from runtime.schedulers import Conventions, DiffusersScheduler, parse_scheduler_config
from runtime.specs import Precision
from runtime.stages import network_blocks, network_components, network_stages
from runtime.variants import VARIANTS, Variant
from runtime.version import VERSION

if TYPE_CHECKING:  # torch is loaded only when a checkpoint is opened or a stage must really be traced
    from export.checkpoint import Checkpoint

__all__ = ["BuildEvent", "BuildRequest", "BuildSummary", "build_bundle"]

_USUALLY_WIDE = WideParts(first_blocks=1)
"""What stays wide when nothing is asked for: two thirds of FP8's squared error came from there in the weights of the small trained model
(decision 10)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSummary:
    bundle: Path
    variant: str
    unchanged: bool
    engine_bytes: int
    weight_bytes: int
    num_built: int
    num_reused: int
    seconds: float
    peak_memory_bytes: int | None
    scratch_bytes: dict[str, dict[str, int]]
    """Of targets whose engines need some: what each stage's needs at the largest size; all stages share the most of it."""


def build_bundle(request: BuildRequest, *, on_event: Callable[[BuildEvent], None] = lambda _: None) -> BuildSummary:
    """Build or complete a bundle.

    Returns:
        What was done; `unchanged` when the bundle already was exactly what was asked.

    Raises:
        RequestError: unknown variant, target or precision.
        ExportError: the checkpoint cannot be read or a stage not captured.
        BuildError: a target refused, or the bundle could not be written.
    """
    started = time.perf_counter()
    plans = _target_plans(request)
    if request.checkpoint is None:
        variant = _engines_only_variant(request.variant)
        with BundleStore(request.out) as store:
            return _build(store, request, plans, variant, None, started, on_event)
    from export.checkpoint import open_checkpoint

    with open_checkpoint(request.checkpoint, variant=request.variant) as checkpoint, BundleStore(request.out) as store:
        return _build(store, request, plans, checkpoint.variant, checkpoint, started, on_event)


def _build(
    store: BundleStore,
    request: BuildRequest,
    plans: list[TargetPlan],
    variant: Variant,
    checkpoint: "Checkpoint | None",
    started: float,
    on_event: Callable[[BuildEvent], None],
) -> BuildSummary:
    for end in (request.sizes.smallest, request.sizes.largest) if request.sizes else ():
        check_size(end, vae=variant.vae, transformer=variant.transformer)
    packs = sorted(
        {
            (precision, network, component)
            for plan in plans
            for network, precision in network_precisions(plan, variant, request.precision).items()
            for component in network_components(variant, network)
        }
    )
    fp8_wide = _fp8_wide(request, plans, variant)
    total = sum(_num_engines(plan, request, variant, fp8_wide) for plan in plans)
    total += sum(
        len(architectures(plan, request.architectures, request.precision)) for plan in plans if plan.compile_kernels is not None
    )
    total += len(packs) + 1 if checkpoint else 0
    builder = Builder(store, request, variant, checkpoint, fp8_wide=fp8_wide, total=total, on_event=on_event)
    conventions, scheduler = _sampling(checkpoint)
    targets = {plan.name: builder.target(plan) for plan in plans}
    weights: dict[str, dict[str, WeightFile]] = {}
    for precision, network, component in packs if checkpoint else ():
        weights.setdefault(precision, {})[component] = builder.weights(network, component, precision)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        wanrt_version=VERSION,
        variant=variant,
        conventions=conventions,
        scheduler=scheduler,
        targets=targets,
        fp8_wide=fp8_wide,
        weights=weights,
        tokenizer=builder.tokenizer() if checkpoint else None,
        source=_unicode(request.checkpoint.resolve().name) if request.checkpoint else "",
    )
    changed = store.finish(manifest)
    return BuildSummary(
        bundle=request.out,
        variant=variant.name,
        unchanged=not changed,
        engine_bytes=sum(engine.bytes for target in targets.values() for engine in target.files()),
        weight_bytes=sum(file.file.bytes for files in weights.values() for file in files.values()),
        num_built=builder.built,
        num_reused=builder.reused,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
        scratch_bytes={
            plan.name: {
                name: plan.header(request.out / file.path).scratch_bytes for name, file in targets[plan.name].engines.items()
            }
            for plan in plans
            if plan.header is not None
        },
    )


def _num_engines(plan: TargetPlan, request: BuildRequest, variant: Variant, wide: WideParts) -> int:
    return sum(
        len(
            stages_in_precision(
                network_stages(variant, network),
                precision,
                num_blocks=network_blocks(variant, network),
                wide=wide,
            )
        )
        for network, precision in network_precisions(plan, variant, request.precision).items()
    )


def _fp8_wide(request: BuildRequest, plans: list[TargetPlan], variant: Variant) -> WideParts:
    """What stays wide; parts that the transformer does not have are refused, and any where nothing is fp8."""
    built = [network_precisions(plan, variant, request.precision)["transformer"] for plan in plans]
    if Precision.FP8 not in built:
        if request.fp8_wide not in (None, NOTHING_WIDE):
            raise RequestError(
                f"--wide: of fp8, and the transformer is built in {', '.join(dict.fromkeys(built))}",
                hint="build with --precision fp8, or leave --wide out",
            )
        return NOTHING_WIDE
    blocks = network_blocks(variant, "transformer")
    if request.fp8_wide is None:
        return _USUALLY_WIDE if blocks > 1 else NOTHING_WIDE
    if fault := find_wide_fault(request.fp8_wide, network_stages(variant, "transformer"), num_blocks=blocks):
        raise RequestError(
            f"--wide: {fault}", hint="first:N, last:N or a product's name; --precision bf16 makes all of it bf16"
        )
    return request.fp8_wide


def _sampling(checkpoint: "Checkpoint | None") -> tuple[Conventions, DiffusersScheduler | None]:
    """Whose behaviour the bundle follows where the peers differ: the layout decides."""
    if checkpoint is None or checkpoint.scheduler_config is None:
        return Conventions.ORIGINAL, None
    try:
        return Conventions.DIFFUSERS, parse_scheduler_config(checkpoint.scheduler_config)
    except WanError as error:
        raise ExportError(error.message, hint=error.hint) from error


def _target_plans(request: BuildRequest) -> list[TargetPlan]:
    """The targets asked for; a precision or architecture must be one that at least one of them has, the others keep their own."""
    if unknown := [name for name in request.targets if name not in TARGETS]:
        raise RequestError(f"target {unknown[0]!r}: there is {', '.join(TARGETS)}", hint="choose one of them with --target")
    plans = [TARGETS[name] for name in request.targets]
    precisions = dict.fromkeys(precision for plan in plans for precision in plan.precisions)
    if request.precision is not None and request.precision not in precisions:
        raise RequestError(
            f"precision {request.precision}: target {', '.join(request.targets)} has {', '.join(precisions)}",
            hint="leave --precision out for the default",
        )
    known = dict.fromkeys(architecture for plan in plans for architecture in plan.architectures)
    tells_itself = any(plan.find_architecture is not None for plan in plans)
    if unknown := [architecture for architecture in request.architectures if architecture not in known and not tells_itself]:
        possible = ", ".join(known) or "none: it compiles nothing"
        raise RequestError(
            f"architecture {unknown[0]}: target {', '.join(request.targets)} has {possible}", hint="leave --arch out for all"
        )
    return plans


def _engines_only_variant(name: str | None) -> Variant:
    if name is None:
        raise RequestError(
            f"no variant named; there is {', '.join(VARIANTS)}", hint="without a checkpoint, name one with --variant"
        )
    if name not in VARIANTS:
        raise RequestError(f"variant {name!r}: there is {', '.join(VARIANTS)}", hint="name one with --variant")
    return VARIANTS[name]


def _unicode(name: str) -> str:
    """A file's name as text; bytes of it that are not UTF-8 become question marks."""
    return name.encode(errors="replace").decode()
