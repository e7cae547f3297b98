"""Opens the checkpoint folder, which is in the original repositories' layout, as diffusers' `WanPipeline`.

`from_single_file` reads such a transformer but takes its sizes for those of a published model, so the tensors are renamed by the tables of
`export.layouts` and loaded into classes of the right sizes.
"""

from pathlib import Path
from typing import Any

from export.checkpoint import Checkpoint, TensorSource, open_checkpoint
from export.layouts import text_encoder_diffusers_names, transformer_diffusers_names, vae_diffusers_names
from runtime.variants import Variant


def open_pipeline(folder: Path, *, shift: float = 5.0) -> Any:
    """A float32 `WanPipeline` on the CPU, with the scheduler that Wan's own repositories default to.

    Raises:
        ExportError: the folder is not a whole checkpoint.
    """
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from transformers import AutoTokenizer

    with open_checkpoint(folder) as checkpoint:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
        )
        return WanPipeline(
            tokenizer=AutoTokenizer.from_pretrained(checkpoint.tokenizer.parent),
            text_encoder=_text_encoder(checkpoint),
            transformer=_transformer(checkpoint),
            vae=_vae(checkpoint),
            scheduler=scheduler,
        )


def _transformer(checkpoint: Checkpoint) -> Any:
    from diffusers import WanTransformer3DModel

    arch = checkpoint.variant.transformer
    model = WanTransformer3DModel(
        patch_size=arch.patch_size, num_attention_heads=arch.num_heads, attention_head_dim=arch.head_dim,
        in_channels=arch.in_channels, out_channels=arch.out_channels, text_dim=arch.text_dim, freq_dim=arch.freq_dim,
        ffn_dim=arch.ffn_dim, num_layers=arch.num_layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=arch.eps,
    )  # fmt: skip
    component = checkpoint.variant.experts[0].component
    return _loaded(model, checkpoint.components[component], transformer_diffusers_names(arch))


def _text_encoder(checkpoint: Checkpoint) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    arch = checkpoint.variant.text_encoder
    config = UMT5Config(
        vocab_size=arch.vocab_size, d_model=arch.dim, d_kv=arch.attention_dim // arch.num_heads, d_ff=arch.ffn_dim,
        num_layers=arch.num_layers, num_heads=arch.num_heads, relative_attention_num_buckets=arch.num_buckets,
        relative_attention_max_distance=arch.max_distance, layer_norm_epsilon=arch.eps, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return _loaded(UMT5EncoderModel(config), checkpoint.components["text_encoder"], text_encoder_diffusers_names(arch))


def _vae(checkpoint: Checkpoint) -> Any:
    from diffusers import AutoencoderKLWan

    variant: Variant = checkpoint.variant
    arch = variant.vae
    model = AutoencoderKLWan(
        base_dim=arch.base_dim, z_dim=arch.z_dim, dim_mult=list(arch.dim_mult), num_res_blocks=arch.num_res_blocks,
        temperal_downsample=list(arch.temporal_downsample), latents_mean=list(arch.latents_mean),
        latents_std=list(arch.latents_std),
    )  # fmt: skip
    return _loaded(model, checkpoint.components["vae"], vae_diffusers_names(arch))


def _loaded(model: Any, source: TensorSource, names: dict[str, str]) -> Any:
    """The model with a component's tensors under its own names; an alias of one of its tensors needs none."""
    tensors = {names[name]: source.read(name) for name in source.names()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    aliases = {"encoder.embed_tokens.weight"}
    if unexpected or set(missing) - aliases:
        raise ValueError(f"{type(model).__name__}: missing {missing}, unexpected {unexpected}")
    return model.float().eval()
