"""What is left of memory and of cores: the system's word, and the limits of control groups of both versions."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from mmap import PROT_READ, mmap
from pathlib import Path
from typing import cast

import pytest
import torch

from posecrafter_rt import machine
from posecrafter_rt.engines.base import Engine, beside
from posecrafter_rt.machine import (
    available_bytes,
    core_quota,
    count_peak_anew,
    counted_peak_bytes,
    cpu_gains_by_bf16,
    cpu_has_bf16,
    cpu_name,
    one_openmp_thread,
    peak_rss_bytes,
    release_mapped,
    return_freed_memory,
    usable_cores,
    watched_peak,
)

MIB = 1 << 20
MEMINFO = "MemTotal:       24684096 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nHugePages_Total:  0\n"


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A system with 8 GiB available, a process in `groups`, and control groups' files."""
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_limits_it_is_what_the_system_has_left(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/job/memory.max": "max\n", "sys/fs/cgroup/job/memory.current": "99\n"}
    assert available_bytes(system(tmp_path, "0::/job\n", files)) == 8192 * MIB


@pytest.mark.parametrize("groups", ["0::/job/step\n", "0::/\n"])
def test_the_least_limit_of_all_groups_above_counts(tmp_path: Path, groups: str) -> None:
    """In a container the process's own group may be the root of what it sees."""
    files = {}
    for group, most in (("", 900), ("job/", 700), ("job/step/", 800)):
        files[f"sys/fs/cgroup/{group}memory.max"] = f"{most * MIB}\n"
        files[f"sys/fs/cgroup/{group}memory.current"] = f"{500 * MIB}\n"
        files[f"sys/fs/cgroup/{group}memory.stat"] = f"anon 1\ninactive_file {100 * MIB}\n"
    expected = {"0::/job/step\n": 300, "0::/\n": 500}[groups]
    assert available_bytes(system(tmp_path, groups, files)) == expected * MIB


def test_version_1_of_control_groups(tmp_path: Path) -> None:
    """The process's path may not be there: a container shows its own group as the root."""
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{600 * MIB}\n",
             "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{400 * MIB}\n",
             "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {50 * MIB}\n"}  # fmt: skip
    root = system(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/docker/1f\n0::/\n", files)
    assert available_bytes(root) == 250 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{MIB}\n", "sys/fs/cgroup/memory.current": f"{2 * MIB}\n"}
    assert available_bytes(system(tmp_path, "0::/\n", files)) == 0


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


QUOTA_1 = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(("groups", "files", "quota"), [
    ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),  # docker run --cpus=1
    ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
    ("0::/job/step\n", {"sys/fs/cgroup/job/cpu.max": "max 100000\n",
                        "sys/fs/cgroup/job/step/cpu.max": "700000 100000\n",
                        "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),  # the least of all groups above
    ("5:cpuacct,cpu:/docker/1f\n0::/\n", QUOTA_1, 1),  # version 1, whose group a container shows as the root
    ("5:cpu:/\n", {**QUOTA_1, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, None),
    ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    ("0::/\n", {}, None),
])  # fmt: skip
def test_cores_are_as_many_as_a_quota_pays_for(
    groups: str, files: dict[str, str], quota: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)), raising=False)
    root = system(tmp_path, groups, files)
    assert core_quota(root) == quota and usable_cores(root) == (quota or 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5}, raising=False)
    assert core_quota(root) is None and usable_cores(root) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_this_system() -> None:
    available = available_bytes()
    assert available is not None and 0 < available < 1 << 50


# A Raspberry Pi 5's: Arm's Linux tells no model's name.
ARM_CPUINFO = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

processor\t: 1
BogoMIPS\t: 108.00
"""


@pytest.mark.parametrize(("cpuinfo", "name"), [
    (ARM_CPUINFO, "Arm 0x41 0xd0b"), (ARM_CPUINFO.replace("0xd0b", "0xd40"), "Arm 0x41 0xd40"),
    ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7B13\n", "AMD EPYC 7B13"),
    ("", platform.processor() or platform.machine()),
])  # fmt: skip
def test_every_model_of_processor_has_its_own_name(tmp_path: Path, cpuinfo: str, name: str) -> None:
    assert cpu_name(system(tmp_path, "", {"proc/cpuinfo": cpuinfo})) == name


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmRSS:") + 1]) * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not asked")
def test_what_was_freed_goes_back_to_the_system() -> None:
    """Blocks that lie below one in use stay with the process until then."""
    blocks = [bytearray(64 * 1024) for _ in range(64 * 16)]  # too small to be mapped one by one
    last = blocks.pop()
    blocks.clear()
    before = resident_bytes()
    return_freed_memory()
    assert before - resident_bytes() > 48 * MIB and len(last)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be counted anew on Linux alone")
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell what is in memory")
def test_what_is_mapped_of_a_file_is_let_go_of_and_can_be_read_again(tmp_path: Path) -> None:
    path, size = tmp_path / "some weights.bin", 1 << 22
    path.write_bytes(bytes(range(256)) * (size // 256))

    def resident() -> int:
        entries = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1]
        return int(next(line for line in entries.splitlines() if line.startswith("Rss:")).split()[1]) * 1024

    with path.open("rb") as file, mmap(file.fileno(), 0, prot=PROT_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert resident() == size
        release_mapped(tmp_path / "another.bin")
        assert resident() == size
        release_mapped(path)
        assert resident() == 0
        assert mapped[255::256] == b"\xff" * (size // 256)


def test_a_peak_that_is_counted_anew_forgets_what_was_before_and_the_process_does_not() -> None:
    size = 256 * MIB
    memory = b"\1" * size  # every page of it is touched
    del memory
    return_freed_memory()
    most = peak_rss_bytes()
    assert most > size and count_peak_anew()
    begun = counted_peak_bytes()
    assert begun is not None and begun < most - size // 2
    memory = b"\1" * (size // 2)
    counted = counted_peak_bytes()
    assert counted is not None and counted > begun + size // 4
    assert len(memory) and peak_rss_bytes() >= most  # although the system has forgotten


# A process that starts another, which holds memory until it is told to go.
HOLDS = """
import subprocess, sys
holds = "memory = b'1' * (256 << 20); print('held', flush=True); input()"
subprocess.run([sys.executable, "-c", holds], stdin=sys.stdin, check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other processes are counted on Linux alone")
def test_a_watched_peak_counts_what_was_started_too_also_once_it_has_ended() -> None:
    with watched_peak() as peak:
        own = peak_rss_bytes()
        before = peak()
        assert before >= own
        with subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            resident = resident_bytes()
            during = peak()
            process.communicate(b"\n")
        # The largest peak of this process may have been long ago, and the sum is of memory that is held at once.
        assert during >= before and during >= resident + 200 * MIB
        assert process.returncode == 0 and peak() >= during


def test_it_is_watched_without_being_asked_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled, most, calls = threading.Event(), 7 << 50, []

    def held() -> int:
        calls.append(1)
        if len(calls) > 1:  # by now what the first gave is kept
            sampled.set()
        return most

    monkeypatch.setattr("posecrafter_rt.machine._held_bytes", held)
    with watched_peak() as peak:
        assert sampled.wait(60)
        monkeypatch.setattr("posecrafter_rt.machine._held_bytes", lambda: 0)
        assert peak() == most
    assert "watched_peak" not in [thread.name for thread in threading.enumerate()]


def test_what_one_thread_has_found_another_does_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that watches is at its first sample while it is asked for the peak, and samples again later."""
    begun, asked, again, most, calls = threading.Event(), threading.Event(), threading.Event(), 7 << 50, []

    def held() -> int:
        calls.append(1)
        if len(calls) == 1:
            begun.set()
            asked.wait(60)
        elif len(calls) == 2:
            return most
        else:
            again.set()
        return 1

    monkeypatch.setattr("posecrafter_rt.machine._held_bytes", held)
    with watched_peak() as peak:
        assert begun.wait(60) and peak() == most
        asked.set()
        assert again.wait(60) and peak() == most


def test_where_no_peak_can_be_counted_anew_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posecrafter_rt.machine._CLEAR", tmp_path / "proc" / "clear_refs")
    monkeypatch.setattr("posecrafter_rt.machine._STATUS", tmp_path / "proc" / "status")
    assert not count_peak_anew() and counted_peak_bytes() is None and peak_rss_bytes() > 0


@pytest.mark.parametrize(("features", "has_it", "gains"), [
    ({"avx2", "fma"}, False, False),
    ({"avx512f", "avx512_bf16"}, True, False),  # as fast as float32 at best
    ({"avx512f", "avx512_bf16", "amx_bf16"}, True, True),
    ({"asimd", "bf16"}, False, False),  # OpenVINO does not use Arm's, and what it gains elsewhere is not known
])  # fmt: skip
def test_to_multiply_bf16_is_not_to_gain_by_it(
    features: set[str], has_it: bool, gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posecrafter_rt.machine.cpu_features", lambda: features)
    assert (cpu_has_bf16(), cpu_gains_by_bf16()) == (has_it, gains)


def test_openmp_keeps_to_the_calling_thread_and_no_other(two_threads: None) -> None:
    """A thread that comes to torch meanwhile has as many as ever, and so has this one afterwards."""
    elsewhere: list[int] = []

    def ask() -> None:
        torch.ones(1).add_(1)
        elsewhere.append(torch.get_num_threads())

    with pytest.raises(KeyError), one_openmp_thread():
        assert torch.get_num_threads() == 1
        other = threading.Thread(target=ask)
        other.start()
        other.join()
        raise KeyError
    assert torch.get_num_threads() == 2 and elsewhere == [2]


def test_a_thread_that_comes_to_torch_within_it_has_one_thread_and_later_those_of_torch(two_threads: None) -> None:
    seen: list[int] = []

    class Alone:
        has_own_threads = True

    def work() -> None:
        with beside(cast(Engine, Alone())):
            torch.ones(100_000).add_(1)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    other = threading.Thread(target=work)
    other.start()
    other.join()
    assert seen == [1, 2]


def test_where_there_is_no_openmp_nothing_is_changed(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_openmp", lambda: None)
    with one_openmp_thread():
        assert torch.get_num_threads() == 2


@pytest.mark.skipif(counted_peak_bytes() is None, reason="the system does not tell a program's own peak")
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    """Which this one's is, having torch in memory, and more than this."""
    asked = "from posecrafter_rt.machine import peak_rss_bytes; print(peak_rss_bytes())"
    held = bytearray(200 * MIB)
    told = int(subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout)
    assert 0 < told < 100 * MIB < len(held) < peak_rss_bytes()
