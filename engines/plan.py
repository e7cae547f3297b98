"""The table of targets: what each makes of which network, in which precisions, with which tools."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from engines.profiles import DEFAULT_SIZES
from engines.targets.tensorrt.library import RTX, TENSORRT, architecture_present
from runtime.architectures import has_precision
from runtime.backends.engine_file import EngineHeader, Profile, read_file_header
from runtime.errors import RequestError
from runtime.geometry import SizeRange
from runtime.specs import Precision, StageSpec
from runtime.stages import NETWORKS, networks
from runtime.variants import Variant

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine is built for; only targets that compile it look here."""

    architectures: tuple[str, ...] = ()
    profile: Profile = field(default_factory=dict)


class BuildEngine(Protocol):
    """Takes the traced graph, float32, and the stage in the precision to build; gives the engine's file."""

    def __call__(self, graph: "onnx.ModelProto", stage: StageSpec, options: EngineOptions = ..., /) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """How engines of one network are made. `precisions` lists what there is, the default first."""

    precisions: tuple[Precision, ...]
    suffix: str
    build_engine: BuildEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPlan:
    """How a target's engines are made.

    `architectures` are those it can compile for; empty when nothing it makes depends on one. A target that builds only for the GPU
    present finds it with `find_architecture` instead.
    """

    name: str
    networks: dict[str, NetworkPlan]
    tools: tuple[str, ...]  # distributions whose versions decide an engine's content
    architectures: tuple[str, ...] = ()
    compile_kernels: Callable[[str], bytes] | None = None
    """Makes the kernels that all its engines share; a target without compiles them into each engine."""
    find_architecture: Callable[[], str] | None = None
    has_precision: Callable[[str, Precision], bool] = lambda architecture, precision: True
    """Whether an architecture computes in a precision."""
    sizes: SizeRange | None = None
    """What its engines are built for when nothing is asked for; None: they take any size."""
    header: Callable[[Path], EngineHeader] | None = None
    """What an engine file says of itself, such as its scratch memory; None where engines say nothing."""

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What can be asked for: the transformer's precisions."""
        return self.networks["transformer"].precisions


def network_precisions(plan: TargetPlan, variant: Variant, asked: Precision | None) -> dict[str, Precision]:
    """The precision of each of a variant's networks when `asked` is asked for: networks that lack it keep their default."""
    return {
        name: asked if asked is not None and asked in plan.networks[name].precisions else plan.networks[name].precisions[0]
        for name in networks(variant)
    }


def architectures(plan: TargetPlan, asked: tuple[str, ...], precision: Precision | None) -> tuple[str, ...]:
    """The architectures a target compiles for: of those asked for, or of all, the ones that have the precision.

    Raises:
        RequestError: it has none of those asked for, or one of them or the GPU present does not have the precision.
        BuildError: the GPU present cannot be told.
    """
    known = (plan.find_architecture(),) if plan.find_architecture is not None else plan.architectures
    wanted = precision if precision in plan.precisions else plan.precisions[0]
    possible = tuple(name for name in known if plan.has_precision(name, wanted))
    if known and not possible:
        raise RequestError(
            f"precision {wanted}: target {plan.name} builds for the GPU present, {known[0]}, which does not have it",
            hint="choose another with --precision: fp16 runs everywhere",
        )
    chosen = tuple(name for name in possible if name in asked or not asked)
    lacking = [name for name in asked if name in known and name not in possible]
    if lacking or (possible and not chosen):
        name = (lacking or asked)[0]
        others = ", ".join(other for other in plan.precisions if name in lacking and plan.has_precision(name, other))
        raise RequestError(
            f"architecture {name}: target {plan.name} has {', '.join(possible)} in {wanted}",
            hint="leave --arch out for all" + (f"; --precision {others} has {name}" if others else ""),
        )
    return chosen


_ANY = EngineOptions()


def _build_onnx(graph: "onnx.ModelProto", stage: StageSpec, options: EngineOptions = _ANY) -> bytes:
    from engines.targets.cpu import build_engine

    return build_engine(graph, stage)


def _build_emulated(graph: "onnx.ModelProto", stage: StageSpec, options: EngineOptions = _ANY) -> bytes:
    from engines.targets.emulated import build_engine

    return build_engine(graph, stage)


def _build_cuda_plan(graph: "onnx.ModelProto", stage: StageSpec, options: EngineOptions = _ANY) -> bytes:
    from engines.targets.cuda.lower import lower_stage
    from runtime.strict_json import encode

    return encode(lower_stage(graph, stage)).encode()


def _compile_cuda_kernels(architecture: str) -> bytes:
    from engines.targets.cuda.compile import compile_kernels

    return compile_kernels(architecture)


def _build_rtx(graph: "onnx.ModelProto", stage: StageSpec, options: EngineOptions = _ANY) -> bytes:
    from engines.targets.tensorrt.build import build_engines

    return build_engines(RTX, graph, stage, architectures=options.architectures, profile=options.profile)


def _build_tensorrt(graph: "onnx.ModelProto", stage: StageSpec, options: EngineOptions = _ANY) -> bytes:
    from engines.targets.tensorrt.build import build_engines

    return build_engines(TENSORRT, graph, stage, architectures=options.architectures, profile=options.profile)


def _tensorrt_networks(build_engine: BuildEngine) -> dict[str, NetworkPlan]:
    wide = NetworkPlan(precisions=(Precision.BF16, Precision.FP16), suffix=".engine", build_engine=build_engine)
    return {
        **dict.fromkeys(NETWORKS, wide),
        "transformer": replace(wide, precisions=(Precision.BF16, Precision.FP16, Precision.FP8)),
    }


_ONNX_FP32 = NetworkPlan(precisions=(Precision.FP32,), suffix=".onnx", build_engine=_build_onnx)
_CUDA_BF16 = NetworkPlan(precisions=(Precision.BF16,), suffix=".plan.json", build_engine=_build_cuda_plan)
_EMULATED = NetworkPlan(precisions=(Precision.BF16, Precision.FP16), suffix=".onnx", build_engine=_build_emulated)
_TRACERS = ("torch", "onnx", "onnxscript")

TARGETS = {
    plan.name: plan
    for plan in (
        TargetPlan(
            name="cpu",
            networks=dict.fromkeys(NETWORKS, _ONNX_FP32),
            tools=_TRACERS,
        ),
        TargetPlan(
            name="emulated",
            networks={
                **dict.fromkeys(NETWORKS, _EMULATED),
                "transformer": replace(_EMULATED, precisions=(Precision.BF16, Precision.FP16, Precision.FP8)),
            },
            tools=_TRACERS,
        ),
        TargetPlan(
            name="cuda",
            networks={
                **dict.fromkeys(NETWORKS, _CUDA_BF16),
                "transformer": NetworkPlan(
                    precisions=(Precision.BF16, Precision.FP8), suffix=".plan.json", build_engine=_build_cuda_plan
                ),
            },
            tools=(*_TRACERS, "cuda-core", "nvidia-cuda-nvrtc"),
            architectures=("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120"),
            has_precision=has_precision,
            compile_kernels=_compile_cuda_kernels,
        ),
        TargetPlan(
            name="rtx",
            networks=_tensorrt_networks(_build_rtx),
            tools=(*_TRACERS, "tensorrt-rtx"),
            architectures=tuple(name for group in RTX.architecture_groups for name in group),
            has_precision=has_precision,
            sizes=DEFAULT_SIZES,
            header=read_file_header,
        ),
        TargetPlan(
            name="tensorrt",
            networks=_tensorrt_networks(_build_tensorrt),
            tools=(*_TRACERS, "tensorrt"),
            find_architecture=partial(architecture_present, TENSORRT),
            has_precision=has_precision,
            sizes=DEFAULT_SIZES,
            header=read_file_header,
        ),
    )
}
