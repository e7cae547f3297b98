"""The text encoder's stages and the whole encoder against transformers' `UMT5EncoderModel`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from engines.targets.cuda.lower import lower_stage
from export.graphs import stage_graph
from export.layouts import text_encoder_diffusers_names
from export.modules.text_encoder import TEXT_ENCODER_MODULES
from export.pack import weight_plan
from runtime.backends.cuda.plan import StepKind
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.component import Component
from runtime.errors import BundleError
from runtime.precision import in_precision
from runtime.specs import DType, Precision, StageSpec
from runtime.stages.text_encoder import TOKEN_EMBEDDING, text_encoder_stages
from runtime.text_encoder import encode_prompts, relative_position_buckets
from runtime.variants import VARIANTS, TextEncoderArch, Variant
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES
from tests.toys import TOYS, ToyConfig, make_text_encoder, original_tensors

TOLERANCE = TOLERANCES["stage, fp32"]
CONFIGS = {**TOYS, "few buckets": replace(TOYS["wide"], num_buckets=8, text_layers=2)}
LENGTHS = (1, 9, 140, 512)  # tokens; beyond 91 all distances of the usual table are in use


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Toy products gain nothing from more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_ids(config: ToyConfig, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(0, config.text_encoder.vocab_size, (num_tokens,), generator=generator)


def padded_oracle(network: Any, ids: Tensor) -> Tensor:
    """What the reference does: pad to 512, mask, cut the real rows out again."""
    padded = torch.zeros(1, 512, dtype=torch.int64)
    padded[0, : len(ids)] = ids
    mask = (torch.arange(512) < len(ids)).long()[None]
    with torch.no_grad():
        rows: Tensor = network.eval()(padded, mask).last_hidden_state[0, : len(ids)]
    return rows


def toy_variant(config: ToyConfig) -> Variant:
    return replace(VARIANTS["wan2.1-t2v-1.3b"], text_encoder=config.text_encoder)


def stage_with_weights(arch: TextEncoderArch, name: str, tensors: dict[str, Tensor], block: int | None = None) -> nn.Module:
    """A stage's eager module, its weights taken from the original tensors and q, k and v fused."""
    module = TEXT_ENCODER_MODULES[name](arch)
    prefix = "" if block is None else f"blocks.{block}."
    weights = {}
    for key in module.state_dict():
        parts = [key.replace("attn.qkv", f"attn.{part}") for part in "qkv"] if "attn.qkv" in key else [key]
        weights[key] = torch.cat([tensors[prefix + part] for part in parts])
    module.load_state_dict(weights)
    return module.eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ToyConfig:
    return CONFIGS[request.param]


def test_eager_stages_match_transformers_without_padding(config: ToyConfig) -> None:
    arch = config.text_encoder
    network = make_text_encoder(config, seed=2)
    tensors = original_tensors(network, text_encoder_diffusers_names(arch))
    for num_tokens in LENGTHS:
        ids = random_ids(config, num_tokens)
        buckets = relative_position_buckets(num_tokens, num_buckets=arch.num_buckets, max_distance=arch.max_distance)
        with torch.no_grad():
            hidden_states = tensors[TOKEN_EMBEDDING][ids]
            for block in range(arch.num_layers):
                stage = stage_with_weights(arch, "text_encoder.block", tensors, block)
                hidden_states = stage(hidden_states, torch.from_numpy(buckets))
            given = stage_with_weights(arch, "text_encoder.final_norm", tensors)(hidden_states)
        assert relative_error(given, padded_oracle(network, ids)) < TOLERANCE


@pytest.mark.parametrize("name", ["narrow", "few buckets"])  # both with attention narrower or wider than the model
def test_engines_match_transformers_without_padding(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    arch = config.text_encoder
    network = make_text_encoder(config, seed=3)
    tensors = original_tensors(network, text_encoder_diffusers_names(arch))
    table = tensors[TOKEN_EMBEDDING].numpy()
    with open_network(toy_variant(config), "text_encoder", tensors, tmp_path) as component:
        prompts = [random_ids(config, num_tokens) for num_tokens in LENGTHS]
        embeds = encode_prompts(component, table, [ids.numpy() for ids in prompts], arch)
        for num_tokens, ids, given in zip(LENGTHS, prompts, embeds, strict=True):
            assert given.dtype == np.float32 and given.shape == (num_tokens, arch.dim)
            assert relative_error(given, padded_oracle(network, ids)) < TOLERANCE


def test_linear_layers_of_the_graph_read_weights_as_stored() -> None:
    arch = CONFIGS["toy"].text_encoder
    graph = stage_graph(toy_variant(CONFIGS["toy"]), text_encoder_stages(arch)[0])
    assert [node.op_type for node in graph.graph.node].count("LinearNoBias") == 5
    (function,) = (function for function in graph.functions if function.name == "LinearNoBias")
    assert [(node.op_type, node.attribute[0].name, node.attribute[0].i) for node in function.node] == [("Gemm", "transB", 1)]


def test_what_a_target_may_fuse_is_a_function_of_the_graph() -> None:
    arch = CONFIGS["toy"].text_encoder
    graph = stage_graph(toy_variant(CONFIGS["toy"]), text_encoder_stages(arch)[0])
    operators = [node.op_type for node in graph.graph.node]
    assert sorted(set(operators)) == ["Add", "BiasedAttention", "GatedGelu", "LinearNoBias", "RMSNormalization", "Split"]


def test_the_cuda_plan_adds_to_a_float32_stream_and_multiplies_in_bf16() -> None:
    variant = toy_variant(CONFIGS["toy"])
    fp32 = text_encoder_stages(variant.text_encoder)[0]
    plan = lower_stage(stage_graph(variant, fp32), in_precision(fp32, Precision.BF16))
    kinds = [step.kind.value for step in plan.steps]
    assert kinds == [
        *("rms_norm", "linear", "biased_attention", "linear", "residual_rms_norm"),
        *("linear", "linear", "gated_gelu", "linear", "add"),
    ]
    dtypes = {buffer.name: buffer.dtype for buffer in plan.buffers}
    products = [dtypes[step.outputs["out"]] for step in plan.steps if step.kind is StepKind.LINEAR]
    assert products == [DType.BF16, DType.F32, DType.BF16, DType.BF16, DType.F32]  # those that are added are wide
    assert dtypes[plan.outputs["next_hidden_states"]] is DType.F32


@pytest.mark.parametrize("num_buckets", [4, 6, 8, 12, 16, 32, 40, 64])
@pytest.mark.parametrize("max_distance", [17, 64, 100, 128, 256])
def test_position_buckets_equal_transformers(num_buckets: int, max_distance: int) -> None:
    peer: Any = UMT5Attention(
        UMT5Config(
            d_model=8,
            d_kv=4,
            num_heads=2,
            relative_attention_num_buckets=num_buckets,
            relative_attention_max_distance=max_distance,
            is_decoder=False,
        ),
        has_relative_attention_bias=True,
    )
    positions = torch.arange(512)
    expected = peer._relative_position_bucket(positions[None, :] - positions[:, None])
    given = relative_position_buckets(512, num_buckets=num_buckets, max_distance=max_distance)
    assert given.dtype == np.int64
    assert np.array_equal(given, expected.numpy())


def test_position_buckets_distinguish_keys_before_and_after_the_query() -> None:
    buckets = relative_position_buckets(500, num_buckets=32, max_distance=128)
    assert [int(buckets[0, distance]) for distance in (0, 1, 8, 400)] == [0, 17, 24, 31]
    assert [int(buckets[distance, 0]) for distance in (1, 7, 8, 12, 16, 23, 32, 46, 64, 91, 400)] == [
        *(1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15),
    ]


def test_a_bf16_embedding_table_gives_the_rows_of_the_float32_one(tmp_path: Path) -> None:
    config = CONFIGS["toy"]
    tensors = original_tensors(make_text_encoder(config, seed=4), text_encoder_diffusers_names(config.text_encoder))
    narrow = tensors[TOKEN_EMBEDDING].bfloat16()
    ids = random_ids(config, 5).numpy()
    with open_network(toy_variant(config), "text_encoder", tensors, tmp_path) as component:
        given, expected = (
            encode_prompts(component, table, [ids], config.text_encoder)[0]
            for table in (narrow.view(torch.uint16).numpy(), narrow.float().numpy())
        )
    np.testing.assert_array_equal(given, expected)


def test_only_the_cpu_bundle_keeps_the_embedding_table_in_float32() -> None:
    variant = toy_variant(CONFIGS["toy"])
    dtypes = {
        precision: {packed.name: packed.dtype for packed in weight_plan(variant, "text_encoder", precision)}[TOKEN_EMBEDDING]
        for precision in (Precision.FP32, Precision.BF16)
    }
    assert dtypes == {Precision.FP32: DType.F32, Precision.BF16: DType.BF16}


def test_a_token_beyond_the_embedding_table_is_refused() -> None:
    arch = CONFIGS["toy"].text_encoder
    table = np.zeros((arch.vocab_size, arch.dim), np.float32)
    closed = Component(OnnxRuntimeBackend(), (), {}, NoWeights())
    with pytest.raises(BundleError, match=f"token {arch.vocab_size}, the text encoder has {arch.vocab_size} tokens"):
        encode_prompts(closed, table, [np.array([arch.vocab_size, 1])], arch)


class NoWeights:
    def stage_weights(self, stage: StageSpec, block: int | None) -> dict[str, Any]:
        raise AssertionError(f"{stage.name} was run")
