"""Claims about SAM's files: found or fetched, checked, loaded strictly; the import of segment_anything."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import MaskSAMConfig, build_model, checkpoint_content, load_checkpoint, trained_state
from networks import task, wake
from support.checkpoints import write_checkpoint
from support.sam import BACKBONES, file_sha256, find_sam_file, resample_position_embedding
from volumes import plan_for, refuses


def test_torchvision_is_not_imported_and_no_stand_in_for_segment_anything_stays_behind():
    code = "import sys, model; assert not {'torchvision', 'segment_anything'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_a_program_that_has_imported_segment_anything_itself_can_import_ours_too():
    """MONAI does so beside torchvision. The package then has a function `build_sam`, not a module."""
    code = """if True:
        import sys, types, unittest.mock
        for part in ("", ".transforms", ".transforms.functional", ".ops", ".ops.boxes"):
            sys.modules[f"torchvision{part}"] = unittest.mock.MagicMock()
        import segment_anything
        assert not isinstance(segment_anything.build_sam, types.ModuleType)
        import support.sam"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_position_embedding_is_resampled_not_cropped():
    ramp = torch.linspace(0, 1, 64)
    embedding = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), dim=-1)[None]
    resampled = resample_position_embedding(embedding, (12, 80))
    for axis, side in enumerate(resampled.shape[1:3]):  # a ramp stays a ramp, but for its ends
        centres = ((torch.arange(side) + 0.5) / side * 64 - 0.5) / 63
        torch.testing.assert_close(resampled[0, :, :, axis].mean(1 - axis), centres, rtol=0, atol=0.02)


def test_loading_sam_takes_all_tensors_and_resamples_the_position_embedding(small):
    net, record = build_model(MaskSAMConfig(sam="small", encoder_size=(64, 96)), small)
    assert record == {"name": "small", "sha256": file_sha256(small)}
    stored, own, positions = torch.load(small), net.sam.state_dict(), "image_encoder.pos_embed"
    stored[positions] = resample_position_embedding(stored[positions], (4, 6))
    assert own.keys() == stored.keys() and all(torch.equal(own[key], stored[key]) for key in own)


@pytest.mark.parametrize("content", ["other backbone", "garbage", "no dict", "one more", "one less"])
def test_wrong_sam_file_is_refused_with_its_name_and_the_expected_one(content, small, tmp_path):
    path, state = tmp_path / "wrong.pth", torch.load(small)
    doubled = {key: value.repeat_interleave(2, 0) for key, value in state.items() if value.dim()}
    files = {"other backbone": doubled, "no dict": torch.zeros(3), "one more": state | {"a": torch.zeros(1)}}
    torch.save(files.get(content, dict(list(state.items())[1:])), path)
    if content == "garbage":
        path.write_bytes(b"not a picture")
    config = MaskSAMConfig(sam="small", encoder_size=(64, 64))
    refuses(r"wrong\.pth does not hold SAM small: .*the file small\.pth", build_model, config, path)
    refuses(r"gone\.pth: no such file, expected SAM small \(small\.pth", find_sam_file, "small", "gone.pth")
    refuses("tiny has no pre-trained weights: leave out --sam-checkpoint", find_sam_file, "tiny", small)


def test_download_is_checked_kept_and_not_repeated_or_says_where_from(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    target, right = tmp_path / "hub" / "checkpoints" / "small.pth", BACKBONES["small"]
    for wrong in ({"sha256": "0" * 64}, {"url": right.url + ".gone"}):
        monkeypatch.setitem(BACKBONES, "small", dataclasses.replace(right, **wrong))
        with pytest.raises(FileNotFoundError) as caught:
            find_sam_file("small")
        assert all(part in str(caught.value) for part in (BACKBONES["small"].url, str(target), "by hand"))
        assert not list(target.parent.iterdir())
    monkeypatch.setitem(BACKBONES, "small", right)
    assert find_sam_file("small") == target and target.read_bytes() == small.read_bytes()
    small.unlink()
    assert find_sam_file("small") == target


def test_published_files_come_from_their_own_homes_and_lite_medsam_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    files = [BACKBONES[name] for name in ("vit_b", "vit_l", "vit_h", "mobile_sam")]
    assert all(file.url.endswith(f"/{file.file}") and len(file.sha256) == 64 for file in files)
    homes = [file.url.split("/")[2] for file in files]
    assert homes == ["dl.fbaipublicfiles.com"] * 3 + ["github.com"]
    refuses("Google Drive .*--sam-checkpoint FILE", find_sam_file, "lite_medsam")


@pytest.mark.parametrize("sam", ["small", "tiny"])
def test_checkpoint_holds_the_trained_tensors_alone_and_gives_identical_outputs(sam, small, tmp_path):
    sizes = {"num_classes": 3, "num_queries": 3, "patch_size": (2, 32, 32), "encoder_size": (64, 96)}
    path, file = tmp_path / "best.pt", small if sam == "small" else None
    net, record = build_model(MaskSAMConfig(sam, **sizes), file)
    wake(net.encoder_adapters, std=0.05)
    plan, rest = plan_for().as_dict(), {"epoch": 7, "cases": {"train": ["x"], "val": []}}
    content = checkpoint_content(net, record, plan) | rest
    write_checkpoint(path, content)
    held = {key: value for key, value in net.state_dict().items() if sam == "tiny" or key[:4] != "sam."}
    assert trained_state(net).keys() == held.keys()
    size = sum(value.nbytes for value in held.values())
    assert size < path.stat().st_size < 1.1 * size + 200_000
    torch.manual_seed(99)  # whatever a fresh model draws must be overwritten
    (again, rest), (volume, _) = load_checkpoint(path, file), task(net, batch=2)
    assert again.config == net.config and not again.training and "state" not in rest
    assert rest["epoch"] == 7 and rest["plan"] == plan and rest["sam"] == record
    with torch.no_grad():
        assert all(map(torch.equal, net(volume).values(), again(volume).values()))
    if sam == "tiny":
        return
    config, other = content["config"], tmp_path / "other.pth"
    torch.save(torch.load(small) | {"mask_decoder.iou_token.weight": torch.ones(1, 64)}, other)
    for changes, sam_file, message in (
        ({"num_queries": 5}, small, r"best\.pt does not fit .* such as (class_tokens|prompt_generator)"),
        ({"temperature": 2.0}, small, r"best\.pt holds a configuration that .* cannot build: .*temperature"),
        ({}, other, rf"{file_sha256(small)}, found {file_sha256(other)}.*--sam-checkpoint"),
    ):
        write_checkpoint(path, content | {"config": config | changes})
        refuses(message, load_checkpoint, path, sam_file)
