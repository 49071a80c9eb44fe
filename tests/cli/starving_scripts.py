"""A script that tests run in a process of their own: a command from which the disk or memory is taken, over and over."""

from __future__ import annotations

from tests.cli.kill_scripts import FORKS
from tests.render_scripts import TAKE_MEMORY

# Repeats one render into FOLDER/out.mp4, by a copy of an engine that lies in FOLDER, too, for so many rounds: in each it is
# starved once or twice, and then left alone. Prints of every run how it was starved, its exit status, what it said, the hashes
# of all files, and the state of the unfinished render; the first run is unbroken. When it is done, its outputs are moved to
# DONE/NUMBER, and the cache is emptied. Ways to starve it, of which each run takes one:
# - disk calls: the n-th file or folder that it makes, renames or flushes finds no space, or all from the n-th on do.
# - file system (FOLDER is a small one): a few more pages, or files, than are in use.
# - network calls: memory runs out for the n-th, for three, for all from the n-th on, or for those of many frames.
# - process: at a random time it is given almost no more memory than it has.
STARVING = f"""{FORKS}{TAKE_MEMORY}
import atexit, errno, gc, multiprocessing, shutil, subprocess, tempfile
from posecrafter_rt.engines.torch import TorchEngine

seed, rounds, ways, engine, folder, done, *options = sys.argv[1:]
rng, ways, folder, done = random.Random(int(seed)), ways.split(", "), pathlib.Path(folder), pathlib.Path(done)
output, state, copied = folder / "out.mp4", folder / "out.mp4.partial" / "state.json", folder / "tiny.engine"
said, runs, spans = tempfile.TemporaryFile(), [], []
counted = multiprocessing.RawArray("l", 4)  # by a run: calls to the disk; pages and files in use at most; calls of networks

def used():
    room = os.statvfs(folder)
    return room.f_blocks - room.f_bfree, room.f_files - room.f_ffree

def mount(change="", size=1 << 26, nr_inodes=1 << 12):
    if "file system" in ways:
        command = ["mount", "-t", "tmpfs", "-o", f"{{change}}size={{size}},nr_inodes={{nr_inodes}}", "tmpfs", folder]
        subprocess.run(command, check=True)

def full_from(first, last):
    def seen(path, *named):
        if pathlib.Path(os.fsdecode(path)).is_relative_to(folder):
            counted[:3] = counted[0] + 1, *map(max, counted[1:3], used())
            if first <= counted[0] <= last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)

    def hook(event, arguments):
        if event in ("os.mkdir", "os.rename") or event == "open" and (arguments[2] or 0) & os.O_CREAT:
            seen(arguments[0], arguments[0])

    fsync = os.fsync
    os.fsync = lambda descriptor: (seen(os.readlink(f"/proc/self/fd/{{descriptor}}")), fsync(descriptor))
    sys.addaudithook(hook)

def run_out(kind):
    if kind == "python":
        raise MemoryError
    if kind == "gpu":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    torch.empty(1 << 60, dtype=torch.uint8)  # more than any address space holds

def run_out_from(first, last, most, kind):
    original = TorchEngine.__call__
    def starved(engine, **inputs):
        counted[3] += 1
        if first <= counted[3] <= last and len(next(iter(inputs.values()))) > most:
            run_out(kind)
        return original(engine, **inputs)
    TorchEngine.__call__ = starved

def take_memory_at(seconds, num_bytes):
    def taken(*none):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(120)  # Python waits for ever for a thread that had no memory to begin with
        take_memory(num_bytes)

    signal.signal(signal.SIGALRM, taken)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # Python gives up its handlers before it ends

def run(way, prepare=lambda: None):
    said.seek(0)
    said.truncate()
    counted[:] = [0] * 4

    def prepared():
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        prepare()

    begin = time.monotonic()
    status = wait(start("render", str(copied), "-o", str(output), *options, prepare=prepared))
    said.seek(0)
    files = {{str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
              for path in folder.rglob("*") if path.is_file()}}
    left = json.loads(state.read_text()) if state.exists() else None
    print(json.dumps([way, status, said.read().decode(), files, left]), flush=True)
    runs.append(status)
    if status == 0:
        spans.append(time.monotonic() - begin)
        (done / str(len(runs) - 1)).mkdir()
        for path in folder.glob("out.*"):
            shutil.move(path, done / str(len(runs) - 1))
        shutil.rmtree(copied / "inversions", ignore_errors=True)

def starve(way):
    if way == "disk calls":
        first = rng.randint(1, num_disk)
        moments = first, rng.choice([first, 10**9])
        run([way, *moments], lambda: full_from(*moments))
    elif way == "file system":
        which = rng.randint(0, 1)
        limit = used()[which] + rng.randint(0, num_used[which])
        mount("remount,", **[{{"size": limit * os.statvfs(folder).f_bsize}}, {{"nr_inodes": limit}}][which])
        run([way, ["pages", "files"][which], limit])
        mount("remount,")
    elif way == "network calls":
        first, kind = rng.randint(1, num_networks), rng.choice(["python", "gpu", "torch"])
        moments = rng.choice([(first, first, 0), (first, first + 2, 0), (first, 10**9, 0), (first, 10**9, rng.randint(1, 6))])
        run([way, *moments, kind], lambda: run_out_from(*moments, kind))
    else:
        moment = rng.uniform(0, min(spans)), rng.choice([0, 1 << 20, 1 << 23, 1 << 25])
        run([way, *moment], lambda: take_memory_at(*moment))

mount()
shutil.copytree(engine, copied)
before = used()
gc.collect()
gc.freeze()  # or each process would first of all copy what it has from this one, when it collects garbage
run(["unbroken"], lambda: (full_from(0, -1), run_out_from(0, -1, 0, "")))
num_disk, *peaks, num_networks = counted
num_used = [peak - begin for peak, begin in zip(peaks, before)]
for _ in range(int(rounds)):
    for _ in range(rng.randint(1, 2)):
        starve(rng.choice(ways))
        if runs[-1] == 0:
            break
    else:
        run(["alone"])
"""
