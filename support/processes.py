"""What a long training needs of the machine: several processes, signals, one run per folder, its memory.

torchrun ── join ──> Processes(rank, local_rank, world, gloo) ── from_first, gather ──> the same in all
SIGTERM, SIGINT, SIGUSR1 ── catch_signals ──> number, at which train.py looks in each step
"""

import atexit
import contextlib
import dataclasses
import datetime
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


@dataclasses.dataclass
class Processes:
    """The place of this process among all that train together.

    Args:
        rank, local_rank: number among all, and among those of this machine, which is also that of its GPU.
        world: number of processes. gloo: a group on the CPU that waits for hours, or None for one process.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    gloo: dist.ProcessGroup | None = None

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return in every process what `make` returns in the first one: machines may share no folder."""
        made = [make() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(made, group=self.gloo)
        return made[0]

    def gather(self, value: Any) -> list:
        """Return the values of all processes. They may take hours to get here."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.gloo)
        return values


def join(device: str | None) -> Processes:
    """Join the processes that torchrun started, if it did. ValueError: one device for all was asked for."""
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    rank, local_rank, world = (int(os.environ.get(name, value)) for name, value in defaults.items())
    if world == 1:
        return Processes()
    if device and ":" in device:
        raise ValueError(f"--device: found {device}, expected cuda: each of {world} processes has its GPU")
    gpus = torch.cuda.is_available() and device != "cpu"
    if gpus:
        torch.cuda.set_device(local_rank)
    # torchrun keeps its store when it starts processes again. The addresses of dead processes lie in it.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=world)
    # Preparing and validating may take some processes longer than NCCL's limit of ten minutes.
    gloo = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    return Processes(rank, local_rank, world, gloo)


@contextlib.contextmanager
def catch_signals() -> Iterator[SimpleNamespace]:
    """Note the `number` of the first signal of a scheduler or of Ctrl-C, 0 before, in place of dying."""
    signals = SimpleNamespace(number=0)

    def note(number: int, _frame: object) -> None:
        signals.number = signals.number or number

    old = {number: signal.signal(number, note) for number in STOPS}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def ignore_signals(_worker: int) -> None:
    """Let a process that loads patches live as long as the one that trains."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers() -> None:
    """End the processes that ignore signals. After an error Python would wait for them for ever."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would take it for an accident.
        worker.kill()


if hasattr(signal, "SIGCHLD"):  # Windows ends them in any case.
    atexit.register(kill_workers)


def lock(folder: Path) -> Any:
    """Make a folder, and take it for this process until the returned file is closed or the process ends.

    Raises: ValueError, with the number of the process that has it. Windows has no such lock: None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        return None
    file = open(folder / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # The system frees it when the process dies.
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = f"process {file.read().strip()}, expected none: wait for its end, or choose another --name"
        raise ValueError(f"{folder}: found a run of {owner}") from None
    except OSError:  # some network file systems
        print(f"lock      {folder} cannot be locked here: start no second run of this name")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def peak_memory(device: torch.device) -> float:
    """Return the largest memory so far in bytes, of the GPU or of this process; NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return math.nan
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def needs_checkpointing(model: torch.nn.Module, patches: int, amp: str, memory: float) -> bool:
    """Whether encoder blocks would keep over a sixth of a memory in bytes for backward (Ours)."""
    config, kept = model.config, 74 if amp == "off" else 42  # bytes per token, channel, block, of ViT-B
    tokens = patches * config.patch_size[0] * math.prod(config.grid)
    return kept * tokens * sum(model.encoder.block_dims) > memory / 6
