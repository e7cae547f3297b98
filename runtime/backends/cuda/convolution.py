"""Convolutions on cuDNN over channels-last frames, bf16 with fp32 sums; bias and residual go into the same kernel where that is faster.

A kernel [O, kt, kh, kw, C] goes over a window of frames, [O, kh, kw, C] over each frame by itself.
"""

from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from runtime.backends.cuda.cudnn import MOST_GRAPHS, MOST_WORKSPACE_BYTES, GraphCall, open_cudnn
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.launch import Clearing
from runtime.backends.cuda.recent import recall
from runtime.errors import EngineError
from runtime.specs import DType

_X, _WEIGHT, _BIAS, _OUT, _RESIDUAL = 1, 2, 3, 4, 5  # cuDNN's tensor ids
_NARROW = 128
_PREFERRED_ENGINE = "eng41_"
_MULTIPLE = 8  # channels: whole 16-byte words


@dataclass(frozen=True, slots=True)
class _Problem:
    """Everything that cuDNN's choice of a kernel depends on."""

    x: tuple[int, ...]  # [T, H, W, C]
    weight: tuple[int, ...]
    out: tuple[int, ...]
    pads: tuple[int, int, int, int]
    strides: tuple[int, int]  # time, space
    residual: bool

    def __str__(self) -> str:
        return f"convolution of {list(self.x)} with {list(self.weight)} to {list(self.out)}, pads {self.pads}, strides {self.strides}"


class Convolution:
    """Convolutions on a device's stream. Use with `with`: the library's handle is released at the end.

    Args:
        device: where the arrays live.

    Raises:
        EngineError: nvidia-cudnn-frontend or cuDNN is not installed.
    """

    def __init__(self, device: Device) -> None:
        from cuda.bindings import driver

        self._device = device
        self._cudnn, self._handle = open_cudnn(device)
        self._graphs: dict[_Problem, tuple[Any, int]] = {}
        self._workspace = device.empty((1,), DType.F8_E4M3)
        self._fence_byte = device.empty((1,), DType.F8_E4M3)
        self._fence = Clearing(driver, self._fence_byte, device.stream)

    def run(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        out: DeviceArray,
        *,
        residual: DeviceArray | None = None,
        pads: tuple[int, int, int, int] = (0, 0, 0, 0),
        time_stride: int = 1,
        space_stride: int = 1,
    ) -> None:
        """`out = conv(x, weight) + bias [+ residual]`, queued on the stream; never padded in time.

        Args:
            x: bf16 [T, H, W, C].
            weight: bf16 [O, kt, kh, kw, C] or [O, kh, kw, C].
            bias: bf16 [O].
            out: bf16 [T', H', W', O].
            residual: bf16, as out.
            pads: rows of zeros above, columns left, rows below, columns right.

        Raises:
            EngineError: the shapes do not fit each other, or cuDNN has no kernel for them on this device.
        """
        problem = _problem(x, weight, bias, out, residual, pads, (time_stride, space_stride))
        graph, index = recall(self._graphs, problem, self._build, most=MOST_GRAPHS)
        pointers = {_X: x.pointer, _WEIGHT: weight.pointer, _BIAS: bias.pointer, _OUT: out.pointer}
        if residual is not None:
            pointers[_RESIDUAL] = residual.pointer
            # cuDNN 9.19's engine 4 starts before the convolution in front of it has ended, and does not wait for it before it reads its
            # residual. It cannot start before a memset behind that convolution.
            self._device.calls.put(self._fence)
        self._device.calls.put(GraphCall(problem, partial(self._execute, graph, index), pointers))

    def close(self) -> None:
        self._graphs.clear()
        if self._handle is not None:
            self._cudnn.destroy_handle(self._handle)
            self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _execute(self, graph: Any, index: int, pointers: dict[int, int]) -> None:
        graph.execute_plan_at_index(pointers, self._workspace.pointer, index, handle=self._handle)

    def _build(self, problem: _Problem) -> tuple[Any, int]:
        """The graph, and which of its candidates runs."""
        cudnn = self._cudnn
        try:
            graph = cudnn.pygraph(
                io_data_type=cudnn.data_type.BFLOAT16,
                intermediate_data_type=cudnn.data_type.FLOAT,
                compute_data_type=cudnn.data_type.FLOAT,
                handle=self._handle,
            )
            _describe(graph, problem, cudnn.data_type.BFLOAT16)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            index = self._choose(graph)
            needed = int(graph.get_workspace_size_plan_at_index(index))
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as exc:
            where = f"{self._device.name} ({self._device.arch}), cuDNN {cudnn.backend_version()}"
            raise EngineError(f"{problem}: no kernel for it on {where}: {exc}") from exc
        if needed > self._workspace.size:
            self._workspace = self._device.slab(needed)
        return graph, index

    def _choose(self, graph: Any) -> int:
        """The candidate that runs: by a rule, never by a measurement, so that the same sums are made in the same order in every run.

        cuDNN 9.19 on one H200: the heuristic's favourite for 96 channels, engine 10, takes 2.7 ms where engine 41, third in its list,
        takes 1.85; for wider ones engine 41 is its favourite, too. With a residual engine 4 leads the list, and is the fastest.
        """
        count = graph.get_execution_plan_count()
        preferred = [i for i in range(min(count, 8)) if str(graph.get_plan_name_at_index(i)).startswith(_PREFERRED_ENGINE)]
        others = [i for i in range(count) if i not in preferred[:1]]
        for index in (*preferred[:1], *others):
            try:
                graph.build_plan_at_index(index)
            except (self._cudnn.cudnnGraphNotSupportedError, RuntimeError):
                continue  # a candidate that this device cannot build; the last error is not more telling than the list's end
            if int(graph.get_workspace_size_plan_at_index(index)) <= MOST_WORKSPACE_BYTES:
                return index
        raise RuntimeError(f"none of {count} candidates can be built and makes do with {MOST_WORKSPACE_BYTES >> 20} MiB")


def fuses_residual(out: DeviceArray) -> bool:
    """Whether adding a residual inside the convolution is the faster way.

    One H200, cuDNN 9.19, four frames: 96 channels at 832x480 take 1.70 ms with it and 1.85 ms without; 192 at 416x240 take 1.79 ms
    with it and 1.25 ms without, and adding it separately takes 0.11 ms.
    """
    return out.shape[3] <= _NARROW


def _problem(
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray,
    out: DeviceArray,
    residual: DeviceArray | None,
    pads: tuple[int, int, int, int],
    strides: tuple[int, int],
) -> _Problem:
    arrays = {"x": x, "weight": weight, "bias": bias, "out": out} | ({} if residual is None else {"residual": residual})
    problem = _Problem(x.shape, weight.shape, out.shape, pads, strides, residual is not None)
    top, left, bottom, right = pads
    window = (weight.shape[1] if len(weight.shape) == 5 else 1, *weight.shape[-3:-1])
    padded = (x.shape[0], x.shape[1] + top + bottom, x.shape[2] + left + right)
    steps = (strides[0], strides[1], strides[1])
    extents = tuple((extent - size) // step + 1 for extent, size, step in zip(padded, window, steps, strict=True))
    fits = out.shape == (*extents, weight.shape[0]) and weight.shape[-1] == x.shape[3] and bias.shape == weight.shape[:1]
    fits = fits and (residual is None or residual.shape == out.shape) and (window[0] > 1 or strides[0] == 1)
    if not fits or any(array.dtype is not DType.BF16 or not array.is_contiguous for array in arrays.values()):
        given = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in arrays.items())
        raise EngineError(f"{problem}: {given} do not fit")
    if x.shape[3] % _MULTIPLE or weight.shape[0] % _MULTIPLE:
        raise EngineError(f"{problem}: channels must be multiples of {_MULTIPLE}")
    return problem


def _describe(graph: Any, problem: _Problem, dtype: Any) -> None:
    top, left, bottom, right = problem.pads
    time_stride, space_stride = problem.strides
    over_time = len(problem.weight) == 5 and problem.weight[1] > 1
    steps = [space_stride, space_stride]
    geometry = {"pre_padding": [top, left], "post_padding": [bottom, right], "stride": steps, "dilation": [1, 1]}
    if over_time:
        geometry = {
            "pre_padding": [0, top, left],
            "post_padding": [0, bottom, right],
            "stride": [time_stride, *steps],
            "dilation": [1, 1, 1],
        }
    outputs = problem.weight[0]
    x = graph.tensor(name="x", uid=_X, data_type=dtype, **_frames(problem.x, over_time))
    kernel = _channels_last(problem.weight if over_time else (outputs, *problem.weight[-3:]))
    weight = graph.tensor(name="weight", uid=_WEIGHT, data_type=dtype, **kernel)
    bias = graph.tensor(
        name="bias", uid=_BIAS, data_type=dtype, **_channels_last((1, *([1] * len(geometry["stride"])), outputs))
    )
    out = graph.bias(input=graph.conv_fprop(image=x, weight=weight, **geometry), bias=bias, name="add_bias")
    if problem.residual:
        residual = graph.tensor(name="residual", uid=_RESIDUAL, data_type=dtype, **_frames(problem.out, over_time))
        out = graph.add(a=out, b=residual, name="add_residual")
    described = _frames(problem.out, over_time)
    out.set_output(True).set_uid(_OUT).set_data_type(dtype).set_dim(described["dim"]).set_stride(described["stride"])


def _frames(shape: tuple[int, ...], over_time: bool) -> dict[str, list[int]]:
    """Frames as one volume, or as a batch of pictures."""
    return _channels_last((1, *shape) if over_time else shape)


def _channels_last(shape: tuple[int, ...]) -> dict[str, list[int]]:
    """cuDNN names the channels before the positions; the strides say that they lie after them."""
    first, *positions, channels = shape
    strides, step = [], channels
    for extent in reversed(positions):
        strides.append(step)
        step *= extent
    return {"dim": [first, channels, *positions], "stride": [step, 1, *reversed(strides)]}
