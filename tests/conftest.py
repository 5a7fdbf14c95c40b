"""What several test files share."""

import dataclasses
from pathlib import Path

import pytest
import torch
from networks import wake_sam

from model import BACKBONES
from support.checkpoints import file_sha256


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """Register "small": `tiny`'s shapes as a pre-trained, hence frozen, SAM whose file lies in a temporary folder."""
    path = tmp_path / "small.pth"
    torch.manual_seed(1)
    sam = BACKBONES["tiny"].build()
    wake_sam(sam)
    torch.save(sam.state_dict(), path)
    entry = dataclasses.replace(BACKBONES["tiny"], file="small.pth", sha256=file_sha256(path))
    monkeypatch.setitem(BACKBONES, "small", entry)
    return path
