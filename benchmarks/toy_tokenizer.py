"""A small Unigram tokenizer with UMT5's conventions: pad 0, `</s>` 1 (put after every prompt), unknown 2, words marked by `▁`.

UMT5's own has 256,300 pieces and belongs to its checkpoint. This one knows some words, the printable ASCII characters, and
takes everything else for unknown.
"""

import json
import string
from pathlib import Path

_WORDS = (
    "a an and are at by from in into is of on over the through to with "
    "beach bird blue boat bright camera cat cinematic city close cloud cold dark dog fast field fire fog forest fox fresh gold "
    "golden grass green horse hour light man mountain night ocean old people rain red river road runs sea shot sky slow small "
    "snow soft street sun sunset tree video walks warm water white wide wind woman young"
)

VOCABULARY: tuple[tuple[str, float], ...] = (
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -3.0),
    *((f"▁{word}", -6.0) for word in _WORDS.split()),
    *((character, -9.0) for character in string.ascii_letters + string.digits + string.punctuation),
)
"""Pieces and their log probabilities; a piece's id is its position."""


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and the two small files that make transformers' AutoTokenizer load it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.Unigram(list(VOCABULARY), unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in ("<pad>", "</s>", "<unk>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    special_tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=2) + "\n", encoding="utf-8")
