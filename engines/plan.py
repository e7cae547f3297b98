"""The table of targets: which precisions each builds, with which tools, and how a graph becomes its engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.specs import Precision, StageSpec

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetPlan:
    """How engines of one target are made. `precisions` lists what it can do, its default first; `precision` is the one chosen."""

    name: str
    precisions: tuple[Precision, ...]
    precision: Precision
    suffix: str
    tools: tuple[str, ...]  # distributions whose versions decide an engine's content
    build_engine: Callable[["onnx.ModelProto", StageSpec], bytes]


def _build_cpu(graph: "onnx.ModelProto", stage: StageSpec) -> bytes:
    from engines.targets.cpu import build_engine

    return build_engine(graph, stage)


TARGETS = {
    plan.name: plan
    for plan in (
        TargetPlan(
            name="cpu",
            precisions=(Precision.FP32,),
            precision=Precision.FP32,
            suffix=".onnx",
            tools=("torch", "onnx", "onnxscript"),
            build_engine=_build_cpu,
        ),
    )
}
