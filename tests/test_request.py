"""What a user may ask for: defaults of the bundle, and refusals that say what is possible."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle import open_bundle
from runtime.errors import RequestError
from runtime.geometry import SizeRange, VideoSize
from runtime.manifest import Manifest
from runtime.request import GenerateRequest
from runtime.resolving import resolve_request
from runtime.run import load_latents
from runtime.schedulers import Conventions, SchedulerName
from runtime.tiling import TileSpec
from runtime.variants import Conditioning, Presence
from tests.conftest import Toy

ASKED = GenerateRequest(prompt="a cat", width=16, height=32, num_frames=5, seed=1)


@pytest.fixture(scope="module")
def manifest(two_experts: Toy) -> Manifest:
    return open_bundle(two_experts.original).manifest


@pytest.fixture(scope="module")
def diffusers_manifest(two_experts: Toy) -> Manifest:
    return open_bundle(two_experts.diffusers).manifest


def test_what_is_left_out_comes_from_the_variant(manifest: Manifest) -> None:
    job = resolve_request(GenerateRequest(prompt="a cat"), manifest, sizes=None)
    assert (job.size, job.fps, job.num_steps, job.shift) == (VideoSize(width=1280, height=720, num_frames=81), 16, 40, 12.0)
    assert [guidance.scale for guidance in job.guidance] == [4.0, 3.0]
    assert job.scheduler is SchedulerName.UNIPC
    assert job.negative_prompt == manifest.variant.defaults.negative_prompt != ""
    assert job.latents_shape == (16, 21, 90, 160)


def test_a_diffusers_folder_brings_its_scheduler_and_an_empty_negative_prompt(diffusers_manifest: Manifest) -> None:
    job = resolve_request(GenerateRequest(prompt="a cat"), diffusers_manifest, sizes=None)
    assert (job.conventions, job.shift, job.negative_prompt) == (Conventions.DIFFUSERS, 5.0, "")
    original = resolve_request(replace(ASKED, conventions=Conventions.ORIGINAL), diffusers_manifest, sizes=None)
    assert (original.shift, bool(original.negative_prompt)) == (12.0, True)


def test_an_empty_negative_prompt_is_not_the_default(manifest: Manifest) -> None:
    assert resolve_request(replace(ASKED, negative_prompt=""), manifest, sizes=None).negative_prompt == ""


def test_a_seed_is_drawn_when_none_is_given(manifest: Manifest) -> None:
    drawn = {resolve_request(replace(ASKED, seed=None), manifest, sizes=None).seed for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_every_seed_of_torch_is_a_seed(manifest: Manifest, seed: int) -> None:
    assert resolve_request(replace(ASKED, seed=seed), manifest, sizes=None).seed == seed


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"num_frames": 80}, "num_frames=80: need 4n.1", "try 77 or 81"),
        ({"num_frames": 0}, "num_frames=0", "try 1 or 5"),
        ({"num_frames": -7}, "num_frames=-7", "try 1 or 5"),
        ({"num_frames": 2**70 + 1}, "at most 4093", "lower it"),
        ({"width": 833}, "width=833: need a multiple of 16", "try 832 or 848"),
        ({"height": 8}, "height=8: need a multiple of 16", "try 16 or 32"),
        ({"height": 0}, "height=0", "try 16 or 32"),
        ({"width": 16 * 2**60}, "at most 16384", "lower it"),
        ({"num_steps": 0}, "num_steps=0: need 1 to 1000", "20 to 50"),
        ({"num_steps": 10**9}, "need 1 to 1000", "20 to 50"),
        ({"seed": -1}, "seed=-1", "leave it out"),
        ({"seed": 2**64}, "need 0 to 18446744073709551615", "leave it out"),
        ({"shift": 0.0}, "shift=0.0", "3 to 12"),
        ({"shift": -3.0}, "shift=-3.0", "3 to 12"),
        ({"shift": math.nan}, "shift=nan", "3 to 12"),
        ({"shift": math.inf}, "shift=inf", "3 to 12"),
        ({"guidance": (math.nan,)}, "need numbers up to 1000", "3 to 6"),
        ({"guidance": (4.0, -math.inf)}, "need numbers up to 1000", "3 to 6"),
        ({"guidance": (1e39,)}, "need numbers up to 1000", "3 to 6"),
        ({"guidance": (1.0, 2.0, 3.0)}, "3 scales; this model has 2 experts", "one per expert"),
        ({"guidance": ()}, "0 scales", "one per expert"),
        ({"tile": TileSpec.square(20, 16)}, "tile size 20: need a multiple of 8", "try 16 or 24"),
        ({"prompt": "cat \udcff"}, "prompt is not valid UTF-8", "UTF-8"),
        ({"negative_prompt": "\ud800"}, "negative_prompt is not valid UTF-8", "UTF-8"),
        ({"latents": np.zeros((16, 2, 4, 4), np.float32)}, r"needs float32 \[16, 2, 4, 2\]", "that shape"),
        ({"latents": np.zeros((16, 2, 4, 2), np.float64)}, "latents are float64", "that shape"),
        ({"latents": np.full((16, 2, 4, 2), np.inf, np.float32)}, "not finite", "again"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(manifest: Manifest, changes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        resolve_request(replace(ASKED, **changes), manifest, sizes=None)
    assert hint in caught.value.hint


def test_engines_for_some_sizes_refuse_others_but_take_both_orientations(manifest: Manifest) -> None:
    sizes = SizeRange(
        smallest=VideoSize(width=32, height=16, num_frames=1), largest=VideoSize(width=64, height=32, num_frames=5)
    )
    assert resolve_request(ASKED, manifest, sizes=sizes).size.height == 32
    with pytest.raises(RequestError, match="these engines take 32x16x1") as caught:
        resolve_request(replace(ASKED, num_frames=9), manifest, sizes=sizes)
    assert "rebuild" in caught.value.hint


@pytest.mark.parametrize("tile", [(0, 0), (16, 0), (16, 24), (-8, -8)])
def test_tiles_that_leave_gaps_are_refused(tile: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="the distance must be"):
        TileSpec.square(*tile)


def npy(path: Path, header: str) -> None:
    """An .npy file with a header of one's own and four bytes."""
    text = header.encode().ljust(118) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}",
        "{'descr': '>f4', 'fortran_order': False, 'shape': (1,)}",
        "__import__('os').abort()",
        "((((((((((((((((((((",
    ],
)
def test_hostile_latents_are_refused_without_allocating(tmp_path: Path, header: str) -> None:
    npy(tmp_path / "latents.npy", header)
    with pytest.raises(RequestError, match=r"latents\.npy") as caught:
        load_latents(tmp_path / "latents.npy")
    assert "numpy.save" in caught.value.hint


def test_latents_in_either_memory_order_are_read(tmp_path: Path) -> None:
    latents = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.save(tmp_path / "a.npy", np.asfortranarray(latents))
    np.testing.assert_array_equal(load_latents(tmp_path / "a.npy"), latents)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01."])
def test_other_files_are_no_latents(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "latents.npy").write_bytes(content)
    with pytest.raises(RequestError, match=r"not a readable \.npy file"):
        load_latents(tmp_path / "latents.npy")


def test_an_archive_of_arrays_is_no_latents(tmp_path: Path) -> None:
    np.savez(tmp_path / "latents.npz", a=np.zeros(1, np.float32))
    with pytest.raises(RequestError, match="holds an archive"):
        load_latents(tmp_path / "latents.npz")


def conditioned(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest of a variant that is given other things."""
    return replace(manifest, variant=replace(manifest.variant, conditioning=Conditioning(**changes)))


IMAGE = np.zeros((20, 40, 3), np.uint8)
VIDEO = np.zeros((7, 20, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("takes", "given", "words"),
    [
        ({}, {"image": IMAGE}, "takes no image"),
        ({}, {"video": VIDEO}, "takes no video"),
        ({"image": Presence.REQUIRED}, {}, "needs an image"),
        ({"image": Presence.REQUIRED}, {"image": IMAGE, "last_image": IMAGE}, "takes no last image"),
        ({"image": Presence.REQUIRED, "last_image": Presence.REQUIRED}, {"image": IMAGE}, "needs a last image"),
        ({"image": Presence.OPTIONAL}, {"image": IMAGE[:0]}, "holds no pixels"),
        ({"image": Presence.OPTIONAL, "last_image": Presence.OPTIONAL}, {"last_image": IMAGE}, "without a first one"),
        ({"image": Presence.OPTIONAL}, {"image": IMAGE[:, :, 0]}, "need uint8 RGB"),
        ({"image": Presence.OPTIONAL}, {"image": IMAGE.astype(np.float32)}, "need uint8 RGB"),
        ({"video": Presence.OPTIONAL}, {"strength": 0.5}, "strength without a video"),
        ({"video": Presence.OPTIONAL}, {"video": VIDEO, "strength": 1.01}, "more than 0, at most 1"),
        ({"video": Presence.OPTIONAL}, {"video": VIDEO, "strength": 0.1, "num_steps": 9}, "leaves none of 9 steps"),
        ({"video": Presence.OPTIONAL}, {"video": VIDEO, "num_frames": 9}, "the video has 7"),
        ({"video": Presence.OPTIONAL}, {"video": VIDEO[:0], "num_frames": None}, "holds no pixels"),
    ],
)
def test_images_and_videos_that_do_not_fit_the_variant_are_refused(
    manifest: Manifest, takes: dict[str, Any], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        resolve_request(replace(ASKED, **given), conditioned(manifest, **takes), sizes=None)
    assert caught.value.hint


def test_a_first_and_a_last_image_need_more_than_one_frame(manifest: Manifest) -> None:
    both = conditioned(manifest, image=Presence.REQUIRED, last_image=Presence.REQUIRED)
    request = replace(ASKED, image=IMAGE, last_image=IMAGE, num_frames=1)
    with pytest.raises(RequestError, match="need two"):
        resolve_request(request, both, sizes=None)


def test_a_last_image_whose_size_would_explode_is_refused(manifest: Manifest) -> None:
    both = conditioned(manifest, image=Presence.REQUIRED, last_image=Presence.REQUIRED)
    wide, tall = np.zeros((64, 4096, 3), np.uint8), np.zeros((4096, 64, 3), np.uint8)
    with pytest.raises(RequestError, match="differ too much in size"):
        resolve_request(replace(ASKED, image=wide, last_image=tall), both, sizes=None)


def test_without_a_size_the_video_has_the_images_aspect(manifest: Manifest) -> None:
    takes_image = conditioned(manifest, image=Presence.REQUIRED)
    request = replace(ASKED, width=None, height=None, image=IMAGE)
    assert resolve_request(request, takes_image, sizes=None).size == VideoSize(width=1344, height=672, num_frames=5)
    assert resolve_request(replace(ASKED, image=IMAGE), takes_image, sizes=None).size.width == 16


def test_a_video_gives_as_many_frames_as_make_whole_latent_frames(manifest: Manifest) -> None:
    takes_video = conditioned(manifest, video=Presence.OPTIONAL)
    job = resolve_request(replace(ASKED, video=VIDEO, num_frames=None, num_steps=10), takes_video, sizes=None)
    assert (job.size.num_frames, job.strength, job.skipped_steps) == (5, 0.8, 2)


def test_a_low_resolution_has_its_own_shift_where_the_variant_says_so(manifest: Manifest) -> None:
    defaults = replace(manifest.variant.defaults, low_resolution_shift=3.0)
    both = replace(manifest, variant=replace(manifest.variant, defaults=defaults))
    shifts = [resolve_request(replace(ASKED, width=width, height=480), both, sizes=None).shift for width in (832, 848)]
    assert shifts == [3.0, defaults.shift]
