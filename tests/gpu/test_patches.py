"""Latents become patches, and patches latents, on the GPU as `runtime.geometry` moves them on the host: bit by bit."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from runtime.backends.cuda.device import Device
from runtime.backends.cuda.patch_kernels import PatchKernels
from runtime.geometry import patchify, token_grid, unpatchify
from runtime.specs import DType
from tests.gpu.conftest import kernels_for_this_gpu

pytestmark = pytest.mark.gpu

CASES = [
    ((16, 2, 6, 10), (1, 2, 2)),
    ((48, 3, 4, 6), (1, 2, 2)),
    ((36, 1, 2, 2), (1, 2, 2)),
    ((8, 4, 6, 9), (2, 3, 1)),
    ((16, 21, 60, 104), (1, 2, 2)),
]  # latents, patch


@pytest.fixture(scope="module")
def kernels(device: Device) -> PatchKernels:
    return PatchKernels(device, kernels_for_this_gpu()[device.arch])


@pytest.mark.parametrize(("shape", "patch_size"), CASES)
def test_patches_are_those_of_the_host_and_back(
    device: Device, kernels: PatchKernels, shape: tuple[int, ...], patch_size: tuple[int, int, int]
) -> None:
    arch = cast(Any, SimpleNamespace(patch_size=patch_size))
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    expected = patchify(latents, arch)
    patches = device.empty(expected.shape, DType.F32)
    kernels.cut(device.from_host(latents), patches, patch_size)
    assert (device.to_host(patches) == expected).all()
    joined = device.empty(shape, DType.F32)
    kernels.join(patches, joined, patch_size)
    assert (device.to_host(joined) == unpatchify(expected, token_grid(shape, arch), arch)).all()


def test_latents_that_are_no_whole_patches_are_refused(device: Device, kernels: PatchKernels) -> None:
    latents, patches = device.empty((16, 1, 5, 6), DType.F32), device.empty((6, 64), DType.F32)
    with pytest.raises(ValueError, match="expected F32"):
        kernels.cut(latents, patches, (1, 2, 2))
    with pytest.raises(ValueError, match="expected F32"):
        kernels.join(patches, device.empty((8, 1, 4, 6), DType.F32), (1, 2, 2))
