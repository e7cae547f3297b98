"""Stands in for the module `cudnn`, nvidia-cudnn-frontend: attention in bf16, fp16 and fp8, and convolutions with bias and residual.

Sums are float32 in PyTorch's order; attention's weights are rounded to the operands' type before they meet the values, as the library's
fused kernels do. Every graph has one candidate. Limits of the library's kernels are not known to it.
"""

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, Self

import torch

from runtime.backends.base import Array
from tests.emulator.memory import Memory
from tests.emulator.numbers import Kind, read, write
from tests.emulator.streams import Streams

WORKSPACE_BYTES = 1 << 20
_QUERIES_AT_ONCE = 1024


class HeuristicMode(IntEnum):
    A = 0
    FALLBACK = 1


class GraphNotSupportedError(Exception):
    """Never raised here; the runtime catches it by name."""


class Tensor:
    """What a graph reads or writes. Extents and strides of results are set afterwards."""

    def __init__(self, *, name: str = "", uid: int = 0, data_type: Kind = Kind.FLOAT, dim: Any = (), stride: Any = ()) -> None:
        self.uid, self.kind, self.shape, self.strides = uid, data_type, tuple(dim), tuple(stride)

    def set_output(self, is_output: bool) -> Self:
        return self

    def set_uid(self, uid: int) -> Self:
        self.uid = uid
        return self

    def set_data_type(self, kind: Kind) -> Self:
        self.kind = kind
        return self

    def set_dim(self, dim: list[int]) -> Self:
        self.shape = tuple(dim)
        return self

    def set_stride(self, stride: list[int]) -> Self:
        self.strides = tuple(stride)
        return self


class _Values:
    """The tensors of one execution, by their addresses."""

    def __init__(self, memory: Memory, pointers: Mapping[int, int]) -> None:
        self._memory, self._pointers = memory, dict(pointers)

    def of(self, tensor: Tensor) -> torch.Tensor:
        return torch.from_numpy(self.array(tensor))

    def array(self, tensor: Tensor) -> Array:
        return read(self._memory, self._pointers[tensor.uid], tensor.shape, tensor.strides, tensor.kind)

    def scalar(self, tensor: Tensor) -> Any:
        return self.array(tensor).item()

    def put(self, tensor: Tensor, values: torch.Tensor) -> None:
        write(self._memory, self._pointers[tensor.uid], values.numpy(), tensor.strides, tensor.kind)


class Graph:
    """One attention, or one convolution with what is added to it."""

    def __init__(self, library: "Cudnn") -> None:
        self._library = library
        self._out = Tensor()
        self._compute: Callable[[_Values], torch.Tensor] | None = None

    def tensor(self, **description: Any) -> Tensor:
        return Tensor(**description)

    def sdpa(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        self._compute = lambda values: _attend(values, (query, key, value), options, scales={})
        return self._out, None

    def sdpa_fp8(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None, Tensor, Tensor]:
        """The greatest magnitudes of weights and result, which the library gives too, are not written."""
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")

        def compute(values: _Values) -> torch.Tensor:
            scales = {name: float(values.scalar(options[name])) for name in names}
            return _attend(values, (query, key, value), options, scales=scales)

        self._compute = compute
        return self._out, None, Tensor(), Tensor()

    def conv_fprop(self, *, image: Tensor, weight: Tensor, **geometry: Any) -> Tensor:
        self._compute = lambda values: _convolve(values.of(image), values.of(weight), geometry)
        return self._out

    def bias(self, *, input: Tensor, bias: Tensor, name: str) -> Tensor:
        return self.add(a=input, b=bias, name=name)

    def add(self, *, a: Tensor, b: Tensor, name: str) -> Tensor:
        compute = self._compute
        assert a is self._out and compute is not None
        self._compute = lambda values: compute(values) + values.of(b)
        return self._out

    def validate(self) -> None: ...

    build_operation_graph = check_support = build_plans = validate

    def create_execution_plans(self, modes: list[HeuristicMode]) -> None: ...

    def deselect_workspace_greater_than(self, nbytes: int) -> None: ...

    def get_workspace_size(self) -> int:
        return WORKSPACE_BYTES

    def get_execution_plan_count(self) -> int:
        return 1

    def get_plan_name_at_index(self, index: int) -> str:
        return "emulated"

    def build_plan_at_index(self, index: int) -> None: ...

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return WORKSPACE_BYTES

    def execute(self, pointers: Mapping[int, int], workspace: int, *, handle: int) -> None:
        """Queue the graph; the addresses are read now, what lies there when it runs."""
        library, compute = self._library, self._compute
        assert compute is not None
        library.memory.check(workspace, WORKSPACE_BYTES)
        values = _Values(library.memory, pointers)
        library.streams.put(library.stream_of[handle], lambda: values.put(self._out, compute(values)))

    def execute_plan_at_index(self, pointers: Mapping[int, int], workspace: int, index: int, *, handle: int) -> None:
        self.execute(pointers, workspace, handle=handle)


class Cudnn:
    """As a module."""

    data_type, heur_mode = Kind, HeuristicMode
    cudnnGraphNotSupportedError = GraphNotSupportedError

    def __init__(self, streams: Streams, memory: Memory) -> None:
        self.streams, self.memory = streams, memory
        self.stream_of: dict[int, int] = {}
        self._next = 1

    def backend_version(self) -> int:
        return 0

    def create_handle(self) -> int:
        self._next += 1
        return self._next

    def set_stream(self, *, handle: int, stream: int) -> None:
        self.stream_of[handle] = stream

    def destroy_handle(self, handle: int) -> None:
        del self.stream_of[handle]

    def pygraph(self, **types: Any) -> Graph:
        return Graph(self)


def _attend(
    values: _Values, operands: tuple[Tensor, Tensor, Tensor], options: Mapping[str, Any], *, scales: Mapping[str, float]
) -> torch.Tensor:
    """[1, heads, queries, d]; without scales the weights are rounded to the operands' type, with them to E4M3."""
    query, key, value = (values.of(tensor) for tensor in operands)
    if options.get("use_padding_mask"):
        assert values.scalar(options["seq_len_q"]) == query.shape[2]
        num_keys = values.scalar(options["seq_len_kv"])
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    scale = options["attn_scale"] * scales.get("descale_q", 1.0) * scales.get("descale_k", 1.0)
    rounded = {Kind.BFLOAT16: torch.bfloat16, Kind.HALF: torch.float16, Kind.FP8_E4M3: torch.float8_e4m3fn}[operands[0].kind]
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        for first in range(0, query.shape[2], _QUERIES_AT_ONCE):
            rows = slice(first, first + _QUERIES_AT_ONCE)
            scores = query[0, head, rows] @ key[0, head].T * scale
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            total = weights.sum(-1, keepdim=True)
            weights = (weights * scales.get("scale_s", 1.0)).to(rounded).float() * scales.get("descale_s", 1.0)
            out[0, head, rows] = weights @ value[0, head] / total
    return out * (scales.get("descale_v", 1.0) * scales.get("scale_o", 1.0))


def _convolve(image: torch.Tensor, weight: torch.Tensor, geometry: Mapping[str, Any]) -> torch.Tensor:
    sides = zip(reversed(geometry["pre_padding"]), reversed(geometry["post_padding"]), strict=True)
    padded = torch.nn.functional.pad(image, [pad for side in sides for pad in side])
    convolve = torch.nn.functional.conv2d if weight.ndim == 4 else torch.nn.functional.conv3d
    return convolve(padded, weight, stride=geometry["stride"], dilation=geometry["dilation"])
