"""The vocabulary in which layouts are written: a table, and the few layers every network is made of."""

from collections.abc import Mapping

Shape = tuple[int, ...]
Table = dict[str, Shape]
"""Tensor name → shape."""


def linear(name: str, out_features: int, in_features: int, *, bias: bool = True) -> Table:
    """A linear layer: weight [out, in] and, unless told otherwise, bias [out]."""
    return conv(name, out_features, in_features, kernel=(), bias=bias)


def conv(name: str, out_channels: int, in_channels: int, *, kernel: Shape, bias: bool = True) -> Table:
    """A convolution of any rank: weight [out, in, *kernel] and bias [out]."""
    weight: Table = {f"{name}.weight": (out_channels, in_channels, *kernel)}
    return weight | ({f"{name}.bias": (out_channels,)} if bias else {})


def layer_norm(name: str, width: int) -> Table:
    """A layer norm with weight and bias [width]."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def prefixed(prefix: str, table: Mapping[str, Shape]) -> Table:
    """The same tensors one level deeper: `name` → `prefix.name`."""
    return {f"{prefix}.{name}": shape for name, shape in table.items()}


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """Replace the longest leading part of a dotted name that `parts` knows; what follows it is kept.

    Raises:
        ValueError: no leading part of the name is known, so the table and its naming have drifted apart.
    """
    head, tail = name, ""
    while head not in parts:
        head, dot, last = head.rpartition(".")
        if not dot:
            raise ValueError(f"no name known for {name}")
        tail = f".{last}{tail}"
    return parts[head] + tail
