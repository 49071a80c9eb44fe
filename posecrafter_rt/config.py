"""Settings from environment variables: the cache folder, the server's token, the compiler. Only this module reads them.

Layer 0: imports the errors only.
"""

from __future__ import annotations

import os
from pathlib import Path

from posecrafter_rt.errors import PoseCrafterError


def cache_dir() -> Path:
    """Return the package's cache folder of this user. It may not exist yet, and may be deleted at any time.

    It is POSECRAFTER_CACHE if set, else posecrafter-rt in XDG_CACHE_HOME, else ~/.cache/posecrafter-rt.
    Raises: PoseCrafterError for a user without a home.
    """
    own, shared = os.environ.get("POSECRAFTER_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if shared else Path.home() / ".cache") / "posecrafter-rt"
    except RuntimeError as error:
        what = f"POSECRAFTER_CACHE is {own}, whose home is not known" if own else "this user has no home for the cache"
        raise PoseCrafterError(what, "set POSECRAFTER_CACHE to a folder that can be written") from error


def serve_token() -> str | None:
    """Return the server's token, POSECRAFTER_TOKEN, or None if it is not set.

    On the command line every user of the machine could read it. An empty token is returned as it is, and the server
    refuses it: whoever sets the variable means to have a token.
    """
    return os.environ.get("POSECRAFTER_TOKEN")


def compiler() -> str | None:
    """Return the C++ compiler to use, from CXX, or None."""
    return os.environ.get("CXX") or None


def temporary_files_in(folder: Path) -> dict[str, str]:
    """Return the environment for a process that is to put its temporary files into `folder`."""
    return {**os.environ, "TMPDIR": str(folder)}


def onnxruntime_threads(count: int | None) -> dict[str, str]:
    """Return the environment for a process whose ONNX Runtime is to compute in `count` threads; None: as many as it likes.

    What the user has set takes precedence. Releases before 1.29 read nothing of the kind.
    """
    return {**({} if count is None else {"ORT_INTRA_OP_NUM_THREADS": str(count)}), **os.environ}
