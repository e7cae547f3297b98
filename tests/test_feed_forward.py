"""A feed-forward in pieces, over arrays of the host: each row goes through both products once, whatever the pieces are."""

from typing import Any, cast

import numpy as np
import pytest

from runtime.backends.cuda.array import DeviceArray, contiguous
from runtime.backends.cuda.feed_forward import feed_forward
from runtime.backends.cuda.kernels import Kernels
from runtime.backends.cuda.linear import Linear
from runtime.specs import DType

RNG = np.random.default_rng(0)


class HostLibraries:
    """`Linear` and the quantising kernel in float32; fp8 is a division by the row's largest number."""

    def __init__(self, *arrays: Any) -> None:
        self.arrays = [np.ascontiguousarray(array, np.float32) for array in arrays]

    def on_device(self, index: int) -> DeviceArray:
        array = self.arrays[index]
        return contiguous(array.ctypes.data, array.shape, DType.F32, None)

    def view(self, given: DeviceArray) -> Any:
        """The NumPy view of a part of one of the arrays."""
        array = next(a for a in self.arrays if a.ctypes.data <= given.pointer < a.ctypes.data + a.nbytes)
        start = (given.pointer - array.ctypes.data) // 4
        flat = array.reshape(-1)[start : start + given.size]
        return flat.reshape(given.shape)

    def run(self, x: DeviceArray, weight: DeviceArray, bias: DeviceArray, out: DeviceArray, **options: Any) -> None:
        product = self.view(x) @ self.view(weight).T
        scales = (options["x_scale"], options["weight_scale"])
        if scales[0] is not None:
            product = product * self.view(scales[0])[:, None] * self.view(scales[1])
        product = product + self.view(bias)
        self.view(out)[:] = np.maximum(product, 0) if options.get("gelu") else product

    def quantize_rows(self, x: DeviceArray, out: DeviceArray, scale: DeviceArray) -> None:
        self.view(scale)[:] = np.maximum(np.abs(self.view(x)).max(1), 1e-3)
        self.view(out)[:] = self.view(x) / self.view(scale)[:, None]


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 24, 29])
@pytest.mark.parametrize("fp8", [False, True])
def test_pieces_give_what_the_whole_gives(rows: int, fp8: bool) -> None:
    x, weight, outer = RNG.standard_normal((rows, 4)), RNG.standard_normal((6, 4)), RNG.standard_normal((5, 6))
    bias, outer_bias = RNG.standard_normal(6), RNG.standard_normal(5)
    scales = RNG.uniform(1, 2, rows), RNG.uniform(1, 2, 6), RNG.uniform(1, 2, 5)
    space = np.full((8, 6), np.nan), np.full((8, 6), np.nan), np.full(8, np.nan)
    host = HostLibraries(x, weight, bias, outer, outer_bias, np.full((rows, 5), np.nan), *space, *scales)
    arrays = [host.on_device(i) for i in range(len(host.arrays))]
    narrow: dict[str, Any] = dict(
        zip(("inner_fp8", "inner_scale", "x_scale", "weight_scale", "outer_weight_scale"), arrays[7:], strict=True)
    )
    feed_forward(cast(Kernels, host), cast(Linear, host), *arrays[:6], inner=arrays[6], **(narrow if fp8 else {}))
    if fp8:
        x, weight, outer = x * scales[0][:, None], weight * scales[1][:, None], outer * scales[2][:, None]
    expected = np.maximum(x @ weight.T + bias, 0) @ outer.T + outer_bias
    np.testing.assert_allclose(host.arrays[5], expected, rtol=1e-5, atol=1e-5)
