"""Products cut up for the sake of memory, as those of wide models are: on the GPU they give what whole ones give."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.targets.cuda import lower_transformer
from runtime.component import Component
from runtime.schedulers import Conventions
from runtime.specs import Precision
from runtime.transformer import Transformer
from runtime.variants import VARIANTS, TransformerArch
from tests.gpu.networks import open_cuda
from tests.gpu.test_transformer import random_weights
from tests.harness import open_network, relative_error
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

ARCH = TransformerArch(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=64)
LATENTS = (16, 3, 20, 28)  # 420 tokens: three pieces of 128 and a rest


def predict(component: Component) -> np.ndarray:
    rng = np.random.default_rng(0)
    latents, prompt = rng.standard_normal(LATENTS, np.float32), rng.standard_normal((7, ARCH.text_dim), np.float32)
    transformer = Transformer(component, ARCH, LATENTS, conventions=Conventions.ORIGINAL)
    (predicted,) = transformer.predict(latents, 731, [transformer.encode_text(prompt)])
    return predicted


@pytest.mark.parametrize(
    ("precision", "attention"),
    [(Precision.BF16, Precision.BF16), (Precision.FP8, Precision.BF16), (Precision.FP8, Precision.FP8)],
)
def test_a_network_of_cut_products_is_as_near_to_float32_as_one_of_whole_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: Precision, attention: Precision
) -> None:
    variant, tensors = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=ARCH), random_weights(ARCH, seed=5)
    with open_network(variant, "transformer", tensors, tmp_path / "cpu") as cpu:
        expected = predict(cpu)
    errors = {}
    for name, wide in (("cut", 256), ("whole", 1 << 20)):
        monkeypatch.setattr(lower_transformer, "_WIDE", wide)
        monkeypatch.setattr(lower_transformer, "_PIECE_ROWS", 128)
        (tmp_path / name).mkdir()
        with open_cuda(variant, "transformer", tensors, tmp_path / name, precision=precision, attention=attention) as gpu:
            first, second = predict(gpu), predict(gpu)
        np.testing.assert_array_equal(first, second)
        errors[name] = relative_error(first, expected)
    assert 0 < errors["cut"] < TOLERANCES[f"transformer, cuda {precision.value}"]
    assert errors["cut"] < 1.1 * errors["whole"]
