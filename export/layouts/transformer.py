"""Layout of the diffusion transformer with its image branch, and its names in diffusers."""

from export.layouts.tables import Table, conv, layer_norm, linear, prefixed, renamed
from runtime.variants import TransformerArch

_PARTS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
_ATTENTION_PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK_PARTS = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # the norm before cross-attention; norm1 and the one before the FFN have no weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{original}": f"attn1.{name}" for original, name in _ATTENTION_PARTS.items()},
    **{f"cross_attn.{original}": f"attn2.{name}" for original, name in _ATTENTION_PARTS.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}


def transformer_tensors(arch: TransformerArch) -> Table:
    """Every tensor of a transformer, its image branch included where it has one, in original naming."""
    dim, patch_volume = arch.dim, arch.patch_volume
    table: Table = {
        **conv("patch_embedding", dim, arch.in_channels, kernel=arch.patch_size),
        **linear("text_embedding.0", dim, arch.text_dim),
        **linear("text_embedding.2", dim, dim),
        **linear("time_embedding.0", dim, arch.freq_dim),
        **linear("time_embedding.2", dim, dim),
        **linear("time_projection.1", 6 * dim, dim),
        "head.modulation": (1, 2, dim),
        **linear("head.head", arch.out_channels * patch_volume, dim),
    }
    for block in range(arch.num_layers):
        table |= prefixed(f"blocks.{block}", block_tensors(arch))
    return table if arch.image_dim is None else table | _image_tensors(arch, arch.image_dim)


def block_tensors(arch: TransformerArch) -> Table:
    """One transformer block, without the `blocks.{i}.` in front."""
    return {
        "modulation": (1, 6, arch.dim),
        **prefixed("self_attn", attention_tensors(arch.dim)),
        **layer_norm("norm3", arch.dim),
        **prefixed("cross_attn", attention_tensors(arch.dim)),
        **linear("ffn.0", arch.ffn_dim, arch.dim),
        **linear("ffn.2", arch.dim, arch.ffn_dim),
    }


def attention_tensors(dim: int) -> Table:
    """Projections q, k, v, o and the two RMS norms, which span all heads together."""
    table: Table = {"norm_q.weight": (dim,), "norm_k.weight": (dim,)}
    for projection in "qkvo":
        table |= linear(projection, dim, dim)
    return table


def _image_tensors(arch: TransformerArch, image_dim: int) -> Table:
    """The image branch: an embedding MLP, a table of positions where there is one and, per block, keys and values of the image."""
    table: Table = {
        **layer_norm("img_emb.proj.0", image_dim),
        **linear("img_emb.proj.1", image_dim, image_dim),
        **linear("img_emb.proj.3", arch.dim, image_dim),
        **layer_norm("img_emb.proj.4", arch.dim),
    }
    if arch.image_positions:
        table["img_emb.emb_pos"] = (1, arch.image_tokens, image_dim)
    for block in range(arch.num_layers):
        branch: Table = {
            **linear("k_img", arch.dim, arch.dim),
            **linear("v_img", arch.dim, arch.dim),
            "norm_k_img.weight": (arch.dim,),
        }
        table |= prefixed(f"blocks.{block}.cross_attn", branch)
    return table


def transformer_diffusers_names(arch: TransformerArch) -> dict[str, str]:
    """Original name → name in diffusers' `WanTransformer3DModel`, for every tensor of the layout."""
    return {name: _diffusers_name(name) for name in transformer_tensors(arch)}


def _diffusers_name(name: str) -> str:
    if not name.startswith("blocks."):
        return renamed(name, _PARTS)
    _, block, rest = name.split(".", 2)
    return f"blocks.{block}.{renamed(rest, _BLOCK_PARTS)}"
