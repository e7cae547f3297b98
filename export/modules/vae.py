"""Encoder and decoder of both VAEs as the stages that `runtime.stages.vae` declares, built from the same walk over the architecture."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from export import functions as op
from export.modules.vae_layers import Caches, build_layer
from runtime.stages.vae import (
    COLOURS,
    DECODE_HIGH,
    DECODE_LOW,
    ENCODE_HIGH,
    ENCODE_LOW,
    Pair,
    Part,
    decoder_parts,
    encoder_parts,
)
from runtime.variants import VaeArch


class VaePart(nn.Module):
    """A part of a chain; parameters carry the checkpoint's names because layers hang where their names say.

    Args:
        first: whether this is the pass of the first frame, which has no caches to take.
    """

    def __init__(self, part: Part, *, first: bool) -> None:
        super().__init__()
        self.first, self.part = first, part
        for layer in part.layers:
            _hang(self, layer.name, build_layer(layer, first=first))

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """What enters the part, a level's input if it takes one, and the caches unless it is the first → what leaves it, alike."""
        taken, past = (None, others) if self.part.takes is None else (others[0], others[1:])
        caches = Caches(None if self.first else past)
        inputs: list[Tensor] = []
        for layer in self.part.layers:
            inputs.append(x)
            level_input = taken if layer is self.part.takes else inputs[-1 - layer.span]
            x = self.get_submodule(layer.name)(x, level_input if layer.span else caches)
        handed_on = () if self.part.hands_on is None else (inputs[self.part.hands_on],)
        return x, *handed_on, *caches.next


class Colours(nn.Module):
    """`wanrt::FrameColours`: frames of about -1..1 as colours of 8 bits."""

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()

    def forward(self, frames: Tensor) -> Tensor:
        return op.frame_colours(frames)


def _hang(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the submodule `name` of `root`, with the containers that the dots in the name ask for."""
    *containers, leaf = name.split(".")
    for container in containers:
        if container not in dict(root.named_children()):
            root.add_module(container, nn.Module())
        root = root.get_submodule(container)
    root.add_module(leaf, module)


def _build(arch: VaeArch, *, parts: Callable[[VaeArch], tuple[Part, Part]], index: int, first: bool) -> VaePart:
    return VaePart(parts(arch)[index], first=first)


_PARTS: tuple[tuple[Pair, Callable[[VaeArch], tuple[Part, Part]], int], ...] = (
    (DECODE_LOW, decoder_parts, 0),
    (DECODE_HIGH, decoder_parts, 1),
    (ENCODE_HIGH, encoder_parts, 0),
    (ENCODE_LOW, encoder_parts, 1),
)
VAE_MODULES: dict[str, Callable[[VaeArch], nn.Module]] = {
    COLOURS: Colours,
    **{
        name: partial(_build, parts=parts, index=index, first=name == pair[0]) for pair, parts, index in _PARTS for name in pair
    },
}
