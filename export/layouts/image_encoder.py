"""Layout of what Wan uses of the CLIP image encoder, and its names in the original repositories' file and in transformers.

Both files hold more than is used, see `image_encoder_unused`. The original's has q, k and v as one tensor and calls a block
`visual.transformer.{i}`; here they are apart, as transformers has them, and blocks are called as in every other network.
"""

from collections.abc import Iterable

from export.layouts.tables import Shape, Table, conv, layer_norm, linear, prefixed, renamed
from runtime.variants import ImageEncoderArch

_IMAGE_CHANNELS = 3
_DIFFUSERS_PREFIX = "vision_model."  # in front of every name that transformers before 5 wrote
_DIFFUSERS_PARTS = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",  # spelt so in transformers
}
_DIFFUSERS_BLOCK_PARTS = {
    "norm1": "layer_norm1",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def image_encoder_tensors(arch: ImageEncoderArch, *, original: bool) -> Table:
    """Every tensor that is used, with the shapes of the original's file or of transformers', which differ in the embeddings."""
    dim = arch.dim
    one: Shape = (1,) if original else ()
    table: Table = {
        "cls_embedding": (*one, *one, dim),
        "pos_embedding": (*one, arch.num_tokens, dim),
        **conv("patch_embedding", dim, _IMAGE_CHANNELS, kernel=(arch.patch_size, arch.patch_size), bias=False),
        **layer_norm("pre_norm", dim),
    }
    block: Table = {
        **layer_norm("norm1", dim),
        **linear("attn.q", dim, dim),
        **linear("attn.k", dim, dim),
        **linear("attn.v", dim, dim),
        **linear("attn.proj", dim, dim),
        **layer_norm("norm2", dim),
        **linear("mlp.0", arch.ffn_dim, dim),
        **linear("mlp.2", dim, arch.ffn_dim),
    }
    for index in range(arch.num_blocks):
        table |= prefixed(f"blocks.{index}", block)
    return table


def image_encoder_diffusers_names(arch: ImageEncoderArch) -> dict[str, str]:
    """Name here → name in transformers' `CLIPVisionModel` (version 5), for every tensor that is used."""
    return {name: _diffusers_name(name) for name in image_encoder_tensors(arch, original=False)}


def image_encoder_stored_names(arch: ImageEncoderArch) -> dict[str, str | tuple[str, ...]]:
    """Name in a file of either layout → name here, or the three names of a tensor that holds q, k and v."""
    names: dict[str, str | tuple[str, ...]] = {}
    for name, diffusers in image_encoder_diffusers_names(arch).items():
        names[diffusers] = names[_DIFFUSERS_PREFIX + diffusers] = name
        original = f"visual.{name}".replace("visual.blocks.", "visual.transformer.")
        if ".attn.q." in name:
            names[original.replace(".q.", ".to_qkv.")] = tuple(name.replace(".q.", f".{part}.") for part in "qkv")
        elif ".attn.k." not in name and ".attn.v." not in name:
            names[original] = name
    return names


def image_encoder_unused(arch: ImageEncoderArch, stored: Iterable[str]) -> set[str]:
    """Those of a file's names that belong to a whole CLIP but not to what is used: last layer, what follows it, the text half."""
    original = ("textual.", "log_scale", "visual.head", "visual.post_norm.", f"visual.transformer.{arch.num_blocks}.")
    last = f"encoder.layers.{arch.num_blocks}."
    diffusers = ("post_layernorm.", "visual_projection.", last, "embeddings.position_ids")
    return {name for name in stored if name.startswith(original) or name.removeprefix(_DIFFUSERS_PREFIX).startswith(diffusers)}


def _diffusers_name(name: str) -> str:
    if not name.startswith("blocks."):
        return renamed(name, _DIFFUSERS_PARTS)
    _, block, rest = name.split(".", 2)
    return f"encoder.layers.{block}.{renamed(rest, _DIFFUSERS_BLOCK_PARTS)}"
