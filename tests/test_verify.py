"""`wanrt verify`: what two targets of a bundle are compared on, where they part, and what cannot be compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.typed_stages import toy_of
from engines.verification.inputs import StageInputs
from engines.verification.verify import TensorVerdict, Verification, VerifyRequest, verify
from export.build import BuildRequest, build_bundle
from runtime.errors import BundleError, RequestError
from runtime.geometry import VideoSize
from runtime.precision import in_precision
from runtime.specs import DType, Precision, match_shapes
from runtime.stages import network_stages, networks
from runtime.stages.vae import COLOURS
from runtime.variants import VARIANTS
from runtime.weights import map_safetensors
from tests.conftest import Refuses, Toy, Wanrt, traced_once
from tests.fake_machine import Machine
from tests.toys import edit_json

SMALL = VideoSize(width=64, height=32, num_frames=5)
Cli = Callable[..., tuple[int, str, str]]


def compared(bundle: Path, **options: object) -> Verification:
    return verify(VerifyRequest(bundle=bundle, num_threads=1, **options))  # type: ignore[arg-type]


def verdict(relative: float | None, tensor: str = "hidden") -> TensorVerdict:
    return TensorVerdict(
        component="vae",
        stage="vae.decode_low_step",
        block=None,
        tensor=tensor,
        max_abs=relative,
        relative=relative,
        tolerance=0.1,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_stage_of_every_variant_gets_inputs_that_fit_it(name: str) -> None:
    variant = toy_of(VARIANTS[name])
    for size, tile in (
        (VideoSize(width=128, height=64, num_frames=1), None),
        (VideoSize(width=64, height=96, num_frames=9), 2),
    ):
        for network in networks(variant):
            given = StageInputs(variant, size, seed=0, tile=tile)
            for stage in network_stages(variant, network):
                inputs = given.take(stage, in_precision(stage, Precision.BF16))
                extents = match_shapes(stage, {tensor: array.shape for tensor, array in inputs.items()})
                assert extents == given.extents(stage)
                for tensor in stage.inputs:
                    assert inputs[tensor.name].dtype == (np.int64 if tensor.dtype is DType.I64 else np.float32)
                    assert np.isfinite(inputs[tensor.name]).all()


def test_inputs_are_the_seeds_or_what_a_stage_before_gave() -> None:
    variant = toy_of(VARIANTS["wan2.1-t2v-1.3b"])
    head = next(stage for stage in network_stages(variant, "transformer") if stage.name == "transformer.head")
    first, same, other = (StageInputs(variant, SMALL, seed=seed) for seed in (1, 1, 2))
    drawn = first.take(head)["hidden_states"]
    np.testing.assert_array_equal(drawn, same.take(head)["hidden_states"])
    assert not np.array_equal(drawn, other.take(head)["hidden_states"])
    first.keep({"next_hidden_states": 2 * drawn, "temb": np.zeros((9, 9), np.float32)})
    np.testing.assert_array_equal(first.take(head)["hidden_states"], 2 * drawn)
    np.testing.assert_array_equal(first.take(head)["temb"], same.take(head)["temb"])  # another shape is another tensor


def test_inputs_are_numbers_that_every_precision_holds() -> None:
    variant = toy_of(VARIANTS["wan2.2-ti2v-5b"])
    attention = next(stage for stage in network_stages(variant, "transformer") if stage.name == "transformer.attention")
    typed = [in_precision(attention, precision) for precision in (Precision.BF16, Precision.FP16)]
    query = StageInputs(variant, SMALL, seed=0).take(attention, *typed)["query"]
    np.testing.assert_array_equal(query, query.astype(np.float16))
    assert not (query.view(np.uint32) & 0xFFFF).any()


def test_targets_of_one_bundle_agree_in_every_stage(typed_toy: dict[Precision, Path]) -> None:
    found = compared(typed_toy[Precision.FP8], target="emulated")
    assert not found.parting, "\n".join(found.lines())
    variant = toy_of(VARIANTS["wan2.1-t2v-1.3b"])
    names = {stage.name for network in networks(variant) for stage in network_stages(variant, network)}
    assert {one.stage for one in found.verdicts} == names
    by_name = {f"{one.stage}/{one.tensor}": one for one in found.verdicts if not one.block}
    assert by_name["transformer.block_in/query"].tolerance > 4 * by_name["transformer.text_kv/text_key"].tolerance
    assert {one.block for one in found.verdicts if one.stage == "transformer.block_out"} == {0, 1}
    rounded = [one for one in found.verdicts if one.relative is not None and one.relative > 1e-4]
    assert len(rounded) > len(found.verdicts) / 2


def test_a_target_with_device_memory_is_planned_for_and_agrees_bit_for_bit(
    typed_toy: dict[Precision, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    bundle.symlink_to(typed_toy[Precision.BF16], target_is_directory=True)
    machine = Machine(monkeypatch)
    found = compared(bundle, target="rtx", against="emulated", stages=("transformer", "vae.decode_low_step"))
    assert {one.relative for one in found.verdicts} == {0.0}
    assert {one.component for one in found.verdicts} == {"transformer", "vae"}
    assert found.size == VideoSize(width=16, height=16, num_frames=5)  # the smallest that the engines take
    assert machine.gpu.closed and 0 < machine.gpu.peak_bytes <= (machine.gpu.limit_bytes or 0)


def test_blocks_kept_wide_are_held_to_what_bf16_does(one_expert: Toy, tmp_path: Path) -> None:
    request = BuildRequest(out=tmp_path, checkpoint=one_expert.folder, targets=("cpu", "emulated"), precision=Precision.FP8)
    with traced_once():
        build_bundle(request)
    wide, narrow = compared(tmp_path, target="emulated", stages=("transformer.block_out",)).verdicts
    assert (wide.block, narrow.block) == (0, 1)
    assert wide.tolerance < narrow.tolerance / 4
    assert wide.relative is not None and narrow.relative is not None
    assert 1e-4 < wide.relative < narrow.relative / 3
    assert not wide.parts and not narrow.parts


@pytest.fixture
def damaged(typed_toy: dict[Precision, Path], tmp_path: Path) -> Path:
    """A bundle whose bf16 weights of one product in the second block are not those of its float32 ones."""
    folder = tmp_path / "damaged"
    shutil.copytree(typed_toy[Precision.BF16], folder)
    file = folder / "weights" / "bf16" / "transformer.safetensors"
    weight = map_safetensors(file)["blocks.1.self_attn.o.weight"].tobytes()
    data = file.read_bytes()
    assert data.count(weight) == 1
    file.write_bytes(data.replace(weight, bytes(len(weight))))
    return folder


def test_where_targets_part_is_said_and_the_command_fails(damaged: Path, command_line: Cli) -> None:
    arguments = ("verify", damaged, "--target", "emulated", "--stage", "transformer", "--threads", "1")
    status, out, err = command_line(*arguments)
    assert status == 1
    (line,) = (line for line in out.splitlines() if line.endswith("parts here first"))
    assert line.startswith("transformer: block_out of block 1  next_hidden_states")
    assert "1 of 18 tensors part" in err and "hint: " in err and "Traceback" not in err
    status, out, err = command_line(*arguments, "--json")
    assert status == 1 and err.startswith("error: 1 of 18")
    assert [one["block"] for one in json.loads(out)["verdicts"] if one["relative"] > one["tolerance"]] == [1]
    status, out, _ = command_line(*arguments[:4], "--stage", "transformer.block_in", "--size", "64x32", "--seed", "3")
    assert status == 0 and "64x32x5, seed 3" in out and "block_out" not in out


def test_bundles_of_one_checkpoint_are_compared(typed_toy: dict[Precision, Path], wanrt: Wanrt) -> None:
    out, _ = wanrt(
        "verify", typed_toy[Precision.BF16], "--against", typed_toy[Precision.FP16], "--target", "emulated",
        "--stage", "text_encoder", "--threads", "1",
    )  # fmt: skip
    assert out.startswith("emulated (bf16) beside cpu (fp32), ")
    assert "text_encoder: block of block 1" in out


def test_bundles_of_two_checkpoints_are_refused(typed_toy: dict[Precision, Path], one_expert: Toy, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(one_expert.diffusers, other)
    manifest = json.loads((other / "manifest.json").read_text())
    digests = manifest["weights"]["fp32"]["vae"]["tensors"]
    digests[next(name for name in digests if name.endswith("gamma"))] = "0" * 64
    edit_json(other / "manifest.json", weights=manifest["weights"])
    with pytest.raises(BundleError, match="do not hold the same vae"):
        compared(typed_toy[Precision.BF16], against=str(other))
    edit_json(other / "manifest.json", variant=manifest["variant"] | {"name": "wan2.1-t2v-14b"})
    with pytest.raises(BundleError, match=r"do not hold the same wan2\.1-t2v-1\.3b"):
        compared(typed_toy[Precision.BF16], against=str(other))


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "has no target but cpu"),
        (("--target", "cpu"), "cpu would be compared with itself"),
        (("--against", "rtx"), "has cpu, no target rtx, and there is no folder rtx"),
        (("--against", "elsewhere"), "no target elsewhere, and there is no folder elsewhere"),
    ],
    ids=["one target", "itself", "target", "folder"],
)
def test_nothing_to_compare_with_is_refused(one_expert: Toy, refuses: Refuses, options: tuple[str, ...], message: str) -> None:
    refuses("verify", one_expert.diffusers, *options, code=2, message=message)


@pytest.mark.parametrize(
    "options, code, message",
    [
        (("--stage", "transformer.nose"), 2, r"stage transformer\.nose: wan2\.1-t2v.* has text_encoder, "),
        (("--target", "gpu"), 6, "target gpu: this bundle has"),
        (("--size", "50x50"), 2, "width=50"),
        (("--size", "big"), 2, "--size big"),
        (("--frames", "5"), 2, "--frames: needs --size"),
        (("--threads", "-1"), 2, "num_threads=-1"),
        (("--seed", "-1"), 2, "seed=-1"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    typed_toy: dict[Precision, Path], refuses: Refuses, options: tuple[str, ...], code: int, message: str
) -> None:
    refuses("verify", typed_toy[Precision.BF16], "--target", "emulated", *options, code=code, message=message)


def test_a_size_beyond_the_engines_is_refused(typed_toy: dict[Precision, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch)
    with pytest.raises(RequestError, match=r"128x128x5: the engines take .*rtx 16x16x1\.\.64x64x9"):
        compared(typed_toy[Precision.BF16], target="rtx", size=VideoSize(width=128, height=128, num_frames=5))


def test_without_polygraphy_the_remedy_is_named(
    typed_toy: dict[Precision, Path], refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.verification.verify.find_spec", lambda name: None)
    err = refuses("verify", typed_toy[Precision.BF16], code=2, message="Polygraphy, which is not installed")
    assert 'pip install "wanrt[verify]"' in err


def test_what_is_not_finite_parts_and_of_caches_the_worst_is_shown() -> None:
    verdicts = (verdict(0.05, "next_cache_00"), verdict(None, "next_cache_01"), verdict(0.2, "next_cache_02"), verdict(0.01))
    found = Verification(expected="cpu", found="rtx", size=SMALL, seed=0, verdicts=verdicts)
    assert found.parting == verdicts[1:3]
    _, _, caches, hidden = found.lines()
    assert "next_cache_01" in caches and "not finite" in caches and caches.endswith("parts here first")
    assert "parts" not in hidden


def test_colours_are_compared_at_the_size_of_frames() -> None:
    variant = toy_of(VARIANTS["wan2.1-t2v-1.3b"])
    colours = next(stage for stage in network_stages(variant, "vae") if stage.name == COLOURS)
    assert StageInputs(variant, SMALL, seed=0).extents(colours) == {"frames": 4, "height": 32, "width": 64}
