"""One stage → one ONNX graph: traced with the dynamo exporter, weights as named inputs, checked against its spec.

A stage module is an ordinary `torch.nn.Module` whose parameters are the stage's weights and whose `forward` takes the stage's
inputs in order. It is traced over fake tensors, so no weight is ever allocated.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.functions import attach_functions
from runtime.errors import ExportError
from runtime.specs import Axis, DType, StageSpec, TensorSpec, resolve

OPSET = 23
TORCH_DTYPES = {
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.I64: torch.int64,
    DType.U8: torch.uint8,
}
ONNX_DTYPES = {
    DType.F32: onnx.TensorProto.FLOAT,
    DType.F16: onnx.TensorProto.FLOAT16,
    DType.BF16: onnx.TensorProto.BFLOAT16,
    DType.F8_E4M3: onnx.TensorProto.FLOAT8E4M3FN,
    DType.I64: onnx.TensorProto.INT64,
    DType.U8: onnx.TensorProto.UINT8,
}
_EXAMPLE_EXTENTS = (
    6,
    10,
    14,
    22,
)  # distinct and far from any fixed extent of 0 or 1, so that no extent is specialised by accident

log = logging.getLogger(__name__)


class _WeightsAsInputs(nn.Module):
    """Calls a stage with its parameters taken from the arguments."""

    def __init__(self, stage: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.__dict__["stage"] = stage  # not a submodule: its parameters must not become constants of the graph
        self.names = names

    def forward(self, inputs: list[Tensor], weights: list[Tensor]) -> Any:
        return torch.func.functional_call(self.__dict__["stage"], dict(zip(self.names, weights, strict=True)), tuple(inputs))


def trace_stage(module: nn.Module, spec: StageSpec) -> onnx.ModelProto:
    """Trace `module` into a model whose inputs are the spec's inputs and then its weights.

    Raises:
        ExportError: the parameters, the traced inputs, outputs, dtypes or symbolic extents differ from the spec, or the
            exporter failed.
    """
    _check_parameters(module, spec)
    extents = dict(zip(spec.symbols, _EXAMPLE_EXTENTS, strict=False))
    weight_names = [weight.name for weight in spec.weights]
    dynamic_inputs = [_dynamic_axes(tensor) for tensor in spec.inputs]
    wrapper = _WeightsAsInputs(module.eval(), weight_names).eval()
    try:
        with warnings.catch_warnings(), torch.no_grad(), _fake_tensors():
            warnings.simplefilter("ignore")  # about the exporter's own internals
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # warns once a stage that torchvision is absent
            inputs = [_example(tensor, extents) for tensor in spec.inputs]
            weights = [_example(tensor, extents) for tensor in spec.weights]
            program = torch.onnx.export(
                wrapper,
                (inputs, weights),
                dynamo=True,
                opset_version=OPSET,
                input_names=[tensor.name for tensor in (*spec.inputs, *spec.weights)],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=(dynamic_inputs, [None] * len(weights)),
                optimize=True,
                verbose=False,
            )
    except Exception as exc:  # the exporter raises many unrelated types
        raise ExportError(f"{spec.name}: the graph could not be captured: {str(exc).splitlines()[0]}") from exc
    assert program is not None
    model = program.model_proto
    attach_functions(model)
    _declare_shapes(model, spec)
    check_graph(model, spec)
    return model


def check_graph(model: onnx.ModelProto, spec: StageSpec) -> None:
    """Check a graph's inputs and outputs, and the graph itself, against its declared spec.

    Raises:
        ExportError: names, dtypes, ranks, fixed or symbolic extents differ, or the ONNX checker refuses the model.
    """
    for kind, values, tensors in (
        ("inputs", model.graph.input, (*spec.inputs, *spec.weights)),
        ("outputs", model.graph.output, spec.outputs),
    ):
        given = [_describe(value) for value in values]
        declared = [(tensor.name, ONNX_DTYPES[tensor.dtype], tensor.shape) for tensor in tensors]
        if given != declared:
            wrong = next((pair for pair in zip(given, declared, strict=False) if pair[0] != pair[1]), (given, declared))
            raise ExportError(f"{spec.name}: {kind} differ from the spec: graph has {wrong[0]}, spec has {wrong[1]}")
    if model.graph.initializer and max(tensor.ByteSize() for tensor in model.graph.initializer) > 1024:
        raise ExportError(f"{spec.name}: the graph carries a constant over 1 KiB; weights must be inputs")
    try:
        onnx.checker.check_model(model, full_check=False)
    except onnx.checker.ValidationError as exc:
        raise ExportError(f"{spec.name}: the ONNX checker refused the graph: {exc}") from exc


def _check_parameters(module: nn.Module, spec: StageSpec) -> None:
    given = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    declared = {weight.name: weight.shape for weight in spec.weights}
    if given != declared:
        different = sorted(name for name in given.keys() | declared.keys() if given.get(name) != declared.get(name))
        raise ExportError(f"{spec.name}: module and spec disagree on weights: {different[:4]}")


def _fake_tensors() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _example(tensor: TensorSpec, extents: Mapping[str, int]) -> Tensor:
    return torch.empty([resolve(axis, extents) for axis in tensor.shape], dtype=TORCH_DTYPES[tensor.dtype])


def _dynamic_axes(tensor: TensorSpec) -> dict[int, Any] | None:
    # AUTO lets related extents (a cache of 8*height) follow one another; one that gets specialised is caught by check_graph.
    axes = {i: torch.export.Dim.AUTO for i, axis in enumerate(tensor.shape) if isinstance(axis, str)}
    return axes or None


def _declare_shapes(model: onnx.ModelProto, spec: StageSpec) -> None:
    """Give the graph's symbolic extents the spec's names; a fixed extent that differs is left for `check_graph` to report."""
    for value, tensor in zip(
        (*model.graph.input, *model.graph.output), (*spec.inputs, *spec.weights, *spec.outputs), strict=True
    ):
        dims = value.type.tensor_type.shape.dim
        for dim, axis in zip(dims, tensor.shape, strict=False):
            if isinstance(axis, str) and not dim.HasField("dim_value"):
                dim.dim_param = axis


def _describe(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[Axis, ...]]:
    tensor_type = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor_type.shape.dim)
    return value.name, tensor_type.elem_type, shape
