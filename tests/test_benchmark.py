"""The benchmark: its arithmetic, its table, its block in a README, and a real pair of runs."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.launch import launch
from benchmarks.suite import BenchmarkRequest, frame_difference, run_benchmark
from benchmarks.table import BEGIN, END, check_readme, markdown_table, replace_block, rewrite_readme, spread, summarise
from benchmarks.toy_checkpoint import ToyModel
from benchmarks.toy_tokenizer import VOCABULARY
from benchmarks.workload import Workload
from runtime.errors import RequestError, WanError
from runtime.variants import TextEncoderArch, TransformerArch, VaeArch


def measured(cold_start_s: float, total_s: float, peak_mib: int) -> dict[str, float]:
    return {"cold_start_s": cold_start_s, "total_s": total_s, "peak_memory_bytes": peak_mib * 2**20}


PAIRS = [
    (measured(1.0, 8.0, 100), measured(4.0, 10.0, 500)),
    (measured(2.0, 9.0, 110), measured(20.0, 30.0, 440)),
    (measured(1.5, 7.0, 120), measured(3.0, 7.0, 400)),
]
SMALLEST = Workload(
    model=ToyModel(
        transformer=TransformerArch(dim=24, ffn_dim=48, num_heads=2, num_layers=1, text_dim=16, freq_dim=16),
        text_encoder=TextEncoderArch(dim=16, attention_dim=16, ffn_dim=32, num_heads=2, num_layers=1, vocab_size=len(VOCABULARY)),
        vae=VaeArch(base_dim=4, num_res_blocks=1),
    ),
    width=32,
    height=16,
    num_frames=5,
    num_steps=2,
)  # fmt: skip


def result() -> dict[str, Any]:
    return {
        "baseline": "diffusers",
        "machine": {"cpu": "Example CPU", "cores": 2},
        "versions": {"wanrt": "0.1.0", "onnxruntime": "1.32.0", "diffusers": "0.42.1", "torch": "2.13.0"},
        "work": {"model": {"transformer": {"dim": 256, "num_layers": 8}}, "width": 256, "height": 160, "num_frames": 17,
                 "num_steps": 8, "num_threads": 2},
        "warm_up_pairs": 1,
        "largest_frame_difference": 1,
        "pairs": [{"ours": ours, "baseline": baseline} for ours, baseline in PAIRS],
        "summary": summarise(PAIRS),
    }  # fmt: skip


def test_a_ratio_is_taken_within_its_pair() -> None:
    cold_start = summarise(PAIRS)["cold_start_s"]
    assert cold_start["ratio"] == {"median": 0.25, "min": 0.1, "max": 0.5}  # the ratio of the medians would be 0.375
    assert cold_start["ours"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert cold_start["baseline"] == {"median": 4.0, "min": 3.0, "max": 20.0}


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    assert spread([4.0, 1.0, 2.0, 10.0]) == {"median": 3.0, "min": 1.0, "max": 10.0}


def test_the_table_shows_what_the_result_holds() -> None:
    lines = markdown_table(result()).splitlines()
    assert lines[0] == "| | wanrt | diffusers | ratio (min-max) | goal |"
    assert lines[2] == "| cold start: process start to first denoised step | 1.50 s | 4.00 s | 0.25 (0.10-0.50) | ≤ 0.25 |"
    assert lines[4] == "| peak memory | 110 MiB | 440 MiB | 0.25 (0.20-0.30) | ≤ 0.5 |"
    assert lines[-1].startswith("Medians of 3 pairs of fresh processes") and "Example CPU, 2 cores" in lines[-1]


def test_only_the_block_of_a_readme_is_rewritten(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{BEGIN}\nold table\n{END}\nrest — with signs\n", encoding="utf-8")
    rewrite_readme(readme, "new table")
    assert readme.read_text(encoding="utf-8") == f"# Title\n{BEGIN}\nnew table\n{END}\nrest — with signs\n"
    rewrite_readme(readme, "new table")
    assert readme.read_text(encoding="utf-8").count("new table") == 1
    assert os.listdir(tmp_path) == ["README.md"]


@pytest.mark.parametrize(
    "text", ["no marks", f"{BEGIN} only", f"{END} before {BEGIN}", f"{BEGIN} {BEGIN} {END}", f"{BEGIN} {END} {END}"]
)
def test_a_readme_without_exactly_one_block_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="one block"):
        replace_block(text, "table")


def test_a_missing_readme_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not a readable text file"):
        check_readme(tmp_path / "README.md")
    with pytest.raises(RequestError, match="not a readable text file"):
        run_benchmark(BenchmarkRequest(readme=tmp_path / "README.md", out=tmp_path))


@pytest.mark.parametrize("request_", [BenchmarkRequest(suite="x"), BenchmarkRequest(baseline="x"), BenchmarkRequest(pairs=0)])
def test_unknown_names_and_no_pairs_are_refused(request_: BenchmarkRequest) -> None:
    with pytest.raises(RequestError):
        run_benchmark(request_)


def test_videos_that_differ_by_more_than_rounding_are_not_compared(tmp_path: Path) -> None:
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    for name, change in {"same": 0, "rounded": 1, "other": 2}.items():
        changed = frames.copy()
        changed[1, 2, 3, 0] += change
        np.save(tmp_path / f"{name}.npy", changed)
    np.save(tmp_path / "short.npy", frames[:1])
    assert frame_difference(tmp_path / "same.npy", tmp_path / "rounded.npy") == 1
    with pytest.raises(WanError, match="differ by 2 of 255"):
        frame_difference(tmp_path / "same.npy", tmp_path / "other.npy")
    with pytest.raises(WanError, match="differ in shape"):
        frame_difference(tmp_path / "same.npy", tmp_path / "short.npy")


def test_a_launch_reports_how_the_process_ended() -> None:
    ended = launch([sys.executable, "-S", "-c", "import time; time.sleep(0.05); raise SystemExit(3)"])
    assert ended.exit_code == 3
    assert ended.ended_at - ended.started_at >= 0.05


@pytest.mark.slow
def test_a_real_pair_of_runs_is_measured_and_written(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    found = run_benchmark(BenchmarkRequest(pairs=1, out=tmp_path / "result.json", readme=readme), workload=SMALLEST)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert readme.read_text() == f"{BEGIN}\n{found['table']}\n{END}\n"
    assert found["largest_frame_difference"] <= 1
    (pair,) = found["pairs"]
    for run in pair["ours"], pair["baseline"]:
        assert 0 < run["cold_start_s"] < run["total_s"]
    # This test's own process holds PyTorch; a peak that included it would make the two alike.
    assert pair["ours"]["peak_memory_bytes"] < 0.5 * pair["baseline"]["peak_memory_bytes"]
