"""From a bundle to running networks: which target this machine runs, and its networks opened one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.backends import RUNTIME_TARGETS, RuntimeTarget
from runtime.bundle import Bundle, Target
from runtime.component import Component
from runtime.errors import BundleError, EngineError
from runtime.stages import network_blocks, network_stages
from runtime.weights import WeightStore


class Opener:
    """Opens a bundle's networks on one target.

    Args:
        reason: why this target was chosen; for people.
    """

    def __init__(self, bundle: Bundle, runtime_target: RuntimeTarget, *, reason: str, num_threads: int) -> None:
        self.bundle = bundle
        self.name = runtime_target.name
        self.reason = reason
        self.target: Target = bundle.manifest.targets[runtime_target.name]
        self._backend = runtime_target.open_backend(num_threads)

    @contextmanager
    def network(self, network: str, component: str | None = None) -> Iterator[tuple[Component, WeightStore]]:
        """A network's engines with the weights of one component (the network's own when None), closed on leaving.

        Raises:
            BundleError: engines or weights are missing, or do not fit the architecture.
            EngineError: the backend cannot open an engine.
        """
        variant = self.bundle.manifest.variant
        stages = network_stages(variant, network)
        weights = WeightStore(
            self._weight_file(component or network), stages, self._backend, num_blocks=network_blocks(variant, network)
        )
        files = {stage.name: self._engine_file(stage.name) for stage in stages}
        with Component(self._backend, stages, files, weights) as opened:
            yield opened, weights

    def tokenizer_file(self) -> Path:
        """Path of the bundle's tokenizer."""
        if self.bundle.manifest.tokenizer is None:
            raise _no_weights(self.bundle)
        return self.bundle.file(self.bundle.manifest.tokenizer)

    def _weight_file(self, component: str) -> Path:
        weights = self.bundle.manifest.weights.get(self.target.precision, {}).get(component)
        if weights is None:
            raise _no_weights(self.bundle)
        return self.bundle.file(weights.file)

    def _engine_file(self, stage: str) -> Path:
        engine = self.target.engines.get(stage)
        if engine is None:
            raise BundleError(f"{self.bundle.folder}: target {self.name} has no engine for {stage}", hint="rebuild the bundle")
        return self.bundle.file(engine)


def choose_target(bundle: Bundle, *, target: str | None, num_threads: int = 0) -> Opener:
    """The best of a bundle's targets that runs on this machine, or the one named.

    Raises:
        EngineError: the bundle lacks the target named, or this machine runs none of those it has; never falls back silently.
    """
    built = bundle.manifest.targets
    if target is not None and target not in built:
        raise EngineError(
            f"target {target}: this bundle has {', '.join(built)}", hint=f"build it: `wanrt build-engines … --target {target}`"
        )
    obstacles = []
    for candidate in RUNTIME_TARGETS:
        if candidate.name not in built or target not in (None, candidate.name):
            continue
        obstacle = candidate.obstacle()
        if obstacle is None:
            reason = "asked for" if target else f"the best of {', '.join(built)} that runs here"
            return Opener(bundle, candidate, reason=reason, num_threads=num_threads)
        obstacles.append(f"{candidate.name}: {obstacle}")
    raise EngineError(f"{bundle.folder}: this machine runs none of its targets: {'; '.join(obstacles) or ', '.join(built)}")


def _no_weights(bundle: Bundle) -> BundleError:
    return BundleError(
        f"{bundle.folder}: engines only, without weights",
        hint="build it from a checkpoint: `wanrt build-engines CHECKPOINT --out BUNDLE`",
    )
