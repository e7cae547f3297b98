"""Prompts are cleaned and tokenized as the reference does: diffusers' own cleaning, transformers' own tokenizer."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
from diffusers.pipelines.wan import pipeline_wan as _pipeline_wan
from transformers import AutoTokenizer

from runtime.errors import BundleError, RequestError
from runtime.text import _WHITE_SPACE, Tokenizer, clean_prompt
from tests.toys import make_tokenizer

prompt_clean: Callable[[str], str] = _pipeline_wan.prompt_clean

PROMPTS = (
    "",
    "   \n\t ",
    "a cat runs on the grass",
    "  A  red\u3000panda\x1c runs\x1f on\u00a0snow \u2028 slow",
    "&amp;amp;lt;b&amp;gt; &lt;cat&gt; &#x2603; &nbsp;x",
    "cafÃ© – “quoted” ‘text’ â€œmojibakeâ€\x9d",
    "一只猫走在雪地上，慢动作。",
    "<pad> </s> <unk> cat",
    "\x00\x01\x7f a\u200bb\ufeffc",
    "👩‍👩‍👧 ☃ é é ﬁ Ⅳ",
    "\u202eright to left\u202c",
    "x" * 3000,
)


def random_prompts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = ((0, 0x300), (0x2000, 0x2100), (0x3000, 0x3100), (0x10000, 0x1FFFF), (0x20, 0x21), (0x61, 0x65))
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Callable[[str], list[int]]:
    peer = AutoTokenizer.from_pretrained(folder)

    def encode(prompt: str) -> list[int]:
        encoded = peer(
            [prompt_clean(prompt)],
            padding="max_length",
            max_length=512,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
        )
        length = sum(encoded.attention_mask[0])
        ids: list[int] = encoded.input_ids[0][:length]
        return ids

    return encode


def test_cleaning_equals_the_reference() -> None:
    for prompt in (*PROMPTS, *random_prompts(500)):
        assert clean_prompt(prompt) == prompt_clean(prompt), ascii(prompt)


def test_white_space_is_what_the_regex_module_takes_for_it() -> None:
    text = "".join(f"a{chr(code)}a" for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)
    assert _WHITE_SPACE.sub("", text) == regex.sub(r"\s+", "", text)


def test_entities_are_resolved_twice_and_not_three_times() -> None:
    # ftfy resolves them too, unless the text has a literal < in it
    assert clean_prompt("< &amp;lt;") == "< <"
    assert clean_prompt("< &amp;amp;lt;") == "< &lt;"


def test_token_ids_equal_transformers(tokenizer: Tokenizer, reference: Callable[[str], list[int]]) -> None:
    for prompt in (*PROMPTS, *random_prompts(300)):
        assert tokenizer.encode(prompt).ids.tolist() == reference(prompt), ascii(prompt)


def test_an_empty_prompt_is_one_end_of_sequence(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("").ids.tolist() == [1]


@pytest.mark.parametrize(("words", "dropped"), [(511, 0), (512, 1), (5000, 4489)])
def test_a_long_prompt_is_cut_at_512_with_end_of_sequence_last(
    words: int, dropped: int, tokenizer: Tokenizer, reference: Callable[[str], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "cat " * words
    with caplog.at_level(logging.WARNING):
        tokenized = tokenizer.encode(prompt)
    assert len(tokenized.ids) == 512 and tokenized.ids[-1] == 1
    assert tokenized.ids.tolist() == reference(prompt)
    assert tokenized.num_dropped == dropped
    assert [record.message for record in caplog.records] == ([tokenized.warning] if dropped else [])
    assert (f"{words + 1} tokens" in tokenized.warning) == bool(dropped)


def test_surrogate_pairs_are_joined_and_lone_surrogates_refused() -> None:
    assert clean_prompt("\ud83d\ude00") == "😀"
    with pytest.raises(RequestError, match="UTF-8"):
        clean_prompt(b"caf\xe9".decode("utf-8", "surrogateescape"))


def changed(folder: Path, target: Path, **parts: object) -> Path:
    """The toy tokenizer.json with some of its top-level parts replaced."""
    contents: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    target.write_text(json.dumps({**contents, **parts}))
    return target


def test_padding_and_truncation_stored_in_the_file_are_ignored(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    truncation = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 1}
    padding = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    padding["pad_token"] = "<pad>"
    other = Tokenizer(changed(folder, tmp_path / "tokenizer.json", truncation=truncation, padding=padding))
    for prompt in ("a cat", "the cat runs " * 300):
        assert other.encode(prompt).ids.tolist() == tokenizer.encode(prompt).ids.tolist()


@pytest.mark.parametrize("contents", ["", "[]", "{}", '{"model": {', "\x00"], ids=repr)
def test_a_damaged_file_is_refused(contents: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(contents)
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        Tokenizer(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_file_that_makes_the_library_panic_is_refused(folder: Path, tmp_path: Path) -> None:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        Tokenizer(changed(folder, tmp_path / "tokenizer.json", normalizer=normalizer))


def test_a_tokenizer_that_does_not_end_prompts_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="adds 0 tokens"):
        Tokenizer(changed(folder, tmp_path / "tokenizer.json", post_processor=None))


def test_a_tokenizer_that_fails_on_a_prompt_is_reported(folder: Path, tmp_path: Path) -> None:
    model = {"type": "Unigram", "unk_id": None, "vocab": [["<pad>", 0.0], ["</s>", 0.0]], "byte_fallback": False}
    with pytest.raises(BundleError, match="failed on the prompt"):
        Tokenizer(changed(folder, tmp_path / "tokenizer.json", model=model)).encode("cat")
