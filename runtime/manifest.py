"""What `manifest.json` says, as types. Reading and checking it is `runtime.bundle`'s and `runtime.bundle_checks`' work."""

from dataclasses import dataclass

from runtime.geometry import SizeRange
from runtime.precision import WideParts, stages_in_precision
from runtime.schedulers import Conventions, DiffusersScheduler
from runtime.specs import Precision, StageSpec
from runtime.stages import network_blocks, network_stages
from runtime.variants import Variant

SCHEMA_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """One file of a bundle. `key` hashes all that determined its content, so a known key need not be built again."""

    path: str  # relative to the bundle, with forward slashes
    bytes: int
    sha256: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """A component's weights, and the SHA-256 of each tensor's bytes."""

    file: Artefact
    tensors: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What one target needs: an engine per stage, for a range of sizes (None: any size), and compiled kernels, if it has any."""

    precisions: dict[str, Precision]  # by network
    sizes: SizeRange | None
    engines: dict[str, Artefact]  # by stage
    kernels: dict[str, Artefact]  # by GPU architecture
    tool_versions: dict[str, str]

    @property
    def precision(self) -> Precision:
        """The transformer's precision, which is what a target is known by."""
        return self.precisions["transformer"]

    def files(self) -> tuple[Artefact, ...]:
        """Engines and kernels."""
        return (*self.engines.values(), *self.kernels.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    schema_version: int
    wanrt_version: str
    variant: Variant
    conventions: Conventions
    scheduler: DiffusersScheduler | None
    targets: dict[str, Target]
    fp8_wide: WideParts  # of every target that is fp8: they share its weights
    weights: dict[str, dict[str, WeightFile]]  # precision → component → file; empty for a bundle of engines only
    tokenizer: Artefact | None
    source: str  # name of the checkpoint; for people

    def stages(self, target: Target, network: str) -> tuple[StageSpec, ...]:
        """A network's stages as one of the targets runs them."""
        return stages_in_precision(
            network_stages(self.variant, network),
            target.precisions[network],
            num_blocks=network_blocks(self.variant, network),
            wide=self.fp8_wide,
        )

    def artefacts(self) -> tuple[Artefact, ...]:
        """Every file the manifest names."""
        engines = [file for target in self.targets.values() for file in target.files()]
        weights = [weights.file for files in self.weights.values() for weights in files.values()]
        return (*engines, *weights, *([self.tokenizer] if self.tokenizer else []))
