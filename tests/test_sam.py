"""Claims about SAM's files: found or fetched, checked, loaded strictly; the import of segment_anything."""

import dataclasses
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch

from model import (
    MaskSAM,
    MaskSAMConfig,
    build_model,
    checkpoint_content,
    load_checkpoint,
    load_trained_state,
    trained_state,
)
from networks import task, tiny, wake
from support.checkpoints import write_checkpoint
from support.sam import BACKBONES, file_sha256, find_sam_file, resample_position_embedding

SIZES = {"num_classes": 3, "num_queries": 3, "patch_size": (2, 32, 32), "encoder_size": (64, 96)}
IMPORT = """
import sys, model, support.sam
assert "torchvision" not in sys.modules, "model imports torchvision"
assert "segment_anything" not in sys.modules, "the stand-in for the package stays behind"
from unittest.mock import MagicMock  # with a torchvision, here an empty one, the whole package still imports
for name in ("", ".ops", ".ops.boxes", ".transforms", ".transforms.functional"):
    sys.modules["torchvision" + name] = MagicMock()
from segment_anything import SamPredictor, modeling, sam_model_registry
assert modeling.Sam is support.sam.modeling.Sam
assert sam_model_registry["vit_b"] is support.sam.build_sam.build_sam_vit_b
"""


def test_torchvision_is_not_imported_and_the_package_still_imports_later():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("grid", [(16, 16), (32, 16), (12, 10), (80, 70)])
def test_position_embedding_is_resampled_not_cropped(grid):
    ramp = torch.linspace(0, 1, 64)
    embedding = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), dim=-1)[None]
    resampled = resample_position_embedding(embedding, grid)
    assert resampled.shape == (1, *grid, 2)
    for axis, side in enumerate(
        grid
    ):  # a ramp stays a ramp, at the centres of the new cells; its ends bend a little
        centres = ((torch.arange(side) + 0.5) / side * 64 - 0.5) / 63
        torch.testing.assert_close(resampled[0, :, :, axis].mean(1 - axis), centres, rtol=0, atol=0.02)
    assert torch.equal(resample_position_embedding(embedding, (64, 64)), embedding)


def test_loading_sam_takes_all_tensors_and_resamples_the_position_embedding(small):
    net, record = build_model(MaskSAMConfig(sam="small", encoder_size=(64, 96)), small)
    assert record == {"name": "small", "sha256": file_sha256(small)}
    stored, own = torch.load(small), net.sam.state_dict()
    positions = stored.pop("image_encoder.pos_embed")
    assert torch.equal(own.pop("image_encoder.pos_embed"), resample_position_embedding(positions, (4, 6)))
    assert own.keys() == stored.keys() and all(torch.equal(own[key], stored[key]) for key in own)
    assert not any(parameter.requires_grad for parameter in net.sam.parameters())


@pytest.mark.parametrize("content", ["other backbone", "garbage", "empty", "no dict", "one more", "one less"])
def test_wrong_sam_file_is_refused_with_its_name_and_the_expected_one(content, small, tmp_path):
    path, state = tmp_path / "wrong.pth", torch.load(small)
    if content == "other backbone":
        state = {key: value.repeat_interleave(2, 0) for key, value in state.items() if value.dim()}
    elif content == "one more":
        state["head.weight"] = torch.zeros(1)
    elif content == "one less":
        del state["mask_decoder.iou_token.weight"]
    torch.save(torch.zeros(3) if content == "no dict" else state, path)
    if content in ("garbage", "empty"):
        path.write_bytes(b"not a picture" if content == "garbage" else b"")
    with pytest.raises(
        ValueError, match=r"wrong\.pth does not hold SAM small: .*expected the file small\.pth"
    ):
        build_model(MaskSAMConfig(sam="small", encoder_size=(64, 64)), path)


def test_missing_file_and_a_file_too_many_are_refused(small):
    with pytest.raises(
        FileNotFoundError, match=r"gone\.pth: no such file, expected SAM small \(small\.pth\)"
    ):
        find_sam_file("small", "gone.pth")
    with pytest.raises(ValueError, match="tiny has no pre-trained weights: leave out --sam-checkpoint"):
        find_sam_file("tiny", small)


def test_download_is_checked_kept_and_not_repeated(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    target = tmp_path / "hub" / "checkpoints" / "small.pth"
    assert find_sam_file("small") == target and target.read_bytes() == small.read_bytes()
    small.unlink()
    assert find_sam_file("small") == target


def test_failed_download_says_from_where_and_whereto_and_keeps_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for backbone, reason in (("sha256", f'expected "{"0" * 64}"'), ("url", "gone")):
        fault = {"sha256": "0" * 64} if backbone == "sha256" else {"url": small.as_uri() + ".gone"}
        monkeypatch.setitem(BACKBONES, "small", dataclasses.replace(BACKBONES["small"], **fault))
        with pytest.raises(FileNotFoundError) as caught:
            find_sam_file("small")
        target = tmp_path / "hub" / "checkpoints"
        for part in (reason, BACKBONES["small"].url, str(target), "by hand", "--sam-checkpoint"):
            assert part in str(caught.value)
        assert not list(target.iterdir())


def test_published_files_come_from_their_own_homes_and_lite_medsam_by_hand(tmp_path, monkeypatch):
    def offline(url, *args, hash_prefix):
        asked.append((url, hash_prefix))
        raise urllib.error.URLError("no route")

    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    for name in ("vit_b", "vit_l", "vit_h", "mobile_sam", "lite_medsam"):
        with pytest.raises(FileNotFoundError, match="--sam-checkpoint FILE") as caught:
            find_sam_file(name)
    assert "Google Drive" in str(caught.value) and "github.com/bowang-lab/MedSAM" in str(caught.value)
    hosts = ["https://dl.fbaipublicfiles.com/segment_anything/"] * 3 + [
        "https://github.com/ChaoningZhang/MobileSAM/"
    ]
    assert all(url.startswith(host) for (url, _), host in zip(asked, hosts, strict=True))
    assert all(len(sha256) == 64 for _, sha256 in asked)


def saved(small: Path, folder: Path, **changes) -> tuple[Path, object]:
    torch.manual_seed(2)
    net, sam = build_model(MaskSAMConfig(sam="small", **SIZES | changes), small)
    wake(net.encoder_adapters, std=0.05)
    write_checkpoint(
        folder / "best.pt", checkpoint_content(net, sam, {"spacing": [None, 1.5]}) | {"epoch": 7}
    )
    return folder / "best.pt", net


def test_checkpoint_holds_the_trained_tensors_alone_and_gives_identical_outputs(small, tmp_path):
    path, net = saved(small, tmp_path)
    assert trained_state(net).keys() == {key for key in net.state_dict() if not key.startswith("sam.")}
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert 4 * trainable < path.stat().st_size < 4 * trainable * 1.1 + 200_000
    volume, _ = task(net, batch=2)
    torch.manual_seed(99)  # whatever a fresh model draws must be overwritten
    again, content = load_checkpoint(path, small)
    assert again.config == net.config and not again.training and content["epoch"] == 7
    assert content["plan"] == {"spacing": [None, 1.5]} and content["sam"]["sha256"] == file_sha256(small)
    with torch.no_grad():
        expected, found = net(volume), again(volume)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_checkpoint_of_tiny_needs_no_other_file(tmp_path):
    net = wake(tiny(), std=0.05)
    write_checkpoint(tmp_path / "tiny.pt", checkpoint_content(net, {"name": "tiny", "sha256": None}, {}))
    again, _ = load_checkpoint(tmp_path / "tiny.pt")
    assert torch.equal(again.predict(task(net)[0]), net.predict(task(net)[0]))


def test_checkpoint_that_does_not_fit_is_refused(small, tmp_path):
    path, net = saved(small, tmp_path)
    other = MaskSAM(dataclasses.replace(net.config, num_queries=5))
    with pytest.raises(ValueError, match=r"best\.pt does not fit .* such as (class_tokens|prompt_generator)"):
        load_trained_state(other, trained_state(net), path)
    content = torch.load(path, weights_only=True)
    write_checkpoint(path, content | {"config": content["config"] | {"temperature": 2.0}})
    with pytest.raises(
        ValueError, match=r"best\.pt holds a configuration that .* cannot build: .*temperature"
    ):
        load_checkpoint(path, small)
    write_checkpoint(path, content)
    state = torch.load(small)
    state["mask_decoder.iou_token.weight"] += 1
    torch.save(state, tmp_path / "other.pth")
    found = file_sha256(tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"{file_sha256(small)}, found {found}.*--sam-checkpoint"):
        load_checkpoint(path, tmp_path / "other.pth")
