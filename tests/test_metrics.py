"""Scores against brute force, medpy's rule and MONAI; means, intervals, tables and files."""

import csv
import json
import re

import numpy as np
import pytest
from scipy import ndimage

from support import metrics

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3)]
NAMES = ("background", "RV", "Myo", "LV")
NAN = np.nan


def blobs(seed, shape=(7, 14, 12), num_classes=4):
    """Two label maps of smooth random regions that reach the image's edges; one is the other, disturbed."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(num_classes)]
    noise = [ndimage.gaussian_filter(rng.normal(size=shape), 1.0) for _ in range(num_classes)]
    truth = np.argmax(fields, 0)
    prediction = np.argmax([a + 0.3 * b for a, b in zip(fields, noise)], 0)
    return prediction.astype(np.uint8), truth.astype(np.uint8)


def box(*corners, shape=(8, 10, 12)):
    """A map with class 1 in the box from `low` to before `high`, for each of the pairs (low, high)."""
    mask = np.zeros(shape, np.uint8)
    for low, high in corners:
        mask[tuple(map(slice, low, high))] = 1
    return mask


PAIRS = {
    "touching all edges": (np.ones((8, 10, 12), np.uint8), box(((1, 1, 1), (7, 9, 11)))),
    "one voxel each": (box(((2, 3, 4), (3, 4, 5))), box(((4, 7, 4), (5, 8, 5)))),
    "identical": (box(((1, 2, 3), (6, 7, 8))), box(((1, 2, 3), (6, 7, 8)))),
    "a stray voxel": (box(((1, 1, 1), (4, 6, 6)), ((7, 9, 11), (8, 10, 12))), box(((1, 1, 1), (4, 6, 6)))),
    "a single slice": (box(((3, 1, 1), (4, 8, 9))), box(((3, 2, 2), (4, 9, 9)))),
}


def edge_voxels(mask):
    """Voxels with one of the six neighbours outside the mask or the image, found one at a time."""
    members = {tuple(voxel) for voxel in np.argwhere(mask).tolist()}
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    return [v for v in sorted(members) if any(tuple(np.add(v, step)) not in members for step in steps)]


# --------------------------------------------------------------------------------------------------- one case


def test_dice_equals_sets_of_voxels_and_is_undefined_for_a_class_in_neither_map():
    prediction, truth = blobs(0)
    truth[truth == 1], prediction[prediction == 2] = 2, 1  # 1 in the prediction only; 4 in neither
    dice = metrics.dice_per_class(prediction, truth, 5)
    for k in range(1, 4):
        a, b = set(np.flatnonzero(truth == k)), set(np.flatnonzero(prediction == k))
        assert dice[k - 1] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
    assert dice[0] == dice[1] == 0 and np.isnan(dice[3])
    every_id = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    assert (metrics.dice_per_class(every_id, every_id, 256) == 1).all()  # ids do not wrap


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("name", [0, 1, *PAIRS])
def test_hd95_and_nsd_equal_all_pairs_of_edge_voxels(name, spacing):
    prediction, truth = PAIRS[name] if name in PAIRS else blobs(name)
    num_classes = 2 if name in PAIRS else 4
    scores = metrics.score_maps(prediction, truth, spacing, num_classes, tolerance=1.4)
    for k in range(1, num_classes):
        a, b = (np.array(edge_voxels(labels == k)) * spacing for labels in (prediction, truth))
        table = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
        pooled = np.concatenate([table.min(1), table.min(0)])
        assert scores["hd95"][k - 1] == pytest.approx(np.percentile(pooled, 95), abs=1e-9)
        assert scores["nsd"][k - 1] == pytest.approx((pooled <= 1.4 + 1e-6).mean(), abs=1e-12)
        assert scores["presence"][k - 1] == 3
    if name == "identical":
        assert (scores["dice"], scores["hd95"], scores["nsd"]) == (1, 0, 1)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_hd95_equals_medpy(spacing):
    """`medpy.metric.binary.hd95` is written out, because its package builds from source."""
    prediction, truth = blobs(2, (12, 30, 28))
    found = metrics.score_maps(prediction, truth, spacing, 4)["hd95"]
    for k in range(1, 4):
        masks = prediction == k, truth == k
        edges = [m ^ ndimage.binary_erosion(m, ndimage.generate_binary_structure(3, 1)) for m in masks]
        assert all(np.array_equal(metrics._surface(mask), edge) for mask, edge in zip(masks, edges))
        distances = [ndimage.distance_transform_edt(~b, sampling=spacing)[a] for a, b in (edges, edges[::-1])]
        assert found[k - 1] == pytest.approx(np.percentile(np.hstack(distances), 95), abs=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
def test_distances_and_nsd_equal_monai(spacing):
    """MONAI takes the larger of two directed percentiles, medpy pools both; so directed ones are compared."""
    peer, torch = pytest.importorskip("monai.metrics"), pytest.importorskip("torch")
    maps = blobs(1, (12, 30, 28))
    hot = [torch.from_numpy(np.eye(4, dtype=np.int64)[labels]).movedim(-1, 0)[None] for labels in maps]
    nsd = peer.compute_surface_dice(*hot, class_thresholds=[1.4] * 3, spacing=spacing)[0]
    found = metrics.score_maps(*maps, spacing, 4, tolerance=1.4)["nsd"]
    assert found == pytest.approx(nsd.numpy(), rel=1e-6)
    for percentile, rounding in ((95, 1e-4), (100, 1e-6)):  # float32; torch.quantile rounds too
        theirs = peer.compute_hausdorff_distance(*hot, percentile=percentile, spacing=spacing)[0]
        for k in range(1, 4):
            surfaces = [metrics._surface(labels == k) for labels in maps]
            directed = [metrics._nearest_distances(*pair, spacing) for pair in (surfaces, surfaces[::-1])]
            ours = max(np.percentile(distances, percentile) for distances in directed)
            assert ours == pytest.approx(theirs[k - 1].item(), rel=rounding)


def test_nsd_counts_a_distance_of_exactly_the_tolerance():
    """This holds although ten voxels of float32's 0.1 mm are longer than 1 mm. The default is 1 mm."""
    maps = box(((0, 0, 0), (1, 1, 1)), shape=(1, 1, 12)), box(((0, 0, 10), (1, 1, 11)), shape=(1, 1, 12))
    spacing = (1, 1, float(np.float32(0.1)))
    assert 10 * spacing[2] > 1
    assert metrics.score_maps(*maps, spacing, 2)["nsd"] == 1
    assert metrics.score_maps(*maps, spacing, 2, tolerance=0.9999)["nsd"] == 0


def test_background_around_a_volume_and_the_order_of_axes_change_nothing():
    maps, spacing = blobs(0), np.array([5.0, 0.7, 1.3])
    plain = metrics.score_maps(*maps, spacing, 4)
    padded = metrics.score_maps(*(np.pad(m, ((2, 3), (1, 4), (5, 2))) for m in maps), spacing, 4, workers=2)
    turned = metrics.score_maps(*(m.transpose(2, 0, 1) for m in maps), spacing[[2, 0, 1]], 4)
    for metric in metrics.METRICS:
        assert plain[metric].shape == (3,)
        for other in (padded, turned):
            assert plain[metric] == pytest.approx(other[metric], abs=1e-9)


DIAGONAL = np.sqrt(8**2 + 40**2 + 36**2)  # of 8 x 10 x 12 voxels of 1 x 4 x 3 mm
STATES = {  # (dice, hd95, nsd) of a class in neither map, in the truth, in the prediction, in both
    "masksam": [(NAN, NAN, NAN), (0, DIAGONAL, 0), (0, DIAGONAL, 0), (0.5, 3, 0.5)],
    "nnformer": [(1, 0, NAN), (0, 0, NAN), (0, 0, NAN), (0.5, 1, 0.5)],
    "transunet": [(0, 0, NAN), (0, 0, NAN), (1, 0, NAN), (0.5, 1, 0.5)],
}


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_each_convention_in_each_state(convention):
    """In both: two rods of two voxels, one voxel apart along W; their distances are 0 0 3 3 mm."""
    prediction, truth = np.zeros((8, 10, 12), np.uint8), np.zeros((8, 10, 12), np.uint8)
    truth[0, 0, 0], prediction[7, 9, 11] = 2, 3
    truth[3, 3, 3:5], prediction[3, 3, 4:6] = 4, 4
    scores = metrics.score_maps(prediction, truth, (1, 4, 3), 5, tolerance=2, convention=convention)
    found = np.stack([scores[metric] for metric in metrics.METRICS], axis=1)
    assert np.allclose(found, np.array(STATES[convention], float), equal_nan=True)
    assert scores["presence"].tolist() == [0, 1, 2, 3]


def test_wrong_maps_and_conventions_are_named():
    maps = np.zeros((2, 2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\).*\(2, 3, 3\)"):
        metrics.score_maps(maps[0], maps[1, ..., :3], (1, 1, 1), 4)
    for index, name in enumerate(("prediction", "truth")):
        wrong = maps.copy()
        wrong[index, 1, 1, 1] = 4
        with pytest.raises(ValueError, match=f"{name}: found labels 0 to 4, expected 0 to 3"):
            metrics.dice_per_class(*wrong, 4)
    with pytest.raises(ValueError, match="labels -1 to 0"):
        metrics.dice_per_class(maps[0], maps[1].astype(int) - 1, 4)
    with pytest.raises(ValueError, match="'mine'.*masksam, nnformer, transunet"):
        metrics.score_maps(*maps, (1, 1, 1), 2, convention="mine")


# -------------------------------------------------------------------------------------------------- all cases


def random_scores(seed, num_cases, num_classes=4, missing=0.2):
    rng = np.random.default_rng(seed)
    table = rng.random((num_cases, len(metrics.METRICS), num_classes - 1))
    table[rng.random((num_cases, 1, num_classes - 1)).repeat(3, 1) < missing] = NAN
    return {f"case{i:02d}": dict(zip(metrics.METRICS, row)) for i, row in enumerate(table)}


def test_means_are_over_cases_first_and_then_over_the_scored_classes():
    rows = [
        ([1.0, 0.5, NAN], [2.0, 4.0, NAN]),
        ([0.0, NAN, NAN], [4.0, NAN, NAN]),
        ([0.2, NAN, NAN], [3.0, NAN, NAN]),
    ]
    presence = np.array([[3, 3, 0], [1, 0, 0], [2, 0, 0]], np.uint8)
    scores = {
        c: {"dice": np.array(d), "hd95": np.array(h), "presence": p}
        for c, (d, h), p in zip("abc", rows, presence)
    }
    results = metrics.summarize(scores, NAMES)
    assert results["mean"] == {"dice": pytest.approx((0.4 + 0.5) / 2), "hd95": 3.5}  # not 1.7 / 4
    assert results["scored"] == ["RV", "Myo", "LV"]
    one, none = {"neither": 0, "only_truth": 1, "only_prediction": 1}, {"only_truth": 0, "only_prediction": 0}
    assert results["per_class"] == {
        "RV": {"dice": pytest.approx(0.4), "hd95": 3.0, "cases": 3} | one,
        "Myo": {"dice": 0.5, "hd95": 4.0, "cases": 1, "neither": 2} | none,
        "LV": {"dice": None, "hd95": None, "cases": 0, "neither": 3} | none,
    }
    assert results["per_case"]["a"]["Myo"] == {"dice": 0.5, "hd95": 4.0}
    results = metrics.summarize(scores, NAMES, scored=(2,))
    assert results["mean"] == {"dice": 0.5, "hd95": 4.0} and results["scored"] == ["Myo"]
    assert results["interval"] == {"dice": None, "hd95": None}  # only one case has the scored class
    assert metrics.summarize(scores, NAMES, scored=(3,))["mean"] == {"dice": None, "hd95": None}
    undefined = {"a": {"dice": np.ones(1), "nsd": np.array([NAN])}}
    assert metrics.summarize(undefined, NAMES[:2])["per_class"]["RV"] == {"dice": 1, "nsd": None, "cases": 1}


def test_the_interval_is_the_bootstrap_over_cases():
    scores = random_scores(0, 12)
    results = metrics.summarize(scores, NAMES, scored=(3, 1))
    table = np.array([scores[case]["hd95"][[2, 0]] for case in scores])
    table = table[[not np.isnan(row).all() for row in table]]
    means = []
    for draw in np.random.default_rng(0).integers(len(table), size=(1000, len(table))):
        columns = [[value for value in column if not np.isnan(value)] for column in table[draw].T]
        means.append(np.mean([np.mean(column) for column in columns if column]))
    assert results["interval"]["hd95"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())
    assert all(low < results["mean"][m] < high for m, (low, high) in results["interval"].items())
    few = random_scores(1, 9, missing=0.0)
    many = {f"{case}-{i}": values for case, values in few.items() for i in range(16)}
    few, many = (np.ptp(metrics.summarize(each, NAMES)["interval"]["dice"]) for each in (few, many))
    assert many == pytest.approx(few / 4, rel=0.2)  # Percentiles of 1000 draws are known to some 5 %.
    case, empty = {"dice": np.array([0.5, 0.7, NAN])}, {"dice": np.full(3, NAN)}
    for pair, interval in (({"a": case}, None), ({"a": case, "b": case}, [pytest.approx(0.6)] * 2),
                           ({"a": case, "b": empty}, None)):  # fmt: skip
        assert metrics.summarize(pair, NAMES)["interval"] == {"dice": interval}


def test_scores_that_cannot_be_summarized_are_named():
    with pytest.raises(ValueError, match="scores: found none"):
        metrics.summarize({}, NAMES)
    for scored in ((0,), (1, 4)):
        with pytest.raises(ValueError, match=re.escape(f"{scored}, expected ids from 1 to 3")):
            metrics.summarize({"a": {"dice": np.ones(3)}}, NAMES, scored)
    with pytest.raises(ValueError, match="found 2 classes, expected 3: RV, Myo, LV"):
        metrics.summarize({"a": {"dice": np.ones(2)}}, NAMES)


# ------------------------------------------------------------------------------------------- tables and files


def test_the_table_shows_the_scored_classes_in_their_order_and_the_others_below(capsys):
    scores = random_scores(0, 6, 5, missing=0.0)
    for case in scores.values():
        case["presence"] = np.array([3, 1, 2, 3], np.uint8)
    results = metrics.summarize(scores, (*NAMES, "aorta"), scored=(4, 1)) | {"tolerance_mm": 2.0}
    metrics.print_table(results)
    lines = capsys.readouterr().out.splitlines()
    titles = ["class", "Dice", "worst", "best", "HD95 mm", "NSD 2 mm", "cases", "missed", "false"]
    assert re.split(r"  +", lines[0]) == titles
    order = ["aorta", "RV", "", "Myo", "LV", "", "mean", "95", "to"]
    assert [line.split()[0].strip("-") for line in lines[1:]] == order
    dice = [case["dice"][3] for case in scores.values()]
    expected = [f"{x:.4f}" for x in (np.mean(dice), min(dice), max(dice))]
    means = results["per_class"]["aorta"]
    assert lines[1].split()[1:] == [*expected, f"{means['hd95']:.2f}", f"{means['nsd']:.4f}", "6", "0", "0"]
    assert lines[4].split()[-3:] == ["6", "6", "0"] and lines[5].split()[-3:] == ["6", "0", "6"]
    ends = results["interval"]
    for line, values in zip(lines[-3:], (results["mean"], *({m: ends[m][i] for m in ends} for i in (0, 1)))):
        assert line.split()[-3:] == [f"{values[m]:.{d}f}" for m, d in zip(metrics.METRICS, (4, 2, 4))]


def test_the_table_leaves_out_unscored_columns_and_warns_of_conventions_and_given_boxes(capsys):
    results = metrics.summarize({"a": {"dice": np.array([0.5, NAN, 1])}}, NAMES)
    metrics.print_table(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "Dice", "worst", "best", "cases"]
    assert lines[2].split() == ["Myo", "-", "-", "-", "0"] and lines[-1].split() == ["mean", "0.7500"]
    metrics.print_table(results | {"convention": "nnformer", "prompts": "gt", "baseline": "sam"})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "Not automatic: sam was given the boxes of the truth."
    assert "nnformer" in lines[-1] and "never compare" in lines[-1]
    for convention, title in (("masksam", "HD95 mm"), ("transunet", "HD95 voxels")):
        metrics.print_table(metrics.summarize(random_scores(0, 3), NAMES) | {"convention": convention})
        assert title in capsys.readouterr().out


def test_files_say_what_the_results_say(tmp_path):
    """NaN is no number of JSON: it becomes null, and an empty cell."""
    scores = {case: metrics.score_maps(*blobs(i), (5, 1, 1), 5) for i, case in enumerate(("case, one", "b"))}
    results = metrics.summarize(scores, (*NAMES, "aorta"), (2, 1)) | {"tolerance_mm": 1.0}
    metrics.write_metrics(tmp_path, results, "-boxes-gt")

    def refuse(constant):
        raise AssertionError(f"{constant} in metrics.json")

    assert json.loads((tmp_path / "metrics-boxes-gt.json").read_text(), parse_constant=refuse) == results
    with open(tmp_path / "metrics-boxes-gt.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["case", "class", *metrics.METRICS]
    expected_rows = [[case, name] for case in (*scores, "mean") for name in (*NAMES[1:], "aorta")]
    assert [row[:2] for row in rows] == expected_rows
    for case, name, *cells in rows:
        expected = results["per_class"][name] if case == "mean" else results["per_case"][case][name]
        assert [float(cell) if cell else None for cell in cells] == [expected[m] for m in metrics.METRICS]
    assert rows[3][2:] == ["", "", ""]
    with pytest.raises(ValueError, match="JSON"):
        metrics.write_metrics(tmp_path, results | {"loss": NAN, "convention": "nnformer"})
    assert len(list(tmp_path.iterdir())) == 2
    metrics.write_metrics(tmp_path, results | {"convention": "nnformer"})
    assert (tmp_path / "metrics-nnformer.json").is_file() and not (tmp_path / "metrics.json").exists()
