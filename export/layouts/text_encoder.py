"""Layout of the UMT5 encoder, and its names in transformers' `UMT5EncoderModel`."""

from export.layouts.tables import Table, linear, prefixed, renamed
from runtime.variants import TextEncoderArch

_PARTS = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_BLOCK_PARTS = {
    "norm1": "layer.0.layer_norm",
    "attn": "layer.0.SelfAttention",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",  # the branch the GELU is applied to
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def text_encoder_tensors(arch: TextEncoderArch) -> Table:
    """Every tensor of the encoder, in original naming. Each block has its own relative position table."""
    dim = arch.dim
    block: Table = {
        "norm1.weight": (dim,),
        **linear("attn.q", arch.attention_dim, dim, bias=False),
        **linear("attn.k", arch.attention_dim, dim, bias=False),
        **linear("attn.v", arch.attention_dim, dim, bias=False),
        **linear("attn.o", dim, arch.attention_dim, bias=False),
        "pos_embedding.embedding.weight": (arch.num_buckets, arch.num_heads),
        "norm2.weight": (dim,),
        **linear("ffn.gate.0", arch.ffn_dim, dim, bias=False),
        **linear("ffn.fc1", arch.ffn_dim, dim, bias=False),
        **linear("ffn.fc2", dim, arch.ffn_dim, bias=False),
    }
    table: Table = {"token_embedding.weight": (arch.vocab_size, dim), "norm.weight": (dim,)}
    for index in range(arch.num_layers):
        table |= prefixed(f"blocks.{index}", block)
    return table


def text_encoder_diffusers_names(arch: TextEncoderArch) -> dict[str, str]:
    """Original name → name in `UMT5EncoderModel`, for every tensor of the layout."""
    return {name: _diffusers_name(name) for name in text_encoder_tensors(arch)}


def _diffusers_name(name: str) -> str:
    if not name.startswith("blocks."):
        return renamed(name, _PARTS)
    _, block, rest = name.split(".", 2)
    return f"encoder.block.{block}.{renamed(rest, _BLOCK_PARTS)}"
