"""Where the package keeps what may be deleted at any time, secrets, and tools; the only reading of environment variables.

Layer 0: a leaf.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder of this package; it may not exist yet.

    POSECRAFTER_CACHE where set, else posecrafter-rt in XDG_CACHE_HOME, else ~/.cache/posecrafter-rt.
    """
    own = os.environ.get("POSECRAFTER_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "posecrafter-rt"


def serve_token() -> str | None:
    """POSECRAFTER_TOKEN, or None: the token of a server, which on the command line every user of the machine could read.

    It may be empty, which a server refuses: whoever sets it means to have one.
    """
    return os.environ.get("POSECRAFTER_TOKEN")


def compiler() -> str | None:
    """CXX, or None: the C++ compiler that is to be used."""
    return os.environ.get("CXX") or None


def temporary_files_in(folder: Path) -> dict[str, str]:
    """The environment of a process that is to make its temporary files in a folder."""
    return {**os.environ, "TMPDIR": str(folder)}
