"""The manifest of an engine folder: what was built from what, under a seal that shows if it was altered.

Layer 4: knows no other file. It also has the command that builds the engine again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posecrafter_rt.atomic import sha256_json
from posecrafter_rt.errors import EngineFolderError, first_line

# Older ones: 2 has the channels of convolutions second in `torch` engines; 3 has no `unet_stream_shallow`; 4 may lack
# tokenizer.json; in 5 `unet_stream_shallow` takes `is_reference`; 6 has the tuned weights among the others.
SCHEMA = 7
MANIFEST = "manifest.json"
# The hint if it is not known which engine it is.
REBUILD = "build it again: posecrafter-rt build-engine ... --force"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest with a seal, the hash of everything else in it; return it as it will be read."""
    unsealed = {name: value for name, value in manifest.items() if name != "seal"}
    text = json.dumps({**unsealed, "seal": sha256_json(unsealed)}, indent=2)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    sealed: dict[str, Any] = json.loads(text)
    return sealed


def _parse(file: Path) -> Any:
    """Return a file's JSON. Raises: OSError; ValueError, also for NaN and lone surrogates: no seal is over those."""
    text = file.read_text(encoding="utf-8")
    manifest = json.loads(text, parse_constant=int)
    json.dumps(manifest, ensure_ascii=False).encode()
    return manifest


def read_manifest(path: Path, given: Path | None = None) -> dict[str, Any]:
    """Return the manifest, unverified. given: the path to show in messages; None: `path`.

    Raises: EngineFolderError if it is absent, cannot be read, is not JSON, or of another schema.
    """
    shown = given or path
    file = shown / MANIFEST
    try:
        # Web applications have a manifest.json, too.
        if not (path / MANIFEST).is_file() or not ((path / "networks").is_dir() or sealed_manifest(path)):
            raise EngineFolderError(f"{shown} is not an engine folder", _engine_hint(shown))
        manifest = _parse(path / MANIFEST)
    except OSError as error:
        reason = error.strerror or first_line(error)
        told = f"{file} cannot be read: {reason[:1].lower()}{reason[1:]}"
        raise EngineFolderError(told, "check its permissions and its disk") from error
    except ValueError as error:
        raise EngineFolderError(f"{file} is damaged", rebuild_hint(shown, {})) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        hint = rebuild_hint(shown, sealed_manifest(path) or {})
        raise EngineFolderError(f"{file} is of another version of this package", hint)
    return manifest


def _engine_hint(path: Path) -> str:
    """Return a hint for a `path` that is no engine: how to build one without replacing what is there."""
    if path.is_file():
        return f"an engine is a folder, which is built of a tuned checkpoint: posecrafter-rt build-engine {shlex.quote(str(path))}"
    output = "" if path.exists() else f" -o {shlex.quote(str(path))}"
    return f"posecrafter-rt build-engine tuned.ckpt{output}"


def is_sealed(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is as `write_manifest` wrote it."""
    return manifest.get("seal") == sha256_json({name: value for name, value in manifest.items() if name != "seal"})


def sealed_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest, of whatever schema, if `write_manifest` wrote it; else None."""
    try:
        manifest = _parse(path / MANIFEST)
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and is_sealed(manifest) else None


def rebuild_command(path: Path, manifest: Mapping[str, Any]) -> str:
    """Return the command that builds an engine as its manifest, or a part of it, describes it.

    The user must fill in what the manifest lacks: the paths of the checkpoint, of LoRAs and of a given small decoder.
    """
    words = ["posecrafter-rt build-engine tuned.ckpt -o", shlex.quote(str(path))]
    words += [f"--{name} {manifest[name]}" for name in ("backend", "precision") if name in manifest]
    if "size" in manifest:
        words.append(f"--size {'x'.join(map(str, manifest['size']))}")
    if "max_frames" in manifest:
        words.append(f"--max-frames {manifest['max_frames']}")
    words += [f"--lora {shlex.quote(one['file'])}:{one['scale']}" for one in manifest.get("loras", ())]
    if "small_decoder" in manifest:
        words.append("--small-decoder FOLDER")
    if manifest.get("feature_reuse") is False:
        words.append("--no-feature-reuse")
    return " ".join(words)


def rebuild_hint(path: Path, manifest: Mapping[str, Any]) -> str:
    """Return a hint that says how to rebuild an engine folder. manifest: see `rebuild_command`."""
    return f"build it again: {rebuild_command(path, manifest)} --force"


def rebuild_networks_hint(networks: Path) -> str:
    """Return such a hint for an `EngineFolder.networks`; the command is complete if the manifest is beside it."""
    manifest = sealed_manifest(networks.parent)
    return REBUILD if manifest is None else rebuild_hint(networks.parent, manifest)
