"""The model that ships: its transformer's weights, and what its text encoder makes of captions."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.moving_shapes.model import SIZES, TRANSFORMER_FILE, new_networks, read_checkpoint
from benchmarks.moving_shapes.tokenizer import build_tokenizer, token_ids
from runtime.geometry import Float32
from runtime.variants import TransformerArch

CHECKPOINT = Path(__file__).parent / "checkpoint"
SIZE = SIZES["small"]


def transformer_weights(arch: TransformerArch, generator: torch.Generator) -> dict[str, Tensor]:
    """By the original repositories' names, in float32, on the generator's device; nothing is drawn. Called as what makes random weights is
    (`benchmarks.outliers.WEIGHTS`).

    Raises:
        ValueError: `arch` is another.
    """
    from safetensors.torch import load_file

    if arch != SIZE.transformer:
        raise ValueError(f"{CHECKPOINT} is of {SIZE.transformer}, not of {arch}")
    file = load_file(CHECKPOINT / TRANSFORMER_FILE, device=str(generator.device))
    return {name: tensor.float() for name, tensor in file.items()}


@torch.no_grad()
def embed(captions: Sequence[str]) -> list[Float32]:
    """Each caption's embeddings, float32 [tokens, text_dim], in float32 arithmetic."""
    networks = new_networks(SIZE, seed=0)
    read_checkpoint(CHECKPOINT, networks)
    ids, lengths = token_ids(build_tokenizer(), captions)
    embeds = networks.text_encoder(torch.from_numpy(ids), torch.from_numpy(lengths)).numpy()
    return [each[:length] for each, length in zip(embeds, lengths, strict=True)]
