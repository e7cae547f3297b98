"""Types that describe a stage: its tensors by name, dtype and symbolic shape.

A stage is one small network that becomes one engine. Its weights are inputs like any other, listed apart because they come
from the bundle and not from the previous stage. Which stages exist is said in `runtime.stages`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from runtime.errors import EngineError

FUNCTION_DOMAIN = "wanrt"
"""ONNX domain of the fused operators in a stage's graph; their bodies are in `export.functions`."""


class Precision(StrEnum):
    """Arithmetic of an engine's heavy operators."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"


class DType(StrEnum):
    """Element types a stage's tensors may have, by their safetensors names."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    F8_E4M3 = "F8_E4M3"
    I64 = "I64"
    U8 = "U8"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}[self.value]


Axis = int | str
"""A fixed extent, or a symbolic one: `"tokens"`, or a multiple of one: `"8*height"`."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    shape: tuple[Axis, ...]
    dtype: DType = DType.F32
    channels_last: bool = False
    """Declared by a target: the channels, axis 1 of a weight and axis 0 of all else, lie last, padded with zeros to a multiple of 8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """One engine's contract. `name` is `component.stage`, for example `transformer.block_in`."""

    name: str
    inputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    per_block: bool = False
    """The same engine runs once per block, each time with the weights of `blocks.{i}.`."""
    blocks: tuple[int, ...] | None = None
    """Of a per-block stage: the blocks it runs for, where another stage does the same for the others; None: all."""
    per_prompt: bool = False
    """Runs before the first step, once per prompt, image or timestep: of all weights, its are the last worth keeping on a device."""

    def weight_name(self, weight: str, block: int | None) -> str:
        """Name of `weight` inside the component's safetensors file."""
        return f"blocks.{block}.{weight}" if self.per_block else weight

    def places(self, num_blocks: int) -> Sequence[int | None]:
        """What it runs for in a network of so many blocks: their numbers, or None for the network as a whole."""
        if not self.per_block:
            return (None,)
        return range(num_blocks) if self.blocks is None else self.blocks

    @property
    def network(self) -> str:
        """The network this stage belongs to, one of `runtime.stages.NETWORKS`."""
        return self.name.partition(".")[0]

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbolic extents in the order in which the inputs first name them."""
        names: dict[str, None] = {}
        for tensor in self.inputs:
            for axis in tensor.shape:
                if isinstance(axis, str):
                    names.setdefault(symbol_of(axis)[1])
        return tuple(names)


def symbol_of(axis: str) -> tuple[int, str]:
    """Split a symbolic axis into factor and name: `"8*height"` → `(8, "height")`."""
    factor, star, name = axis.rpartition("*")
    return (int(factor), name) if star else (1, axis)


def resolve(axis: Axis, extents: Mapping[str, int]) -> int:
    """Value of `axis` once the symbols are known."""
    if isinstance(axis, int):
        return axis
    factor, name = symbol_of(axis)
    return factor * extents[name]


def match_shapes(stage: StageSpec, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Check the shapes of a stage's inputs against its spec.

    Args:
        shapes: actual shape of every input, by name.

    Returns:
        The value of each symbolic extent.

    Raises:
        EngineError: an input is missing, unknown, or does not fit; the message names the tensor.
    """
    expected = {tensor.name: tensor for tensor in stage.inputs}
    if expected.keys() != shapes.keys():
        raise EngineError(f"{stage.name}: inputs are {sorted(expected)}, got {sorted(shapes)}")
    extents: dict[str, int] = {}
    for name, tensor in expected.items():
        shape = tuple(shapes[name])
        fits = len(shape) == len(tensor.shape)
        for axis, size in zip(tensor.shape, shape, strict=False):
            if isinstance(axis, int):
                fits = fits and axis == size
            else:
                factor, symbol = symbol_of(axis)
                fits = fits and size % factor == 0 and extents.setdefault(symbol, size // factor) == size // factor
        if not fits:
            raise EngineError(f"{stage.name}: {name} has shape {list(shape)}, expected {list(tensor.shape)} with {extents}")
    return extents
