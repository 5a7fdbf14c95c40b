"""Small things that several files share: whole files, the command line, the device and its precision."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

# ----------------------------------------------------------------------------------------------------- files


def write_whole(path: Path, write: Callable) -> None:
    """Write a file whole or not at all: under a temporary name first, then renamed.

    Args:
        path: file to write; its folder exists. write: called with the open binary file.
    Raises:
        OSError: the file could not be written. What was there before is still there.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({reason}): is there space, and may you write?"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_whole` for a string."""
    write_whole(path, lambda file: file.write(text.encode()))


# ---------------------------------------------------------------------------------------------- command line

# One wording for the options that several scripts have.
COMMON_OPTIONS = {
    "data": {"help": "name of a preset, or a folder with a dataset.json"},
    "root": {"help": "folder with the files of a preset (default: data/<preset>)"},
    "fold": {"type": int, "help": "fold of five, 0 to 4 (default: the published split, or else fold 0)"},
    "cache": {"default": "cache", "help": "folder for prepared cases (default: %(default)s)"},
    "sam-checkpoint": {"help": "file with SAM's own weights (default: downloaded once)"},
    "prompts": {
        "default": "auto",
        "metavar": "auto|gt|DIR",
        "help": "who makes the box prompts: the model (auto), the true labels (gt), or label maps of another "
        "program in a folder (default: %(default)s)",
    },
    "device": {"help": "cpu or cuda (default: cuda if there is a GPU)"},
    "workers": {"type": int, "help": "number of threads (default: one per core that has 4 GiB of memory)"},
}


def make_parser(doc: str, *options: str, **defaults) -> argparse.ArgumentParser:
    """Make a parser whose --help ends with the usage examples of the script's header.

    Args:
        doc: docstring of the script. Its first line is the description; its indented `python ...` and
            `torchrun ...` lines are the examples.
        options: names in `COMMON_OPTIONS` to add. defaults: values for some of them, which --help then tells.
    """
    examples = "\n".join(["examples:", *re.findall(r"^    (?:python|torchrun) .*$", doc, re.MULTILINE)])
    texts = {"description": doc.splitlines()[0], "epilog": examples}
    parser = argparse.ArgumentParser(**texts, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in options:
        option = dict(COMMON_OPTIONS[name])
        if name in defaults:
            words = option["help"].split(" (default")[0]
            option |= {"default": defaults[name], "help": f"{words} (default: %(default)s)"}
        parser.add_argument(f"--{name}", **option)
    return parser


# ---------------------------------------------------------------------------------------------------- device

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_amp(device: str | torch.device) -> str:
    """Return the autocast type that a device computes in hardware: a key of `AMP_TYPES`."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "off"


def autocast(device: str | torch.device, amp: str) -> torch.autocast:
    """Return the context in which the network on a device runs; `amp` is a key of `AMP_TYPES`."""
    return torch.autocast(torch.device(device).type, AMP_TYPES[amp], enabled=amp != "off")


def default_workers() -> int:
    """Return one thread per core, as long as each has 4 GiB of memory (a CT of 512 x 512 x 300 takes it)."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**32))
