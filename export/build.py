"""Builds a bundle: a checkpoint's weights packed, every stage traced and made an engine, what is already there left alone."""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from engines.plan import TARGETS, TargetPlan, architectures, network_precisions
from engines.store import BundleStore, content_key
from runtime.bundle import SCHEMA_VERSION, Artefact, Manifest, Target, WeightFile
from runtime.errors import ExportError, RequestError, WanError
from runtime.geometry import SizeRange, check_size
from runtime.precision import in_precision
from runtime.report import peak_memory_bytes
from runtime.schedulers import Conventions, DiffusersScheduler, parse_scheduler_config
from runtime.specs import DType, Precision, StageSpec
from runtime.stages import NETWORKS, network_arch, network_blocks, network_components, network_stages
from runtime.stages.text_encoder import TOKEN_EMBEDDING
from runtime.variants import VARIANTS, Variant
from runtime.version import VERSION

if TYPE_CHECKING:  # torch is loaded only when a checkpoint is opened or a stage must really be traced
    from export.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What to build.

    Args:
        checkpoint: folder in either layout, or None for engines only.
        variant: name from `VARIANTS`; required without a checkpoint, detected with one.
        targets, precision: what to build for; `precision` None takes each target's default.
        sizes: the sizes the engines must take; None for any.
        architectures: GPU architectures to compile kernels for; empty for all that a target has.
    """

    out: Path
    checkpoint: Path | None
    variant: str | None = None
    targets: tuple[str, ...] = ("cpu",)
    precision: Precision | None = None
    sizes: SizeRange | None = None
    architectures: tuple[str, ...] = ()


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
    plans = [_target_plan(name, request) for name in request.targets]
    if request.checkpoint is None:
        variant = _engines_only_variant(request.variant)
        with BundleStore(request.out) as store:
            return _build(store, request, plans, variant, None, started, on_event)
    from export.checkpoint import open_checkpoint

    with open_checkpoint(request.checkpoint, variant=request.variant) as checkpoint, BundleStore(request.out) as store:
        return _build(store, request, plans, checkpoint.variant, checkpoint, started, on_event)


_ENGINE_SOURCES = (
    "export",
    "engines",
    "runtime/stages",
    "runtime/specs.py",
    "runtime/precision.py",
    "runtime/backends/cuda/plan.py",
)


class _Builder:
    """One build under way: what it is made from, where it goes, what is done."""

    def __init__(
        self,
        store: BundleStore,
        request: BuildRequest,
        variant: Variant,
        checkpoint: "Checkpoint | None",
        *,
        total: int,
        on_event: Callable[[BuildEvent], None],
    ) -> None:
        self.built = self.reused = 0
        self.store = store
        self._request, self._variant, self._checkpoint = request, variant, checkpoint
        self._total, self._on_event = total, on_event

    def target(self, plan: TargetPlan) -> Target:
        """Every stage's engine of one target, and its kernels."""
        precisions = network_precisions(plan, self._request.precision)
        versions = {name: metadata.version(name) for name in plan.tools}
        facts: dict[str, object] = {
            "target": plan.name,
            "tools": versions,
            "source": _source_hash(*_ENGINE_SOURCES),
        }
        return Target(
            precisions=precisions,
            sizes=self._request.sizes,
            engines={
                stage.name: self._engine(plan, stage, precisions[network], facts)
                for network in NETWORKS
                for stage in network_stages(self._variant, network)
            },
            kernels={architecture: self._kernels(plan, architecture, facts) for architecture in self._architectures(plan)},
            tool_versions=versions,
        )

    def weights(self, network: str, component: str, precision: Precision) -> WeightFile:
        """One component's weights in one precision."""
        from export.pack import PackedTensor, pack_plan, write_weights

        assert self._checkpoint is not None
        stages = [in_precision(stage, precision) for stage in network_stages(self._variant, network)]
        plan = pack_plan(stages, num_blocks=network_blocks(self._variant, network))
        if network == "text_encoder":
            table = (self._variant.text_encoder.vocab_size, self._variant.text_encoder.dim)
            plan.append(PackedTensor(TOKEN_EMBEDDING, (TOKEN_EMBEDDING,), table, DType.F32))
        source = self._checkpoint.components[component]

        def build(file: Path) -> dict[str, str]:
            whole, tensors = write_weights(source, plan, file)
            return {"": whole, **tensors}

        key = content_key(
            fingerprint=source.fingerprint(),
            layout=self._checkpoint.layout,
            component=component,
            plan=[dataclasses.asdict(tensor) for tensor in plan],
            source=_source_hash("export/pack.py", "runtime/precision.py"),
        )
        return self._artefact(f"weights/{precision}/{component}.safetensors", key=key, build=build)

    def tokenizer(self) -> Artefact:
        """The checkpoint's tokenizer, copied."""
        assert self._checkpoint is not None
        source = self._checkpoint.tokenizer
        digest = hashlib.sha256(source.read_bytes()).hexdigest()

        def copy(file: Path) -> None:
            shutil.copyfile(source, file)

        return self._artefact("tokenizer.json", key=content_key(tokenizer=digest), build=copy).file

    def _engine(self, plan: TargetPlan, stage: StageSpec, precision: Precision, facts: Mapping[str, object]) -> Artefact:
        network = plan.networks[stage.network]

        def build(file: Path) -> None:
            from export.graphs import stage_graph

            file.write_bytes(network.build_engine(stage_graph(self._variant, stage), in_precision(stage, precision)))

        arch = dataclasses.asdict(network_arch(self._variant, stage.network))
        key = content_key(stage=dataclasses.asdict(stage), arch=arch, precision=precision, **facts)
        return self._artefact(f"engines/{plan.name}/{stage.name}{network.suffix}", key=key, build=build).file

    def _kernels(self, plan: TargetPlan, architecture: str, facts: Mapping[str, object]) -> Artefact:
        compile_kernels = plan.compile_kernels
        assert compile_kernels is not None

        def build(file: Path) -> None:
            file.write_bytes(compile_kernels(architecture))

        path = f"engines/{plan.name}/kernels.{architecture}.cubin"
        return self._artefact(path, key=content_key(architecture=architecture, **facts), build=build).file

    def _architectures(self, plan: TargetPlan) -> tuple[str, ...]:
        return architectures(plan, self._request.architectures)

    def _artefact(self, path: str, *, key: str, build: Callable[[Path], dict[str, str] | None]) -> WeightFile:
        started = time.perf_counter()
        reused = self.store.has(path, key=key)
        made = self.store.artefact(path, key=key, build=build)
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
            for network, precision in network_precisions(plan, request.precision).items()
            for component in network_components(variant, network)
        }
    )
    stages = sum(len(network_stages(variant, network)) for network in NETWORKS)
    total = sum(stages + len(architectures(plan, request.architectures)) for plan in plans)
    total += len(packs) + 1 if checkpoint else 0
    builder = _Builder(store, request, variant, checkpoint, total=total, on_event=on_event)
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
        weights=weights,
        tokenizer=builder.tokenizer() if checkpoint else None,
        source=_unicode(request.checkpoint.resolve().name) if request.checkpoint else "",
    )
    changed = builder.store.finish(manifest)
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
    )


def _sampling(checkpoint: "Checkpoint | None") -> tuple[Conventions, DiffusersScheduler | None]:
    """Whose behaviour the bundle follows where the peers differ: the layout decides."""
    if checkpoint is None or checkpoint.scheduler_config is None:
        return Conventions.ORIGINAL, None
    try:
        return Conventions.DIFFUSERS, parse_scheduler_config(checkpoint.scheduler_config)
    except WanError as error:
        raise ExportError(error.message, hint=error.hint) from error


def _target_plan(name: str, request: BuildRequest) -> TargetPlan:
    if name not in TARGETS:
        raise RequestError(f"target {name!r}: there is {', '.join(TARGETS)}", hint="choose one of them with --target")
    plan, precision = TARGETS[name], request.precision
    if precision is not None and precision not in plan.precisions:
        raise RequestError(
            f"precision {precision}: target {name} has {', '.join(plan.precisions)}",
            hint="leave --precision out for the default",
        )
    if unknown := [architecture for architecture in request.architectures if architecture not in plan.architectures]:
        possible = ", ".join(plan.architectures) or "none: it compiles no kernels"
        raise RequestError(f"architecture {unknown[0]}: target {name} has {possible}", hint="leave --arch out for all")
    return plan


def _engines_only_variant(name: str | None) -> Variant:
    if name not in VARIANTS:
        raise RequestError(f"variant {name!r}: there is {', '.join(VARIANTS)}", hint="name one with --variant")
    return VARIANTS[name]


def _unicode(name: str) -> str:
    """A file's name as text; bytes of it that are not UTF-8 become question marks."""
    return name.encode(errors="replace").decode()


def _source_hash(*places: str) -> str:
    """Hash of the code that makes an artefact: one made by other code is another artefact."""
    root = Path(__file__).resolve().parent.parent
    files = [file for place in places for file in ([root / place] if (root / place).is_file() else (root / place).rglob("*.*"))]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.suffix in (".py", ".cu", ".cuh")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
