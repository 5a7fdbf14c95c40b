"""Boxes in the model's pixels, pictures as each member wants them, results never called automatic."""

import json
import re

import nibabel as nib
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
from volumes import ACDC, write_tree

WEIGHTS = ACDC.parents[1] / "weights"


class Stub(nn.Module):
    """Stands in for each part of SAM; as a decoder it fills each box from its first to its last pixel."""

    def __init__(self, img_size: int = 0):
        super().__init__()
        self.img_size, self.images, self.boxes = img_size, [], []

    def forward(self, *inputs, points=None, boxes=None, masks=None, multimask_output=None):
        if boxes is not None:  # as prompt encoder
            return boxes, None
        if multimask_output is None:  # as image encoder
            self.images.append(inputs[0])
            return inputs[0].new_zeros(1, 1, 1, 1)
        boxes = inputs[2]
        self.boxes.append(boxes)
        centres = (torch.arange(256) + 0.5) * self.img_size / 256
        x, y = ((centres > boxes[:, i, None]) & (centres < boxes[:, i + 2, None] + 1) for i in (0, 1))
        inside = (y[:, :, None] & x[:, None, :]).float()
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None, None]
        return ((2 * inside - 1) * (10 + area / 1e4))[:, None], None  # surer of a larger box

    def get_dense_pe(self):
        return None


def stub(name: str) -> modeling.Sam:
    """SAM's own handling of pictures, as `load_baseline` sets it, around stubs."""
    side, statistics = BASELINES[name].side, ([0.0] * 3, [255.0] * 3) if BASELINES[name].stretch else ()
    return modeling.Sam(Stub(side), Stub(), Stub(side), *statistics)


def predict(
    sam: modeling.Sam, name: str, labels: np.ndarray, pictures: np.ndarray | None = None
) -> np.ndarray:
    pictures = np.zeros(labels.shape, np.float32) if pictures is None else pictures
    return baselines.predict_case(sam, BASELINES[name], pictures, labels)


# ---------------------------------------------------------------------------------- boxes, masks and pictures


@pytest.mark.parametrize("name", BASELINES)
def test_a_model_that_fills_its_box_gives_exactly_the_volume_of_the_boxes(name):
    labels = np.zeros((5, 64, 64), np.uint8)
    labels[1, 10:14, 20:31], labels[1, 40, 40] = 1, 3
    labels[3, 5, 5], labels[3, 9, 2], labels[3, 0:4, 60:64] = 2, 2, 1  # two pixels: one box around both
    labels[4, 10:30, 10:30], labels[4, 14:26, 14:26] = 2, 1  # the smaller box lies on top,
    labels[0, 10:30, 10:30], labels[0, 14:26, 14:26] = 1, 2  # whatever the numbers and the logits
    expected = labels.copy()
    expected[3, 5:10, 2:6] = 2
    sam = stub(name)
    assert np.array_equal(predict(sam, name, labels), expected)
    assert len(sam.image_encoder.images) == 4  # one picture per slice with objects


@pytest.mark.parametrize("name, rows", [("sam", 768), ("lite_medsam", 192), ("medsam", 1024)])
def test_boxes_and_pictures_reach_the_model_in_its_own_pixels(name, rows):
    """A slice of 48 rows and 64 columns, whose object is brighter than all around it."""
    labels = np.zeros((1, 48, 64), np.uint8)
    labels[0, 12:24, 40:56] = 2
    sam, side = stub(name), BASELINES[name].side
    assert np.array_equal(
        predict(sam, name, labels, np.where(labels > 0, 200, 50).astype(np.float32)), labels
    )
    (image,), (box,) = sam.image_encoder.images[0], sam.mask_decoder.boxes[0]
    assert image.shape == (3, side, side)
    down, right = rows / 48, side / 64
    assert box.tolist() == pytest.approx([40 * right, 12 * down, 56 * right - 1, 24 * down - 1], abs=1e-3)
    assert (image[:, rows:] == 0).all()  # padding, after scaling
    low, high = image[0, :rows].min(), image[0].max()
    if BASELINES[name].stretch:
        assert (low, high) == (0, 1)
    else:
        assert (low, high) == pytest.approx(((50 - 123.675) / 58.395, (200 - 123.675) / 58.395))
    bright = image[0, :rows] > (low + high) / 2
    y, x = torch.nonzero(bright, as_tuple=True)
    around = torch.stack([x.min(), y.min(), x.max(), y.max()])
    assert (box - around).abs().max() <= 1  # the box lies around the object in the encoder's picture


@pytest.mark.parametrize("length, side", [(64, 256), (216, 1024), (300, 1024)])
def test_the_position_code_gets_the_centres_of_the_first_and_the_last_pixel(length, side, monkeypatch):
    """Of the mask resized to the encoder's picture; that rounds to whole pixels, hence half a pixel."""
    encoder, seen = modeling.PromptEncoder(8, (16, 16), (side, side), 4), []
    code = lambda points, size: seen.append(points) or points.new_zeros(*points.shape[:2], 8)  # noqa: E731
    monkeypatch.setattr(encoder.pe_layer, "forward_with_coords", code)
    for first, last in ((10, 10 + length // 8), (0, length), (length // 3, length // 2)):
        labels = torch.zeros(length, length, dtype=torch.uint8)
        labels[4 : length - 4, first:last] = 1
        encoder(None, baselines.box_prompts(labels, (side, side))[1], None)
        centres = torch.arange(side) + 0.5
        columns = centres[labels[length // 2, (centres * length / side).long()] > 0]
        x = seen.pop()[0, :, 0]
        assert (x - columns[[0, -1]]).abs().max() <= (0.5 if side % length else 0) + 1e-3
        assert x[0] + x[1] == pytest.approx((first + last) * side / length, abs=1e-3)  # the middle stays


def test_margins_are_in_the_models_pixels_and_end_at_the_picture():
    labels = torch.zeros(48, 64, dtype=torch.uint8)
    labels[0:4, 30:34], labels[40:48, 62:64] = 1, 3
    class_ids, boxes = baselines.box_prompts(labels, (768, 1024), 20)
    assert class_ids.tolist() == [1, 3]
    assert boxes.tolist() == [[460, 0, 563, 83], [972, 620, 1023, 767]]
    _, (small,) = baselines.box_prompts(
        labels == 3, (12, 16)
    )  # two columns in half a pixel: never inside out
    assert small[0] <= small[2] <= 16 and small[1] <= small[3] <= 12


def test_mr_is_cut_at_percentiles_of_the_voxels_above_zero_and_ct_at_its_window():
    volume = np.zeros((4, 30, 30), np.float32)
    volume[:, 5:, 5:] = np.random.default_rng(0).uniform(100, 300, (4, 25, 25))
    volume[0, 10, 10] = 1e5
    grey = baselines.grey_levels(volume, "MR")
    low, high = np.percentile(volume[volume > 0], (0.5, 99.5))
    assert grey.dtype == np.uint8 and (grey[volume == 0] == 0).all() and grey[0, 10, 10] == 255
    middle = np.abs(volume - (low + high) / 2) < 0.5
    assert middle.any() and (np.abs(grey[middle].astype(int) - 127) <= 1).all()
    ct = np.array([-1000.0, -160.0, 40.0, 240.0, 3000.0], np.float32).reshape(1, 1, 5)
    assert baselines.grey_levels(ct, "CT").ravel().tolist() == [0, 0, 127, 255, 255]
    assert not baselines.grey_levels(np.full((2, 3, 3), -3, np.float32), "MR").any()


def test_medsam_is_sams_network_without_its_statistics_and_never_with_its_weights(monkeypatch):
    monkeypatch.setitem(BASELINES, "small", Baseline("tiny", 256, home="its home", stretch=True))
    model, record = MaskSAM(MaskSAMConfig("tiny", encoder_size=(256, 256))), {"sha256": "other"}
    monkeypatch.setattr(baselines, "build_model", lambda config, path: (model, record))
    sam, sha256 = baselines.load_baseline("small", "file.pth")
    assert sha256 == "other" and not sam.training
    assert torch.equal(sam.preprocess(torch.full((1, 3, 256, 256), 255.0)), torch.ones(1, 3, 256, 256))
    record["sha256"] = None  # as in BACKBONES
    with pytest.raises(
        ValueError, match="file.pth: found SAM's own weights, expected those of small: its home"
    ):
        baselines.load_baseline("small", "file.pth")


@pytest.mark.skipif(
    not (WEIGHTS.is_dir() and ACDC.is_dir()), reason="needs MASKSAM_TEST_DATA and ../weights beside it"
)
@pytest.mark.parametrize("name, file", [("mobile_sam", "mobile_sam.pt"), ("lite_medsam", "lite_medsam.pth")])
def test_the_published_weights_find_both_ventricles_in_their_boxes(name, file):
    """One slice in the middle of a real case; an upside-down box or a wrong scaling leaves below 0.5."""
    case = layouts.find_data("acdc", str(ACDC)).splits["val"][0]
    truth, _ = nifti.read_label(case.label, 4)
    part = slice(len(truth) // 2, len(truth) // 2 + 1)
    sam, _ = baselines.load_baseline(name, WEIGHTS / file)
    pictures = baselines.grey_levels(nifti.read_image(case.images[0])[0], "MR")[part]
    rv, _, lv = metrics.dice_per_class(predict(sam, name, truth[part], pictures), truth[part], 4)
    assert rv > 0.85 and lv > 0.85


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("baselines") / "phantom"
    phantom.write_phantom(folder, num_patients=5, seed=3)
    return str(folder)


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """The command with a SAM of random weights, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BASELINES, "small", Baseline("tiny", 256))
    torch.manual_seed(0)
    return lambda *more: baselines.main(["small", "--data", "phantom", "--root", root, "--amp", "off", *more])


@pytest.fixture
def filled(monkeypatch):
    """Let the model of the command fill its boxes."""
    monkeypatch.setitem(BASELINES, "small", Baseline("tiny", 256))
    monkeypatch.setattr(baselines, "load_baseline", lambda name, path=None: (stub("small"), None))


def write_maps(folder, cases, mark, flip=1) -> None:
    """Label maps of another program, in which `mark` sets voxels of (x, y, z)."""
    folder.mkdir()
    for case in cases:
        image = nib.load(case.images[0])
        array = np.zeros(image.shape, np.uint8)
        array[mark] = 3
        nib.save(
            nib.Nifti1Image(array, image.affine @ np.diag([flip, 1, 1, 1])), folder / f"{case.name}.nii.gz"
        )


def test_random_weights_end_to_end_and_nothing_passes_for_automatic(run, root, tmp_path, capsys):
    results = run("--prompts", "gt")
    folder = tmp_path / "runs/phantom/predictions-small-boxes-gt-val"
    assert json.loads((folder / "metrics-boxes-gt.json").read_text()) == results
    assert results["baseline"] == "small" and results["prompts"] == "gt" and results["box_margin"] == 0
    assert "Not automatic: small was given the boxes of the truth.\n" in capsys.readouterr().out
    for case in layouts.find_data("phantom", root).splits["val"]:
        written, image = nib.load(folder / f"{case.name}.nii.gz"), nib.load(case.images[0])
        assert written.shape == image.shape and np.array_equal(written.affine, image.affine)
        prediction, truth = (nifti.read_label(str(f), 4)[0] for f in (written.get_filename(), case.label))
        assert not prediction[~truth.any((1, 2))].any() and not truth.any((1, 2)).all()
        dice = metrics.dice_per_class(prediction, truth, 4)  # of the whole volume, with its empty slices
        assert [scores["dice"] for scores in results["per_case"][case.name].values()] == dice.tolist()


def test_a_stopped_prediction_goes_on_and_other_settings_predict_anew(run, filled, tmp_path, monkeypatch):
    predict_case, calls = baselines.predict_case, []
    monkeypatch.setattr(baselines, "predict_case", lambda *args: calls.append(args) or predict_case(*args))
    arguments = ["--prompts", "gt", "--split", "test"]
    first, folder = run(*arguments), tmp_path / "runs/phantom/predictions-small-boxes-gt-test"
    assert len(calls) == len(first["per_case"]) > 1
    next(folder.glob("*.nii.gz")).unlink()
    assert run(*arguments) == first and len(calls) == len(first["per_case"]) + 1
    run(*arguments, "--box-margin", "3", "--output", str(folder))
    assert len(calls) == 2 * len(first["per_case"]) + 1
    run(*arguments, "--box-margin", "3")
    assert folder.with_name("predictions-small-boxes-gt-margin3-test").is_dir()


def test_boxes_of_another_program_are_used_and_no_truth_is_opened_before_scoring(
    run, filled, root, tmp_path, monkeypatch, capsys
):
    cases = layouts.find_data("phantom", root).splits["val"]
    write_maps(tmp_path / "net", cases, (20, 30, 0))  # it sees one pixel of the LV in the first slice
    opened, read_volume, score_files = [], nifti.read_volume, evaluate.score_files
    monkeypatch.setattr(nifti, "read_volume", lambda path: opened.append(str(path)) or read_volume(path))

    def score(*args):
        assert opened and not {case.label for case in cases} & set(opened)
        return score_files(*args)

    monkeypatch.setattr(evaluate, "score_files", score)
    results = run("--prompts", "net")
    name = f"boxes-{tmp_path.name}_net"
    folder = tmp_path / f"runs/phantom/predictions-small-{name}-val"
    for case in cases:
        label = np.asarray(nib.load(folder / f"{case.name}.nii.gz").dataobj)
        assert 0 < (label > 0).sum() <= 2 and not label[:, :, 1:].any() and label[20, 30, 0] == 3
    assert results["prompts"] == "net" and results["per_class"]["RV"]["only_truth"] == len(cases)
    (folder / f"metrics-{name}.json").unlink()
    monkeypatch.setattr(evaluate, "score_files", score_files)
    again = evaluate.main(["--predictions", str(folder), "--data", "phantom", "--root", root])
    assert again["mean"] == results["mean"]  # scored as files, the label maps still say so
    assert (
        f"Not automatic: the model was given the boxes of {tmp_path.name}_net"[:60] in capsys.readouterr().out
    )
    assert not (folder / "metrics.json").exists()


def test_hidden_labels_give_no_boxes_but_another_program_does(filled, tmp_path):
    write_tree(tmp_path / "acdc", "acdc")
    cases = layouts.find_data("acdc", str(tmp_path / "acdc")).splits["testing"]
    write_maps(tmp_path / "net", cases, ...)
    arguments = f"small --data acdc --root {tmp_path / 'acdc'} --split testing --prompts".split()
    with pytest.raises(SystemExit, match="--prompts gt: found no label of patient101"):
        baselines.main([*arguments, "gt"])
    assert baselines.main([*arguments, str(tmp_path / "net"), "--output", str(tmp_path / "out")]) is None
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        f"{case.name}.nii.gz" for case in cases
    ]


def test_arguments_that_do_not_go_together_say_which_do(capsys):
    for arguments, message in (
        ("sam2 --data a --prompts gt", "invalid choice: 'sam2'"),
        ("sam --data a", "the following arguments are required: --prompts"),
        ("sam --data a --prompts auto", "--prompts: found auto, expected gt or DIR"),
        ("sam --data a --prompts gt --box-margin -1", "--box-margin: found -1, expected"),
        ("sam --data a --prompts b --output b/", "--prompts: found the folder of --output, expected another"),
    ):
        with pytest.raises(SystemExit):
            baselines.parse_arguments(arguments.split())
        assert message in capsys.readouterr().err


def test_missing_weights_and_wrong_boxes_are_one_message_and_no_output(run, root, tmp_path):
    data = ["--data", "phantom", "--root", root]
    write_maps(tmp_path / "net", layouts.find_data("phantom", root).splits["val"], ..., flip=-1)
    for arguments, message in (
        (
            ["medsam", *data, "--prompts", "gt"],
            "medsam needs --sam-checkpoint FILE: medsam_vit_b.pth from the",
        ),
        (["mobile_sam", *data, "--prompts", "gt", "--sam-checkpoint", "no.pt"], "no.pt"),
        (["small", *data, "--prompts", "nowhere"], "nowhere"),
        (["small", *data, "--prompts", "net"], "found the affine"),
    ):
        with pytest.raises(SystemExit, match=rf"^baselines.py: (?s:.*){re.escape(message)}"):
            baselines.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
