"""Convolutions on cuDNN against torch in float64 on the same bf16 operands."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from runtime.backends.cuda.convolution import Convolution
from runtime.backends.cuda.device import Device, DeviceArray
from runtime.backends.cuda.launch import Clearing
from runtime.errors import EngineError
from runtime.specs import DType
from tests.harness import relative_error
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

CASES: dict[str, dict[str, Any]] = {
    "window of frames": {"x": (4, 5, 7, 16), "weight": (24, 3, 3, 3, 16), "pads": (1, 1, 1, 1)},
    "one frame out": {"x": (3, 6, 10, 96), "weight": (96, 3, 3, 3, 96), "pads": (1, 1, 1, 1)},
    "over time only": {"x": (4, 3, 5, 32), "weight": (64, 3, 1, 1, 32)},
    "every second frame": {"x": (5, 3, 4, 16), "weight": (16, 3, 1, 1, 16), "time_stride": 2},
    "each frame": {"x": (2, 6, 4, 48), "weight": (24, 3, 3, 48), "pads": (1, 1, 1, 1)},
    "each frame, halved": {"x": (2, 6, 4, 24), "weight": (24, 3, 3, 24), "pads": (0, 0, 1, 1), "space_stride": 2},
    "positions": {"x": (2, 3, 5, 16), "weight": (40, 1, 1, 1, 16)},
    "positions of pictures": {"x": (1, 3, 5, 384), "weight": (1152, 1, 1, 384)},
}


@pytest.fixture(scope="module")
def convolution(device: Device) -> Iterator[Convolution]:
    with Convolution(device) as opened:
        yield opened


def noise(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> torch.Tensor:
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def put(device: Device, tensor: torch.Tensor) -> DeviceArray:
    return device.from_host(tensor.view(torch.uint16).numpy(), DType.BF16)


def get(device: Device, array: DeviceArray) -> torch.Tensor:
    return torch.from_numpy(device.to_host(array)).view(torch.bfloat16).double()


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, case: dict[str, Any]) -> torch.Tensor:
    top, left, bottom, right = case.get("pads", (0, 0, 0, 0))
    kernel = weight if weight.ndim == 5 else weight[:, None]
    planes = functional.pad(x.double().permute(3, 0, 1, 2), (left, right, top, bottom))
    space = case.get("space_stride", 1)
    strides = (case.get("time_stride", 1), space, space)
    return functional.conv3d(planes[None], kernel.double().movedim(-1, 1), bias.double(), stride=strides)[0].permute(1, 2, 3, 0)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "plus residual"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_convolution_matches_torch(device: Device, convolution: Convolution, case: dict[str, Any], with_residual: bool) -> None:
    x, bias = noise(case["x"], 0), noise(case["weight"][:1], 2)
    weight = noise(case["weight"], 1, spread=float(np.prod(case["weight"][1:])) ** -0.5)
    expected = reference(x, weight, bias, case)
    residual = noise(tuple(expected.shape), 3)
    out = device.empty(tuple(expected.shape), DType.BF16)
    given: dict[str, Any] = {name: value for name, value in case.items() if name not in ("x", "weight")}
    if with_residual:
        given["residual"] = put(device, residual)
    operands = put(device, x), put(device, weight), put(device, bias)
    convolution.run(*operands, out, **given)
    whole = expected + residual.double() if with_residual else expected
    assert relative_error(get(device, out), whole) < TOLERANCES["convolution, bf16"]
    first = device.to_host(out)
    convolution.run(*operands, out, **given)
    np.testing.assert_array_equal(device.to_host(out), first)


@pytest.mark.parametrize("size", [(12, 20), (36, 64)], ids=str)
def test_a_residual_may_be_what_the_convolution_in_front_makes(
    device: Device, convolution: Convolution, size: tuple[int, int]
) -> None:
    """As a residual block with a shortcut asks for. Kernels follow each other at once only while the stream is behind the host."""
    from cuda.bindings import driver

    operands = put(device, noise((4, *size, 48), 0)), put(device, noise((48, 3, 3, 3, 48), 1)), put(device, noise((48,), 2))
    shortcut = put(device, noise((2, *size, 96), 3)), put(device, noise((48, 1, 1, 1, 96), 4)), put(device, noise((48,), 5))
    made, out = (device.empty((2, *size, 48), DType.BF16) for _ in range(2))
    convolution.run(*operands, made, pads=(1, 1, 1, 1))
    device.synchronize()
    convolution.run(*shortcut, out, residual=made)
    expected = device.to_host(out)
    busy = Clearing(driver, device.empty((1 << 27,), DType.F8_E4M3), device.stream)
    forget = Clearing(driver, made, device.stream)
    for _ in range(5):
        for call in [busy] * 32 + [forget]:
            device.calls.put(call)
        convolution.run(*operands, made, pads=(1, 1, 1, 1))
        convolution.run(*shortcut, out, residual=made)
        np.testing.assert_array_equal(device.to_host(out), expected)


def test_shapes_that_do_not_fit_are_refused(device: Device, convolution: Convolution) -> None:
    x, bias = put(device, noise((3, 4, 4, 16), 0)), put(device, noise((8,), 1))
    weight, out = put(device, noise((8, 3, 3, 3, 16), 2)), device.empty((1, 4, 4, 8), DType.BF16)
    with pytest.raises(EngineError, match="do not fit"):
        convolution.run(x, weight, bias, out)  # without padding the output is smaller
    with pytest.raises(EngineError, match="multiples of 8"):
        convolution.run(
            put(device, noise((3, 4, 4, 3), 0)), put(device, noise((8, 3, 3, 3, 3), 2)), bias, out, pads=(1, 1, 1, 1)
        )
