"""Which two targets `wanrt verify` compares: of one bundle, or of two that were made from one checkpoint."""

from pathlib import Path

from runtime.backends import RUNTIME_TARGETS
from runtime.bundle import Bundle, open_bundle
from runtime.errors import BundleError, RequestError
from runtime.manifest import Manifest
from runtime.opening import Opener, choose_target, find_obstacle
from runtime.precision import stages_in_precision
from runtime.specs import Precision, TensorSpec
from runtime.stages import network_blocks, network_components, network_stages, networks

REFERENCE = "cpu"
"""What a target is compared with when nothing is named: float32, and near the modules of the references."""


def open_pair(folder: Path, *, target: str | None, against: str | None, num_threads: int) -> tuple[Opener, Opener]:
    """What is compared with, and what is compared.

    Args:
        target: of the bundle in `folder`; None: the best that runs here and is not what it is compared with.
        against: another target of the bundle, or the folder of another bundle; None: the `cpu` target.

    Raises:
        RequestError: nothing to compare with.
        BundleError: a bundle is not whole, or the two hold different models.
        EngineError: a target does not run here.
    """
    bundle = open_bundle(folder)
    other, reference = _reference(bundle, against)
    target = target or _best(bundle, but=reference if other is bundle else None)
    if other is bundle and target == reference:
        raise RequestError(f"{target} would be compared with itself", hint="name another with --target or --against")
    first = choose_target(other, target=reference, num_threads=num_threads)
    second = choose_target(bundle, target=target, num_threads=num_threads)
    for opener in (first, second):
        opener.check_complete()
    if other is not bundle:
        _check_same_model(bundle, other)
    return first, second


def _reference(bundle: Bundle, against: str | None) -> tuple[Bundle, str]:
    """The bundle and target to compare with."""
    targets = bundle.manifest.targets
    if (against or REFERENCE) in targets:
        return bundle, against or REFERENCE
    if against is not None and Path(against).is_dir():
        other = open_bundle(Path(against))
        return other, REFERENCE if REFERENCE in other.manifest.targets else choose_target(other, target=None).name
    also = "" if against is None else f", and there is no folder {against}"
    raise RequestError(
        f"{bundle.folder}: has {', '.join(targets)}, no target {against or REFERENCE}{also}",
        hint="name a target or another bundle with --against, or build one more target into this bundle: "
        "`wanrt build-engines …` with all of them, each after a --target",
    )


def _best(bundle: Bundle, *, but: str | None) -> str:
    """The best target that runs here, one left out; the best of all, whose obstacle is then told, where none does."""
    others = [target for target in RUNTIME_TARGETS if target.name in bundle.manifest.targets and target.name != but]
    if not others:
        raise RequestError(
            f"{bundle.folder}: has no target but {but}",
            hint="name another bundle with --against, or build one more target into this one: "
            "`wanrt build-engines …` with all of them, each after a --target",
        )
    return next((target.name for target in others if find_obstacle(bundle, target) is None), others[0].name)


def _check_same_model(bundle: Bundle, other: Bundle) -> None:
    """See that two bundles were made from one checkpoint.

    Raises:
        BundleError: they were not, or do not say.
    """
    variant = bundle.manifest.variant
    different = (
        component
        for network in networks(variant)
        for component in network_components(variant, network)
        if not _share_weights(bundle, other, network, component)
    )
    what = variant.name if variant != other.manifest.variant else next(different, None)
    if what is not None:
        raise BundleError(
            f"{bundle.folder} and {other.folder} do not hold the same {what}",
            hint="compare bundles that `wanrt build-engines` made from one checkpoint",
        )


def _share_weights(bundle: Bundle, other: Bundle, network: str, component: str) -> bool:
    """Whether a component has the same bytes in both, in the weights that both keep in one type and layout; each precision has some."""
    ours, theirs = (
        [
            (_kept_as(one.manifest, network, Precision(precision)), files[component].tensors)
            for precision, files in one.manifest.weights.items()
            if component in files
        ]
        for one in (bundle, other)
    )
    pairs = [
        (digests[name], other_digests.get(name))
        for specs, digests in ours
        for other_specs, other_digests in theirs
        for name in digests
        if name in specs and specs[name] == other_specs.get(name)
    ]
    return bool(pairs) and all(digest == other_digest for digest, other_digest in pairs)


def _kept_as(manifest: Manifest, network: str, precision: Precision) -> dict[str, TensorSpec]:
    """The weights of a network's file in one precision."""
    num_blocks = network_blocks(manifest.variant, network)
    declared = network_stages(manifest.variant, network)
    stages = stages_in_precision(declared, precision, num_blocks=num_blocks, wide=manifest.fp8_wide)
    return {
        stage.weight_name(weight.name, block): weight
        for stage in stages
        for block in stage.places(num_blocks)
        for weight in stage.weights
    }
