"""Tests that need an NVIDIA GPU and the `cuda` extra: skipped with a reason where either is missing."""

from collections.abc import Iterator, Mapping
from functools import cache

import pytest

from runtime.backends.cuda.device import Device
from runtime.errors import EngineError


@cache
def obstacle() -> str:
    """Why no test here can run; empty when they can."""
    try:
        with Device():
            return ""
    except EngineError as exc:
        return exc.message


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and obstacle():
            item.add_marker(pytest.mark.skip(reason=obstacle()))


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    with Device() as opened:
        yield opened


@cache
def kernels_for_this_gpu() -> Mapping[str, bytes]:
    """The compiled kernels, by the architecture of this machine's GPU."""
    from engines.targets.cuda.compile import compile_kernels

    with Device() as opened:
        return {opened.arch: compile_kernels(opened.arch)}
