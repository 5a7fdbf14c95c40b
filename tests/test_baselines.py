"""Boxes in the model's own pixels, pictures as each member wants them, and results that say what they are."""

import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import evaluate
from model import MaskSAM, MaskSAMConfig, modeling
from support import layouts, metrics, nifti, phantom
from tools import baselines
from tools.baselines import BASELINES, Baseline
from volumes import ACDC, write_tree

WEIGHTS = Path(__file__).parents[2] / "shared" / "weights"


class Recorder(nn.Module):
    """In place of the image encoder."""

    def __init__(self, img_size: int):
        super().__init__()
        self.img_size, self.images = img_size, []

    def forward(self, image):
        self.images.append(image)
        return image.new_zeros(1, 1, 1, 1)


class Boxes(nn.Module):
    """In place of the prompt encoder: hands the boxes on."""

    def forward(self, points, boxes, masks):
        assert points is None and masks is None
        return boxes, None

    def get_dense_pe(self):
        return None


class Fill(nn.Module):
    """In place of the mask decoder: fills a box, from its first to its last pixel, at SAM's low resolution."""

    def __init__(self, img_size: int):
        super().__init__()
        self.img_size, self.boxes = img_size, []

    def forward(self, *, sparse_prompt_embeddings, multimask_output, **_):
        assert multimask_output is False
        boxes = sparse_prompt_embeddings
        self.boxes.append(boxes)
        centres = (torch.arange(256) + 0.5) * self.img_size / 256
        x, y = ((centres > boxes[:, i, None]) & (centres < boxes[:, i + 2, None] + 1) for i in (0, 1))
        inside = (y[:, :, None] & x[:, None, :]).float()
        area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None, None]
        return ((2 * inside - 1) * (10 + area / 1e4))[:, None], None  # surer of a larger box


def stub(name: str) -> modeling.Sam:
    """The picture handling of `load_baseline`'s model around stubs."""
    side, stretch = BASELINES[name].side, BASELINES[name].stretch
    plain = modeling.Sam(Recorder(side), Boxes(), Fill(side))
    return plain if not stretch else modeling.Sam(Recorder(side), Boxes(), Fill(side), [0.0] * 3, [255.0] * 3)


# ------------------------------------------------------------------------------------------------------ boxes and masks


def test_a_model_that_fills_its_box_gives_exactly_the_volume_of_the_boxes():
    prompts = np.zeros((5, 64, 64), np.uint8)
    prompts[1, 10:14, 20:31], prompts[1, 40, 40] = 1, 3
    prompts[3, 5, 5], prompts[3, 9, 2], prompts[3, 0:4, 60:64] = 2, 2, 1  # two pixels: one box around both
    expected = prompts.copy()
    expected[3, 5:10, 2:6] = 2
    for name in ("sam", "mobile_sam", "lite_medsam", "medsam"):
        sam = stub(name)
        label = baselines.predict_case(sam, BASELINES[name], np.zeros(prompts.shape, np.float32), prompts)
        assert np.array_equal(label, expected), name
        assert len(sam.image_encoder.images) == 2  # a slice is encoded once for all its classes, an empty one never


@pytest.mark.parametrize("inner, outer", [(1, 2), (2, 1)])
def test_on_overlaps_the_smaller_box_lies_on_top_whatever_the_numbers_and_the_logits(inner, outer):
    """The ventricle in the box of the myocardium; the stub is surer of the larger box."""
    prompts = np.zeros((1, 64, 64), np.uint8)
    prompts[0, 10:30, 10:30], prompts[0, 14:26, 14:26] = outer, inner
    label = baselines.predict_case(stub("sam"), BASELINES["sam"], np.zeros(prompts.shape, np.float32), prompts)
    assert np.array_equal(label, prompts)


@pytest.mark.parametrize("name, size, scale", [
    ("sam", (768, 1024), (16, 16)), ("mobile_sam", (768, 1024), (16, 16)), ("lite_medsam", (192, 256), (4, 4)),
    ("medsam", (1024, 1024), (16, 1024 / 48)),
])  # fmt: skip
def test_boxes_and_pictures_reach_the_model_in_its_own_pixels(name, size, scale):
    """A slice of 48 rows and 64 columns, whose object is brighter than all around it."""
    prompts = np.zeros((1, 48, 64), np.uint8)
    prompts[0, 12:24, 40:56] = 2
    pictures = np.where(prompts > 0, 200, 50).astype(np.float32)
    sam, side = stub(name), BASELINES[name].side
    label = baselines.predict_case(sam, BASELINES[name], pictures, prompts)
    assert np.array_equal(label, prompts)
    (image,), (box,) = sam.image_encoder.images[0], sam.mask_decoder.boxes[0]
    assert image.shape == (3, side, side)
    expected = [40 * scale[0], 12 * scale[1], 56 * scale[0] - 1, 24 * scale[1] - 1]
    assert box.tolist() == pytest.approx(expected, abs=1e-3)
    assert (image[:, size[0] :] == 0).all() and (image[:, :, size[1] :] == 0).all()  # the padding, after scaling
    if BASELINES[name].stretch:
        assert image.min() == 0 and image.max() == 1
        bright = image[0] > 0.5
    else:
        mean, deviation = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        for grey, place in ((200, (300, 750)), (50, (100, 100))):
            assert torch.allclose(image[:, *place], (grey - mean) / deviation)
        bright = image[0] > 0
        bright[size[0] :] = False  # beyond the slice lies a grey level that SAM takes for its mean
    rows, columns = torch.nonzero(bright.any(1)).flatten(), torch.nonzero(bright.any(0)).flatten()
    around = torch.stack([columns[0], rows[0], columns[-1], rows[-1]])
    assert (box - around).abs().max() <= 1  # the box lies around the object in the picture that the encoder sees


@pytest.mark.parametrize("length, side", [(64, 1024), (64, 256), (216, 1024), (216, 256), (512, 256), (300, 1024)])
def test_the_position_code_gets_the_centres_of_the_first_and_the_last_pixel(length, side, monkeypatch):
    """Of the mask itself, resized to the encoder's picture; that resizing rounds to whole pixels, so half a pixel."""
    encoder = modeling.PromptEncoder(8, (16, 16), (side, side), 4)
    seen = []
    monkeypatch.setattr(encoder.pe_layer, "forward_with_coords",
                        lambda points, size: seen.append(points) or points.new_zeros(*points.shape[:2], 8))  # fmt: skip
    for first, last in ((10, 10 + length // 8), (0, length), (length // 3, length // 2)):
        prompts = torch.zeros(length, length, dtype=torch.uint8)
        prompts[4 : length - 4, first:last] = 1
        encoder(None, baselines.box_prompts(prompts, (side, side))[1], None)
        centres = torch.arange(side) + 0.5
        columns = centres[prompts[length // 2, (centres * length / side).long()] > 0]
        x = seen.pop()[0, :, 0]
        assert (x - columns[[0, -1]]).abs().max() <= (0.5 if side % length else 0) + 1e-3
        assert x[0] + x[1] == pytest.approx((first + last) * side / length, abs=1e-3)  # no shift of the middle


def test_margins_are_in_the_models_pixels_and_end_at_the_image():
    prompts = torch.zeros(48, 64, dtype=torch.uint8)
    prompts[0:4, 30:34], prompts[40:48, 62:64] = 1, 3
    class_ids, boxes = baselines.box_prompts(prompts, (768, 1024), 20)
    assert class_ids.tolist() == [1, 3]
    assert boxes.tolist() == [[460, 0, 563, 83], [972, 620, 1023, 767]]
    _, tight = baselines.box_prompts(prompts, (768, 1024))
    assert tight.tolist() == [[480, 0, 543, 63], [992, 640, 1023, 767]]
    _, (small,) = baselines.box_prompts(prompts == 3, (12, 16))  # two columns in half a pixel: never inside out
    assert small[0] <= small[2] <= 16 and small[1] <= small[3] <= 12


# ------------------------------------------------------------------------------------------------------------- pictures


def test_mr_is_cut_at_percentiles_of_what_is_above_zero_and_ct_at_its_window():
    rng = np.random.default_rng(0)
    volume = np.zeros((4, 30, 30), np.float32)
    volume[:, 5:, 5:] = rng.uniform(100, 300, (4, 25, 25))
    volume[0, 10, 10] = 1e5
    grey = baselines.grey_levels(volume, "MR")
    low, high = np.percentile(volume[volume > 0], (0.5, 99.5))
    assert grey.dtype == np.uint8 and (grey[volume == 0] == 0).all() and grey[0, 10, 10] == 255
    middle = np.abs(volume - (low + high) / 2) < 0.5
    assert middle.any() and (np.abs(grey[middle].astype(int) - 127) <= 1).all()
    ct = np.array([-1000.0, -160.0, 40.0, 240.0, 3000.0], np.float32).reshape(1, 1, 5)
    assert baselines.grey_levels(ct, "CT").ravel().tolist() == [0, 0, 127, 255, 255]
    for constant in (0.0, -3.0, 7.0):
        assert (baselines.grey_levels(np.full((2, 3, 3), constant, np.float32), "MR") == 0).all()


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("baselines") / "phantom"
    phantom.write_phantom(folder, num_patients=5, seed=3)
    return folder


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """`evaluate.py --baseline small`: a SAM of random weights whose side is 256, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BASELINES, "small", Baseline("tiny", 256))
    torch.manual_seed(0)
    return lambda *more: evaluate.main(["--baseline", "small", "--data", "phantom", "--root", str(root), *more])


def filled(monkeypatch) -> None:
    """Let the model fill its boxes."""
    sam = modeling.Sam(Recorder(256), Boxes(), Fill(256))
    monkeypatch.setattr(baselines, "load_baseline", lambda name, path=None: (sam, None))


def test_random_weights_end_to_end_and_nothing_passes_for_automatic(run, root, tmp_path, capsys):
    results = run("--prompts", "gt", "--amp", "off")
    folder = tmp_path / "runs/phantom/predictions-small-boxes-gt-val"
    assert json.loads((folder / "metrics-boxes-gt.json").read_text()) == results
    assert results["baseline"] == "small" and results["prompts"] == "gt" and results["box_margin"] == 0
    assert "Not automatic: small was given the boxes of the truth.\n" in capsys.readouterr().out
    for case in layouts.find_data("phantom", str(root)).splits["val"]:
        written, image = nib.load(folder / f"{case.name}.nii.gz"), nib.load(case.images[0])
        assert written.shape == image.shape and np.array_equal(written.affine, image.affine)
        prediction, truth = (nifti.read_label(str(f), 4)[0] for f in (written.get_filename(), case.label))
        assert not prediction[~truth.any((1, 2))].any() and not truth.any((1, 2)).all()
        dice = metrics.dice_per_class(prediction, truth, 4)  # of the whole volume, empty slices and all
        assert [scores["dice"] for scores in results["per_case"][case.name].values()] == dice.tolist()
    run("--prompts", "gt", "--amp", "off", "--box-margin", "5")
    assert (tmp_path / "runs/phantom/predictions-small-boxes-gt-margin5-val").is_dir()


def test_a_stopped_prediction_goes_on_and_another_question_is_answered_anew(run, tmp_path, monkeypatch):
    filled(monkeypatch)
    predict_case, calls = baselines.predict_case, []
    monkeypatch.setattr(baselines, "predict_case", lambda *args: calls.append(args) or predict_case(*args))
    arguments = ["--prompts", "gt", "--split", "test", "--output", str(tmp_path / "out")]
    first = run(*arguments)
    assert len(calls) == len(first["per_case"]) > 1
    file = tmp_path / "out" / f"{next(iter(first['per_case']))}.nii.gz"
    file.unlink()
    assert run(*arguments) == first and len(calls) == len(first["per_case"]) + 1
    run(*arguments, "--box-margin", "3")
    assert len(calls) == 2 * len(first["per_case"]) + 1


def test_other_prompts_are_used_and_the_truth_is_not_opened_before_scoring(run, root, tmp_path, monkeypatch, capsys):
    """The other program sees a pixel of the LV in the first slice, and nothing else."""
    filled(monkeypatch)
    cases = layouts.find_data("phantom", str(root)).splits["val"]
    (tmp_path / "net" / "masks").mkdir(parents=True)
    for case in cases:
        image = nib.load(case.label)
        array = np.zeros(image.shape, np.uint8)
        array[20, 30, 0] = 3
        nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "net" / "masks" / f"{case.name}.nii.gz")
    opened, read_volume, score_files = [], nifti.read_volume, evaluate.score_files
    monkeypatch.setattr(nifti, "read_volume", lambda path: opened.append(str(path)) or read_volume(path))

    def score(*args):
        assert opened and not {case.label for case in cases} & set(opened)
        return score_files(*args)

    monkeypatch.setattr(evaluate, "score_files", score)
    results = run("--prompts", "net/masks")
    folder = tmp_path / "runs/phantom/predictions-small-boxes-net_masks-val"
    for case in cases:
        label = np.asarray(nib.load(folder / f"{case.name}.nii.gz").dataobj)
        assert (label > 0).sum() <= 2 and set(np.unique(label)) <= {0, 3} and not label[:, :, 1:].any()
        assert label[20, 30, 0] == 3
    assert results["prompts"] == "net/masks" and results["per_class"]["RV"]["only_truth"] == len(cases)
    assert "Not automatic: small was given the boxes of net/masks." in capsys.readouterr().out
    (folder / "metrics-boxes-net_masks.json").unlink()
    monkeypatch.setattr(evaluate, "score_files", score_files)
    again = evaluate.main(["--predictions", str(folder), "--data", "phantom", "--root", str(root)])
    assert again["mean"] == results["mean"] and again["prompts"] == "net_masks"  # scored as files, they still say so
    assert "Not automatic: the model was given the boxes of net_masks." in capsys.readouterr().out
    assert not (folder / "metrics.json").exists() and (folder / "metrics-boxes-net_masks.json").is_file()


def test_hidden_labels_give_no_boxes_but_another_programs_do(tmp_path, monkeypatch):
    filled(monkeypatch)
    write_tree(tmp_path / "acdc", "acdc")
    cases = layouts.find_data("acdc", str(tmp_path / "acdc")).splits["testing"]
    (tmp_path / "net").mkdir()
    for case in cases:
        image = nib.load(case.images[0])
        array = np.ones(image.shape, np.uint8)
        nib.save(nib.Nifti1Image(array, image.affine), tmp_path / "net" / f"{case.name}.nii.gz")
    arguments = ["--baseline", "sam", "--data", "acdc", "--root", str(tmp_path / "acdc"), "--split", "testing"]
    with pytest.raises(SystemExit, match="--prompts gt: 2 cases have no truth, such as patient101"):
        evaluate.main([*arguments, "--prompts", "gt"])
    output = ["--output", str(tmp_path / "out")]
    assert evaluate.main([*arguments, "--prompts", str(tmp_path / "net"), *output]) is None
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [f"{case.name}.nii.gz" for case in cases]


@pytest.mark.parametrize("arguments, message", [
    (["--baseline", "sam2"], "invalid choice: 'sam2'"),
    (["--baseline", "sam", "--data", "acdc"], "--baseline needs --data, and --prompts gt or DIR"),
    (["--baseline", "sam", "--prompts", "gt"], "--baseline needs --data, and --prompts gt or DIR"),
    (["--baseline", "sam", "--ckpt", "a"], "expected either --ckpt FILE or --predictions DIR or --baseline NAME"),
    (["--baseline", "sam", "--predictions", "a"], "expected either"),
    (["--baseline", "sam", "--data", "a", "--prompts", "gt", "--input", "b"], "belong to --ckpt"),
    (["--baseline", "sam", "--data", "a", "--prompts", "gt", "--largest-component"], "belong to --ckpt"),
    (["--baseline", "sam", "--data", "a", "--prompts", "gt", "--box-margin", "-1"], "--box-margin is -1, expected"),
    (["--baseline", "sam", "--data", "a", "--prompts", "b", "--output", "b/"], "would replace the prompts"),
    (["--predictions", "a", "--data", "acdc", "--box-margin", "0"], "--box-margin belongs to --baseline"),
    (["--predictions", "a", "--data", "acdc", "--prompts", "gt"], "take no --prompts"),
    (["--ckpt", "a", "--prompts", "gt", "--submission"], "take no --prompts"),
])  # fmt: skip
def test_arguments_that_do_not_go_together_say_what_does(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_missing_weights_and_missing_prompts_are_one_message_and_no_output(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--data", "phantom", "--root", str(root)]
    for name, more, message in (
        ("medsam", ["--prompts", "gt"], "--baseline medsam needs --sam-checkpoint FILE: medsam_vit_b.pth from the"),
        ("mobile_sam", ["--prompts", "gt", "--sam-checkpoint", "no.pt"], "--sam-checkpoint no.pt: no such file"),
        ("sam", ["--prompts", "nowhere"], "nowhere: no such folder"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            evaluate.main(["--baseline", name, *where, *more])
    assert not list(tmp_path.iterdir())


def test_prompts_of_another_place_are_refused(run, root, tmp_path, monkeypatch):
    filled(monkeypatch)
    (tmp_path / "net").mkdir()
    for case in layouts.find_data("phantom", str(root)).splits["val"]:
        image = nib.load(case.label)
        moved = nib.Nifti1Image(np.asarray(image.dataobj), image.affine @ np.diag([-1, 1, 1, 1]))
        nib.save(moved, tmp_path / "net" / f"{case.name}.nii.gz")
    with pytest.raises(SystemExit, match="nothing was predicted:\n.*found the affine"):
        run("--prompts", "net")
    assert not (tmp_path / "runs").exists()


def test_medsam_is_sams_network_without_its_pixel_statistics_and_never_with_its_weights(tmp_path, monkeypatch):
    """A small stand-in for ViT-B."""
    monkeypatch.setitem(BASELINES, "small", Baseline("tiny", 256, home="its home", stretch=True))
    model = MaskSAM(MaskSAMConfig("tiny", encoder_size=(256, 256)))
    monkeypatch.setattr(baselines, "build_model", lambda config, path: (model, {"sha256": "other"}))
    sam, sha256 = baselines.load_baseline("small", "file.pth")
    assert sha256 == "other" and not sam.training
    assert torch.equal(sam.preprocess(torch.full((1, 3, 256, 256), 255.0)), torch.ones(1, 3, 256, 256))
    monkeypatch.setattr(baselines, "build_model", lambda config, path: (model, {"sha256": None}))  # as in BACKBONES
    with pytest.raises(ValueError, match="file.pth holds SAM's own weights, expected those of small: its home"):
        baselines.load_baseline("small", "file.pth")


@pytest.mark.skipif(not (WEIGHTS.is_dir() and ACDC.is_dir()), reason="needs ../shared/weights and ../shared/data/acdc")
@pytest.mark.parametrize("name, file", [("mobile_sam", "mobile_sam.pt"), ("lite_medsam", "lite_medsam.pth")])
def test_the_published_weights_find_both_ventricles_in_their_boxes(name, file):
    """Three slices in the middle of a real case; an upside-down box or a wrong scaling leaves below 0.5."""
    case = layouts.find_data("acdc", str(ACDC)).splits["val"][0]
    volume, _ = nifti.read_image(case.images[0])
    truth, _ = nifti.read_label(case.label, 4)
    part = slice(len(truth) // 2 - 1, len(truth) // 2 + 2)
    sam, _ = baselines.load_baseline(name, WEIGHTS / file)
    label = baselines.predict_case(sam, BASELINES[name], baselines.grey_levels(volume, "MR")[part], truth[part])
    rv, _, lv = metrics.dice_per_class(label, truth[part], 4)
    assert rv > 0.85 and lv > 0.85
