"""Boxes in the model's pixels, pictures as each member wants them, results never called automatic."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
from model import MaskSAM, MaskSAMConfig
from support import layouts, metrics, nifti, phantom
from support.sam import modeling
from tools import baselines
from tools.baselines import BASELINES, Baseline
from volumes import REAL, refuses, save


def box_filler(name: str, seen: list) -> modeling.Sam:
    """SAM's own handling of pictures around stubs that fill each box from its first to its last pixel."""
    side, statistics = BASELINES[name].side, ([0.0] * 3, [255.0] * 3) if BASELINES[name].stretch else ()
    encode, prompt = (lambda image: seen.append(image)), (lambda points, boxes, masks: (boxes, None))
    encode.img_size, prompt.get_dense_pe = side, lambda: None

    def decode(features, positions, boxes, dense, multimask_output):
        seen.append(boxes)
        centres = (torch.arange(256) + 0.5) * side / 256
        x, y = ((centres > boxes[:, i, None]) & (centres < boxes[:, i + 2, None] + 1) for i in (0, 1))
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None, None]  # surer of a larger box
        logits = torch.where(y[:, :, None] & x[:, None, :], 10 + area / 1e4, -10 - area / 1e4)[:, None]
        return logits, logits[:, :, 0, 0]

    return modeling.Sam(encode, prompt, decode, *statistics)


@pytest.mark.parametrize("name", BASELINES)
def test_a_model_that_fills_its_box_gives_exactly_the_volume_of_the_boxes(name):
    labels, seen = np.zeros((5, 64, 64), np.uint8), []
    labels[1, 10:14, 20:31], labels[1, 40, 40] = 1, 3
    labels[3, 5, 5], labels[3, 9, 2], labels[3, 0:4, 60:64] = 2, 2, 1  # two pixels: one box around both
    labels[4, 10:30, 10:30], labels[4, 14:26, 14:26] = 2, 1  # the smaller box lies on top,
    labels[0, 10:30, 10:30], labels[0, 14:26, 14:26] = 1, 2  # whatever the numbers and the logits
    found = baselines.predict_case(box_filler(name, seen), BASELINES[name], 0.0 * labels, labels)
    labels[3, 5:10, 2:6] = 2
    assert np.array_equal(found, labels) and len(seen) == 2 * 4  # slice 2 has no object


@pytest.mark.parametrize("name, rows", [("sam", 768), ("lite_medsam", 192), ("medsam", 1024)])
def test_boxes_and_pictures_reach_the_model_in_its_own_pixels(name, rows):
    labels, seen, side = np.zeros((1, 48, 64), np.uint8), [], BASELINES[name].side
    labels[0, 12:24, 40:56] = 2
    pictures = np.where(labels > 0, 200, 50).astype(np.float32)
    baselines.predict_case(box_filler(name, seen), BASELINES[name], pictures, labels)
    ((image,), (box,)), down, right = seen, rows / 48, side / 64
    assert image.shape == (3, side, side) and (image[:, rows:] == 0).all()  # padding, after scaling
    assert box.tolist() == pytest.approx([40 * right, 12 * down, 56 * right - 1, 24 * down - 1], abs=1e-3)
    low, high = image[0, :rows].min(), image[0].max()
    grey = [0, 1] if BASELINES[name].stretch else [(50 - 123.675) / 58.395, (200 - 123.675) / 58.395]
    assert (low, high) == pytest.approx(grey)
    y, x = torch.nonzero(image[0, :rows] > (low + high) / 2, as_tuple=True)
    assert (box - torch.stack([x.min(), y.min(), x.max(), y.max()])).abs().max() <= 1  # around the object
    labels = torch.zeros(48, 64)
    labels[40:48, 62:64] = 3  # columns in half a pixel
    _, ((x0, y0, x1, y1),) = baselines.box_prompts(labels, (12, 16))
    assert x0 <= x1 <= 16 and y0 <= y1 <= 12  # not inside out


@pytest.mark.parametrize("name, rows", [("sam", 768), ("sam2_tiny", 1024)])
def test_a_point_is_the_deepest_pixel_of_its_class_and_the_best_of_three_masks_counts(name, rows):
    labels, seen, sam = np.zeros((1, 48, 64), np.uint8), [], box_filler(name, [])
    labels[0, 10:15, 20:25], labels[0, 30:33, 40:43], labels[0, :3, :3] = 1, 1, 3  # two parts; in the corner
    masks = torch.full((2, 3, 256, 256), -1.0)  # of class 1 the first covers all, of 3 the second a quarter
    masks[0, 0], masks[1, 1, :64] = 1, 1
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.1]])
    sam.prompt_encoder = Mock(side_effect=lambda points, boxes, **_: seen.extend([*points, boxes]) or (0, 0))
    sam.mask_decoder = lambda features, positions, sparse, dense, several: several and (masks, scores)
    found = baselines.predict_case(sam, BASELINES[name], 0.0 * labels, labels, kind="point")
    points, marks, boxes = seen
    expected = (torch.tensor([[22.0, 12.0], [1.0, 1.0]]) + 0.5) * torch.tensor([16.0, rows / 48]) - 0.5
    assert torch.allclose(points[:, 0], expected) and marks.tolist() == [[1], [1]] and boxes is None
    edge = 48 * 256 // rows
    assert (found[0, :edge] == 3).all() and (found[0, edge:] == 1).all()  # the smaller mask lies on top


@pytest.mark.skipif(find_spec("sam2") is None, reason="needs pip install --no-deps rf-sam-2")
def test_sam_2_gives_the_logits_of_its_packages_predictor_with_the_rule_of_its_builder(monkeypatch, tmp_path):
    monkeypatch.setitem(baselines.HIERA, "sam2_tiny", (16, 1, (1, 1, 2, 1), (3,), (8, 4, 14, 7), (7, 7)))
    held, seen, tensor = baselines.build_sam2(*baselines.HIERA["sam2_tiny"]).held, [], torch.from_numpy
    nn.init.normal_(held.no_mem_embed)  # large enough to count, as all others are
    torch.save({"model": held.state_dict() | {"memory": torch.ones(1)}}, tmp_path / "sam2.pt")
    sam, _ = baselines.load_baseline("sam2_tiny", tmp_path / "sam2.pt")
    stubs = {"ToTensor": lambda: lambda picture: tensor(picture).permute(2, 0, 1) / 255}
    stubs |= {"Resize": nn.Identity, "Normalize": lambda *pair: seen.extend(pair) or nn.Identity()}
    monkeypatch.setitem(sys.modules, "torchvision.transforms", SimpleNamespace(**stubs))
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(held.eval(), disable_torch_jit=True)
    assert np.allclose(seen, [sam.pixel_mean.flatten() / 255, sam.pixel_std.flatten() / 255])
    sam.pixel_mean, sam.pixel_std = torch.zeros(1), torch.full((1,), 255.0)
    assert held.sam_mask_decoder.dynamic_multimask_via_stability
    predictor.model.directly_add_no_mem_embed = True  # as in its configuration; `build_sam2` always does
    labels, inner = np.zeros((1, 1024, 1024), np.uint8), sam.postprocess_masks
    labels[0, 300:500, 200:700], labels[0, 600:650, 100:140] = 1, 2
    picture = np.random.default_rng(0).integers(0, 256, labels.shape).astype(np.uint8)
    predictor.set_image(picture[0, :, :, None].repeat(3, 2))
    sam.postprocess_masks = lambda *inputs: seen.append(inner(*inputs)) or seen[-1]
    ids, boxes = baselines.box_prompts(tensor(labels[0]), (1024, 1024))
    points, marks = baselines.point_prompts(tensor(labels[0]), ids, (1024, 1024))
    for kind, prompt in ("box", {"box": boxes}), ("point", {"point_coords": points, "point_labels": marks}):
        baselines.predict_case(sam, BASELINES["sam2_tiny"], picture.astype(np.float32), labels, kind=kind)
        logits, _, _ = predictor.predict(multimask_output=kind == "point", return_logits=True, **prompt)
        assert np.abs(logits - seen[-1].numpy()).max() < 1e-4 * logits.std() and len(seen[-1]) == 2


def test_mr_is_cut_at_percentiles_of_the_voxels_above_zero_and_ct_at_its_window():
    mr = np.append(np.zeros(300), np.linspace(100, 300, 1001)).reshape(1, 1, -1)
    grey = baselines.grey_levels(mr, "MR").ravel()  # the percentiles 0.5 and 99.5 are 101 and 299
    assert np.flatnonzero(grey)[0] == 300 + 9 and (grey == 255).sum() == 6 and grey[300 + 500] == 127
    ct = np.array([[[-1000, -160, 40, 240, 3000]]], np.float32)
    assert baselines.grey_levels(ct, "CT").ravel().tolist() == [0, 0, 127, 255, 255]
    assert not baselines.grey_levels(np.full((2, 3, 3), -3.0), "MR").any()


def test_medsam_is_sams_network_without_its_statistics_and_never_with_its_weights(monkeypatch):
    monkeypatch.setitem(BASELINES, "small", Baseline("tiny", 256, home="its home", stretch=True))
    model, record = MaskSAM(MaskSAMConfig("tiny", encoder_size=(256, 256))), {"sha256": "other"}
    monkeypatch.setattr(baselines, "build_model", lambda config, path: (model, record))
    sam, _ = baselines.load_baseline("small", "file.pth")
    assert (sam.preprocess(torch.full((1, 3, 256, 256), 255.0)) == 1).all() and not sam.training
    record["sha256"] = None  # as in BACKBONES
    with pytest.raises(ValueError, match="file.pth: found SAM's own weights, expected .* small: its home"):
        baselines.load_baseline("small", "file.pth")


@pytest.mark.skipif(not REAL.is_dir(), reason="needs MASKSAM_TEST_DATA with data/acdc and weights")
@pytest.mark.parametrize("name, file", [("mobile_sam", "mobile_sam.pt"), ("lite_medsam", "lite_medsam.pth")])
def test_the_published_weights_find_both_ventricles_in_their_boxes(name, file):
    case = layouts.find_data("acdc", str(REAL / "data/acdc")).splits["val"][0]
    (truth, _), ((grey,), _) = nifti.read_label(case.label, 4), nifti.read_image(case.images[0])
    part, (sam, _) = [len(truth) // 2], baselines.load_baseline(name, REAL / "weights" / file)
    found = baselines.predict_case(sam, BASELINES[name], baselines.grey_levels(grey, "MR")[part], truth[part])
    rv, _, lv = metrics.dice_per_class(found, truth[part], 4)
    assert rv > 0.85 and lv > 0.85  # an upside-down box or a wrong scaling leaves below 0.5


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setitem(BASELINES, "small", Baseline("tiny", 256))
    phantom.write_phantom("data/phantom", num_patients=4, seed=3)
    return lambda line: torch.manual_seed(0) and baselines.main(f"{line} --data phantom --amp off".split())


def test_a_stopped_prediction_goes_on_and_nothing_passes_for_automatic(run, monkeypatch, capsys):
    predict_case, calls = baselines.predict_case, []
    monkeypatch.setattr(baselines, "predict_case", lambda *args: calls.append(args) or predict_case(*args))
    results, folder = run("small --prompts gt"), Path("runs/phantom/predictions-small-boxes-gt-val")
    assert (folder / "metrics-boxes-gt.json").exists() and results["prompts"] == "gt"
    assert "Not automatic: small was given the boxes of the truth.\n" in capsys.readouterr().out
    next(folder.glob("*.nii.gz")).unlink()
    assert run("small --prompts gt") == results and len(calls) == len(results["per_case"]) + 1
    monkeypatch.setitem(BASELINES, "other", BASELINES["small"])
    run(f"other --prompts gt --output {folder}")  # other settings predict anew
    assert len(calls) == 2 * len(results["per_case"]) + 1
    results, folder = run("small --prompts gt --prompt-kind point"), "predictions-small-points-gt-val"
    evaluate.main(["--predictions", f"runs/phantom/{folder}", "--data", "phantom"])
    assert capsys.readouterr().out.count("was given the points of the truth.") == 2
    assert Path("runs/phantom", folder, "metrics-points-gt.json").exists()


def test_boxes_of_another_program_are_used_and_no_truth_is_opened_before_scoring(run, monkeypatch, capsys):
    cases, opened, read_volume = layouts.find_data("phantom", None).splits["val"], [], nifti.read_volume
    for case in cases:  # the other program sees one pixel of the LV in the first slice
        label, geometry = nifti.read_label(case.label, 4)
        label[:], label[0, 30, 20] = 0, 3
        save(f"net/{case.name}.nii.gz", label.T, geometry.affine)
    monkeypatch.setattr(nifti, "read_volume", lambda path, *r: opened.append(path) or read_volume(path, *r))
    refuses("a file that is read, expected another --output", run, "small --prompts net --output net")
    results, name = run("small --prompts net"), f"boxes-{Path.cwd().name}_net"
    first = min(opened.index(case.label) for case in cases)
    assert not {case.images[0] for case in cases} & set(opened[first:])  # all cases are predicted by then
    folder = Path(f"runs/phantom/predictions-small-{name}-val")
    assert results["prompts"] == "net" and (folder / f"metrics-{name}.json").exists()
    for case in cases:
        assert not nifti.read_label(f"{folder}/{case.name}.nii.gz", 4)[0][1:].any()
    assert evaluate.main(["--predictions", str(folder), "--data", "phantom"])["mean"] == results["mean"]
    assert "Not automatic: the model was given the boxes of" in capsys.readouterr().out  # as files too


def test_wrong_arguments_are_one_message(run, monkeypatch, capsys):
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    for line, message in (
        ("sam2_tiny --prompts gt --sam-checkpoint x", "no package sam2, expected it: pip install --no-deps"),
        ("sam2_tiny --prompts gt", "needs --sam-checkpoint FILE: sam2_hiera_*.pt or"),
        ("sam --prompts auto", "--prompts: found auto, expected gt or DIR"),
        ("medsam --prompts gt", "baselines.py: medsam needs --sam-checkpoint FILE: medsam_vit_b.pth of"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(line)
        assert message in capsys.readouterr().err + str(stopped.value)
