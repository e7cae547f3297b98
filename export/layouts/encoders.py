"""Layouts of the encoders other variants bring along: the CLIP image tower, and wav2vec2 for speech.

Sources: Wan-Video/Wan2.1 `wan/modules/{clip,xlm_roberta}.py` (9737cba9), transformers `Wav2Vec2ForCTC` (weight norm stored in its first
form, `weight_g` and `weight_v`).
"""

from export.layouts.tables import Table, conv, layer_norm, linear, prefixed


def clip_tensors() -> Table:
    """open-clip XLM-RoBERTa-large + ViT-H/14: the visual tower, which Wan uses, and the textual one, which it does not."""
    return {**prefixed("visual", _clip_visual()), **prefixed("textual", _clip_textual()), "log_scale": ()}


def _clip_visual(dim: int = 1280, num_layers: int = 32, tokens: int = 257, embedding_dim: int = 1024) -> Table:
    table: Table = {
        "cls_embedding": (1, 1, dim),
        "pos_embedding": (1, tokens, dim),
        **conv("patch_embedding", dim, 3, kernel=(14, 14), bias=False),
        **layer_norm("pre_norm", dim),
        **layer_norm("post_norm", dim),
        "head": (dim, embedding_dim),
    }
    block: Table = {
        **layer_norm("norm1", dim),
        **linear("attn.to_qkv", 3 * dim, dim),
        **linear("attn.proj", dim, dim),
        **layer_norm("norm2", dim),
        **linear("mlp.0", 4 * dim, dim),
        **linear("mlp.2", dim, 4 * dim),
    }
    for index in range(num_layers):
        table |= prefixed(f"transformer.{index}", block)
    return table


def _clip_textual(
    dim: int = 1024, num_layers: int = 24, vocab_size: int = 250002, positions: int = 514, out_dim: int = 1024
) -> Table:
    table: Table = {
        "token_embedding.weight": (vocab_size, dim),
        "type_embedding.weight": (1, dim),
        "pos_embedding.weight": (positions, dim),
        **layer_norm("norm", dim),
    }
    block = {**layer_norm("norm1", dim), **layer_norm("norm2", dim)}
    for projection in "qkvo":
        block |= linear(f"attn.{projection}", dim, dim)
    block |= {**linear("ffn.0", 4 * dim, dim), **linear("ffn.2", dim, 4 * dim)}
    for index in range(num_layers):
        table |= prefixed(f"blocks.{index}", block)
    hidden = (dim + out_dim) // 2
    return table | linear("head.0", hidden, dim, bias=False) | linear("head.2", out_dim, hidden, bias=False)


def wav2vec2_tensors(dim: int = 1024, num_layers: int = 24, vocab_size: int = 33, channels: int = 512) -> Table:
    """wav2vec2-large-xlsr-53 with the character head it was fine-tuned with."""
    table: Table = {"masked_spec_embed": (dim,)}
    for index, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        layer = f"feature_extractor.conv_layers.{index}"
        table |= conv(f"{layer}.conv", channels, channels if index else 1, kernel=(kernel,))
        table |= layer_norm(f"{layer}.layer_norm", channels)
    table |= {
        **layer_norm("feature_projection.layer_norm", channels),
        **linear("feature_projection.projection", dim, channels),
        "encoder.pos_conv_embed.conv.bias": (dim,),
        "encoder.pos_conv_embed.conv.weight_g": (1, 1, 128),
        "encoder.pos_conv_embed.conv.weight_v": (dim, dim // 16, 128),
        **layer_norm("encoder.layer_norm", dim),
    }
    block = {**layer_norm("layer_norm", dim), **layer_norm("final_layer_norm", dim)}
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        block |= linear(f"attention.{projection}", dim, dim)
    block |= linear("feed_forward.intermediate_dense", 4 * dim, dim) | linear("feed_forward.output_dense", dim, 4 * dim)
    for index in range(num_layers):
        table |= prefixed(f"encoder.layers.{index}", block)
    return prefixed("wav2vec2", table) | linear("lm_head", vocab_size, dim)
