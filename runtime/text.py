"""Prompts: cleaned as the reference cleans them, then turned into token ids by the bundle's tokenizer.

Reference: Wan-Video/Wan2.2 `wan/modules/tokenizers.py` (42bf4cfa, "whitespace" cleaning); diffusers' `WanPipeline` does the same.
"""

import html
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import BundleError, RequestError

MAX_TOKENS = 512
"""Tokens of a prompt that the model sees, the end-of-sequence token included."""

log = logging.getLogger(__name__)

# The reference collapses what the `regex` module calls white space: Unicode's White_Space. `re` also counts \x1c-\x1f as such.
_WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]+")


def clean_prompt(text: str) -> str:
    """Repair mis-decoded text, resolve HTML entities twice, make every run of white space one space.

    Raises:
        RequestError: the text is not Unicode (a lone surrogate, which is what bytes that are not UTF-8 become on a command line).
    """
    import ftfy

    try:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as exc:
        raise RequestError("the prompt is not valid UTF-8 text", hint="give the prompt in UTF-8") from exc
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _WHITE_SPACE.sub(" ", text).strip()


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompt:
    ids: np.ndarray[Any, np.dtype[np.int64]]  # [1..512], the last one end-of-sequence
    num_dropped: int
    """Tokens beyond the model's limit that it does not see."""

    @property
    def warning(self) -> str:
        """What the user should be told about this prompt; empty when nothing."""
        if not self.num_dropped:
            return ""
        total = len(self.ids) + self.num_dropped
        return f"the prompt has {total} tokens, the model reads {len(self.ids)}: the last {self.num_dropped} before the end are dropped"


class Tokenizer:
    """The bundle's `tokenizer.json`. Padding and truncation stored in it are ignored: the reference sets its own.

    Args:
        max_tokens: where a prompt is cut, the end-of-sequence token included.

    Raises:
        BundleError: the file is missing or damaged, or does not end a prompt with an end-of-sequence token.
    """

    def __init__(self, path: Path, *, max_tokens: int = MAX_TOKENS) -> None:
        import tokenizers

        with _failures_as(f"{path.name} cannot be read as a tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(max_tokens)
            num_added = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if num_added != 1:
            raise BundleError(
                f"{path.name} adds {num_added} tokens to a prompt; UMT5's adds one, the end of sequence", hint=_REBUILD
            )

    def encode(self, prompt: str) -> TokenizedPrompt:
        """Clean and tokenize a prompt; one that is too long is cut, with end-of-sequence still last, and a warning logged.

        Raises:
            RequestError: the prompt is not Unicode text.
            BundleError: the tokenizer fails on the prompt.
        """
        text = clean_prompt(prompt)
        with _failures_as("the tokenizer failed on the prompt"):
            encoding = self._tokenizer.encode(text)
        dropped = sum(len(rest.ids) - 1 for rest in encoding.overflowing)  # each rest ends with its own end-of-sequence
        tokenized = TokenizedPrompt(np.array(encoding.ids, np.int64), dropped)
        if tokenized.warning:
            log.warning("%s", tokenized.warning)
        return tokenized


@contextmanager
def _failures_as(message: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a BundleError: plain `Exception`, and on some damaged files a Rust panic."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # pyo3's PanicException is no Exception
        raise BundleError(f"{message}: {exc}", hint=_REBUILD) from exc


_REBUILD = "the bundle's tokenizer is damaged; rebuild the bundle from the checkpoint"
