"""Scores against brute force, medpy's rule and MONAI; means, intervals, tables and files."""

import csv
import json

import numpy as np
import pytest
from scipy import ndimage

from support import metrics

SPACINGS = pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3)], ids=str)
NAMES, NAN = ("background", "RV", "Myo", "LV"), np.nan


def blobs(seed, shape=(7, 14, 12), num_classes=4):
    """Two label maps of smooth random regions that reach the image's edges; one is the other, disturbed."""
    noise = np.random.default_rng(seed).normal(size=(2, num_classes, *shape))
    fields = ndimage.gaussian_filter(noise, (0, 0, 1.5, 1.5, 1.5))
    return tuple(np.argmax(maps, 0).astype(np.uint8) for maps in (fields[0] + 0.2 * fields[1], fields[0]))


PAIRS = {
    "blobs": blobs(1, (8, 24, 20)),
    "touching all edges": (np.ones((8, 10, 12), np.uint8), np.pad(np.ones((6, 8, 10), np.uint8), 1)),
    "one voxel each": tuple(np.eye(60, dtype=np.uint8)[[7, 41]].reshape(2, 3, 4, 5)),
}


def test_dice_equals_sets_of_voxels_and_is_undefined_for_a_class_in_neither_map():
    prediction, truth = blobs(0)
    truth[truth == 1], prediction[prediction == 2] = 2, 1  # 1 in the prediction only; 4 in neither
    dice = metrics.dice_per_class(prediction, truth, 5)
    a, b = ([set(np.flatnonzero(labels == k)) for k in (1, 2, 3)] for labels in (truth, prediction))
    expected = [2 * len(s & t) / (len(s) + len(t)) for s, t in zip(a, b)]
    assert dice == pytest.approx([*expected, NAN], nan_ok=True) and dice[0] == dice[1] == 0 < dice[2]


@SPACINGS
@pytest.mark.parametrize("name", PAIRS)
def test_hd95_and_nsd_equal_medpys_rule(name, spacing):
    """`medpy.metric.binary.hd95` is written out, because its package builds from source."""
    maps = PAIRS[name]
    found = metrics.score_maps(*maps, spacing, 4, tolerance=1.4)
    for k in range(1, 1 + maps[1].max()):
        masks = [labels == k for labels in maps]
        edges = [m ^ ndimage.binary_erosion(m, ndimage.generate_binary_structure(3, 1)) for m in masks]
        pairs = edges, edges[::-1]
        pooled = np.hstack([ndimage.distance_transform_edt(~b, sampling=spacing)[a] for a, b in pairs])
        assert found["hd95"][k - 1] == pytest.approx(np.percentile(pooled, 95), abs=1e-9)
        assert found["nsd"][k - 1] == pytest.approx((pooled <= 1.4 + 1e-6).mean(), abs=1e-12)


@SPACINGS
def test_nsd_equals_monais(spacing):
    peer, torch = pytest.importorskip("monai.metrics"), pytest.importorskip("torch")
    maps = PAIRS["blobs"]
    hot = [torch.from_numpy(np.eye(4, dtype=np.int64)[labels]).movedim(-1, 0)[None] for labels in maps]
    nsd = peer.compute_surface_dice(*hot, class_thresholds=[1.4] * 3, spacing=spacing)[0]
    assert metrics.score_maps(*maps, spacing, 4, 1.4)["nsd"] == pytest.approx(nsd.numpy(), rel=1e-6)


def test_nsd_counts_a_distance_of_exactly_the_tolerance():
    """This holds although ten voxels of float32's 0.1 mm are longer than 1 mm. The default is 1 mm."""
    maps, spacing = np.eye(12, dtype=np.uint8)[[0, 10], None, None], (1, 1, float(np.float32(0.1)))
    assert metrics.score_maps(*maps, spacing, 2)["nsd"] == 1
    assert metrics.score_maps(*maps, spacing, 2, tolerance=0.9999)["nsd"] == 0


def test_background_around_a_volume_and_the_order_of_axes_change_nothing():
    maps, spacing = blobs(0), np.array([5.0, 0.7, 1.3])
    plain = metrics.score_maps(*maps, spacing, 4)
    padded = [np.pad(labels, ((2, 3), (1, 4), (5, 2))).transpose(2, 0, 1) for labels in maps]
    moved = metrics.score_maps(*padded, spacing[[2, 0, 1]], 4, workers=2)
    assert all(plain[metric] == pytest.approx(moved[metric], abs=1e-9) for metric in metrics.METRICS)


DIAGONAL = np.sqrt(8**2 + 40**2 + 36**2)  # of 8 x 10 x 12 voxels of 1 x 4 x 3 mm
STATES = {  # (dice, hd95, nsd) of a class in neither map, in the truth, in the prediction, in both
    "masksam": [(NAN, NAN, NAN), (0, DIAGONAL, 0), (0, DIAGONAL, 0), (0.5, 3, 0.5)],
    "nnformer": [(1, 0, NAN), (0, 0, NAN), (0, 0, NAN), (0.5, 1, 0.5)],
    "transunet": [(0, 0, NAN), (0, 0, NAN), (1, 0, NAN), (0.5, 1, 0.5)],
}


@pytest.mark.parametrize("convention", metrics.ABSENT)
def test_each_convention_in_each_state(convention):
    """In both: two rods of two voxels, one voxel apart along W; their distances are 0 0 3 3 mm."""
    prediction, truth = np.zeros((2, 8, 10, 12), np.uint8)
    truth[0, 0, 0], prediction[7, 9, 11] = 2, 3
    truth[3, 3, 3:5], prediction[3, 3, 4:6] = 4, 4
    scores = metrics.score_maps(prediction, truth, (1, 4, 3), 5, tolerance=2, convention=convention)
    found = np.stack([scores[metric] for metric in metrics.METRICS], axis=1)
    assert np.allclose(found, np.array(STATES[convention], float), equal_nan=True)
    assert scores["presence"].tolist() == [0, 1, 2, 3]


def test_wrong_maps_conventions_and_scores_are_named():
    maps = np.zeros((2, 2, 3, 4), np.uint8)
    wrong = maps + np.array([0, 4], np.uint8).reshape(2, 1, 1, 1)
    for call, message in (
        (lambda: metrics.score_maps(maps[0], maps[1, ..., :3], (1, 1, 1), 4), r"\(2, 3, 4\).*\(2, 3, 3\)"),
        (lambda: metrics.dice_per_class(*wrong, 4), "truth: found labels 0 to 4, expected 0 to 3"),
        (lambda: metrics.score_maps(*maps, (1, 1, 1), 2, convention="mine"), "'mine'.*masksam, nnformer, tr"),
        (lambda: metrics.summarize({}, NAMES), "scores: found none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def random_scores(num_cases, num_classes=4, missing=0.2):
    table = np.random.default_rng(0).random((num_cases, num_classes - 1, 3))
    table[np.random.default_rng(1).random(table.shape[:2]) < missing] = NAN
    return {f"case{i:02d}": dict(zip(metrics.METRICS, case.T)) for i, case in enumerate(table)}


def test_means_are_over_cases_first_and_then_over_the_scored_classes():
    dice = np.array([[1.0, 0.5, NAN], [0.0, NAN, NAN], [0.2, NAN, NAN]])
    presence = np.array([[3, 3, 0], [1, 0, 0], [2, 0, 0]], np.uint8)
    scores = {case: {"dice": d, "hd95": 4 * d, "presence": p} for case, d, p in zip("abc", dice, presence)}
    results = metrics.summarize(scores, NAMES)
    assert results["mean"] == pytest.approx({"dice": (0.4 + 0.5) / 2, "hd95": 1.8})  # not 1.7 / 4
    one, none = {"neither": 0, "only_truth": 1, "only_prediction": 1}, {"only_truth": 0, "only_prediction": 0}
    assert results["per_class"] == {
        "RV": {"dice": pytest.approx(0.4), "hd95": pytest.approx(1.6), "cases": 3} | one,
        "Myo": {"dice": 0.5, "hd95": 2.0, "cases": 1, "neither": 2} | none,
        "LV": {"dice": None, "hd95": None, "cases": 0, "neither": 3} | none,
    }
    results = metrics.summarize(scores, NAMES, scored=(2,))
    assert results["mean"] == {"dice": 0.5, "hd95": 2.0} and results["scored"] == ["Myo"]
    assert results["interval"] == {"dice": None, "hd95": None}  # only one case has the scored class


def test_the_interval_is_the_bootstrap_over_cases():
    scores = random_scores(12, missing=0.4)
    results = metrics.summarize(scores, NAMES, scored=(3, 1))
    table, means = np.array([case["hd95"][[2, 0]] for case in scores.values()]), []
    table = table[~np.isnan(table).all(1)]
    assert 2 < len(table) < 12
    for draw in np.random.default_rng(0).integers(len(table), size=(1000, len(table))):
        columns = [[value for value in column if not np.isnan(value)] for column in table[draw].T]
        means.append(np.mean([np.mean(column) for column in columns if column]))
    assert results["interval"]["hd95"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())


def test_the_table_shows_the_scored_classes_in_their_order_and_the_others_below(capsys):
    scores = random_scores(6, 5, missing=0)
    for case in scores.values():
        case["presence"] = np.array([3, 1, 2, 3], np.uint8)
    results = metrics.summarize(scores, (*NAMES, "aorta"), scored=(4, 1))
    metrics.print_table(results | {"tolerance_mm": 2.0})
    header, *lines = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "class Dice worst best HD95 mm NSD 2 mm cases missed false"
    assert " ".join(line.split()[0].strip("-") for line in lines) == "aorta RV  Myo LV  mean 95 to"
    dice, hd95, nsd = (np.array([case[metric][3] for case in scores.values()]) for metric in metrics.METRICS)
    expected = f"{dice.mean():.4f} {dice.min():.4f} {dice.max():.4f} {hd95.mean():.2f} {nsd.mean():.4f} 6 0 0"
    assert lines[0].split()[1:] == expected.split()
    assert lines[3].split()[-3:] == ["6", "6", "0"] and lines[4].split()[-3:] == ["6", "0", "6"]
    hd95 = [results["mean"]["hd95"], *results["interval"]["hd95"]]
    assert [line.split()[-2] for line in lines[-3:]] == [f"{value:.2f}" for value in hd95]
    results = metrics.summarize({"a": {"dice": np.array([0.5, NAN, 1])}}, NAMES)
    metrics.print_table(results | {"convention": "nnformer", "prompts": "gt", "baseline": "sam"})
    header, _, myo, _, _, mean, *warnings = capsys.readouterr().out.splitlines()
    assert header.split() == ["class", "Dice", "worst", "best", "cases"]
    assert myo.split() == ["Myo", "-", "-", "-", "0"] and mean.split() == ["mean", "0.7500"]
    assert warnings[0] == "Not automatic: sam was given the boxes of the truth." and len(warnings) == 2
    assert "never compare" in warnings[1]


def test_files_say_what_the_results_say_with_nan_as_null_and_as_an_empty_cell(tmp_path):
    scores = {case: metrics.score_maps(*blobs(i), (5, 1, 1), 5) for i, case in enumerate(("case, one", "b"))}
    results = metrics.summarize(scores, (*NAMES, "aorta"), (2, 1))
    metrics.write_metrics(tmp_path, results, "-boxes-gt")
    metrics.write_metrics(tmp_path, results | {"convention": "nnformer"})
    with pytest.raises(ValueError, match="JSON"):
        metrics.write_metrics(tmp_path, results | {"loss": NAN})
    assert {path.stem for path in tmp_path.iterdir()} == {"metrics-boxes-gt", "metrics-nnformer"}
    assert json.loads((tmp_path / "metrics-boxes-gt.json").read_text()) == results
    _, *rows = csv.reader((tmp_path / "metrics-boxes-gt.csv").read_text().splitlines())
    assert rows == [
        [case, name, *("" if row[metric] is None else str(row[metric]) for metric in metrics.METRICS)]
        for case, classes in (results["per_case"] | {"mean": results["per_class"]}).items()
        for name, row in classes.items()
    ]
    assert rows[3] == ["case, one", "aorta", "", "", ""]
