"""Helpers of the parity tests: a network built into engines from tensors in memory, and the relative error of two arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.plan import TARGETS
from export.graphs import stage_graph
from export.pack import pack_plan, write_weights
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.component import Component
from runtime.stages import network_blocks, network_stages
from runtime.variants import Variant
from runtime.weights import WeightStore


@dataclass(frozen=True)
class DictSource:
    """A tensor source over tensors in memory, under their original names."""

    tensors: Mapping[str, torch.Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def open_network(variant: Variant, network: str, tensors: Mapping[str, torch.Tensor], folder: Path) -> Component:
    """Trace, build and open a network on the `cpu` target with the given weights."""
    stages = network_stages(variant, network)
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for stage in stages:
        files[stage.name] = folder / f"{stage.name}.onnx"
        files[stage.name].write_bytes(TARGETS["cpu"].networks[network].build_engine(stage_graph(variant, stage), stage))
    num_blocks = network_blocks(variant, network)
    weights = folder / "weights.safetensors"
    write_weights(DictSource(tensors), pack_plan(stages, num_blocks=num_blocks), weights)
    backend = OnnxRuntimeBackend(num_threads=1)
    return Component(backend, stages, files, WeightStore(weights, stages, backend, num_blocks=num_blocks))


def relative_error(given: Any, expected: Any) -> float:
    """‖given − expected‖ / ‖expected‖, in float64; NaN anywhere gives NaN, which no tolerance passes."""
    first, second = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    assert first.shape == second.shape, (first.shape, second.shape)
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))
