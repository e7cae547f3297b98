"""The moving shapes: scenes and captions, drawing, scoring, and the distances between videos."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.moving_shapes.grammar import WORDS, caption_of, claims_of
from benchmarks.moving_shapes.measure import Frames, measure
from benchmarks.moving_shapes.render import coverage, draw, scene_arrays, to_uint8
from benchmarks.moving_shapes.score import accuracy, score_clip
from benchmarks.moving_shapes.similarity import compare
from benchmarks.moving_shapes.tokenizer import MAX_TOKENS, PIECES, build_tokenizer, token_ids
from benchmarks.moving_shapes.world import SHAPES, ClipSize, Kind, Scene, sample_scene
from runtime.errors import RequestError
from runtime.variants import SHARED_NEGATIVE_PROMPT

SQUARE = ClipSize(width=64, height=64, num_frames=17)
SIZES = (SQUARE, ClipSize(width=96, height=64, num_frames=17), ClipSize(width=64, height=96, num_frames=33))


def frames_of(scene: Scene, size: ClipSize = SQUARE) -> Frames:
    frames: Frames = to_uint8(draw(scene_arrays([scene]), size))[0]
    return frames


# Scenes and captions


def test_a_seed_gives_one_scene_and_another_seed_another() -> None:
    assert sample_scene(3, SQUARE) == sample_scene(3, SQUARE) != sample_scene(4, SQUARE)


@pytest.mark.parametrize("kind", Kind)
def test_a_full_caption_says_what_its_scene_holds(kind: Kind) -> None:
    for seed in range(20):
        scene = sample_scene(seed, SQUARE, kind=kind)
        claim = claims_of(caption_of(scene))
        assert (claim.kind, claim.background) == (kind, scene.background)
        for said, thing in zip(claim.things, scene.things, strict=True):
            for name in ("shape", "colour", "size", "direction", "speed"):
                assert getattr(said, name) == getattr(thing, name)


def test_captions_leave_things_out_but_say_nothing_wrong() -> None:
    scene = sample_scene(0, SQUARE, kind=Kind.PAIR)
    captions = {caption_of(scene, seed=seed) for seed in range(50)}
    assert len(captions) > 10
    for claim in map(claims_of, captions):
        assert [thing.direction for thing in claim.things] == [thing.direction for thing in scene.things]
        assert claim.background in (None, scene.background)


def test_what_the_grammar_does_not_have_is_refused() -> None:
    assert claims_of("A red  circle moves right").things[0].colour == "red"
    for caption in ("", "a fox runs", "a red circle moves", "a red circle moves right on a blue floor"):
        with pytest.raises(RequestError, match="not a caption of moving shapes"):
            claims_of(caption)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_shapes_stay_inside_the_frame(size: ClipSize) -> None:
    for seed in range(40):
        arrays = scene_arrays([sample_scene(seed, size)])
        for k in range(2):
            covered = coverage(arrays.shape[:, k], arrays.radius[:, k], arrays.track[:, k], size)[0].sum(axis=(1, 2))
            area = np.pi * max(0.0, arrays.radius[0, k] * min(size.width, size.height)) ** 2
            assert np.all(np.abs(covered - area) <= 0.05 * area + 1)


def test_numpy_and_torch_draw_the_same() -> None:
    import torch

    scenes = scene_arrays([sample_scene(seed, SQUARE) for seed in range(4)])
    drawn = draw(scenes.to_torch("cpu"), SQUARE, xp=torch)
    assert drawn.shape == (4, 3, 17, 64, 64)
    assert np.abs(drawn.numpy() - draw(scenes, SQUARE)).max() < 1e-5


# The scorer


def test_the_scorer_is_right_about_the_generators_clips() -> None:
    scores = []
    for size in SIZES:
        for seed in range(100 if size == SQUARE else 25):
            scene = sample_scene(seed, size)
            scores.append(score_clip(frames_of(scene, size), caption_of(scene)))
    shares = accuracy(scores)
    assert min(shares.values()) >= 0.99
    assert set(shares) == {
        "background", "count", "colour", "shape", "size", "direction", "speed", "event", "steady", "all",
    }  # fmt: skip


def noise(frames: Frames) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, frames.shape, dtype=np.uint8)


def frozen(frames: Frames) -> NDArray[np.uint8]:
    return np.repeat(frames[:1], len(frames), axis=0)


def one_frame_inverted(frames: Frames) -> NDArray[np.uint8]:
    return np.concatenate((frames[:8], 255 - frames[8:9], frames[9:]))


def jumping(frames: Frames) -> NDArray[np.uint8]:
    return np.concatenate((frames[::2], frames[1::2]))


def blank(frames: Frames) -> NDArray[np.uint8]:
    return np.full_like(frames, 128)


@pytest.mark.parametrize("broken", [noise, frozen, one_frame_inverted, jumping, blank])
def test_the_scorer_rejects_broken_clips(broken: object) -> None:
    assert callable(broken)
    for seed in range(15):
        scene = sample_scene(seed, SQUARE)
        assert not score_clip(broken(frames_of(scene)), caption_of(scene)).obeys


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"rgb": (44.0, 150.0, 64.0)}, "colour"),
        ({"shape": "cross"}, "shape"),
        ({"radius": 0.09}, "size"),
        ({"track": tuple((0.5, 0.3 + 0.018 * frame) for frame in range(17))}, "direction"),
        ({"track": tuple((0.3 + 0.007 * frame, 0.5) for frame in range(17))}, "speed"),
    ],
)
def test_each_attribute_that_is_wrong_is_named(changes: dict[str, object], wrong: str) -> None:
    scene = sample_scene(0, SQUARE, kind=Kind.SINGLE)
    thing = replace(
        scene.things[0], shape="circle", colour="red", size="large", direction="right", speed="quickly",
        rgb=(214.0, 40.0, 40.0), radius=0.18, track=tuple((0.3 + 0.018 * frame, 0.5) for frame in range(17)),
    )  # fmt: skip
    scene = replace(scene, background="blue", background_rgb=(36.0, 72.0, 200.0), things=(thing,))
    caption = "a large red circle moves quickly right on a blue background"
    assert caption_of(scene) == caption
    assert score_clip(frames_of(scene), caption).obeys
    changed = replace(scene, things=(replace(thing, **changes),))  # type: ignore[arg-type]
    right = score_clip(frames_of(changed), caption).right
    assert [name for name, holds in right.items() if not holds] == [wrong]


@pytest.mark.parametrize(("kind", "other"), [(Kind.IN_FRONT, Kind.BEHIND), (Kind.BOUNCE, Kind.SINGLE)])
def test_an_event_that_does_not_happen_is_wrong(kind: Kind, other: Kind) -> None:
    scene = next(
        s for s in (sample_scene(seed, SQUARE, kind=kind) for seed in range(30)) if all(t.size == "medium" for t in s.things)
    )
    happens = frames_of(scene)
    if other is Kind.SINGLE:
        measured = measure(happens).things[0]
        assert measured.bounces
        straight = replace(scene.things[0], track=tuple((0.3 + 0.01 * frame, 0.5) for frame in range(17)))
        does_not = frames_of(replace(scene, things=(straight,)))
    else:
        does_not = frames_of(replace(scene, kind=other))
    caption = caption_of(scene)
    assert score_clip(happens, caption).right["event"]
    assert not score_clip(does_not, caption).right["event"]


# Distances


def test_equal_videos_have_no_distance_and_worse_ones_more() -> None:
    frames = frames_of(sample_scene(0, SQUARE))[:5]
    random = np.random.default_rng(0)
    slight, heavy = ((frames + random.normal(0, sigma, frames.shape)).clip(0, 255).astype(np.uint8) for sigma in (4, 40))
    same, near, far = (compare(video, frames) for video in (frames, slight, heavy))
    assert (same.psnr_db, same.feature_distance) == (float("inf"), 0.0)
    assert same.ssim == pytest.approx(1.0)
    assert same.psnr_db > near.psnr_db > far.psnr_db
    assert same.ssim > near.ssim > far.ssim
    assert same.feature_distance < near.feature_distance < far.feature_distance
    with pytest.raises(ValueError, match="videos of"):
        compare(frames, frames[:1])


def test_psnr_and_ssim_of_a_constant_offset_are_those_of_the_formulas() -> None:
    dark, light = np.full((1, 32, 32, 3), 100, np.uint8), np.full((1, 32, 32, 3), 110, np.uint8)
    result = compare(dark, light)
    assert result.psnr_db == pytest.approx(20 * np.log10(255 / 10))
    assert result.ssim == pytest.approx((2 * 100 * 110 + 2.55**2) / (100**2 + 110**2 + 2.55**2), rel=1e-5)


# The tokenizer


def test_every_word_of_the_grammar_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for word in WORDS:
        assert tokenizer.encode(word).tokens == [f"▁{word}", "</s>"]
    assert len(PIECES) == len({piece for piece, _ in PIECES})


def test_case_and_punctuation_do_not_matter_and_every_caption_fits() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.encode(" A red circle, moves RIGHT. ").ids == tokenizer.encode("a red circle moves right").ids
    captions = [caption_of(sample_scene(seed, SQUARE)) for seed in range(200)]
    ids, lengths = token_ids(tokenizer, [*captions, "", SHARED_NEGATIVE_PROMPT])
    assert ids.shape == (202, MAX_TOKENS)
    assert lengths[-2] == 1
    assert not (ids[:200] == 2).any()
    with pytest.raises(ValueError, match="more than 39"):
        token_ids(tokenizer, ["red " * 39])


def test_all_shapes_have_the_area_of_their_circle() -> None:
    size = ClipSize(width=64, height=64, num_frames=1)
    for index, name in enumerate(SHAPES):
        covered = coverage(np.array([index]), np.array([0.18]), np.full((1, 1, 2), 0.5), size).sum()
        assert covered == pytest.approx(np.pi * (0.18 * 64) ** 2, rel=0.02), name
