"""Kill, stop, restart and damage trainings of the phantom, and count what they survive. Run by hand:

    python tests/survive.py kills 60         SIGKILL at random times, then --resume: files and weights
    python tests/survive.py prepare 20       SIGKILL while cases are prepared, then again: the cache
    python tests/survive.py predict 20       SIGKILL while cases are predicted or scored, then again
    python tests/survive.py signals 20       SIGTERM, SIGINT and SIGUSR1, on one process and on two in turn
    python tests/survive.py restarts 10      a worker of torchrun is killed, and torchrun goes on by itself
    python tests/survive.py files 500        bits, ends and entries of a checkpoint are changed; it is read

Everything happens in a new temporary folder; the seed is 0. Each line counts survived, noticed and missed.
"""

import collections
import json
import multiprocessing
import os
import random
import signal
import socket
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

import data
import evaluate
import model
import train
from support import phantom
from support.checkpoints import read_checkpoint

OPTIONS = "--sam tiny --patch 2 32 32 --encoder 32 32 --queries 4 --amp off --lr 1e-3 --workers 0 --epochs 3"
OPTIONS = f"{OPTIONS} --iterations 4 --val-every 2 --root data --resume --name".split()
FORK = multiprocessing.get_context("fork")  # Nothing is imported again.


def write_small_phantom(folder: Path) -> None:
    """Write a phantom of two slices with 32 x 32 voxels, so that a run takes seconds."""
    phantom.write_phantom(folder, num_patients=5, seed=1)
    for file in folder.rglob("*.nii.gz"):
        volume = np.asarray(nib.load(file).dataobj)
        x, y, z = (n // 2 for n in volume.shape)
        part = volume[x - 32 : x + 32 : 2, y - 32 : y + 32 : 2, z - 1 : z + 1]
        nib.save(nib.Nifti1Image(part, np.diag([3, 3, 8, 1])), file)


def work(name: str, rank: int, world: int, port: int) -> None:
    """Train in a new process. Every fifth run makes its own cache."""
    for descriptor in (1, 2):
        os.dup2(os.open(f"{name}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
    torch.set_num_threads(1)
    train.draw = lambda run: None
    if name.startswith("prepare"):
        data.main(["prepare", "--root", "data", "--cache", name, "--workers", "1"])
    elif name.startswith("predict"):
        ckpt = "--ckpt runs/phantom-whole1/best.pt --root data --split all --workers 1 --output".split()
        evaluate.main([*ckpt, name])
    else:
        train.main([*OPTIONS, name, "--cache", f"cache-{name}" if name[-1] in "05" else "cache"])


def start(name: str, world: int) -> list[multiprocessing.Process]:
    """Start a training, which resumes if there is something."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [FORK.Process(target=work, args=(name, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[multiprocessing.Process]) -> list[int]:
    """Return the exit status of each process. After ten minutes it is killed."""
    for process in processes:
        process.join(600)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def wait_for_step(name: str, pid: int) -> None:
    """Wait until a run has printed its settings, or ended."""
    log = Path(f"{name}.txt")
    while not (log.exists() and "output" in log.read_text()) and Path(f"/proc/{pid}/exe").exists():
        time.sleep(0.02)


def result(name: str) -> tuple[list, dict]:
    """Return what must be equal: the bytes of all files; of a training its log without times, its weights."""
    folder = Path(name)
    if folder.is_dir():  # a cache or predictions
        return [], {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}
    folder = Path(f"runs/phantom-{name}")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in entry.items() if "seconds" not in k and k != "gib"} for entry in log]
    return log, read_checkpoint(folder / "last.pt")["state"]


def disturb(kind: str, number: int, whole: dict, seconds: dict) -> str:
    """Disturb one run at a random time, let it go on, and judge its end."""
    world, name = (2 if kind == "restarts" or kind == "signals" and number % 2 else 1), f"{kind}{number}"
    if kind == "restarts":
        command = "-m torch.distributed.run --nproc_per_node=2 --monitor-interval=1 --max-restarts=3"
        command = [sys.executable, *command.split(), str(ROOT / "train.py"), *OPTIONS, name]
        with open(f"{name}.txt", "w") as log:
            agent = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for_step(name, agent.pid)
    else:
        processes = start(name, world)
        if number % 5 and kind in ("kills", "signals"):  # The others are disturbed while they prepare, too.
            wait_for_step(name, processes[0].pid)
    time.sleep(seconds[world] * random.uniform(0, 0.9))
    if kind == "restarts":
        workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout
        if not workers:
            return "had ended before"
        os.kill(int(random.choice(workers.split())), signal.SIGKILL)
        status = [agent.wait(900)]
    else:
        soft = random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        sent = soft if kind == "signals" else signal.SIGKILL
        os.kill(random.choice(processes).pid, sent)
        status = wait(processes)
        if kind != "signals" and status == [0]:
            return "had ended before"
        begun = "epoch" in Path(f"{name}.txt").read_text()  # Before the first step nothing is lost.
        if kind == "signals" and begun and set(status) not in ({0}, {128 + sent}):
            return f"missed (status {status} after {sent.name})"
        status = wait(start(name, world))
    if any(status):
        return f"missed (status {status} at the end)"
    (log, state), left = result(name), [*Path(".").rglob("*.partial")]
    same = log == whole[world][0] and state.keys() == whole[world][1].keys()
    equal = torch.equal if kind in ("kills", "signals", "restarts") else bytes.__eq__
    same = same and all(equal(state[key], whole[world][1][key]) for key in state)
    return "survived" if same and not left else f"missed (same {same}, left over {len(left)})"


def damage(path: Path, copy: Path) -> str:
    """Change a checkpoint at random, build its model as evaluate.py does, and say what came of it."""
    content, kind = bytearray(path.read_bytes()), random.choice(["bit", "end", "hole", "entry"])
    place = random.randrange(len(content))
    if kind == "bit":
        content[place] ^= 1 << random.randrange(8)
    else:
        content[place:] = b"" if kind == "end" else bytes(512) + content[place + 512 :]
    copy.write_bytes(content)
    content = torch.load(path, weights_only=True)
    if kind == "entry":
        part = random.choice(["config", "plan", "cases", "state", "sam"])
        key = random.choice([*content[part]])
        content[part][key] = random.choice([-1, 10**9, "x", None, {}, [torch.nan], torch.tensor(torch.nan)])
        torch.save(content, copy)
        kind = f"entry {part}.{key if part != 'state' else '*'}"
    try:
        network, read = model.load_checkpoint(copy)
        data.Plan.from_dict(read["plan"])
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
    names = {"whole1": 1, "whole2": 2} if kind in ("signals", "restarts") else {"whole1": 1}
    for name, world in (names | ({f"{kind}-whole": 1} if kind in ("prepare", "predict") else {})).items():
        began, processes = time.time(), start(name, world)
        if name.startswith("whole"):
            wait_for_step(name, processes[0].pid)
            began = time.time()
        assert not any(wait(processes)), Path(f"{name}.txt").read_text()[-2000:]
        whole[world], seconds[world] = result(name), time.time() - began
    for i in range(number):
        last = Path("runs/phantom-whole1/last.pt")
        counts[damage(last, Path("copy.pt")) if kind == "files" else disturb(kind, i, whole, seconds)] += 1
        if not (i + 1) % (100 if kind == "files" else 5):
            print(i + 1, dict(sorted(counts.items())), flush=True)
    print(f"{kind} {number} in {os.getcwd()}: {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    main()
