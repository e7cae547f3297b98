"""A machine that builds and runs `rtx` on the double of `tests.fake_tensorrt`.

What an engine of the double says of its tensors is what the library's own network says of them, where the library is installed.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from engines.precision.emulated import emulated_graph
from engines.precision.typed import typed_graph
from engines.targets.tensorrt.build import BuiltEngine
from engines.targets.tensorrt.library import RTX, Session
from engines.targets.tensorrt.network import make_network
from runtime.backends.engine_file import EnginePart, Profile
from runtime.specs import StageSpec, resolve
from tests.fake_gpu import ComputingGpu
from tests.fake_tensorrt import BITS, VERSION, Library, scratch
from tests.stand_ins import package

_NAMES = {number: name for name, (number, _) in BITS.items()}


class Machine:
    """A machine with the double in place of the library and its GPU."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        for name in ("cuda", "cuda.bindings"):
            patch.setitem(sys.modules, name, package(name))
        self.plug(ComputingGpu())
        patch.setattr("runtime.backends.cuda.device.find_obstacle", lambda: None)
        patch.setattr("runtime.backends.tensorrt.engine.driver_version", lambda: 13010)
        patch.setattr("runtime.backends.tensorrt.engine.Readback", Readback)
        patch.setattr("runtime.backends.tensorrt.engine.Device", lambda: self.gpu)
        patch.setattr("runtime.backends.cuda.device.find_architecture", lambda: self.gpu.arch)
        patch.setattr("runtime.backends.cuda.copies.CopyStream", lambda gpu: gpu)
        patch.setattr("runtime.backends.cuda.session.free_host_bytes", lambda: 1 << 40)

    def plug(self, gpu: ComputingGpu) -> None:
        """Put another GPU in."""
        self.gpu, self.library = gpu, Library(gpu)
        self.library.__spec__ = ModuleSpec(RTX.module, None)  # what says that a module is installed
        self._patch.setitem(sys.modules, "tensorrt_rtx", self.library)


class Readback:
    def __init__(self, gpu: ComputingGpu) -> None:
        self.fetch = gpu.fetch

    def close(self) -> None: ...


@contextmanager
def building() -> Iterator[None]:
    """Engines of `rtx` are the double's. Files, forms and headers are made as ever."""
    kept: dict[Any, tuple[bytes, int]] = {}

    def build_engine(
        session: Any,
        graph: onnx.ModelProto,
        stage: StageSpec,
        *,
        architectures: Sequence[str],
        profile: Profile,
        fp8_attention: bool = False,
    ) -> BuiltEngine:
        if (stage, fp8_attention) not in kept:
            kept[stage, fp8_attention] = make_engine(session, graph, stage, profile, fp8_attention=fp8_attention)
        data, most = kept[stage, fp8_attention]
        part = EnginePart(architectures=tuple(architectures), bytes=len(data), context_bytes=most, fp8_attention=fp8_attention)
        return BuiltEngine(part=part, data=data, layers=())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.builder._tool_version", lambda name, plan: "any")
        patch.setattr("engines.targets.tensorrt.build.build_engine", build_engine)
        if find_spec(RTX.module) is None:
            patch.setattr(
                "engines.targets.tensorrt.build.Session", lambda library: nullcontext(SimpleNamespace(version=VERSION))
            )
        else:
            library = import_module(RTX.module)  # now, while it is the library itself
            patch.setattr("engines.targets.tensorrt.library.import_module", lambda name: library)
        yield


@contextmanager
def on_a_double() -> Iterator[Machine]:
    """Build and run `rtx` on the double."""
    with building(), pytest.MonkeyPatch.context() as patch:
        yield Machine(patch)


def make_engine(
    session: Any, graph: onnx.ModelProto, stage: StageSpec, profile: Profile, *, fp8_attention: bool
) -> tuple[bytes, int]:
    """The double's engine of a stage, and the most scratch memory it takes."""
    typed = typed_graph(graph, stage, fp8_attention=fp8_attention)
    model = emulated_graph(typed)
    limits = {}
    for tensor in stage.inputs:
        if any(isinstance(axis, str) for axis in tensor.shape):
            ends = [{name: getattr(extent, end) for name, extent in profile.items()} for end in ("smallest", "largest")]
            limits[tensor.name] = [[resolve(axis, end) for axis in tensor.shape] for end in ends]
    tensors = _described_by_library(session, typed, stage) if isinstance(session, Session) else _described(model)
    axes = {tensor.name: tensor.shape for tensor in (*stage.inputs, *stage.outputs, *stage.weights)}
    facts = {"name": stage.name, "tensors": tensors, "axes": axes, "limits": limits}
    most = scratch({name: ends[1] for name, ends in limits.items()})
    return json.dumps(facts).encode() + b"\n" + model.SerializeToString(), most


def _described(model: onnx.ModelProto) -> dict[str, Any]:
    found = {}
    for mode, values in (("INPUT", model.graph.input), ("OUTPUT", model.graph.output)):
        for value in values:
            kind = value.type.tensor_type
            shape = [axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim]
            found[value.name] = mode, _NAMES[kind.elem_type], shape
    return found


def _described_by_library(session: Any, typed: onnx.ModelProto, stage: StageSpec) -> dict[str, Any]:
    network = make_network(session, typed, stage)
    tensors = [("INPUT", network.get_input(index)) for index in range(network.num_inputs)]
    tensors += [("OUTPUT", network.get_output(index)) for index in range(network.num_outputs)]
    return {tensor.name: (mode, tensor.dtype.name, list(tensor.shape)) for mode, tensor in tensors}
