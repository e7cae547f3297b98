"""The documents agree with the files they talk about."""

import re
from pathlib import Path

import pytest

from benchmarks.table import replace_block
from benchmarks.variant_table import MARKS, variant_table
from runtime.variants import VARIANTS
from runtime.version import VERSION

ROOT = Path(__file__).parents[1]
DECISIONS = ROOT / "docs" / "decisions"
DOCUMENTS = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
README = (ROOT / "README.md").read_text()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code_blocks(text: str) -> str:
    return "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL))


def test_readme_needs_two_commands_and_the_makefile_has_them() -> None:
    named = set(re.findall(r"^make ([a-z-]+)", code_blocks(README), re.MULTILINE))
    assert named == {"demo", "test"}
    assert named <= make_targets()


def test_ci_says_the_words_people_say() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    words = re.findall(r"make ((?:[a-z-]+ ?)+)", script)[-1].split()
    assert "test" in words
    assert set(words) <= make_targets()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_contributing_names_every_target_that_tests() -> None:
    named = set(re.findall(r"^make ([a-z-]+)", code_blocks((ROOT / "CONTRIBUTING.md").read_text()), re.MULTILINE))
    assert named <= make_targets()
    assert {name for name in make_targets() if name.startswith("test")} <= named


def test_every_make_target_explains_itself() -> None:
    makefile = (ROOT / "Makefile").read_text()
    explained = set(re.findall(r"^([a-z][a-z-]*):.*## \S", makefile, re.MULTILINE))
    assert explained == make_targets()


def test_decision_notes_are_numbered_without_a_gap_and_listed() -> None:
    notes = sorted(path.name for path in DECISIONS.glob("[0-9]*.md"))
    assert [int(name[:4]) for name in notes] == list(range(1, len(notes) + 1))
    assert notes
    listed = re.findall(r"\]\((\d{4}-[^)]*\.md)\)", (DECISIONS / "README.md").read_text())
    assert listed == notes


@pytest.mark.parametrize("note", sorted(DECISIONS.glob("[0-9]*.md")), ids=lambda path: path.stem)
def test_a_decision_note_says_what_was_decided_and_why(note: Path) -> None:
    headings = re.findall(r"^## (.*)$", note.read_text(), re.MULTILINE)
    assert headings == ["Decision", "Why", "Consequences"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (document.parent / target.partition("#")[0]).exists(), f"{document.name} links to {target}"


def test_readme_has_the_table_of_the_variants_as_they_are() -> None:
    assert replace_block(README, variant_table(), marks=MARKS) == README, "run `python -m benchmarks.variant_table README.md`"
    assert all(f"| `{name}` |" in README for name in VARIANTS)


def test_changelog_knows_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert VERSION in versions
