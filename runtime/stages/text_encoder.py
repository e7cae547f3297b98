"""The stages of the UMT5 text encoder.

Tokens are gathered from the embedding table on the host (`token_embedding`), so only the rows of a prompt are ever read. Only a
prompt's real tokens run through the blocks: padding keys are masked in the reference, so leaving them out changes nothing.
"""

from runtime.specs import DType, StageSpec, TensorSpec
from runtime.variants import TextEncoderArch

TOKEN_EMBEDDING = "token_embedding.weight"
"""Weight of the text encoder that no stage takes: the host gathers its rows, [vocab_size, dim]."""


def text_encoder_stages(arch: TextEncoderArch) -> tuple[StageSpec, ...]:
    """Declared stages of the text encoder, in the order in which they run."""
    dim, inner, ffn_dim = arch.dim, arch.attention_dim, arch.ffn_dim
    tokens = "text_tokens"
    hidden_states = TensorSpec("hidden_states", (tokens, dim))
    return (
        StageSpec(
            name="text_encoder.block",
            inputs=(hidden_states, TensorSpec("position_buckets", (tokens, tokens), DType.I64)),
            weights=(
                TensorSpec("norm1.weight", (dim,)),
                TensorSpec("attn.qkv.weight", (3 * inner, dim)),
                TensorSpec("attn.o.weight", (dim, inner)),
                TensorSpec("pos_embedding.embedding.weight", (arch.num_buckets, arch.num_heads)),
                TensorSpec("norm2.weight", (dim,)),
                TensorSpec("ffn.gate.0.weight", (ffn_dim, dim)),
                TensorSpec("ffn.fc1.weight", (ffn_dim, dim)),
                TensorSpec("ffn.fc2.weight", (dim, ffn_dim)),
            ),
            outputs=(TensorSpec("next_hidden_states", (tokens, dim)),),
            per_block=True,
        ),
        StageSpec(
            name="text_encoder.final_norm",
            inputs=(hidden_states,),
            weights=(TensorSpec("norm.weight", (dim,)),),
            outputs=(TensorSpec("prompt_embeds", (tokens, dim)),),
        ),
    )
