"""One run of one peer, as a file: what to generate, and where its frames and its first step's time go."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A generation both peers understand.

    Args:
        model: the folder a peer opens: a bundle, or the checkpoint it was built from.
        frames_file: `.npy` for the frames, uint8 [T, H, W, 3].
        first_step_file: takes the time at which the first denoising step was done, in `time.monotonic` seconds, which all
            processes of a machine share.
        num_threads: CPU threads inside an operator.
    """

    model: str
    frames_file: str
    first_step_file: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    num_steps: int
    guidance: float
    seed: int
    num_threads: int


def write_job(path: Path, job: Job) -> None:
    """Write a job where `read_job` finds it."""
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")


def read_job(path: str) -> Job:
    """The job a peer was started with."""
    return Job(**json.loads(Path(path).read_text(encoding="utf-8")))
