"""`make test-gpu` ends with a verdict: which targets ran, which did not and why."""

import pytest

pytest_plugins = ["pytester"]
TESTS = """
import pytest

@pytest.fixture(params=["cuda", "rtx", "tensorrt", "cpu", "rtx on a double"])
def opened(request):
    if request.param in SKIPPED:
        pytest.skip(f"no library for {request.param}")
    return request.param

def test_contract(opened):
    assert opened not in BROKEN

@pytest.mark.gpu
def test_kernels():
    if "cuda" in SKIPPED:
        pytest.skip("no library for cuda")
"""


@pytest.mark.parametrize(
    ("skipped", "broken", "status", "expected"),
    [
        (
            ["tensorrt"],
            [],
            0,
            ["cuda * works: 2 tests passed", "tensorrt * did not run: no library for tensorrt", "*work: cuda, rtx."],
        ),
        ([], ["rtx"], 1, ["cuda * works: 2 tests passed", "rtx * FAILED: 1 of 1 tests", "*do not work: rtx."]),
        (
            ["cuda", "rtx", "tensorrt"],
            [],
            1,
            ["cuda * did not run: no library for cuda", "cpu * works*", "No target ran on a GPU here."],
        ),
    ],
)
def test_the_verdict_names_what_ran_and_why_the_rest_did_not(
    pytester: pytest.Pytester, skipped: list[str], broken: list[str], status: int, expected: list[str]
) -> None:
    pytester.makeini("[pytest]\nmarkers = gpu: needs a GPU")
    pytester.makepyfile(f"SKIPPED, BROKEN = {skipped}, {broken}\n{TESTS}")
    result = pytester.runpytest_inprocess("-p", "tests.gpu.verdict", "-q")
    assert result.ret == status
    result.stdout.fnmatch_lines(expected)
