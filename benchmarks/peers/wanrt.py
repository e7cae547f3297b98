"""The benchmark's run of this project: what `wanrt run` does, with the first step's time written down.

python -m benchmarks.peers.wanrt JOB.json
"""

import sys
import time
from pathlib import Path

from benchmarks.job import Job, read_job
from runtime.denoise import StepEvent
from runtime.pipeline import VideoPipeline
from runtime.request import GenerateRequest
from runtime.run import RunRequest, run_to_file


def main(job: Job) -> None:
    """Generate the job's video from a bundle."""

    def on_step(event: StepEvent) -> None:
        if event.step == 1:
            Path(job.first_step_file).write_text(repr(time.monotonic()), encoding="utf-8")

    request = GenerateRequest(
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        width=job.width,
        height=job.height,
        num_frames=job.num_frames,
        num_steps=job.num_steps,
        guidance=(job.guidance,),
        seed=job.seed,
    )
    pipeline = VideoPipeline.open(job.model, num_threads=job.num_threads)
    run_to_file(pipeline, RunRequest(generate=request, out=Path(job.frames_file)), on_step=on_step)


if __name__ == "__main__":
    main(read_job(sys.argv[1]))
