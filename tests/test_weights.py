"""Claims about files: SAM's own are checked, checkpoints hold what trains and come back the same."""

import urllib.error
from pathlib import Path

import pytest
import torch
import weights
from networks import task, wake, wake_sam

from model import BACKBONES, MaskSAM, MaskSAMConfig
from support.checkpoints import (
    build_model,
    file_sha256,
    find_sam_file,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

PLAN = {"spacing": [None, 1.5, 1.5], "labels": ["background", "one", "two"]}


def saved(small: Path, tmp_path: Path, **changes) -> tuple[Path, MaskSAM]:
    torch.manual_seed(2)
    config = {"num_classes": 3, "num_queries": 3, "patch_size": (2, 32, 32), "encoder_size": (64, 96)} | changes
    net, sam = build_model(MaskSAMConfig(sam="small", **config), small)
    wake(net.encoder_adapters, std=0.05)
    path = tmp_path / "best.pt"
    save_checkpoint(path, net, sam, PLAN, epoch=7, metrics={"mean_dice": 0.5})
    return path, net


def test_checkpoint_round_trip_gives_identical_outputs(small, tmp_path):
    path, net = saved(small, tmp_path)
    volume, _ = task(net, batch=2)
    torch.manual_seed(99)  # whatever a fresh model draws must be overwritten
    again, content = load_checkpoint(path, small)
    assert again.config == net.config and not again.training
    with torch.no_grad():
        expected, found = net(volume), again(volume)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert content["plan"] == PLAN and content["epoch"] == 7 and content["metrics"] == {"mean_dice": 0.5}
    assert content["sam"] == {"name": "small", "sha256": file_sha256(small)}


def test_checkpoint_of_tiny_needs_nothing_else(tmp_path):
    net, sam = build_model(MaskSAMConfig("tiny", "b9", 1, 3, 3, (2, 32, 32), (64, 64)))
    wake_sam(net.sam)
    save_checkpoint(tmp_path / "tiny.pt", net, sam, PLAN)
    again, _ = load_checkpoint(tmp_path / "tiny.pt")
    volume, _ = task(net)
    assert torch.equal(again.predict(volume), net.predict(volume))
    assert sam == {"name": "tiny", "sha256": None}


def test_checkpoint_holds_no_frozen_sam(small, tmp_path):
    path, net = saved(small, tmp_path)
    state = torch.load(path, weights_only=True)["state"]
    assert not [key for key in state if key.startswith("sam.")]
    assert {key for key, _ in net.named_parameters() if not key.startswith("sam.")} <= state.keys()
    # As many bytes as the trainable numbers need, but for names and pickling.
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert 4 * trainable < path.stat().st_size < 4 * trainable * 1.1 + 200_000


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("unexpected pos 64 vs 0\nmore")])
def test_failed_save_leaves_the_old_checkpoint_whole(small, tmp_path, monkeypatch, error):
    path, net = saved(small, tmp_path)
    before, names = path.read_bytes(), sorted(tmp_path.iterdir())

    def fail(content, target):
        Path(target).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    reason = str(error).splitlines()[0]
    with pytest.raises(OSError, match=f"{path.name} could not be written .{reason}.: is there space"):
        save_checkpoint(path, net, {"name": "small", "sha256": None}, PLAN)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == names


def test_another_sam_file_than_the_one_trained_on_is_refused(small, tmp_path):
    path, net = saved(small, tmp_path)
    state = torch.load(small)
    state["mask_decoder.iou_token.weight"] += 1
    other = tmp_path / "other.pth"
    torch.save(state, other)
    with pytest.raises(ValueError, match=rf"{file_sha256(small)}, found {file_sha256(other)}.*--sam-checkpoint"):
        load_checkpoint(path, other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_queries": 5}, r"best\.pt does not fit .* such as (class_tokens|prompt_generator)"),
        ({"temperature": 2.0}, r"best\.pt holds a configuration that this code cannot build: .*temperature"),
    ],
)
def test_checkpoint_of_another_configuration_is_refused(change, message, small, tmp_path):
    path, _ = saved(small, tmp_path)
    content = torch.load(path, weights_only=True)
    content["config"] |= change
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, small)


@pytest.mark.parametrize("content", [b"", b"garbage", "state dict", "tensor"])
def test_file_that_is_no_checkpoint_is_refused_by_name(content, small, tmp_path):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"a": torch.zeros(1)} if content == "state dict" else torch.zeros(1), path)
    with pytest.raises(ValueError, match=r"x\.pt is not a .*checkpoint of train\.py"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.pt: no such file"):
        read_checkpoint(tmp_path / "gone.pt")


@pytest.mark.parametrize(
    "content", ["other backbone", "garbage", "empty", "no dict", "a key too many", "a key missing"]
)
def test_wrong_sam_file_is_refused_with_its_name_and_what_was_expected(content, small, tmp_path):
    path = tmp_path / "wrong.pth"
    state = torch.load(small)
    if content == "other backbone":
        state = {key: torch.zeros(2 * value.shape[0], *value.shape[1:]) for key, value in state.items() if value.dim()}
    elif content == "a key too many":
        state["head.weight"] = torch.zeros(1)
    elif content == "a key missing":
        del state["mask_decoder.iou_token.weight"]
    torch.save(torch.zeros(3) if content == "no dict" else state, path)
    if content in ("garbage", "empty"):
        path.write_bytes(b"not a picture" if content == "garbage" else b"")
    with pytest.raises(ValueError, match=r"wrong\.pth does not hold SAM small: .*expected the file small\.pth"):
        build_model(MaskSAMConfig(sam="small", encoder_size=(64, 64)), path)


def test_missing_sam_file_is_refused_with_its_name_and_what_was_expected(small):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth: no such file, expected SAM small \(small\.pth\)"):
        build_model(MaskSAMConfig(sam="small"), "gone.pth")
    with pytest.raises(ValueError, match="tiny has no pre-trained weights"):
        build_model(MaskSAMConfig(sam="tiny"), small)


def test_failed_download_says_from_where_whereto_and_two_ways_out(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))  # what torch.hub.set_dir sets
    with pytest.raises(FileNotFoundError) as caught:
        find_sam_file("vit_b")
    message = str(caught.value)
    assert "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth" in message
    assert str(tmp_path / "checkpoints" / "sam_vit_b_01ec64.pth") in message
    assert "no route to host" in message and "by hand" in message and "--sam-checkpoint" in message


def test_download_is_checked_by_sha256_kept_and_not_repeated(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "SAM_URL", small.parent.as_uri() + "/")
    target = tmp_path / "hub" / "checkpoints" / "small.pth"
    assert find_sam_file("small") == target and target.read_bytes() == small.read_bytes()
    monkeypatch.setattr(weights, "SAM_URL", "file:///nowhere/")
    assert find_sam_file("small") == target


def test_download_with_the_wrong_sha256_is_refused_and_not_kept(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "SAM_URL", small.parent.as_uri() + "/")
    with open(small, "ab") as file:
        file.write(b"tampered")
    with pytest.raises(FileNotFoundError, match=f'expected "{BACKBONES["small"].sha256}"'):
        find_sam_file("small")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_a_checkpoint_from_before_there_were_given_boxes_is_automatic(small, tmp_path):
    path, net = saved(small, tmp_path)
    content = torch.load(path, weights_only=True)
    del content["config"]["prompts"]
    torch.save(content, path)
    assert load_checkpoint(path, small)[0].config == net.config
