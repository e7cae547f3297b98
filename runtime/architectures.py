"""GPU architectures by their names, such as `sm_90`: what they compute in, and whose compiled kernels they run."""

import re
from collections.abc import Iterable

from runtime.specs import Precision

_NAME = re.compile(r"sm_[0-9]{2,3}")
_FIRST = {Precision.BF16: 80, Precision.FP8: 89}
KERNELS_FROM = f"bf16 has kernels from sm_{_FIRST[Precision.BF16]} on, fp8 from sm_{_FIRST[Precision.FP8]} on"
"""For people."""


def has_precision(architecture: str, precision: Precision) -> bool:
    """Whether an architecture computes in a precision."""
    return _number(architecture) >= _FIRST.get(precision, 0)


def nearest(architecture: str, built: Iterable[str]) -> str | None:
    """Whose cubin runs on an architecture: of those of its generation the latest that is not later than itself; None for nobody's.

    A cubin runs on its own and on later minor revisions of the same major one (CUDA programming guide, binary compatibility).

    Args:
        built: may be a stranger's; names that are no architecture's are passed over.
    """
    own = _number(architecture)
    known = [name for name in built if _NAME.fullmatch(name)]
    able = [name for name in known if _number(name) // 10 == own // 10 and _number(name) <= own]
    return max(able, key=_number, default=None)


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))
