"""What every training stage shares: the step with its optimisers and moving average, the end of a stage by steps or by the clock, and
its state on disk. On a GPU a step is one CUDA graph."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.moving_shapes.muon import Muon, weight_matrices

Loss = Callable[[Hashable, Sequence[Tensor]], Tensor]
_EMA_DECAY = 0.999
_WARM_UP_STEPS = 100
_FALL = 0.5  # of a stage, at its end: the learning rate falls evenly to zero. Before that a stage's length may still be changed
_LOG_EVERY = 25
_SAVE_EVERY_S = 60.0
_SAY_EVERY_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLength:
    """A stage ends after so many steps, or so many minutes if that is sooner; the learning rate falls with whichever is nearer."""

    steps: float = math.inf  # a number of them, unless the clock alone decides
    minutes: float = math.inf

    def __post_init__(self) -> None:
        if self.steps == self.minutes == math.inf:
            raise ValueError("a stage needs an end")

    def progress(self, step: int, seconds: float) -> float:
        """0 at the beginning, 1 at the end."""
        return min(1.0, max(step / self.steps, seconds / (60 * self.minutes)))


@dataclass(slots=True, kw_only=True)
class StageLog:
    """What a stage leaves behind for people."""

    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, mean loss since the last entry


class StopTraining(Exception):
    """Somebody asked for the end; the state is on disk."""


class Stage:
    """Parameters in training, with their optimiser and moving average.

    Args:
        loss: of a kind of batch and its tensors; the kind is what shapes depend on.
        learning_rate: AdamW's highest, after a warm-up and before it falls to zero.
        state_file: where the state is kept.
        muon_rate: the same of Muon, which then takes the matrices; None leaves them to AdamW.
        without_muon: names of modules whose matrices AdamW has in any case.
        graphs: on a GPU, replay steps as CUDA graphs, one for each kind of batch.
        cancelled: asked before every step; once it is true the state is written and `StopTraining` raised.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        loss: Loss,
        *,
        learning_rate: float,
        length: StageLength,
        state_file: Path,
        muon_rate: float | None = None,
        without_muon: Collection[str] = (),
        graphs: bool = True,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.log = StageLog()
        self.modules, self.length = modules, length
        self._loss, self._learning_rate, self._state_file = loss, learning_rate, state_file
        self._cancelled = cancelled
        self._parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        self._device = self._parameters[0].device
        self._on_gpu = self._device.type == "cuda"
        self._uses_graphs = graphs and self._on_gpu
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._decay = torch.zeros((), device=self._device)
        self._sum = torch.zeros((), device=self._device)
        for_muon = [module for name, module in modules.items() if muon_rate is not None and name not in without_muon]
        matrices = weight_matrices(for_muon)
        self._highest_muon_rate = muon_rate or 0.0
        self._muon = Muon(matrices)
        self._muon_rate = torch.zeros((), device=self._device)
        known = {id(matrix) for matrix in matrices}
        self._optimiser = torch.optim.AdamW(
            [parameter for parameter in self._parameters if id(parameter) not in known],
            lr=torch.tensor(learning_rate, device=self._device) if self._on_gpu else learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            capturable=self._on_gpu,
            foreach=True,
        )
        self._graphs: dict[Hashable, tuple[list[Tensor], torch.cuda.CUDAGraph]] = {}
        self._pool: Any = None
        self._started = time.perf_counter()
        self._saved_at = self._said_at = 0.0

    @property
    def done(self) -> bool:
        return self.length.progress(self.log.step, self.log.seconds) >= 1

    def step(self, kind: Hashable, batch: Sequence[Tensor]) -> None:
        """One update; now and then the state is written.

        Raises:
            StopTraining: it was cancelled.
        """
        if self._cancelled():
            if self.log.step > (self.log.losses[-1][0] if self.log.losses else 0):
                self._note()  # the state has no sum of losses
            self.save()
            raise StopTraining(f"stopped after step {self.log.step}; --resume goes on from there")
        self._set_rates()
        if self._uses_graphs:
            self._replay(kind, batch)
        else:
            self._update(kind, batch)
        self.log.step += 1
        if self.log.step % _LOG_EVERY == 0 or self.log.step == self.length.steps:
            self._note()
            if self.log.seconds - self._saved_at > _SAVE_EVERY_S:
                self.save()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the modules have their parameters' moving averages."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    def finish(self) -> None:
        """Give the modules their moving averages for good, and write the state."""
        self.save()
        self._put(self._average)

    def save(self) -> None:
        """Write the state; it appears whole."""
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "average": self._average,
            "optimiser": self._optimiser.state_dict(),
            "muon": self._muon.state_dict(),
            "log": (self.log.step, self.log.seconds, self.log.losses),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self._on_gpu else None,
        }
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._state_file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._state_file)
        self._saved_at = self.log.seconds

    def resume(self) -> bool:
        """Take up the state on disk; false when there is none."""
        if not self._state_file.exists():
            return False
        state = torch.load(self._state_file, map_location=self._device, weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for mine, stored in zip(self._average, state["average"], strict=True):
            mine.copy_(stored)
        self._optimiser.load_state_dict(state["optimiser"])
        self._muon.load_state_dict(state["muon"])
        if self._on_gpu:
            for group in self._optimiser.param_groups:
                group["lr"] = torch.tensor(self._learning_rate, device=self._device)
            torch.cuda.set_rng_state(state["random_cuda"].cpu())
        torch.set_rng_state(state["random"].cpu())
        step, seconds, losses = state["log"]
        self.log = StageLog(step=step, seconds=seconds, losses=[tuple(entry) for entry in losses])
        self._started, self._saved_at, self._said_at = time.perf_counter() - seconds, seconds, seconds
        return True

    def restart_clock(self) -> None:
        """Leave out of the stage's time what passed since it began, such as the making of the first data."""
        self._started = time.perf_counter() - self.log.seconds

    def _set_rates(self) -> None:
        step, progress = self.log.step, self.length.progress(self.log.step, self.log.seconds)
        share = min(1.0, (step + 1) / _WARM_UP_STEPS, (1 - progress) / _FALL)
        rate = self._learning_rate * share
        self._muon_rate.fill_(self._highest_muon_rate * share)
        for group in self._optimiser.param_groups:
            if self._on_gpu:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._decay.fill_(min(_EMA_DECAY, (1 + step) / (10 + step)))

    def _replay(self, kind: Hashable, batch: Sequence[Tensor]) -> None:
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(kind, [tensor.clone() for tensor in batch])
        inputs, graph = self._graphs[kind]
        for mine, given in zip(inputs, batch, strict=True):
            mine.copy_(given, non_blocking=True)
        graph.replay()

    def _capture(self, kind: Hashable, inputs: list[Tensor]) -> tuple[list[Tensor], torch.cuda.CUDAGraph]:
        """The update as a graph. Libraries choose their kernels in two updates before, which are not counted."""
        counted = self._sum.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._update(kind, inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._sum.copy_(counted)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            self._update(kind, inputs)
        return inputs, graph

    def _update(self, kind: Hashable, batch: Sequence[Tensor]) -> None:
        if gradients := [parameter.grad for parameter in self._parameters if parameter.grad is not None]:
            torch._foreach_zero_(gradients)
        loss = self._loss(kind, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimiser.step()
        self._muon.step(self._muon_rate)
        with torch.no_grad():
            self._sum += loss.detach()
            torch._foreach_mul_(self._average, self._decay)
            share = torch._foreach_mul(list[Tensor](self._parameters), 1 - self._decay)
            torch._foreach_add_(self._average, list[Tensor](share))

    def _note(self) -> None:
        entries = self.log.step - (self.log.losses[-1][0] if self.log.losses else 0)
        loss = float(self._sum) / entries  # waits for the GPU, so that the clock is right
        self._sum.zero_()
        self.log.seconds = time.perf_counter() - self._started
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is no longer finite at step {self.log.step}; lower the learning rate")
        self.log.losses.append((self.log.step, round(self.log.seconds, 2), loss))
        if self.log.seconds - self._said_at > _SAY_EVERY_S:
            self._said_at = self.log.seconds
            print(f"  step {self.log.step}, {self.log.seconds:.0f} s, loss {loss:.4f}", file=sys.stderr, flush=True)

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)


def stop_when_told() -> Callable[[], bool]:
    """From now on SIGTERM and Ctrl-C only make the returned function say true; a second Ctrl-C ends the process at once."""
    told = Event()

    def stop(number: int, frame: object) -> None:
        told.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return told.is_set
