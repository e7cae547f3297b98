"""What the breakdown of FP8's error measures: sizes of transformers, and what of each is in FP8."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.fp8_numerics import ATTENTION_PARTS, PRODUCTS, Numerics
from benchmarks.moving_shapes import trained
from benchmarks.moving_shapes.cases import CLIP
from benchmarks.moving_shapes.sampler import prompts
from runtime.variants import VARIANTS, TransformerArch

_ALL = frozenset(PRODUCTS)
_WHOLE_ATTENTION = frozenset(ATTENTION_PARTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A size to measure.

    Args:
        latents: [C, T, h, w].
        every_generation: all rows run a generation, not only the first ones.
        captions: of the trained model, whose weights are used; a generation each, from noise of its own. Empty: one, of random numbers.
    """

    arch: TransformerArch
    latents: tuple[int, int, int, int]
    num_steps: int
    every_generation: bool = True
    captions: tuple[str, ...] = ()


CASES = {
    "small": Case(
        arch=TransformerArch(dim=384, ffn_dim=1536, num_heads=3, num_layers=8, text_dim=64, text_len=48),
        latents=(16, 2, 20, 20),
        num_steps=6,
    ),
    "1.3b": Case(arch=VARIANTS["wan2.1-t2v-1.3b"].transformer, latents=(16, 3, 60, 104), num_steps=8, every_generation=False),
    "moving-shapes": Case(
        arch=trained.SIZE.transformer,
        latents=(16, 5, 8, 8),
        num_steps=20,
        every_generation=False,
        captions=tuple(prompts(8, CLIP)),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is in FP8, in words and in numerics.

    Args:
        main: its generation is run even where not all are.
        but: it is all products but something.
    """

    name: str
    numerics: Numerics
    main: bool = False
    but: bool = False


def rows(num_blocks: int) -> Iterator[Row]:
    """From the floor to everything, then everything but something."""
    products = Numerics(weights=_ALL, activations=_ALL)
    yield Row(name="bf16", numerics=Numerics(), main=True)
    yield Row(name="weights", numerics=Numerics(weights=_ALL))
    yield Row(name="activations", numerics=Numerics(activations=_ALL))
    yield Row(name="products", numerics=products, main=True)
    yield Row(name="attention", numerics=Numerics(attention=_WHOLE_ATTENTION), main=True)
    yield Row(
        name="products and attention",
        numerics=Numerics(weights=_ALL, activations=_ALL, attention=_WHOLE_ATTENTION),
        main=True,
    )
    for part in ATTENTION_PARTS:
        yield Row(name=f"attention: {part}", numerics=Numerics(attention=frozenset((part,))))
    yield Row(name="products, one scale a tensor", numerics=Numerics(weights=_ALL, activations=_ALL, per_tensor=True))
    for product in PRODUCTS:
        kept = _ALL - {product}
        yield Row(name=f"products but {product}", numerics=Numerics(weights=kept, activations=kept), but=True)
    numerics = Numerics(weights=_ALL, activations=_ALL - {"ffn.2"})
    yield Row(name="products but the input of ffn.2", numerics=numerics, but=True)
    tenth = max(1, round(num_blocks / 10))
    ends = {
        "first block": {0},
        "last block": {num_blocks - 1},
        f"first and last {tenth}": {*range(tenth), *range(num_blocks - tenth, num_blocks)},
    }
    for name, blocks in ends.items():
        numerics = Numerics(weights=_ALL, activations=_ALL, wide_blocks=frozenset(blocks))
        yield Row(name=f"products but {name}", numerics=numerics, but=True)
