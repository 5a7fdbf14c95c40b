"""One run per folder, signals, and memory on systems that measure it in another way."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support import processes


def test_a_folder_belongs_to_one_process_until_it_dies(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready, never = fork.Event(), fork.Event()

    def hold() -> None:
        held = processes.lock(tmp_path / "run")
        ready.set()
        never.wait()
        held.close()

    other = fork.Process(target=hold, daemon=True)
    other.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match=f"run: found a run of process {other.pid}, expected none: wait for"):
        processes.lock(tmp_path / "run")
    other.kill()
    other.join()
    with processes.lock(tmp_path / "run"):
        assert (tmp_path / "run/lock").read_text() == str(os.getpid())


def test_the_first_signal_is_noted_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with processes.catch_signals() as signals:
        assert signals.number == 0
        for number in (signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_ends_the_program_though_its_workers_ignore_signals():
    code = """
import sys
from torch.utils.data import DataLoader
from support.processes import ignore_signals
batches = iter(DataLoader(range(9), num_workers=2, worker_init_fn=ignore_signals))
next(batches)
print(file=sys.stderr)
raise SystemExit("an error")  # with the workers alive
"""
    options = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True, "timeout": 60}
    end = subprocess.run([sys.executable, "-c", code], **options)
    assert end.returncode == 1 and end.stderr.endswith("\nan error\n")


def test_other_systems_measure_memory_in_bytes_or_not_at_all(monkeypatch):
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: SimpleNamespace(ru_maxrss=3))
    monkeypatch.setitem(sys.modules, "resource", usage)
    for system, size in (("linux", 3072), ("darwin", 3)):
        monkeypatch.setattr(sys, "platform", system)
        assert processes.peak_memory(torch.device("cpu")) == size
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(processes.peak_memory(torch.device("cpu")))


def test_processes_that_torchrun_starts_again_do_not_look_for_the_dead():
    """torchrun keeps its store, where the addresses of the processes of the first start lie."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    places["TORCHELASTIC_USE_AGENT_STORE"], fork = "True", multiprocessing.get_context("fork")

    def work(rank: int, start: int) -> None:
        os.environ |= places | {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(start)}
        time.sleep(1 - rank)  # So the second one meets only what the dead have left.
        assert processes.join("cpu").gather(rank) == [0, 1]

    for start in (0, 1):
        workers = [fork.Process(target=work, args=(rank, start), daemon=True) for rank in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0]


def test_one_device_for_several_processes_is_refused(monkeypatch):
    assert processes.join("cuda:0") == processes.Processes(0, 0, 1, None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--device: found cuda:0, expected cuda: each of 2 processes has"):
        processes.join("cuda:0")
