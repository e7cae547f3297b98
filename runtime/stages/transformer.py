"""The stages of the diffusion transformer.

One step runs `embed`, then per block `block_in` → `attention` → `block_out`, then `head`. Before the first step, `time_embed` runs once
for every timestep, `text_embed` and, per block, `text_kv` once a prompt, `image_embed` and `image_kv` once a video. Tokens are the
only dynamic extent: patches are cut and joined by the backend, outside the stages.

Where leading frames may be clean, the time embedding has two rows, of timestep 0 and of the step's own: the first `num_clean` tokens
take row 0, all others row 1.
"""

from runtime.specs import DType, StageSpec, TensorSpec
from runtime.variants import TransformerArch


def _linear(name: str, out_features: int, in_features: int) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec(f"{name}.weight", (out_features, in_features)), TensorSpec(f"{name}.bias", (out_features,))


def transformer_stages(arch: TransformerArch) -> tuple[StageSpec, ...]:
    """Declared stages of a transformer, in the order in which they first run."""
    dim, ffn_dim, head_dim = arch.dim, arch.ffn_dim, arch.head_dim
    patch_in, patch_out = arch.in_channels * arch.patch_volume, arch.out_channels * arch.patch_volume
    tokens, text_tokens = "tokens", arch.text_len
    hidden_states = TensorSpec("hidden_states", (tokens, dim))
    context = TensorSpec("context", (text_tokens, dim))
    rows = 2 if arch.per_token_timesteps else 1
    temb = TensorSpec("temb", (rows, dim))
    time_modulation = TensorSpec("time_modulation", (2, 6 * dim) if arch.per_token_timesteps else (6, dim))
    num_clean = (TensorSpec("num_clean", (1,), DType.I64),) if arch.per_token_timesteps else ()
    modulation = TensorSpec("modulation", (6, dim))  # the block's own table, added to time_modulation
    rope = TensorSpec("rope_cos", (tokens, head_dim // 2)), TensorSpec("rope_sin", (tokens, head_dim // 2))
    query, key, value = (TensorSpec(name, (tokens, dim)) for name in ("query", "key", "value"))
    attention_output = TensorSpec("attention_output", (tokens, dim))
    text_key, text_value = (TensorSpec(name, (text_tokens, dim)) for name in ("text_key", "text_value"))
    image_pair = tuple(TensorSpec(name, (arch.image_tokens, dim)) for name in ("image_key", "image_value"))
    image = image_pair if arch.image_dim is not None else ()
    return (
        StageSpec(
            name="transformer.text_embed",
            inputs=(TensorSpec("encoder_hidden_states", (text_tokens, arch.text_dim)),),
            weights=(*_linear("text_embedding.0", dim, arch.text_dim), *_linear("text_embedding.2", dim, dim)),
            outputs=(context,),
            per_prompt=True,
        ),
        StageSpec(
            name="transformer.text_kv",
            inputs=(context,),
            weights=(*_linear("cross_attn.kv", 2 * dim, dim), TensorSpec("cross_attn.norm_k.weight", (dim,))),
            outputs=(text_key, text_value),
            per_block=True,
            per_prompt=True,
        ),
        *_image_stages(arch),
        StageSpec(
            name="transformer.time_embed",
            inputs=(TensorSpec("timestep_features", (rows, arch.freq_dim)),),
            weights=(
                *_linear("time_embedding.0", dim, arch.freq_dim),
                *_linear("time_embedding.2", dim, dim),
                *_linear("time_projection.1", 6 * dim, dim),
            ),
            outputs=(temb, time_modulation),
            per_prompt=True,
        ),
        StageSpec(
            name="transformer.embed",
            inputs=(TensorSpec("patches", (tokens, patch_in)),),
            weights=_linear("patch_embedding", dim, patch_in),
            outputs=(hidden_states,),
        ),
        StageSpec(
            name="transformer.block_in",
            inputs=(hidden_states, time_modulation, *rope, *num_clean),
            weights=(
                modulation,
                *_linear("self_attn.qkv", 3 * dim, dim),
                TensorSpec("self_attn.norm_q.weight", (dim,)),
                TensorSpec("self_attn.norm_k.weight", (dim,)),
            ),
            outputs=(query, key, value),
            per_block=True,
        ),
        StageSpec(
            name="transformer.attention",
            inputs=(query, key, value),
            weights=(),
            outputs=(attention_output,),
        ),
        StageSpec(
            name="transformer.block_out",
            inputs=(hidden_states, attention_output, time_modulation, text_key, text_value, *image, *num_clean),
            weights=(
                modulation,
                *_linear("self_attn.o", dim, dim),
                TensorSpec("norm3.weight", (dim,)),
                TensorSpec("norm3.bias", (dim,)),
                *_linear("cross_attn.q", dim, dim),
                TensorSpec("cross_attn.norm_q.weight", (dim,)),
                *_linear("cross_attn.o", dim, dim),
                *_linear("ffn.0", ffn_dim, dim),
                *_linear("ffn.2", dim, ffn_dim),
            ),
            outputs=(TensorSpec("next_hidden_states", (tokens, dim)),),
            per_block=True,
        ),
        StageSpec(
            name="transformer.head",
            inputs=(hidden_states, temb, *num_clean),
            weights=(TensorSpec("head.modulation", (2, dim)), *_linear("head.head", patch_out, dim)),
            outputs=(TensorSpec("noise_patches", (tokens, patch_out)),),
        ),
    )


def _image_stages(arch: TransformerArch) -> tuple[StageSpec, ...]:
    """The image branch: features → context, and each block's keys and values of it."""
    if arch.image_dim is None:
        return ()
    dim, image_dim, image_tokens = arch.dim, arch.image_dim, arch.image_tokens
    image_context = TensorSpec("image_context", (image_tokens, dim))
    positions = (TensorSpec("img_emb.emb_pos", (image_tokens, image_dim)),) if arch.image_positions else ()
    return (
        StageSpec(
            name="transformer.image_embed",
            inputs=(TensorSpec("encoder_hidden_states_image", (image_tokens, image_dim)),),
            weights=(
                *positions,
                *_norm("img_emb.proj.0", image_dim),
                *_linear("img_emb.proj.1", image_dim, image_dim),
                *_linear("img_emb.proj.3", dim, image_dim),
                *_norm("img_emb.proj.4", dim),
            ),
            outputs=(image_context,),
            per_prompt=True,
        ),
        StageSpec(
            name="transformer.image_kv",
            inputs=(image_context,),
            weights=(*_linear("cross_attn.kv_img", 2 * dim, dim), TensorSpec("cross_attn.norm_k_img.weight", (dim,))),
            outputs=(TensorSpec("image_key", (image_tokens, dim)), TensorSpec("image_value", (image_tokens, dim))),
            per_block=True,
            per_prompt=True,
        ),
    )


def _norm(name: str, width: int) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec(f"{name}.weight", (width,)), TensorSpec(f"{name}.bias", (width,))
