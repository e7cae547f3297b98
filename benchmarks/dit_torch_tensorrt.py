"""The peer of `benchmarks.dit` that is Torch-TensorRT: diffusers' transformer in bf16, compiled whole and ahead of time for one size.

It is compiled as Torch-TensorRT's own example treats a network of this kind (`examples/dynamo/torch_export_flux_dev.py`), with its
defaults otherwise: engines hold the weights and cannot be refitted, which allows more fusions. What is compared is the
forward; how long compiling took is reported apart.
"""

import importlib
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional

from benchmarks.dit_peers import Build, Case, Forward, diffusers_inputs, diffusers_network
from runtime.errors import RequestError
from runtime.variants import Variant

_ENGINE = "_run_on_acc"  # how Torch-TensorRT's partitioner names what TensorRT runs


def check_torch_tensorrt() -> None:
    """See that Torch-TensorRT can be imported beside this PyTorch.

    Raises:
        RequestError: it cannot.
    """
    version = torch.__version__
    if not torch.cuda.is_available():  # its import asks for the GPU's properties
        raise RequestError(
            f"baseline torch-tensorrt needs a GPU, and torch {version} sees none",
            hint="install PyTorch's CUDA build, and the torch-tensorrt of the same version",
        )
    try:
        importlib.import_module("torch_tensorrt")
    except (ImportError, OSError, RuntimeError) as exc:  # OSError: its library was built for another PyTorch
        raise RequestError(
            f"baseline torch-tensorrt cannot be imported beside torch {version}: {exc}",
            hint=f"pip install 'torch-tensorrt=={'.'.join(version.split('.')[:2])}.*', which brings its TensorRT",
        ) from exc


class SelfAttention:
    """diffusers' self-attention with the rotated halves stacked.

    The original writes them into every other channel of an empty tensor. Torch-TensorRT 2.13 makes each such write a scatter with an
    int64 index for every element, 0.67 GB at 32,760 tokens of the 14B, four times a block
    (`slice_scatter_decomposition` in `dynamo/lowering/_decompositions.py`).
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of tokens [B, N, D] among themselves; `rotary_emb`: cosines and sines, each number twice, [1, N, 1, head dim]."""
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("made for self-attention without a mask")
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
        query, key = (
            _rotated(norm(projection(hidden_states)).unflatten(-1, (attn.heads, -1)), cos, sin).transpose(1, 2)
            for norm, projection in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B, heads, N, head dim]
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        output: Tensor = attn.to_out[0](mixed.type_as(query))  # after it stands a dropout, which does nothing here
        return output


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = torch.unflatten(heads, -1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(heads)


class _Plain(torch.nn.Module):
    """A transformer from tensors to one tensor, as exporting likes it."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        output: Tensor = self.network(latents, timestep, prompt, return_dict=False)[0]
        return output


def compile_network(network: Any, inputs: tuple[Tensor, ...]) -> tuple[Callable[..., Any], Build]:
    """Compile a transformer for inputs of these shapes.

    Returns:
        What is called with the inputs, and what it took.

    Raises:
        RuntimeError: Torch-TensorRT left everything to PyTorch.
    """
    import torch_tensorrt

    for block in network.blocks:
        block.attn1.set_processor(SelfAttention())
    started = time.perf_counter()
    exported = torch.export.export(_Plain(network), inputs)
    module = torch_tensorrt.dynamo.compile(exported, arg_inputs=list(inputs), truncate_double=True, min_block_size=1)
    seconds = time.perf_counter() - started
    engines = sum(_ENGINE in name for name, _ in module.named_children())
    if not engines:
        raise RuntimeError("Torch-TensorRT made no engine: PyTorch would be measured under its name")
    return module, Build(seconds=seconds, engines=engines, left_to_pytorch=left_to_pytorch(module))


def left_to_pytorch(module: GraphModule) -> tuple[str, ...]:
    """Operators that run in PyTorch, between engines; by name, each as often as it runs."""
    outside = [child for name, child in module.named_children() if _ENGINE not in name and isinstance(child, GraphModule)]
    targets = [node.target for part in (module, *outside) for node in part.graph.nodes if node.op == "call_function"]
    return tuple(sorted(str(target) for target in targets if target is not operator.getitem))


@contextmanager
def open_torch_tensorrt(variant: Variant, case: Case, *, device: str = "cuda") -> Iterator[Forward]:
    """A forward of the variant's transformer with random weights. The peak of PyTorch's memory starts anew once it is compiled."""
    inputs = diffusers_inputs(variant, case, device)
    with torch.no_grad():
        network = diffusers_network(variant, device)
        compiled, build = compile_network(network, inputs)
        del network  # the engines have the weights
        if device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def forward() -> Any:
            made = compiled(*inputs)
            return (made if isinstance(made, Tensor) else made[0]).float().cpu().numpy()

        yield Forward(forward, build)
