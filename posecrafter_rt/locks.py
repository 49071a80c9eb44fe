"""Locks on files and folders, which the system takes from a process that ends, however it ends.

Layer 0: a leaf. They hinder only those who ask.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Hold what lies at `path`, a file or a folder, against every other holder, in this process too.

    What is held stays so under another name, and as long as a process lives that was forked meanwhile.
    Args: shared: together with others who share it; waits for one who does not. Else alone; wait: for whoever holds it.
    Yields: whether it is held; on a file system without locks nothing is.
    Raises: BlockingIOError when it is to be held alone without waiting and somebody holds it; OSError when it cannot be
        opened.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    while True:
        # NFS lets a file be held alone only where it is open for writing.
        is_writable = not path.is_dir() and os.access(path, os.W_OK)
        descriptor = os.open(path, os.O_RDWR if is_writable else os.O_RDONLY)
        try:
            is_held = _lock(descriptor, operation)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else another took its place before it was held
                yield is_held
                return
        finally:
            os.close(descriptor)


@contextmanager
def alone_at(path: Path, make: Callable[[], None]) -> Iterator[bool]:
    """Hold a file or folder that is made where it is not there, also where the one that had it has just removed it.

    Yields: whether it is held; on a file system without locks nobody is kept out.
    Raises: BlockingIOError when somebody holds it; what `make` raises.
    """
    with ExitStack() as held:
        while True:
            make()
            try:
                is_held = held.enter_context(locked(path))
                break
            except FileNotFoundError:
                continue
        yield is_held


def _lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
