"""Attention over as many keys as there are queries: keys are brought to whole tiles first, which cuDNN's kernels are 10-17% faster on.

One H200, cuDNN 9.19, head dim 128: in bf16 a tile has 128 keys, in fp8 256. 40 heads and 32,760 tokens took 38.0 ms with 32,760 keys and
34.3 ms with 32,768 in bf16, 26.4 ms and 22.7 ms in fp8; the number of queries makes no difference.
"""

from runtime.backends.cuda.attention import Attention
from runtime.backends.cuda.attention_kernels import AttentionKernels
from runtime.backends.cuda.device import DeviceArray
from runtime.specs import DType

KEY_TILES = {DType.BF16: 128, DType.F8_E4M3: 256}
MOST_SPARE = 1 / 128
"""bf16's epsilon: the most spare keys of all keys that bf16 takes, see `SelfAttention.run`."""


class SelfAttention:
    """Runs `attention` over keys and values whose memory has spare rows (`DeviceArray.spare_rows`)."""

    def __init__(self, attention: Attention, kernels: AttentionKernels) -> None:
        self._attention, self._kernels = attention, kernels

    def run(self, query: DeviceArray, key: DeviceArray, value: DeviceArray, out: DeviceArray, *, num_heads: int) -> None:
        """`Attention.run`, with spare rows of key and value filled to whole tiles where there is room for them.

        In fp8 the spare keys are zeros and masked out. In bf16, where a mask costs what the tiles bring, they are the mean of the keys
        and their values the mean of the values. With s spare keys of n, a query gives them the share w of its weight, and out moves by w
        times its distance from the mean value. Whatever the query, w ≤ s / (n + s): the exponential is convex, so the mean key gets at
        most what a key gets in the mean. For scores of a normal distribution with spread σ, w is about s / n · exp(-σ² / 2), while out
        is about σ away from the mean value, in units of what the values spread along the query: 0.61 s / n at σ = 1 is the worst.

        For 32,768 keys s / n is 2.4e-4, where rounding out to bf16 is 1.7e-3. For 27,280 it is 4.1e-3; simulated in float64, relative
        to out: 1.2e-3 at σ = 0.3, 1.9e-3 at 1 (2.4e-3 if the values follow the keys), 4.4e-4 at 2, 1.9e-6 at 4, nothing where one key
        has all the weight, 1.8e-3 with values 100 times as large among them; no row is worse than 2.8e-3.

        It can be put right: (out - w · mean value) / (1 - w), w from the scores' sum, which cuDNN gives, and the query's product with
        the mean key. That pass reads query and out and writes out: 0.13 ms a block of the 5B, 0.5% of its forward.
        """
        keys = key.shape[0]
        spare = -keys % KEY_TILES.get(key.dtype, 1)
        if spare > min(key.spare_rows, value.spare_rows):
            spare = 0
        if key.dtype is DType.F8_E4M3:
            for array in (key, value) if spare else ():
                self._kernels.clear_spare_rows(array, spare)
            filled = key.with_spare_rows(spare), value.with_spare_rows(spare)
            self._attention.run(query, *filled, out, num_heads=num_heads, num_keys=keys)
            return
        if spare > MOST_SPARE * keys:
            spare = 0
        for array in (key, value) if spare else ():
            self._kernels.fill_spare_rows(array, spare)
        self._attention.run(query, key.with_spare_rows(spare), value.with_spare_rows(spare), out, num_heads=num_heads)
