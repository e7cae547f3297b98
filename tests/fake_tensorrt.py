"""A double of `tensorrt_rtx`, as far as the runtime uses it, on a GPU whose memory is the host's: its engines are ONNX models.

Whatever is queued runs later, in any order that the events allow, and reads what then lies at the addresses it was given.
"""

import ctypes
import json
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from runtime.specs import resolve
from tests.fake_gpu import ComputingGpu

VERSION = "1.7.1.116"
BITS = {  # the library's name of a type → ONNX's number, bits in NumPy
    "FLOAT": (1, np.float32),
    "HALF": (10, np.float16),
    "BF16": (16, np.uint16),
    "FP8": (17, np.uint8),
    "INT64": (7, np.int64),
    "UINT8": (2, np.uint8),
}


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity


class EngineValidity(Enum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 2
    FP8 = 3
    INT64 = 4
    UINT8 = 5


class ExecutionContextAllocationStrategy(Enum):
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(Enum):
    EAGER = 1


class ProfilingVerbosity(Enum):
    NONE = 1


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class IRuntimeCache:
    """Counts the shapes compiled; only a blob that it wrote itself is taken."""

    def __init__(self) -> None:
        self.entries: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        text = bytes(blob).decode(errors="replace")
        if not text.startswith("compiled:"):
            return False
        self.entries |= set(text.removeprefix("compiled:").split("|"))
        return True

    def serialize(self) -> bytes:
        return f"compiled:{'|'.join(sorted(self.entries))}".encode()


class IRuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self) -> None:
        self.cache: IRuntimeCache | None = None
        self.strategy: Any = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class ICudaEngine:
    def __init__(self, library: "Library", data: bytes) -> None:
        head, _, model = data.partition(b"\n")
        facts = json.loads(head)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.library, self.name = library, facts["name"]
        self.tensors: dict[str, tuple[str, str, list[int]]] = facts["tensors"]
        self.axes: dict[str, list[int | str]] = facts["axes"]
        self.limits: dict[str, tuple[list[int], list[int]]] = facts["limits"]
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.num_io_tensors = len(self.tensors)
        self.device_memory_size_v2 = scratch({name: most for name, (_, most) in self.limits.items()})

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self.tensors[name][0]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.tensors[name][1]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][2])

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> "IExecutionContext":
        assert runtime_config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        assert runtime_config.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.EAGER
        return IExecutionContext(self, runtime_config.cache)


class IExecutionContext:
    nvtx_verbosity: Any = None

    def __init__(self, engine: ICudaEngine, cache: IRuntimeCache | None) -> None:
        self._engine, self._cache = engine, cache
        fixed = {name: tuple(shape) for name, (mode, _, shape) in engine.tensors.items() if mode == "INPUT" and -1 not in shape}
        self._shapes: dict[str, tuple[int, ...]] = fixed
        self._needed: int | None = None if engine.limits else engine.device_memory_size_v2
        self._pointers: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, most = self._engine.limits[name]
        self._shapes[name], self._needed = shape, None
        return len(shape) == len(most) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        axes = self._engine.axes
        extents = {
            axis: extent
            for given, shape in self._shapes.items()
            for axis, extent in zip(axes[given], shape, strict=True)
            if isinstance(axis, str)
        }
        return tuple(resolve(axis, extents) for axis in axes[name])

    def update_device_memory_size_for_shapes(self) -> int:
        assert self._engine.limits.keys() <= self._shapes.keys(), "all input shapes come before"
        self._needed, self._scratch = scratch({name: self._shapes[name] for name in self._engine.limits}), None
        return self._needed

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._pointers[name] = memory
        return name in self._engine.tensors and memory % 256 == 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._scratch = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, gpu = self._engine, self._engine.library.gpu
        assert stream_handle == gpu.stream and self.nvtx_verbosity is ProfilingVerbosity.NONE
        assert self._needed is not None and self._scratch is not None and self._scratch[1] >= self._needed
        assert self._pointers.keys() == engine.tensors.keys()
        if self._cache is not None:
            self._cache.entries.add(f"{engine.name}{sorted(self._shapes.items())}")
        shapes, pointers, (start, size) = dict(self._shapes), dict(self._pointers), self._scratch
        gpu.events.append(engine.name)

        def compute() -> None:
            gpu.write(start, np.full(size, 0xFF, np.uint8))  # NaN, whatever reads it
            given = {}
            for name, shape in shapes.items():
                number, bits = BITS[engine.tensors[name][1]]
                given[name] = OrtValue.ortvalue_from_numpy_with_onnx_type(gpu.read(pointers[name], shape, bits), number)
            outputs = [name for name, (mode, _, _) in engine.tensors.items() if mode == "OUTPUT"]
            for name, made in zip(outputs, engine.session.run_with_ort_values(outputs, given), strict=True):
                found = np.empty(tuple(made.shape()), BITS[engine.tensors[name][1]][1])
                ctypes.memmove(found.ctypes.data, made.data_ptr(), found.nbytes)
                gpu.write(pointers[name], found)

        gpu.run(compute)
        return True


class Runtime:
    library: "Library"

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def get_engine_validity(self, buffer: memoryview) -> tuple[EngineValidity, int]:
        found = self.library.diagnosis
        return (EngineValidity.INVALID if found else EngineValidity.VALID), found

    def deserialize_cuda_engine(self, serialized_engine: memoryview) -> ICudaEngine | None:
        try:
            return ICudaEngine(self.library, bytes(serialized_engine))
        except Exception as error:
            self.logger.log(Severity.ERROR, f"cannot deserialise: {error}")
            return None


class Library(ModuleType):
    """The module itself, over one GPU."""

    def __init__(self, gpu: ComputingGpu) -> None:
        super().__init__("tensorrt_rtx")
        self.gpu = gpu
        self.diagnosis = 0
        """What it says of every engine."""
        self.__version__ = VERSION
        self.Runtime: Any = type("Runtime", (Runtime,), {"library": self})
        for kind in DOUBLES:
            if kind is not Runtime:
                setattr(self, kind.__name__, kind)


DOUBLES: tuple[Any, ...] = (
    DataType,
    DynamicShapesKernelSpecializationStrategy,
    EngineInvalidityDiagnostics,
    EngineValidity,
    ExecutionContextAllocationStrategy,
    ICudaEngine,
    IExecutionContext,
    ILogger,
    IRuntimeCache,
    IRuntimeConfig,
    ProfilingVerbosity,
    Runtime,
    TensorIOMode,
    TensorLocation,
)
"""What stands for the library's classes."""


def scratch(shapes: Mapping[str, Sequence[int]]) -> int:
    """Scratch memory that the double wants: more than a small array, and more for larger shapes."""
    return (2 << 20) + 4 * sum(prod(shape) for shape in shapes.values())
