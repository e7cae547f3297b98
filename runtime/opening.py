"""From a bundle to running networks: which target this machine runs, and its networks opened one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.backends import RUNTIME_TARGETS, BackendOptions, Rehearse, RuntimeTarget
from runtime.backends.base import Session, StoredWeights
from runtime.bundle import Bundle, check_hash
from runtime.component import Component
from runtime.errors import BundleError, EngineError, RequestError
from runtime.manifest import Artefact, Target
from runtime.specs import Precision, StageSpec
from runtime.stages import network_blocks, network_components, networks

_MAX_THREADS = 1024


class Opener:
    """Opens a bundle's networks on one target.

    Args:
        reason: why this target was chosen; for people.
    """

    def __init__(
        self, bundle: Bundle, runtime_target: RuntimeTarget, *, reason: str, num_threads: int, vram: int | None = None
    ) -> None:
        self.bundle = bundle
        self.name = runtime_target.name
        self.reason = reason
        self.target: Target = bundle.manifest.targets[runtime_target.name]
        self._runtime_target = runtime_target
        cache = cache_folder(bundle.folder)
        self._options = BackendOptions(num_threads=num_threads, read_kernels=self._read_kernels, vram=vram, cache=cache)
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The target's device, opened when first needed.

        Raises:
            EngineError: it cannot be opened.
        """
        if self._session is None:
            self._session = self._runtime_target.open_session(self._options)
        return self._session

    @property
    def attention(self) -> tuple[Precision, ...]:
        """Precisions that self-attention can be asked for, the default first."""
        return self._runtime_target.attention(self.target.precision)

    @property
    def rehearse(self) -> Rehearse | None:
        """Counts the device memory of some work, on the target's device; None where the device has no memory of its own."""
        rehearse = self._runtime_target.rehearse
        if rehearse is None:
            return None
        return lambda stages, files, drive, attention: rehearse(stages, files, drive, attention, self.session)

    def close(self) -> None:
        """Release the device and everything on it."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @contextmanager
    def network(self, network: str, component: str | None = None) -> Iterator[tuple[Component, StoredWeights]]:
        """A network's engines with the weights of one component (the network's own when None), closed on leaving.

        Raises:
            BundleError: engines or weights are missing, or do not fit the architecture.
            EngineError: the backend cannot open an engine.
        """
        variant, component = self.bundle.manifest.variant, component or network
        stages = self.stages(network)
        file = self._weight_file(network, component)
        engines = self.engine_files(network)
        with (
            self.session.backend(network) as backend,
            self.session.weights(component, file, stages, num_blocks=network_blocks(variant, network)) as weights,
            Component(backend, stages, engines, weights) as opened,
        ):
            yield opened, weights

    def stages(self, network: str) -> tuple[StageSpec, ...]:
        """A network's stages in the precision of this target."""
        return self.bundle.manifest.stages(self.target, network)

    def engine_files(self, network: str) -> dict[str, Path]:
        """Engine file of each of a network's stages, their hashes compared.

        Raises:
            BundleError: one is missing or not what the manifest says.
        """
        return {stage.name: self._checked(self._engine(stage.name)) for stage in self.stages(network)}

    def tokenizer_file(self) -> Path:
        """Path of the bundle's tokenizer.

        Raises:
            BundleError: the bundle has none, or it is not what the manifest says.
        """
        if self.bundle.manifest.tokenizer is None:
            raise _no_weights(self.bundle, "without a tokenizer")
        return self._checked(self.bundle.manifest.tokenizer)

    def check_complete(self) -> None:
        """Check that the bundle names engines, weights and a tokenizer for every network of its variant; opens none.

        Raises:
            BundleError: something is not there.
        """
        variant = self.bundle.manifest.variant
        if not self.bundle.manifest.weights:
            raise _no_weights(self.bundle, "engines only, without weights")
        if self.bundle.manifest.tokenizer is None:
            raise _no_weights(self.bundle, "without a tokenizer")
        for network in networks(variant):
            for stage in self.stages(network):
                self._engine(stage.name)
            for component in network_components(variant, network):
                self._weight_file(network, component)

    def _weight_file(self, network: str, component: str) -> Path:
        precision = self.target.precisions[network]
        weights = self.bundle.manifest.weights.get(precision, {}).get(component)
        if weights is None:
            raise _no_weights(self.bundle, f"without {precision} weights of {component}")
        return self.bundle.file(weights.file)

    def _read_kernels(self) -> dict[str, bytes]:
        return {architecture: self._checked(kernels).read_bytes() for architecture, kernels in self.target.kernels.items()}

    def _checked(self, artefact: Artefact) -> Path:
        """Path of a small file; its hash is compared, which for weights is left to `wanrt inspect --verify`."""
        check_hash(self.bundle, artefact)
        return self.bundle.file(artefact)

    def _engine(self, stage: str) -> Artefact:
        engine = self.target.engines.get(stage)
        if engine is None:
            raise BundleError(f"{self.bundle.folder}: target {self.name} has no engine for {stage}", hint="rebuild the bundle")
        return engine


def choose_target(bundle: Bundle, *, target: str | None, num_threads: int = 0, vram: int | None = None) -> Opener:
    """The best of a bundle's targets that runs on this machine, or the one named.

    Raises:
        RequestError: no such number of threads, or a budget of device memory for a target that has none.
        EngineError: the bundle lacks the target named, or this machine does not run it, or any; never falls back silently.
    """
    if not 0 <= num_threads <= _MAX_THREADS:
        raise RequestError(f"num_threads={num_threads}: need 0 to {_MAX_THREADS}", hint="0 lets the library choose")
    built = bundle.manifest.targets
    if target is not None and target not in built:
        raise EngineError(
            f"target {target}: this bundle has {', '.join(built)}", hint=f"build it: `wanrt build-engines … --target {target}`"
        )
    obstacles = []
    for candidate in RUNTIME_TARGETS:
        if candidate.name not in built or target not in (None, candidate.name):
            continue
        obstacle = find_obstacle(bundle, candidate)
        if obstacle is None:
            reason = "asked for" if target else f"the best of {', '.join(built)} that runs here"
            reason += f"; {candidate.note}" if candidate.note else ""
            if vram is not None and candidate.rehearse is None:
                raise RequestError(
                    f"--vram: target {candidate.name} has no device memory of its own",
                    hint="leave --vram out, or choose another --target",
                )
            return Opener(bundle, candidate, reason=reason, num_threads=num_threads, vram=vram)
        obstacles.append(f"{candidate.name}: {obstacle}")
    if target is not None and obstacles and len(built) > 1:
        raise EngineError(
            f"{bundle.folder}: this machine does not run {obstacles[0]}",
            hint="remove the obstacle, or leave --target out for the best of the others that runs here",
        )
    raise EngineError(
        f"{bundle.folder}: this machine runs none of its targets: {'; '.join(obstacles) or ', '.join(built)}",
        hint="remove the obstacle, or rebuild the bundle with a --target that runs here",
    )


def find_obstacle(bundle: Bundle, runtime_target: RuntimeTarget) -> str | None:
    """Why this machine cannot run a target of a bundle; None when it can. No weight is read for it.

    Raises:
        BundleError: an engine is missing or damaged.
    """
    target = bundle.manifest.targets[runtime_target.name]
    return runtime_target.obstacle() or runtime_target.engine_obstacle(
        [bundle.file(engine) for engine in target.engines.values()], target.kernels
    )


def cache_folder(bundle: Path) -> Path:
    """Where what a target compiles on this machine is kept: beside the bundle, not in it, since a bundle may be a stranger's."""
    whole = bundle.resolve()
    return whole.with_name(whole.name + ".runtime-cache")


def _no_weights(bundle: Bundle, state: str) -> BundleError:
    return BundleError(
        f"{bundle.folder}: {state}",
        hint="build it from a checkpoint: `wanrt build-engines CHECKPOINT --out BUNDLE`",
    )
