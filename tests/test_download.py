"""Hub ids become folders: the right files, in the right order, with progress, and every failure is an ExportError with a hint.

Hugging Face's real client runs against a hub of a few lines on this machine; ModelScope's is replaced.
"""

import errno
import json
import sys
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from export.download import DownloadEvent, Hub, resolve_checkpoint
from runtime.errors import ExportError

T2V = json.dumps({"model_type": "t2v"})
PIPELINE = json.dumps({"_class_name": "WanPipeline"})
UNWANTED = {
    "README.md": "",
    "assets/logo.png": "",
    "examples/a.mp4": "",
    ".gitattributes": "",
    "xlm-roberta-large/tokenizer.json": "",
    "google/umt5-xxl/spiece.model": "",
    "image_encoder/pytorch_model.bin": "",
    "tokenizer/spiece.model": "",
    "transformer/diffusion_pytorch_model.bin": "",
}
ORIGINAL = {
    "config.json": T2V,
    "diffusion_pytorch_model-00001-of-00002.safetensors": "first",
    "diffusion_pytorch_model-00002-of-00002.safetensors": "second shard",
    "diffusion_pytorch_model.safetensors.index.json": "{}",
    "models_t5_umt5-xxl-enc-bf16.pth": "t5" * 1000,
    "Wan2.1_VAE.pth": "vae",
    "google/umt5-xxl/tokenizer.json": "{}",
}
IMAGE_ORIGINAL = ORIGINAL | {
    "config.json": json.dumps({"model_type": "i2v"}),
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "clip",
}
TEXT_IMAGE_ORIGINAL = {name: text for name, text in ORIGINAL.items() if "VAE" not in name} | {
    "config.json": json.dumps({"model_type": "ti2v"}),
    "Wan2.2_VAE.pth": "vae",
}
PAIR = {
    **{f"{place}/config.json": T2V for place in ("high_noise_model", "low_noise_model")},
    "high_noise_model/diffusion_pytorch_model-00001-of-00001-bf16.safetensors": "high",
    "low_noise_model/diffusion_pytorch_model-00001-of-00001-bf16.safetensors": "low",
    "low_noise_model/diffusion_pytorch_model.safetensors.index.json": "{}",
    "models_t5_umt5-xxl-enc-bf16.pth": "t5",
    "Wan2.1_VAE.pth": "vae",
    "google/umt5-xxl/tokenizer.json": "{}",
}
DIFFUSERS = {
    "model_index.json": PIPELINE,
    "transformer/config.json": "{}",
    "transformer/diffusion_pytorch_model-00001-of-00001.safetensors": "high",
    "transformer/diffusion_pytorch_model.safetensors.index.json": "{}",
    "transformer_2/config.json": "{}",
    "transformer_2/diffusion_pytorch_model.safetensors": "low",
    "vae/config.json": "{}",
    "vae/diffusion_pytorch_model.safetensors": "vae",
    "text_encoder/config.json": "{}",
    "text_encoder/model-00001-of-00001.safetensors": "t5",
    "text_encoder/model.safetensors.index.json": "{}",
    "tokenizer/tokenizer.json": "{}",
    "scheduler/scheduler_config.json": "{}",
}


IMAGE_DIFFUSERS = DIFFUSERS | {
    "model_index.json": json.dumps({"_class_name": "WanImageToVideoPipeline"}),
    "image_encoder/config.json": "{}",
    "image_encoder/model.safetensors": "clip",
    "image_processor/preprocessor_config.json": "{}",
}
KINDS = {
    "original": ORIGINAL,
    "original with an image encoder": IMAGE_ORIGINAL,
    "original with the other VAE": TEXT_IMAGE_ORIGINAL,
    "pair": PAIR,
    "diffusers": DIFFUSERS,
    "diffusers with an image encoder": IMAGE_DIFFUSERS,
}


class _Hub(BaseHTTPRequestHandler):
    """As much of a hub as downloading needs: a repository's list of files, and the files."""

    files: dict[str, str]
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        entries = [
            {"type": "file", "path": name, "rfilename": name, "size": len(text), "oid": name}
            for name, text in self.files.items()
        ]
        name = path.partition("/resolve/")[2].partition("/")[2]
        if not path.removeprefix("/api/models").startswith("/Wan-AI/Toy"):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            self._send(200, json.dumps(entries).encode())
        elif name in self.files:
            self.asked.append(f"{self.command} {name}")
            self._send(200, self.files[name].encode(), {"ETag": f'"{name}"', "X-Repo-Commit": "c" * 40})
        elif path.startswith("/api/models/"):
            self._send(200, json.dumps({"id": "Wan-AI/Toy", "sha": "c" * 40, "siblings": entries}).encode())
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], list[str]]]:
    """Publish files as the repository Wan-AI/Toy; returns the list that collects what is asked for."""
    servers = []

    def publish(files: dict[str, str]) -> list[str]:
        asked: list[str] = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"files": files, "asked": asked}))
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        return asked

    yield publish
    for server in servers:
        server.shutdown()
        server.server_close()


def _held(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_files_needed_are_downloaded(kind: str, serve: Callable[[dict[str, str]], list[str]], tmp_path: Path) -> None:
    serve(KINDS[kind] | UNWANTED)
    folder = resolve_checkpoint("Wan-AI/Toy", cache=tmp_path)
    assert _held(folder) == KINDS[kind]


def test_progress_ends_at_the_size_of_what_was_downloaded(
    serve: Callable[[dict[str, str]], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    serve(ORIGINAL | UNWANTED)
    events: list[DownloadEvent] = []
    resolve_checkpoint("Wan-AI/Toy", cache=tmp_path, on_progress=events.append)
    weights = sum(len(text) for name, text in ORIGINAL.items() if name != "config.json")
    assert events[-1] == DownloadEvent(done_bytes=weights, total_bytes=weights)
    assert [event.done_bytes for event in events] == sorted(event.done_bytes for event in events)
    assert capfd.readouterr() == ("", "")


def test_files_already_there_are_not_downloaded_again(serve: Callable[[dict[str, str]], list[str]], tmp_path: Path) -> None:
    asked = serve(ORIGINAL)
    resolve_checkpoint("Wan-AI/Toy", cache=tmp_path)
    downloaded = [line for line in asked if line.startswith("GET")]
    assert len(downloaded) == len(ORIGINAL)
    resolve_checkpoint("Wan-AI/Toy", cache=tmp_path)
    assert [line for line in asked if line.startswith("GET")] == downloaded


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (ORIGINAL | {"config.json": json.dumps({"model_type": "s2v"})}, "speech-to-video"),
        (DIFFUSERS | {"model_index.json": json.dumps({"_class_name": "WanVACEPipeline"})}, "WanVACEPipeline"),
        ({"README.md": ""}, "the repository has neither"),
    ],
    ids=["original", "diffusers", "no model"],
)
def test_model_of_another_kind_is_refused_before_its_weights_are_downloaded(
    files: dict[str, str], words: str, serve: Callable[[dict[str, str]], list[str]], tmp_path: Path
) -> None:
    asked = serve(files)
    with pytest.raises(ExportError, match=words):
        resolve_checkpoint("Wan-AI/Toy", cache=tmp_path)
    assert not [line for line in asked if "safetensors" in line or ".pth" in line]


def test_unknown_repository_is_refused(serve: Callable[[dict[str, str]], list[str]], tmp_path: Path) -> None:
    serve(ORIGINAL)
    with pytest.raises(ExportError, match="neither a folder here nor a repository") as caught:
        resolve_checkpoint("Wan-AI/Nothing", cache=tmp_path)
    assert "spelling" in caught.value.hint


def test_hub_that_cannot_be_reached_is_an_export_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="huggingface did not deliver it") as caught:
        resolve_checkpoint("Wan-AI/Toy", cache=tmp_path)
    assert "network" in caught.value.hint


def test_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fill(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fill)
    with pytest.raises(ExportError, match="the disk is full"):
        resolve_checkpoint("Wan-AI/Toy", cache=tmp_path)


@pytest.mark.parametrize(
    ("hub", "module"), [(Hub.HUGGINGFACE, "huggingface_hub"), (Hub.MODELSCOPE, "modelscope.hub.snapshot_download")]
)
def test_missing_client_is_named_with_what_to_install(hub: Hub, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=f"the client of {hub} is not installed") as caught:
        resolve_checkpoint("Wan-AI/Toy", hub=hub)
    assert caught.value.hint.startswith("pip install")


def test_modelscope_downloads_the_same_files_with_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published = PAIR | UNWANTED
    events: list[DownloadEvent] = []

    def download(repository: str, *, allow_patterns: list[str], cache_dir: str, progress_callbacks: list[Any]) -> str:
        assert (repository, cache_dir) == ("Wan-AI/Toy", str(tmp_path))
        for name, text in published.items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns) and not (tmp_path / name).exists():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(text)
                for callback in [made(name, len(text)) for made in progress_callbacks]:
                    callback.update(len(text))
                    callback.end()
        return str(tmp_path)

    monkeypatch.setattr(import_module("modelscope.hub.snapshot_download"), "snapshot_download", download)
    folder = resolve_checkpoint("Wan-AI/Toy", hub=Hub.MODELSCOPE, cache=tmp_path, on_progress=events.append)
    assert _held(folder) == PAIR
    weights = sum(len(text) for name, text in PAIR.items() if not name.endswith("config.json"))
    assert events[-1] == DownloadEvent(done_bytes=weights, total_bytes=weights)


def test_modelscope_repository_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelscope_hub.errors import NotExistError

    def download(*_: object, **__: object) -> str:
        raise NotExistError("no such model", status_code=404)

    monkeypatch.setattr(import_module("modelscope.hub.snapshot_download"), "snapshot_download", download)
    with pytest.raises(ExportError, match="nor a repository that modelscope lets you read"):
        resolve_checkpoint("Wan-AI/Toy", hub=Hub.MODELSCOPE)


def test_folder_is_returned_as_it_is(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("where", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", "", "Wan AI/Toy", "../Toy"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ExportError, match="no such folder"):
        resolve_checkpoint(where)


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ExportError, match="a checkpoint is a folder"):
        resolve_checkpoint(str(tmp_path / "model.safetensors"))
