"""One forward with guidance (two prompts) of a transformer within budgets of device memory: what streaming costs, and where it begins.

Weights are random: one block's bytes in host memory stand for every block's, but each streamed block has page-locked memory of its own,
and every copy is a real one. A budget too small is reported with what it would take.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.flops import forward_tflop, num_tokens
from benchmarks.gpu import (
    OURS,
    Attempt,
    Options,
    Result,
    Suite,
    attentions,
    cuda_engines,
    cuda_kernels,
    measure,
    precisions_text,
)
from runtime.backends.base import Array
from runtime.backends.cuda.copies import CopyStream
from runtime.backends.cuda.engine import CudaBackend
from runtime.backends.cuda.rehearsal import rehearse
from runtime.backends.cuda.session import CudaSession
from runtime.bundle import Bundle
from runtime.component import Component
from runtime.geometry import VideoSize, latent_shape
from runtime.memory import Need
from runtime.residency import Unit, weight_units
from runtime.schedulers import Conventions
from runtime.specs import DType, Precision
from runtime.stages import network_blocks
from runtime.transformer import Transformer

PROMPT_TOKENS = 120
RUNS = 2
_TIMESTEP = 731.0
_PATTERN = 1 << 20  # elements drawn; tensors repeat them
_FP8_RMS = 30.0  # of the numbers that `_fp8` draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    variant: str
    size: VideoSize
    budgets_gib: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadResult(Result):
    """Seconds of a forward with both prompts; the first is the one during which what is to be resident arrives."""

    work: str
    precision: str
    attention: str
    budget_gib: float | None  # None: everything resident
    resident_blocks: int
    num_blocks: int
    predicted_peak_gib: float
    driver_gib: float  # as the driver counts at the end, its context included
    share_of_resident_speed: float | None = None

    def notes(self) -> list[str]:
        """What was resident, and the two counts of memory beside the table's."""
        return [
            f"{self.resident_blocks} of {self.num_blocks} blocks resident, first {self.first_seconds:.2f} s, "
            f"{self.predicted_peak_gib:.2f} GiB predicted, {self.driver_gib:.2f} by the driver"
        ]


def attempts(case: Case, options: Options) -> Iterator[Attempt]:
    """The budgets, smallest first, then everything resident."""
    budgets = sorted(options.budgets_gib or case.budgets_gib)
    for bundle in options.bundles:
        backend = CudaBackend(cuda_kernels(bundle))
        with closing(CudaSession(backend, CopyStream(backend.device), available_host_bytes=lambda: 1 << 40)) as session:
            bench = Bench(bundle, case, session)
            for attention in attentions(bundle, options.attention):
                need = bench.need(attention)
                for budget in (*budgets, None):
                    yield f"{OURS} attention {attention}, {_room(budget)}", partial(bench.measure, budget, need, attention)
    for baseline in options.baselines:
        yield baseline, partial(_theirs, case, baseline, options)


def _theirs(case: Case, peer: str, options: Options) -> Result:
    from benchmarks.dit_peers import Case as DitCase
    from benchmarks.offload_diffusers import measure_group_offload

    variant = options.bundles[0].manifest.variant
    return measure_group_offload(variant, DitCase(case.name, case.variant, case.size), peer, min_runs=RUNS)


def with_shares(results: list[Result]) -> list[Result]:
    """The results with their speed as a share of the all-resident one's, where that was measured."""
    resident = {(r.case, r.work): r.seconds for r in results if isinstance(r, OffloadResult) and r.budget_gib is None}
    return [
        replace(result, share_of_resident_speed=resident[result.case, result.work] / result.seconds)
        if isinstance(result, OffloadResult) and (result.case, result.work) in resident
        else result
        for result in results
    ]


class RandomWeights:
    """Weights in host memory, drawn once for every name within a block, shape and type."""

    def __init__(self, units: tuple[Unit, ...]) -> None:
        self._generator = np.random.default_rng(0)
        self._specs = {tensor.name: (tensor.shape, tensor.dtype) for unit in units for tensor in unit.tensors}
        self._drawn: dict[tuple[str, tuple[int, ...], DType], Array] = {}

    def tensor(self, name: str) -> Array:
        shape, dtype = self._specs[name]
        kind = re.sub(r"^blocks\.\d+\.", "", name), shape, dtype
        if kind not in self._drawn:
            self._drawn[kind] = self._draw(name, shape, dtype)
        return self._drawn[kind]

    def _draw(self, name: str, shape: tuple[int, ...], dtype: DType) -> Array:
        if dtype is DType.F8_E4M3:
            return np.resize(_fp8(self._generator), shape)
        if name.endswith("_scale"):
            return np.full(shape, shape[0] ** -0.5 / _FP8_RMS, np.float32)
        spread = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        drawn = self._generator.standard_normal(_PATTERN, np.float32) * np.float32(spread)
        if "norm" in name and name.endswith("weight"):
            drawn += 1
        if dtype is DType.BF16:
            return np.resize((drawn.view(np.uint32) >> 16).astype(np.uint16), shape)
        return np.resize(drawn, shape)


def _fp8(generator: np.random.Generator) -> Array:
    """E4M3 codes of magnitudes 8 to 60, both signs."""
    sign, exponent, mantissa = (generator.integers(low, high, _PATTERN, np.uint8) for low, high in ((0, 2), (10, 13), (0, 8)))
    codes: Array = sign << 7 | exponent << 3 | mantissa
    return codes


class Bench:
    """A bundle's transformer, opened anew within each budget on one device."""

    def __init__(self, bundle: Bundle, case: Case, session: CudaSession) -> None:
        self._session, self._case, self._bundle = session, case, bundle
        variant = bundle.manifest.variant
        self._precision = bundle.manifest.targets["cuda"].precision
        self._arch = variant.transformer
        self._num_blocks = network_blocks(variant, "transformer")
        self._stages, self._engines = cuda_engines(bundle, "transformer")
        self._units = weight_units(self._stages, num_blocks=self._num_blocks)
        self._source = RandomWeights(self._units)
        self._shape = latent_shape(case.size, vae=variant.vae)
        self._tokens = num_tokens(variant, case.size)

    def need(self, attention: Precision) -> Need:
        def twice(component: Component) -> None:
            forward = self._open(component)
            for _ in range(2):
                forward()

        layout = rehearse(self._stages, self._engines, twice, attention=attention)
        return Need(network="transformer", component="transformer", units=self._units, layout=layout)

    def measure(self, budget_gib: float | None, need: Need, attention: Precision) -> Result:
        """A forward within a budget.

        Raises:
            DeviceMemoryError: it is too small; the message has what it would take.
        """
        self._session.vram = None if budget_gib is None else int(budget_gib * 2**30)
        blocks = [i for i, unit in enumerate(self._units) if unit.block is not None and not unit.per_prompt]
        plan = self._session.prepare([need], attention=attention)
        with (
            self._session.backend("transformer") as backend,
            self._session.weights("transformer", self._source, self._stages, num_blocks=self._num_blocks) as weights,
            Component(backend, self._stages, self._engines, weights) as component,
        ):
            timing, _ = measure(self._open(component), seconds=0, warmups=1, min_runs=RUNS)
        use = self._session.memory_use()
        assert use is not None
        return OffloadResult(
            **asdict(timing),
            case=self._case.name,
            work=precisions_text(self._bundle, attention),
            peer=_peer(budget_gib),
            peak_memory_gib=use.peak_bytes / 2**30,
            tflop=2 * forward_tflop(self._arch, self._tokens),
            tokens=self._tokens,
            precision=self._precision.value,
            attention=attention.value,
            budget_gib=budget_gib,
            resident_blocks=len(plan.components[0].residency.resident.intersection(blocks)),
            num_blocks=len(blocks),
            predicted_peak_gib=use.predicted_peak_bytes / 2**30,
            driver_gib=use.driver_bytes / 2**30,
        )

    def _open(self, component: Component) -> Callable[[], Any]:
        """A forward with two prompts."""
        rng = np.random.default_rng(0)
        latents = rng.standard_normal(self._shape, np.float32)
        transformer = Transformer(component, self._arch, self._shape, conventions=Conventions.ORIGINAL)
        transformer.embed_times([_TIMESTEP])
        prompts = [transformer.encode_text(rng.standard_normal((PROMPT_TOKENS, self._arch.text_dim), np.float32)) for _ in "+-"]
        return lambda: transformer.predict(latents, _TIMESTEP, prompts)


def _peer(budget_gib: float | None) -> str:
    """Named so that everything resident is what the others are compared with."""
    return _room(budget_gib) if budget_gib is None else f"{OURS}, {_room(budget_gib)}"


def _room(budget_gib: float | None) -> str:
    return "all resident" if budget_gib is None else f"{budget_gib:g} GiB"


SUITE = Suite(
    cases=(
        Case(
            name="14b-480p",
            variant="wan2.1-t2v-14b",
            size=VideoSize(width=832, height=480, num_frames=81),
            budgets_gib=(3, 3.5, 4, 5, 6, 8, 12),
        ),
    ),
    precisions=(Precision.FP8,),
    baselines={"diffusers": ("torch", "diffusers")},
    attempts=attempts,
    takes=frozenset({"attention", "budgets_gib"}),
    complete=with_shares,
    torch=False,
)
