"""Write and read the files of trained weights (paper 3); model.py builds a model from them.

{config, sam, plan, state, ...} ── write_checkpoint ──> best.pt ── read_checkpoint ──> the same dict
"""

from pathlib import Path

import torch

from support.files import write_whole

# Every checkpoint has the configuration of the model, the name and sha256 of SAM's file, the plan of the
# data, and the trained weights. `model.checkpoint_content` makes these four.
KEYS = {"config", "sam", "plan", "state"}


def write_checkpoint(path: str | Path, content: dict) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: file in a folder that exists.
        content: the `KEYS`, and further plain values or tensors, such as the epoch or the optimizer's state.
    Raises:
        OSError: the file could not be written. A file that was there before is unchanged.
    """
    write_whole(Path(path), lambda file: torch.save(content, file))


def read_checkpoint(path: str | Path) -> dict:
    """Return the content of a checkpoint, with all tensors on the CPU.

    Only tensors and plain values are read (`weights_only`), so a file of unknown origin cannot run code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or it lacks one of the `KEYS`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: found no such file, expected a checkpoint of train.py, as in runs/")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = KEYS - content.keys()
    except Exception as error:  # A broken or foreign file can raise almost any error here.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: found {reason}, expected a checkpoint of train.py") from error
    if missing:
        lacking = ", ".join(sorted(missing))
        raise ValueError(f"{path}: found no {lacking} in it, expected a checkpoint that train.py wrote")
    return content
