"""`VideoPipeline`: a bundle and a request in, a video out; the whole story on one screen."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle, open_bundle
from runtime.conditioning import (
    NO_CONDITIONS,
    Conditions,
    EncoderInputs,
    image_conditions,
    image_inputs,
    noisy_start,
    video_inputs,
)
from runtime.denoise import StepEvent, denoise
from runtime.errors import CancelledError
from runtime.geometry import Float32
from runtime.image_encoder import encode_images
from runtime.memory import MemoryPlan
from runtime.needs import generation_needs
from runtime.noise import randn
from runtime.opening import Opener, choose_target
from runtime.report import Report, StageClock, make_report
from runtime.request import GenerateRequest, ResolvedRequest
from runtime.resolving import resolve_request
from runtime.schedulers import SOLVERS, Schedule, make_schedule
from runtime.stages.text_encoder import TOKEN_EMBEDDING
from runtime.text import MAX_TOKENS, Tokenizer
from runtime.text_encoder import encode_prompts
from runtime.tiling import decode_tiled, encode_tiled
from runtime.transformer import Transformer
from runtime.vae import decode_colours, encode_stream, to_uint8
from runtime.variants import Expert
from runtime.video import VideoWriter

Frames = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """A finished generation."""

    frames: Frames  # [T, H, W, 3]; empty along T when a writer took them
    latents: Float32  # [z_dim, T, h, w], before decoding
    initial_latents: Float32  # the noise it started from
    report: Report


class VideoPipeline:
    """Makes videos from one bundle. Use with `with`, or `close` it: until then, what fits of the weights stays on the device.

    Networks are opened when they are needed and closed when they are done: text encoder, then expert after expert, then VAE.
    """

    def __init__(self, bundle: Bundle, opener: Opener, *, opening_seconds: float = 0.0) -> None:
        self.bundle = bundle
        self._opener = opener
        self._opening_seconds = opening_seconds  # until a generation has reported them

    @property
    def target(self) -> str:
        """The target in use, and why: see `target_reason`."""
        return self._opener.name

    @property
    def target_reason(self) -> str:
        return self._opener.reason

    @classmethod
    def open(cls, folder: Path | str, *, target: str | None = None, num_threads: int = 0, vram: int | None = None) -> Self:
        """Open a bundle on the best of its targets that runs on this machine, or on the one named.

        Args:
            vram: bytes of device memory that weights, activations and libraries may take; None: what is free, less a margin.

        Raises:
            RequestError: a budget of device memory for a target that has none.
            BundleError: the bundle is missing, unfinished, damaged or hostile, or holds no weights.
            EngineError: none of its targets, or not the one named, runs on this machine.
        """
        started = time.perf_counter()
        bundle = open_bundle(Path(folder))
        opener = choose_target(bundle, target=target, num_threads=num_threads, vram=vram)
        opener.check_complete()
        return cls(bundle, opener, opening_seconds=time.perf_counter() - started)

    def resolve(self, request: GenerateRequest) -> ResolvedRequest:
        """The request with the bundle's defaults filled in and everything checked; reads no weights.

        Raises:
            RequestError: what cannot be met.
        """
        return resolve_request(request, self.bundle.manifest, sizes=self._opener.target.sizes, attention=self._opener.attention)

    def close(self) -> None:
        """Release the device and everything on it."""
        self._opener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def generate(
        self,
        request: GenerateRequest,
        *,
        on_step: Callable[[StepEvent], None] | None = None,
        on_latents: Callable[[Float32], None] | None = None,
        on_memory: Callable[[MemoryPlan], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        writer: VideoWriter | None = None,
    ) -> Video:
        """Make one video.

        Args:
            on_step: called after every denoising step.
            on_latents: called with the denoised latents before decoding starts, so that they can be kept whatever follows.
            on_memory: called with what is planned for the device's memory, before anything is read; never for a target without.
            cancelled: asked between steps and between decoded chunks; return true to stop.
            writer: takes the frames while decoding goes on; without one they are collected.

        Raises:
            RequestError: the request cannot be met.
            DeviceMemoryError: it does not fit the device's memory; said before anything is read.
            CancelledError: `cancelled` said so.
        """
        job = self.resolve(request)
        clock, self._opening_seconds = StageClock(opening_seconds=self._opening_seconds), 0.0
        plan = self._prepare(job, clock, on_memory)
        prompts, warnings = self._encode_prompts(job, clock)
        noise = job.latents if job.latents is not None else randn(job.seed, job.latents_shape)
        conditions, video_latents = self._condition(job, plan, clock)
        schedule = make_schedule(job.scheduler, conventions=job.conventions, num_steps=job.num_steps, shift=job.shift)
        schedule = schedule.without_first(job.skipped_steps)
        start = noise if video_latents is None else noisy_start(video_latents, noise, schedule.sigmas[0])
        latents = self._denoise(job, schedule, start, prompts, conditions, clock, on_step=on_step, cancelled=cancelled)
        if on_latents is not None:
            on_latents(latents)
        kept: list[Frames] = [np.empty((0, job.size.height, job.size.width, 3), np.uint8)]
        take = kept.append if writer is None else writer.write
        for frames in self._decode(job, latents, plan, clock):
            take(frames)
            if cancelled is not None and cancelled():
                raise CancelledError("cancelled while decoding")
        report = make_report(self._opener, job, clock, warnings=warnings)
        return Video(frames=np.concatenate(kept), latents=latents, initial_latents=noise, report=report)

    def _prepare(
        self, job: ResolvedRequest, clock: StageClock, on_memory: Callable[[MemoryPlan], None] | None
    ) -> MemoryPlan | None:
        """Fit the generation into the device's memory; None where it has no memory of its own."""
        if self._opener.rehearse is None:
            return None
        with clock.stage("plan"):
            needs = generation_needs(self._opener, job, self._opener.rehearse)
            plan = self._opener.session.prepare(needs, attention=job.attention)
        if plan is not None and on_memory is not None:
            on_memory(plan)
        return plan

    def _encode_prompts(self, job: ResolvedRequest, clock: StageClock) -> tuple[list[Float32], tuple[str, ...]]:
        """Embeddings [len, text_dim] of the prompt and, when an expert needs it, of the negative prompt; and warnings."""
        variant = self.bundle.manifest.variant
        needs_negative = any(guidance.unguided_pass for guidance in job.guidance)
        tokenizer = Tokenizer(self._opener.tokenizer_file(), max_tokens=min(MAX_TOKENS, variant.transformer.text_len))
        texts = [tokenizer.encode(text) for text in (job.prompt, job.negative_prompt)[: 1 + needs_negative]]
        with clock.stage("text_encoder"), self._opener.network("text_encoder") as (component, weights):
            table = weights.host_tensor(TOKEN_EMBEDDING)
            embeds = encode_prompts(component, table, [text.ids for text in texts], variant.text_encoder)
        return embeds, tuple(text.warning for text in texts if text.warning)

    def _condition(self, job: ResolvedRequest, plan: MemoryPlan | None, clock: StageClock) -> tuple[Conditions, Float32 | None]:
        """Conditions from the request's images, and the latents of its video."""
        variant = self.bundle.manifest.variant
        if job.video is not None:
            return NO_CONDITIONS, self._encode_frames(job, video_inputs(job.video, job.size), plan, clock)
        if job.image is None:
            return NO_CONDITIONS, None
        inputs = image_inputs(job.image, job.last_image, job.size, variant=variant, conventions=job.conventions)
        features = None
        if inputs.pixels is not None and variant.image_encoder is not None:
            with clock.stage("image_encoder"), self._opener.network("image_encoder") as (component, _):
                features = encode_images(component, inputs.pixels, variant.image_encoder)
        latents = self._encode_frames(job, inputs, plan, clock)
        return image_conditions(latents, features, variant=variant, has_last_image=job.last_image is not None), None

    def _encode_frames(
        self, job: ResolvedRequest, inputs: EncoderInputs, plan: MemoryPlan | None, clock: StageClock
    ) -> Float32:
        arch = self.bundle.manifest.variant.vae
        with clock.stage("vae_encoder"), self._opener.network("vae_encoder") as (component, _):
            if job.tile:
                return encode_tiled(component, inputs.frames, arch, job.tile, fold=job.encoder_fold)
            return encode_stream(component, inputs.frames, arch, num_strips=plan.num_strips("vae_encoder") if plan else 1)

    def _denoise(
        self,
        job: ResolvedRequest,
        schedule: Schedule,
        latents: Float32,
        prompts: list[Float32],
        conditions: Conditions,
        clock: StageClock,
        *,
        on_step: Callable[[StepEvent], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Float32:
        variant = self.bundle.manifest.variant

        def open_expert(expert: Expert, stack: ExitStack) -> Transformer:
            component, _ = stack.enter_context(self._opener.network("transformer", expert.component))
            return Transformer(component, variant.transformer, job.latents_shape, conventions=job.conventions)

        def note(event: StepEvent) -> None:
            clock.step(event.seconds)
            if on_step is not None:
                on_step(event)

        with clock.stage("denoise"):
            return denoise(
                latents,
                schedule=schedule,
                solver=SOLVERS[job.scheduler](schedule, job.solver_settings.without_first(job.skipped_steps)),
                experts=list(zip(variant.experts, job.guidance, strict=True)),
                open_expert=open_expert,
                prompt_embeds=prompts[0],
                negative_embeds=prompts[1] if len(prompts) > 1 else None,
                conditions=conditions,
                on_step=note,
                cancelled=cancelled,
            )

    def _decode(self, job: ResolvedRequest, latents: Float32, plan: MemoryPlan | None, clock: StageClock) -> Iterator[Frames]:
        arch, num_strips = self.bundle.manifest.variant.vae, plan.num_strips("vae") if plan else 1
        with ExitStack() as stack:
            with clock.stage("vae"):
                component, _ = stack.enter_context(self._opener.network("vae"))
            whole = decode_colours(component, latents, arch, num_strips=num_strips)
            chunks = map(to_uint8, decode_tiled(component, latents, arch, job.tile)) if job.tile else whole
            for frames in clock.each("vae", chunks):
                with clock.stage("video"):  # what the caller does with them
                    yield frames
