"""Two builds of one folder: what one has replaced, the other does not vouch for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.store import BundleStore
from runtime.errors import BuildError


def writes(data: bytes) -> Callable[[Path], None]:
    def build(file: Path) -> None:
        file.write_bytes(data)

    return build


def test_a_file_of_the_same_size_that_another_build_left_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    with BundleStore(tmp_path) as store:
        store.artefact("engines/a", key="first", build=writes(b"1111"))
        store.artefact("engines/b", key="first", build=writes(b"1111"))
    with BundleStore(tmp_path) as late:
        assert late.has("engines/a", key="first")
        with BundleStore(tmp_path) as other:
            other.artefact("engines/a", key="second", build=writes(b"2222"))
        with pytest.raises(BuildError, match="another build has changed it meanwhile"):
            late.artefact("engines/b", key="second", build=writes(b"2222"))
    assert (tmp_path / "engines/b").read_bytes() == b"1111"


def test_a_build_goes_on_from_what_an_interrupted_one_left(tmp_path: Path) -> None:
    with BundleStore(tmp_path) as store:
        store.artefact("engines/a", key="first", build=writes(b"1111"))
    with BundleStore(tmp_path) as again:
        again.artefact("engines/b", key="first", build=writes(b"2222"))
        assert again.has("engines/a", key="first") and again.has("engines/b", key="first")
