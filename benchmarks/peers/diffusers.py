"""The benchmark's run of diffusers: `WanPipeline` as its documentation opens it, on the CPU in float32.

python -m benchmarks.peers.diffusers JOB.json
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from benchmarks.job import Job, read_job


def main(job: Job) -> None:
    """Generate the job's video from a diffusers checkpoint folder."""

    def on_step_end(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            Path(job.first_step_file).write_text(repr(time.monotonic()), encoding="utf-8")
        return tensors

    torch.set_num_threads(job.num_threads)
    # The checkpoint is float32 and stays so.
    pipeline: Any = WanPipeline.from_pretrained(job.model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        width=job.width,
        height=job.height,
        num_frames=job.num_frames,
        num_inference_steps=job.num_steps,
        guidance_scale=job.guidance,
        generator=torch.Generator().manual_seed(job.seed),
        callback_on_step_end=on_step_end,
        output_type="np",
    ).frames[0]  # float32 [T, H, W, 3] in 0..1
    np.save(job.frames_file, (frames * 255).astype(np.uint8))  # truncated, as `export_to_video` does


if __name__ == "__main__":
    main(read_job(sys.argv[1]))
