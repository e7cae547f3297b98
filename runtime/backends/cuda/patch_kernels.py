"""Launches the kernels that cut latents into a transformer's patches and join them again, as `runtime.geometry` does on the host.

One CPU core takes 38 ms for both ways at 1280x704x121 (48 channels); an H200's forward of the 5B takes 540.
"""

import math

from runtime.backends.cuda import launch
from runtime.backends.cuda.array import expect
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.specs import DType

_THREADS = 256
_MOST = 2**31 - 1


class PatchKernels:
    """These kernels of one cubin, loaded into `device`'s context; they are unloaded with it.

    Methods raise ValueError for shapes and dtypes that do not fit.

    Args:
        cubin: what `engines.targets.cuda.compile.compile_kernels` made for `device.arch`.

    Raises:
        CudaError: the cubin is not for this GPU.
    """

    def __init__(self, device: Device, cubin: bytes) -> None:
        self._module = launch.Module(device, cubin)

    def cut(self, latents: DeviceArray, out: DeviceArray, patch_size: tuple[int, int, int]) -> None:
        """f32 [C, T, h, w] → [N, C·pt·ph·pw], channels slowest."""
        self._move("cut_patches", latents, out, patch_size, latents=latents, patches=out)

    def join(self, patches: DeviceArray, out: DeviceArray, patch_size: tuple[int, int, int]) -> None:
        """f32 [N, pt·ph·pw·C], channels fastest, → [C, T, h, w]."""
        self._move("join_patches", patches, out, patch_size, latents=out, patches=patches)

    def _move(
        self,
        name: str,
        x: DeviceArray,
        out: DeviceArray,
        patch_size: tuple[int, int, int],
        *,
        latents: DeviceArray,
        patches: DeviceArray,
    ) -> None:
        channels, *extents = latents.shape
        frames, height, width = (extent // size for extent, size in zip(extents, patch_size, strict=True))
        expect(latents, DType.F32, (channels, frames * patch_size[0], height * patch_size[1], width * patch_size[2]))
        expect(patches, DType.F32, (frames * height * width, channels * math.prod(patch_size)))
        if not (x.is_contiguous and out.is_contiguous and latents.size <= _MOST):
            raise ValueError(f"{name} takes contiguous arrays of up to {_MOST:,} numbers, got {list(latents.shape)}")
        patch_frames, patch_height, patch_width = patch_size
        self._module.launch(
            name, launch.PATCHES, patches, blocks=-(-latents.size // _THREADS), threads=_THREADS, only_aligned=True,
            x=x.pointer, out=out.pointer, channels=channels, frames=frames, height=height, width=width,
            patch_frames=patch_frames, patch_height=patch_height, patch_width=patch_width,
        )  # fmt: skip
