"""A component's tensors under their original names, whatever the files call them, and the check that they fit a layout."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from export.checkpoint.readers import DOWNLOAD_AGAIN, StoredTensor, TensorFile
from export.checkpoint.settings import SUPPORTED
from export.layouts import Shape, Table
from runtime.errors import ExportError
from runtime.specs import DType

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT_DTYPES = (DType.F32, DType.F16, DType.BF16, DType.F8_E4M3)
_SHOWN = 3
_MEANINGS = {
    "img_emb.": "image-to-video (CLIP image branch)",
    "condition_embedder.image_embedder.": "image-to-video (CLIP image branch)",
    "vace_": "VACE control",
    "ref_conv.": "reference control (Fun)",
    "control_adapter.": "camera control (Fun)",
    "casual_audio_encoder.": "speech-to-video (S2V)",
    "face_adapter.": "Animate",
    "decoder.block.": "a text encoder-decoder; only the encoder is used",
    "lora_unet_": "a LoRA",
}
"""What a tensor that a layout does not have says about its checkpoint, by how its name begins."""


class TensorSource:
    """A component's tensors in original naming, each read when asked for.

    Args:
        component: the name errors call it by, such as `transformer_low_noise`.
        files: the files that hold it, shards or one.
        names: original name of each stored name, or the names of those it holds joined along the first axis; a stored name that
            is not in it keeps its own.
        ignored: stored names that carry nothing, such as aliases.

    Raises:
        ExportError: two of the files hold the same tensor.
    """

    def __init__(
        self,
        component: str,
        files: Iterable[TensorFile],
        *,
        names: Mapping[str, str | tuple[str, ...]] | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        self.component = component
        self._files = tuple(files)
        self._stored: dict[str, StoredTensor] = {}
        for whole in (stored for file in self._files for stored in file.tensors if stored.name not in ignored):
            for name, stored in _parts(whole, (names or {}).get(whole.name, whole.name)):
                if name in self._stored:
                    places = f"{self._stored[name].file.path.name} and {stored.file.path.name}"
                    raise ExportError(
                        f"{component}: tensor {stored.name} is in both {places}; it may be stored only once",
                        hint="remove the file that does not belong to this checkpoint, or download it again",
                    )
                self._stored[name] = stored

    def names(self) -> tuple[str, ...]:
        """Every tensor's original name."""
        return tuple(self._stored)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor.

        Raises:
            ExportError: there is no such tensor.
        """
        return self._find(name).shape

    def dtype(self, name: str) -> DType:
        """Element type of a tensor as its file has it; one component may mix them.

        Raises:
            ExportError: there is no such tensor.
        """
        return DType(self._find(name).dtype)

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor is and what it is called there.

        Raises:
            ExportError: there is no such tensor.
        """
        return self._find(name)

    def read(self, name: str) -> "Tensor":
        """One tensor, in its stored dtype. It may view a file's mapping, which is released with it.

        Raises:
            ExportError: there is no such tensor, or its file changed or can no longer be read.
        """
        stored = self._find(name)
        tensor = stored.file.read(stored.name)
        if stored.parts > 1:
            tensor = tensor.chunk(stored.parts)[stored.part]
        if tuple(tensor.shape) != stored.shape:
            raise ExportError(
                f"{self.component}: {name} is now {list(tensor.shape)}, was {list(stored.shape)} when it was opened",
                hint=f"leave {stored.file.path.name} alone while it is being read",
            )
        return tensor

    def fingerprint(self) -> str:
        """Changes when a file that holds this component does: its name, size or time."""
        digest = hashlib.sha256()
        for file in self._files:
            status = file.path.stat()
            digest.update(f"{file.path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def close(self) -> None:
        """Release what the files keep in memory."""
        for file in self._files:
            file.close()

    def _find(self, name: str) -> StoredTensor:
        try:
            return self._stored[name]
        except KeyError:
            raise ExportError(f"{self.component}: tensor {name} is missing", hint=DOWNLOAD_AGAIN) from None


def check_component(source: TensorSource, table: Table) -> None:
    """Check that a source holds exactly the tensors of a layout.

    Raises:
        ExportError: a tensor is missing, unexpected, of another shape, or not of floats; the message names it.
    """
    missing = [name for name in table if name not in set(source.names())]
    unexpected = [name for name in source.names() if name not in table]
    meanings = {meaning for name in unexpected for start, meaning in _MEANINGS.items() if name.startswith(start)}
    if meanings:
        raise ExportError(
            f"{source.component}: tensors such as {_some(unexpected)} belong to another model: {', '.join(sorted(meanings))}",
            hint=SUPPORTED,
        )
    if missing:
        also = f"; {len(unexpected)} others are not expected, such as {_some(unexpected)}" if unexpected else ""
        raise ExportError(
            f"{source.component}: {len(missing)} of {len(table)} tensors are missing: {_some(missing)}{also}",
            hint="a file is missing or the config does not belong to these weights; download the checkpoint again",
        )
    if unexpected:
        raise ExportError(
            f"{source.component}: {len(unexpected)} tensors are not part of this architecture: {_some(unexpected)}",
            hint="the config does not belong to these weights, or this is another kind of model",
        )
    for name, shape in table.items():
        _check_tensor(source, name, shape)


def _parts(stored: StoredTensor, names: str | tuple[str, ...]) -> list[tuple[str, StoredTensor]]:
    """What a stored tensor holds, by original name: itself, or equal parts of it along the first axis."""
    if isinstance(names, str):
        return [(names, stored)]
    shape = stored.shape  # of all of it, and so refused for each part, where it cannot be divided
    if shape and shape[0] % len(names) == 0:
        shape = (shape[0] // len(names), *shape[1:])
    return [(name, replace(stored, shape=shape, part=i, parts=len(names))) for i, name in enumerate(names)]


def _check_tensor(source: TensorSource, name: str, expected: Shape) -> None:
    stored = source.stored(name)
    called = name if stored.name == name else f"{name} (stored as {stored.name})"
    if stored.shape != expected:
        raise ExportError(
            f"{source.component}: {called} is {list(stored.shape)}, expected {list(expected)}",
            hint="the config does not belong to these weights; take both from the same checkpoint",
        )
    if stored.dtype not in _FLOAT_DTYPES:
        raise ExportError(
            f"{source.component}: {called} is {stored.dtype}, expected one of {', '.join(_FLOAT_DTYPES)}",
            hint="quantised checkpoints cannot be read; take the published floating-point one",
        )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown + (", …" if len(names) > _SHOWN else "")
