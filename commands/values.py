"""What options say, as the types that requests have. Text that is none raises a RequestError."""

from typing import Any

from runtime.errors import RequestError


def vram_bytes(text: str | None) -> int | None:
    """`--vram` in bytes."""
    from runtime.memory import parse_bytes

    return None if text is None else parse_bytes(text)


def tile_spec(text: str | None) -> Any:
    """`--tile` as a TileSpec; tiles overlap by a quarter when no distance is given."""
    from runtime.tiling import TileSpec

    if text is None:
        return None
    size, *distance = _integers(text, "/", "--tile", (1, 2))
    return TileSpec.square(size, distance[0] if distance else size * 3 // 4)


def size_range(size: str | None, frames: str | None) -> Any:
    """`--size` and `--frames` of build-engines as a SizeRange; None when both are left out: any size."""
    from runtime.geometry import MAX_FRAMES, MAX_SIDE, SizeRange, VideoSize

    if size is None and frames is None:
        return None
    smallest, largest = _ends(f"16x16..{MAX_SIDE}x{MAX_SIDE}" if size is None else size)
    fewest, most = _ends(f"1..{MAX_FRAMES}" if frames is None else frames)
    low, high = width_height(smallest), width_height(largest)
    few, many = _integer(fewest, "--frames"), _integer(most, "--frames")
    if low[0] > high[0] or low[1] > high[1] or few > many:
        raise RequestError(f"{size or frames}: the range is empty", hint="give the smaller end first")
    return SizeRange(
        smallest=VideoSize(width=low[0], height=low[1], num_frames=few),
        largest=VideoSize(width=high[0], height=high[1], num_frames=many),
    )


def wide_parts(parts: list[str] | None) -> Any:
    """`--wide` as WideParts: `first:N`, `last:N` and names of products, or `none` alone; None when it is left out."""
    from runtime.precision import NOTHING_WIDE, WideParts

    if parts is None:
        return None
    if "none" in parts:
        if set(parts) != {"none"}:
            raise RequestError("--wide none: nothing stays bf16 then", hint="give none alone, or leave it out")
        return NOTHING_WIDE
    ends = {"first": 0, "last": 0}
    products: dict[str, None] = {}
    for part in parts:
        end, colon, count = part.partition(":")
        if not colon:
            products[part] = None
        elif end in ends:
            ends[end] = _integer(count, "--wide")
        else:
            raise RequestError(f"--wide {part}: blocks are counted from first or last", hint="for example --wide first:1")
    return WideParts(first_blocks=ends["first"], last_blocks=ends["last"], products=tuple(products))


def video_size(size: str | None, frames: int | None) -> Any:
    """`--size` and `--frames` of verify as a VideoSize; None when both are left out."""
    from runtime.geometry import VideoSize

    if size is None and frames is not None:
        raise RequestError("--frames: needs --size", hint="for example --size 128x128 --frames 5")
    if size is None:
        return None
    width, height = width_height(size)
    return VideoSize(width=width, height=height, num_frames=5 if frames is None else frames)


def width_height(text: str) -> tuple[int, int]:
    """`--size` of one video."""
    width, height = _integers(text, "x", "--size", (2,))
    return width, height


def guidance_scales(text: str | None) -> tuple[float, ...] | None:
    """`--guidance` as one scale for each expert, or one for all."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as exc:
        raise RequestError(f"--guidance {text}: not numbers", hint="for example 5.0, or 4.0,3.0 for two experts") from exc


def _ends(text: str) -> tuple[str, str]:
    first, dots, last = text.partition("..")
    return first, last if dots else first


def _integers(text: str, separator: str, option: str, counts: tuple[int, ...]) -> list[int]:
    parts = text.lower().split(separator)
    if len(parts) not in counts:
        raise RequestError(
            f"{option} {text}: expected numbers with {separator!r} between them", hint="for example 832x480 or 256/192"
        )
    return [_integer(part, option) for part in parts]


def _integer(text: str, option: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise RequestError(f"{option}: {text!r} is not a whole number", hint="for example 832x480, 81 or 256/192")
    return int(text)
