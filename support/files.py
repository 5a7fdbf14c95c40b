"""What several files need: files written whole or not at all, the device, its autocast type, how many threads."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def write_whole(path: Path, write: Callable) -> None:
    """Call `write` with a temporary file beside `path`, then rename it: the file is whole or as it was before.

    Raises:
        OSError: naming the file, where it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}): is there space, and may you write?") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def default_device() -> str:
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_amp(device: str | torch.device) -> str:
    """The autocast type that serves a device: bf16 where it multiplies it in hardware, else fp16 on a GPU, or off."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "off"


def default_workers() -> int:
    """Threads to read and prepare with: one a core, as far as each has 4 GiB (a CT of 512 x 512 x 300 takes that)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**32))
