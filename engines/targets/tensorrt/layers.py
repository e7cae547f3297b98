"""What an engine consists of, as its builder's log says it: kernels with their operands' types, and scratch memory.

Reading it from the log needs no GPU; the library's own inspector works on an engine that was loaded, which does.
"""

import re
from dataclasses import dataclass, field

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: (?P<inputs>.*), "
    r"Outputs: (?P<outputs>.*), TacticName: "
)
_TENSOR = re.compile(r"\{ Name: (?P<name>[^,]*), Dimensions: \[(?P<shape>[^]]*)\].*?Datatype: (?P<type>[^,]*),")
_CONTEXT = re.compile(r"^Total Activation Memory: (\d+) bytes")
_FUSED_ATTENTION = "_gemm_mha_"
_BOOKKEEPING = ("signal", "wait", "shape_call")


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor as the library describes it: its type such as `BFloat16`, `FP8` or `Float`, -1 for an extent that varies."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltLayer:
    """One kernel of an engine."""

    name: str
    kind: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def is_fused_attention(self) -> bool:
        """Whether this is one kernel for both products of attention and the softmax between."""
        return self.name.startswith(_FUSED_ATTENTION)

    @property
    def is_fp8_product(self) -> bool:
        """Whether this is a matrix product whose operands are both FP8."""
        return self.kind in ("gemm", "runtime_fusion") and sum(operand.type == "FP8" for operand in self.inputs) == 2

    @property
    def is_large(self) -> bool:
        """Whether its work grows with the tokens or the frame."""
        return any(-1 in operand.shape for operand in self.outputs)


@dataclass(slots=True)
class BuildLog:
    """Listens to the log of one build of one profile: its kernels, and the scratch memory that the largest shapes need."""

    layers: list[BuiltLayer] = field(default_factory=list)
    context_bytes: int | None = None
    """None as long as the log has not said it."""

    def __call__(self, text: str) -> None:
        if found := _CONTEXT.match(text):
            self.context_bytes = max(self.context_bytes or 0, int(found[1]))
        elif text.startswith("Layers:"):
            self.layers.extend(_read_layers(text))


def _read_layers(text: str) -> list[BuiltLayer]:
    found = (match for line in text.splitlines() if (match := _LAYER.match(line.strip())))
    return [
        BuiltLayer(
            name=layer["name"],
            kind=layer["kind"],
            inputs=_read_operands(layer["inputs"]),
            outputs=_read_operands(layer["outputs"]),
        )
        for layer in found
        if layer["kind"] not in _BOOKKEEPING
    ]


def _read_operands(text: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(found["name"], found["type"], tuple(int(extent) for extent in found["shape"].split(",") if extent))
        for found in _TENSOR.finditer(text)
    )
