"""Whole generations beside diffusers, at toy size: both run in processes of their own, and weights come and go."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import e2e, e2e_diffusers
from benchmarks.e2e_diffusers import Generation, PeerReport, run_diffusers
from benchmarks.gpu import Options
from benchmarks.gpu_report import as_row
from runtime.errors import WanError
from runtime.geometry import VideoSize
from runtime.precision import NOTHING_WIDE
from runtime.specs import Precision
from runtime.variants import VARIANTS
from tests.test_random_file import tiny_variant

SMALL = VideoSize(width=32, height=32, num_frames=5)


def engines_only(folder: Path) -> Any:
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    targets = {"cuda": SimpleNamespace(precision=Precision.FP8)}
    manifest = SimpleNamespace(variant=VARIANTS["wan2.2-t2v-a14b"], targets=targets, fp8_wide=NOTHING_WIDE, weights={})
    return SimpleNamespace(folder=folder, manifest=manifest, sha256="0123456789abcdef" * 4)


def test_diffusers_generates_in_a_process_of_its_own_and_says_where_the_time_went() -> None:
    seconds, report = run_diffusers(tiny_variant(), SMALL, num_steps=3, prompt="a red fox", seed=1, device="cpu")
    assert set(report.stage_seconds) == {"load", "to_device", "text_encoder", "denoise", "vae", "video"}
    assert len(report.step_seconds) == 3
    assert sum(report.step_seconds) == pytest.approx(report.stage_seconds["denoise"])
    before = sum(report.stage_seconds[name] for name in ("load", "to_device", "text_encoder"))
    assert before < report.first_step_seconds < sum(report.stage_seconds.values()) < seconds
    assert report.output_std > 0


def job_in(folder: Path) -> Generation:
    return Generation(
        model=str(folder / "nothing"), video="", report=str(folder / "report.json"), prompt="", negative_prompt="", width=32,
        height=32, num_frames=5, fps=16, num_steps=1, guidance=(4.0, 3.0), seed=1, device="cpu",
    )  # fmt: skip


def test_what_diffusers_says_last_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(WanError, match=r"(?s)diffusers ended with 1: .*nothing"):
        e2e_diffusers._run(job_in(tmp_path), tmp_path)


@pytest.mark.parametrize("spread", [0.0, float("nan"), float("inf")])
def test_constant_or_infinite_frames_of_the_peer_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    job = job_in(tmp_path)

    def run(command: list[str], **_: Any) -> Any:
        report = PeerReport(
            stage_seconds={}, step_seconds=[1.0], first_step_seconds=1.0, peak_memory_bytes=None, output_std=spread
        )
        e2e_diffusers.write_report(job.report, report)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(WanError, match="frames are constant or not finite"):
        e2e_diffusers._run(job, tmp_path)


def test_the_peer_makes_the_case_with_the_same_prompt_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(variant: Any, size: VideoSize, **given: Any) -> tuple[float, PeerReport]:
        asked.update(given, variant=variant.name, size=size)
        stages = {"load": 20.0, "denoise": 26.0}
        return 60.0, PeerReport(
            stage_seconds=stages,
            step_seconds=[7.0, 6.5, 6.0, 6.5],
            first_step_seconds=28.0,
            peak_memory_bytes=80 * 2**30,
            output_std=0.2,
        )

    monkeypatch.setattr(e2e_diffusers, "run_diffusers", run)
    options = Options(bundles=(engines_only(tmp_path / "b"),), baselines=("diffusers",), seconds=1.0, scratch=tmp_path)
    *_, (name, measurement) = e2e.attempts(e2e.SUITE.cases[0], options)
    row = as_row(measurement(), "")
    assert (name, row["peer"], row["seconds"], row["num_steps"]) == ("diffusers", "diffusers", 60.0, 4)
    assert (row["first_step_seconds"], row["median_step_seconds"], row["peak_memory_gib"]) == (28.0, 6.5, 80.0)
    ours = e2e.run_options(e2e.SUITE.cases[0], Precision.FP8)
    assert asked["prompt"] == ours[ours.index("--prompt") + 1]
    assert str(asked["seed"]) == ours[ours.index("--seed") + 1]
    assert (asked["variant"], asked["num_steps"]) == ("wan2.2-t2v-a14b", 4)


def test_a_bundle_without_weights_is_filled_once_in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[Path] = []
    monkeypatch.setattr("benchmarks.random_bundle.fill_with_random_weights", filled.append)
    bundle, scratch = engines_only(tmp_path / "bundle"), tmp_path / "scratch"
    scratch.mkdir()
    folder = e2e._filled(bundle, scratch)
    assert e2e._filled(bundle, scratch) == folder
    assert filled == [folder]
    assert json.loads((folder / "manifest.json").read_text()) == {}
    assert folder.parent == scratch
    e2e._empty(scratch)
    assert not folder.exists()
    bundle.manifest.weights = {"fp8": {}}
    assert e2e._filled(bundle, scratch) == bundle.folder


@pytest.mark.parametrize("error", [WanError("no room"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_copy_that_could_not_be_filled_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def full(folder: Path) -> None:
        raise error

    monkeypatch.setattr("benchmarks.random_bundle.fill_with_random_weights", full)
    with pytest.raises(type(error)):
        e2e._filled(engines_only(tmp_path / "bundle"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_half_a_copy_does_not_serve_the_next_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(source: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    bundle = engines_only(tmp_path / "bundle")
    monkeypatch.setattr("shutil.copytree", cut)
    with pytest.raises(OSError, match="No space left"):
        e2e._filled(bundle, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
