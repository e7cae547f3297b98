"""The VAE's graphs → plans: frames lie channels last, [T, H, W, C], and each fused function becomes a step.

Joined: a channel norm and the window of the convolution over time after it; a sum and the convolution before it; the three parts of a
frame's attention; channels to frames and the doubling of height and width after it. Caches are updated in place.
"""

from collections.abc import Callable, Mapping

import onnx

from engines.targets.cuda.lowering import Lowering, Operator, attributes
from engines.targets.cuda.unroll import FRAME_RANGE, cut_before_frames, part_name, unroll_frames
from runtime.backends.cuda.plan import Plan, StepKind
from runtime.errors import BuildError
from runtime.precision import channels_last_shape
from runtime.specs import FUNCTION_DOMAIN, Axis, DType, StageSpec, symbol_of

_OVER_TIME = ("CausalConv", "FirstCausalConv")
_NO_PADS = (0, 0, 0, 0)
FRAMES_AT_A_TIME = 2
"""Frames that go together through the decoder's last levels, after time has doubled for the last time (see decision 8)."""


class VaeLowering(Lowering):
    """Shapes are those on the device: channels last, in multiples of 8."""

    _qkv: dict[str, str]  # part of a split → what was split
    _side: int  # of the squares of pixels that the last channels are

    def __init__(self, model: onnx.ModelProto, stage: StageSpec) -> None:
        self._starts = range(1)
        frames = next((tensor for tensor in stage.outputs if tensor.name == "frames"), None)
        num_frames = 1 if frames is None else _number(frames.shape[1])
        caches = {
            name for tensor in stage.outputs for name in (tensor.name, tensor.name.removeprefix("next_")) if "cache_" in name
        }
        given = {tensor.name for tensor in stage.inputs} - caches
        cut = cut_before_frames(model, given) if num_frames > FRAMES_AT_A_TIME else None
        if cut is not None:
            self._starts = range(0, num_frames, FRAMES_AT_A_TIME)
            model = unroll_frames(model, cut, self._starts, num_frames, shared=caches)
        super().__init__(model, stage)

    def operators(self) -> Mapping[Operator, Callable[[onnx.NodeProto], None]]:
        ours: dict[str, Callable[[onnx.NodeProto], None]] = {
            "CausalConv": self._causal_conv,
            "FirstCausalConv": self._causal_conv,
            "PointwiseConv": self._frame_conv,
            "FrameConv": self._frame_conv,
            "Linear": self._frame_conv,
            "ChannelNorm": self._norm,
            "ChannelNormSilu": self._norm,
            "UpsampleNearest": self._upsample,
            "InterleaveFrames": self._interleave,
            "FrameRows": self._same,
            "FirstChannels": self._same,  # the last step takes as many channels as the stage declares
            "AddFrameRows": self._add,
            FRAME_RANGE: self._frame_range,
            "UnfoldPixels": self._unfold,
            "AddAverageDown": self._level_shortcut,
            "AddDuplicateUp": self._level_shortcut,
            "Attention": self._attention,
            "ZeroPast": self._zero_past,
        }
        return {
            ("", "Add"): self._add,
            ("", "Identity"): self._same,  # of a value that leaves the stage twice
            ("", "Reshape"): self._same,  # of an attention's weight [O, C, 1, 1]: a convolution here
            ("", "Split"): self._split,
            **{(FUNCTION_DOMAIN, name): lower for name, lower in ours.items()},
        }

    def plan(self) -> Plan:
        self._qkv, self._side = {}, 1
        self._enter()
        return super().plan()

    def as_dtype(self, name: str, dtype: DType) -> str:
        """What leaves the stage in float32 leaves as planes."""
        if dtype is not DType.F32:
            return self.alias.get(name, name)
        out = self.buffer(f"{name}.planes", next(tensor.shape for tensor in self.stage.outputs if tensor.name == name), dtype)
        for start in self._starts:
            part = part_name(name, start) if len(self._starts) > 1 else name
            self.step(StepKind.PLANES, {"x": part}, {"out": out}, side=self._side, first_frame=start)
        return out

    def _enter(self) -> None:
        """Turn what enters the stage in float32 to channels last, folding pixels on the way."""
        for tensor in self.stage.inputs:
            if tensor.dtype is not DType.F32:
                continue
            fold = next((node for node in self.consumers[tensor.name] if node.op_type == "FoldPixels"), None)
            side = 1 if fold is None else int(attributes(fold)["side"][0])
            colours, frames, height, width = tensor.shape
            folded = (_number(colours) * side**2, frames, _divided(height, side), _divided(width, side))
            rows = self.buffer(f"{tensor.name}.channels_last", channels_last_shape(folded), DType.BF16)
            self.step(StepKind.CHANNELS_LAST, {"x": tensor.name}, {"out": rows}, side=side)
            self._rename(tensor.name if fold is None else fold.output[0], rows)
            if fold is not None:
                self.done.add(fold.output[0])

    def _norm(self, node: onnx.NodeProto) -> None:
        x, gamma = node.input
        if self.shapes[gamma][0] != self.shapes[x][-1]:
            raise BuildError(
                f"{self.stage.name}: the cuda target needs channels in multiples of 8, not {self.shapes[gamma][0]}"
            )
        silu = node.op_type == "ChannelNormSilu"
        after = self.consumers[node.output[0]]
        if len(after) == 1 and after[0].op_type in _OVER_TIME:
            window = self._window(x, after[0], gamma=gamma, silu=silu)
            self._rename(node.output[0], window)
            return
        out = self.buffer(node.output[0], self.shapes[x], DType.BF16)
        self.step(StepKind.CHANNEL_NORM, {"x": x, "gamma": gamma}, {"out": out}, silu=silu)

    def _window(self, x: str, conv: onnx.NodeProto, *, gamma: str | None = None, silu: bool = False) -> str:
        """The past frames and, behind them, those of x; the conv's cache then holds the last ones of both."""
        first, next_past = conv.op_type == "FirstCausalConv", conv.output[1]
        frames, *rest = self.shapes[x]
        past_shape = self._cache_shape(next_past)
        window = self.buffer(f"{conv.output[0]}.window", (_number(frames) + _number(past_shape[0]), *rest), DType.BF16)
        inputs = {"x": x} | ({} if gamma is None else {"gamma": gamma})
        outputs = {"out": window}
        if first:
            outputs["next_past"] = self.buffer(next_past, past_shape, DType.BF16)
        else:
            inputs["past"] = conv.input[1]
            self._rename(next_past, conv.input[1])
        self.step(StepKind.CHANNEL_NORM, inputs, outputs, silu=silu)
        return window

    def _causal_conv(self, node: onnx.NodeProto) -> None:
        first = node.op_type == "FirstCausalConv"
        x, (weight, bias) = node.input[0], node.input[1 if first else 2 :]
        window = self.alias.get(x, x)
        if not window.endswith(".window"):
            window = self._window(x, node)
        given = attributes(node)
        _, top, left, _, bottom, right = given.get("pads", (0, 1, 1, 0, 1, 1))
        time_stride = int(given.get("strides", (1,))[0])
        self._convolve(node.output[0], window, weight, bias, pads=(top, left, bottom, right), time_stride=time_stride)

    def _frame_conv(self, node: onnx.NodeProto) -> None:
        x, weight, bias = node.input
        given = attributes(node)
        _, top, left, _, bottom, right = given.get("pads", (0, 0, 0, 0, 0, 0))
        stride = int(given.get("strides", (1, 1))[1])
        self._convolve(node.output[0], x, weight, bias, pads=(top, left, bottom, right), space_stride=stride)

    def _convolve(
        self,
        name: str,
        x: str,
        weight: str,
        bias: str,
        *,
        pads: tuple[int, int, int, int] = _NO_PADS,
        time_stride: int = 1,
        space_stride: int = 1,
    ) -> None:
        inputs = {"x": x, "weight": weight, "bias": bias}
        residual, name = self._sum_after(name)
        if residual is not None:
            inputs["residual"] = residual
        frames, height, width, _ = self.shapes[x]
        outputs, *kernel, _ = self.shapes[weight]
        over_time = _number(kernel[0]) if len(kernel) == 3 else 1
        out_frames = (_number(frames) - over_time) // time_stride + 1
        shape = (out_frames, _divided(height, space_stride), _divided(width, space_stride), outputs)
        out = self.buffer(name, shape, DType.BF16)
        top, left, bottom, right = pads
        self.step(
            StepKind.CONVOLUTION, inputs, {"out": out}, pad_top=top, pad_left=left, pad_bottom=bottom, pad_right=right,
            time_stride=time_stride, space_stride=space_stride,
        )  # fmt: skip

    def _sum_after(self, name: str) -> tuple[str | None, str]:
        """The other term, where the only reader of `name` adds one that exists already, and the sum's name."""
        after = self.consumers[name]
        if len(after) != 1 or after[0].op_type not in ("Add", "AddFrameRows") or name in self._declared:
            return None, name
        other = next(term for term in after[0].input if term != name)
        if other not in self.shapes:
            return None, name
        self.done.add(after[0].output[0])
        return other, after[0].output[0]

    @property
    def _declared(self) -> set[str]:
        return {tensor.name for tensor in self.stage.outputs}

    def _add(self, node: onnx.NodeProto) -> None:
        raise BuildError(f"{self.stage.name}: the cuda target adds only what a convolution made, not {list(node.input)}")

    def _upsample(self, node: onnx.NodeProto) -> None:
        self._repeat(node.output[0], node.input[0], repeat=2, interleave=False)

    def _interleave(self, node: onnx.NodeProto) -> None:
        after = self.consumers[node.output[0]]
        if len(after) == 1 and after[0].op_type == "UpsampleNearest":
            self.done.add(after[0].output[0])
            self._repeat(after[0].output[0], node.input[0], repeat=2, interleave=True)
            return
        self._repeat(node.output[0], node.input[0], repeat=1, interleave=True)

    def _repeat(self, name: str, x: str, *, repeat: int, interleave: bool) -> None:
        frames, height, width, channels = self.shapes[x]
        halves = 2 if interleave else 1
        shape = (_number(frames) * halves, _times(height, repeat), _times(width, repeat), _number(channels) // halves)
        self.step(StepKind.UPSAMPLE, {"x": x}, {"out": self.buffer(name, shape, DType.BF16)}, interleave=interleave)

    def _same(self, node: onnx.NodeProto) -> None:
        self._rename(node.output[0], node.input[0])

    def _unfold(self, node: onnx.NodeProto) -> None:
        self._side = int(attributes(node)["side"][0])
        self._same(node)

    def _level_shortcut(self, node: onnx.NodeProto) -> None:
        x, level_input = node.input
        kind = StepKind.ADD_AVERAGE_DOWN if node.op_type == "AddAverageDown" else StepKind.ADD_DUPLICATE_UP
        given = attributes(node)
        out = self.buffer(node.output[0], self.shapes[x], DType.BF16)
        factors = {name: int(given[name][0]) for name in ("time_factor", "space_factor")}
        self.step(kind, {"x": x, "level_input": level_input}, {"out": out}, **factors)

    def _frame_range(self, node: onnx.NodeProto) -> None:
        given = attributes(node)
        self.view(node.output[0], node.input[0], axis=0, start=int(given["start"]), stop=int(given["stop"]))

    def _split(self, node: onnx.NodeProto) -> None:
        for name in node.output:
            self._qkv[name] = node.input[0]

    def _attention(self, node: onnx.NodeProto) -> None:
        sources = {self._qkv.get(name) for name in node.input}
        source = sources.pop()
        if sources or source is None or int(attributes(node)["num_heads"]) != 1:
            raise BuildError(f"{self.stage.name}: the cuda target's frame attention has one head over parts of one projection")
        *positions, channels = self.shapes[source]
        out = self.buffer(node.output[0], (*positions, _number(channels) // 3), DType.BF16)
        self.step(StepKind.FRAME_ATTENTION, {"qkv": source}, {"out": out})

    def _zero_past(self, node: onnx.NodeProto) -> None:
        out = self.buffer(node.output[0], self._cache_shape(node.output[0]), DType.BF16)
        self.step(StepKind.ZEROS, {}, {"out": out})

    def _rename(self, name: str, source: str) -> None:
        self.alias[name] = self.alias.get(source, source)
        self.shapes[name], self.dtypes[name] = self.shapes[source], self.dtypes[source]

    def _cache_shape(self, name: str) -> tuple[Axis, ...]:
        return next(tensor.shape for tensor in self.stage.outputs if tensor.name == name)


class ColoursLowering(Lowering):
    """Decoded frames to colours: the one stage that leaves planes as they are."""

    def operators(self) -> Mapping[Operator, Callable[[onnx.NodeProto], None]]:
        return {(FUNCTION_DOMAIN, "FrameColours"): self._colours}

    def _colours(self, node: onnx.NodeProto) -> None:
        (colours,) = self.stage.outputs
        self.step(StepKind.COLOURS, {"x": node.input[0]}, {"out": self.buffer(node.output[0], colours.shape, colours.dtype)})


def _number(axis: Axis) -> int:
    assert isinstance(axis, int), axis
    return axis


def _times(axis: Axis, factor: int) -> Axis:
    if isinstance(axis, int) or factor == 1:
        return axis if isinstance(axis, str) else axis * factor
    own, name = symbol_of(axis)
    return f"{own * factor}*{name}"


def _divided(axis: Axis, divisor: int) -> Axis:
    if isinstance(axis, int) or divisor == 1:
        return axis if isinstance(axis, str) else axis // divisor
    own, name = symbol_of(axis)
    assert own % divisor == 0, axis
    return name if own == divisor else f"{own // divisor}*{name}"
