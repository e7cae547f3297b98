"""The `emulated` target: it rounds exactly where a typed graph's types say so, and its videos are near the float32 ones."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import parser
from torch import Tensor

import export.graphs
from benchmarks.typed_errors import PRECISIONS, generation_errors
from benchmarks.typed_stages import Errors, network_errors
from engines.precision import functions
from engines.precision.emulated import emulated_graph
from engines.verification.verify import LONG_TOLERANCES
from engines.verification.verify import TOLERANCES as TOLERANCES_OF_VERIFY
from runtime.bundle import open_bundle
from runtime.errors import BuildError
from runtime.geometry import VideoSize
from runtime.opening import choose_target
from runtime.precision import FP8_MAX
from runtime.request import GenerateRequest
from runtime.specs import Precision
from runtime.variants import Variant
from tests.conftest import Toy, traced_once
from tests.tolerances import TOLERANCES, TYPED_ERRORS, TYPED_GENERATION
from tests.typed_toys import CLEAN_TOY, TOY, traced

NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
REQUEST = GenerateRequest(
    prompt="a red panda runs on snow", negative_prompt="slow dog", width=32, height=32, num_frames=5, num_steps=3, seed=4
)


def run(text: str, inputs: Mapping[str, Tensor], *, bodies: tuple[str, ...] = ()) -> Tensor:
    """The one output, float32, of a typed graph's emulation."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23, "wanrt" : 1]> {text}')
    model.functions.extend(functions.function_proto(name) for name in bodies)
    emulated = emulated_graph(model)
    onnx.checker.check_model(emulated)
    session = onnxruntime.InferenceSession(emulated.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def numbers(*shape: int, seed: int = 0, step: float = 2**-6) -> Tensor:
    """Multiples of a small power of two: sums of their products are exact in float32, whatever their order."""
    return torch.randint(-64, 65, shape, generator=torch.Generator().manual_seed(seed)) * step


@pytest.mark.parametrize("kind", NARROW)
def test_every_operator_rounds_once_as_torch_does(kind: str) -> None:
    dtype = NARROW[kind]
    x, weight, bias = numbers(5, 24, seed=1), numbers(24, 16, seed=2), numbers(16, seed=3, step=2**-12)
    found = run(
        f"""g (float[5, 24] x, float[24, 16] weight, float[16] bias) => (float[5, 16] y) {{
            a = Cast <to = {onnx.TensorProto.DataType.Value(kind.upper())}> (x)
            w = CastLike (weight, a)
            b = CastLike (bias, a)
            product = MatMul (a, w)
            total = Add (product, b)
            square = Mul (total, total)
            y = Cast <to = 1> (square)
        }}""",
        {"x": x, "weight": weight, "bias": bias},
    )
    total = (x.to(dtype) @ weight.to(dtype)) + bias.to(dtype)
    assert torch.equal(found, (total * total).float())
    wide = (x @ weight + bias).square()
    assert not torch.equal(found, wide.to(dtype).float()), "the operators in between round, too"


@pytest.mark.parametrize("kind", NARROW)
def test_attention_rounds_its_weights_and_its_result_only(kind: str) -> None:
    dtype = NARROW[kind]
    query, key = torch.zeros(2, 8), torch.zeros(3, 8)  # three equal weights, a third each
    value = torch.cat((1 + torch.arange(8)[None] / 128, torch.zeros(2, 8)))
    code = onnx.TensorProto.DataType.Value(kind.upper())
    found = run(
        f"""g (float[2, 8] query, float[3, 8] key, float[3, 8] value) => (float[2, 8] y) {{
            q = Cast <to = {code}> (query)
            k = Cast <to = {code}> (key)
            v = Cast <to = {code}> (value)
            attended = wanrt.ScaledAttention <num_heads = 1> (q, k, v)
            y = Cast <to = 1> (attended)
        }}""",
        {"query": query, "key": key, "value": value},
        bodies=(functions.SCALED_ATTENTION,),
    )
    third = torch.tensor(1 / 3).to(dtype).float()
    assert torch.equal(found[0], (third * value[0]).to(dtype).float())


def test_fp8_is_rounded_to_even_and_stays_at_its_end() -> None:
    x = torch.tensor([1.0625, 1.1875, -3.4, 2.0**-9, 2.0**-11, 447.0, 460.0, -1e6])
    found = run(
        f"""g (float[{len(x)}] x) => (float[{len(x)}] y) {{
            one = Constant <value_float = 1.0> ()
            narrow = QuantizeLinear <output_dtype = 17> (x, one)
            y = DequantizeLinear (narrow, one)
        }}""",
        {"x": x},
    )
    expected = x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    assert expected.tolist() == [1.0, 1.25, -3.5, 2.0**-9, 0.0, 448.0, 448.0, -448.0]
    assert torch.equal(found, expected)


def test_attention_with_a_mask_is_refused() -> None:
    text = """g (bfloat16[1, 1, 2, 8] q, bfloat16[1, 1, 2, 8] k, bfloat16[1, 1, 2, 8] v) => (bfloat16[1, 1, 2, 8] y) {
        y = Attention <is_causal = 1> (q, k, v)
    }"""
    with pytest.raises(BuildError, match="is_causal"):
        emulated_graph(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}'))


def check_errors(errors: Errors, measured: Mapping[str, tuple[float, ...]]) -> None:
    """Each is what was measured, within a factor: one that grew lost accuracy, one that shrank no longer rounds as its types say."""
    factor = TOLERANCES["typed stage, times what was measured"]
    found = {f"{stage}/{tensor}": forms for stage, tensors in errors.items() for tensor, forms in tensors.items()}
    assert found.keys() == measured.keys()
    for name, forms in found.items():
        for (form, error), expected in zip(forms.items(), measured[name], strict=True):
            low, high = (expected / factor, expected * factor) if expected else (0.0, TOLERANCES["stage, fp32"])
            assert low <= error <= high, f"{name} in {form}: {error}, measured {expected}"


@pytest.mark.parametrize("network", ["text_encoder", "vae_encoder", "transformer", "vae"])
def test_every_stage_is_as_far_from_its_module_as_was_measured(one_expert: Toy, network: str) -> None:
    variant, size = open_bundle(one_expert.diffusers).manifest.variant, VideoSize(width=64, height=64, num_frames=5)
    with traced_once():
        errors = network_errors(variant, network, size, trace=lambda *asked: export.graphs.stage_graph(*asked))
    measured = TYPED_ERRORS["t2v"]
    check_errors(errors, {tensor: forms for tensor, forms in measured.items() if tensor.startswith(f"{network}.")})


@pytest.mark.parametrize(
    "variant, name, stages",
    [
        (TOY, "flf2v", ["image_encoder.embed", "image_encoder.block"]),
        (TOY, "flf2v", ["transformer.image_embed", "transformer.image_kv", "transformer.block_out"]),
        (CLEAN_TOY, "leading clean frames", ["transformer.block_in", "transformer.block_out", "transformer.head"]),
    ],
    ids=["image encoder", "image branch", "leading clean frames"],
)
def test_stages_of_image_variants_are_as_far_from_their_modules_as_was_measured(
    variant: Variant, name: str, stages: list[str]
) -> None:
    network, size = stages[0].partition(".")[0], VideoSize(width=32, height=32, num_frames=5)
    errors = network_errors(variant, network, size, only=stages, trace=lambda toy, stage: traced(toy, stage.name))
    measured = TYPED_ERRORS[name]
    check_errors(errors, {tensor: forms for tensor, forms in measured.items() if tensor.startswith(f"{network}.")})


def test_an_error_twice_as_large_or_half_as_large_is_noticed() -> None:
    measured = {"transformer.head/noise_patches": (2.9e-3, 3.4e-4)}
    for times, fits in ((1.0, True), (2.0, False), (0.5, False)):
        errors = {"transformer.head": {"noise_patches": {"bf16": 2.9e-3 * times, "fp16": 3.4e-4}}}
        with nullcontext() if fits else pytest.raises(AssertionError, match="noise_patches in bf16"):
            check_errors(errors, measured)


def test_what_verify_allows_is_what_was_measured_and_not_twice_more() -> None:
    recorded = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "typed-errors.json").read_text())
    rows = [*recorded["stages"]["toy"], *recorded["stages"]["true"]]
    for allowed, networks in (
        (TOLERANCES_OF_VERIFY, ("text_encoder", "image_encoder", "transformer")),
        (LONG_TOLERANCES, ("vae",)),
    ):
        tensors = [errors for row in rows if row["stage"].startswith(networks) for errors in row["errors"].values()]
        for precision in allowed.keys() - {Precision.FP32}:
            greatest = max(errors.get(precision, 0.0) for errors in tensors)
            assert greatest < allowed[precision] < 2.5 * greatest, (precision, greatest)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_generation_is_near_the_float32_one(typed_toy: dict[Precision, Path], precision: Precision) -> None:
    errors = generation_errors(typed_toy[precision], REQUEST)
    steps, (last, psnr_db) = errors["latents_after_each_step"], TYPED_GENERATION[precision]
    assert len(steps) == REQUEST.num_steps
    factor = TOLERANCES["typed generation, times what was measured"]
    assert last / factor < max(steps) < last * factor
    assert abs(errors["psnr_db"] - psnr_db) < TOLERANCES["typed generation, dB from what was measured"]


def test_nobody_takes_it_for_a_fast_target(typed_toy: dict[Precision, Path]) -> None:
    bundle = open_bundle(typed_toy[Precision.BF16])
    assert choose_target(bundle, target=None).name != "emulated"
    assert "slowly" in choose_target(bundle, target="emulated").reason
