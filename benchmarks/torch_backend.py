"""A transformer run by this project's own torch modules behind the runtime's interfaces, so that `runtime.transformer` and
`runtime.denoise` drive it: in float32, or with the numbers of the `cuda` target (`benchmarks.fp8_numerics`)."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.fp8_numerics import PRODUCTS, Numerics, Operators, Weight, quantized_rows, to_bf16
from export.modules.transformer import TRANSFORMER_MODULES
from export.pack import pack_plan
from runtime.backends.base import Array
from runtime.component import Component
from runtime.geometry import patchify, unpatchify
from runtime.precision import in_precision
from runtime.specs import DType, Precision, StageSpec
from runtime.stages.transformer import transformer_stages
from runtime.variants import TransformerArch

_EXACT_STAGES = frozenset(("transformer.time_embed",))
"""Stages whose operands are no bf16 numbers: TF32, which holds those exactly, would round them."""


class WeightForms:
    """One set of weights on a device, in float32, bf16 and FP8; each form of each is made once.

    Args:
        tensors: by the original repositories' names.
    """

    def __init__(self, arch: TransformerArch, tensors: Mapping[str, Tensor]) -> None:
        self.arch = arch
        self._packed: dict[str, Tensor] = {}
        for packed in pack_plan(transformer_stages(arch), num_blocks=arch.num_layers):
            self._packed[packed.name] = torch.cat([tensors[name] for name in packed.sources]).reshape(packed.shape)
        self._bf16: dict[str, Tensor] = {}
        self._fp8: dict[str, tuple[Tensor, Tensor]] = {}

    def full(self, name: str) -> Tensor:
        return self._packed[name]

    def bf16(self, name: str) -> Tensor:
        if name not in self._bf16:
            self._bf16[name] = to_bf16(self._packed[name])
        return self._bf16[name]

    def fp8(self, name: str) -> tuple[Tensor, Tensor]:
        """E4M3 numbers as float32, and each row's scale, [out]."""
        if name not in self._fp8:
            values, scale = quantized_rows(self._packed[name])
            self._fp8[name] = values, scale.flatten()
        return self._fp8[name]


class _ChosenWeights:
    """The weights of a stage, each in the form that the numerics say."""

    def __init__(self, forms: WeightForms, numerics: Numerics | None) -> None:
        self._forms, self._numerics = forms, numerics

    def stage_weights(self, stage: StageSpec, block: int | None) -> Mapping[str, Weight]:
        dtypes = {weight.name: weight.dtype for weight in in_precision(stage, Precision.BF16).weights}
        return {name: self._weight(name, stage.weight_name(name, block), block, dtype) for name, dtype in dtypes.items()}

    def _weight(self, name: str, stored_name: str, block: int | None, dtype: DType) -> Weight:
        numerics = self._numerics
        if numerics is None or dtype is DType.F32:
            return Weight(self._forms.full(stored_name))
        product = name.removesuffix(".weight")
        if product not in PRODUCTS or block in numerics.wide_blocks:
            return Weight(self._forms.bf16(stored_name))
        narrow_input = product in numerics.activations
        if product in numerics.weights:
            return Weight(*self._forms.fp8(stored_name), narrow_input)
        return Weight(self._forms.bf16(stored_name), narrow_input=narrow_input)


class _TorchEngine:
    def __init__(self, arch: TransformerArch, stage: StageSpec, operators: Operators | None) -> None:
        self._stage, self._operators = stage, operators
        with torch.device("meta"):
            self._module = TRANSFORMER_MODULES[stage.name](arch)

    def run(self, tensors: Mapping[str, Any], *, consumed: Collection[str] = ()) -> dict[str, Tensor]:
        stage, operators = self._stage, self._operators
        weights: dict[str, Weight] = {weight.name: tensors[weight.name] for weight in stage.weights}
        values = {name: weight.values for name, weight in weights.items()}
        inputs = tuple(tensors[tensor.name] for tensor in stage.inputs)
        exact = operators is None or stage.name in _EXACT_STAGES
        torch.backends.cuda.matmul.allow_tf32 = not exact
        with torch.inference_mode():
            if operators is None:
                return self._named(torch.func.functional_call(self._module, values, inputs))
            operators.enter(stage, weights)
            with patch.multiple("export.functions", **operators.replacements()):
                outputs = torch.func.functional_call(self._module, values, inputs)
            return operators.written(stage, self._named(outputs))

    def close(self) -> None:
        """Nothing is held but the module, which has no weights."""

    def _named(self, outputs: Any) -> dict[str, Tensor]:
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        return {tensor.name: output for tensor, output in zip(self._stage.outputs, given, strict=True)}


class TorchBackend:
    """Modules instead of engines; a tensor is torch's, in float32.

    Args:
        numerics: None for float32.
        device: of torch.
    """

    name = "torch"

    def __init__(self, arch: TransformerArch, numerics: Numerics | None, device: torch.device) -> None:
        self._arch, self._device = arch, device
        self._operators = None if numerics is None else Operators(numerics)

    def open_engine(self, path: Path, stage: StageSpec) -> _TorchEngine:
        return _TorchEngine(self._arch, stage, self._operators)

    def to_device(self, array: Array, dtype: DType | None = None) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def to_host(self, tensor: Tensor) -> Array:
        host: Array = tensor.cpu().numpy()
        return host

    def fetch(self, tensor: Tensor) -> Callable[[], Array]:
        return lambda: self.to_host(tensor)

    def cut_patches(self, latents: Array, arch: TransformerArch) -> Tensor:
        return self.to_device(patchify(latents, arch))

    def join_patches(self, patches: Tensor, grid: tuple[int, int, int], arch: TransformerArch) -> Tensor:
        return self.to_device(unpatchify(self.to_host(patches), grid, arch))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Tensors are torch's to free."""


def torch_component(forms: WeightForms, numerics: Numerics | None) -> Component:
    """A transformer on the device of its weights; in float32 without `numerics`."""
    stages = transformer_stages(forms.arch)
    device = forms.full("patch_embedding.bias").device
    files = {stage.name: Path() for stage in stages}  # there are none
    return Component(TorchBackend(forms.arch, numerics, device), stages, files, _ChosenWeights(forms, numerics))
