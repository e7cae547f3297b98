"""What the GPU suites share: measuring, formulas, rows and tables."""

from typing import Any

import numpy as np
import pytest

from benchmarks import flops, offload, text
from benchmarks.gpu import Result, checked_std, measure, relative_error
from benchmarks.gpu_report import PEAK_TFLOPS, as_row, markdown_table
from runtime.variants import TextEncoderArch, TransformerArch


def result(peer: str, seconds: float, *, case: str = "small", tflop: float | None = None) -> Result:
    return Result(
        case=case, peer=peer, seconds=seconds, fastest=seconds * 0.9, slowest=seconds * 1.2, runs=3, warmups=2,
        first_seconds=9.0, output_std=1.0, peak_memory_gib=2.5, tflop=tflop, tokens=1200,
    )  # fmt: skip


# Measuring


def test_a_measurement_warms_up_and_then_takes_the_median() -> None:
    values = iter(np.random.default_rng(0).random((5, 4)))
    timing, output = measure(lambda: next(values), seconds=0, warmups=2, min_runs=3)
    assert (timing.runs, timing.warmups) == (3, 2)
    assert timing.fastest <= timing.seconds <= timing.slowest
    assert timing.output_std == pytest.approx(output.std())
    assert next(values, None) is None


def test_a_measurement_goes_on_for_its_time_but_not_for_ever() -> None:
    work = lambda: np.arange(2.0)  # noqa: E731
    assert measure(work, seconds=1e9, max_runs=7)[0].runs == 7


def test_output_that_stays_on_the_device_is_not_looked_at() -> None:
    timing, output = measure(lambda: None, seconds=0)
    assert (timing.output_std, output) == (None, None)


@pytest.mark.parametrize(
    "output", [np.zeros(3), np.array([1.0, np.nan]), [np.arange(3.0), np.ones(3)], [np.array([np.inf, 1])], []]
)
def test_constant_or_infinite_output_is_refused(output: Any) -> None:
    with pytest.raises(RuntimeError, match="constant or not finite"):
        measure(lambda: output, seconds=0)


def test_the_spread_of_several_outputs_is_the_first_ones() -> None:
    assert checked_std([np.array([0.0, 2.0]), np.array([0.0, 8.0])]) == 1.0


def test_a_relative_error_is_of_norms_and_must_be_finite() -> None:
    assert relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    with pytest.raises(RuntimeError, match="not finite"):
        relative_error(np.array([np.nan]), np.array([1.0]))


# Formulas, against sums by hand


def test_a_transformer_forward_is_counted_layer_by_layer() -> None:
    arch = TransformerArch(dim=2, ffn_dim=3, num_heads=1, num_layers=2, text_len=5)
    tokens = 7
    multiply_adds = (
        tokens * 2 * (3 * 2)  # query, key, value
        + 2 * tokens * tokens * 2  # attention: scores and values
        + tokens * 2 * 2  # its output
        + 2 * (tokens * 2 * 2)  # cross-attention: query, output
        + 2 * tokens * 5 * 2  # scores and values over the text
        + 2 * tokens * 2 * 3  # FFN
    )
    assert flops.forward_tflop(arch, tokens) * 1e12 == pytest.approx(2 * 2 * multiply_adds)


def test_a_prompt_is_counted_layer_by_layer() -> None:
    arch = TextEncoderArch(dim=2, attention_dim=3, ffn_dim=5, num_heads=1, num_layers=4)
    tokens = 7
    multiply_adds = tokens * 4 * (2 * 3) + 2 * tokens * tokens * 3 + tokens * 3 * (2 * 5)  # a gated FFN has three matrices
    assert text.forward_tflop(arch, tokens) * 1e12 == pytest.approx(2 * 4 * multiply_adds)
    assert text.block_bytes(arch) == 4 * 2 * (4 * 2 * 3 + 3 * 2 * 5)


def test_shares_of_the_peak_are_of_the_named_gpu() -> None:
    peaks = PEAK_TFLOPS["NVIDIA H200"]
    row = as_row(result("wanrt fp8", 2.0, tflop=peaks["bf16"]), "NVIDIA H200")
    assert row["share_of_bf16_peak"] == pytest.approx(0.5)
    assert row["share_of_fp8_peak"] == pytest.approx(0.5 * peaks["bf16"] / peaks["fp8"])
    assert not [key for key in as_row(result("wanrt", 1.0, tflop=1.0), "another GPU") if key.startswith("share")]
    assert as_row(result("wanrt", 1.0), "NVIDIA H200")["share_of_fp8_peak"] is None


# Tables


def test_the_ratio_is_to_the_first_row_of_the_case_that_is_not_ours() -> None:
    results = [result("wanrt bf16", 1.0, tflop=500.0), result("diffusers", 2.0), result("diffusers-compile", 4.0)]
    rows = [as_row(r, "NVIDIA H200") for r in [*results, result("wanrt bf16", 0.02, case="alone")]]
    lines = markdown_table(rows).splitlines()
    assert lines[2] == "| small | wanrt bf16 | 1,200 | 1.000 s (0.900 s-1.200 s), 3 | 0.50 | 500 | 51%, 25% | 2.5 GiB |"
    assert lines[4] == "| small | diffusers-compile | 1,200 | 4.000 s (3.600 s-4.800 s), 3 | 2.00 | – | – | 2.5 GiB |"
    assert lines[5] == "| alone | wanrt bf16 | 1,200 | 20.00 ms (18.00 ms-24.00 ms), 3 | – | – | – | 2.5 GiB |"


def test_works_of_one_case_are_compared_apart() -> None:
    decode, encode = (
        {**as_row(result("diffusers", seconds), ""), "work": work} for work, seconds in (("decode", 4.0), ("encode", 2.0))
    )
    ours = [{**as_row(result("wanrt", 1.0), ""), "work": work} for work in ("decode", "encode")]
    cells = [line.split(" | ")[4] for line in markdown_table([decode, encode, *ours]).splitlines()[4:]]
    assert cells == ["0.25", "0.50"]


def test_shares_of_resident_speed_are_within_one_precision_of_attention() -> None:
    def measured(budget: float | None, attention: str, seconds: float) -> Result:
        return offload.OffloadResult(
            case="c", peer="p", work=f"fp8, attention {attention}", seconds=seconds, fastest=seconds, slowest=seconds, runs=2,
            warmups=1, first_seconds=9.0, output_std=1.0, peak_memory_gib=8.0, tflop=None, precision="fp8", attention=attention,
            budget_gib=budget, resident_blocks=1, num_blocks=40, predicted_peak_gib=8.0, driver_gib=9.0,
        )  # fmt: skip

    curve = offload.with_shares([measured(8, "fp8", 4.0), measured(None, "fp8", 3.0), measured(8, "bf16", 5.0)])
    assert [as_row(r, "")["share_of_resident_speed"] for r in curve] == [0.75, 1.0, None]
