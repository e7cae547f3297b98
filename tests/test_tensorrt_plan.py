"""The `rtx` and `tensorrt` targets in the tables: architectures by precision, profiles from sizes, bundles, refusals."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from engines.plan import TARGETS, architectures, network_precisions
from engines.profiles import DEFAULT_SIZES, bounded, stage_profile
from engines.store import BundleStore
from engines.targets.tensorrt.library import RTX
from export.builder import Builder, BuildRequest
from export.pack import PackedTensor, write_weights
from runtime.backends.engine_file import EngineHeader, EnginePart, Extent, engine_for, pack_engines, read_header
from runtime.backends.tensorrt.library import RTX as RUNS_ON
from runtime.errors import BundleError, ExportError, RequestError
from runtime.geometry import MAX_FRAMES, MAX_SIDE, SizeRange, VideoSize
from runtime.manifest import Target
from runtime.precision import NOTHING_WIDE
from runtime.specs import DType, Precision
from runtime.variants import VARIANTS
from tests.conftest import Refuses
from tests.harness import DictSource
from tests.typed_toys import TOY, stage_of, traced

has_rtx = pytest.mark.skipif(find_spec(RTX.module) is None, reason="tensorrt-rtx is not installed")
SMALL = SizeRange(smallest=VideoSize(width=16, height=16, num_frames=1), largest=VideoSize(width=64, height=32, num_frames=5))


def test_what_is_built_for_is_what_the_runtime_runs_on() -> None:
    assert set(TARGETS["rtx"].architectures) == set(RUNS_ON.architectures)


def test_architectures_are_those_that_have_the_precision() -> None:
    rtx = TARGETS["rtx"]
    assert architectures(rtx, (), Precision.FP8) == ("sm_89", "sm_120", "sm_121")
    assert architectures(rtx, (), None) == ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
    assert architectures(rtx, (), Precision.FP16)[0] == "sm_75"
    assert architectures(rtx, ("sm_89", "sm_90"), Precision.BF16) == ("sm_89",)  # sm_90 may be another target's
    assert set(rtx.architectures) == {name for group in RTX.architecture_groups for name in group}


def test_an_architecture_without_the_precision_is_refused_with_those_that_have_it(refuses: Refuses, tmp_path: Path) -> None:
    engines = (
        "build-engines",
        "--engines-only",
        "--variant",
        "wan2.1-t2v-1.3b",
        "--out",
        tmp_path / "bundle",
        "--target",
        "rtx",
    )
    refuses(*engines, "--arch", "sm_90", code=2, message="architecture sm_90: target rtx has sm_75, sm_80")
    for asked in (("sm_75",), ("sm_89", "sm_75")):
        with pytest.raises(RequestError, match=r"architecture sm_75: target rtx has sm_80, .* in bf16") as caught:
            architectures(TARGETS["rtx"], asked, None)
        assert "--precision fp16 has sm_75" in caught.value.hint
    assert not (tmp_path / "bundle").exists()


def test_fp8_is_the_transformers_and_fp16_everyones() -> None:
    variant = VARIANTS["wan2.1-i2v-14b-480p"]
    fp8, fp16 = (network_precisions(TARGETS["rtx"], variant, asked) for asked in (Precision.FP8, Precision.FP16))
    assert fp8["transformer"] is Precision.FP8
    assert {precision for network, precision in fp8.items() if network != "transformer"} == {Precision.BF16}
    assert set(fp16.values()) == {Precision.FP16}


def test_the_default_profile_covers_both_orientations_of_every_size() -> None:
    variant = VARIANTS["wan2.1-t2v-14b"]
    tokens = stage_profile(stage_of(variant, "transformer.block_in"), variant, DEFAULT_SIZES)
    assert tokens == {"tokens": Extent(smallest=900, usual=21 * 45 * 80, largest=31 * 45 * 80)}
    sides = stage_profile(stage_of(variant, "vae.decode_low_step"), variant, DEFAULT_SIZES)
    assert sides == dict.fromkeys(("height", "width"), Extent(smallest=8, usual=90, largest=160))
    assert stage_profile(stage_of(variant, "transformer.time_embed"), variant, DEFAULT_SIZES) == {}


def test_a_profile_counts_tokens_with_the_variants_own_strides() -> None:
    variant = VARIANTS["wan2.2-ti2v-5b"]
    profile = stage_profile(stage_of(variant, "transformer.head"), variant, DEFAULT_SIZES)
    assert profile["tokens"] == Extent(smallest=15 * 15, usual=31 * 22 * 40, largest=31 * 22 * 40)


def test_what_is_left_out_of_a_size_range_is_the_default() -> None:
    only_size = SizeRange(
        smallest=VideoSize(width=480, height=480, num_frames=1), largest=VideoSize(width=832, height=480, num_frames=MAX_FRAMES)
    )
    only_frames = SizeRange(
        smallest=VideoSize(width=16, height=16, num_frames=5), largest=VideoSize(width=MAX_SIDE, height=MAX_SIDE, num_frames=9)
    )
    assert bounded(None) == DEFAULT_SIZES
    assert str(bounded(only_size)) == "480x480x1..832x480x121"
    assert str(bounded(only_frames)) == "480x480x5..1280x720x9"
    assert bounded(SMALL) == SMALL


def test_a_weight_beyond_fp16_is_refused_and_not_made_infinite(tmp_path: Path) -> None:
    source = DictSource({"embed.weight": torch.tensor([[1.0, 70000.0]])})
    plan = [PackedTensor("embed.weight", ("embed.weight",), (1, 2), DType.F16)]
    with pytest.raises(ExportError, match=r"embed\.weight: holds 7e\+04, beyond fp16's 65,504"):
        write_weights(source, plan, tmp_path / "weights.safetensors")


@has_rtx
def test_engines_are_kept_until_their_sizes_or_architectures_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [stage_of(TOY, f"transformer.{name}") for name in ("time_embed", "attention", "head")]
    monkeypatch.setattr("export.builder.network_stages", lambda variant, network: stages)
    monkeypatch.setattr("export.builder.network_precisions", lambda *_: {"transformer": Precision.BF16})
    monkeypatch.setattr("export.graphs.stage_graph", lambda variant, stage: traced(variant, stage.name))
    request = BuildRequest(out=tmp_path, checkpoint=None, targets=("rtx",), sizes=SMALL, architectures=("sm_89",))

    def build(request: BuildRequest) -> tuple[Target, int]:
        with BundleStore(tmp_path) as store:
            builder = Builder(store, request, TOY, None, fp8_wide=NOTHING_WIDE, total=0, on_event=lambda event: None)
            return builder.target(TARGETS["rtx"]), builder.built

    target, built = build(request)
    assert (target.sizes, target.kernels, built, len(target.engines)) == (SMALL, {}, 3, 3)
    assert "tensorrt-rtx" in target.tool_versions
    header = read_header(memoryview((tmp_path / target.engines["transformer.attention"].path).read_bytes()))
    # the toy's VAE halves sides and frames, a token is 2x2: at most 3 latent frames of 8x16 tokens
    assert header.profile == {"tokens": Extent(smallest=16, usual=3 * 8 * 16, largest=3 * 8 * 16)}
    assert [(part.architectures, part.fp8_attention) for part in header.parts] == [(("sm_89",), False), (("sm_89",), True)]
    assert build(request) == (target, 0)
    longer = replace(request, sizes=replace(SMALL, largest=replace(SMALL.largest, num_frames=9)))
    assert build(longer)[1] == 2  # of `time_embed` nothing changed
    assert build(replace(longer, architectures=("sm_89", "sm_120")))[1] == 3


def test_an_engine_file_that_was_cut_or_is_none_is_refused() -> None:
    header = EngineHeader(
        stage="transformer.head",
        library="tensorrt-rtx",
        library_version="1.7.1",
        profile={"tokens": Extent(smallest=1, usual=2, largest=3)},
        parts=(
            EnginePart(architectures=("sm_75",), bytes=3, context_bytes=1, fp8_attention=False),
            EnginePart(architectures=("sm_89", "sm_120"), bytes=2, context_bytes=0, fp8_attention=False),
        ),
    )
    file = pack_engines(header, [b"abc", b"de"])
    assert read_header(memoryview(file)) == header
    later = engine_for(header, memoryview(file), "sm_120")
    assert later is not None and (later[0], bytes(later[1])) == (header.parts[1], b"de")
    for damaged in (file[:-1], file + b"f", file[:20], b"", b"\xff" * 64, (9).to_bytes(8, "little") + b"\xff" * 9):
        with pytest.raises(BundleError):
            read_header(memoryview(damaged))
