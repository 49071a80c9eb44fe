"""Scripts that tests run in a process of their own: commands that are killed, and two at the same time."""

from __future__ import annotations

# What the scripts below begin with: processes that run the command, forked from one that has only imported what takes long
# to import.
FORKS = """
import gc, hashlib, json, os, pathlib, pkgutil, random, signal, sys, time
import posecrafter_rt.cli.render, posecrafter_rt.engines.torch, posecrafter_rt.models.networks, posecrafter_rt.rendering
import posecrafter_rt.poses.openpose_json, posecrafter_rt.poses.shown
import pydantic.type_adapter, rich._emoji_codes, torch, typer.rich_utils
from posecrafter_rt.cli.main import main

gc.collect()
gc.freeze()  # or each process would first of all copy what it has from this one, when it collects garbage

def start(*command, prepare=lambda: None):
    victim = os.fork()
    if not victim:
        os.dup2(2, 1)
        sys.argv = ["posecrafter-rt", *command]
        prepare()
        main()
    return victim

def wait(victim):
    return os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])

def finished(output):
    state = pathlib.Path(output + ".partial/state.json")
    return len(json.loads(state.read_text())["segments"]) if state.exists() else None
"""
# Runs the command once for each moment, in a process that kills itself (SIGKILL: nothing is cleaned up) at the n-th call
# of a function.
VICTIMS = f"""{FORKS}
def die_at(target, moment):
    owner, name = target.rsplit(".", 1)
    original, calls = pkgutil.resolve_name(target), []
    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(pkgutil.resolve_name(owner), name, killed)

output, moments, *command = sys.argv[1:]
for target, call in json.loads(moments):
    status = wait(start(*command, prepare=lambda: die_at(target, call)))
    print(json.dumps([status, finished(output), os.path.exists(output)]), flush=True)
"""
# Kills the command from outside until it was killed so many times, at moments drawn from what the faster of two unbroken runs
# takes (the first one fills the system's caches). Each time the inversion is to be computed anew. A render that is done in
# spite of it makes way for the next one. Prints after each: whether it was killed, how many segments are finished, and the
# hashes of the outputs that are in place.
CHAOS = f"""{FORKS}
seed, kills, output, inversions, *command = sys.argv[1:]
places = [pathlib.Path(output).with_suffix(suffix) for suffix in (".mp4", ".png", ".report.json")]
rng, killed, spans = random.Random(int(seed)), 0, []
while killed < int(kills):
    for file in pathlib.Path(inversions).glob("*"):
        file.unlink()
    begin, victim = time.monotonic(), start(*command)
    if len(spans) == 2:
        time.sleep(rng.uniform(0, min(spans)))
        os.kill(victim, signal.SIGKILL)
    status = wait(victim)
    if len(spans) < 2:
        spans.append(time.monotonic() - begin)
    killed += status == -signal.SIGKILL
    hashes = {{place.name: hashlib.sha256(place.read_bytes()).hexdigest() for place in places if place.exists()}}
    print(json.dumps([status, finished(output), hashes]), flush=True)
    if status not in (0, -signal.SIGKILL):
        break
    if finished(output) is None:
        for place in places:
            place.unlink(missing_ok=True)
"""
# Two renders by one avatar at the same time, its cache of inversions empty.
PAIR = f"""{FORKS}
first, second, *command = sys.argv[1:]
print(json.dumps([wait(victim) for victim in [start(*command, "-o", output) for output in (first, second)]]))
"""
