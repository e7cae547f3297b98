"""The emulation of FP8 numbers, and the benchmarks that say where errors come from."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import fp8_error
from benchmarks.fp8_cases import CASES, Case, rows
from benchmarks.fp8_error import TRAINED, Errors, measure, table, together
from benchmarks.fp8_numerics import ATTENTION_PARTS, PRODUCTS, Numerics, Operators, Weight, quantized_rows, to_fp8
from benchmarks.moving_shapes import trained
from benchmarks.outliers import LEAST, WEIGHTS, constant_channels, outlier_channels, plain
from benchmarks.stage_errors import NETWORKS, TESTS, Collector
from benchmarks.stage_errors import table as stage_table
from benchmarks.torch_backend import WeightForms, torch_component
from export import functions
from runtime.schedulers import Conventions
from runtime.specs import Precision
from runtime.stages.transformer import transformer_stages
from runtime.transformer import Transformer
from runtime.variants import TransformerArch
from tests.harness import relative_error

ARCH = TransformerArch(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=16, text_len=40, freq_dim=32)
CASE = Case(arch=ARCH, latents=(16, 1, 6, 8), num_steps=2, every_generation=False)
STAGES = {stage.name: stage for stage in transformer_stages(ARCH)}
PRODUCTS_ONLY = Numerics(weights=frozenset(PRODUCTS), activations=frozenset(PRODUCTS))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


@pytest.fixture(scope="module")
def forms() -> WeightForms:
    return WeightForms(ARCH, plain(ARCH, torch.Generator().manual_seed(1)))


def predict(forms: WeightForms, numerics: Numerics | None) -> np.ndarray:
    with torch_component(forms, numerics) as component:
        transformer = Transformer(component, ARCH, CASE.latents, conventions=Conventions.ORIGINAL)
        prompt = transformer.encode_text(noise(3, ARCH.text_dim, seed=2).numpy())
        return transformer.predict(noise(*CASE.latents, seed=3).numpy(), 500.0, [prompt])[0]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These arrays are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Numbers


def test_each_row_has_its_greatest_at_the_end_of_the_range() -> None:
    values, scale = quantized_rows(torch.tensor([[1.0, -4.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 7e-4, 0.0]]))
    assert values.abs().amax(dim=1).tolist() == [448, 0, 448]
    assert scale.shape == (3, 1) and bool((scale > 0).all())
    torch.testing.assert_close(values[0] * scale[0], torch.tensor([1.0, -4.0, 0.5]))


def test_one_scale_for_all_rows_loses_what_is_too_small_for_it() -> None:
    x = torch.tensor([[400.0, 100.0], [1e-4, 2e-4]])
    whole, _ = quantized_rows(x, per_tensor=True)
    by_row, _ = quantized_rows(x)
    assert whole[1].tolist() == [0, 0]
    assert by_row[1].tolist() == [224, 448]


def test_numbers_beyond_the_range_stay_at_its_end() -> None:
    assert to_fp8(torch.tensor([449.0, 1e6, -1e6])).tolist() == [448, 448, -448]


def test_a_product_in_fp8_is_that_of_the_rounded_rows() -> None:
    x, weight, bias = noise(5, 32), noise(8, 32, seed=1), noise(8, seed=2)
    values, scale = quantized_rows(weight)
    operators = Operators(Numerics())
    operators.enter(STAGES["transformer.block_in"], {"w": Weight(values, scale.flatten(), narrow_input=True)})
    rounded_x, x_scale = quantized_rows(x)
    expected = (rounded_x * x_scale).double() @ (values * scale).double().T + bias
    assert relative_error(operators.linear(x, values, bias), expected) < 3e-3  # bf16's rounding of the output
    assert relative_error(expected, x.double() @ weight.double().T + bias) > 1e-2


def test_values_without_spread_pass_fp8_attention_and_the_product_behind_it_without_error() -> None:
    query, key = noise(40, 64), noise(40, 64, seed=1)
    value = noise(64, seed=2).expand(40, 64)
    weight, bias = to_fp8(noise(16, 64, seed=3)), torch.zeros(16)
    operators = Operators(Numerics(attention=frozenset(ATTENTION_PARTS)))
    operators.enter(STAGES["transformer.attention"], {})
    attended = operators.attention(query, key, value, num_heads=2)
    torch.testing.assert_close(attended, value)
    operators.enter(STAGES["transformer.block_out"], {"w": Weight(weight, torch.ones(16), narrow_input=True)})
    assert relative_error(operators.linear(attended, weight, bias), value @ weight.T) < 3e-3


# A transformer


def test_without_numerics_the_modules_run_as_they_are(forms: WeightForms) -> None:
    original = functions.linear
    exact = predict(forms, None)
    assert 1e-3 < relative_error(predict(forms, Numerics()), exact) < 2e-2
    assert functions.linear is original


def test_blocks_that_stay_wide_predict_as_in_bf16(forms: WeightForms) -> None:
    every_block = frozenset(range(ARCH.num_layers))
    wide = predict(forms, replace(PRODUCTS_ONLY, wide_blocks=every_block))
    np.testing.assert_array_equal(wide, predict(forms, Numerics()))
    assert relative_error(predict(forms, replace(PRODUCTS_ONLY, wide_blocks=frozenset((0,)))), wide) > 0


def test_what_can_be_narrowed_is_what_the_fp8_target_narrows() -> None:
    from runtime.precision import in_precision, weight_of_scales

    narrow = {
        weight.name for stage in STAGES.values() for weight in in_precision(stage, Precision.FP8).weights
        if weight_of_scales(weight.name) is None and weight.dtype.itemsize == 1
    }  # fmt: skip
    assert narrow == {f"{product}.weight" for product in PRODUCTS}


def test_a_table_has_errors_that_add_up() -> None:
    found = {row.row: row for row in measure(CASE, "random")}
    assert list(found) == [row.name for row in rows(ARCH.num_layers)]
    squares = {name: row.squared for name, row in found.items()}
    assert squares["bf16"] < squares["weights"] < squares["products"]
    added = squares["weights"] + squares["activations"] - squares["bf16"]  # both rows have bf16's own error
    assert 0.6 < squares["products"] / added < 1.6
    generated = {name: row.latents for name, row in found.items() if row.latents is not None}
    assert list(generated) == ["bf16", "products", "attention", "products and attention"]
    assert generated["bf16"] < generated["products"] < 0.5
    but = [row for row in found.values() if row.taken_away is not None]
    assert [row.row.startswith("products but") for row in but] == [True] * (len(PRODUCTS) + 4)
    assert found["products but first and last 1"].taken_away == pytest.approx(1 - squares["bf16"] / squares["products"])
    assert "| products but ffn.2 |" in table(list(found.values()))


def test_errors_of_several_generations_are_the_root_of_their_mean_square() -> None:
    one = Errors(row="weights", first=3e-2, middle=1e-2, last=0, seconds=1, latents=0.3, cosine=0.5)
    other = replace(one, first=4e-2, latents=0.4, cosine=-0.1)
    mean = together([one, other])
    found = [mean.first, mean.middle, mean.last, mean.latents, mean.cosine, mean.seconds]
    assert found == pytest.approx([12.5**0.5 * 1e-2, 1e-2, 0, 12.5**0.5 * 0.1, 0.2, 2])
    assert together([replace(one, latents=None, cosine=None)] * 2).latents is None


def test_the_trained_model_is_measured_with_its_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(
        CASES["moving-shapes"], latents=(16, 1, 2, 4), num_steps=2, captions=("a red circle", "a green square moves up")
    )
    chosen = [row for row in rows(case.arch.num_layers) if row.name in ("bf16", "products")]
    monkeypatch.setattr(fp8_error, "rows", lambda num_blocks: chosen)
    bf16, products = measure(case, TRAINED)
    assert bf16.squared < products.squared
    assert products.latents is not None and products.latents < 0.5
    assert measure(replace(case, captions=case.captions[:1]), TRAINED)[1].middle != products.middle


def test_the_trained_models_captions_are_embedded_without_padding() -> None:
    whole, nothing = trained.embed(["a red circle moves right on a blue background", ""])
    assert (whole.shape, nothing.shape) == ((10, trained.SIZE.transformer.text_dim), (1, trained.SIZE.transformer.text_dim))
    with pytest.raises(ValueError, match="checkpoint is of"):
        trained.transformer_weights(ARCH, torch.Generator())


def test_a_row_without_a_generation_leaves_its_columns_empty() -> None:
    line = table([Errors(row="weights", first=1e-2, middle=2e-2, last=3e-2, seconds=1)]).splitlines()[-1]
    assert line == "| weights | 1.0e-02 | 2.0e-02 | 3.0e-02 |  |  |  |"


def test_every_row_narrows_what_its_name_says() -> None:
    chosen = {row.name: row.numerics for row in rows(CASES["1.3b"].arch.num_layers)}
    for product in PRODUCTS:
        left = chosen[f"products but {product}"]
        assert frozenset(PRODUCTS) - left.weights == frozenset(PRODUCTS) - left.activations == {product}
    assert chosen["products but first and last 3"].wide_blocks == {0, 1, 2, 27, 28, 29}
    assert chosen["attention"].attention == frozenset(ATTENTION_PARTS) and not chosen["attention"].weights


# Weights with outliers


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_finite_and_the_same_again(kind: str) -> None:
    first, again = (WEIGHTS[kind](ARCH, torch.Generator().manual_seed(0)) for _ in range(2))
    for name, tensor in first.items():
        assert bool(tensor.isfinite().all())
        assert torch.equal(tensor, again[name])


def test_loud_channels_are_loud_behind_the_norm() -> None:
    tensors = outlier_channels(ARCH, torch.Generator().manual_seed(0))
    gain = 1 + tensors["blocks.1.modulation"][0, 1]
    assert int((gain > 0.9 * LEAST).sum()) == 2
    assert float(gain.median()) < 2


def test_constant_channels_are_constant_and_loud_in_the_first_residual() -> None:
    tensors = constant_channels(ARCH, torch.Generator().manual_seed(0))
    hidden = noise(50, 64) @ tensors["patch_embedding.weight"].reshape(ARCH.dim, -1).T + tensors["patch_embedding.bias"]
    loud = hidden.mean(dim=0).abs() > 0.9 * LEAST
    assert int(loud.sum()) == 2
    assert float((hidden.std(dim=0) / hidden.mean(dim=0).abs())[loud].max()) < 0.1


# Errors by stage


def test_the_greatest_error_of_each_kind_is_kept_and_failures_are_noted() -> None:
    collector = Collector()
    for value, failed in ((2e-3, False), (5e-3, True), (1e-3, False)):
        report = SimpleNamespace(
            when="call", failed=failed, nodeid="tests/gpu/test_vae.py::test_x", user_properties=[("encoded", value)]
        )
        collector.pytest_runtest_logreport(report)
    assert collector.errors == {"vae": {"encoded": 5e-3}}
    assert collector.failed == ["tests/gpu/test_vae.py::test_x"]
    assert stage_table(collector.errors).splitlines()[-1] == "| vae | encoded | 5.0e-03 |"


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_gpu_tests_that_report_errors(network: str) -> None:
    assert "record_property(" in (TESTS / f"test_{network}.py").read_text()
