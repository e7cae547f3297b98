"""The tables of tensors against the published checkpoints' hashes, and the names against diffusers' own networks."""

import hashlib
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from export.layouts import (
    Table,
    image_encoder_diffusers_names,
    image_encoder_stored_names,
    image_encoder_tensors,
    image_encoder_unused,
    text_encoder_diffusers_names,
    text_encoder_tensors,
    transformer_diffusers_names,
    transformer_tensors,
    vae_diffusers_names,
    vae_tensors,
)
from export.layouts.characters import animate_tensors, speech_tensors
from export.layouts.conditioning import camera_tensors, reference_tensors, speed_tensors, vace_tensors
from export.layouts.encoders import clip_tensors, wav2vec2_tensors
from export.layouts.tables import renamed
from runtime.variants import VAE_2_2, VARIANTS, ImageEncoderArch, TextEncoderArch, TransformerArch, VaeArch

DIT_1_3B = VARIANTS["wan2.1-t2v-1.3b"].transformer
DIT_14B = VARIANTS["wan2.1-t2v-14b"].transformer
DIT_A14B = VARIANTS["wan2.2-t2v-a14b"].transformer
DIT_5B = TransformerArch(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48, out_channels=48)


def _base(arch: TransformerArch, in_channels: int = 16) -> Table:
    return transformer_tensors(replace(arch, in_channels=in_channels))


def _clip_based(arch: TransformerArch, in_channels: int) -> Table:
    return _base(replace(arch, image_dim=1280, image_tokens=257), in_channels)


PUBLISHED = {
    "T2V-1.3B": (_base(DIT_1_3B), 825, "9269f8db9040a9d860eaca435be61814"),
    "T2V-14B": (_base(DIT_14B), 1095, "aafcfd9672c3a2456dc46e1cb6e52c70"),
    "T2V-A14B": (_base(DIT_A14B), 1095, "aafcfd9672c3a2456dc46e1cb6e52c70"),
    "I2V-14B, Fun-14B-InP": (_clip_based(DIT_14B, 36), 1303, "6bfcfb3b342cb286ce886889d519a77e"),
    "FLF2V-14B": (
        _base(replace(DIT_14B, image_dim=1280, image_tokens=514, image_positions=True), 36),
        1304,
        "3ef3b1f8e1dab83d5b71fd7b617f859f",
    ),
    "Fun-1.3B-Control": (_clip_based(DIT_1_3B, 48), 983, "349723183fc063b2bfc10bb2835cf677"),
    "Fun-1.3B-InP": (_clip_based(DIT_1_3B, 36), 983, "6d6ccde6845b95ad9114ab993d917893"),
    "Fun-14B-Control": (_clip_based(DIT_14B, 48), 1303, "efa44cddf936c70abd0ea28b6cbe946c"),
    "Fun-V1.1-1.3B-Control-Camera": (
        _clip_based(DIT_1_3B, 32) | camera_tensors(DIT_1_3B),
        989,
        "ac6a5aa74f4a0aab6f64eb9a72f19901",
    ),
    "Fun-V1.1-1.3B-Control": (
        _clip_based(DIT_1_3B, 48) | reference_tensors(DIT_1_3B),
        985,
        "70ddad9d3a133785da5ea371aae09504",
    ),
    "Fun-V1.1-14B-Control-Camera": (
        _clip_based(DIT_14B, 32) | camera_tensors(DIT_14B),
        1309,
        "b61c605c2adbd23124d152ed28e049ae",
    ),
    "Fun-V1.1-14B-Control": (_clip_based(DIT_14B, 48) | reference_tensors(DIT_14B), 1305, "26bde73488a92e64cc20b0a7485b9e5b"),
    "2.2 Fun-A14B-Control-Camera": (_base(DIT_A14B, 36) | camera_tensors(DIT_A14B), 1101, "47dbeab5e560db3180adf51dc0232fb1"),
    "2.2 Fun-A14B-Control": (_base(DIT_A14B, 52) | reference_tensors(DIT_A14B), 1097, "2267d489f0ceb9f21836532952852ee5"),
    "I2V-A14B, 2.2 Fun-A14B-InP": (_base(DIT_A14B, 36), 1095, "5b013604280dd715f8457c6ed6d6a626"),
    "TI2V-5B": (transformer_tensors(DIT_5B), 825, "1f5ab7703c6fc803fdded85ff040c316"),
    "VACE-1.3B": (_base(DIT_1_3B) | vace_tensors(DIT_1_3B, num_blocks=15), 1264, "a61453409b67cd3246cf0c3bebad47ba"),
    "VACE-14B, VACE-Fun": (_base(DIT_14B) | vace_tensors(DIT_14B, num_blocks=8), 1331, "7a513e1f257a861512b1afd387a8ecd9"),
    "S2V-14B": (_base(DIT_14B) | speech_tensors(DIT_14B), 1260, "966cffdcc52f9c46c391768b27637614"),
    "Animate-14B": (_clip_based(DIT_14B, 36) | animate_tensors(DIT_14B), 1441, "31fa352acb8a1b1d33cd8764273d80a2"),
    "UMT5-xxl encoder": (text_encoder_tensors(TextEncoderArch()), 242, "9c8818c2cbea55eca56c7b447df170da"),
    "VAE 2.1": (vae_tensors(VaeArch()), 194, "ccc42284ea13e1ad04693284c7a09be6"),
    "VAE 2.2": (vae_tensors(VAE_2_2), 196, "e1de6c02cdac79f8b739f4d3698cd216"),
    "CLIP": (clip_tensors(), 784, "5941c53e207d62f20f9025686193c40b"),
    "speed controller": (speed_tensors(DIT_1_3B), 6, "dbd5ec76bbf977983f972c151d545389"),
    "wav2vec2-large-xlsr-53-english": (wav2vec2_tensors(), 424, "06be60f3a4526586d8431cd038a71486"),
}
"""Table, number of tensors, and the MD5 DiffSynth-Studio keeps in `diffsynth/configs/model_configs.py` (fed7b18f)."""


@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_table_has_the_hash_of_the_published_checkpoint(checkpoint: str) -> None:
    table, tensors, published = PUBLISHED[checkpoint]
    words = sorted(word for name, shape in table.items() for word in (name, f"{name}:{'_'.join(map(str, shape))}"))
    assert (len(table), hashlib.md5(",".join(words).encode()).hexdigest()) == (tensors, published)


def test_transformer_names_and_shapes_are_those_of_diffusers() -> None:
    arch = TransformerArch(dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_channels=5, out_channels=7, text_dim=9, freq_dim=8)
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=5,
            out_channels=7,
            text_dim=9,
            freq_dim=8,
            ffn_dim=40,
            num_layers=2,
        )
    assert _renamed_table(transformer_tensors(arch), transformer_diffusers_names(arch)) == _shapes(network)


@pytest.mark.parametrize("positions", [False, True])
def test_image_branch_names_and_shapes_are_those_of_diffusers(positions: bool) -> None:
    arch = TransformerArch(
        dim=24, ffn_dim=40, num_heads=2, num_layers=2, image_dim=15, image_tokens=10, image_positions=positions
    )
    with torch.device("meta"):
        network = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            ffn_dim=40,
            num_layers=2,
            image_dim=15,
            added_kv_proj_dim=24,
            pos_embed_seq_len=10 if positions else None,
        )
    assert _renamed_table(transformer_tensors(arch), transformer_diffusers_names(arch)) == _shapes(network)


@pytest.mark.parametrize("num_layers", [1, 12])
def test_transformer_names_agree_with_diffusers_converter(num_layers: int) -> None:
    arch = TransformerArch(dim=24, ffn_dim=40, num_heads=2, num_layers=num_layers, image_dim=9, image_tokens=4)
    converted = convert_wan_transformer_to_diffusers({name: name for name in transformer_tensors(arch)})
    assert transformer_diffusers_names(arch) == {original: name for name, original in converted.items()}


@pytest.mark.parametrize("num_res_blocks", [1, 2])
@pytest.mark.parametrize("temporal", [(False, True, True), (True, False, True), (False, False, False)])
def test_vae_names_and_shapes_are_those_of_diffusers(num_res_blocks: int, temporal: tuple[bool, ...]) -> None:
    arch = VaeArch(base_dim=8, z_dim=6, num_res_blocks=num_res_blocks, temporal_downsample=temporal, dim_mult=(1, 3, 2, 5))
    with torch.device("meta"):
        network = AutoencoderKLWan(
            base_dim=8, z_dim=6, num_res_blocks=num_res_blocks, temperal_downsample=list(temporal), dim_mult=[1, 3, 2, 5]
        )
    assert _renamed_table(vae_tensors(arch), vae_diffusers_names(arch)) == _shapes(network)


@pytest.mark.parametrize("num_res_blocks", [1, 2])
@pytest.mark.parametrize("temporal", [(False, True, True), (True, False, False)])
def test_vae_names_and_shapes_with_residual_levels_are_those_of_diffusers(
    num_res_blocks: int, temporal: tuple[bool, ...]
) -> None:
    arch = VaeArch(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=6,
        num_res_blocks=num_res_blocks,
        temporal_downsample=temporal,
        residual_levels=True,
        patch_size=2,
    )
    with torch.device("meta"):
        network = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=12,
            z_dim=6,
            num_res_blocks=num_res_blocks,
            temperal_downsample=list(temporal),
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
        )
    assert _renamed_table(vae_tensors(arch), vae_diffusers_names(arch)) == _shapes(network)


def test_vae_names_agree_with_diffusers_converter() -> None:
    arch = VaeArch()
    converted = convert_wan_vae_to_diffusers({name: name for name in vae_tensors(arch)})
    assert vae_diffusers_names(arch) == {original: name for name, original in converted.items()}


def test_text_encoder_names_and_shapes_are_those_of_transformers() -> None:
    arch = TextEncoderArch(dim=12, attention_dim=20, ffn_dim=28, num_heads=5, num_layers=2, vocab_size=30, num_buckets=16)
    with torch.device("meta"):
        network = UMT5EncoderModel(
            UMT5Config(d_model=12, d_kv=4, d_ff=28, num_heads=5, num_layers=2, vocab_size=30, relative_attention_num_buckets=16)
        )
    expected = _shapes(network)
    del expected["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    assert _renamed_table(text_encoder_tensors(arch), text_encoder_diffusers_names(arch)) == expected


def test_text_encoder_gate_is_the_branch_with_the_activation() -> None:
    names = text_encoder_diffusers_names(TextEncoderArch(num_layers=1))
    assert names["blocks.0.ffn.gate.0.weight"] == "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    assert names["blocks.0.ffn.fc1.weight"] == "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"


def test_image_encoder_names_and_shapes_are_those_of_transformers() -> None:
    arch = ImageEncoderArch(dim=24, ffn_dim=28, num_heads=3, num_layers=3, image_size=35, patch_size=7)
    with torch.device("meta"):
        network = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=28,
                num_attention_heads=3,
                num_hidden_layers=3,
                image_size=35,
                patch_size=7,
            )
        )
    shapes = _shapes(network)
    used = shapes.keys() - image_encoder_unused(arch, shapes)
    expected = {name: shapes[name] for name in used}
    assert _renamed_table(image_encoder_tensors(arch, original=False), image_encoder_diffusers_names(arch)) == expected
    assert {f"vision_model.{name}" for name in expected} < image_encoder_stored_names(arch).keys()


def test_image_encoder_takes_all_of_the_published_clip_but_what_it_never_runs() -> None:
    arch = ImageEncoderArch()
    published, names = clip_tensors(), image_encoder_stored_names(arch)
    used = {name: published[name] for name in published if name in names}
    assert published.keys() - used.keys() == image_encoder_unused(arch, published)
    found: Table = {}
    for stored, (first, *rest) in used.items():
        parts = names[stored]
        if isinstance(parts, str):
            found[parts] = (first, *rest)
        else:
            found |= dict.fromkeys(parts, (first // 3, *rest))
    assert found == image_encoder_tensors(arch, original=True)


def test_a_name_outside_the_naming_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.norm9"):
        renamed("blocks.0.norm9.weight", {"norm1": "norm1"})


def _renamed_table(table: Table, names: dict[str, str]) -> Table:
    assert len(set(names.values())) == len(table)
    return {names[name]: shape for name, shape in table.items()}


def _shapes(network: torch.nn.Module) -> Table:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
