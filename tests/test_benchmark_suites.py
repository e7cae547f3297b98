"""The GPU suites without a GPU: what is refused, what each would measure, and a whole suite of made-up work."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import dit, e2e, gpu_run, gpu_suites, offload
from benchmarks.gpu import Attempt, Options, Result, Suite, attentions
from benchmarks.gpu_report import as_row
from benchmarks.gpu_run import run_gpu_benchmark
from benchmarks.gpu_suites import SUITES, GpuRequest, cases_with_bundles, open_suite
from runtime.backends.cuda.device import find_obstacle
from runtime.errors import BundleError, DeviceMemoryError, RequestError, WanError
from runtime.precision import NOTHING_WIDE, WideParts
from runtime.residency import Unit, UnitTensor
from runtime.specs import DType, Precision
from runtime.variants import VARIANTS
from tests.conftest import Refuses, Toy
from tests.test_benchmark_gpu import result

without_gpu = pytest.mark.skipif(find_obstacle() is None, reason="there is a GPU here")


def bundle(
    variant: str,
    precision: Precision = Precision.BF16,
    *,
    target: str = "cuda",
    wide: WideParts = NOTHING_WIDE,
    weights: bool = False,
) -> Any:
    """As much of a bundle as the suites look at before they open it."""
    targets = {target: SimpleNamespace(precision=precision)}
    manifest = SimpleNamespace(
        variant=VARIANTS[variant], targets=targets, fp8_wide=wide, weights={"bf16": {}} if weights else {}
    )
    return SimpleNamespace(folder=Path("bundle"), manifest=manifest)


# What is refused


def test_the_help_names_every_suite(capsys: pytest.CaptureFixture[str]) -> None:
    import cli

    with pytest.raises(SystemExit):
        cli.main(["benchmark", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {"toy", *SUITES} <= set(words)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_cases_of_known_variants(name: str) -> None:
    suite = open_suite(name)
    assert len({case.name for case in suite.cases}) == len(suite.cases) > 0
    assert {case.variant for case in suite.cases} <= VARIANTS.keys()
    assert suite.checks.keys() <= suite.baselines.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "paint"), "suite 'paint': there is toy, quality, dit, vae, text, offload, e2e"),
        (("--suite", "dit", "--case", "2b"), "case '2b': suite dit has 1.3b-480p, 14b-480p"),
        (("--suite", "offload", "--baseline", "diffsynth"), "baseline 'diffsynth': suite offload has diffusers"),
        (("--suite", "e2e", "--baseline", "onnxruntime"), "baseline 'onnxruntime': suite e2e has diffusers"),
        (("--suite", "e2e", "--only-baselines"), "only baselines, and none is named"),
        (("--suite", "dit", "--budget", "8GiB"), "suite dit does nothing with budgets_gib; it takes attention, profile, seconds"),
        (("--suite", "text", "--profile"), "suite text does nothing with profile"),
        (("--suite", "vae", "--seconds", "0"), "seconds=0: need more than 0"),
        (("--suite", "vae", "--pairs", "3"), "--pairs: suite vae has no such option"),
        (("--case", "small"), "--case: suite toy has no such option"),
        (("--only-baselines",), "--only-baselines: suite toy has no such option"),
        (("--baseline", "diffusers", "--baseline", "x"), "suite toy takes one baseline"),
    ],
)  # fmt: skip
def test_what_a_suite_cannot_do_is_refused_with_what_it_can(
    refuses: Refuses, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    refuses("benchmark", *options, "--out", tmp_path / "out" / "result.json", code=2, message=message)
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="baseline diffsynth needs diffsynth, not installed here") as raised:
        gpu_suites.check_baselines("dit", dit.SUITE, ["diffsynth"])
    assert raised.value.hint == "pip install diffsynth"


def test_an_onnxruntime_without_a_cuda_provider_is_no_baseline(refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    message = "baseline onnxruntime needs CUDAExecutionProvider; onnxruntime .* here has CPUExecutionProvider"
    said = refuses("benchmark", "--suite", "dit", "--baseline", "onnxruntime", code=2, message=message)
    assert "pip install onnxruntime-gpu" in said


@without_gpu
@pytest.mark.parametrize("name", SUITES)
def test_without_a_gpu_a_suite_says_so(refuses: Refuses, tmp_path: Path, name: str) -> None:
    refuses("benchmark", "--suite", name, "--out", tmp_path / "r.json", code=6, message="this suite needs an NVIDIA GPU: ")
    assert list(tmp_path.iterdir()) == []


def test_bundles_choose_the_cases_unless_cases_were_asked_for() -> None:
    small = bundle("wan2.1-t2v-1.3b")
    assert [case.name for case in cases_with_bundles(dit.SUITE.cases, [small], asked=False)] == ["1.3b-480p"]
    assert cases_with_bundles(dit.SUITE.cases, [], asked=True) == list(dit.SUITE.cases)
    with pytest.raises(BundleError, match=r"case 14b-480p: needs a bundle of wan2\.1-t2v-14b; given are wan2\.1-t2v-1\.3b"):
        cases_with_bundles(dit.SUITE.cases[:2], [small], asked=True)
    with pytest.raises(BundleError, match="bundle: has target cpu"):
        cases_with_bundles(dit.SUITE.cases, [bundle("wan2.1-t2v-1.3b", target="cpu")], asked=False)


def test_attention_in_fp8_goes_with_fp8_weights() -> None:
    fp8 = bundle("wan2.1-t2v-14b", Precision.FP8)
    assert attentions(fp8, ()) == (Precision.BF16, Precision.FP8)
    assert attentions(fp8, (Precision.FP8,)) == (Precision.FP8,)
    assert attentions(bundle("wan2.1-t2v-14b"), (Precision.FP8,)) == (Precision.BF16,)


# Suites


def options(*bundles: Any, **given: Any) -> Options:
    return Options(**{"bundles": bundles, "seconds": 1.0, "scratch": Path("scratch"), **given})


def test_the_transformer_suite_measures_every_bundle_and_baseline() -> None:
    wide = WideParts(first_blocks=1)
    bundles = (bundle("wan2.1-t2v-14b"), *(bundle("wan2.1-t2v-14b", Precision.FP8, wide=each) for each in (NOTHING_WIDE, wide)))
    names = [name for name, _ in dit.attempts(dit.SUITE.cases[1], options(*bundles, baselines=("diffusers-compile",)))]
    assert names == [
        "wanrt bf16, attention bf16", "wanrt fp8, attention bf16", "wanrt fp8, attention fp8",
        "wanrt fp8 but first:1, attention bf16", "wanrt fp8 but first:1, attention fp8", "diffusers-compile",
    ]  # fmt: skip


def test_a_whole_generation_is_the_plain_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        report = {"first_step_seconds": 5.5, "step_seconds": [2.0, 1.0, 1.5], "stage_seconds": {"vae": 0.5},
                  "device_memory": {"peak_bytes": 3 * 2**30}}  # fmt: skip
        Path(command[-1] + ".json").write_text(json.dumps(report))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("subprocess.run", run)
    ((name, measurement),) = e2e.attempts(e2e.SUITE.cases[0], options(bundle("wan2.2-t2v-a14b", weights=True)))
    row = as_row(measurement(), "")
    assert name == row["peer"] == "wanrt bf16, attention bf16"
    assert (row["first_step_seconds"], row["median_step_seconds"], row["peak_memory_gib"]) == (5.5, 1.5, 3.0)
    assert commands[0][1:5] == ["-m", "cli", "run", "bundle"]
    assert "--target cuda --size 832x480 --frames 81 --steps 4 --attention bf16" in " ".join(commands[0])


def test_a_generation_in_a_fresh_process_brings_its_report(one_expert: Toy) -> None:
    small = ["--prompt", "a fox", "--size", "16x16", "--frames", "1", "--steps", "2", "--seed", "1", "--threads", "1"]
    seconds, report = e2e.run_once(one_expert.original, small)
    assert len(report["step_seconds"]) == 2
    assert 0 < report["first_step_seconds"] < seconds
    with pytest.raises(WanError, match=r"(?s)ended with 2: .*num_frames=2: need 4n"):
        e2e.run_once(one_expert.original, [*small, "--frames", "2"])


@dataclass(frozen=True)
class Sleep:
    name: str
    variant: str = "wan2.1-t2v-1.3b"


def made_up(case: Sleep, options: Options) -> Iterator[Attempt]:
    def too_large() -> Result:
        raise DeviceMemoryError("9 GiB needed")

    def broken() -> Result:
        raise ZeroDivisionError("no")

    yield "wanrt", lambda: result("wanrt", 1.0, case=case.name, tflop=10.0)
    yield "large", too_large
    yield "broken", broken
    yield "diffusers", lambda: result("diffusers", 2.0, case=case.name, tflop=10.0)
    raise RuntimeError("the next one could not be made")


def test_a_suite_reports_what_was_measured_refused_and_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = Suite(cases=(Sleep("a"), Sleep("b")), precisions=(), baselines={}, attempts=made_up, torch=False)
    monkeypatch.setattr(gpu_run, "open_suite", lambda name: suite)
    monkeypatch.setattr(gpu_run, "_facts", lambda suite: {"gpu": "NVIDIA H200", "arch": "sm_90"})
    monkeypatch.setattr(gpu_run, "open_bundle", lambda folder: bundle("wan2.1-t2v-1.3b"))
    lines: list[str] = []
    request = GpuRequest(suite="made-up", bundles=(tmp_path,), out=tmp_path / "result.json")
    report = run_gpu_benchmark(request, on_line=lines.append)
    assert [(row["case"], row["peer"]) for row in report["results"]] == [(c, p) for c in "ab" for p in ("wanrt", "diffusers")]
    assert report["refused"] == {"a large": "9 GiB needed", "b large": "9 GiB needed"}
    assert report["failures"].keys() == {"a broken", "a", "b broken", "b"}
    assert "could not be made" in report["failures"]["b"]
    assert "| 0.50 | 10 | 1%, 1% |" in report["table"]
    written = json.loads((tmp_path / "result.json").read_text())
    assert written.keys() == report.keys()
    assert written["results"] == report["results"]
    assert lines[0] == "a wanrt: 1 s (0.9-1.2, 3 runs)"


def test_baselines_can_be_measured_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempts(case: Sleep, options: Options) -> Iterator[Attempt]:
        for peer in ("wanrt fp8", "decode wanrt bf16", "diffusers"):
            yield peer, partial(result, peer, 1.0)

    baselines: Any = {"diffusers": ()}
    suite = Suite(cases=(Sleep("a"),), precisions=(), baselines=baselines, attempts=attempts, torch=False)
    monkeypatch.setattr(gpu_run, "open_suite", lambda name: suite)
    monkeypatch.setattr(gpu_run, "_facts", lambda suite: {"gpu": "NVIDIA H200", "arch": "sm_90"})
    monkeypatch.setattr(gpu_run, "open_bundle", lambda folder: bundle("wan2.1-t2v-1.3b"))
    request = GpuRequest(
        suite="made-up", bundles=(tmp_path,), baselines=("diffusers",), only_baselines=True, out=tmp_path / "result.json"
    )
    report = run_gpu_benchmark(request)
    assert [row["peer"] for row in report["results"]] == ["diffusers"]


def test_measurements_that_failed_end_the_command_with_an_error(
    command_line: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"table": "| table |", "failures": {"a broken": "no", "b broken": "no"}}
    monkeypatch.setattr(gpu_run, "run_gpu_benchmark", lambda request, on_line: found)
    status, out, err = command_line("benchmark", "--suite", "dit")
    assert (status, out) == (1, "| table |\n")
    assert err.startswith("error: 2 of the measurements failed, the first: a broken: no\nhint: ")


class Idle:
    """Stands in for a backend, a session and a bench: takes everything and does nothing."""

    device: Any = None

    def __init__(self, *arguments: Any, **named: Any) -> None: ...
    def need(self, attention: Precision) -> None: ...
    def measure(self, *arguments: Any) -> None: ...
    def close(self) -> None: ...


def test_random_weights_of_a_wide_block_are_of_its_own_type() -> None:
    fp8 = UnitTensor("blocks.1.ffn.0.weight", (8, 16), DType.F8_E4M3, 0)
    wide = UnitTensor("blocks.0.ffn.0.weight", (8, 16), DType.BF16, 0)
    units = [Unit(name="", tensors=(each,), nbytes=each.nbytes, block=0, per_prompt=False) for each in (wide, fp8)]
    weights = offload.RandomWeights(tuple(units))
    for each in (wide, fp8, wide):
        drawn = weights.tensor(each.name)
        assert (drawn.shape, drawn.nbytes) == (each.shape, each.nbytes)


def test_budgets_are_smallest_first_and_everything_resident_last(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CudaBackend", "CopyStream", "CudaSession", "Bench"):
        monkeypatch.setattr(offload, name, Idle)
    monkeypatch.setattr(offload, "cuda_kernels", lambda bundle: {})
    fp8 = bundle("wan2.1-t2v-14b", Precision.FP8)
    asked = options(fp8, budgets_gib=(8.0, 5.5), attention=(Precision.FP8,))
    names = [name for name, _ in offload.attempts(offload.SUITE.cases[0], asked)]
    assert names == [f"wanrt attention fp8, {room}" for room in ("5.5 GiB", "8 GiB", "all resident")]
    peers = [name for name, _ in offload.attempts(offload.SUITE.cases[0], options(fp8, baselines=("diffusers",)))]
    assert [name for name in peers if "wanrt" not in name.split()] == ["diffusers"]  # what --only-baselines leaves
