"""Files of what trains: written whole, read safely. No model is built here."""

from pathlib import Path

import torch

from support.files import write_whole

KEYS = {"config", "sam", "plan", "state"}  # what every checkpoint has


def write_checkpoint(path: str | Path, content: dict) -> None:
    """Write a checkpoint whole or not at all.

    Args:
        path: file to write. content: `KEYS` and further plain values or tensors, such as epoch, arguments, optimizer.
    Raises:
        OSError: it could not be written; the file that was there before is still there.
    """
    write_whole(Path(path), lambda file: torch.save(content, file))


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint file as a dict. Raises as `load_checkpoint`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file; train.py writes runs/<data>-<name>/best.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "sam", "plan", "state"} - content.keys()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable checkpoint of train.py: {reason}") from error
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    return content
