"""The sizes of the small Wan, and its checkpoint folder in the layout of the original repositories.

Sizes fit every target: heads of 128 as in all of Wan's transformers, channels of the VAE in multiples of 8, and widths in multiples of 16.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.moving_shapes.networks import Dit, TextEncoder
from benchmarks.moving_shapes.tokenizer import MAX_TOKENS, VOCAB_SIZE, write_tokenizer
from benchmarks.moving_shapes.vae import Vae
from runtime.variants import TextEncoderArch, TransformerArch, VaeArch

TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FOLDER = "google/umt5-xxl"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Architectures of the three networks."""

    text_encoder: TextEncoderArch
    transformer: TransformerArch
    vae: VaeArch


SIZES = {
    "small": ModelSizes(
        text_encoder=TextEncoderArch(dim=128, attention_dim=128, ffn_dim=384, num_heads=4, num_layers=3, vocab_size=VOCAB_SIZE),
        transformer=TransformerArch(dim=256, ffn_dim=768, num_heads=2, num_layers=7, text_dim=128),
        vae=VaeArch(base_dim=16),
    ),
    "mini": ModelSizes(
        text_encoder=TextEncoderArch(dim=128, attention_dim=128, ffn_dim=256, num_heads=4, num_layers=2, vocab_size=VOCAB_SIZE),
        transformer=TransformerArch(dim=128, ffn_dim=512, num_heads=1, num_layers=6, text_dim=128),
        vae=VaeArch(base_dim=8, num_res_blocks=1),
    ),
    "tiny": ModelSizes(
        text_encoder=TextEncoderArch(dim=32, attention_dim=32, ffn_dim=64, num_heads=2, num_layers=1, vocab_size=VOCAB_SIZE),
        transformer=TransformerArch(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32),
        vae=VaeArch(base_dim=8, num_res_blocks=1),
    ),
}
"""`small` is for a GPU, `mini` for two CPU cores; `tiny` is for trying the trainer out."""


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """The networks of one model, for training."""

    sizes: ModelSizes
    text_encoder: TextEncoder
    transformer: Dit
    vae: Vae


def new_networks(sizes: ModelSizes, *, seed: int) -> Networks:
    """Freshly initialised networks; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Networks(sizes, TextEncoder(sizes.text_encoder, max_tokens=MAX_TOKENS), Dit(sizes.transformer), Vae(sizes.vae))


def write_checkpoint(folder: Path, networks: Networks, states: Mapping[str, Mapping[str, Tensor]] | None = None) -> int:
    """Write the folder, in place of one this function wrote; returns its size in bytes.

    Args:
        states: `text_encoder` and `transformer` tensors to write instead of the networks' own, such as their moving averages.

    Raises:
        FileExistsError: `folder` holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / VAE_FILE).exists():
        raise FileExistsError(f"{folder} is not empty and not a checkpoint")
    states = states or {name: getattr(networks, name).state_dict() for name in ("text_encoder", "transformer")}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tokenizer(partial / TOKENIZER_FOLDER)
    (partial / CONFIG_FILE).write_text(json.dumps(transformer_config(networks.sizes.transformer), indent=2) + "\n")
    _save_pth(partial / TEXT_ENCODER_FILE, states["text_encoder"], torch.bfloat16)
    _save_pth(partial / VAE_FILE, networks.vae.folded_state(), torch.float16)
    _save_safetensors(partial / TRANSFORMER_FILE, states["transformer"], torch.float16)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_checkpoint(folder: Path, networks: Networks) -> None:
    """Load a written folder's tensors into networks of the same sizes; the VAE's latents need no statistics then."""
    from safetensors.torch import load_file

    _load(networks.transformer, load_file(folder / TRANSFORMER_FILE))
    _load(networks.text_encoder, torch.load(folder / TEXT_ENCODER_FILE, weights_only=True))
    vae = torch.load(folder / VAE_FILE, weights_only=True)
    _load(networks.vae.encode_chain, {name: vae[name] for name in networks.vae.encode_chain.state_dict()})
    _load(networks.vae.decode_chain, {name: vae[name] for name in networks.vae.decode_chain.state_dict()})
    networks.vae.take_statistics_of_wan()


def transformer_config(arch: TransformerArch) -> dict[str, Any]:
    """`config.json` of the original layout."""
    return {
        "_class_name": "WanModel", "model_type": "t2v", "dim": arch.dim, "eps": arch.eps, "ffn_dim": arch.ffn_dim,
        "freq_dim": arch.freq_dim, "in_dim": arch.in_channels, "num_heads": arch.num_heads, "num_layers": arch.num_layers,
        "out_dim": arch.out_channels, "text_len": arch.text_len,
    }  # fmt: skip


def _load(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def _save_pth(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    torch.save(_stored(tensors, dtype), path)


def _save_safetensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    save_file(_stored(tensors, dtype), path, metadata={"format": "pt"})


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
