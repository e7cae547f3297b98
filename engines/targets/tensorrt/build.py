"""A stage's graph → the file of its TensorRT engines: typed, parsed, compiled for each group of architectures."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from engines.precision.typed import typed_graph
from engines.targets.tensorrt.layers import BuildLog, BuiltLayer
from engines.targets.tensorrt.library import Library, Session
from engines.targets.tensorrt.network import make_network
from runtime.architectures import has_precision
from runtime.backends.engine_file import EngineHeader, EnginePart, Profile, pack_engines
from runtime.precision import is_self_attention
from runtime.specs import DType, Precision, StageSpec, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """One engine for a group of architectures, and what its builder said of it."""

    part: EnginePart
    data: bytes
    layers: tuple[BuiltLayer, ...]


def build_engines(
    library: Library, graph: onnx.ModelProto, stage: StageSpec, *, architectures: Sequence[str], profile: Profile
) -> bytes:
    """The file of a stage's engines (`runtime.backends.engine_file`).

    Args:
        graph: the traced graph, float32.
        stage: the stage in the precision to build.
        architectures: what to compile for, such as `sm_89`; of a library that builds for the GPU present, that one.
        profile: the extents it must take.

    Raises:
        BuildError: the library is not there, or refused; with the stage and the last lines of its log.
    """
    with Session(library) as session:
        version = session.version
        built = [
            build_engine(session, graph, stage, architectures=group, profile=profile, fp8_attention=fp8)
            for group, fp8 in _forms(library, stage, architectures)
        ]
    for engine in built:
        names, needs = " ".join(engine.part.architectures), engine.part.context_bytes / 2**30
        log.info("%s for %s: at most %.2f GiB of scratch memory, %d kernels", stage.name, names, needs, len(engine.layers))
    header = EngineHeader(
        stage=stage.name,
        library=library.distribution,
        library_version=version,
        profile=profile,
        parts=tuple(engine.part for engine in built),
    )
    return pack_engines(header, [engine.data for engine in built])


def build_engine(
    session: Session,
    graph: onnx.ModelProto,
    stage: StageSpec,
    *,
    architectures: Sequence[str],
    profile: Profile,
    fp8_attention: bool = False,
) -> BuiltEngine:
    """One engine for one group of architectures."""
    session.last_lines.clear()
    network = make_network(session, typed_graph(graph, stage, fp8_attention=fp8_attention), stage)
    config = _config(session, architectures)
    if config.add_optimization_profile(_profile(session, stage, profile)) < 0:
        raise session.refused(f"{stage.name}: {session.library.module} does not take the extents {profile}")
    record = BuildLog()
    session.listeners.append(record)
    try:
        data = session.builder.build_serialized_network(network, config)
    finally:
        session.listeners.remove(record)
    if data is None:
        raise session.refused(f"{stage.name}: {session.library.module} built no engine for {', '.join(architectures)}")
    engine = bytes(data)
    part = EnginePart(
        architectures=tuple(architectures),
        bytes=len(engine),
        context_bytes=_context_bytes(session, stage, engine, record),
        fp8_attention=fp8_attention,
    )
    return BuiltEngine(part=part, data=engine, layers=tuple(record.layers))


def groups(library: Library, architectures: Sequence[str]) -> list[tuple[str, ...]]:
    """The architectures asked for, those that share an engine together."""
    if not library.architecture_groups:
        return [tuple(architectures)]
    chosen = (tuple(name for name in group if name in architectures) for group in library.architecture_groups)
    return [group for group in chosen if group]


def _forms(library: Library, stage: StageSpec, architectures: Sequence[str]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The engines a stage's file holds: the architectures of each, and whether its attention is FP8."""
    for group in groups(library, architectures):
        yield group, False
        able = tuple(name for name in group if has_precision(name, Precision.FP8))
        if able and is_self_attention(stage) and all(tensor.dtype is DType.BF16 for tensor in stage.inputs):
            yield able, True


def _context_bytes(session: Session, stage: StageSpec, engine: bytes, record: BuildLog) -> int:
    """Scratch memory for the largest shapes, as the log said; else as the engine says once loaded, which takes its GPU."""
    if record.context_bytes is not None:
        return record.context_bytes
    loaded = session.trt.Runtime(session.logger).deserialize_cuda_engine(engine)
    if loaded is None:
        raise session.refused(f"{stage.name}: {session.library.module} did not say how much scratch memory its engine needs")
    return int(loaded.device_memory_size_v2)


def _config(session: Session, architectures: Sequence[str]) -> Any:
    trt, library = session.trt, session.library
    config = session.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names the kernels in the log; an engine grows by nothing
    config.clear_flag(trt.BuilderFlag.TF32)  # what is float32 here is so for its bits
    config.set_flag(trt.BuilderFlag.DISABLE_TIMING_CACHE)  # the same input, the same engine
    if library.architecture_groups:
        config.num_compute_capabilities = len(architectures)
        for index, name in enumerate(architectures):
            capability = getattr(trt.ComputeCapability, name.replace("_", "").upper())
            if not config.set_compute_capability(capability, index):
                raise session.refused(f"{library.module} {session.version} does not build for {name}")
    return config


def _profile(session: Session, stage: StageSpec, extents: Profile) -> Any:
    """The library's own profile; inputs without symbols need none."""
    profile = session.builder.create_optimization_profile()
    ends = [{name: getattr(extent, end) for name, extent in extents.items()} for end in ("smallest", "usual", "largest")]
    for tensor in stage.inputs:
        if any(isinstance(axis, str) for axis in tensor.shape):
            shapes = [tuple(resolve(axis, end) for axis in tensor.shape) for end in ends]
            profile.set_shape(tensor.name, *shapes)
    return profile
