"""The VAE in strips of a frame: the same frames and latents as at once, with margins as wide as they must be and no wider."""

from typing import Any

import numpy as np
import pytest
import torch

from export.layouts import vae_diffusers_names
from runtime.stages.vae import DECODE_HIGH, DECODE_LOW, decoder_parts, encoder_parts, vae_encoder_stages, vae_stages
from runtime.strips import cut_strips, margin_of, most_strips
from runtime.vae import decode_colours, decode_stream, decoder_margin, encode_stream, encoder_margin, to_uint8
from runtime.variants import VAE_2_2, VaeArch
from tests.toys import make_vae, original_tensors
from tests.vaes import CONFIGS, EagerVae, random_frames, random_latents

TRUE_ARCHS = {"2.1": VaeArch(), "2.2": VAE_2_2}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def opened(name: str, *, decodes: bool, dtype: torch.dtype = torch.float32) -> tuple[VaeArch, Any]:
    arch = CONFIGS[name].vae
    tensors = original_tensors(make_vae(CONFIGS[name], seed=1), vae_diffusers_names(arch))
    return arch, EagerVae(arch, (vae_stages if decodes else vae_encoder_stages)(arch), tensors, dtype=dtype)


def size_for(margin: int, *, upright: bool = False) -> tuple[int, int]:
    """Latent rows and columns: a long side of several strips, a short one that is not cut."""
    long, short = 2 * margin + 5, 2
    return (long, short) if upright else (short, long)


def decoded(vae: Any, latents: Any, arch: VaeArch, num_strips: int) -> Any:
    return np.concatenate(list(decode_stream(vae, latents, arch, num_strips=num_strips)), axis=1)


@pytest.mark.parametrize("upright", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("config", CONFIGS)
def test_decoding_in_strips_gives_the_whole_frames(config: str, upright: bool) -> None:
    arch, vae = opened(config, decodes=True)
    latents = random_latents(arch, 3, size_for(decoder_margin(arch), upright=upright)).numpy()
    whole = decoded(vae, latents, arch, 1)
    for num_strips in (2, 3):
        np.testing.assert_allclose(decoded(vae, latents, arch, num_strips), whole, atol=1e-5 * np.abs(whole).max(), rtol=0)


@pytest.mark.parametrize("upright", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("config", CONFIGS)
def test_encoding_in_strips_gives_the_whole_latents(config: str, upright: bool) -> None:
    arch, vae = opened(config, decodes=False)
    frames = random_frames(arch, 2, size_for(encoder_margin(arch), upright=upright)).numpy()
    whole = encode_stream(vae, frames, arch)
    for num_strips in (2, 3):
        latents = encode_stream(vae, frames, arch, num_strips=num_strips)
        np.testing.assert_allclose(latents, whole, atol=1e-5 * np.abs(whole).max(), rtol=0)


@pytest.mark.parametrize("config", ["wan's levels", "wan 2.2's levels"])
def test_a_decoders_margin_cannot_be_smaller(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, since what comes from so far away is little: 1e-9 to 1e-7 of the whole."""
    arch, vae = opened(config, decodes=True, dtype=torch.float64)
    margin = decoder_margin(arch)
    latents = random_latents(arch, 2, size_for(margin)).double().numpy()
    whole = decoded(vae, latents, arch, 1)
    for given, is_enough in ((margin, True), (margin - 1, False)):
        monkeypatch.setattr("runtime.vae.decoder_margin", lambda _, given=given: given)
        error = np.abs(decoded(vae, latents, arch, 2) - whole).max() / np.abs(whole).max()
        assert (error < 1e-13) if is_enough else (error > 1e-10)


@pytest.mark.parametrize("config", ["wan's levels", "wan 2.2's levels"])
def test_an_encoders_margin_cannot_be_smaller(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arch, vae = opened(config, decodes=False, dtype=torch.float64)
    margin = encoder_margin(arch)
    frames = random_frames(arch, 2, size_for(margin)).double().numpy()
    whole = encode_stream(vae, frames, arch)
    for given, is_enough in ((margin, True), (margin - 1, False)):
        monkeypatch.setattr("runtime.vae.encoder_margin", lambda _, given=given: given)
        error = np.abs(encode_stream(vae, frames, arch, num_strips=2) - whole).max() / np.abs(whole).max()
        assert (error < 1e-13) if is_enough else (error > 1e-10)


@pytest.mark.parametrize("arch", TRUE_ARCHS.values(), ids=list(TRUE_ARCHS))
def test_the_true_vaes_see_seven_latent_positions_when_decoding_and_five_when_encoding(arch: VaeArch) -> None:
    assert (decoder_margin(arch), encoder_margin(arch)) == (7, 5)


def test_what_sees_the_whole_frame_has_no_margin() -> None:
    for part in (decoder_parts(VaeArch())[0], encoder_parts(VaeArch())[1]):
        with pytest.raises(ValueError, match=r"middle\.1 sees the whole frame"):
            margin_of(part.layers, 1)


@pytest.mark.parametrize("num_strips", [1, 2])
@pytest.mark.parametrize("config", ["few levels", "few 2.2 levels"])
def test_colours_of_strips_are_those_of_the_frames(config: str, num_strips: int) -> None:
    arch, vae = opened(config, decodes=True)
    latents = 40 * random_latents(arch, 2, size_for(decoder_margin(arch))).numpy()
    expected = to_uint8(decoded(vae, latents, arch, num_strips))
    chunks = list(decode_colours(vae, latents, arch, num_strips=num_strips))
    assert [len(chunk) for chunk in chunks] == [1, arch.temporal_stride]
    assert {0, 255} <= set(np.unique(expected))
    assert np.array_equal(np.concatenate(chunks), expected)


def test_strips_run_one_after_the_other_and_frames_come_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    arch, vae = opened("few levels", decodes=True)
    ran: list[tuple[str, int]] = []
    run = vae.run

    def note_and_run(stage: str, inputs: Any) -> Any:
        ran.append((stage, inputs["hidden" if stage in DECODE_HIGH else "latents"].shape[-1]))
        return run(stage, inputs)

    monkeypatch.setattr(vae, "run", note_and_run)
    rows, columns = size_for(decoder_margin(arch))  # 13 columns, margins of 4
    stream = decode_stream(vae, random_latents(arch, 3, (rows, columns)).numpy(), arch, num_strips=2)
    assert ran == []
    next(stream)
    low = [(DECODE_LOW[min(i, 1)], columns) for i in range(3)]
    strips = [[(DECODE_HIGH[min(i, 1)], width) for i in range(3)] for width in (10, 11)]
    assert ran == [*low, *strips[0], *strips[1][:2]]


@pytest.mark.parametrize("num_strips", [1, 2, 3, 5, 146])
def test_strips_cover_a_frame_once_and_see_equally_much(num_strips: int) -> None:
    strips = list(cut_strips(160, num_strips, margin=7))
    assert len(strips) == num_strips
    assert [i for strip in strips for i in range(strip.start, strip.stop)] == list(range(160))
    seen = [strip.seen.stop - strip.seen.start for strip in strips]
    assert max(seen) - min(seen) <= 1
    for strip in strips:
        positions = range(160)[strip.seen]
        assert list(positions[strip.kept]) == list(range(strip.start, strip.stop))
        assert (positions[0], positions[-1]) == (max(0, strip.start - 7), min(159, strip.stop + 6))


@pytest.mark.parametrize("num_strips", [-1, 0, 147])
def test_strips_that_would_be_empty_are_refused(num_strips: int) -> None:
    with pytest.raises(ValueError, match=f"{num_strips} strips of 160 positions"):
        list(cut_strips(160, num_strips, margin=7))


@pytest.mark.parametrize(("extent", "most"), [(160, 20), (104, 12), (28, 2), (27, 1), (14, 1), (3, 1)])
def test_a_frame_is_cut_only_while_margins_are_not_most_of_the_work(extent: int, most: int) -> None:
    assert most_strips(extent, margin=7) == most
