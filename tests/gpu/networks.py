"""A network of the `cuda` target, built from given weights and opened on the GPU."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from engines.targets.cuda.lower import lower_stage
from export.graphs import stage_graph
from export.pack import pack_plan, write_weights
from runtime.component import Component
from runtime.precision import in_precision
from runtime.specs import Precision
from runtime.stages import network_blocks, network_stages
from runtime.strict_json import encode
from runtime.variants import Variant
from runtime.weights import WeightStore
from tests.gpu.conftest import kernels_for_this_gpu
from tests.harness import DictSource


@contextmanager
def open_cuda(
    variant: Variant,
    network: str,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    precision: Precision = Precision.BF16,
    attention: Precision = Precision.BF16,
    only: Collection[str] = (),
) -> Iterator[Component]:
    """A network of a variant with the given weights; its files are written to `folder`.

    Args:
        only: the stages that are built, all of them if empty.
    """
    from runtime.backends.cuda.engine import CudaBackend

    fp32_stages = [stage for stage in network_stages(variant, network) if not only or stage.name in only]
    num_blocks = network_blocks(variant, network)
    stages = [in_precision(stage, precision) for stage in fp32_stages]
    files = {}
    for fp32, stage in zip(fp32_stages, stages, strict=True):
        files[stage.name] = folder / f"{stage.name}.plan.json"
        files[stage.name].write_text(encode(lower_stage(stage_graph(variant, fp32), stage)))
    weights = folder / f"{network}.safetensors"
    write_weights(DictSource(dict(tensors)), pack_plan(stages, num_blocks=num_blocks), weights)
    with CudaBackend(kernels_for_this_gpu(), attention=attention) as backend:
        store = WeightStore(weights, stages, backend, num_blocks=num_blocks)
        with Component(backend, stages, files, store) as component:
            yield component
