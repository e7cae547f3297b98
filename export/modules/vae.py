"""Encoder and decoder of both VAEs as the stages that `runtime.stages.vae` declares, built from the same walk over the architecture."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from export.modules.vae_layers import Caches, build_layer
from runtime.stages.vae import DECODE_FIRST, DECODE_STEP, ENCODE_FIRST, ENCODE_STEP
from runtime.stages.vae_layers import Layer, decoder_layers, encoder_layers
from runtime.variants import VaeArch


class VaeChain(nn.Module):
    """A chain of layers; parameters carry the checkpoint's names because layers hang where their names say.

    Args:
        layers: the chain of an architecture.
        first: whether this is the pass of the first frame, which has no caches to take.
    """

    def __init__(self, arch: VaeArch, *, layers: Callable[[VaeArch], tuple[Layer, ...]], first: bool) -> None:
        super().__init__()
        self.first = first
        self.layers = layers(arch)
        for layer in self.layers:
            _hang(self, layer.name, build_layer(layer, first=first))

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Frames or a latent frame, and the caches unless it is the first → a latent frame or frames, and the new caches."""
        caches = Caches(None if self.first else past)
        inputs = []
        for layer in self.layers:
            inputs.append(x)
            x = self.get_submodule(layer.name)(x, inputs[-1 - layer.span] if layer.span else caches)
        return x, *caches.next


def _hang(root: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the submodule `name` of `root`, with the containers that the dots in the name ask for."""
    *containers, leaf = name.split(".")
    for container in containers:
        if container not in dict(root.named_children()):
            root.add_module(container, nn.Module())
        root = root.get_submodule(container)
    root.add_module(leaf, module)


VAE_MODULES: dict[str, Callable[[VaeArch], nn.Module]] = {
    ENCODE_FIRST: partial(VaeChain, layers=encoder_layers, first=True),
    ENCODE_STEP: partial(VaeChain, layers=encoder_layers, first=False),
    DECODE_FIRST: partial(VaeChain, layers=decoder_layers, first=True),
    DECODE_STEP: partial(VaeChain, layers=decoder_layers, first=False),
}
