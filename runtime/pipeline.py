"""`VideoPipeline`: a bundle and a request in, a video out; the whole story on one screen."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle, open_bundle
from runtime.denoise import StepEvent, denoise
from runtime.errors import CancelledError
from runtime.geometry import Float32
from runtime.noise import randn
from runtime.opening import Opener, choose_target
from runtime.report import Report, StageClock, make_report
from runtime.request import GenerateRequest, ResolvedRequest, resolve_request
from runtime.schedulers import SOLVERS, make_schedule
from runtime.stages.text_encoder import TOKEN_EMBEDDING
from runtime.text import MAX_TOKENS, Tokenizer
from runtime.text_encoder import encode_prompts
from runtime.tiling import decode_tiled
from runtime.transformer import Transformer
from runtime.vae import decode_stream, to_uint8
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
    """Makes videos from one bundle.

    Networks are opened when they are needed and closed when they are done: text encoder, then expert after expert, then VAE.
    """

    def __init__(self, bundle: Bundle, opener: Opener) -> None:
        self.bundle = bundle
        self._opener = opener

    @property
    def target(self) -> str:
        """The target in use, and why: see `target_reason`."""
        return self._opener.name

    @property
    def target_reason(self) -> str:
        return self._opener.reason

    @classmethod
    def open(cls, folder: Path | str, *, target: str | None = None, num_threads: int = 0) -> Self:
        """Open a bundle on the best of its targets that runs on this machine, or on the one named.

        Raises:
            BundleError: the bundle is missing, unfinished, damaged or hostile, or holds no weights.
            EngineError: none of its targets, or not the one named, runs on this machine.
        """
        bundle = open_bundle(Path(folder))
        opener = choose_target(bundle, target=target, num_threads=num_threads)
        opener.check_complete()
        return cls(bundle, opener)

    def resolve(self, request: GenerateRequest) -> ResolvedRequest:
        """The request with the bundle's defaults filled in and everything checked; reads no weights.

        Raises:
            RequestError: what cannot be met.
        """
        return resolve_request(request, self.bundle.manifest, sizes=self._opener.target.sizes)

    def generate(
        self,
        request: GenerateRequest,
        *,
        on_step: Callable[[StepEvent], None] | None = None,
        on_latents: Callable[[Float32], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        writer: VideoWriter | None = None,
    ) -> Video:
        """Make one video.

        Args:
            on_step: called after every denoising step.
            on_latents: called with the denoised latents before decoding starts, so that they can be kept whatever follows.
            cancelled: asked between steps and between decoded chunks; return true to stop.
            writer: takes the frames while decoding goes on; without one they are collected.

        Raises:
            RequestError: the request cannot be met.
            CancelledError: `cancelled` said so.
        """
        job = self.resolve(request)
        clock = StageClock()
        prompts, warnings = self._encode_prompts(job, clock)
        noise = job.latents if job.latents is not None else randn(job.seed, job.latents_shape)
        latents = self._denoise(job, noise, prompts, clock, on_step=on_step, cancelled=cancelled)
        if on_latents is not None:
            on_latents(latents)
        kept: list[Frames] = [np.empty((0, job.size.height, job.size.width, 3), np.uint8)]
        take = kept.append if writer is None else writer.write
        for frames in self._decode(job, latents, clock):
            take(frames)
            if cancelled is not None and cancelled():
                raise CancelledError("cancelled while decoding")
        report = make_report(self._opener, job, clock, warnings=warnings)
        return Video(frames=np.concatenate(kept), latents=latents, initial_latents=noise, report=report)

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

    def _denoise(
        self,
        job: ResolvedRequest,
        noise: Float32,
        prompts: list[Float32],
        clock: StageClock,
        *,
        on_step: Callable[[StepEvent], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> Float32:
        variant = self.bundle.manifest.variant
        schedule = make_schedule(job.scheduler, conventions=job.conventions, num_steps=job.num_steps, shift=job.shift)

        def open_expert(expert: Expert, stack: ExitStack) -> Transformer:
            component, _ = stack.enter_context(self._opener.network("transformer", expert.component))
            return Transformer(component, variant.transformer, job.latents_shape, conventions=job.conventions)

        with clock.stage("denoise"):
            return denoise(
                noise,
                schedule=schedule,
                solver=SOLVERS[job.scheduler](schedule, job.solver_settings),
                experts=list(zip(variant.experts, job.guidance, strict=True)),
                open_expert=open_expert,
                prompt_embeds=prompts[0],
                negative_embeds=prompts[1] if len(prompts) > 1 else None,
                on_step=on_step,
                cancelled=cancelled,
            )

    def _decode(self, job: ResolvedRequest, latents: Float32, clock: StageClock) -> Iterator[Frames]:
        arch = self.bundle.manifest.variant.vae
        with self._opener.network("vae") as (component, _):
            chunks = decode_tiled(component, latents, arch, job.tile) if job.tile else decode_stream(component, latents, arch)
            for frames in clock.each("vae", map(to_uint8, chunks)):
                with clock.stage("video"):  # what the caller does with them
                    yield frames
