"""Facts about this machine that torch does not tell: processor, memory, installed versions.

Layer 0: reads /proc and /sys on Linux; elsewhere the answers are empty.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    first = _text(Path("/proc/cpuinfo")).split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not say."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_device() -> dict[str, str]:
    """The processor as the device that an engine is built for."""
    return {"type": "cpu", "name": cpu_name()}


def cpu_features() -> set[str]:
    """Instruction-set flags, such as avx512_bf16 and amx_bf16; none of AMX's where the system refuses its tiles."""
    flags = set(_cpuinfo().get("flags", _cpuinfo().get("Features", "")).split())
    refused = {flag for flag in flags if flag.startswith("amx_")}
    return flags if not refused or _may_use_tiles() else flags - refused


@cache
def _may_use_tiles() -> bool:
    """Whether this process may use AMX's tiles, for which Linux must be asked once."""
    request = (158, 0x1023, 18)  # arch_prctl of x86-64, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, request)) == 0)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 natively (AVX-512 BF16, AMX, or Arm's BF16)."""
    return "avx512_bf16" in cpu_features() or cpu_gains_by_bf16()


def cpu_gains_by_bf16() -> bool:
    """Whether it does so faster than float32: AMX, or Arm's BF16.

    AVX-512's does not: on a processor that has it alone tuning took 1.5 times as long as in float32, a render twice.
    """
    return bool(cpu_features() & {"amx_bf16", "bf16"})


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_earlier_peak = 0  # of what was counted before `count_peak_anew` last began


def peak_rss_bytes() -> int:
    """The largest resident memory this process has had, whatever was counted anew.

    On Linux the program's own: what `getrusage` tells there begins with the peak of the process that started this one.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_earlier_peak, counted_peak_bytes() or (peak if sys.platform == "darwin" else peak * 1024))


def count_peak_anew() -> bool:
    """Begin to count the largest resident memory from now on; False where the system cannot (it is Linux that can)."""
    global _earlier_peak
    _earlier_peak = peak_rss_bytes()  # which the system forgets
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def counted_peak_bytes() -> int | None:
    """The largest resident memory since `count_peak_anew`, where that could; None where the system does not say."""
    peak = _numbers(_STATUS).get("VmHWM:")
    return None if peak is None else peak * 1024


SAMPLE_SECONDS = 0.2  # a compiler's or a tracer's peak lasts longer


@contextmanager
def watched_peak() -> Iterator[Callable[[], int]]:
    """Yields a function: the most memory that this process and those it has started have held at once, in bytes.

    Of this process it is `peak_rss_bytes`. The sum is sampled, where the system is Linux; elsewhere others are not counted.
    """
    most, has_ended = 0, threading.Event()

    def sample() -> None:
        nonlocal most
        held = _held_bytes()
        if held > most:  # asked afterwards: two threads sample, and neither may put back what it read before the other
            most = held

    def watch() -> None:
        while not has_ended.wait(SAMPLE_SECONDS):
            sample()

    def peak() -> int:
        sample()
        return max(most, peak_rss_bytes())

    thread = threading.Thread(target=watch, name="watched_peak", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        has_ended.set()
        thread.join()


def _held_bytes() -> int:
    """Resident memory of this process, and of those below it what is their own: they mostly map the same libraries."""
    below, kilobytes = list(_children(os.getpid())), _numbers(_STATUS).get("VmRSS:", 0)
    while below:
        process = below.pop()
        kilobytes += _numbers(Path(f"/proc/{process}/status")).get("RssAnon:", 0)
        below += _children(process)
    return kilobytes * 1024


def _children(process: int) -> Iterator[int]:
    """The processes that a process has started and that still run."""
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError:  # it has ended, or this is not Linux
        return
    for thread in threads:
        yield from map(int, _text(Path(f"/proc/{process}/task/{thread}/children")).split())


def return_freed_memory() -> None:
    """Give back to the system what this process has freed, where its C library can be asked to.

    glibc keeps blocks of up to 32 MB that lie below one still in use: how much that is differs from moment to moment.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


_DONTNEED = 4  # MADV_DONTNEED on Linux


def release_mapped(path: Path) -> None:
    """Let go of the pages of a file that this process has mapped to read: what is asked of them again is read again.

    They count as its memory for as long as the file is mapped, though only a few numbers of it are wanted yet.
    """
    mapped = f" {path.resolve()}"
    for line in _text(Path("/proc/self/maps")).splitlines():
        if not line.endswith(mapped):
            continue
        addresses, rights, *_, name = line.split(maxsplit=5)
        if name == mapped[1:] and "w" not in rights:
            first, last = (int(address, 16) for address in addresses.split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)


@contextmanager
def one_openmp_thread() -> Iterator[None]:
    """Keep OpenMP, and so torch on the processor, to the calling thread alone.

    Threads of its wait for more work awake, for up to 20 ms, on cores that another library's then lack. torch's own setting
    would hold for other threads that come to it meanwhile, and for good.
    """
    openmp = _openmp()
    if openmp is None:
        yield
        return
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(before)


@cache  # to ask makes classes, which a frame of a stream would leave to be collected
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that this process has loaded, if it has."""
    try:
        loaded = ctypes.CDLL(None)
        return loaded if hasattr(loaded, "omp_set_num_threads") else None
    except (OSError, TypeError):  # a system without such a name for all libraries
        return None


def usable_cores() -> int:
    """The processor's cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes(root: Path = Path("/")) -> int | None:
    """The memory that this process may still take without swapping: what the system has left, or what the least of
    its control groups' limits leaves it; None where the system does not say.

    root: where /proc and /sys are.
    """
    system = _numbers(root / "proc/meminfo").get("MemAvailable:")
    rooms = [*_cgroup_rooms(root), *([] if system is None else [system * 1024])]
    return max(0, min(rooms)) if rooms else None


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """What each limit on this process or on a group that holds it leaves; version 2 of control groups, and 1.

    Pages of files that nothing uses just now count as free: the kernel takes them back before it refuses memory.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, limit, usage, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        inner = PurePosixPath(group.lstrip("/"))
        for folder in (root / mount / part for part in (inner, *inner.parents)):
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():  # not "max"
                yield int(most) - int(used) + _numbers(folder / "memory.stat").get(cached, 0)


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name, a number and perhaps a unit."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _text(path: Path) -> str:
    """A file of the system; empty where there is none that may be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def library_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed (this package itself is not, when run from a checkout)."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_digest(*names: str) -> str:
    """SHA-256 of the Python code of these subpackages: versions alone do not tell what is being worked on."""
    digest = hashlib.sha256()
    for name in names:
        package = find_spec(f"posecrafter_rt.{name}")
        assert package is not None and package.submodule_search_locations is not None
        for folder in package.submodule_search_locations:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
