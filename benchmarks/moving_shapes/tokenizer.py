"""The tokenizer of the grammar's words: UMT5's conventions (pad 0, `</s>` 1 after every prompt, unknown 2, words marked by `▁`).

Whatever is not one of the 26 letters parts words, case does not matter, and a word that no caption has is unknown. UMT5's own has
256,300 pieces and belongs to its checkpoint.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.moving_shapes.grammar import WORDS

PIECES: tuple[tuple[str, float], ...] = (
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -8.0),
    *((f"▁{word}", -4.0) for word in WORDS),
)
"""Pieces and their log probabilities; a piece's id is its position."""
VOCAB_SIZE = -(-len(PIECES) // 16) * 16
"""Rows of the text encoder's table, rounded up as UMT5's are."""
MAX_TOKENS = 39
"""At least as many as any caption has, its end included."""


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and the two small files that make transformers' AutoTokenizer load it."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    special_tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=2) + "\n", encoding="utf-8")


def build_tokenizer() -> Any:
    """The tokenizer as an object of the tokenizers library."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(list(PIECES), unk_id=2, byte_fallback=False))
    only_words = normalizers.Replace(Regex("[^a-z]+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), only_words, normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in ("<pad>", "</s>", "<unk>")])
    return tokenizer


def token_ids(tokenizer: Any, captions: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids padded with 0, [B, MAX_TOKENS], and how many of each row are real, its end included, [B].

    Raises:
        ValueError: a caption has more than MAX_TOKENS.
    """
    ids = np.zeros((len(captions), MAX_TOKENS), np.int64)
    lengths = np.zeros(len(captions), np.int64)
    for row, encoding in enumerate(tokenizer.encode_batch(list(captions))):
        lengths[row] = len(encoding.ids)
        if lengths[row] > MAX_TOKENS:
            raise ValueError(f"{captions[row]!r} has {lengths[row]} tokens, more than {MAX_TOKENS}")
        ids[row, : lengths[row]] = encoding.ids
    return ids, lengths
