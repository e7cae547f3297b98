"""Scaled dot-product attention on cuDNN: bf16 or fp16, or fp8 with one scale a tensor.

Queries, keys and values are [N, H·d] with any row stride, so they may be columns of one fused projection.
"""

import math
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.backends.cuda.cudnn import MOST_GRAPHS, MOST_WORKSPACE_BYTES, GraphCall, open_cudnn
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.recent import recall
from runtime.errors import EngineError
from runtime.specs import DType

SOFTMAX_SCALE = 256.0
"""FP8: probabilities lie in (0, 1] and E4M3's smallest number is 2⁻⁹; times 2⁸ the ones down to 2⁻¹⁷ survive the cast. One H200,
16,384 peaked keys: relative error 4.1e-2 without it, 3.1e-2 with it; for flat attention it changes nothing."""

_QUERY, _KEY, _VALUE, _OUT = 1, 2, 3, 4  # cuDNN's tensor ids; those of the scales follow
_SCALES = {"descale_q": 5, "descale_k": 6, "descale_v": 7, "descale_s": 8, "scale_s": 9, "scale_o": 10}
_AMAX_S, _AMAX_O = 11, 12
_QUERIES, _KEYS = 13, 14  # how many of each count
_WORD = 16  # bytes: cuDNN reads rows and heads in whole words
_MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class _Problem:
    """Everything that cuDNN's choice of a kernel depends on."""

    queries: int
    keys: int
    num_heads: int
    head_dim: int
    strides: tuple[int, int, int, int]  # elements from row to row: query, key, value, out
    dtypes: tuple[DType, DType]  # operands, out
    masked: bool  # whether keys at the end do not count

    @property
    def is_fp8(self) -> bool:
        return self.dtypes[0] is DType.F8_E4M3

    def __str__(self) -> str:
        return (
            f"attention of {self.queries} queries and {self.keys} keys, {self.num_heads} heads of {self.head_dim}, "
            f"{self.dtypes[0]} → {self.dtypes[1]}, row strides {self.strides}"
        )


class Attention:
    """Attention on a device's stream. Use with `with`: the library's handle is released at the end.

    Args:
        device: where the arrays live.

    Raises:
        EngineError: nvidia-cudnn-frontend or cuDNN is not installed.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._cudnn, self._handle = open_cudnn(device)
        self._types = {
            DType.F16: self._cudnn.data_type.HALF,
            DType.BF16: self._cudnn.data_type.BFLOAT16,
            DType.F8_E4M3: self._cudnn.data_type.FP8_E4M3,
        }
        self._graphs: dict[_Problem, Any] = {}
        self._counts: dict[tuple[int, int], DeviceArray] = {}  # two int32, which only their bits say
        self._workspace = device.empty((1,), DType.F8_E4M3)
        self._constants = device.from_host(np.array([1.0, SOFTMAX_SCALE, 1.0 / SOFTMAX_SCALE, 0.0, 0.0], np.float32))

    def run(
        self,
        query: DeviceArray,
        key: DeviceArray,
        value: DeviceArray,
        out: DeviceArray,
        *,
        num_heads: int,
        num_keys: int | None = None,
        descale_q: DeviceArray | None = None,
        descale_k: DeviceArray | None = None,
        descale_v: DeviceArray | None = None,
        scale_o: DeviceArray | None = None,
    ) -> None:
        """`out = softmax(query · keyᵀ / √d) · value` for every head, queued on the stream.

        In fp8 a true value is the stored one times its descale, and out is stored as the true one times `scale_o`; each is f32 [1],
        by default 1. With `descale_v` and `scale_o` left out, out is in the value's own units: no saturation, since
        out is a mean of values, and whoever reads it multiplies by the value's scale.

        FP8 wants values of zero mean in every column: Hopper's tensor cores keep fewer bits of a sum than fp32, and a long sum of one
        sign comes out too small. Since the weights sum to 1, a mean taken off before can be added to out afterwards. One H200, 16,384
        keys, flat attention: relative error 5.9e-2 for values of zero mean; 1.9e-1 for values whose mean is two thirds of their
        spread, and 1.2e-3 with that mean taken off and put back.

        Args:
            query: [Nq, H·d].
            key, value: [Nk, H·d], of the same dtype.
            out: [Nq, H·d]; bf16 for bf16, and fp8 for fp8 (the only thing Hopper's fp8 kernels write).
            num_keys: how many of the keys count, the first ones; the others need finite values. None: all. In fp8 that is as fast as
                all keys, in bf16 a tenth slower.

        Raises:
            EngineError: the shapes do not fit each other, or cuDNN has no kernel for them on this device.
        """
        masked = num_keys is not None and num_keys != key.shape[0]
        problem = self._problem(query, key, value, out, num_heads, masked=masked)
        graph = recall(self._graphs, problem, self._build, most=MOST_GRAPHS)
        pointers = {_QUERY: query.pointer, _KEY: key.pointer, _VALUE: value.pointer, _OUT: out.pointer}
        if problem.is_fp8:
            one, softmax_scale, softmax_descale, amax_s, amax_o = (self._constants.pointer + 4 * i for i in range(5))
            given = {"descale_q": descale_q, "descale_k": descale_k, "descale_v": descale_v, "scale_o": scale_o}
            pointers |= {_SCALES[name]: one if scale is None else scale.pointer for name, scale in given.items()}
            pointers |= {_SCALES["scale_s"]: softmax_scale, _SCALES["descale_s"]: softmax_descale}
            pointers |= {_AMAX_S: amax_s, _AMAX_O: amax_o}
        if masked:
            counts = self._counts_of(query.shape[0], num_keys or 0)
            pointers |= {_QUERIES: counts.pointer, _KEYS: counts.pointer + 4}
        self._device.calls.put(GraphCall(problem, partial(self._execute, graph), pointers))

    def close(self) -> None:
        self._graphs.clear()
        self._counts.clear()
        if self._handle is not None:
            self._cudnn.destroy_handle(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _problem(
        self, query: DeviceArray, key: DeviceArray, value: DeviceArray, out: DeviceArray, num_heads: int, *, masked: bool
    ) -> _Problem:
        (queries, width), keys = query.shape, key.shape[0]
        arrays = {"query": query, "key": key, "value": value, "out": out}
        fits = key.shape == value.shape == (keys, width) and out.shape == query.shape and width % num_heads == 0
        if not fits or len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype not in self._types:
            given = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
            raise EngineError(f"attention: {given} with {num_heads} heads do not fit")
        head_dim = width // num_heads
        multiple = _WORD // query.dtype.itemsize
        if head_dim % multiple or head_dim > _MAX_HEAD_DIM:
            raise EngineError(
                f"attention: cuDNN needs a head dimension in multiples of {multiple} up to {_MAX_HEAD_DIM} for {query.dtype}, got {head_dim}",
                hint="this network's heads run on the cpu target only"
                if head_dim % 8
                else "use bf16 attention for this network",
            )
        for name, array in arrays.items():
            if array.pointer % _WORD or array.row_stride * array.dtype.itemsize % _WORD:
                raise EngineError(
                    f"attention: {name} does not start on {_WORD}-byte words in every row (row stride {array.row_stride})"
                )
        if (query.dtype is DType.F8_E4M3) != (out.dtype is DType.F8_E4M3):
            raise EngineError(f"attention: {query.dtype} operands cannot give {out.dtype}; fp8 gives fp8, bf16 gives bf16")
        return _Problem(
            queries=queries,
            keys=keys,
            num_heads=num_heads,
            head_dim=head_dim,
            strides=(query.row_stride, key.row_stride, value.row_stride, out.row_stride),
            dtypes=(query.dtype, out.dtype),
            masked=masked,
        )

    def _execute(self, graph: Any, pointers: dict[int, int]) -> None:
        graph.execute(pointers, self._workspace.pointer, handle=self._handle)  # the workspace may have grown meanwhile

    def _build(self, problem: _Problem) -> Any:
        cudnn = self._cudnn
        try:
            graph = cudnn.pygraph(
                io_data_type=self._types[problem.dtypes[0]],
                intermediate_data_type=cudnn.data_type.FLOAT,
                compute_data_type=cudnn.data_type.FLOAT,
                handle=self._handle,
            )
            self._describe(graph, problem)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A])
            graph.deselect_workspace_greater_than(MOST_WORKSPACE_BYTES)
            graph.check_support()
            graph.build_plans()
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as exc:
            where = f"{self._device.name} ({self._device.arch}), cuDNN {cudnn.backend_version()}"
            raise EngineError(f"{problem}: no kernel for it on {where}: {exc}") from exc
        needed = int(graph.get_workspace_size())
        if needed > self._workspace.size:
            self._workspace = self._device.slab(needed)
        return graph

    def _describe(self, graph: Any, problem: _Problem) -> None:
        heads, head_dim = problem.num_heads, problem.head_dim

        def geometry(rows: int, row_stride: int) -> dict[str, list[int]]:
            return {"dim": [1, heads, rows, head_dim], "stride": [rows * row_stride, head_dim, row_stride, 1]}

        rows = (problem.queries, problem.keys, problem.keys)
        operands = [
            graph.tensor(name=name, uid=uid, data_type=self._types[problem.dtypes[0]], **geometry(count, stride))
            for name, uid, count, stride in zip("qkv", (_QUERY, _KEY, _VALUE), rows, problem.strides[:3], strict=True)
        ]
        options: dict[str, Any] = {"attn_scale": 1.0 / math.sqrt(head_dim), "generate_stats": False, "name": "attention"}
        if problem.masked:
            counts = {"data_type": self._cudnn.data_type.INT32, "dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
            names = ("seq_len_q", _QUERIES), ("seq_len_kv", _KEYS)
            options |= {"use_padding_mask": True, **{name: graph.tensor(name=name, uid=uid, **counts) for name, uid in names}}
        float32 = {"data_type": self._cudnn.data_type.FLOAT, "dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1]}
        if problem.is_fp8:
            scales = {name: graph.tensor(name=name, uid=uid, **float32) for name, uid in _SCALES.items()}
            out, _, *amax = graph.sdpa_fp8(*operands, **scales, **options)
            for tensor, uid in zip(amax, (_AMAX_S, _AMAX_O), strict=True):
                tensor.set_output(True).set_uid(uid).set_data_type(float32["data_type"])
                tensor.set_dim(float32["dim"]).set_stride(float32["stride"])
        else:
            out, _ = graph.sdpa(*operands, **options)
        out_geometry = geometry(problem.queries, problem.strides[3])
        out.set_output(True).set_uid(_OUT).set_data_type(self._types[problem.dtypes[1]])
        out.set_dim(out_geometry["dim"]).set_stride(out_geometry["stride"])

    def _counts_of(self, queries: int, keys: int) -> DeviceArray:
        if (queries, keys) not in self._counts:
            bits = np.array([queries, keys], np.int32).view(np.float32)
            self._counts[queries, keys] = self._device.from_host(bits)
        return self._counts[queries, keys]
