"""Bundles from strangers, through `wanrt run` and `wanrt inspect`: whatever is wrong is said, nothing is written, nothing crashes."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.variants import ImageEncoderArch
from tests.conftest import RUN, Refuses, Toy, Wanrt

Manifest = dict[str, Any]
EXPERT = "weights/fp32/transformer_high_noise.safetensors"


@pytest.fixture
def bundle(two_experts: Toy, tmp_path: Path) -> Path:
    """A bundle of the test's own, to be damaged."""
    return Path(shutil.copytree(two_experts.original, tmp_path / "bundle"))


@pytest.fixture
def run_refuses(refuses: Refuses, tmp_path: Path) -> Callable[..., None]:
    """`wanrt run` refuses and leaves an earlier video and its folder as they were."""

    def check(bundle: Path, *, message: str, code: int = 5) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "video.npy").write_text("precious")
        refuses("run", bundle, *RUN, "--out", out / "video.npy", code=code, message=message)
        assert [path.name for path in out.iterdir()] == ["video.npy"]
        assert (out / "video.npy").read_text() == "precious"

    return check


def edit_manifest(bundle: Path, edit: Callable[[Manifest], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    edit(manifest)
    path.write_text(json.dumps(manifest))


def artefacts(value: Any) -> list[dict[str, Any]]:
    """Every artefact of a parsed manifest: what has a path."""
    if not isinstance(value, dict):
        return []
    return [value] if "path" in value else [found for item in value.values() for found in artefacts(item)]


def forge(bundle: Path, path: str, content: bytes) -> None:
    """Replace a file and make the manifest agree with it, as a stranger would."""
    (bundle / path).write_bytes(content)

    def edit(manifest: Manifest) -> None:
        (entry,) = (entry for entry in artefacts(manifest) if entry["path"] == path)
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    edit_manifest(bundle, edit)


def rename(bundle: Path, path: str, new: str) -> None:
    """Make the manifest name a file by another path."""
    edit_manifest(bundle, lambda manifest: [entry.update(path=new) for entry in artefacts(manifest) if entry["path"] == path])


def test_a_folder_that_is_not_there_is_refused(run_refuses: Callable[..., None], tmp_path: Path) -> None:
    run_refuses(tmp_path / "nowhere", message="no such bundle folder")


def test_a_folder_of_other_things_is_no_bundle(run_refuses: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    run_refuses(tmp_path / "photos", message="not a bundle")


def test_an_unfinished_build_says_so(run_refuses: Callable[..., None], bundle: Path) -> None:
    (bundle / "manifest.json").rename(bundle / "build.json")
    run_refuses(bundle, message="an unfinished build")


def test_engines_without_weights_say_so(run_refuses: Callable[..., None], bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(weights={}, tokenizer=None))
    run_refuses(bundle, message="engines only, without weights")


@pytest.mark.parametrize("component", ["text_encoder", "transformer_low_noise", "vae"])
def test_a_component_without_weights_is_named(run_refuses: Callable[..., None], bundle: Path, component: str) -> None:
    edit_manifest(bundle, lambda manifest: manifest["weights"]["fp32"].pop(component))
    run_refuses(bundle, message=f"without fp32 weights of {component}")


def test_a_stage_without_engine_is_named(run_refuses: Callable[..., None], bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["targets"]["cpu"]["engines"].pop("vae.decode_high_step"))
    run_refuses(bundle, message="no engine for vae.decode_high_step")


@pytest.mark.parametrize(
    ("mangle", "message"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: b"", "not JSON"),
        (lambda text: b"[" * 200_000, "not JSON"),
        (lambda text: b'{"a":' * 200_000, "not JSON"),
        (lambda text: b"9" * 10_000, "not JSON"),
        (lambda text: b"\xff\xfe" + text, "not UTF-8"),
        (lambda text: b"null", "expected dict, got NoneType"),
        (lambda text: b"[]", "expected dict, got list"),
        (lambda text: text.replace(b'"fps": 16', b'"fps": NaN'), "NaN is not a number"),
        (lambda text: text.replace(b'"shift": 12.0', b'"shift": -Infinity'), "-Infinity is not a number"),
        (lambda text: text.replace(b'"shift": 12.0', b'"shift": 1e999'), "1e999 is not a number"),
        (lambda text: text.replace(b'"shift": 12.0', b'"shift": 1' + b"0" * 400), "the number is too large"),
        (lambda text: text.replace(b'"fps": 16', b'"fps": 16, "fps": 16'), "'fps' is there twice"),
        (lambda text: text.replace(b'"source": "', b'"source": "\\ud800'), "not Unicode text"),
    ],
)
def test_a_manifest_that_is_no_clean_json_is_refused(
    run_refuses: Callable[..., None], bundle: Path, mangle: Callable[[bytes], bytes], message: str
) -> None:
    text = (bundle / "manifest.json").read_bytes()
    assert mangle(text) != text
    (bundle / "manifest.json").write_bytes(mangle(text))
    run_refuses(bundle, message=message)


def test_a_manifest_of_gigabytes_is_not_even_read(run_refuses: Callable[..., None], bundle: Path) -> None:
    with (bundle / "manifest.json").open("r+b") as file:
        file.truncate(8 << 30)  # sparse
    run_refuses(bundle, message="a manifest has at most")


def set_arch(network: str, **numbers: Any) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["variant"][network].update(numbers)


CLIP = dataclasses.asdict(ImageEncoderArch(dim=32, ffn_dim=44, num_layers=3, image_size=28, patch_size=7))


def set_conditioning(**values: Any) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["variant"]["conditioning"].update(values)


def set_default(**values: Any) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["variant"]["defaults"].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda manifest: manifest.update(schema_version=manifest["schema_version"] + 1), "schema version"),
        (lambda manifest: manifest.update(schema_version="1"), "schema_version: expected int"),
        (lambda manifest: manifest.update(schema_version=True), "schema_version: expected int"),
        (lambda manifest: manifest.pop("schema_version"), "missing .'schema_version'."),
        (lambda manifest: manifest.pop("conventions"), "missing .'conventions'."),
        (lambda manifest: manifest.update(pickle="cos"), "unknown .'pickle'."),
        (lambda manifest: manifest.update(conventions="mine"), "conventions: expected one of"),
        (lambda manifest: manifest.update(targets={}), "holds no target"),
        (lambda manifest: manifest["targets"]["cpu"]["precisions"].pop("vae"), "target cpu: states the precision of"),
        (lambda manifest: manifest["fp8_wide"].update(last_blocks=2**40), "fp8_wide: 0 first and .* one at least must be fp8"),
        (lambda manifest: manifest["fp8_wide"].update(products=["\x1b[2J"]), "fp8_wide: product '.x1b.2J'"),
        (lambda manifest: manifest["variant"].update(name="\x1b[2Jwan"), "is not a name"),
        (lambda manifest: manifest["variant"].update(experts=[]), "experts must be named"),
        (lambda manifest: manifest["variant"]["experts"].append(manifest["variant"]["experts"][0]), "each once"),
        (lambda manifest: manifest["tokenizer"].update(bytes=-1), "-1 bytes"),
        (set_arch("transformer", num_heads=0), "not a size"),
        (set_arch("transformer", num_heads=3), "does not split into 3 heads"),
        (set_arch("transformer", dim=-16), "not a size"),
        (set_arch("transformer", num_layers=2**40), "not a size"),
        (set_arch("transformer", num_layers=1.5), "num_layers: expected int, got float"),
        (set_arch("transformer", patch_size=[1, 2]), "expected 3 items, got 2"),
        (set_arch("transformer", patch_size=[2, 2, 2]), "no Wan model joins frames"),
        (set_arch("transformer", freq_dim=33), "33 time features"),
        (set_arch("transformer", text_dim=21), "the transformer takes 21"),
        (set_arch("text_encoder", num_buckets=2), "2 position buckets"),
        (set_arch("text_encoder", max_distance=8), "distances up to 8"),
        (set_arch("text_encoder", num_layers=100_000), "not a size"),
        (set_arch("vae", num_res_blocks=1 << 20), "not a size"),
        (set_arch("vae", dim_mult=[]), "a VAE with widths"),
        (set_arch("vae", dim_mult=[1] * 64), "a VAE with widths"),
        (set_arch("vae", temporal_downsample=[True]), "time flags"),
        (set_arch("vae", latents_std=[0.0] * 16), "not positive numbers"),
        (set_arch("vae", latents_mean=[1e300] * 16), "not of usual size"),
        (set_arch("vae", latents_mean=[0.0]), "must have 16 values"),
        (set_arch("vae", patch_size=64), "folds squares of 64 pixels"),
        (set_arch("vae", residual_levels=True, dim_mult=[1, 2, 4, 8]), "a VAE with no average over 1 places"),
        (set_default(fps=0), "0 frames a second"),
        (set_default(fps=2**40), "frames a second"),
        (set_default(scheduler="magic"), "scheduler 'magic'"),
        (set_conditioning(image="maybe"), "expected one of"),
        (set_conditioning(image="required"), "do not fit latents of 16 and 20 for images"),
        (set_conditioning(image="optional", image_use="first_frame"), "needs a timestep per token"),
        (set_arch("transformer", image_dim=32, image_tokens=17), "no image encoder"),
        (set_arch("transformer", image_tokens=-1), "image_tokens=-1"),
        (lambda manifest: manifest["variant"].update(image_encoder=CLIP), "not always the same number of images"),
        (lambda manifest: manifest["variant"].update(image_encoder={**CLIP, "num_heads": 5}), "not an image encoder"),
        (lambda manifest: manifest["variant"].update(image_encoder={**CLIP, "num_layers": 2**40}), "not a size of any network"),
    ],
)
def test_a_manifest_that_no_build_writes_is_refused(
    run_refuses: Callable[..., None], bundle: Path, edit: Callable[[Manifest], object], message: str
) -> None:
    edit_manifest(bundle, edit)
    run_refuses(bundle, message=message)


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "weights/../../outside", "..\\outside", "C:outside", "", ".", "a\0b", "a\nb"]
)
def test_a_path_that_leaves_the_folder_is_refused(run_refuses: Callable[..., None], bundle: Path, path: str) -> None:
    shutil.copy(bundle / EXPERT, bundle.parent / "outside")
    rename(bundle, EXPERT, path)
    run_refuses(bundle, message="leaves the bundle's folder")


def test_a_path_too_long_for_the_system_is_refused(run_refuses: Callable[..., None], bundle: Path) -> None:
    rename(bundle, EXPERT, "x" * 5000)
    run_refuses(bundle, message="cannot be reached")


@pytest.mark.parametrize("linked", [EXPERT, "weights"])
def test_a_link_out_of_the_folder_is_refused(run_refuses: Callable[..., None], bundle: Path, linked: str) -> None:
    shutil.move(bundle / linked, bundle.parent / "outside")
    (bundle / linked).symlink_to(bundle.parent / "outside")
    run_refuses(bundle, message="leaves the bundle's folder through a link")


def test_a_link_to_itself_is_refused(run_refuses: Callable[..., None], bundle: Path) -> None:
    (bundle / EXPERT).unlink()
    (bundle / EXPERT).symlink_to(bundle / EXPERT)
    run_refuses(bundle, message=f"{EXPERT}: (cannot be reached|missing)")


def test_a_bundle_reached_through_a_link_is_fine(wanrt: Wanrt, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    assert "can run here   yes" in wanrt("inspect", tmp_path / "link")[0]


@pytest.mark.parametrize("path", [EXPERT, "tokenizer.json", "engines/cpu/transformer.head.onnx"])
def test_a_missing_or_cut_file_is_named_with_both_sizes(
    refuses: Refuses, run_refuses: Callable[..., None], bundle: Path, path: str
) -> None:
    whole = (bundle / path).read_bytes()
    (bundle / path).write_bytes(whole[:-1])
    run_refuses(bundle, message=f"{path}: {len(whole) - 1} bytes, the manifest says {len(whole)} bytes")
    (bundle / path).unlink()
    refuses("inspect", bundle, code=5, message=f"{path}: missing")


@pytest.mark.parametrize("path", [EXPERT, "tokenizer.json", "engines/cpu/transformer.head.onnx"])
def test_verify_finds_one_flipped_bit(wanrt: Wanrt, refuses: Refuses, bundle: Path, path: str) -> None:
    assert "all match" in wanrt("inspect", bundle, "--verify")[0]
    content = bytearray((bundle / path).read_bytes())
    content[-1] ^= 1
    (bundle / path).write_bytes(content)
    refuses("inspect", bundle, "--verify", code=5, message=f"{path}: SHA-256 is")


@pytest.mark.parametrize("path", ["tokenizer.json", "engines/cpu/transformer.head.onnx"])
def test_running_checks_the_hashes_of_engines_and_tokenizer(run_refuses: Callable[..., None], bundle: Path, path: str) -> None:
    content = bytearray((bundle / path).read_bytes())
    content[-1] ^= 1
    (bundle / path).write_bytes(content)
    run_refuses(bundle, message=f"{path}: SHA-256 is")


def test_an_engine_of_garbage_is_an_engine_error(run_refuses: Callable[..., None], bundle: Path) -> None:
    forge(bundle, "engines/cpu/transformer.head.onnx", np.random.default_rng(0).bytes(5000))
    run_refuses(bundle, message="transformer.head: .* cannot open", code=6)


def test_an_engine_of_another_stage_is_an_engine_error(run_refuses: Callable[..., None], bundle: Path) -> None:
    forge(bundle, "engines/cpu/transformer.head.onnx", (bundle / "engines/cpu/transformer.embed.onnx").read_bytes())
    run_refuses(bundle, message="transformer.head: the engine has .*, this bundle's architecture needs", code=6)


def test_an_engine_whose_output_has_another_size_is_an_engine_error(run_refuses: Callable[..., None], bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = "engines/cpu/transformer.attention.onnx"
    model = onnx.load_from_string((bundle / path).read_bytes())
    del model.graph.node[:], model.functions[:]
    model.graph.node.append(onnx.helper.make_node("Concat", ["query", "key"], ["attention_output"], axis=0))
    forge(bundle, path, model.SerializeToString())
    run_refuses(bundle, message="transformer.attention: attention_output came out as", code=6)


def test_an_engine_cannot_read_files_outside_the_bundle(run_refuses: Callable[..., None], bundle: Path) -> None:
    onnx = pytest.importorskip("onnx")
    (bundle.parent / "secret").write_bytes(bytes(64))
    path = "engines/cpu/transformer.attention.onnx"
    model = onnx.load_from_string((bundle / path).read_bytes())
    stolen = onnx.TensorProto(name="stolen", data_type=onnx.TensorProto.FLOAT, dims=[16], data_location="EXTERNAL")
    for key, value in (("location", "../../../secret"), ("offset", "0"), ("length", "64")):
        stolen.external_data.add(key=key, value=value)
    del model.graph.node[:], model.functions[:]
    model.graph.initializer.append(stolen)
    model.graph.node.append(onnx.helper.make_node("Add", ["query", "stolen"], ["attention_output"]))
    forge(bundle, path, model.SerializeToString())
    run_refuses(bundle, message="transformer.attention: .* cannot open", code=6)


def test_a_tokenizer_of_garbage_is_refused(run_refuses: Callable[..., None], bundle: Path) -> None:
    forge(bundle, "tokenizer.json", b'{"version": "1.0", "model": {"type": "Unigram", "vocab": 5}}')
    run_refuses(bundle, message="tokenizer.json cannot be read as a tokenizer")


def test_a_bundle_for_other_machines_only_is_an_engine_error(run_refuses: Callable[..., None], bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(targets={"elsewhere": manifest["targets"]["cpu"]}))
    run_refuses(bundle, message="this machine runs none of its targets: elsewhere", code=6)


def test_weights_that_are_not_numbers_stop_the_run(run_refuses: Callable[..., None], bundle: Path) -> None:
    content = bytearray((bundle / EXPERT).read_bytes())
    content[-4:] = np.array(np.nan, "<f4").tobytes()
    forge(bundle, EXPERT, bytes(content))
    run_refuses(bundle, message="transformer_high_noise: the latents are no longer finite after step 1 of 2", code=6)
