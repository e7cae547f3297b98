"""Building: what is there is kept, what changed is rebuilt, and whatever stops a build, no half bundle is ever opened."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from torch import Tensor

from engines.store import BundleStore
from export.build import BuildEvent, BuildRequest, build_bundle
from export.checkpoint import open_checkpoint
from export.pack import pack_plan
from runtime.bundle import open_bundle
from runtime.errors import BuildError, BundleError
from runtime.inspection import verify_bundle
from runtime.stages import network_blocks, network_components, network_stages, networks
from runtime.weights import map_safetensors
from tests.conftest import Refuses, Toy, Wanrt
from tests.test_video import file_size_limit
from tests.toys import NARROW_TOY, edit_tensors, make_original_checkpoint

ROOT = Path(__file__).parents[1]
HIGH_NOISE = "high_noise_model/diffusion_pytorch_model.safetensors"


@pytest.fixture
def bundle(two_experts: Toy, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_experts.original, tmp_path / "bundle"))


@pytest.fixture
def checkpoint(two_experts: Toy, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_experts.original_checkpoint, tmp_path / "original"))  # its name is in the manifest


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same architecture: all engines are kept, all weights are packed anew."""
    return make_original_checkpoint(tmp_path_factory.mktemp("other") / "checkpoint", config=NARROW_TOY, seed=9, experts=2)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_identical_build_does_nothing_and_says_so(wanrt: Wanrt, bundle: Path, checkpoint: Path) -> None:
    before = contents(bundle)
    out, err = wanrt("build-engines", checkpoint, "--out", bundle)
    assert out == f"{bundle}\n"
    assert "nothing to do" in err and "0 built" in err
    summary = json.loads(wanrt("build-engines", checkpoint, "--out", bundle, "--json")[0])
    assert (summary["unchanged"], summary["num_built"]) == (True, 0)
    assert contents(bundle) == before


def test_a_changed_file_rebuilds_its_own_weights_only(bundle: Path, checkpoint: Path) -> None:
    def negate(tensors: dict[str, Tensor]) -> None:
        tensors["head.head.bias"] = -tensors["head.head.bias"]

    edit_tensors(checkpoint / HIGH_NOISE, negate)
    before = contents(bundle)
    events: list[BuildEvent] = []
    summary = build_bundle(BuildRequest(out=bundle, checkpoint=checkpoint), on_event=events.append)
    built = {event.artefact for event in events if not event.reused}
    assert built == {"weights/fp32/transformer_high_noise.safetensors"}
    assert (summary.num_built, summary.unchanged) == (1, False)
    assert {path for path, state in contents(bundle).items() if state != before[path]} == {*built, "manifest.json"}
    verify_bundle(bundle)


def test_a_damaged_size_is_noticed_and_repaired(bundle: Path, checkpoint: Path) -> None:
    vae = bundle / "weights/fp32/vae.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1])
    assert build_bundle(BuildRequest(out=bundle, checkpoint=checkpoint)).num_built == 1
    verify_bundle(bundle)


# Builds in child processes that are killed, each before another of the renames by which files appear.
KILLED_BUILDS = """
import os, shutil, signal, sys
from pathlib import Path
from export.build import BuildRequest, build_bundle
folder, checkpoint, moments = Path(sys.argv[1]), Path(sys.argv[2]), map(int, sys.argv[3:])
for moment in moments:
    if os.fork() == 0:
        rename, left = os.replace, [moment]
        def replace(*places):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*places)
        os.replace = replace
        build_bundle(BuildRequest(out=folder / str(moment), checkpoint=checkpoint))
        os._exit(0)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
"""


def test_a_build_killed_at_any_moment_is_continued_and_never_opened(
    bundle: Path, other_checkpoint: Path, tmp_path: Path, refuses: Refuses
) -> None:
    moments = (1, 2, 3, 4, 8, 16, 17)  # journal, journal, a file, journal, …, the last file, manifest
    for moment in moments:
        shutil.copytree(bundle, tmp_path / str(moment))
    command = [sys.executable, "-c", KILLED_BUILDS, str(tmp_path), str(other_checkpoint), *map(str, moments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    build_bundle(BuildRequest(out=bundle, checkpoint=other_checkpoint))
    whole = open_bundle(bundle).manifest
    for moment in moments:
        folder = tmp_path / str(moment)
        if moment == 1:
            verify_bundle(folder)  # nothing was touched yet
        else:
            refuses("inspect", folder, code=5, message="an unfinished build")
        finished = build_bundle(BuildRequest(out=folder, checkpoint=other_checkpoint))
        assert open_bundle(folder).manifest == whole
        verify_bundle(folder)
        assert contents(folder).keys() == contents(bundle).keys()
        assert finished.num_built == {1: 5, 2: 5, 3: 5, 4: 5, 8: 3, 16: 1, 17: 0}[moment]


def test_an_interrupted_build_says_that_it_continues(
    command_line: Callable[..., tuple[int, str, str]],
    wanrt: Wanrt,
    bundle: Path,
    other_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("export.pack._write", interrupt)
        status, out, err = command_line("build-engines", other_checkpoint, "--out", bundle)
    assert (status, out) == (130, "")
    assert "cancelled" in err and "the same command continues" in err
    assert not list(bundle.rglob("*.partial"))
    assert "5 built" in wanrt("build-engines", other_checkpoint, "--out", bundle)[1]
    verify_bundle(bundle)


def test_a_full_disk_is_a_build_error_that_can_be_continued(refuses: Refuses, bundle: Path, other_checkpoint: Path) -> None:
    with file_size_limit(100_000):
        refuses("build-engines", other_checkpoint, "--out", bundle, code=4, message="could not be written: File too large")
    assert not list(bundle.rglob("*.partial"))
    with pytest.raises(BundleError, match="unfinished"):
        open_bundle(bundle)
    build_bundle(BuildRequest(out=bundle, checkpoint=other_checkpoint))
    verify_bundle(bundle)


@pytest.mark.parametrize("out", ["/proc/bundle", "file", "file/bundle"])
def test_a_place_that_cannot_be_written_is_a_build_error(refuses: Refuses, checkpoint: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("precious")
    refuses("build-engines", checkpoint, "--out", tmp_path / out, code=4, message="cannot be written")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "names", [("thesis.tex",), ("manifest.json", "extension.js", "a.partial"), ("engines", "build.json", "x")]
)
def test_a_folder_of_other_things_is_left_alone(
    refuses: Refuses, checkpoint: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
    refuses("build-engines", checkpoint, "--out", folder, code=4, message="is not a bundle")
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--engines-only",), 2, "no variant named; there is wan2.1"),
        (("--engines-only", "--variant", "wan9"), 2, "variant 'wan9': there is wan2.1"),
        (("CHECKPOINT", "--engines-only", "--variant", "wan2.1-t2v-1.3b"), 2, "takes no checkpoint"),
        ((), 2, "no checkpoint given"),
        (("CHECKPOINT", "--target", "abacus"), 2, "target 'abacus': there is"),
        (("CHECKPOINT", "--target", "cpu", "--target", "abacus"), 2, "target 'abacus': there is"),
        (("CHECKPOINT", "--precision", "fp8"), 2, "precision fp8: target cpu has fp32"),
        (("CHECKPOINT", "--precision", "int4"), 2, "--precision: invalid choice"),
        (("CHECKPOINT", "--size", "64x64..32x32"), 2, "the range is empty"),
        (("CHECKPOINT", "--size", ""), 2, "expected numbers"),
        (("CHECKPOINT", "--frames", "many"), 2, "'many' is not a whole number"),
        (("CHECKPOINT", "--variant", "wan9"), 3, "variant 'wan9': there is wan2.1"),
        (("CHECKPOINT", "--variant", "wan2.1-t2v-1.3b"), 3, "which is not wan2.1-t2v-1.3b"),
    ],
)
def test_a_build_that_cannot_be_is_refused_and_leaves_nothing(
    refuses: Refuses, two_experts: Toy, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    named = [str(two_experts.original_checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    refuses("build-engines", *named, "--out", tmp_path / "bundle", code=code, message=message)
    assert list(tmp_path.iterdir()) == []


def write(text: str) -> Callable[[Path], None]:
    def build(file: Path) -> None:
        file.write_text(text)

    return build


def test_two_builds_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    with BundleStore(tmp_path) as first, BundleStore(tmp_path) as second:
        first.artefact("engines/a", key="1", build=write("first"))
        with pytest.raises(BuildError, match="another build is writing it"):
            second.artefact("engines/a", key="2", build=write("second"))
    assert (tmp_path / "engines/a").read_text() == "first"
    with BundleStore(tmp_path) as third:
        assert third.has("engines/a", key="1")


def test_a_journal_from_a_stranger_cannot_name_files_outside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "precious").write_text("precious")
    file = {"path": "../precious", "bytes": 8, "sha256": "", "key": "1"}
    journal = {"artefacts": {"../precious": {"file": file, "tensors": {}}}}
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "build.json").write_text(json.dumps(journal))
    with BundleStore(tmp_path / "bundle") as store:
        assert not store.has("../precious", key="1")
    assert "leaves the bundle's folder" in caplog.text


def test_an_artefact_that_fails_leaves_no_partial_file_and_forgets_the_old_one(tmp_path: Path) -> None:
    def fail(file: Path) -> None:
        file.write_text("half")
        raise ZeroDivisionError

    with BundleStore(tmp_path) as store:
        store.artefact("a", key="1", build=write("old"))
        with pytest.raises(ZeroDivisionError):
            store.artefact("a", key="2", build=fail)
    assert not list(tmp_path.glob("*.partial"))
    with BundleStore(tmp_path) as store:
        assert not store.has("a", key="1") and not store.has("a", key="2")


def test_every_tensor_is_packed_once(two_experts: Toy) -> None:
    others = {  # what a network leaves of its checkpoint file: the other half of the VAE, the table that the host reads
        "vae": ("encoder.", "conv1."),
        "vae_encoder": ("decoder.", "conv2."),
        "text_encoder": ("token_embedding.",),
    }
    with open_checkpoint(two_experts.original_checkpoint) as checkpoint:
        for network in networks(checkpoint.variant):
            plan = pack_plan(
                network_stages(checkpoint.variant, network), num_blocks=network_blocks(checkpoint.variant, network)
            )
            packed = [source for tensor in plan for source in tensor.sources]
            assert len(set(packed)) == len(packed)
            for component in network_components(checkpoint.variant, network):
                names = set(checkpoint.components[component].names())
                assert set(packed) == {name for name in names if not name.startswith(others.get(network, ()))}


def test_hashes_are_those_of_every_file_and_tensor(two_experts: Toy) -> None:
    bundle = open_bundle(two_experts.original)
    verify_bundle(two_experts.original)
    for files in bundle.manifest.weights.values():
        for weights in files.values():
            tensors = map_safetensors(bundle.file(weights.file))
            assert weights.tensors == {name: hashlib.sha256(tensor.tobytes()).hexdigest() for name, tensor in tensors.items()}


# Packs a component of many tensors that are made when they are read; says by how many bytes the process grew over packing one.
PACK = """
import resource, sys
from pathlib import Path
import torch
from export.pack import PackedTensor, write_weights
from runtime.specs import DType

class Source:
    def shape(self, name): return (1024, 2560)
    def read(self, name): return torch.full((1024, 2560), 0.5)

plan = [PackedTensor(f"blocks.{i}.weight", (f"blocks.{i}.weight",), (1024, 2560), DType.F32) for i in range(20)]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
write_weights(Source(), plan[:1], Path(sys.argv[1]))
before = peak()
write_weights(Source(), plan, Path(sys.argv[1]))
print(peak() - before)
"""


def test_packing_200_megabytes_takes_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    done = subprocess.run([sys.executable, "-c", PACK, str(file)], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert file.stat().st_size > 200e6
    assert int(done.stdout) < 40e6  # four tensors of 10 MB; measured 0-11 MB


@pytest.mark.slow
def test_engines_of_the_two_14b_experts_build_small_and_without_their_weights(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "cli.py"), "build-engines", "--engines-only", "--variant", "wan2.2-t2v-a14b"]
    done = subprocess.run([*command, "--out", str(tmp_path / "bundle"), "--json"], capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert summary["engine_bytes"] < 20e6
    assert summary["weight_bytes"] == 0
    if summary["peak_memory_bytes"] is not None:
        assert summary["peak_memory_bytes"] < 4 << 30


def test_a_target_whose_tools_are_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    arguments = ("build-engines", "--engines-only", "--variant", "wan2.1-t2v-1.3b", "--target", "cuda")
    refuses(
        *arguments, "--out", tmp_path / "bundle", code=4, message=r"target cuda is built with torch, which is not installed"
    )
