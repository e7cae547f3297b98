"""The libraries and kernels of the `cuda` target, opened together on one device."""

from collections.abc import Mapping

from runtime.architectures import KERNELS_FROM, has_precision, nearest
from runtime.backends.cuda.attention import Attention
from runtime.backends.cuda.attention_kernels import AttentionKernels
from runtime.backends.cuda.clip_kernels import ClipKernels
from runtime.backends.cuda.convolution import Convolution
from runtime.backends.cuda.device import Device
from runtime.backends.cuda.kernels import Kernels
from runtime.backends.cuda.linear import Linear
from runtime.backends.cuda.patch_kernels import PatchKernels
from runtime.backends.cuda.readback import Readback
from runtime.backends.cuda.self_attention import SelfAttention
from runtime.backends.cuda.text_kernels import TextKernels
from runtime.backends.cuda.vae_kernels import VaeKernels
from runtime.errors import EngineError
from runtime.specs import Precision


class Libraries:
    """The libraries and kernels that plans call, opened on one device; whoever opened them closes them.

    Raises:
        EngineError: no kernels for the device's architecture, or a library is missing.
    """

    def __init__(self, device: Device, kernels: Mapping[str, bytes]) -> None:
        architecture = nearest(device.arch, kernels)
        if architecture is None:
            raise EngineError(
                f"{device.name} is {device.arch}; this bundle has kernels for {', '.join(kernels)}",
                hint=f"rebuild it with `wanrt build-engines --target cuda`: {KERNELS_FROM}",
            )
        self._device, self._architecture, cubin = device, architecture, kernels[architecture]
        self.kernels = Kernels(device, cubin)
        self.text = TextKernels(device, cubin)
        self.clip = ClipKernels(device, cubin)
        self.linear = Linear(device)
        self.attention = Attention(device)
        self.attention_kernels = AttentionKernels(device, cubin)
        self.self_attention = SelfAttention(self.attention, self.attention_kernels)
        self.convolution = Convolution(device)
        self.vae = VaeKernels(device, cubin, self.linear)
        self.patches = PatchKernels(device, cubin)
        self.readback = Readback(device)

    def check_attention(self, precision: Precision) -> None:
        """Whether there are kernels for self-attention in this precision.

        Raises:
            EngineError: there are none.
        """
        if not has_precision(self._architecture, precision):
            device = self._device
            raise EngineError(
                f"attention in {precision}: {device.name} ({device.arch}) runs the kernels of {self._architecture}, which have none",
                hint="leave --attention out",
            )

    def close(self) -> None:
        self.readback.close()
        self.convolution.close()
        self.attention.close()
        self.linear.close()
