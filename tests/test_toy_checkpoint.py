"""The demo's toy checkpoint is one that the loader takes for real, the same for everybody."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.toy_checkpoint import KINDS, Layout, ToyModel, write_toy_checkpoint
from benchmarks.toy_tokenizer import write_tokenizer
from export.checkpoint import open_checkpoint
from runtime.variants import TransformerArch, VaeArch

TINY = ToyModel(
    transformer=TransformerArch(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=64), vae=VaeArch(base_dim=8), experts=2
)


def test_both_layouts_hold_the_same_tensors(tmp_path: Path) -> None:
    for layout in Layout:
        write_toy_checkpoint(tmp_path / layout, TINY, layout=layout)
    with open_checkpoint(tmp_path / Layout.ORIGINAL) as original, open_checkpoint(tmp_path / Layout.DIFFUSERS) as diffusers:
        assert original.variant.name == diffusers.variant.name == "wan2.2-t2v-a14b"
        assert original.components.keys() == diffusers.components.keys()
        for component, source in original.components.items():
            for name in source.names():
                other = diffusers.components[component].read(name)
                assert torch.equal(source.read(name).float(), other.float()), f"{component} {name}"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("t2v", "wan2.1-t2v-1.3b"),
        ("i2v", "wan2.1-i2v-14b-480p"),
        ("flf2v", "wan2.1-flf2v-14b"),
        ("i2v-a14b", "wan2.2-i2v-a14b"),
        ("ti2v", "wan2.2-ti2v-5b"),
    ],
)
def test_every_kind_is_recognised_in_both_layouts(tmp_path: Path, kind: str, name: str) -> None:
    for layout in Layout:
        write_toy_checkpoint(tmp_path / layout, KINDS[kind], layout=layout)
    with open_checkpoint(tmp_path / Layout.ORIGINAL) as original, open_checkpoint(tmp_path / Layout.DIFFUSERS) as diffusers:
        assert original.variant.name == diffusers.variant.name == name
        assert replace(diffusers.variant, experts=original.variant.experts) == original.variant
        assert original.variant.transformer == KINDS[kind].transformer
        assert original.variant.image_encoder == KINDS[kind].image_encoder
        for component, source in original.components.items():
            for tensor in source.names():
                other = diffusers.components[component].read(tensor)
                assert torch.equal(source.read(tensor).float().flatten(), other.float().flatten()), f"{component} {tensor}"


def test_experts_differ(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path / "toy", TINY)
    with open_checkpoint(tmp_path / "toy") as checkpoint:
        high, low = (checkpoint.components[f"transformer_{noise}_noise"].read("head.head.weight") for noise in ("high", "low"))
    assert not torch.equal(high, low)


def test_the_same_toy_is_not_written_twice_and_another_replaces_it(tmp_path: Path) -> None:
    toy = tmp_path / "toy"
    assert write_toy_checkpoint(toy, TINY)
    assert not write_toy_checkpoint(toy, TINY)
    assert write_toy_checkpoint(toy, ToyModel(transformer=TINY.transformer, vae=TINY.vae, seed=1))
    assert not (toy / "high_noise_model").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a toy checkpoint"):
        write_toy_checkpoint(tmp_path, TINY)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_toy_tokenizer_follows_umt5_conventions(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("red fox").tokens == ["▁red", "▁fox", "</s>"]
    assert tokenizer.encode("").ids == [1]
    assert tokenizer.encode("é").tokens == ["▁", "é", "</s>"]
    assert tokenizer.encode("é").ids[1] == 2  # unknown
    assert tokenizer.token_to_id("<pad>") == 0


def test_weights_keep_the_variance_of_what_passes_through(tmp_path: Path) -> None:
    write_toy_checkpoint(tmp_path / "toy", TINY)
    with open_checkpoint(tmp_path / "toy") as checkpoint:
        weight = checkpoint.components["vae"].read("decoder.conv1.weight")  # [out, 16, 3, 3, 3]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 16, 8, 16, 16)).astype(np.float32))
    assert torch.nn.functional.conv3d(noise, weight).std() == pytest.approx(1.0, abs=0.15)
