"""Builds a bundle: a checkpoint's weights packed, every stage traced and made an engine, what is already there left alone."""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from engines.plan import TARGETS, TargetPlan
from engines.store import BundleStore, content_key
from runtime.bundle import SCHEMA_VERSION, Manifest, Target, WeightFile
from runtime.errors import RequestError
from runtime.geometry import SizeRange
from runtime.report import peak_memory_bytes
from runtime.schedulers import Conventions, DiffusersScheduler, parse_scheduler_config
from runtime.specs import DType, Precision, StageSpec
from runtime.stages import NETWORKS, network_arch, network_blocks, network_components, network_stages
from runtime.stages.text_encoder import TOKEN_EMBEDDING
from runtime.variants import VARIANTS, Variant
from runtime.version import VERSION

if TYPE_CHECKING:  # torch is loaded only when a checkpoint is opened or a stage must really be traced
    from export.checkpoint import Checkpoint

_SOURCE_FOLDERS = ("export", "engines", "runtime/stages")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What to build.

    Args:
        checkpoint: folder in either layout, or None for engines only.
        variant: name from `VARIANTS`; required without a checkpoint, detected with one.
        targets, precision: what to build for; `precision` None takes each target's default.
        sizes: the sizes the engines must take; None for any.
    """

    out: Path
    checkpoint: Path | None
    variant: str | None = None
    targets: tuple[str, ...] = ("cpu",)
    precision: Precision | None = None
    sizes: SizeRange | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEvent:
    """Progress: an artefact was finished, or found finished (`reused`)."""

    done: int
    total: int
    artefact: str
    bytes: int
    seconds: float
    reused: bool


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
    plans = [_target_plan(name, request.precision) for name in request.targets]
    if request.checkpoint is None:
        return _build(request, plans, _engines_only_variant(request.variant), None, started, on_event)
    from export.checkpoint import open_checkpoint

    with open_checkpoint(request.checkpoint, variant=request.variant) as checkpoint:
        return _build(request, plans, checkpoint.variant, checkpoint, started, on_event)


class _Progress:
    """Counts artefacts and tells the caller about each."""

    def __init__(self, total: int, on_event: Callable[[BuildEvent], None]) -> None:
        self.built = self.reused = 0
        self._total, self._on_event = total, on_event

    def artefact(
        self, store: BundleStore, path: str, *, key: str, build: Callable[[Path], dict[str, str] | None]
    ) -> WeightFile:
        started = time.perf_counter()
        reused = store.has(path, key=key)
        made = store.artefact(path, key=key, build=build)
        self.built, self.reused = self.built + (not reused), self.reused + reused
        self._on_event(
            BuildEvent(
                done=self.built + self.reused,
                total=self._total,
                artefact=path,
                bytes=made.file.bytes,
                seconds=time.perf_counter() - started,
                reused=reused,
            )
        )
        return made


def _build(
    request: BuildRequest,
    plans: list[TargetPlan],
    variant: Variant,
    checkpoint: "Checkpoint | None",
    started: float,
    on_event: Callable[[BuildEvent], None],
) -> BuildSummary:
    store = BundleStore(request.out)
    stages = [stage for network in NETWORKS for stage in network_stages(variant, network)]
    precisions = sorted({plan.precision for plan in plans})
    components = [(network, component) for network in NETWORKS for component in network_components(variant, network)]
    total = len(stages) * len(plans) + (len(components) * len(precisions) + 1 if checkpoint else 0)
    progress = _Progress(total, on_event)
    conventions, scheduler = _sampling(checkpoint)
    targets = {plan.name: _build_target(plan, variant, stages, request.sizes, store, progress) for plan in plans}
    weights: dict[str, dict[str, WeightFile]] = {}
    tokenizer = None
    if checkpoint is not None:
        for precision in precisions:
            weights[precision] = {
                component: _pack_component(checkpoint, network, component, precision, store, progress)
                for network, component in components
            }
        tokenizer = _copy_tokenizer(checkpoint, store, progress)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        wanrt_version=VERSION,
        variant=variant,
        conventions=conventions,
        scheduler=scheduler,
        targets=targets,
        weights=weights,
        tokenizer=tokenizer.file if tokenizer else None,
        source=request.checkpoint.resolve().name if request.checkpoint else "",
    )
    changed = store.finish(manifest)
    engines = [engine for target in manifest.targets.values() for engine in target.engines.values()]
    return BuildSummary(
        bundle=request.out,
        variant=variant.name,
        unchanged=not changed,
        engine_bytes=sum(engine.bytes for engine in engines),
        weight_bytes=sum(file.file.bytes for files in weights.values() for file in files.values()),
        num_built=progress.built,
        num_reused=progress.reused,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _build_target(
    plan: TargetPlan,
    variant: Variant,
    stages: list[StageSpec],
    sizes: SizeRange | None,
    store: BundleStore,
    progress: _Progress,
) -> Target:
    versions = {name: metadata.version(name) for name in plan.tools}
    source = _source_hash()

    def build(stage: StageSpec, file: Path) -> None:
        from export.graphs import stage_graph

        file.write_bytes(plan.build_engine(stage_graph(variant, stage), stage))

    engines = {}
    for stage in stages:
        key = content_key(
            stage=dataclasses.asdict(stage),
            arch=dataclasses.asdict(network_arch(variant, stage.network)),
            target=plan.name,
            precision=plan.precision,
            sizes=sizes and str(sizes),
            tools=versions,
            source=source,
        )
        path = f"engines/{plan.name}/{stage.name}{plan.suffix}"
        engines[stage.name] = progress.artefact(store, path, key=key, build=partial(build, stage)).file
    return Target(precision=plan.precision, sizes=sizes, engines=engines, tool_versions=versions)


def _pack_component(
    checkpoint: "Checkpoint", network: str, component: str, precision: Precision, store: BundleStore, progress: _Progress
) -> WeightFile:
    from export.pack import PackedTensor, pack_plan, write_weights

    variant, source = checkpoint.variant, checkpoint.components[component]
    plan = pack_plan(network_stages(variant, network), num_blocks=network_blocks(variant, network))
    if network == "text_encoder":
        table = (variant.text_encoder.vocab_size, variant.text_encoder.dim)
        plan.append(PackedTensor(TOKEN_EMBEDDING, (TOKEN_EMBEDDING,), table, DType.F32))

    def build(file: Path) -> dict[str, str]:
        whole, tensors = write_weights(source, plan, file)
        return {"": whole, **tensors}

    key = content_key(
        fingerprint=checkpoint.fingerprint,
        component=component,
        plan=[dataclasses.asdict(tensor) for tensor in plan],
        source=_source_hash(),
    )
    return progress.artefact(store, f"weights/{precision}/{component}.safetensors", key=key, build=build)


def _copy_tokenizer(checkpoint: "Checkpoint", store: BundleStore, progress: _Progress) -> WeightFile:
    digest = hashlib.sha256(checkpoint.tokenizer.read_bytes()).hexdigest()

    def copy(file: Path) -> None:
        shutil.copyfile(checkpoint.tokenizer, file)

    return progress.artefact(store, "tokenizer.json", key=content_key(tokenizer=digest), build=copy)


def _sampling(checkpoint: "Checkpoint | None") -> tuple[Conventions, DiffusersScheduler | None]:
    """Whose behaviour the bundle follows where the peers differ: the layout decides."""
    if checkpoint is None or checkpoint.scheduler_config is None:
        return Conventions.ORIGINAL, None
    return Conventions.DIFFUSERS, parse_scheduler_config(checkpoint.scheduler_config)


def _target_plan(name: str, precision: Precision | None) -> TargetPlan:
    if name not in TARGETS:
        raise RequestError(f"target {name!r}: there is {', '.join(TARGETS)}", hint="choose one of them with --target")
    target = TARGETS[name]
    if precision is not None and precision not in target.precisions:
        raise RequestError(
            f"precision {precision}: target {name} has {', '.join(target.precisions)}",
            hint="leave --precision out for the default",
        )
    return dataclasses.replace(target, precision=precision or target.precisions[0])


def _engines_only_variant(name: str | None) -> Variant:
    if name not in VARIANTS:
        raise RequestError(f"variant {name!r}: there is {', '.join(VARIANTS)}", hint="name one with --variant")
    return VARIANTS[name]


def _source_hash() -> str:
    """Hash of the code that makes graphs and engines: an engine made by other code is another engine."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in _SOURCE_FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
