"""The noise is torch's, for every size and seed."""

import numpy as np
import pytest
import torch

from runtime.errors import RequestError
from runtime.noise import randn

SHAPES = [(), (0,), (1,), (2,), (3, 5), (15,), (16,), (17,), (31,), (32,), (1000,), (3, 5, 7, 11), (16, 1, 2, 3), (40_000,)]
SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**40 + 17, 2**64 - 1]
FUSED = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def torch_randn(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def assert_same(given: np.ndarray, expected: np.ndarray) -> None:
    assert given.shape == expected.shape and given.dtype == expected.dtype
    if FUSED:
        np.testing.assert_array_max_ulp(given, expected, maxulp=1)
    else:  # torch's portable code rounds the angle elsewhere: 2.4e-6 measured
        np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_of_every_shape_equals_torch(shape: tuple[int, ...]) -> None:
    for seed in SEEDS:
        assert_same(randn(seed, shape), torch_randn(seed, shape))


def test_small_noise_of_every_size_equals_torch() -> None:
    for size in range(40):
        for seed in range(20):
            assert_same(randn(seed, (size,)), torch_randn(seed, (size,)))


def test_noise_of_a_whole_video_equals_torch() -> None:
    given, expected = randn(7, (16, 21, 60, 104)), torch_randn(7, (16, 21, 60, 104))
    assert_same(given, expected)
    if FUSED:
        assert np.array_equal(given.view(np.int32), expected.view(np.int32))


def test_seeds_that_share_their_lowest_32_bits_give_the_same_noise_as_in_torch() -> None:
    assert np.array_equal(randn(5, (20,)), randn(2**32 + 5, (20,)))
    assert np.array_equal(torch_randn(5, (20,)), torch_randn(2**32 + 5, (20,)))


def test_global_generators_stay_untouched() -> None:
    np.random.seed(11)
    expected = np.random.random(4)
    np.random.seed(11)
    randn(3, (100,))
    assert np.array_equal(np.random.random(4), expected)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(RequestError, match=f"seed={seed}"):
        randn(seed, (16,))
