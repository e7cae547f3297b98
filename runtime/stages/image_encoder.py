"""The stages of the CLIP image encoder.

Each image runs through them by itself; its patches are cut on the host. The last layer and the norm after it are left out: Wan
takes the hidden states before them.
"""

from runtime.specs import StageSpec, TensorSpec
from runtime.variants import ImageEncoderArch

_IMAGE_CHANNELS = 3


def image_encoder_stages(arch: ImageEncoderArch) -> tuple[StageSpec, ...]:
    """Declared stages of the image encoder, in the order in which they run."""
    dim, ffn_dim, tokens = arch.dim, arch.ffn_dim, arch.num_tokens
    patch_values = _IMAGE_CHANNELS * arch.patch_size**2
    hidden_states = TensorSpec("hidden_states", (tokens, dim))
    return (
        StageSpec(
            name="image_encoder.embed",
            inputs=(TensorSpec("patches", (tokens - 1, patch_values)),),
            weights=(
                TensorSpec("cls_embedding", (1, dim)),
                TensorSpec("pos_embedding", (tokens, dim)),
                TensorSpec("patch_embedding.weight", (dim, patch_values)),
                TensorSpec("pre_norm.weight", (dim,)),
                TensorSpec("pre_norm.bias", (dim,)),
            ),
            outputs=(hidden_states,),
        ),
        StageSpec(
            name="image_encoder.block",
            inputs=(hidden_states,),
            weights=(
                TensorSpec("norm1.weight", (dim,)),
                TensorSpec("norm1.bias", (dim,)),
                TensorSpec("attn.qkv.weight", (3 * dim, dim)),
                TensorSpec("attn.qkv.bias", (3 * dim,)),
                TensorSpec("attn.proj.weight", (dim, dim)),
                TensorSpec("attn.proj.bias", (dim,)),
                TensorSpec("norm2.weight", (dim,)),
                TensorSpec("norm2.bias", (dim,)),
                TensorSpec("mlp.0.weight", (ffn_dim, dim)),
                TensorSpec("mlp.0.bias", (ffn_dim,)),
                TensorSpec("mlp.2.weight", (dim, ffn_dim)),
                TensorSpec("mlp.2.bias", (dim,)),
            ),
            outputs=(TensorSpec("next_hidden_states", (tokens, dim)),),
            per_block=True,
        ),
    )
