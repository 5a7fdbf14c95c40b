"""Kill, stop, restart and damage trainings of the phantom, and count what they survive. Run by hand:

    python tests/survive.py kills 60         SIGKILL at random times, then --resume: files and weights
    python tests/survive.py signals 20       SIGTERM, SIGINT and SIGUSR1, on one process and on two in turn
    python tests/survive.py restarts 10      a worker of torchrun is killed, and torchrun goes on by itself
    python tests/survive.py files 500        bits, ends and entries of a checkpoint are changed; it is read

Everything happens in a new temporary folder; the seed is 0. Each line counts survived, noticed and missed.
"""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import model
from data import Plan
from support import phantom
from support.checkpoints import read_checkpoint

SIZES = "--sam tiny --patch 2 32 32 --encoder 32 32 --queries 4 --amp off --lr 1e-3 --workers 0".split()
SIZES += "--epochs 3 --iterations 4 --val-every 2 --root data --name".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--monitor-interval=1"]


def write_small_phantom(folder: Path) -> None:
    """Write a phantom of two slices with 32 x 32 voxels, so that a run takes seconds."""
    phantom.write_phantom(folder, num_patients=5, seed=1)
    for file in folder.rglob("*.nii.gz"):
        volume = np.asarray(nib.load(file).dataobj)
        x, y, z = (n // 2 for n in volume.shape)
        part = volume[x - 32 : x + 32 : 2, y - 32 : y + 32 : 2, z - 1 : z + 1]
        nib.save(nib.Nifti1Image(part, np.diag([3, 3, 8, 1])), file)


def start(name: str, world: int = 1, *torchrun: str) -> subprocess.Popen:
    """Start a training, which resumes if there is something. Every fifth makes its own cache."""
    cache = f"cache-{name}" if name.endswith(("0", "5")) else "cache"
    program = [*TORCHRUN, f"--master-port={random.randint(20000, 60000)}", *torchrun] if world > 1 else []
    command = [
        *(program or [sys.executable]),
        str(ROOT / "train.py"),
        *SIZES,
        name,
        "--resume",
        "--cache",
        cache,
    ]
    log = open(f"{name}.txt", "a")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def steps_done(name: str) -> int:
    """Return the step of last.pt, or -1."""
    path = Path(f"runs/phantom-{name}/last.pt")
    return torch.load(path, weights_only=True)["step"] if path.exists() else -1


def result(name: str) -> tuple[list, dict]:
    """Return the parts of a finished run that must be equal: its log without times, its last weights."""
    folder = Path(f"runs/phantom-{name}")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in entry.items() if "seconds" not in k and k != "gib"} for entry in log]
    return log, read_checkpoint(folder / "last.pt")["state"]


def compare(name: str, whole: tuple[list, dict]) -> str:
    """Say whether a run equals the one that nobody disturbed, and its folder has no left-over file."""
    log, state = result(name)
    same = log == whole[0] and all(torch.equal(state[key], whole[1][key]) for key in state)
    left = [*Path(f"runs/phantom-{name}").glob("*.partial")]
    return "survived" if same and not left else "missed"


def wait(process: subprocess.Popen, limit: float = 600) -> int:
    """Return the exit status of a process; end it, and all that it started, after `limit` seconds."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait() - 1000


def seconds_of(name: str, process: subprocess.Popen) -> float:
    """Wait for a run's first step, and for the end of an undisturbed run; return the seconds between."""
    while "output" not in Path(f"{name}.txt").read_text() and process.poll() is None:
        time.sleep(0.05)
    began = time.time()
    if name.startswith("whole"):
        assert wait(process) == 0, Path(f"{name}.txt").read_text()[-2000:]
    return time.time() - began


def disturb(kind: str, number: int, whole: dict, seconds: dict) -> str:
    """Disturb one run at a random time, let it go on, and judge its end."""
    world = 2 if kind == "restarts" or kind == "signals" and number % 2 else 1
    name = f"{kind}{number}"
    process = start(name, world, *(["--max-restarts=3"] if kind == "restarts" else []))
    if number % 5:  # The others are disturbed at any time, also while they prepare.
        seconds_of(name, process)
    time.sleep(seconds[world] * random.uniform(0, 0.9))
    if process.poll() is None:
        if kind == "kills":
            os.killpg(process.pid, signal.SIGKILL)
            wait(process)
        elif kind == "signals":
            sent = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1][number // 2 % 3]
            workers = children(process.pid) if world == 2 else [process.pid]
            before = steps_done(name)
            os.kill(random.choice(workers or [process.pid]), sent)
            status = wait(process)
            began = "epoch" in Path(f"{name}.txt").read_text()  # Before the first step nothing is lost.
            if began and status not in (0, 128 + sent, 1) or steps_done(name) < before:
                return f"missed (status {status})"
        elif workers := children(process.pid):
            os.kill(random.choice(workers), signal.SIGKILL)
    status = wait(process)
    if kind != "restarts":
        status = wait(start(name, world))
    return compare(name, whole[world]) if status == 0 else f"missed (status {status} at the end)"


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def damage(path: Path, copy: Path) -> str:
    """Change a checkpoint at random, build its model as evaluate.py does, and say what came of it."""
    data, kind = bytearray(path.read_bytes()), random.choice(["bit", "end", "hole", "entry"])
    place, content = random.randrange(len(data)), torch.load(path, weights_only=True)
    if kind == "bit":
        data[place] ^= 1 << random.randrange(8)
    elif kind == "end":
        del data[place:]
    elif kind == "hole":
        data[place : place + 512] = bytes(512)
    copy.write_bytes(data)
    if kind == "entry":
        part = random.choice(["config", "plan", "cases", "state", "sam"])
        key = random.choice([*content[part]])
        content[part][key] = random.choice([-1, 10**9, "x", None, {}, [torch.nan], torch.tensor(torch.nan)])
        torch.save(content, copy)
        kind = f"entry {part}.{key if part != 'state' else '*'}"
    try:
        network, read = model.load_checkpoint(copy)
        Plan.from_dict(read["plan"])
    except ValueError as error:
        return f"{kind.split('.')[0]} noticed" if "weights_only" not in str(error) else f"missed: {error}"
    except Exception as error:
        return f"missed: {kind} {type(error).__name__}"
    state = model.trained_state(network)
    same = all(torch.equal(content["state"][key], state[key]) for key in state)
    return f"{kind} harmless" if same else f"missed: {kind}"


def main() -> None:
    """Do what the command line says, and print counts."""
    kind, number = sys.argv[1], int(sys.argv[2])
    random.seed(0)
    os.chdir(tempfile.mkdtemp(prefix="survive-"))
    write_small_phantom(Path("data"))
    whole, seconds, counts = {}, {}, collections.Counter()
    for world in (1, 2) if kind in ("signals", "restarts") else (1,):
        seconds[world] = seconds_of(f"whole{world}", start(f"whole{world}", world))
        whole[world] = result(f"whole{world}")
    for i in range(number):
        if kind == "files":
            outcome = damage(Path("runs/phantom-whole1/last.pt"), Path("copy.pt"))
        else:
            outcome = disturb(kind, i, whole, seconds)
        counts[outcome] += 1
        if kind != "files" or not (i + 1) % 100:
            print(i + 1, dict(sorted(counts.items())), flush=True)
    print(f"{kind} {number} in {os.getcwd()}: {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    main()
