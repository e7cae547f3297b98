"""Which GPU runs what: the precisions of an architecture, and whose kernels it takes."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from engines.plan import TARGETS, architectures
from engines.targets.cuda.compile import SMALLEST_ARCH
from runtime.architectures import has_precision, nearest
from runtime.backends import RUNTIME_TARGETS
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.libraries import Libraries
from runtime.errors import EngineError, RequestError
from runtime.specs import Precision
from tests.conftest import Refuses


@pytest.mark.parametrize(
    ("gpu", "built", "expected"),
    [
        ("sm_90", ("sm_80", "sm_90", "sm_100"), "sm_90"),
        ("sm_89", ("sm_80", "sm_86"), "sm_86"),
        ("sm_86", ("sm_80", "sm_89"), "sm_80"),
        ("sm_103", ("sm_90", "sm_100", "sm_110"), "sm_100"),
        ("sm_121", ("sm_120", "sm_110"), "sm_120"),
        ("sm_100", ("sm_103", "sm_90"), None),
        ("sm_75", ("sm_80",), None),
        ("sm_90", (), None),
        ("sm_90", ("sm_", "sm_9x", "\x1b[2J", "sm_90\n", "sm_" + "9" * 5000), None),
        ("sm_90", ("compute_90", "sm_90"), "sm_90"),
    ],
)
def test_kernels_run_on_their_own_and_later_minor_revisions(gpu: str, built: tuple[str, ...], expected: str | None) -> None:
    assert nearest(gpu, built) == expected


def test_every_architecture_from_the_smallest_on_has_bf16_and_from_ada_on_fp8() -> None:
    assert not has_precision("sm_75", Precision.BF16) and has_precision("sm_75", Precision.FP16)
    assert has_precision(f"sm_{SMALLEST_ARCH}", Precision.BF16)
    assert not has_precision("sm_87", Precision.FP8)
    assert has_precision("sm_89", Precision.FP8) and has_precision("sm_110", Precision.FP8)


def test_fp8_is_compiled_for_architectures_that_have_it() -> None:
    cuda = TARGETS["cuda"]
    assert architectures(cuda, (), None) == cuda.architectures
    assert architectures(cuda, (), Precision.FP8) == ("sm_89", "sm_90", "sm_100", "sm_110", "sm_120")
    with pytest.raises(RequestError, match=r"architecture sm_80: target cuda has sm_89, .* in fp8") as caught:
        architectures(cuda, ("sm_80",), Precision.FP8)
    assert "--precision bf16 has sm_80" in caught.value.hint


def test_fp8_for_a_gpu_without_it_is_refused_before_anything_is_built(refuses: Refuses, tmp_path: Path) -> None:
    command = ("build-engines", "--engines-only", "--variant", "wan2.1-t2v-1.3b", "--target", "cuda", "--precision", "fp8")
    refuses(
        *command, "--arch", "sm_86", "--out", tmp_path / "bundle", code=2, message="architecture sm_86: target cuda has sm_89"
    )
    assert not (tmp_path / "bundle").exists()


def test_a_gpu_that_no_kernels_are_for_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = next(target for target in RUNTIME_TARGETS if target.name == "cuda")
    monkeypatch.setattr("runtime.backends.cuda.device.find_architecture", lambda: "sm_86")
    assert cuda.engine_obstacle((), ("sm_80", "sm_89")) is None
    found = cuda.engine_obstacle((), ("sm_89", "sm_90"))
    assert found is not None and found.startswith("its kernels are for sm_89, sm_90, this GPU is sm_86")


class Gpu(CudaBackend):
    """A backend whose GPU is only a name, with the kernels of an architecture."""

    def __init__(self, kernels: str) -> None:
        self._kernels = kernels
        super().__init__({})

    def _open_device(self) -> Any:
        return SimpleNamespace(name="a GPU", arch="sm_89", close=lambda: None)

    def _open_libraries(self, kernels: Any) -> Libraries:
        libraries = MagicMock()
        opened = cast(Libraries, SimpleNamespace(_device=self.device, _architecture=self._kernels))
        libraries.check_attention = partial(Libraries.check_attention, opened)
        return libraries


def test_fp8_attention_is_refused_where_the_kernels_have_none() -> None:
    backend = Gpu("sm_86")
    with pytest.raises(EngineError, match=r"attention in fp8: a GPU \(sm_89\) runs the kernels of sm_86, which have none"):
        backend.attention = Precision.FP8
    assert backend.attention is Precision.BF16
    backend = Gpu("sm_89")
    backend.attention = Precision.FP8
    assert backend.attention is Precision.FP8
