"""The networks of an engine folder as they are loaded: in its own precision or a wider one, or let go of for a while.

Layer 6: beside `avatar`, since the runtime knows no backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posecrafter_rt import __version__
from posecrafter_rt.engines import LOADED_WIDER, Backend, Engine, Precision, get_backend
from posecrafter_rt.engines.folder import EngineFolder, rebuild_hint
from posecrafter_rt.errors import EngineFolderError, PoseCrafterError
from posecrafter_rt.machine import library_versions
from posecrafter_rt.runtime.memory import let_go
from posecrafter_rt.runtime.options import RenderOptions
from posecrafter_rt.runtime.report import SegmentReport
from posecrafter_rt.runtime.segments import Adjustment
from posecrafter_rt.spec import NETWORK_NAMES, Architecture

WIDER: Precision = "fp32"  # what networks run in once 16 bits do not hold their numbers


class Networks:
    """At most one precision at a time, since memory may not hold two.

    engines: by the networks' names; empty until they are used, and once they are let go of. precision: that of `engines`.
    """

    def __init__(self, folder: EngineFolder) -> None:
        self.folder = folder
        self.engines: dict[str, Engine] = {}
        self.precision: Precision | None = None

    @property
    def built(self) -> Precision:
        """The precision that the engine was built in."""
        precision: Precision = self.folder.manifest["precision"]
        return precision

    def use(self, precision: Precision) -> None:
        """Load the networks in this precision, unless they are."""
        if self.precision != precision:
            if self.engines:
                self.close()
            manifest = self.folder.manifest
            arch, backend = Architecture.from_json(manifest["architecture"]), get_backend(manifest["backend"])
            self.engines = backend.load(self.folder.networks, arch, precision, self.folder.compiled)
            self.precision = precision

    def needed(self, *reports: SegmentReport) -> Precision:
        """The precision that a render of these reports has come to."""
        adjustments = [adjustment for report in reports for adjustment in report.adjustments]
        return WIDER if any("precision" in adjustment for adjustment in adjustments) else self.built

    def check_feature_reuse(self, options: RenderOptions) -> None:
        """Raise PoseCrafterError where options keep the U-Net's features over steps, and the engine is not built for it."""
        if options.unet_every > 1 and not self.folder.manifest.get("feature_reuse"):
            raise PoseCrafterError("this engine was built without feature reuse, which unet_every needs",
                                   f"posecrafter-rt build-engine tuned.ckpt -o {self.folder.path} --feature-reuse")  # fmt: skip

    def widening(self, what: str, frame: int, precision: Precision) -> Adjustment:
        """What is to change, from this frame of the clip on, because `what` was not finite in `precision`.

        Raises: PoseCrafterError where there is no wider type, or the backend cannot load these networks in it.
        """
        if precision == WIDER:
            raise PoseCrafterError(f"{what} is not finite in {precision}",
                                   "lower --guidance-scale or --control-scale, or tune again with fewer steps")  # fmt: skip
        if self.folder.manifest["backend"] not in LOADED_WIDER:
            raise PoseCrafterError(f"{what} is not finite in {precision}",
                                   f"{rebuild_hint(self.folder.path)} --precision {WIDER}")  # fmt: skip
        return {"frame": frame, "precision": WIDER, "reason": f"{what} was not finite in {precision}"}

    def close(self) -> None:
        """Let go of the networks and of all memory that they hold for the shapes that they have run at."""
        self.engines, self.precision = {}, None
        let_go()


def check_runs_here(folder: EngineFolder) -> None:
    """Raise EngineFolderError when an engine's backend cannot run here, or it was built elsewhere or by other versions."""
    manifest, path = folder.manifest, folder.path
    backend = get_backend(manifest["backend"])
    reason = backend.unsupported_reason(manifest["precision"])
    if reason is not None:
        raise EngineFolderError(f"{path} needs backend {backend.name}: {reason}", rebuild_hint(path))
    for built, here in _provenance(manifest, backend):
        if built != here:
            raise EngineFolderError(f"{path} was built on {built}, this is {here}", rebuild_hint(path))


def _provenance(manifest: dict[str, Any], backend: Backend) -> Iterator[tuple[str, str]]:
    """What an engine is bound to, as pairs: where it was built, and here."""
    yield manifest["device"]["name"], backend.device()["name"]
    built, here = (manifest["package"], manifest.get("networks", [])), (__version__, list(NETWORK_NAMES))
    yield tuple(f"posecrafter-rt {version} with {len(names)} networks" for version, names in (built, here))  # type: ignore[misc]
    versions = library_versions(backend.libraries)
    for name in backend.libraries:
        yield f"{name} {manifest['libraries'].get(name)}", f"{name} {versions.get(name)}"
