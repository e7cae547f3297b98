"""Checkpoints that are incomplete, damaged, hostile or of another kind are refused, and the error names what is wrong."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.checkpoint import open_checkpoint
from runtime.errors import ExportError
from runtime.variants import VARIANTS
from tests.toys import (
    DEEP_TOY,
    IMAGE_TOY,
    NARROW_TOY,
    edit_json,
    edit_tensors,
    make_diffusers_checkpoint,
    make_original_checkpoint,
)

DIT = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original_checkpoint(tmp_path_factory.mktemp("original"), config=NARROW_TOY)


@pytest.fixture(scope="module")
def original_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original_checkpoint(tmp_path_factory.mktemp("original_pair"), experts=2, num_shards=3)


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_diffusers_checkpoint(tmp_path_factory.mktemp("diffusers"), config=NARROW_TOY, scheduler="dpmpp", flow_shift=7.0)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint that a test may spoil."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def _refusal(folder: Path, **options: str) -> str:
    with pytest.raises(ExportError) as caught:
        open_checkpoint(folder, **options)
    assert caught.value.hint or caught.value.message
    return caught.value.message


def test_asked_variant_with_another_number_of_experts_is_refused(original: Path, original_pair: Path) -> None:
    assert "which is not wan2.2-t2v-a14b" in _refusal(original, variant="wan2.2-t2v-a14b")
    assert "which is not wan2.1-t2v-1.3b" in _refusal(original_pair, variant="wan2.1-t2v-1.3b")
    assert "wan9: there is" in _refusal(original, variant="wan9").replace("'", "")


def test_asked_variant_is_refused_when_the_numbers_are_exactly_anothers(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(VARIANTS["wan2.1-t2v-14b"], transformer=NARROW_TOY.transformer)
    monkeypatch.setitem(VARIANTS, "wan2.1-t2v-14b", row)
    assert "which is not wan2.1-t2v-1.3b" in _refusal(original, variant="wan2.1-t2v-1.3b")
    assert open_checkpoint(original).variant.name == "wan2.1-t2v-14b"


def _drop(folder: Path) -> None:
    edit_tensors(folder / DIT, lambda tensors: (tensors.pop("blocks.1.norm3.bias"), None)[1])


def _add(folder: Path) -> None:
    edit_tensors(folder / DIT, lambda tensors: tensors.update({"blocks.1.extra": torch.ones(1)}))


def _add_image_branch(folder: Path) -> None:
    edit_tensors(folder / DIT, lambda tensors: tensors.update({"img_emb.proj.0.bias": torch.ones(1280)}))


def _misshape(folder: Path) -> None:
    edit_tensors(folder / DIT, lambda tensors: tensors.update({"head.modulation": torch.ones(1, 3, 16)}))


def _quantise(folder: Path) -> None:
    edit_tensors(folder / DIT, lambda tensors: tensors.update({"head.head.bias": tensors["head.head.bias"].to(torch.int8)}))


def _truncate(name: str, keep: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return spoil


def _write(name: str, content: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / name)


class _Code:
    """Unpickles by calling a function, as a hostile file would."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("exit 3",)


def _decoder_only(folder: Path) -> None:
    tensors = torch.load(folder / VAE, weights_only=True)
    torch.save({name: tensor for name, tensor in tensors.items() if not name.startswith("encoder.middle.1")}, folder / VAE)


SPOILED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing tensor": (_drop, ("transformer", "blocks.1.norm3.bias", "missing")),
    "unexpected tensor": (_add, ("transformer", "blocks.1.extra")),
    "image branch": (_add_image_branch, ("img_emb.proj.0.bias", "image-to-video")),
    "misshapen tensor": (_misshape, ("head.modulation is [1, 3, 16], expected [1, 2, 16]",)),
    "integers": (_quantise, ("head.head.bias is I8", "BF16")),
    "no transformer": (lambda folder: (folder / DIT).unlink(), ("diffusion_pytorch_model*.safetensors",)),
    "truncated transformer": (_truncate(DIT, 0.9), (DIT, "not a whole safetensors file")),
    "empty transformer": (_truncate(DIT, 0), (DIT, "not a whole safetensors file")),
    "two transformers": (
        lambda folder: shutil.copy(folder / DIT, folder / DIT.replace(".", "-fp8.")),
        ("more than one model",),
    ),
    "truncated vae": (_truncate(VAE, 0.5), (VAE, "not a whole .pth file")),
    "empty vae": (_truncate(VAE, 0), (VAE, "not a whole .pth file")),
    "code in the vae": (_write(VAE, {"conv1.bias": _Code()}), (VAE, "holds more than tensors")),
    "no tensors in the vae": (_write(VAE, {"epoch": 3}), (VAE, "expected a dictionary of tensors")),
    "incomplete vae": (_decoder_only, ("vae", "encoder.middle.1")),
    "no vae": (lambda folder: (folder / VAE).unlink(), ("_VAE.pth", "missing")),
    "two vaes": (lambda folder: shutil.copy(folder / VAE, folder / "Wan2.2_VAE.pth"), ("Wan2.1_VAE.pth, Wan2.2_VAE.pth",)),
    "no text encoder": (lambda folder: (folder / T5).unlink(), ("models_t5_*.pth", "missing")),
    "two text encoders": (lambda folder: shutil.copy(folder / T5, folder / "models_t5_b.pth"), ("models_t5_b.pth",)),
    "text encoder of something else": (_write(T5, {"a": torch.ones(2)}), ("text_encoder", "token_embedding.weight")),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "google"), ("google/umt5-xxl/tokenizer.json", "missing")),
    "no config": (lambda folder: (folder / "config.json").unlink(), ("neither model_index.json",)),
    "config that is not JSON": (lambda folder: (folder / "config.json").write_text("{"), ("config.json: not JSON",)),
    "config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), ("expected a JSON object",)),
}


@pytest.mark.parametrize("damage", SPOILED)
def test_damaged_original_is_refused_by_name(damage: str, original: Path, copy_of: Callable[[Path], Path]) -> None:
    spoil, words = SPOILED[damage]
    folder = copy_of(original)
    spoil(folder)
    message = _refusal(folder)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "s2v"}, "speech-to-video"),
        ({"model_type": "vace"}, "VACE"),
        ({"_class_name": "VaceWanModel"}, "VaceWanModel"),
        ({"vace_layers": [0, 5]}, "unknown setting vace_layers"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False"),
        ({"qk_norm": False}, "qk_norm=False"),
        ({"patch_size": [1, 4, 4]}, "patch_size=[1, 4, 4]"),
        ({"num_heads": 3}, "not a multiple of 3 heads"),
        ({"num_heads": 16}, "even size"),
        ({"num_layers": 2}, "num_layers=2, but the weights beside it hold 3"),
        ({"num_layers": 10**12}, "but the weights beside it hold 3"),
        ({"num_layers": "3"}, "num_layers='3'"),
        ({"num_layers": True}, "num_layers=True"),
        ({"dim": 0}, "dim=0"),
        ({"dim": 32}, "expected [32"),
        ({"eps": -1}, "eps=-1"),
        ({"in_dim": 36}, "takes 36"),
        ({"freq_dim": 31}, "freq_dim=31"),
    ],
    ids=str,
)
def test_original_config_that_cannot_be_followed_is_refused(
    changes: dict[str, Any], words: str, original: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(original)
    edit_json(folder / "config.json", **changes)
    assert words in _refusal(folder)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "WanVACEPipeline"),
        ("model_index.json", {"expand_timesteps": 1.5}, "expand_timesteps=1.5"),
        ("model_index.json", {"image_encoder": ["transformers", "CLIPVisionModel"]}, "image_encoder/config.json is missing"),
        ("model_index.json", {"boundary_ratio": 0.5}, "boundary_ratio=0.5 with 1 transformer"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "with 2 transformer"),
        ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "WanVACETransformer3DModel"),
        ("transformer/config.json", {"image_dim": 1280}, "image_dim=1280"),
        ("transformer/config.json", {"added_kv_proj_dim": 16}, "added_kv_proj_dim=16"),
        ("transformer/config.json", {"qk_norm": "rms_norm"}, "qk_norm='rms_norm'"),
        ("transformer/config.json", {"cross_attn_norm": False}, "cross_attn_norm=False"),
        ("transformer/config.json", {"patch_size": [1, 1, 1]}, "patch_size=[1, 1, 1]"),
        ("transformer/config.json", {"attention_head_dim": 15}, "heads of 15"),
        ("transformer/config.json", {"new_gate": "tanh"}, "unknown setting new_gate='tanh'"),
        ("transformer/config.json", {"text_dim": 24}, "prompts of 24"),
        ("transformer/config.json", {"num_layers": 10**12}, "but the weights beside it hold 3"),
        ("text_encoder/config.json", {"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type='t5'"),
        ("text_encoder/config.json", {"num_layers": 2}, "num_layers=2"),
        ("vae/config.json", {"is_residual": True}, "tensors are missing: encoder.downsamples.0.downsamples.0."),
        ("vae/config.json", {"decoder_base_dim": 256}, "decoder.conv1.weight (stored as decoder.conv_in.weight) is"),
        ("vae/config.json", {"attn_scales": [0.5]}, "attn_scales=[0.5]"),
        ("vae/config.json", {"latents_mean": [0.0]}, "disagree"),
        ("vae/config.json", {"latents_std": [0.0] * 16}, "disagree"),
        ("vae/config.json", {"num_res_blocks": 10**12}, "num_res_blocks"),
        ("vae/config.json", {"scale_factor_spatial": 16}, "scale_factor_spatial=16"),
    ],
    ids=str,
)
def test_diffusers_config_that_cannot_be_followed_is_refused(
    file: str, changes: dict[str, Any], words: str, diffusers: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(diffusers)
    edit_json(folder / file, **changes)
    assert words in _refusal(folder)


def test_error_about_a_diffusers_tensor_gives_both_its_names(diffusers: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(diffusers)
    edit_tensors(folder / "transformer" / DIT, lambda tensors: tensors.update({"blocks.0.norm2.bias": torch.ones(3)}))
    assert "blocks.0.norm3.bias (stored as blocks.0.norm2.bias) is [3], expected [16]" in _refusal(folder)


def test_index_that_names_a_missing_shard_is_refused(original_pair: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original_pair)
    shard = folder / "high_noise_model/diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.unlink()
    assert f"names the shard {shard.name}, which is missing" in _refusal(folder)
    (folder / "high_noise_model" / INDEX).unlink()
    assert "shard 2 of 3 is missing" in _refusal(folder)


def test_tensor_in_two_shards_is_refused(original_pair: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original_pair)
    first, second = sorted((folder / "low_noise_model").glob("*-of-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    edit_tensors(second, lambda tensors: tensors.update({name: load_file(first)[name]}))
    message = _refusal(folder)
    assert message.startswith(f"transformer_low_noise: tensor {name} is in both {first.name} and {second.name}")


@pytest.mark.parametrize("shard", ["../config.safetensors", "/etc/passwd", "weights.bin"])
def test_index_that_names_a_file_elsewhere_is_refused(shard: str, original_pair: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original_pair)
    edit_json(folder / "high_noise_model" / INDEX, weight_map={"head.modulation": shard})
    assert f"names {shard!r}" in _refusal(folder)


def test_index_that_puts_a_tensor_in_the_wrong_shard_is_refused(original_pair: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original_pair)
    index = folder / "high_noise_model" / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    name = next(name for name, shard in weight_map.items() if shard == first)
    edit_json(index, weight_map=weight_map | {name: second})
    assert f"puts {name} in {second}, which does not hold it" in _refusal(folder)


def test_experts_of_different_architecture_are_refused(tmp_path: Path) -> None:
    folder = make_original_checkpoint(tmp_path / "pair", config=NARROW_TOY, experts=2)
    other = make_original_checkpoint(tmp_path / "other", config=DEEP_TOY)
    shutil.rmtree(folder / "low_noise_model")
    (folder / "low_noise_model").mkdir()
    for name in ("config.json", DIT):
        shutil.copy(other / name, folder / "low_noise_model" / name)
    assert "differ in architecture" in _refusal(folder)


def test_one_expert_of_two_is_refused(original_pair: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original_pair)
    shutil.rmtree(folder / "low_noise_model")
    assert "low_noise_model/config.json is missing" in _refusal(folder)


def test_place_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in _refusal(tmp_path / "nothing")
    assert "has neither model_index.json" in _refusal(tmp_path)


@pytest.fixture(scope="module")
def image_original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original_checkpoint(tmp_path_factory.mktemp("image_original"), config=IMAGE_TOY)


@pytest.fixture(scope="module")
def image_diffusers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_diffusers_checkpoint(tmp_path_factory.mktemp("image_diffusers"), config=IMAGE_TOY)


CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def _edit_clip(folder: Path, **changes: torch.Tensor) -> None:
    tensors = torch.load(folder / CLIP, weights_only=True)
    torch.save(tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}, folder / CLIP)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / CLIP).unlink(), "models_clip_*.pth"),
        (lambda folder: torch.save({"a": torch.ones(2)}, folder / CLIP), "visual.patch_embedding.weight is missing"),
        (lambda folder: _edit_clip(folder, visual__pos_embedding=torch.ones(1, 19, 32)), "19 positions"),
        (lambda folder: _edit_clip(folder, visual__extra=torch.ones(1)), "visual.extra"),
        (lambda folder: edit_json(folder / "config.json", model_type="ti2v"), "there is no such variant"),
        (lambda folder: edit_json(folder / "config.json", in_dim=32), "takes 32 and gives 16 channels"),
        (
            lambda folder: edit_tensors(folder / DIT, lambda tensors: tensors.pop("img_emb.proj.1.weight")),
            "img_emb.proj.1.weight",
        ),
    ],
)
def test_image_checkpoint_in_the_original_layout_that_is_not_whole_is_refused(
    spoil: Callable[[Path], object], words: str, image_original: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(image_original)
    spoil(folder)
    assert words in _refusal(folder)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"image_encoder": [None, None]}, "image_dim=32, but the folder has no image_encoder"),
        ("model_index.json", {"expand_timesteps": True}, "there is no such variant"),
        ("transformer/config.json", {"image_dim": None}, "image_dim=None, but the folder has an image_encoder"),
        ("transformer/config.json", {"image_dim": 48}, "takes 17 image features of 48, the image encoder gives 17 of 32"),
        ("transformer/config.json", {"pos_embed_seq_len": 20}, "takes 20 image features"),
        ("transformer/config.json", {"added_kv_proj_dim": None}, "added_kv_proj_dim=None"),
        ("image_encoder/config.json", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("image_encoder/config.json", {"model_type": "siglip"}, "model_type='siglip'"),
        ("image_encoder/config.json", {"num_attention_heads": 5}, "are not an image encoder"),
        ("image_processor/preprocessor_config.json", {"size": {"shortest_edge": 30}}, "shortest_edge"),
        ("image_processor/preprocessor_config.json", {"resample": 2}, "resample=2"),
        ("image_processor/preprocessor_config.json", {"do_center_crop": False}, "do_center_crop=False"),
    ],
    ids=str,
)
def test_image_checkpoint_of_diffusers_that_cannot_be_followed_is_refused(
    file: str, changes: dict[str, Any], words: str, image_diffusers: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(image_diffusers)
    edit_json(folder / file, **changes)
    assert words in _refusal(folder)
