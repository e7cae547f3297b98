"""What a benchmark runs: a toy checkpoint, a bundle built from it, and the one generation that every peer makes.

The toys are large enough for the CPU to compute rather than to wait, and small enough for a pair of runs to take half a minute.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.toy_checkpoint import Layout, ToyModel, write_toy_checkpoint
from benchmarks.toy_tokenizer import VOCABULARY
from runtime.errors import WanError
from runtime.variants import TextEncoderArch, TransformerArch, VaeArch

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model and a generation with it."""

    model: ToyModel
    prompt: str = "A red fox runs through fresh snow, cinematic light"
    negative_prompt: str = "dark, slow, old video"
    width: int = 256
    height: int = 160
    num_frames: int = 17
    num_steps: int = 8
    guidance: float = 5.0
    seed: int = 7


WORKLOADS = {
    "toy": Workload(
        model=ToyModel(
            transformer=TransformerArch(dim=256, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=256),
            text_encoder=TextEncoderArch(
                dim=256, attention_dim=256, ffn_dim=640, num_heads=4, num_layers=4, vocab_size=len(VOCABULARY)
            ),
            vae=VaeArch(base_dim=16),
        )
    ),
}


def prepare(folder: Path, model: ToyModel) -> tuple[Path, Path]:
    """Write a model's checkpoint as diffusers lays it out, and build a bundle from it.

    Returns:
        The checkpoint's folder and the bundle's, both in `folder`.

    Raises:
        WanError: the bundle could not be built.
    """
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    write_toy_checkpoint(checkpoint, model, layout=Layout.DIFFUSERS)
    build = [sys.executable, "-m", "cli", "build-engines", str(checkpoint), "--out", str(bundle), "--json"]
    done = subprocess.run(build, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise WanError(f"the benchmark's bundle was not built: {done.stderr.strip()[-2000:]}")
    return checkpoint, bundle


def environment(*, num_threads: int | None = None) -> dict[str, str]:
    """The environment of every process a benchmark starts: this one's, this project importable, no network, so many threads."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    return {**os.environ, **offline, **threads}


def describe(workload: Workload, *, num_threads: int) -> dict[str, Any]:
    """A workload's numbers for the result, as JSON holds them."""
    described: dict[str, Any] = json.loads(json.dumps(asdict(workload)))  # tuples become lists
    return {**described, "precision": "fp32", "num_threads": num_threads, "output": "frames as .npy, uint8 [T, H, W, 3]"}
