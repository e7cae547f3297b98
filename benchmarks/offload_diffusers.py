"""diffusers' transformer with its blocks in host memory, as a peer of `benchmarks.offload`: its group offloading, one block ahead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.dit_peers import Case, diffusers_inputs, diffusers_network
from benchmarks.flops import forward_tflop, num_tokens
from benchmarks.gpu import Result, measure
from runtime.variants import Variant


@contextmanager
def open_group_offload(variant: Variant, case: Case, *, device: str = "cuda") -> Iterator[Callable[[], Any]]:
    """A forward with two prompts, bf16, eager; each block is copied from page-locked memory while the one before computes."""
    from diffusers.hooks import apply_group_offloading

    network = diffusers_network(variant, device)
    apply_group_offloading(
        network,
        onload_device=torch.device(device),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device != "cpu",
    )
    inputs = diffusers_inputs(variant, case, device)

    def forward() -> Any:
        return [network(*inputs, return_dict=False)[0].float().cpu().numpy() for _ in "+-"]

    with torch.no_grad():
        yield forward


def measure_group_offload(variant: Variant, case: Case, peer: str, *, min_runs: int) -> Result:
    """Seconds of such a forward, and what PyTorch took of the device meanwhile."""
    with open_group_offload(variant, case) as forward:
        torch.cuda.empty_cache()  # the weights were drawn there
        torch.cuda.reset_peak_memory_stats()
        timing, _ = measure(forward, seconds=0, warmups=1, min_runs=min_runs)
        peak = torch.cuda.max_memory_reserved()
    tokens = num_tokens(variant, case.size)
    return Result(
        **asdict(timing),
        case=case.name,
        peer=peer,
        peak_memory_gib=peak / 2**30,
        tflop=2 * forward_tflop(variant.transformer, tokens),
        tokens=tokens,
    )
