"""The table of targets: what each makes of which network, in which precisions, with which tools."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.specs import Precision, StageSpec
from runtime.stages import NETWORKS, networks
from runtime.variants import Variant

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPlan:
    """How engines of one network are made. `precisions` lists what there is, the default first."""

    precisions: tuple[Precision, ...]
    suffix: str
    build_engine: Callable[["onnx.ModelProto", StageSpec], bytes]
    """Takes the traced graph, float32, and the stage in the precision to build."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPlan:
    """How a target's engines are made. `architectures` are those it can compile kernels for; empty when it has none of its own."""

    name: str
    networks: dict[str, NetworkPlan]
    tools: tuple[str, ...]  # distributions whose versions decide an engine's content
    architectures: tuple[str, ...] = ()
    compile_kernels: Callable[[str], bytes] | None = None

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


def architectures(plan: TargetPlan, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The architectures to compile a target's kernels for: those asked for, or all it has."""
    return tuple(architecture for architecture in plan.architectures if architecture in asked or not asked)


def _build_onnx(graph: "onnx.ModelProto", stage: StageSpec) -> bytes:
    from engines.targets.cpu import build_engine

    return build_engine(graph, stage)


def _build_cuda_plan(graph: "onnx.ModelProto", stage: StageSpec) -> bytes:
    from engines.targets.cuda.lower import lower_stage
    from runtime.strict_json import encode

    return encode(lower_stage(graph, stage)).encode()


def _compile_cuda_kernels(architecture: str) -> bytes:
    from engines.targets.cuda.compile import compile_kernels

    return compile_kernels(architecture)


_ONNX_FP32 = NetworkPlan(precisions=(Precision.FP32,), suffix=".onnx", build_engine=_build_onnx)
_CUDA_BF16 = NetworkPlan(precisions=(Precision.BF16,), suffix=".plan.json", build_engine=_build_cuda_plan)
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
            name="cuda",
            networks={
                **dict.fromkeys(NETWORKS, _CUDA_BF16),
                "transformer": NetworkPlan(
                    precisions=(Precision.BF16, Precision.FP8), suffix=".plan.json", build_engine=_build_cuda_plan
                ),
            },
            tools=(*_TRACERS, "cuda-core", "nvidia-cuda-nvrtc"),
            architectures=("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"),
            compile_kernels=_compile_cuda_kernels,
        ),
    )
}
