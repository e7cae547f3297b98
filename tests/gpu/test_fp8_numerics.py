"""The emulation of the target's numbers in PyTorch (`benchmarks.fp8_numerics`) against the target itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fp8_numerics import ATTENTION_PARTS, PRODUCTS, Numerics
from benchmarks.torch_backend import WeightForms, torch_component
from runtime.component import Component
from runtime.schedulers import Conventions
from runtime.specs import Precision
from runtime.transformer import Transformer
from runtime.variants import VARIANTS
from tests.gpu.networks import open_cuda
from tests.gpu.test_transformer import LATENTS, TOY, random_weights
from tests.harness import relative_error
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

_ALL = frozenset(PRODUCTS)
EMULATED = {
    (Precision.BF16, Precision.BF16): Numerics(),
    (Precision.FP8, Precision.BF16): Numerics(weights=_ALL, activations=_ALL),
    (Precision.FP8, Precision.FP8): Numerics(weights=_ALL, activations=_ALL, attention=frozenset(ATTENTION_PARTS)),
}


@pytest.mark.parametrize(("precision", "attention"), EMULATED, ids=str)
def test_the_emulation_is_as_far_from_float32_as_the_target(
    tmp_path: Path, precision: Precision, attention: Precision, record_property: Any
) -> None:
    weights = random_weights(TOY, seed=3)
    variant, forms = replace(VARIANTS["wan2.1-t2v-1.3b"], transformer=TOY), WeightForms(TOY, weights)
    with (
        open_cuda(variant, "transformer", weights, tmp_path, precision=precision, attention=attention) as gpu,
        torch_component(forms, EMULATED[precision, attention]) as emulated,
        torch_component(forms, None) as exact,
    ):
        ours, theirs, expected = (_prediction(component) for component in (gpu, emulated, exact))
    # not against each other: a sum in another order is enough to part two fp8 runs by half their error
    own, imitated = (relative_error(given, expected) for given in (ours, theirs))
    record_property(f"whole prediction {precision}, attention {attention}", own)
    record_property(f"emulated prediction {precision}, attention {attention}", imitated)
    assert abs(own / imitated - 1) < TOLERANCES["emulated error, cuda"]


def _prediction(component: Component) -> Any:
    generator = np.random.default_rng(0)
    transformer = Transformer(component, TOY, LATENTS, conventions=Conventions.ORIGINAL)
    prompt = transformer.encode_text(generator.standard_normal((5, TOY.text_dim), np.float32))
    return transformer.predict(generator.standard_normal(LATENTS, np.float32), 731, [prompt])[0]
