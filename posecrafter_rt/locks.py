"""Advisory locks on files and folders. The system releases them when the process ends, however it ends.

Layer 0: a leaf. The locks bind only those who also ask for them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Lock the file or folder at `path` against every other holder, including those in this process.

    The lock follows the file if it is renamed. It also lasts as long as a process that was forked meanwhile lives.
    Args:
        shared: take a shared lock; this waits for an exclusive holder. False: take an exclusive lock.
        wait: for an exclusive lock, wait for the present holders instead of raising.
    Yields: whether it is locked; False on a file system without locks.
    Raises: BlockingIOError if an exclusive lock is wanted without waiting and somebody holds one; OSError if the file
        cannot be opened.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    while True:
        # NFS grants an exclusive lock only on a file that is open for writing.
        is_writable = not path.is_dir() and os.access(path, os.W_OK)
        descriptor = os.open(path, os.O_RDWR if is_writable else os.O_RDONLY)
        try:
            is_held = _lock(descriptor, operation)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else it was replaced before it was locked
                yield is_held
                return
        finally:
            os.close(descriptor)


@contextmanager
def alone_at(path: Path, make: Callable[[], None]) -> Iterator[bool]:
    """Take an exclusive lock on a file or folder that `make` creates if it is missing.

    It is made again if its previous holder removes it before it is locked.
    Yields: whether it is locked; False on a file system without locks, where nobody is kept out.
    Raises: BlockingIOError if somebody holds it; whatever `make` raises.
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
