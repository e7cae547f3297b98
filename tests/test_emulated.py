"""The `emulated` target: it rounds exactly where a typed graph's types say so, and its videos are near the float32 ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import parser
from torch import Tensor

import export.graphs
from benchmarks.typed_errors import PRECISIONS, generation_errors, stage_errors
from engines.precision import functions
from engines.precision.emulated import emulated_graph
from export.build import BuildRequest, build_bundle
from runtime.bundle import open_bundle
from runtime.errors import BuildError
from runtime.opening import choose_target
from runtime.precision import FP8_MAX
from runtime.request import GenerateRequest
from runtime.specs import Precision
from tests.conftest import Toy
from tests.tolerances import TOLERANCES

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


@pytest.fixture(scope="module")
def bundles(one_expert: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    """A toy with the targets `cpu` and `emulated`, in each precision; every stage is traced once."""
    traced: dict[Any, onnx.ModelProto] = {}
    trace = export.graphs.stage_graph

    def once(variant: Any, stage: Any) -> onnx.ModelProto:
        if stage.name not in traced:
            traced[stage.name] = trace(variant, stage)
        return traced[stage.name]

    folder = tmp_path_factory.mktemp("emulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.graphs, "stage_graph", once)
        for precision in PRECISIONS:
            targets = ("cpu", "emulated")
            build_bundle(
                BuildRequest(out=folder / precision, checkpoint=one_expert.folder, targets=targets, precision=precision)
            )
    return {precision: folder / precision for precision in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_stage_is_near_its_float32_self(bundles: dict[Precision, Path], precision: Precision) -> None:
    errors = stage_errors(bundles[precision], REQUEST)
    for name, error in errors.items():
        network = "vae" if name.startswith("vae") else "stage"
        assert error < TOLERANCES[f"{network}, typed {precision}"], name
    assert {name.partition("/")[0] for name in errors} >= {"transformer.block_in", "transformer.head", "vae.decode_high_step"}
    narrow = [name for name, error in errors.items() if error > 1e-4]
    assert {"transformer.block_in/query", "vae.decode_low_first/hidden", "text_encoder.block/next_hidden_states"} <= {*narrow}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_generation_is_near_the_float32_one(bundles: dict[Precision, Path], precision: Precision) -> None:
    errors = generation_errors(bundles[precision], REQUEST)
    assert len(errors["latents_after_each_step"]) == REQUEST.num_steps
    assert all(
        1e-5 < error < TOLERANCES[f"latents after a step, typed {precision}"] for error in errors["latents_after_each_step"]
    )
    assert errors["psnr_db"] > TOLERANCES[f"psnr in dB, typed {precision}"]


def test_nobody_takes_it_for_a_fast_target(bundles: dict[Precision, Path]) -> None:
    bundle = open_bundle(bundles[Precision.BF16])
    assert choose_target(bundle, target=None).name != "emulated"
    assert "slowly" in choose_target(bundle, target="emulated").reason
