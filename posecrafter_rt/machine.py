"""Facts about this machine that torch does not provide: processor, memory, installed versions.

Layer 0: reads /proc and /sys on Linux; on other systems most answers are empty.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from posecrafter_rt.errors import PoseCrafterError


@cache
def _cpuinfo(root: Path = Path("/")) -> dict[str, str]:
    """Return the first processor's entries of /proc/cpuinfo. root: the folder that holds proc."""
    first = _text(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name(root: Path = Path("/")) -> str:
    """Return the processor's name, or its architecture if the system does not say. root: the folder that holds proc.

    Of an Arm processor Linux tells only the numbers of its maker and its model, as in "Arm 0x41 0xd40".
    """
    told = _cpuinfo(root)
    if "model name" not in told and "CPU part" in told:
        return f"Arm {told.get('CPU implementer')} {told['CPU part']}"
    return told.get("model name") or platform.processor() or platform.machine()


def check_device(device: str, choices: str) -> None:
    """Raise PoseCrafterError unless a device is `cpu`, `cuda` or `cuda:1`. choices: what to choose of, for the hint."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise PoseCrafterError(f"unknown device {device!r}", f"choose {choices}")


def cpu_device() -> dict[str, str]:
    """Return the description of the processor as a device that an engine is built for."""
    return {"type": "cpu", "name": cpu_name()}


def cpu_features() -> set[str]:
    """Return the instruction-set flags, such as avx512_bf16 and amx_bf16. AMX is left out if the system refuses it."""
    flags = set(_cpuinfo().get("flags", _cpuinfo().get("Features", "")).split())
    refused = {flag for flag in flags if flag.startswith("amx_")}
    return flags if not refused or _may_use_tiles() else flags - refused


@cache
def _may_use_tiles() -> bool:
    """Ask Linux for AMX's tiles, once per process, and return whether they may be used."""
    request = (158, 0x1023, 18)  # arch_prctl of x86-64, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return bool(ctypes.CDLL(None).syscall(*map(ctypes.c_long, request)) == 0)


def cpu_has_bf16() -> bool:
    """Return whether the processor multiplies bf16 natively, and OpenVINO has it do so: AVX-512 BF16 or AMX.

    On Arm OpenVINO computes in float32 whatever is asked for, and says nothing.
    """
    return bool(cpu_features() & {"avx512_bf16", "amx_bf16"})


def cpu_gains_by_bf16() -> bool:
    """Return whether the processor multiplies bf16 faster than float32: with AMX.

    AVX-512 BF16 is no faster: on a processor that has only it, tuning took 1.5 times as long as in float32, and a
    render twice as long. Arm's BF16 was not measured.
    """
    return "amx_bf16" in cpu_features()


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_earlier_peak = 0  # bytes, from before the last call of `count_peak_anew`


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, including before any `count_peak_anew`.

    On Linux it is read from /proc, because `getrusage` starts there from the peak of the process that started this one.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_earlier_peak, counted_peak_bytes() or (peak if sys.platform == "darwin" else peak * 1024))


def count_peak_anew() -> bool:
    """Start counting the largest resident memory anew. Returns: False if the system cannot; only Linux can."""
    global _earlier_peak
    _earlier_peak = peak_rss_bytes()  # the system forgets it now
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def counted_peak_bytes() -> int | None:
    """Return the largest resident memory since `count_peak_anew`, if it succeeded; None if the system does not say."""
    peak = _numbers(_STATUS).get("VmHWM:")
    return None if peak is None else peak * 1024


SAMPLE_SECONDS = 0.2  # a compiler's or a tracer's peak lasts longer


@contextmanager
def watched_peak() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the most memory that this process and its children have held at once, in bytes.

    The sum is sampled, on Linux only; elsewhere child processes are not counted. It is at least `peak_rss_bytes`.
    """
    most, has_ended, lock = 0, threading.Event(), threading.Lock()

    def sample() -> None:
        nonlocal most
        held = _held_bytes()
        with lock:  # two threads sample, and the later one must not lower the peak
            most = max(most, held)

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
    """Return the resident memory of this process plus its descendants' anonymous memory; they share most libraries."""
    below, kilobytes = list(_children(os.getpid())), _numbers(_STATUS).get("VmRSS:", 0)
    while below:
        process = below.pop()
        kilobytes += _numbers(Path(f"/proc/{process}/status")).get("RssAnon:", 0)
        below += _children(process)
    return kilobytes * 1024


def _children(process: int) -> Iterator[int]:
    """Yield the child processes of a process that are still running."""
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError:  # it has ended, or this is not Linux
        return
    for thread in threads:
        yield from map(int, _text(Path(f"/proc/{process}/task/{thread}/children")).split())


def return_freed_memory() -> None:
    """Return freed memory to the system, if the C library has a function for it.

    glibc keeps freed blocks of up to 32 MB that lie below one still in use; how much that is varies all the time.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


_DONTNEED = 4  # MADV_DONTNEED on Linux


def release_mapped(path: Path) -> None:
    """Release the pages of a file that this process has mapped for reading; they are read again when they are needed.

    Otherwise they count as this process's memory as long as the file is mapped, even if only a few are still needed.
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
    """Limit OpenMP, and so torch on the CPU, to one thread when called from this thread.

    OpenMP's threads spin for up to 20 ms while they wait for more work, and keep cores from another library's threads.
    torch's own setting would also affect other threads that use torch meanwhile, permanently.
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


@cache  # each CDLL makes classes, which would be left to the garbage collector at every frame of a stream
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP library that this process has loaded, or None."""
    try:
        loaded = ctypes.CDLL(None)
        return loaded if hasattr(loaded, "omp_set_num_threads") else None
    except (OSError, TypeError):  # a system that has no handle for all loaded libraries
        return None


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many CPU cores this process may use at once. root: the folder that holds proc and sys."""
    return core_quota(root) or _bound_cores()


def _bound_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def core_quota(root: Path = Path("/")) -> int | None:
    """Return how many cores' time control groups grant, rounded up; None if no less than the process may run on.

    Such a limit (`docker run --cpus`) hides no core: with more threads, all are stopped for a part of the time.
    root: the folder that holds proc and sys.
    """
    quotas = [_bound_cores()]
    for generation, folder in _cgroups("cpu", root):
        files = ("cpu.max",) if generation == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = " ".join(_text(folder / file) for file in files).split()
        if len(words) == 2 and all(map(str.isdigit, words)):  # neither "max" nor -1
            quotas.append(max(1, -(-int(words[0]) // int(words[1]))))
    return min(quotas) if min(quotas) < quotas[0] else None


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take without swapping; None if the system does not say.

    That is the least of what the system has left and what each limit of its control groups leaves.
    root: the folder that holds proc and sys.
    """
    system = _numbers(root / "proc/meminfo").get("MemAvailable:")
    rooms = [*_cgroup_rooms(root), *([] if system is None else [system * 1024])]
    return max(0, min(rooms)) if rooms else None


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Yield the bytes that each memory limit on this process's control group and its parents leaves.

    Inactive pages of files count as free: the kernel reclaims them before it refuses memory.
    """
    names = {2: ("memory.max", "memory.current", "inactive_file"),
             1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip
    for generation, folder in _cgroups("memory", root):
        limit, usage, cached = names[generation]
        most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
        if most.isdigit() and used.isdigit():  # not "max"
            yield int(most) - int(used) + _numbers(folder / "memory.stat").get(cached, 0)


def _cgroups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the folders of this process's control group and its parents for a controller, each with version 1 or 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            generation, mount = 2, root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            generation, mount = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        inner = PurePosixPath(group.lstrip("/"))
        yield from ((generation, mount / part) for part in (inner, *inner.parents))


def _numbers(path: Path) -> dict[str, int]:
    """Parse a file whose lines hold a name, a number and perhaps a unit; other lines are left out."""
    words = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


def _text(path: Path) -> str:
    """Return the text of a system file; empty if it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def library_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of the distributions that are installed (this package is not when run from a checkout)."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_digest(*names: str) -> str:
    """Return the SHA-256 of the Python code of these subpackages: during development the version stays the same."""
    digest = hashlib.sha256()
    for name in names:
        package = find_spec(f"posecrafter_rt.{name}")
        assert package is not None and package.submodule_search_locations is not None
        for folder in package.submodule_search_locations:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
