"""The small Wan of the moving shapes: its networks are Wan's, its folder opens everywhere, its training resumes, its videos are judged."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.moving_shapes import cases, codes, dit_stage, loop, train, vae_stage
from benchmarks.moving_shapes.card import card
from benchmarks.moving_shapes.cases import QualityRequest, chosen_cases
from benchmarks.moving_shapes.data import Bucket, ChunkStream, buckets, make_chunk
from benchmarks.moving_shapes.diffusers_loader import open_pipeline
from benchmarks.moving_shapes.grammar import caption_of
from benchmarks.moving_shapes.loop import Stage, StageLength, StageLog
from benchmarks.moving_shapes.model import SIZES, Networks, new_networks, read_checkpoint, write_checkpoint
from benchmarks.moving_shapes.muon import Muon, weight_matrices
from benchmarks.moving_shapes.quality import run_quality
from benchmarks.moving_shapes.recipe import RECIPES, DitRecipe, Recipe, VaeRecipe
from benchmarks.moving_shapes.reference import Reference, write_reference
from benchmarks.moving_shapes.render import draw, scene_arrays
from benchmarks.moving_shapes.tokenizer import build_tokenizer, token_ids
from benchmarks.moving_shapes.world import ClipSize, Kind, sample_scene
from export.build import BuildRequest, build_bundle
from export.checkpoint import open_checkpoint
from runtime.errors import EngineError, RequestError
from runtime.pipeline import VideoPipeline
from runtime.precision import WideParts
from runtime.request import GenerateRequest
from runtime.schedulers import Conventions
from runtime.specs import Precision
from tests.conftest import Refuses
from tests.tolerances import TOLERANCES

TINY = SIZES["tiny"]
SMALL_CLIP = ClipSize(width=64, height=64, num_frames=5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def networks_with_structure() -> Networks:
    """Networks whose every path matters, with a VAE whose latents have statistics."""
    networks = new_networks(TINY, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in networks.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        networks.vae.mean.copy_(torch.randn(16))
        networks.vae.std.copy_(torch.rand(16) + 0.5)
    return networks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "checkpoint"
    write_checkpoint(folder, networks_with_structure())
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    folder = checkpoint.parent / "bundle"
    build_bundle(BuildRequest(out=folder, checkpoint=checkpoint, targets=("cpu",)))
    return folder


# Networks


@torch.no_grad()
def test_the_training_networks_are_those_that_diffusers_and_transformers_have(checkpoint: Path) -> None:
    pipeline = open_pipeline(checkpoint)
    networks = new_networks(TINY, seed=5)
    read_checkpoint(checkpoint, networks)
    captions = ["a red circle moves right on a blue background", "", "a small cross moves up"]
    ids, lengths = (torch.from_numpy(array) for array in token_ids(build_tokenizer(), captions))
    text = networks.text_encoder(ids, lengths)
    latents, timesteps = torch.randn(3, 16, 3, 8, 6), torch.tensor([999.0, 500.0, 20.5])
    flow = networks.transformer(latents, timesteps, text, lengths)
    for row, length in enumerate(lengths.tolist()):
        embeds = pipeline.text_encoder(ids[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(text[row, :length], embeds[0], rtol=0, atol=1e-5)
        assert not text[row, length:].any()
        padded = torch.zeros(1, 512, embeds.shape[2])
        padded[:, :length] = embeds
        oracle = pipeline.transformer(latents[row : row + 1], timesteps[row : row + 1], padded).sample
        torch.testing.assert_close(flow[row : row + 1], oracle, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_the_vae_over_a_whole_clip_is_the_one_over_chunks(checkpoint: Path, num_frames: int) -> None:
    oracle = open_pipeline(checkpoint).vae
    networks = new_networks(TINY, seed=5)
    read_checkpoint(checkpoint, networks)
    mean, std = (torch.tensor(row).view(1, -1, 1, 1, 1) for row in (TINY.vae.latents_mean, TINY.vae.latents_std))
    frames = torch.rand(2, 3, num_frames, 16, 24) * 2 - 1
    latents = networks.vae.encode(frames)
    torch.testing.assert_close(latents * std + mean, oracle.encode(frames).latent_dist.mode(), rtol=0, atol=1e-4)
    decoded = networks.vae.decode(latents).clamp(-1, 1)
    torch.testing.assert_close(decoded, oracle.decode(latents * std + mean).sample, rtol=0, atol=1e-4)


@torch.no_grad()
def test_folding_gives_latents_the_published_statistics_and_changes_no_frame() -> None:
    networks, folded = networks_with_structure(), new_networks(TINY, seed=5)
    for chain in (folded.vae.encode_chain, folded.vae.decode_chain):
        state = networks.vae.folded_state()
        chain.load_state_dict({name: state[name] for name in chain.state_dict()})
    folded.vae.take_statistics_of_wan()
    frames = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = networks.vae.encode(frames)
    torch.testing.assert_close(folded.vae.encode(frames), latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(folded.vae.decode(latents), networks.vae.decode(latents), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_the_folder_is_a_whole_checkpoint_and_small_enough_to_ship(tmp_path: Path, size: str) -> None:
    assert write_checkpoint(tmp_path / "checkpoint", new_networks(SIZES[size], seed=0)) < 24 * 2**20
    assert max(path.stat().st_size for path in tmp_path.rglob("*")) < 16 * 2**20
    with open_checkpoint(tmp_path / "checkpoint") as opened:
        assert opened.variant.name == "wan2.1-t2v-1.3b"
        assert (opened.variant.transformer, opened.variant.vae) == (SIZES[size].transformer, SIZES[size].vae)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    with pytest.raises(FileExistsError):
        write_checkpoint(tmp_path / "mine", new_networks(TINY, seed=0))


def test_a_whole_generation_is_the_one_of_diffusers(checkpoint: Path, bundle: Path) -> None:
    prompt, noise = "a red circle moves right on a blue background", torch.randn(1, 16, 2, 8, 8)
    oracle = open_pipeline(checkpoint)(
        prompt=prompt, negative_prompt="", height=64, width=64, num_frames=5, num_inference_steps=4, latents=noise,
        guidance_scale=5.0, output_type="np",
    ).frames[0]  # fmt: skip
    with VideoPipeline.open(bundle, target="cpu", num_threads=1) as pipeline:
        ours = pipeline.generate(
            GenerateRequest(
                prompt=prompt,
                negative_prompt="",
                width=64,
                height=64,
                num_frames=5,
                num_steps=4,
                latents=noise[0].numpy(),
                conventions=Conventions.DIFFUSERS,
                shift=5.0,
            )
        ).frames
    difference = np.abs(ours.astype(int) - np.round(oracle * 255).astype(int)).max()
    assert difference <= TOLERANCES["frame, of 255"]


# Training


def test_chunks_are_the_same_however_they_are_made() -> None:
    choice = (
        Bucket(size=SMALL_CLIP, batch=3, weight=1),
        Bucket(size=ClipSize(width=96, height=64, num_frames=5), batch=2, weight=1),
    )
    alone = [make_chunk(7, index, choice) for index in range(2, 6)]
    with ChunkStream(7, choice, first=2, workers=0) as stream:
        for mine, chunk in zip(alone, stream, strict=False):
            assert mine.bucket == chunk.bucket
            np.testing.assert_array_equal(mine.ids, chunk.ids)
            np.testing.assert_array_equal(mine.scenes.track, chunk.scenes.track)
    assert not np.array_equal(make_chunk(8, 2, choice).scenes.rgb, alone[0].scenes.rgb)


def test_a_window_shows_what_the_whole_clip_has_there() -> None:
    size, window = ClipSize(width=32, height=32, num_frames=9), ClipSize(width=16, height=16, num_frames=5)
    scenes = scene_arrays([sample_scene(seed, size) for seed in range(6)]).to_torch(torch.device("cpu"))
    torch.manual_seed(0)
    cut = draw(vae_stage.cut_windows(scenes, size, window), window, xp=torch)
    for clip, part in zip(draw(scenes, size, xp=torch), cut, strict=True):
        assert part.std(dim=(1, 2, 3)).max() > 0.05  # a shape is in it
        places = clip.unfold(1, 5, 1).unfold(2, 16, 1).unfold(3, 16, 1)  # [3, T', H', W', 5, 16, 16]
        assert (places - part[:, None, None, None]).abs().amax(dim=(0, 4, 5, 6)).min() < 1e-4


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_each_half_of_the_vae_learns_by_itself(half: vae_stage.VaeHalf, tmp_path: Path) -> None:
    vae = new_networks(TINY, seed=0).vae
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    log = vae_stage.train_half(
        vae, half, VaeRecipe(sizes=((32, 32, 5, 1.0),), windows_of=ClipSize(width=64, height=64, num_frames=17)),
        length=StageLength(steps=50), state_file=tmp_path / "half.pt", seed=0, workers=0, resume=False, scale=0.02,
    )  # fmt: skip
    changed = {name.split(".")[0] for name, tensor in vae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {half.removesuffix("r") + "_chain"}
    (_, _, first), (_, _, last) = log.losses
    assert last < first


class NoHostNumbers(TorchDispatchMode):
    """Refuses tensors made of Python's numbers: on a GPU that is a copy from the host, which a captured CUDA graph may not hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_a_loss_copies_nothing_from_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = loop.Stage._update

    def watched(stage: Stage, kind: Hashable, batch: Sequence[Tensor]) -> None:
        update(stage, kind, batch)
        with NoHostNumbers():  # the first of a kind is not captured
            stage._loss(kind, batch)

    monkeypatch.setattr(loop.Stage, "_update", watched)
    networks = new_networks(TINY, seed=0)
    common: dict[str, Any] = {"length": StageLength(steps=1), "seed": 0, "workers": 0, "resume": False}
    recipe = VaeRecipe(sizes=((32, 32, 5, 1.0),), windows_of=ClipSize(width=64, height=64, num_frames=17))
    halves: tuple[vae_stage.VaeHalf, ...] = ("encoder", "decoder")
    for half in halves:
        vae_stage.train_half(networks.vae, half, recipe, state_file=tmp_path / half, scale=0.02, **common)
    dit = DitRecipe(sizes=((64, 64, 5, 1.0),), first_chunks=1)
    dit_stage.train_dit(networks, dit, state_file=tmp_path / "dit", scale=0.002, **common)
    with NoHostNumbers(), pytest.raises(AssertionError):
        torch.tensor([1.0, 2.0])


def test_a_training_of_some_kinds_of_scenes_sees_no_other() -> None:
    (bucket,) = buckets(((64, 64, 5, 1.0),), latent_places=64 * 128, kinds=(Kind.SINGLE, Kind.BOUNCE))
    assert np.all(make_chunk(0, 0, (bucket,)).scenes.radius[:, 1] < 0)
    assert np.any(make_chunk(0, 0, (replace(bucket, kinds=tuple(Kind)),)).scenes.radius[:, 1] > 0)


def test_codes_are_orthonormal_components_of_blocks() -> None:
    """Codes decoded by the transposed kernels, which lie apart, give the codes again; a still block's first frame has the same ones."""
    kernels, mean, scale = codes._tables(torch.device("cpu"))
    torch.testing.assert_close(kernels @ kernels.T, torch.eye(16), rtol=0, atol=1e-5)
    given = torch.randn(2, 16, 3, 2, 4)
    given[:, [12, 13], 0] = 0  # the first frame has no change over time
    flat = (given.permute(0, 2, 3, 4, 1) * scale + mean) @ kernels
    blocks = flat.view(2, 3, 2, 4, 3, 4, 8, 8).permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(2, 3, 12, 16, 32)
    torch.testing.assert_close(codes.block_codes(blocks[:, :, 3:]), given, rtol=0, atol=1e-4)


def test_codes_of_the_world_have_the_scales_that_they_say() -> None:
    size = ClipSize(width=64, height=64, num_frames=17)
    frames = draw(scene_arrays([sample_scene(seed, size) for seed in range(200)]), size)
    std, mean = torch.std_mean(codes.block_codes(torch.from_numpy(frames)), dim=(0, 2, 3, 4))
    assert mean.abs().max() < 0.3
    torch.testing.assert_close(std, torch.tensor([1.0] * 3 + [0.5] * 13), rtol=0.2, atol=0)


def toy_stage(folder: Path, steps: int, **options: Any) -> tuple[Stage, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)

    def loss(kind: object, batch: object) -> Tensor:
        x = torch.randn(64, 2)
        error: Tensor = ((layer(x)[:, 0] - x.sum(dim=1)) ** 2).mean()
        return error

    length = StageLength(steps=steps)
    return Stage({"layer": layer}, loss, learning_rate=0.05, length=length, state_file=folder / "state.pt", **options), layer


def test_a_stage_learns_and_ends_with_its_moving_average(tmp_path: Path) -> None:
    stage, layer = toy_stage(tmp_path, 300)
    while not stage.done:
        stage.step(None, ())
    assert stage.log.step == 300
    assert stage.log.losses[-1][2] < 0.01 * stage.log.losses[0][2]
    own = layer.weight.detach().clone()
    with stage.averaged():
        average = layer.weight.detach().clone()
    assert torch.equal(layer.weight, own)
    stage.finish()
    assert torch.equal(layer.weight, average)
    assert not torch.equal(own, average)


@pytest.mark.parametrize("muon_rate", [None, 0.02])
def test_each_step_follows_its_own_batch_alone(tmp_path: Path, muon_rate: float | None) -> None:
    layer = nn.Linear(3, 2)
    stage = Stage(
        {"layer": layer}, lambda kind, batch: (layer.weight * batch[0]).sum(), learning_rate=0.1, muon_rate=muon_rate,
        length=StageLength(steps=9), state_file=tmp_path / "state.pt",
    )  # fmt: skip
    for slope in (torch.full((2, 3), 0.1), torch.full((2, 3), -0.2)):
        before = layer.weight.detach().clone()
        stage.step(None, (slope,))
        assert layer.weight.grad is not None
        torch.testing.assert_close(layer.weight.grad, slope)
        assert not torch.equal(layer.weight, before)


def test_muon_leaves_alone_what_it_is_told_to(tmp_path: Path) -> None:
    layers = {name: nn.Linear(3, 2) for name in ("one", "other")}
    stage = Stage(
        layers, lambda kind, batch: sum((layer.weight.sum() for layer in layers.values()), torch.zeros(())), learning_rate=0.0,
        muon_rate=0.02, without_muon=("other",), length=StageLength(steps=9), state_file=tmp_path / "state.pt",
    )  # fmt: skip
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    stage.step(None, ())
    assert [name for name, layer in layers.items() if not torch.equal(layer.weight, before[name])] == ["one"]


def test_a_stage_ends_by_the_clock_too() -> None:
    length = StageLength(steps=100, minutes=1)
    assert length.progress(50, 0) == 0.5
    assert length.progress(1, 45) == 0.75
    assert length.progress(1, 61) == 1


class Interrupted(Exception):
    pass


def test_an_interrupted_training_ends_in_the_same_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    recipe = DitRecipe(sizes=((64, 64, 5, 0.5), (96, 64, 5, 0.5)), first_chunks=2, kept_chunks=3, muon_rate=0.02)

    def stop_at_four(log: StageLog) -> None:
        if log.step == 4:
            raise Interrupted

    def run(name: str, *, resume: bool, every: float) -> Networks:
        networks = new_networks(TINY, seed=0)
        torch.manual_seed(3)
        dit_stage.train_dit(
            networks, recipe, length=StageLength(steps=7), state_file=tmp_path / name, seed=0, workers=0, resume=resume,
            scale=0.004, every_seconds=every, on_look=stop_at_four,
        )  # fmt: skip
        return networks

    whole = run("whole.pt", resume=False, every=float("inf"))
    with pytest.raises(Interrupted):
        run("parts.pt", resume=False, every=0)
    parts = run("parts.pt", resume=True, every=float("inf"))
    for name in ("transformer", "text_encoder"):
        for mine, other in zip(getattr(whole, name).parameters(), getattr(parts, name).parameters(), strict=True):
            assert torch.equal(mine, other)


def test_a_stage_that_is_told_to_stop_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    told: list[bool] = []
    curves = []
    for folder, stop_after in (("whole", 99), ("stopped", 30)):
        (tmp_path / folder).mkdir()
        stage, _ = toy_stage(tmp_path / folder, 50, cancelled=lambda: bool(told))
        told.clear()
        while not stage.done:
            if stage.log.step == stop_after:
                told.append(True)
                with pytest.raises(loop.StopTraining, match=r"after step 30; --resume"):
                    stage.step(None, ())
                stage, _ = toy_stage(tmp_path / folder, 50)
                assert stage.resume()
                stop_after = 99
            stage.step(None, ())
        curves.append([(step, loss) for step, _, loss in stage.log.losses])
    whole, stopped = curves
    assert [step for step, _ in stopped] == [25, 30, 50]
    assert stopped[0] == whole[0]
    assert (5 * stopped[1][1] + 20 * stopped[2][1]) / 25 == pytest.approx(whole[1][1], rel=1e-5)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_is_stopped_leaves_its_state_and_no_process(tmp_path: Path, stop: signal.Signals) -> None:
    options = (
        "--size tiny --recipe mini --stages encoder,decoder --scale 0.05 --device cpu --workers 1 --threads 1 --vae-minutes 60"
    )
    command = [sys.executable, "-m", "benchmarks.moving_shapes.train", "--out", str(tmp_path), *options.split()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None and "step " in process.stderr.readline()
        workers = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(child.cmdline())
        ]
        assert workers
        os.killpg(process.pid, stop)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (1 if stop is signal.SIGTERM else -stop)
    assert not psutil.wait_procs(workers, timeout=20)[1]
    if stop is signal.SIGTERM:
        assert "--resume goes on from there" in errors and "Traceback" not in errors
        assert (tmp_path / "state" / "encoder.pt").exists()
        again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert again.returncode == 2 and "is of an earlier training" in again.stderr


@pytest.mark.parametrize("option", ["--vae-steps 0", "--dit-minutes 0", "--dit-minutes -1"])
def test_a_stage_without_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path / "out"), *option.split()])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert not (tmp_path / "out").exists()


def test_one_command_trains_all_stages_and_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ((64, 64, 5, 1.0),)
    recipe = Recipe(vae=VaeRecipe(sizes=sizes), dit=DitRecipe(sizes=sizes, first_chunks=2))
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    options = "--size tiny --vae-steps 26 --dit-steps 26 --scale 0.04 --judged 2 --sample-steps 2 --device cpu"
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path / "out"), *options.split()])
    train.main()
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["stages"]["encoder"]["relative_error"] > 0
    assert report["stages"]["decoder"]["psnr_db"] > 0
    assert report["stages"]["dit"]["steps"] == 26
    assert 0 <= report["accuracy"]["all"] <= 1
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000
    words = card(report)
    assert "| encoder | 6 |" in words and "| decoder | 26 |" in words and "26: " in words
    assert all(f"| {name} |" in words for name in ("colour", "direction", "all"))
    with open_checkpoint(tmp_path / "out" / "checkpoint") as opened:
        assert opened.variant.vae == TINY.vae
    networks = new_networks(TINY, seed=9)
    read_checkpoint(tmp_path / "out" / "checkpoint", networks)
    with torch.no_grad():
        latents = networks.vae.encode(torch.rand(4, 3, 5, 64, 64) * 2 - 1)
    assert latents.isfinite().all()


def test_an_update_of_a_matrix_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(24, 16), nn.Linear(24, 16), nn.Conv2d(4, 48, 3)]
    matrices = weight_matrices(layers)
    before = [matrix.detach().clone() for matrix in matrices]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix) * torch.rand(matrix.shape[0]).view(-1, *(1 for _ in matrix.shape[1:]))
    Muon(matrices).step(0.1)
    for matrix, old, gain in zip(matrices, before, (1, 1, (48 / 36) ** 0.5), strict=True):
        change = (old - matrix.detach()).flatten(1) / (0.1 * gain)
        values = torch.linalg.svdvals(change)
        assert 0.6 < values.median() < 1.25
        assert values.max() < 1.3
        assert matrix.grad is not None
        assert (change * matrix.grad.flatten(1)).sum() > 0  # downhill
    assert len(weight_matrices([nn.ModuleDict({"head": nn.Linear(2, 2), "body": nn.Linear(2, 2)})])) == 1


# The quality suite


def test_the_suite_judges_every_row_against_the_fp32_reference(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "STEPS", (3, 2))
    request = QualityRequest(bundles=(bundle,), prompts=2, cases=("*euler 2",), out=tmp_path / "quality.json")
    report = run_quality(request, clip=SMALL_CLIP)
    reference, other = report["rows"]
    assert (report["reference"], other["case"]) == ("cpu fp32 unipc 3", "cpu fp32 euler 2")
    assert (
        reference["to_reference"]
        == reference["noise_floor"]
        == {"psnr_db": 99.0, "ssim": pytest.approx(1), "feature_distance": 0.0}
    )
    assert other["to_reference"]["psnr_db"] < 99
    assert "noise_floor" not in other
    assert reference["accuracy"]["all"] == 0  # untrained
    assert len(reference["wrong"]) == 2
    assert json.loads((tmp_path / "quality.json").read_text())["rows"][1]["scheduler"] == "euler"
    assert "| cpu fp32 unipc 3 |" in report["table"]


def test_a_run_compares_with_the_reference_that_another_run_made(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "STEPS", (2, 1))
    options: dict[str, Any] = {
        "bundles": (bundle,),
        "prompts": 1,
        "reference": tmp_path / "reference.npz",
        "out": tmp_path / "q.json",
    }
    first = run_quality(QualityRequest(cases=("*euler 1",), **options), clip=SMALL_CLIP)
    again = run_quality(QualityRequest(cases=("*euler 1",), **options), clip=SMALL_CLIP)
    assert again["reference"] == first["reference"] == "cpu fp32 unipc 2"
    assert [row["case"] for row in again["rows"]] == ["cpu fp32 euler 1"]
    assert again["rows"][0]["to_reference"] == first["rows"][1]["to_reference"]
    with pytest.raises(RequestError, match="has 1 videos of 64x64x5, not these 2 prompts"):
        run_quality(QualityRequest(**{**options, "prompts": 2}), clip=SMALL_CLIP)
    whole = (tmp_path / "reference.npz").read_bytes()
    middle = len(whole) // 2
    for damaged in (b"PK", whole[:-40], whole[:middle] + bytes(20) + whole[middle + 20 :]):
        (tmp_path / "reference.npz").write_bytes(damaged)
        with pytest.raises(RequestError, match="not a file of reference videos"):
            run_quality(QualityRequest(**options), clip=SMALL_CLIP)
    about = {"case": "x", "captions": [""], "clip": {"width": 64, "height": 64, "num_frames": 5}}
    np.savez(tmp_path / "reference.npz", about=np.array(json.dumps(about)), videos=np.zeros(1))
    with pytest.raises(RequestError, match="not a file of reference videos"):
        run_quality(QualityRequest(**options), clip=SMALL_CLIP)
    with pytest.raises(RequestError, match="no folder that can be written to"):
        run_quality(QualityRequest(**{**options, "reference": tmp_path / "missing" / "reference.npz"}), clip=SMALL_CLIP)


def test_a_machine_that_runs_none_of_the_targets_gets_an_error_and_no_result(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [caption_of(sample_scene(0, SMALL_CLIP))]
    write_reference(
        tmp_path / "r.npz", Reference(case="cpu", videos=[np.zeros((5, 64, 64, 3), np.uint8)]), captions, SMALL_CLIP
    )

    def refuse(*args: object, **options: object) -> None:
        raise EngineError("no such device", hint="buy one")

    monkeypatch.setattr(VideoPipeline, "open", refuse)
    request = QualityRequest(bundles=(bundle,), prompts=1, reference=tmp_path / "r.npz", out=tmp_path / "q.json")
    with pytest.raises(EngineError, match="no such device"):
        run_quality(request, clip=SMALL_CLIP)
    assert not (tmp_path / "q.json").exists()


def test_all_schedulers_and_step_counts_are_rows_unless_some_are_asked_for(bundle: Path) -> None:
    every = chosen_cases(QualityRequest(bundles=(bundle,)))
    assert len(every) == len(cases.STEPS) * 3
    assert every[0].name == "cpu fp32 unipc 50"
    assert [case.name for case in chosen_cases(QualityRequest(bundles=(bundle,), cases=("cpu fp32 euler 4",)))] == [
        "cpu fp32 unipc 50", "cpu fp32 euler 4",
    ]  # fmt: skip


def test_fp8_attention_has_rows_of_its_own_beside_fp8_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bundle_of(folder: Path) -> Any:
        target = SimpleNamespace(precision=Precision(folder.name.split()[-1]))
        wide = WideParts(first_blocks=folder.name.count("first"))
        return SimpleNamespace(manifest=SimpleNamespace(targets={folder.name.split()[0]: target}, fp8_wide=wide))

    class Recorded(nullcontext[Any]):
        """A pipeline that takes any request, and answers with black."""

        def generate(self, request: GenerateRequest) -> Any:
            asked.append(request)
            if request.attention is Precision.FP8 and request.num_steps == 10:
                raise EngineError("no kernel for it")
            report = SimpleNamespace(device_memory=SimpleNamespace(device="a GPU"))
            return SimpleNamespace(frames=np.zeros((5, 64, 64, 3), np.uint8), report=report)

        def __enter__(self) -> Any:
            return self

    asked: list[GenerateRequest] = []
    monkeypatch.setattr(cases, "open_bundle", bundle_of)
    monkeypatch.setattr(VideoPipeline, "open", lambda *given, **options: Recorded())
    reference = Reference(case="cpu", videos=[np.zeros((5, 64, 64, 3), np.uint8)])
    write_reference(tmp_path / "r.npz", reference, [caption_of(sample_scene(0, SMALL_CLIP))], SMALL_CLIP)
    request = QualityRequest(
        bundles=tuple(tmp_path / name for name in ("cuda fp8", "cuda bf16", "emulated first fp8")),
        prompts=1, reference=tmp_path / "r.npz", cases=("* unipc 20", "*fp8-attention unipc 10"),
        out=tmp_path / "q.json",
    )  # fmt: skip
    report = run_quality(request, clip=SMALL_CLIP)
    assert [(row["case"], row["attention"], row["device"]) for row in report["rows"]] == [
        ("cuda fp8 unipc 20", None, "a GPU"),
        ("cuda fp8 fp8-attention unipc 20", Precision.FP8, "a GPU"),
        ("cuda bf16 unipc 20", None, "a GPU"),
        ("emulated fp8 but first:1 unipc 20", None, "a GPU"),
    ]
    assert [each.attention for each in asked] == [None, Precision.FP8, Precision.FP8, None, None]
    assert report["refused"] == {"cuda fp8 fp8-attention unipc 10": "no kernel for it"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "suite quality needs a bundle"),
        (("--bundle", "BUNDLE", "--case", "rtx *"), r"case 'rtx \*': there is cpu fp32 unipc 50 and the like"),
        (("--bundle", "BUNDLE", "--prompts", "0"), "prompts=0: need 1 or more"),
        (("--bundle", "BUNDLE", "--pairs", "2"), "--pairs: suite quality has no such option"),
    ],
)
def test_what_the_suite_cannot_do_is_refused(refuses: Refuses, bundle: Path, options: tuple[str, ...], message: str) -> None:
    given = [str(bundle) if option == "BUNDLE" else option for option in options]
    refuses("benchmark", "--suite", "quality", *given, code=2, message=message)
