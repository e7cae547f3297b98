"""One generation by diffusers, by stage: `WanPipeline` in bf16 on a GPU, nothing compiled, nothing offloaded.

python -m benchmarks.peers.diffusers_gpu GENERATION.json
"""

import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from benchmarks.e2e_diffusers import Generation, PeerReport, read_generation, write_report
from runtime.video import open_writer


class Clock:
    """Seconds of the stages, by name; each ends when the device has nothing left to do."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        if self._device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Any:
        started = self.now()
        yield
        self.seconds[name] = self.now() - started


def main(job: Generation) -> None:
    """Make the video and the report."""
    clock = Clock(job.device)
    step_ends: list[float] = []

    def on_step_end(_pipeline: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        step_ends.append(clock.now())
        return {}

    with torch.no_grad():
        opened = clock.now()
        with clock.stage("load"):
            pipeline: Any = WanPipeline.from_pretrained(job.model, torch_dtype=torch.bfloat16, local_files_only=True)
            pipeline.set_progress_bar_config(disable=True)
        with clock.stage("to_device"):
            pipeline.to(job.device)
        with clock.stage("text_encoder"):
            prompt_embeds, negative_prompt_embeds = pipeline.encode_prompt(
                job.prompt, job.negative_prompt, do_classifier_free_guidance=True, device=job.device
            )
        started = clock.now()
        frames = pipeline(
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            width=job.width,
            height=job.height,
            num_frames=job.num_frames,
            num_inference_steps=job.num_steps,
            guidance_scale=job.guidance[0],
            guidance_scale_2=job.guidance[-1] if len(job.guidance) > 1 else None,
            generator=torch.Generator(job.device).manual_seed(job.seed),
            callback_on_step_end=on_step_end,
            output_type="np",
        ).frames[0]  # float32 [T, H, W, 3] in 0..1
    ended = clock.now()
    clock.seconds |= {"denoise": step_ends[-1] - started, "vae": ended - step_ends[-1]}
    with clock.stage("video"), open_writer(Path(job.video), fps=job.fps, width=job.width, height=job.height) as writer:
        writer.write((frames * 255).astype(np.uint8))  # truncated, as `export_to_video` does
    steps = np.diff([started, *step_ends]).tolist()
    peak = None if job.device == "cpu" else torch.cuda.max_memory_reserved()
    write_report(
        job.report,
        PeerReport(
            stage_seconds=clock.seconds,
            step_seconds=steps,
            first_step_seconds=step_ends[0] - opened,
            peak_memory_bytes=peak,
            output_std=float(frames.std()),
        ),
    )


if __name__ == "__main__":
    main(read_generation(sys.argv[1]))
