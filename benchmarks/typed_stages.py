"""How far each stage's strongly typed graph is from its float32 module, tensor by tensor, on a CPU with random weights.

A stage's weights go through the packing of a bundle and its graph through the `emulated` target; its inputs are what the stages before
it gave in float32, rounded so that both sides hold the same numbers. What is left is the rounding of weights, of what the stage computes
and of what it gives.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch

from benchmarks.random_file import draw, random_weight
from engines.precision.emulated import emulated_graph
from engines.precision.typed import typed_graph
from engines.verification.inputs import StageInputs
from engines.verification.measure import relative_error
from export.graphs import stage_graph, stage_module
from export.pack import pack_plan, write_weights
from runtime.backends.base import Array
from runtime.backends.emulated import EmulatedBackend
from runtime.geometry import VideoSize
from runtime.layouts import narrow, widen
from runtime.precision import in_precision, is_self_attention
from runtime.specs import DType, Precision, StageSpec
from runtime.stages import network_arch, network_stages
from runtime.variants import ImageEncoderArch, TextEncoderArch, TransformerArch, Variant
from runtime.weights import WeightStore, map_safetensors

_CACHES = "next_cache"
"""What a VAE's caches are called together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One way in which a stage's arithmetic may be narrow."""

    name: str
    precision: Precision
    fp8_attention: bool = False


FORMS = (
    *(Form(name=precision, precision=precision) for precision in (Precision.BF16, Precision.FP16, Precision.FP8)),
    Form(name="fp8 attention", precision=Precision.BF16, fp8_attention=True),
)

Errors = dict[str, dict[str, dict[str, float]]]
"""Relative errors by stage, tensor and form."""


def stage_forms(stage: StageSpec) -> Iterator[Form]:
    """The forms that differ for a stage: of those that come out the same, the first."""
    as_bf16 = in_precision(stage, Precision.BF16)
    for form in FORMS:
        if form.fp8_attention:
            differs = is_self_attention(stage)
        else:
            differs = form.precision is not Precision.FP8 or in_precision(stage, Precision.FP8) != as_bf16
        if differs:
            yield form


def network_errors(
    variant: Variant,
    network: str,
    size: VideoSize,
    *,
    tile: int | None = None,
    seed: int = 0,
    num_threads: int = 1,
    only: Collection[str] | None = None,
    trace: Callable[[Variant, StageSpec], onnx.ModelProto] = stage_graph,
) -> Errors:
    """Errors of every stage of one of a variant's networks, or of `only` some. See `StageInputs` for `size` and `tile`."""
    given, errors = StageInputs(variant, size, seed=seed, tile=tile), Errors()
    for stage in network_stages(variant, network):
        if only is not None and stage.name not in only:
            continue
        forms = list(stage_forms(stage))
        inputs = given.take(stage, *(in_precision(stage, form.precision) for form in forms))
        graph, source = trace(variant, stage), _RandomSource(stage, seed=seed)
        with TemporaryDirectory() as folder:
            expected = _run_module(variant, stage, inputs, source, Path(folder))
            for form in forms:
                found = _run_typed(graph, stage, form, inputs, source, Path(folder), num_threads=num_threads)
                found_errors = {name: relative_error(found[name], expected[name]) for name in expected}
                for tensor, error in _greatest(found_errors).items():
                    errors.setdefault(stage.name, {}).setdefault(tensor, {})[form.name] = error
        given.keep(expected)
    return errors


def what_decides(variant: Variant, stage: StageSpec) -> Hashable:
    """What a stage's graph depends on: variants with equal ones share the stage."""
    arch = network_arch(variant, stage.network)
    return (stage, arch.num_heads, arch.eps) if isinstance(arch, TransformerArch) else (stage, arch)


def toy_of(variant: Variant) -> Variant:
    """A variant's row with small numbers in place of its widths: the same stages, the same branches."""
    arch, clip = variant.transformer, variant.image_encoder
    small_clip = clip and ImageEncoderArch(dim=64, ffn_dim=128, num_heads=4, num_layers=2, image_size=28)
    if clip is not None and small_clip is not None:
        arch = replace(
            arch, image_dim=small_clip.dim, image_tokens=arch.image_tokens // clip.num_tokens * small_clip.num_tokens
        )
    wide_decoder = variant.vae.decoder_base_dim is not None
    return replace(
        variant,
        transformer=replace(arch, dim=96, ffn_dim=256, num_heads=4, num_layers=1, text_dim=64, text_len=48, freq_dim=64),
        text_encoder=TextEncoderArch(dim=64, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=1, vocab_size=64),
        image_encoder=small_clip,
        vae=replace(variant.vae, base_dim=8, decoder_base_dim=12 if wide_decoder else None, num_res_blocks=1),
    )


def _greatest(errors: Mapping[str, float]) -> dict[str, float]:
    """All caches as one, by the worst of them."""
    found = {name: error for name, error in errors.items() if not name.startswith(_CACHES)}
    caches = [error for name, error in errors.items() if name not in found]
    return found | ({_CACHES: float(np.max(caches))} if caches else {})


class _RandomSource:
    """A stage's tensors as a checkpoint has them, random, float32; each depends on its name and the seed alone."""

    def __init__(self, stage: StageSpec, *, seed: int) -> None:
        self._seed = seed
        self._shapes = {
            source: (packed.shape[0] // len(packed.sources), *packed.shape[1:])
            for packed in pack_plan([stage], num_blocks=1)
            for source in packed.sources
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        drawn = draw(random_weight(name, shape, DType.F32), 0, math.prod(shape), seed=self._seed)
        return torch.from_numpy(drawn.view(np.float32)).reshape(shape)


def _run_module(
    variant: Variant, stage: StageSpec, inputs: Mapping[str, Array], source: _RandomSource, folder: Path
) -> dict[str, Array]:
    file = folder / "float32.safetensors"
    write_weights(source, pack_plan([stage], num_blocks=1), file)
    mapped = map_safetensors(file)
    block = 0 if stage.per_block else None
    weights = {
        weight.name: torch.from_numpy(np.array(mapped[stage.weight_name(weight.name, block)])) for weight in stage.weights
    }
    with torch.no_grad():
        tensors = tuple(torch.from_numpy(inputs[tensor.name]) for tensor in stage.inputs)
        made = torch.func.functional_call(stage_module(variant, stage).eval(), weights, tensors)
    outputs = made if isinstance(made, tuple | list) else (made,)
    file.unlink()
    return {tensor.name: output.numpy() for tensor, output in zip(stage.outputs, outputs, strict=True)}


def _run_typed(
    graph: onnx.ModelProto,
    stage: StageSpec,
    form: Form,
    inputs: Mapping[str, Array],
    source: _RandomSource,
    folder: Path,
    *,
    num_threads: int,
) -> dict[str, Array]:
    """The outputs of the typed graph's emulation, in float32 and as declared."""
    typed = in_precision(stage, form.precision)
    engine_file, weight_file = folder / "typed.onnx", folder / "typed.safetensors"
    emulated = emulated_graph(typed_graph(graph, typed, fp8_attention=form.fp8_attention))
    engine_file.write_bytes(emulated.SerializeToString())
    write_weights(source, pack_plan([typed], num_blocks=1), weight_file)
    with EmulatedBackend(num_threads=num_threads) as backend:
        weights = WeightStore(weight_file, [typed], backend, num_blocks=1)
        tensors = {tensor.name: backend.to_device(narrow(inputs[tensor.name], tensor), tensor.dtype) for tensor in typed.inputs}
        engine = backend.open_engine(engine_file, typed)
        made = engine.run({**tensors, **weights.stage_weights(typed, 0 if stage.per_block else None)})
        engine.close()
        pairs = zip(typed.outputs, stage.outputs, strict=True)
        return {
            tensor.name: widen(
                backend.to_host(made[tensor.name]), tensor, int(declared.shape[0]) if tensor.channels_last else 0
            )
            for tensor, declared in pairs
        }
