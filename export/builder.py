"""Makes a bundle's artefacts one by one: engines, kernels, weights, tokenizer; what the store already has is left alone.

What a whole build consists of, and in which order, is `export.build`'s to say.
"""

import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from engines.plan import EngineOptions, TargetPlan, architectures, network_precisions
from engines.profiles import bounded, stage_profile
from engines.store import BundleStore, content_key
from runtime.bundle import file_sha256
from runtime.errors import BuildError
from runtime.geometry import SizeRange
from runtime.manifest import Artefact, Target, WeightFile
from runtime.precision import WideParts, stages_in_precision
from runtime.specs import Precision, StageSpec
from runtime.stages import network_arch, network_blocks, network_stages
from runtime.variants import Variant

if TYPE_CHECKING:  # torch is loaded only when a checkpoint is opened or a stage must really be traced
    import onnx

    from export.checkpoint import Checkpoint

_ENGINE_SOURCES = (
    "export",
    "engines",
    "runtime/stages",
    "runtime/specs.py",
    "runtime/precision.py",
    "runtime/backends/cuda/plan.py",
    "runtime/backends/engine_file.py",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What to build.

    Args:
        checkpoint: folder in either layout, or None for engines only.
        variant: name from `VARIANTS`; required without a checkpoint, detected with one.
        targets, precision: what to build for; `precision` None takes each target's default.
        sizes: the sizes the engines must take; None for any.
        architectures: GPU architectures to compile for; empty for all that a target has.
        fp8_wide: what of an fp8 transformer is bf16 all the same; None for the first of several blocks.
    """

    out: Path
    checkpoint: Path | None
    variant: str | None = None
    targets: tuple[str, ...] = ("cpu",)
    precision: Precision | None = None
    sizes: SizeRange | None = None
    architectures: tuple[str, ...] = ()
    fp8_wide: WideParts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEvent:
    """Progress: an artefact was finished, or found finished (`reused`)."""

    done: int
    total: int
    artefact: str
    bytes: int
    seconds: float
    reused: bool


class Builder:
    """One build under way: what it is made from, where it goes, what is done."""

    def __init__(
        self,
        store: BundleStore,
        request: BuildRequest,
        variant: Variant,
        checkpoint: "Checkpoint | None",
        *,
        fp8_wide: WideParts,
        total: int,
        on_event: Callable[[BuildEvent], None],
    ) -> None:
        self.built = self.reused = 0
        self._graphs: dict[str, onnx.ModelProto] = {}
        self._store = store
        self._request, self._variant, self._checkpoint, self._fp8_wide = request, variant, checkpoint, fp8_wide
        self._total, self._on_event = total, on_event

    def target(self, plan: TargetPlan) -> Target:
        """Every stage's engine of one target, and its kernels."""
        precisions = network_precisions(plan, self._variant, self._request.precision)
        versions = {name: _tool_version(name, plan) for name in plan.tools}
        chosen = architectures(plan, self._request.architectures, self._request.precision)
        sizes = self._request.sizes if plan.sizes is None else bounded(self._request.sizes)
        facts: dict[str, object] = {
            "target": plan.name,
            "tools": versions,
            "source": _source_hash(*_ENGINE_SOURCES),
        }
        return Target(
            precisions=precisions,
            sizes=sizes,
            engines={
                narrow.name: self._engine(plan, stage, narrow, self._options(plan, stage, chosen, sizes), facts)
                for network, precision in precisions.items()
                for stage in network_stages(self._variant, network)
                for narrow in self._narrowed(stage, precision)
            },
            kernels={
                architecture: self._kernels(plan, architecture, facts)
                for architecture in (chosen if plan.compile_kernels is not None else ())
            },
            tool_versions=versions,
        )

    def weights(self, network: str, component: str, precision: Precision) -> WeightFile:
        """One component's weights in one precision."""
        from export.pack import weight_plan, write_weights

        assert self._checkpoint is not None
        plan = weight_plan(self._variant, network, precision, wide=self._fp8_wide)
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
        digest = file_sha256(source)

        def copy(file: Path) -> None:
            shutil.copyfile(source, file)

        return self._artefact("tokenizer.json", key=content_key(tokenizer=digest), build=copy).file

    def _options(self, plan: TargetPlan, stage: StageSpec, chosen: tuple[str, ...], sizes: SizeRange | None) -> EngineOptions:
        """What a stage's engine is compiled for; nothing where engines take any size and the kernels are apart."""
        if plan.sizes is None or sizes is None:
            return EngineOptions()
        return EngineOptions(architectures=chosen, profile=stage_profile(stage, self._variant, sizes))

    def _narrowed(self, stage: StageSpec, precision: Precision) -> tuple[StageSpec, ...]:
        """What is built of a stage: in fp8 also its like for wide blocks."""
        num_blocks = network_blocks(self._variant, stage.network)
        return stages_in_precision([stage], precision, num_blocks=num_blocks, wide=self._fp8_wide)

    def _engine(
        self, plan: TargetPlan, stage: StageSpec, narrow: StageSpec, options: EngineOptions, facts: Mapping[str, object]
    ) -> Artefact:
        """The engine of a stage, declared in float32, in the precision of `narrow`; which blocks take it is not its concern."""
        network = plan.networks[stage.network]

        def build(file: Path) -> None:
            file.write_bytes(network.build_engine(self._graph(stage), narrow, options))

        arch = dataclasses.asdict(network_arch(self._variant, stage.network))
        declared = dataclasses.asdict(dataclasses.replace(narrow, blocks=None))
        key = content_key(stage=declared, arch=arch, options=dataclasses.asdict(options), **facts)
        return self._artefact(f"engines/{plan.name}/{narrow.name}{network.suffix}", key=key, build=build).file

    def _graph(self, stage: StageSpec) -> "onnx.ModelProto":
        """A stage's graph, traced once for all targets."""
        if stage.name not in self._graphs:
            from export.graphs import stage_graph

            self._graphs[stage.name] = stage_graph(self._variant, stage)
        return self._graphs[stage.name]

    def _kernels(self, plan: TargetPlan, architecture: str, facts: Mapping[str, object]) -> Artefact:
        compile_kernels = plan.compile_kernels
        assert compile_kernels is not None

        def build(file: Path) -> None:
            file.write_bytes(compile_kernels(architecture))

        path = f"engines/{plan.name}/kernels.{architecture}.cubin"
        return self._artefact(path, key=content_key(architecture=architecture, **facts), build=build).file

    def _artefact(self, path: str, *, key: str, build: Callable[[Path], dict[str, str] | None]) -> WeightFile:
        started = time.perf_counter()
        reused = self._store.has(path, key=key)
        made = self._store.artefact(path, key=key, build=build)
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


def _tool_version(name: str, plan: TargetPlan) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError as exc:
        raise BuildError(
            f"target {plan.name} is built with {name}, which is not installed",
            hint=f'`pip install "wanrt[{plan.name},export]"`',
        ) from exc


def _source_hash(*places: str) -> str:
    """Hash of the code that makes an artefact: one made by other code is another artefact."""
    root = Path(__file__).resolve().parent.parent
    files = [file for place in places for file in ([root / place] if (root / place).is_file() else (root / place).rglob("*.*"))]
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.suffix in (".py", ".cu", ".cuh")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
