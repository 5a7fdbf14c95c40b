"""Settings of the suite, and what several test files share."""

import dataclasses
import os
import sys

import pytest

if not any("test_cuda" in argument for argument in sys.argv):  # before torch is imported
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from networks import wake_sam
from support.sam import BACKBONES, file_sha256


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path) -> None:
    """Begin each test in a folder of its own, with the same random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Register "small": a pre-trained, hence frozen, SAM of `tiny`'s shapes, with its file."""
    path = tmp_path / "small.pth"
    torch.manual_seed(1)
    torch.save(wake_sam(BACKBONES["tiny"].build()).state_dict(), path)
    file = {"file": path.name, "sha256": file_sha256(path), "url": path.as_uri()}
    monkeypatch.setitem(BACKBONES, "small", dataclasses.replace(BACKBONES["tiny"], **file))
    return path
