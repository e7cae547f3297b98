"""Checkpoints in both layouts are read as the same tensors, and damaged or foreign ones are refused by name."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint, Layout, open_checkpoint
from export.layouts import text_encoder_tensors, transformer_diffusers_names, transformer_tensors, vae_tensors
from runtime.errors import ExportError
from runtime.specs import DType
from runtime.variants import VARIANTS
from tests.toys import (
    NARROW_TOY,
    TOY,
    TOYS,
    edit_json,
    edit_tensors,
    make_diffusers_checkpoint,
    make_original_checkpoint,
    make_transformer,
    original_tensors,
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


@pytest.fixture(scope="module")
def diffusers_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers_pair")
    return make_diffusers_checkpoint(folder, experts=2, boundary_ratio=0.75, max_shard_size="50KB")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint that a test may spoil."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        f"{component}: {name}": source.read(name)
        for component, source in checkpoint.components.items()
        for name in source.names()
    }


def _assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert different == []


@pytest.mark.parametrize("toy", TOYS)
def test_both_layouts_give_the_same_variant_and_tensors(toy: str, tmp_path: Path) -> None:
    config = TOYS[toy]
    make_diffusers_checkpoint(tmp_path / "diffusers", config=config, seed=3)
    make_original_checkpoint(tmp_path / "original", config=config, seed=3)
    with open_checkpoint(tmp_path / "diffusers") as diffusers, open_checkpoint(tmp_path / "original") as original:
        assert (diffusers.layout, original.layout) == (Layout.DIFFUSERS, Layout.ORIGINAL)
        assert diffusers.variant == original.variant
        assert original.variant.transformer == config.transformer
        assert original.variant.text_encoder == config.text_encoder
        assert original.variant.vae == config.vae
        _assert_equal(_tensors(diffusers), _tensors(original))


def test_sources_hold_their_layouts_under_the_experts_names(original: Path) -> None:
    with open_checkpoint(original) as checkpoint:
        variant = checkpoint.variant
        assert variant.name == "wan2.1-t2v-1.3b"
        shapes = {key: {name: source.shape(name) for name in source.names()} for key, source in checkpoint.components.items()}
    assert shapes == {
        "transformer": transformer_tensors(variant.transformer),
        "text_encoder": text_encoder_tensors(variant.text_encoder),
        "vae": vae_tensors(variant.vae),
        "vae_encoder": vae_tensors(variant.vae),
    }


@pytest.mark.parametrize("folder", ["original_pair", "diffusers_pair"])
def test_high_noise_expert_comes_first_in_either_layout(folder: str, request: pytest.FixtureRequest) -> None:
    names = transformer_diffusers_names(TOY.transformer)
    high, low = (original_tensors(make_transformer(TOY, seed=seed), names) for seed in (0, 1))
    with open_checkpoint(request.getfixturevalue(folder)) as checkpoint:
        assert checkpoint.variant.name == "wan2.2-t2v-a14b"
        experts = [expert.component for expert in checkpoint.variant.experts]
        assert experts == ["transformer_high_noise", "transformer_low_noise"]
        for component, expected in zip(experts, (high, low), strict=True):
            source = checkpoint.components[component]
            _assert_equal({name: source.read(name) for name in source.names()}, expected)


def test_boundary_is_the_folders_own_in_diffusers_and_the_tables_in_the_original(
    original_pair: Path, diffusers_pair: Path
) -> None:
    assert [expert.boundary for expert in open_checkpoint(diffusers_pair).variant.experts] == [0.75, 0.0]
    assert [expert.boundary for expert in open_checkpoint(original_pair).variant.experts] == [0.875, 0.0]


def test_scheduler_config_is_diffusers_alone(original: Path, diffusers: Path) -> None:
    config = open_checkpoint(diffusers).scheduler_config
    assert config is not None
    assert (config["_class_name"], config["flow_shift"]) == ("DPMSolverMultistepScheduler", 7.0)
    assert open_checkpoint(original).scheduler_config is None


def test_tokenizer_is_found_in_either_layout(original: Path, diffusers: Path) -> None:
    assert open_checkpoint(original).tokenizer == original / "google/umt5-xxl/tokenizer.json"
    assert open_checkpoint(diffusers).tokenizer == diffusers / "tokenizer/tokenizer.json"


@pytest.mark.parametrize(
    "written",
    [
        {"num_shards": 4},
        {"num_shards": 2, "shard_suffix": "-bf16"},
        {"shard_suffix": "-bf16"},
        {"safetensors_only": True},
        {"wrap_vae": True},
    ],
    ids=str,
)
def test_original_files_are_read_however_they_are_cut_and_wrapped(
    written: dict[str, Any], original: Path, tmp_path: Path
) -> None:
    make_original_checkpoint(tmp_path / "other", config=NARROW_TOY, **written)
    with open_checkpoint(original) as plain, open_checkpoint(tmp_path / "other") as other:
        assert other.variant == plain.variant
        _assert_equal(_tensors(plain), _tensors(other))


def test_numbered_shards_are_read_without_their_index(original_pair: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original_pair)
    (folder / "low_noise_model" / INDEX).unlink()
    with open_checkpoint(original_pair) as indexed, open_checkpoint(folder) as plain:
        _assert_equal(_tensors(indexed), _tensors(plain))


def test_pth_of_the_older_format_is_read(original: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original)
    tensors = torch.load(folder / VAE, weights_only=True)
    torch.save(tensors, folder / VAE, _use_new_zipfile_serialization=False)
    with open_checkpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.components["vae"].read("conv1.bias"), tensors["conv1.bias"])
        checkpoint.close()
        assert torch.equal(checkpoint.components["vae"].read("conv2.bias"), tensors["conv2.bias"])


def test_each_tensor_keeps_the_dtype_its_file_has(original: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original)
    edit_tensors(folder / DIT, lambda tensors: tensors.update({"head.head.bias": tensors["head.head.bias"].bfloat16()}))
    text_encoder = torch.load(folder / T5, weights_only=True)
    torch.save(text_encoder | {"norm.weight": text_encoder["norm.weight"].half()}, folder / T5)
    with open_checkpoint(folder) as checkpoint:
        transformer, encoder = checkpoint.components["transformer"], checkpoint.components["text_encoder"]
        assert (transformer.dtype("head.head.bias"), transformer.dtype("head.head.weight")) == (DType.BF16, DType.F32)
        assert transformer.read("head.head.bias").dtype is torch.bfloat16
        assert (encoder.dtype("norm.weight"), encoder.dtype("blocks.0.norm1.weight")) == (DType.F16, DType.F32)


def test_embedding_may_be_stored_under_its_alias_or_both_names(diffusers: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(diffusers)
    path = folder / "text_encoder/model.safetensors"
    expected = open_checkpoint(diffusers).components["text_encoder"].read("token_embedding.weight")
    for names in (("encoder.embed_tokens.weight",), ("encoder.embed_tokens.weight", "shared.weight")):
        rest = {name: tensor for name, tensor in load_file(path).items() if name not in {"shared.weight", *names}}
        save_file(rest | {name: expected.clone() for name in names}, path)
        assert torch.equal(open_checkpoint(folder).components["text_encoder"].read("token_embedding.weight"), expected)


def test_unused_norm_of_old_diffusers_checkpoints_is_ignored(diffusers: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(diffusers)
    name = "blocks.0.attn2.norm_added_q.weight"
    edit_tensors(folder / "transformer" / DIT, lambda tensors: tensors.update({name: torch.ones(16)}))
    assert name not in open_checkpoint(folder).components["transformer"].names()


def test_latent_statistics_of_a_diffusers_vae_are_its_own(diffusers: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(diffusers)
    edit_json(folder / "vae/config.json", latents_mean=[0.5] * 16)
    assert open_checkpoint(folder).variant.vae.latents_mean == (0.5,) * 16


@pytest.mark.parametrize("folder", ["original", "diffusers"])
def test_fingerprint_is_stable_until_a_used_file_changes(
    folder: str, request: pytest.FixtureRequest, copy_of: Callable[[Path], Path]
) -> None:
    copy = copy_of(request.getfixturevalue(folder))
    first = open_checkpoint(copy).fingerprint
    (copy / "README.md").write_text("not used")
    assert open_checkpoint(copy).fingerprint == first
    os.utime(next(copy.rglob("tokenizer.json")), ns=(1, 1))
    assert open_checkpoint(copy).fingerprint != first


def test_asked_variant_names_the_row_and_keeps_the_files_numbers(original: Path) -> None:
    variant = open_checkpoint(original, variant="wan2.1-t2v-14b").variant
    assert variant.name == "wan2.1-t2v-14b"
    assert variant.defaults == VARIANTS["wan2.1-t2v-14b"].defaults
    assert variant.transformer == NARROW_TOY.transformer


def test_file_that_changes_after_opening_is_noticed(original: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(original)
    source = open_checkpoint(folder).components["transformer"]
    edit_tensors(folder / DIT, lambda tensors: tensors.update({"head.modulation": torch.ones(1, 3, 16)}))
    with pytest.raises(ExportError, match=r"head\.modulation is now"):
        source.read("head.modulation")
    edit_tensors(folder / DIT, lambda tensors: tensors.pop("blocks.1.norm3.bias"))
    with pytest.raises(ExportError, match=r"blocks\.1\.norm3\.bias, which it held"):
        source.read("blocks.1.norm3.bias")
    with pytest.raises(ExportError, match=r"nothing\.weight is missing"):
        source.read("nothing.weight")


@pytest.mark.parametrize("name", ["big.pth", "big.safetensors"])
def test_reading_a_file_through_takes_a_few_tensors_of_memory(name: str, tmp_path: Path) -> None:
    """80 tensors of 4 MB each, read in a process of its own: the peak may grow by 30 % of the file at most."""
    tensors = {f"t{index}": torch.zeros(1_000_000) for index in range(80)}
    save_file(tensors, tmp_path / name) if name.endswith("s") else torch.save(tensors, tmp_path / name)
    code = """
        import sys, resource, torch
        from pathlib import Path
        from export.checkpoint.readers import PickleFile, SafetensorsFile
        path = Path(sys.argv[1])
        file = PickleFile(path) if path.suffix == ".pth" else SafetensorsFile(path)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        total = sum(file.read(stored.name).sum() for stored in file.tensors)
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / name)]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < 320_000 * 0.3
