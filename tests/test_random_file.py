"""Random weights at full size: their values are sane, their files whole, and diffusers loads a checkpoint of them."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import random_file
from benchmarks.diffusers_configs import TRANSFORMERS, WEIGHTS_FILE
from benchmarks.random_bundle import random_weights
from benchmarks.random_checkpoint import checkpoint_bytes, write_random_checkpoint
from benchmarks.random_file import check_room, draw, random_weight, write_random_file
from benchmarks.toy_tokenizer import VOCABULARY
from export.pack import PackedTensor, safetensors_header
from export.trace import TORCH_DTYPES
from runtime.errors import RequestError
from runtime.precision import scale_name
from runtime.specs import DType
from runtime.variants import VARIANTS, TextEncoderArch, TransformerArch, Variant

WIDE = (64, 4096)


def values(name: str, shape: tuple[int, ...], dtype: DType) -> torch.Tensor:
    bits = draw(random_weight(name, shape, dtype), 0, shape[0] * shape[1] if len(shape) > 1 else shape[0], seed=0)
    return torch.from_numpy(bits).view(TORCH_DTYPES[dtype]).float()


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16])
def test_weights_have_the_deviation_that_keeps_a_products_scale(dtype: DType) -> None:
    drawn = values("blocks.0.ffn.0.weight", WIDE, dtype)
    assert drawn.isfinite().all()
    assert drawn.std() == pytest.approx(4096**-0.5, rel=0.01)
    assert abs(float(drawn.mean())) < 0.01 * 4096**-0.5
    assert len(set(drawn.tolist())) > 1000


def test_fp8_weights_times_their_scales_have_that_deviation_too() -> None:
    name = "blocks.0.ffn.0.weight"
    plan = [
        PackedTensor(name, (), WIDE, DType.F8_E4M3),
        PackedTensor(scale_name(name), (), WIDE[:1], DType.F32, row_scales=True),
    ]
    weight, scales = random_weights(plan)
    drawn = torch.from_numpy(draw(weight, 0, 1 << 18, seed=0)).view(torch.float8_e4m3fn).float()
    (scale,) = set(draw(scales, 0, 64, seed=0).view(np.float32).tolist())
    assert drawn.isfinite().all()
    assert 200 < drawn.abs().max() <= 448
    assert drawn.std() * scale == pytest.approx(4096**-0.5, rel=0.02)


@pytest.mark.parametrize(("name", "center"), [("blocks.0.norm3.weight", 1.0), ("encoder.gamma", 1.0), ("ffn.0.bias", 0.0)])
def test_gains_are_around_one_and_biases_small(name: str, center: float) -> None:
    drawn = values(name, (4096,), DType.F32)
    assert drawn.mean() == pytest.approx(center, abs=0.01)
    assert drawn.std() == pytest.approx(0.1, rel=0.05)


def test_a_file_in_pieces_reads_back_and_its_hash_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_file, "_PIECE", 100)
    plan = [PackedTensor("a.weight", (), (7, 33), DType.BF16), PackedTensor("b", (), (50,), DType.F32)]
    tensors = [random_weight(packed.name, packed.shape, packed.dtype) for packed in plan]
    with ThreadPoolExecutor(3) as threads:
        digests = [
            write_random_file(tmp_path / str(seed), safetensors_header(plan), tensors, threads, seed=seed, hashed=True)
            for seed in (0, 0, 1)
        ]
    assert digests[0] == digests[1] == hashlib.sha256((tmp_path / "0").read_bytes()).hexdigest()
    assert digests[2] != digests[0]
    read = load_file(tmp_path / "0")
    assert read["a.weight"].shape == (7, 33)
    last = torch.from_numpy(draw(tensors[0], 200, 31, seed=0)).view(torch.bfloat16)
    assert torch.equal(read["a.weight"].flatten()[200:], last)
    assert not torch.equal(read["a.weight"].flatten()[:100], read["a.weight"].flatten()[100:200])


def test_a_disk_without_room_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=12_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_room(tmp_path, 11_000_000_000, "it")
    with pytest.raises(RequestError, match=r"of wan2\.2-t2v-a14b in BF16 takes 40\.2 GB, and 12\.0 GB are free") as raised:
        write_random_checkpoint(tmp_path, VARIANTS["wan2.2-t2v-a14b"])
    assert "TMPDIR" in str(raised.value.hint)
    assert list(tmp_path.iterdir()) == []


def tiny_variant() -> Variant:
    real = VARIANTS["wan2.2-t2v-a14b"]
    return replace(
        real,
        transformer=TransformerArch(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=64),
        text_encoder=TextEncoderArch(
            dim=64, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=2, vocab_size=len(VOCABULARY)
        ),
        vae=replace(real.vae, base_dim=8),
    )


def test_a_random_checkpoint_is_whole_where_it_is_moved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("written").mkdir()
    write_random_checkpoint(Path("written"), tiny_variant())
    moved = tmp_path / "elsewhere" / "checkpoint"
    moved.parent.mkdir()
    Path("written").rename(moved)
    assert load_file(moved / TRANSFORMERS[1] / WEIGHTS_FILE).keys() == load_file(moved / TRANSFORMERS[0] / WEIGHTS_FILE).keys()


def test_diffusers_takes_every_tensor_of_a_random_checkpoint(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

    variant = tiny_variant()
    write_random_checkpoint(tmp_path, variant)
    for network, place in ((WanTransformer3DModel, TRANSFORMERS[1]), (AutoencoderKLWan, "vae")):
        _, info = network.from_pretrained(tmp_path / place, output_loading_info=True)
        assert not any(info.values()), info
    pipeline = WanPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert pipeline.config.boundary_ratio == 0.875
    assert pipeline.scheduler.config.flow_shift == variant.defaults.shift
    stored = load_file(tmp_path / TRANSFORMERS[0] / WEIGHTS_FILE)
    for expert in (pipeline.transformer, pipeline.transformer_2):
        assert torch.equal(expert.blocks[1].ffn.net[2].weight, stored["blocks.1.ffn.net.2.weight"])
    text = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert torch.equal(pipeline.text_encoder.encoder.embed_tokens.weight, text["shared.weight"])
    weights = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors") if not file.is_symlink())
    assert checkpoint_bytes(variant) < weights < checkpoint_bytes(variant) + 50_000
