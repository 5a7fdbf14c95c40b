"""Small things that several files share: whole files, the command line, the device and its precision."""

import argparse
import contextlib
import math
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def write_whole(path: Path, write: Callable, sync: bool = True) -> None:
    """Write a file whole or not at all: under a temporary name first, then renamed.

    The file is on the disk before it gets its name, so a crash of the machine leaves the old or the new one.

    Args:
        path: file to write; its folder exists. write: called with the open binary file.
        sync: wait for the disk. Files that a checksum protects need not wait.
    Raises: OSError if the file could not be written. What was there before is still there.
    """
    temporary = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        why = f"{path} could not be written ({reason(error)}): is there space, and may you write?"
        raise OSError(why) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_whole` for a string."""
    write_whole(path, lambda file: file.write(text.encode()))


def refusal(where: str | Path, found: str, expected: str) -> ValueError:
    """Return the error for a file or an option that cannot be used, in the form of all our messages."""
    return ValueError(f"{where}: found {found}, expected {expected}")


def reason(error: BaseException) -> str:
    """Return the first line of an error, with the file in front where Python puts it at the end."""
    if getattr(error, "filename", None) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def one_sentence(script: str, debug: bool) -> Iterator[None]:
    """End a script with a message in place of a traceback, unless `debug`: raise SystemExit.

    Our own errors (ValueError, OSError) are told whole, those of torch and of missing packages in one line.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        if debug:
            raise
        text = reason(error)
        if isinstance(error, ValueError) or isinstance(error, OSError) and error.errno is None:
            text = str(error)
        elif isinstance(error, ImportError):
            text += "; pip install -r requirements.txt"
        elif isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
            text = f"found too little memory ({text}); smaller patches, batches, and fewer workers need less"
        elif isinstance(error, RuntimeError):
            text += " (--debug shows the place)"
        raise SystemExit(f"{script}: {text}") from error


def device_name(name: str) -> str:
    """Return the name of a device, and make a GPU with a number the current one; argparse prints errors."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise argparse.ArgumentTypeError(f"found {name}, expected cpu or cuda")
    if kind == "cuda" and int(index or 0) >= (count := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"found {name}, but torch sees {count} GPUs; expected cpu")
    if kind == "cuda" and index:
        torch.cuda.set_device(int(index))  # Parts of torch ask the current device.
    return name


def number(kind: type, zero: bool = False, below: float = math.inf) -> Callable[[str], float]:
    """Make a type for argparse: an int or float above 0, or with `zero` from 0 on, and below `below`."""
    expected = f"{'at least' if zero else 'above'} 0 and below {below:g}"

    def parse(text: str) -> float:
        if not (0 < (value := kind(text)) < below or zero and value == 0):
            raise argparse.ArgumentTypeError(f"found {text}, expected {expected}")
        return value

    parse.__name__ = kind.__name__  # argparse then says "invalid int value"
    return parse


count, index, share = number(int), number(int, zero=True, below=2**63), number(float, zero=True, below=1)


def fold(text: str) -> int | str:
    """Return the number of a fold, or "all"; argparse prints the error for another text."""
    return text if text == "all" else int(text)


AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
# One wording for the options that several scripts have.
COMMON_OPTIONS = {
    "data": {"help": "name of a preset, or a folder with a dataset.json"},
    "root": {"help": "folder with the files of a preset (default: data/<preset>)"},
    "fold": {"type": fold, "help": "fold of five, 0 to 4, or all (default: the published split or fold 0)"},
    "group": {"metavar": "REGEX", "help": "its group is the patient in a case's name (default: guessed)"},
    "modality": {"nargs": "+", "help": "CT, MR, noNorm, rescale_to_0_1 or rgb_to_0_1 (default: by names)"},
    "flip": {"nargs": "*", "choices": tuple("DHW"), "help": "axes of flips (default: by the labels)"},
    "split": {"default": "val", "help": "cases: train, val, test, testing or all (default: %(default)s)"},
    "cache": {"default": "cache", "help": "folder for prepared cases (default: %(default)s)"},
    "sam-checkpoint": {"help": "file with SAM's own weights (default: downloaded once)"},
    "prompts": {"default": "auto", "metavar": "auto|gt|DIR", "help": "boxes: made, true, or of a folder"},
    "device": {"type": device_name, "help": "cpu or cuda (default: cuda if there is a GPU)"},
    "workers": {"type": count, "help": "threads (default: one per core that has 4 GiB of memory)"},
    "patch": {"type": count, "nargs": 3, "metavar": tuple("DHW"), "dest": "patch_size", "help": "voxels"},
    "encoder": {"type": count, "nargs": 2, "metavar": tuple("HW"), "dest": "encoder_size", "help": "pixels"},
    "queries": {"type": count, "metavar": "N", "dest": "num_queries", "help": "number of queries"},
    "batch": {"type": count, "dest": "batch_size", "help": "patches in a batch, which all processes share"},
    "amp": {"choices": AMP_TYPES, "help": "autocast type (default: what the hardware has)"},
}


def make_parser(doc: str, options: str = "", **defaults) -> argparse.ArgumentParser:
    """Make a parser whose --help ends with the usage examples of the script's header; it has --debug.

    Args:
        doc: docstring of the script. Its first line is the description; its indented `python ...` and
            `torchrun ...` lines are the examples.
        options: names in `COMMON_OPTIONS`, with blanks. defaults: values for some, which --help then tells.
    """
    examples = "\n".join(["examples:", *re.findall(r"^    (?:python|torchrun) .*$", doc, re.MULTILINE)])
    texts = {"description": doc.splitlines()[0], "epilog": examples}
    parser = argparse.ArgumentParser(**texts, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in options.split():
        option = dict(COMMON_OPTIONS[name])
        if name in defaults:
            words = option["help"].split(" (default")[0]
            option |= {"default": defaults[name], "help": f"{words} (default: %(default)s)"}
        parser.add_argument(f"--{name}", **option)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


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


def total_memory(device: str | torch.device = "cpu") -> float:
    """Return the bytes of memory of a GPU or of this machine; infinity if Python cannot tell, on Windows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return math.inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_workers() -> int:
    """Return one thread per core, as long as each has 4 GiB of memory (a CT of 512 x 512 x 300 takes it)."""
    # macOS and Windows have no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(max(1, min(cores, total_memory() // 2**32)))
