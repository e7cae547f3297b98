"""Draws a contact sheet of a video: frames evenly spread over its length, in rows, as one PNG.

python -m benchmarks.demo demo.mp4 --out demo.png
"""

import argparse
from pathlib import Path

import numpy as np

from runtime.clips import load_video
from runtime.video import contact_sheet


def spread(num_frames: int, wanted: int) -> list[int]:
    """Indices of `wanted` frames from first to last at even distances; all of them when there are fewer."""
    return sorted({round(index) for index in np.linspace(0, num_frames - 1, min(wanted, num_frames))})


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="Draw a contact sheet of a video.")
    parser.add_argument("video", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--columns", type=int, default=4)
    asked = parser.parse_args()
    frames = load_video(asked.video)
    shown = spread(len(frames), asked.frames)
    contact_sheet(frames[shown], asked.out, columns=asked.columns)
    height, width = frames.shape[1:3]
    print(f"{asked.out}: {len(shown)} of {len(frames)} frames of {asked.video}, {width}x{height}")


if __name__ == "__main__":
    main()
