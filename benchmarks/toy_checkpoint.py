"""Writes a toy Wan text-to-video checkpoint with random weights, as the original repositories or diffusers lay theirs out.

It takes the same path through wanrt as a real one and is small enough for a laptop. What it generates is noise: nothing was
ever trained. Neither diffusers nor transformers is needed to write it.

    python -m benchmarks.toy_checkpoint DIR [--layout diffusers] [--experts 2] [--dim 96] [--layers 4] [--seed 0]
"""

import argparse
import json
import shutil
import zlib
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.toy_tokenizer import VOCABULARY, write_tokenizer
from export.layouts import (
    Shape,
    Table,
    text_encoder_diffusers_names,
    text_encoder_tensors,
    transformer_diffusers_names,
    transformer_tensors,
    vae_diffusers_names,
    vae_tensors,
)
from runtime.variants import TextEncoderArch, TransformerArch, VaeArch

Tensors = dict[str, NDArray[np.float32]]
BOUNDARY = 0.875  # of wan2.2-t2v-a14b
_HEAD_GAIN = 0.45 / 0.596  # pixels of standard deviation 0.45 in [-1, 1]; 0.596 is the RMS of SiLU over a standard normal
_CONFIG_FILE, _WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"


class Layout(StrEnum):
    """How a checkpoint's files and tensors are named."""

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyModel:
    """Sizes of a toy checkpoint; the defaults make a folder of about 6 MB."""

    transformer: TransformerArch = TransformerArch(dim=96, ffn_dim=256, num_heads=4, num_layers=4, text_dim=64)
    text_encoder: TextEncoderArch = TextEncoderArch(
        dim=64, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=2, vocab_size=len(VOCABULARY)
    )
    vae: VaeArch = VaeArch(base_dim=8)
    experts: int = 1
    seed: int = 0


def write_toy_checkpoint(folder: Path, model: ToyModel, *, layout: Layout = Layout.ORIGINAL) -> bool:
    """Write the checkpoint into `folder`, in place of another toy; the same model and seed give the same tensors in both layouts.

    Returns:
        Whether anything was written: a folder that already holds exactly this toy is left alone.

    Raises:
        FileExistsError: `folder` holds something other than a toy checkpoint.
    """
    recipe = json.dumps({"layout": layout, **asdict(model)}) + "\n"
    recipe_file = folder / "toy.json"
    if recipe_file.exists() and recipe_file.read_text(encoding="utf-8") == recipe:
        return False
    if folder.exists() and any(folder.iterdir()) and not recipe_file.exists():
        raise FileExistsError(f"{folder} is not empty and not a toy checkpoint")
    partial = folder.with_name(folder.name + ".partial")  # a killed call leaves this, never half a checkpoint
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    _WRITERS[layout](partial, model)
    (partial / "toy.json").write_text(recipe, encoding="utf-8")
    partial.rename(folder)
    return True


def _write_original(folder: Path, model: ToyModel) -> None:
    arch = model.transformer
    config = {
        "_class_name": "WanModel", "model_type": "t2v", "dim": arch.dim, "ffn_dim": arch.ffn_dim, "freq_dim": arch.freq_dim,
        "in_dim": arch.in_channels, "out_dim": arch.out_channels, "num_heads": arch.num_heads, "num_layers": arch.num_layers,
        "text_len": arch.text_len, "eps": arch.eps,
    }  # fmt: skip
    places = [folder] if model.experts == 1 else [folder / "high_noise_model", folder / "low_noise_model"]
    for index, place in enumerate(places):
        _write_network(place, config, _transformer_weights(model, index))
    _write_pth(folder / "models_t5_umt5-xxl-enc-bf16.pth", _text_encoder_weights(model), bfloat16=True)
    _write_pth(folder / "Wan2.1_VAE.pth", _vae_weights(model), bfloat16=False)
    write_tokenizer(folder / "google" / "umt5-xxl")


def _write_diffusers(folder: Path, model: ToyModel) -> None:
    arch, text, vae = model.transformer, model.text_encoder, model.vae
    transformer_config = {
        "_class_name": "WanTransformer3DModel", "patch_size": arch.patch_size, "num_attention_heads": arch.num_heads,
        "attention_head_dim": arch.head_dim, "in_channels": arch.in_channels, "out_channels": arch.out_channels,
        "text_dim": arch.text_dim, "freq_dim": arch.freq_dim, "ffn_dim": arch.ffn_dim, "num_layers": arch.num_layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": arch.eps, "rope_max_seq_len": 1024,
    }  # fmt: skip
    text_config = {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": text.dim, "d_ff": text.ffn_dim,
        "d_kv": text.attention_dim // text.num_heads, "num_heads": text.num_heads, "num_layers": text.num_layers,
        "vocab_size": text.vocab_size, "relative_attention_num_buckets": text.num_buckets,
        "relative_attention_max_distance": text.max_distance, "layer_norm_epsilon": text.eps,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    vae_config = {
        "_class_name": "AutoencoderKLWan", "base_dim": vae.base_dim, "z_dim": vae.z_dim, "dim_mult": vae.dim_mult,
        "num_res_blocks": vae.num_res_blocks, "attn_scales": [], "temperal_downsample": vae.temporal_downsample, "dropout": 0.0,
        "latents_mean": vae.latents_mean, "latents_std": vae.latents_std,
    }  # fmt: skip
    transformer_names = transformer_diffusers_names(arch)
    for index, place in enumerate(("transformer", "transformer_2")[: model.experts]):
        _write_network(folder / place, transformer_config, _renamed(_transformer_weights(model, index), transformer_names))
    _write_network(folder / "vae", vae_config, _renamed(_vae_weights(model), vae_diffusers_names(vae)))
    text_names = text_encoder_diffusers_names(text)
    _write_network(
        folder / "text_encoder", text_config, _renamed(_text_encoder_weights(model), text_names), "model.safetensors"
    )
    write_tokenizer(folder / "tokenizer")
    _write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "num_train_timesteps": 1000, "flow_shift": 3.0,
    })  # fmt: skip
    _write_json(folder / "model_index.json", {
        "_class_name": "WanPipeline", "boundary_ratio": BOUNDARY if model.experts == 2 else None, "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if model.experts == 2 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    })  # fmt: skip


_WRITERS = {Layout.ORIGINAL: _write_original, Layout.DIFFUSERS: _write_diffusers}


def _transformer_weights(model: ToyModel, expert: int) -> Tensors:
    return _random_tensors(transformer_tensors(model.transformer), seed=(model.seed, expert))


def _text_encoder_weights(model: ToyModel) -> Tensors:
    arch = model.text_encoder
    tensors = _random_tensors(text_encoder_tensors(arch), seed=(model.seed, 2))
    for name, tensor in tensors.items():
        if name.endswith("attn.q.weight"):
            tensor /= np.sqrt(
                arch.attention_dim / arch.num_heads
            )  # UMT5 does not scale its logits; its queries are small instead
    tensors["token_embedding.weight"] *= np.sqrt(arch.dim)  # unit variance per token
    return {name: _bfloat16_values(tensor) for name, tensor in tensors.items()}


def _vae_weights(model: ToyModel) -> Tensors:
    tensors = _random_tensors(vae_tensors(model.vae), seed=(model.seed, 3))
    tensors["decoder.head.2.weight"] *= _HEAD_GAIN
    for name, tensor in tensors.items():
        if name.startswith("decoder.") and ".time_conv." in name:
            first_frame, second_frame = np.split(tensor, 2)
            second_frame[:] = (
                first_frame  # the two frames made of one start equal: later layers move them, and nothing flickers
            )
    return tensors


def _random_tensors(table: Table, *, seed: tuple[int, int]) -> Tensors:
    """Random float32 tensors of the table's shapes; each depends on the seed and its own name only."""
    return {
        name: _random_tensor(name, shape, np.random.default_rng((*seed, zlib.crc32(name.encode()))))
        for name, shape in table.items()
    }


def _random_tensor(name: str, shape: Shape, random: np.random.Generator) -> NDArray[np.float32]:
    """A tensor as it might look after training: gains about 1, small biases, weights that keep the variance."""
    normal = random.standard_normal(shape)
    if name.endswith(".bias"):
        values = 0.02 * normal
    elif name.endswith("modulation"):
        values = 0.2 * normal
    elif name.endswith("gamma") or len(shape) == 1:
        values = 1 + 0.1 * normal
    else:
        values = normal * _smooth_window(shape[2:])
        values /= np.sqrt((values**2).mean(axis=0, keepdims=True).sum())  # fan-in, window included
    return np.ascontiguousarray(values, dtype=np.float32)


def _bfloat16_values(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
    """The tensor cut to bfloat16's precision: the original layout stores its text encoder so, and both must hold the same."""
    return (tensor.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def _smooth_window(kernel: Shape) -> NDArray[np.float64]:
    """Binomial weights [1, 2, 1] along every kernel axis of three, so that the VAE draws blobs rather than grain."""
    window = np.ones(kernel)
    for axis, size in enumerate(kernel):
        profile = np.array([1.0, 2.0, 1.0]) if size == 3 else np.ones(size)
        window = window * profile.reshape([-1 if i == axis else 1 for i in range(len(kernel))])
    return window


def _renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    return {names[name]: tensor for name, tensor in tensors.items()}


def _write_network(folder: Path, config: dict[str, Any], tensors: Tensors, file_name: str = _WEIGHTS_FILE) -> None:
    from safetensors.numpy import save_file

    _write_json(folder / _CONFIG_FILE, config)
    save_file(tensors, folder / file_name, metadata={"format": "pt"})


def _write_pth(path: Path, tensors: Tensors, *, bfloat16: bool) -> None:
    import torch

    dtype = torch.bfloat16 if bfloat16 else torch.float32
    torch.save({name: torch.from_numpy(tensor).to(dtype) for name, tensor in tensors.items()}, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toy_checkpoint", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", type=Layout, choices=list(Layout), default=Layout.ORIGINAL)
    parser.add_argument("--experts", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--dim", type=int, default=ToyModel().transformer.dim, help="width of the transformer, a multiple of the heads"
    )
    parser.add_argument("--heads", type=int, default=ToyModel().transformer.num_heads)
    parser.add_argument("--layers", type=int, default=ToyModel().transformer.num_layers)
    parser.add_argument("--vae-dim", type=int, default=ToyModel().vae.base_dim, help="narrowest width of the VAE")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    toy = ToyModel(experts=asked.experts, seed=asked.seed, vae=VaeArch(base_dim=asked.vae_dim))
    arch = replace(toy.transformer, dim=asked.dim, num_heads=asked.heads, num_layers=asked.layers)
    written = write_toy_checkpoint(asked.folder, replace(toy, transformer=arch), layout=asked.layout)
    size = sum(path.stat().st_size for path in asked.folder.rglob("*") if path.is_file())
    kept = "" if written else " (kept as it was)"
    print(f"{asked.folder}: toy checkpoint, {asked.layout} layout, {size / 1e6:.1f} MB, random weights{kept}")


if __name__ == "__main__":
    main()
