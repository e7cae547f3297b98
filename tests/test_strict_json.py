"""JSON to dataclasses: what goes in comes out, and every slip is named with its place."""

from dataclasses import dataclass
from enum import StrEnum

import pytest

from runtime import strict_json


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Leaf:
    size: int
    ratio: float = 1.0


@dataclass(frozen=True)
class Point:
    at: tuple[int, int]


@dataclass(frozen=True)
class Tree:
    name: str
    colour: Colour
    pair: tuple[int, int]
    flags: tuple[bool, ...]
    leaves: dict[str, Leaf]
    best: Leaf | None


@dataclass(frozen=True)
class Shape:
    axes: tuple[int | str, ...]


TREE = Tree("Kiefer 松", Colour.RED, (1, 2), (True, False), {"a": Leaf(1, 0.1), "b": Leaf(2)}, None)
GOOD = strict_json.encode(TREE)


def test_a_tree_survives_the_round_trip() -> None:
    assert strict_json.decode(Tree, GOOD, error=ValueError) == TREE


def test_a_place_may_hold_one_of_two_types() -> None:
    shape = strict_json.decode(Shape, '{"axes": [3, "4*height"]}', error=ValueError)
    assert shape == Shape((3, "4*height"))
    with pytest.raises(ValueError, match=r"axes\[0\]: expected int, got float"):
        strict_json.decode(Shape, '{"axes": [1.5]}', error=ValueError)


def test_a_whole_number_may_stand_for_a_float() -> None:
    assert strict_json.decode(Leaf, '{"size": 1, "ratio": 3}', error=ValueError) == Leaf(1, 3.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"name"', '"nom"', r"top: missing \['name'\]"),
        ('"name": ', '"more": 1, "name": ', r"top: unknown \['more'\]"),
        ('"name": "Kiefer 松"', '"name": 1', "name: expected str, got int"),
        ('"red"', '"blue"', r"colour: expected one of \['red'\], got 'blue'"),
        ('"red"', '["red"]', "colour: expected one of"),
        ('"size": 1', '"size": true', r"leaves.a.size: expected int, got bool"),
        ('"size": 1', '"size": 1.0', r"leaves.a.size: expected int, got float"),
        ('"size": 1', '"size": "1"', r"leaves.a.size: expected int, got str"),
        ('"size": 1', '"size": null', r"leaves.a.size: expected int, got NoneType"),
        ("0.1", "NaN", "not JSON: NaN is not a number"),
        ("0.1", "1e400", "not JSON: 1e400 is not a number"),
        ("0.1", "-1e400", "not JSON: -1e400 is not a number"),
        ("0.1", "1" + "0" * 400, "leaves.a.ratio: the number is too large"),
        ('"best": null', '"best": 5', "best: expected dict, got int"),
        ('"best": null', '"best": {"size": 1}', r"best: missing \['ratio'\]"),
        ('"a": {', '"a": 1, "a": {', "not JSON: 'a' is there twice"),
        ("松", r"\\ud83d", "name: .* is not Unicode text"),
    ],
)
def test_a_slip_is_named_with_its_place(old: str, new: str, message: str) -> None:
    text = GOOD.replace(old, new.replace("\\\\", "\\"), 1)
    assert text != GOOD
    with pytest.raises(ValueError, match=message):
        strict_json.decode(Tree, text, error=ValueError)


@pytest.mark.parametrize(("pair", "message"), [("[1]", "expected 2 items, got 1"), ("[1, 2, 3]", "expected 2 items, got 3")])
def test_a_pair_has_two_items(pair: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strict_json.decode(Point, f'{{"at": {pair}}}', error=ValueError)
