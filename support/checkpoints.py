"""Write and read the files of trained weights (paper 3); model.py builds a model from them.

{config, sam, plan, state, cases, ...} ── write_checkpoint ──> best.pt ── read_checkpoint ──> the same dict
"""

import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from support.files import reason, write_whole

# Every checkpoint has the configuration of the model, the name and sha256 of SAM's file, the plan of the
# data, the trained weights, and the names of the cases: {"train": [name], "val": [name]}.
KEYS = {"config", "sam", "plan", "state", "cases"}
# Entries that some checkpoints have. train.py needs all of them to resume.
OTHER_TYPES = {"arguments": dict, "metrics": dict, "schedule": dict, "optimizer": dict, "scaler": dict}
OTHER_TYPES |= {"sums": dict, "epoch": int, "step": int, "best": float, "elapsed": float}
# Ours: bounds of a configuration. A damaged or foreign file cannot ask for all the memory.
BOUNDS = {"num_channels": 64, "num_classes": 256, "num_queries": 1024}
BOUNDS |= {"patch_size": 1024, "encoder_size": 4096}


def write_checkpoint(path: str | Path, content: dict) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: file in a folder that exists.
        content: the `KEYS`, and further plain values or tensors, such as the epoch or the optimizer's state.
    Raises: OSError if the disk refuses it, ValueError for NaN or infinity; an older file is then unchanged.
    """
    if name := not_finite(content.get("state", {})):
        raise ValueError(f"{path}: found numbers that are not finite in {name}, so nothing was written")
    write_whole(Path(path), lambda file: torch.save(content, file))


def read_checkpoint(path: str | Path, more: Iterable[str] = ()) -> dict:
    """Return the content of a checkpoint, with all tensors on the CPU.

    Only tensors and plain values are read (`weights_only`), so a file of unknown origin cannot run code.

    Args: path: the file. more: keys of `OTHER_TYPES` that it must have besides the `KEYS`.
    Raises: FileNotFoundError if there is no such file; ValueError if it is damaged, or if one of its entries
        is missing, of another type, or out of bounds.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected a checkpoint of train.py, as in runs/")
    cause = None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # reads all bytes and compares their sums, which torch does not
        problem = f"damaged bytes in {damaged}" if damaged else None
        if problem is None:
            content = torch.load(path, map_location="cpu", weights_only=True)
            problem = next(_problems(content, {*KEYS, *more}, Path(path).stat().st_size), None)
    except Exception as error:  # A broken or foreign file can raise almost any error here.
        # torch advises to read such a file without `weights_only`, which would run its code.
        problem = "more than tensors and plain values" if "weights_only" in str(error) else reason(error)
        problem, cause = f"no {error.args[0]} in it" if isinstance(error, KeyError) else problem, error
    if problem:
        raise ValueError(f"{path}: found {problem}, expected a checkpoint of train.py") from cause
    return content


def not_finite(state: dict[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinity, or None."""
    return next((name for name, tensor in state.items() if not tensor.isfinite().all()), None)


def _problems(content: dict, keys: set[str], size: int) -> Iterator[str]:
    """Yield the problems of the content of a file. The file has `size` bytes."""
    if missing := keys - content.keys():
        yield f"no {', '.join(sorted(missing))} in it"
    for key, kind in (dict.fromkeys(KEYS, dict) | OTHER_TYPES).items():
        if key in content and type(content[key]) is not kind:
            yield f"{key} of type {type(content[key]).__name__}"
    config, task = content["config"], content["plan"].get("task", {})
    for name, bound in BOUNDS.items():
        sides = config[name] if isinstance(config[name], (list, tuple)) else [config[name]]
        if not all(type(side) is int and 1 <= side <= bound for side in sides):
            yield f"{name} {config[name]}, which is not between 1 and {bound},"
    flags = [config.get(name, False) for name in ("given_boxes", "fine_masks", "volumetric")]
    if not isinstance(task, dict) or not all(type(flag) is bool for flag in flags):
        yield "no task, or a setting that is neither True nor False,"
    spacing = depth, *_ = content["plan"]["spacing"]
    if len(spacing) != 3 or not all(mm and 0 < mm < 1e4 for mm in spacing[depth is None :]):
        yield f"the spacing {spacing}, which is not three lengths in mm,"
    intensity, ranges = content["plan"]["intensity"], content["plan"]["ranges"]
    numbers = [part for part in (*intensity, *ranges) if part is not None]
    whole = all(len(four) == 4 and all(map(math.isfinite, four)) for four in numbers)
    if len(intensity) != config["num_channels"] or not whole:
        yield "intensities that are not four numbers per channel,"
    names = {key: task[key] for key in ("labels", "channels")} | {"decisions": content["plan"]["decisions"]}
    names |= {key: content["cases"][key] for key in ("train", "val")}
    for name, words in names.items():
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            yield f"{name} that are not names"
    if (len(task["labels"]), len(task["channels"])) != (config["num_classes"], config["num_channels"]):
        yield f"a model of other numbers than {len(task['labels'])} classes, {len(task['channels'])} channels"
    if not isinstance(content["sam"].get("sha256", 0), (str, type(None))):
        yield "no sha256 of SAM's file"
    for name, tensor in content["state"].items():
        if not isinstance(tensor, Tensor) or tensor.nbytes > size:  # A view can claim more than the file has.
            yield f"no numbers for {name}"
    if name := not_finite(content["state"]):
        yield f"numbers that are not finite in {name}"
