"""A plugin of pytest for `make test-emulated`: the tests of `tests/gpu` run on the emulated GPU."""

from contextlib import ExitStack

import pytest

from tests.emulator import emulated_gpu, nvrtc

_OWN_PROCESS = "starts a process, which the emulator is not in"
_NO_TIME = "the emulated GPU has no time of its own"
_NOT_EMULATED = {
    "test_products_and_attention_import_no_framework": _OWN_PROCESS,
    "test_memory_that_another_process_holds_is_a_clean_error_and_comes_back": _OWN_PROCESS,
    "test_a_device_that_is_lost_ends_with_the_exit_code_of_its_kind": _OWN_PROCESS,
    "test_a_terminated_process_ends_its_threads_while_streaming": _OWN_PROCESS,
    "test_the_bits_are_those_of_one_call_at_a_time": _NO_TIME,
    "test_a_residual_may_be_what_the_convolution_in_front_makes": _NO_TIME,
    "test_run.py": _OWN_PROCESS,
    "test_tensorrt.py": "TensorRT's libraries are not emulated",
}
"""Names of tests and files, and why they cannot run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulator-seed", type=int, default=0, help="of which stream of the emulated GPU goes on when")


def pytest_configure(config: pytest.Config) -> None:
    if reason := nvrtc.obstacle():
        raise pytest.UsageError(reason)
    stack = ExitStack()
    stack.enter_context(emulated_gpu(seed=config.getoption("--emulator-seed")))
    config.add_cleanup(stack.close)


def pytest_report_header(config: pytest.Config) -> str:
    return f"emulated GPU, seed {config.getoption('--emulator-seed')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = _NOT_EMULATED.get(item.path.name) or _NOT_EMULATED.get(getattr(item, "originalname", item.name))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
