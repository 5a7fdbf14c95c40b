"""Scores against sets of voxels, all pairs of surface voxels, medpy's rule and MONAI; means, intervals, tables."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from scipy import ndimage

from data import write_whole
from support import metrics

SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.7, 1.3)]
NAMES = ("background", "RV", "Myo", "LV")


def blobs(seed, shape=(7, 14, 12), num_classes=4):
    """Two label maps of smooth random regions that reach the image's edges; the second is a disturbed first."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=shape), 1.5) for _ in range(num_classes)]
    noise = [ndimage.gaussian_filter(rng.normal(size=shape), 1.0) for _ in range(num_classes)]
    truth = np.argmax(fields, 0)
    prediction = np.argmax([a + 0.3 * b for a, b in zip(fields, noise)], 0)
    return prediction.astype(np.uint8), truth.astype(np.uint8)


def boxes_of(*corners, shape=(8, 10, 12)):
    """A map with class 1 in the box from `low` to before `high`, for each of the pairs (low, high)."""
    mask = np.zeros(shape, np.uint8)
    for low, high in corners:
        mask[tuple(map(slice, low, high))] = 1
    return mask


PAIRS = {
    "touching all edges": (np.ones((8, 10, 12), np.uint8), boxes_of(((1, 1, 1), (7, 9, 11)))),
    "in a corner": (boxes_of(((0, 0, 0), (3, 3, 3))), boxes_of(((0, 0, 0), (4, 3, 5)))),
    "one voxel each": (boxes_of(((2, 3, 4), (3, 4, 5))), boxes_of(((4, 7, 4), (5, 8, 5)))),
    "one voxel in a box": (boxes_of(((4, 5, 6), (5, 6, 7))), boxes_of(((2, 2, 2), (7, 9, 11)))),
    "identical": (boxes_of(((1, 2, 3), (6, 7, 8))), boxes_of(((1, 2, 3), (6, 7, 8)))),
    "far apart": (boxes_of(((0, 0, 0), (2, 2, 2))), boxes_of(((6, 8, 9), (8, 10, 12)))),
    "a stray voxel": (boxes_of(((1, 1, 1), (4, 6, 6)), ((7, 9, 11), (8, 10, 12))), boxes_of(((1, 1, 1), (4, 6, 6)))),
    "a single slice": (boxes_of(((3, 1, 1), (4, 8, 9))), boxes_of(((3, 2, 2), (4, 9, 9)))),
}


def edge_voxels(mask):
    """Voxels of a mask of which one of the six neighbours is outside it or outside the image, one at a time."""
    members = {tuple(voxel) for voxel in np.argwhere(mask).tolist()}
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    return [v for v in sorted(members) if any(tuple(np.add(v, step)) not in members for step in steps)]


def all_pairs(first, second, spacing):
    """Directed distances between all edge voxels of two masks: (first to second, second to first)."""
    a, b = (np.array(edge_voxels(mask)) * spacing for mask in (first, second))
    table = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return table.min(1), table.min(0)


def check_against_all_pairs(prediction, truth, spacing, num_classes):
    scores = metrics.score_maps(prediction, truth, spacing, num_classes, tolerance=1.4)
    for k in range(1, num_classes):
        pooled = np.concatenate(all_pairs(prediction == k, truth == k, spacing))
        assert scores["hd95"][k - 1] == pytest.approx(np.percentile(pooled, 95), abs=1e-9)
        # Distances of grids tie with the tolerance: the same slack as for a rounded spacing
        assert scores["nsd"][k - 1] == pytest.approx((pooled <= 1.4 + 1e-6).mean(), abs=1e-12)
        assert scores["presence"][k - 1] == 3


# ----------------------------------------------------------------------------------------------------- one pair of maps


@pytest.mark.parametrize("seed", range(3))
def test_dice_equals_sets_of_voxels(seed):
    prediction, truth = blobs(seed)
    dice = metrics.dice_per_class(prediction, truth, 4)
    for k in range(1, 4):
        a, b = set(np.flatnonzero(truth == k)), set(np.flatnonzero(prediction == k))
        assert dice[k - 1] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
    assert np.array_equal(dice, metrics.score_maps(prediction, truth, (1, 1, 1), 4)["dice"])


def test_dice_of_a_class_in_neither_map_is_undefined_and_in_one_only_nothing():
    truth, prediction = np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 4), np.uint8)
    truth[0, 0, 0], prediction[1, 1, 1] = 1, 2
    assert np.array_equal(metrics.dice_per_class(prediction, truth, 4), [0, 0, np.nan], equal_nan=True)


def test_ids_up_to_255_do_not_wrap():
    truth = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    assert (metrics.dice_per_class(truth, truth, 256) == 1).all()


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_blobs_equal_all_pairs_of_edge_voxels(seed, spacing):
    check_against_all_pairs(*blobs(seed), spacing, 4)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_special_shapes_equal_all_pairs_of_edge_voxels(name, spacing):
    check_against_all_pairs(*PAIRS[name], spacing, 2)


def test_identical_maps_are_perfect():
    scores = metrics.score_maps(*PAIRS["identical"], (5, 1, 1), 2, tolerance=0)
    assert (scores["dice"], scores["hd95"], scores["nsd"]) == (1, 0, 1)


def medpy_hd95(result, reference, spacing):
    """`medpy.metric.binary.hd95` written out: its package builds from source, which a test should not need."""

    def distances(mask, other):
        edges = [m ^ ndimage.binary_erosion(m, ndimage.generate_binary_structure(3, 1)) for m in (mask, other)]
        return ndimage.distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]

    return np.percentile(np.hstack([distances(result, reference), distances(reference, result)]), 95)


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_hd95_equals_medpy(seed, spacing):
    prediction, truth = blobs(seed, (12, 30, 28))
    scores = metrics.score_maps(prediction, truth, spacing, 4)
    expected = [medpy_hd95(prediction == k, truth == k, spacing) for k in range(1, 4)]
    assert scores["hd95"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_surface_is_the_mask_minus_its_erosion(seed):
    mask = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(9, 12, 10)), 1) > -0.1
    assert np.array_equal(metrics.surface(mask), mask & ~ndimage.binary_erosion(mask))


def one_hot(labels, num_classes):
    return torch.nn.functional.one_hot(torch.from_numpy(labels).long(), num_classes).movedim(-1, 0)[None]


@pytest.mark.parametrize("spacing", SPACINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_distances_and_nsd_equal_monai(seed, spacing):
    """MONAI's percentile is another: the larger of the two directed 95th percentiles, where medpy and the papers take
    one percentile of both directions together. So our directed distances are compared, for the 95th percentile and the
    maximum; NSD has one definition.
    """
    peer = pytest.importorskip("monai.metrics")
    maps = blobs(seed, (12, 30, 28))
    hot = [one_hot(labels, 4) for labels in maps]
    scores = metrics.score_maps(*maps, spacing, 4, tolerance=1.4)
    nsd = peer.compute_surface_dice(*hot, class_thresholds=[1.4] * 3, spacing=spacing)[0]
    assert scores["nsd"] == pytest.approx(nsd.numpy(), rel=1e-6)
    # float32 distances; torch.quantile also rounds the place between two of them, some 1e-5 of the step.
    for percentile, rounding in ((95, 1e-4), (100, 1e-6)):
        theirs = peer.compute_hausdorff_distance(*hot, percentile=percentile, spacing=spacing)[0]
        for k in range(1, 4):
            surfaces = [metrics.surface(labels == k) for labels in maps]
            directed = [metrics.nearest_distances(*pair, spacing) for pair in (surfaces, surfaces[::-1])]
            ours = max(np.percentile(distances, percentile) for distances in directed)
            assert ours == pytest.approx(theirs[k - 1].item(), rel=rounding)


def test_nsd_counts_a_distance_of_exactly_the_tolerance():
    """Also where a file's float32 spacing makes ten voxels of 0.1 mm a hair longer than 1 mm."""
    maps = boxes_of(((0, 0, 0), (1, 1, 1)), shape=(1, 1, 12)), boxes_of(((0, 0, 10), (1, 1, 11)), shape=(1, 1, 12))
    spacing = (1, 1, float(np.float32(0.1)))
    assert 10 * spacing[2] > 1
    assert metrics.score_maps(*maps, spacing, 2, tolerance=1.0)["nsd"] == 1
    assert metrics.score_maps(*maps, spacing, 2, tolerance=0.9999)["nsd"] == 0


def test_background_around_a_volume_changes_nothing_but_the_diagonal():
    """The class reaches the image's edges, which are surface as if there were background behind them."""
    maps = [np.minimum(labels, 2) for labels in blobs(0)]
    for labels, missing in zip(maps, (1, 9)):
        labels[labels == missing] = 0  # class 1 in the truth alone
    padded = [np.pad(labels, ((2, 3), (1, 4), (5, 2))) for labels in maps]
    small, large = (metrics.score_maps(*pair, (5.0, 0.7, 1.3), 3) for pair in (maps, padded))
    assert small["presence"].tolist() == [metrics.IN_TRUTH, metrics.IN_BOTH]
    for metric in metrics.METRICS:
        assert small[metric][1] == pytest.approx(large[metric][1], abs=1e-9)
    for scores, labels in ((small, maps[0]), (large, padded[0])):
        sides = [n * s for n, s in zip(labels.shape, (5.0, 0.7, 1.3))]
        assert scores["hd95"][0] == pytest.approx(np.sqrt(sum(side**2 for side in sides)))


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0)])
def test_spacing_goes_with_its_axis(axes):
    prediction, truth = blobs(1)
    spacing = np.array([5.0, 0.7, 1.3])
    scores = metrics.score_maps(prediction, truth, spacing, 4)
    turned = metrics.score_maps(prediction.transpose(axes), truth.transpose(axes), spacing[list(axes)], 4)
    for metric in metrics.METRICS:
        assert scores[metric] == pytest.approx(turned[metric], abs=1e-9)


NAN, DIAGONAL = np.nan, np.sqrt(8**2 + 40**2 + 36**2)  # of 8 x 10 x 12 voxels of 1 x 4 x 3 mm
STATES = {  # (dice, hd95, nsd) of a class in neither map, in the truth alone, in the prediction alone, in both
    "masksam": [(NAN, NAN, NAN), (0, DIAGONAL, 0), (0, DIAGONAL, 0), (0.5, 3, 0)],
    "nnformer": [(1, 0, NAN), (0, 0, NAN), (0, 0, NAN), (0.5, 1, 0)],
    "transunet": [(0, 0, NAN), (0, 0, NAN), (1, 0, NAN), (0.5, 1, 0)],
}


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_each_convention_in_each_state(convention):
    """In both: two rods of two voxels, one voxel apart along W. At the percentile 95 the distances 0 0 3 3 mm are 3."""
    prediction, truth = np.zeros((8, 10, 12), np.uint8), np.zeros((8, 10, 12), np.uint8)
    truth[0, 0, 0], prediction[7, 9, 11] = 2, 3
    truth[3, 3, 3:5], prediction[3, 3, 4:6] = 4, 4
    scores = metrics.score_maps(prediction, truth, (1, 4, 3), 5, tolerance=2, convention=convention)
    found = np.stack([scores[metric] for metric in metrics.METRICS], axis=1)
    expected = np.array(STATES[convention], float)
    expected[3, 2] = 0.5  # of the four voxels, two lie on the other rod
    assert np.allclose(found, expected, equal_nan=True)
    assert scores["presence"].tolist() == [0, 1, 2, 3]


def test_the_defaults_are_our_convention_and_one_millimetre():
    assert np.isnan(metrics.score_maps(*np.zeros((2, 3, 3, 3), np.uint8), (1, 1, 1), 2)["dice"]).all()
    maps = PAIRS["one voxel each"]  # 2 x 4 voxels apart
    for size, nsd in ((0.99, 1), (1.01, 0)):
        assert metrics.score_maps(*maps, np.full(3, size / 20**0.5), 2)["nsd"] == nsd


@pytest.mark.parametrize("function", [metrics.dice_per_class, lambda p, t, k: metrics.score_maps(p, t, (1, 1, 1), k)])
def test_wrong_maps_are_named(function):
    maps = np.zeros((2, 2, 3, 4), np.uint8)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3, 3\)"):
        function(maps[0], maps[1, ..., :3], 4)
    for index, name in enumerate(("prediction", "truth")):
        wrong = maps.copy()
        wrong[index, 1, 1, 1] = 4
        with pytest.raises(ValueError, match=f"the {name} has labels 0 to 4, expected 0 to 3"):
            function(*wrong, 4)
    with pytest.raises(ValueError, match="labels -1 to 0"):
        function(maps[0], maps[1].astype(int) - 1, 4)


def test_an_unknown_convention_is_named():
    with pytest.raises(ValueError, match="'mine'.*masksam, nnformer, transunet"):
        metrics.score_maps(*np.zeros((2, 2, 2, 2), np.uint8), (1, 1, 1), 2, convention="mine")


def test_workers_change_nothing():
    maps = blobs(0, (12, 30, 28), num_classes=9)
    one, two = (metrics.score_maps(*maps, (5, 1, 1), 10, workers=workers) for workers in (1, 2))
    assert one.keys() == two.keys() == {*metrics.METRICS, "presence"}
    assert all(np.array_equal(one[key], two[key], equal_nan=True) and one[key].shape == (9,) for key in one)


# ------------------------------------------------------------------------------------------------------------ all cases


def random_scores(seed, num_cases, num_classes=4, missing=0.2):
    rng = np.random.default_rng(seed)
    table = rng.random((num_cases, len(metrics.METRICS), num_classes - 1))
    table[rng.random((num_cases, 1, num_classes - 1)).repeat(3, 1) < missing] = np.nan
    return {f"case{i:02d}": dict(zip(metrics.METRICS, row)) for i, row in enumerate(table)}


def test_means_are_over_cases_first_and_then_over_the_scored_classes():
    nan = np.nan
    rows = [([1.0, 0.5, nan], [2.0, 4.0, nan]), ([0.0, nan, nan], [4.0, nan, nan]), ([0.5, nan, nan], [3.0, nan, nan])]
    scores = {case: {"dice": np.array(d), "hd95": np.array(h)} for case, (d, h) in zip("abc", rows)}
    results = metrics.summarize(scores, NAMES)
    assert results["mean"] == {"dice": 0.5, "hd95": 3.5} and results["scored"] == ["RV", "Myo", "LV"]
    assert results["per_class"]["RV"] == {"dice": 0.5, "hd95": 3.0, "cases": 3}
    assert results["per_class"]["Myo"] == {"dice": 0.5, "hd95": 4.0, "cases": 1}
    assert results["per_class"]["LV"] == {"dice": None, "hd95": None, "cases": 0}
    assert results["per_case"]["a"] == {
        "RV": {"dice": 1.0, "hd95": 2.0}, "Myo": {"dice": 0.5, "hd95": 4.0}, "LV": {"dice": None, "hd95": None},
    }  # fmt: skip
    scores["a"]["dice"][0] = 0.1  # a mean over all values at once would be 0.275
    assert metrics.summarize(scores, NAMES)["mean"]["dice"] == pytest.approx((0.2 + 0.5) / 2)
    results = metrics.summarize(scores, NAMES, scored=(2,))
    assert results["mean"] == {"dice": 0.5, "hd95": 4.0} and results["scored"] == ["Myo"]
    assert results["interval"] == {"dice": None, "hd95": None}  # one case alone has the scored class
    assert metrics.summarize(scores, NAMES, scored=(3,))["mean"] == {"dice": None, "hd95": None}


def test_classes_in_one_map_only_are_counted_by_side():
    presence = np.array([[0, 1, 3], [2, 1, 3], [0, 2, 3]], np.uint8)
    dice = np.where(presence == 0, np.nan, presence == 3)
    scores = {case: {"dice": d, "presence": p} for case, d, p in zip("abc", dice, presence)}
    results = metrics.summarize(scores, NAMES)["per_class"]
    counts = ("cases", "neither", "only_truth", "only_prediction")
    assert [[results[name][key] for key in counts] for name in NAMES[1:]] == [[1, 2, 0, 1], [3, 0, 2, 1], [3, 0, 0, 0]]


def test_an_undefined_nsd_does_not_hide_that_a_case_has_a_dice():
    scores = {"a": {"dice": np.ones(1), "nsd": np.array([np.nan])}}
    results = metrics.summarize(scores, ("background", "organ"))
    assert results["per_class"]["organ"] == {"dice": 1, "nsd": None, "cases": 1}


def test_the_interval_equals_a_plain_loop():
    scores = random_scores(0, 12)
    results = metrics.summarize(scores, NAMES, scored=(3, 1), seed=5)
    table = np.array([scores[case]["hd95"][[2, 0]] for case in scores])
    table = table[[not np.isnan(row).all() for row in table]]
    means = []
    for draw in np.random.default_rng(5).integers(len(table), size=(1000, len(table))):
        columns = [[value for value in column if not np.isnan(value)] for column in table[draw].T]
        means.append(np.mean([np.mean(column) for column in columns if column]))
    assert results["interval"]["hd95"] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_the_mean_and_is_repeatable(seed):
    results = metrics.summarize(random_scores(seed, 9), NAMES)
    assert results == metrics.summarize(random_scores(seed, 9), NAMES)
    assert results["interval"] != metrics.summarize(random_scores(seed, 9), NAMES, seed=1)["interval"]
    for metric, (low, high) in results["interval"].items():
        assert low < results["mean"][metric] < high


@pytest.mark.parametrize("seed", range(5))
def test_sixteen_times_the_cases_give_a_quarter_of_the_interval(seed):
    few = random_scores(seed, 9, missing=0.0)
    many = {f"{case}-{i}": values for case, values in few.items() for i in range(16)}
    few, many = (np.ptp(metrics.summarize(scores, NAMES)["interval"]["dice"]) for scores in (few, many))
    assert many == pytest.approx(few / 4, rel=0.2)  # percentiles of 1000 draws are known to some 5 % each


def test_one_case_or_identical_cases_have_no_spread():
    case = {"dice": np.array([0.5, 0.7, np.nan])}
    assert metrics.summarize({"a": case}, NAMES)["interval"] == {"dice": None}
    assert metrics.summarize({"a": case, "b": case}, NAMES)["interval"] == {"dice": [pytest.approx(0.6)] * 2}
    empty = {"dice": np.full(3, np.nan)}
    assert metrics.summarize({"a": case, "b": empty}, NAMES)["interval"] == {"dice": None}


def test_what_cannot_be_summarized_is_named():
    with pytest.raises(ValueError, match="found no scores of any case"):
        metrics.summarize({}, NAMES)
    for scored in ((0,), (1, 4)):
        with pytest.raises(ValueError, match=re.escape(f"{scored}, expected ids from 1 to 3")):
            metrics.summarize({"a": {"dice": np.ones(3)}}, NAMES, scored)
    with pytest.raises(ValueError, match="zip"):
        metrics.summarize({"a": {"dice": np.ones(2)}}, NAMES)


def test_the_table_shows_the_scored_classes_in_their_order_and_the_others_below(capsys):
    scores = random_scores(0, 6, 5, missing=0.0)
    for case in scores.values():
        case["presence"] = np.array([3, 1, 2, 3], np.uint8)
    results = metrics.summarize(scores, (*NAMES, "aorta"), scored=(4, 1)) | {"tolerance_mm": 2.0}
    metrics.print_table(results)
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", lines[0]) == [
        "class", "Dice", "worst", "best", "HD95 mm", "NSD 2 mm", "cases", "missed", "false",
    ]  # fmt: skip
    order = ["aorta", "RV", "", "Myo", "LV", "", "mean", "95", "to"]
    assert [line.split()[0].strip("-") for line in lines[1:]] == order
    dice = [case["dice"][3] for case in scores.values()]
    expected = [f"{x:.4f}" for x in (np.mean(dice), min(dice), max(dice))]
    means = results["per_class"]["aorta"]
    assert lines[1].split()[1:] == [*expected, f"{means['hd95']:.2f}", f"{means['nsd']:.4f}", "6", "0", "0"]
    assert lines[4].split()[-3:] == ["6", "6", "0"] and lines[5].split()[-3:] == ["6", "0", "6"]
    mean, low, high = (line.split()[-3:] for line in lines[-3:])
    assert mean == [f"{results['mean'][m]:.{d}f}" for m, d in zip(metrics.METRICS, (4, 2, 4))]
    ends = results["interval"]
    assert [low, high] == [[f"{ends[m][i]:.{d}f}" for m, d in zip(metrics.METRICS, (4, 2, 4))] for i in (0, 1)]


def test_the_table_has_only_the_columns_that_were_scored(capsys):
    metrics.print_table(metrics.summarize({"a": {"dice": np.array([0.5, np.nan, 1])}}, NAMES))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["class", "Dice", "worst", "best", "cases"]
    assert lines[2].split() == ["Myo", "-", "-", "-", "0"] and lines[-1].split() == ["mean", "0.7500"]


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_the_table_warns_of_other_conventions(convention, capsys):
    results = metrics.summarize(random_scores(0, 3), NAMES) | {"convention": convention}
    metrics.print_table(results)
    out = capsys.readouterr().out
    ours = convention == "masksam"
    assert ("HD95 mm" in out, "never compare" in out, f"as {convention} does" in out) == (ours, not ours, not ours)
    assert ("HD95 voxels" in out) != ours


def test_files_say_what_the_results_say(tmp_path):
    """NaN is none of JSON's numbers: it becomes null, and an empty cell."""
    scores = {case: metrics.score_maps(*blobs(i), (5, 1, 1), 5) for i, case in enumerate(("case, one", "b"))}
    results = metrics.summarize(scores, (*NAMES, "aorta"), (2, 1)) | {"tolerance_mm": 1.0}
    metrics.write_metrics(tmp_path, results, write_whole)

    def refuse(constant):
        raise AssertionError(f"{constant} in metrics.json")

    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse) == results
    with open(tmp_path / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["case", "class", *metrics.METRICS]
    assert [row[:2] for row in rows] == [[case, name] for case in (*scores, "mean") for name in (*NAMES[1:], "aorta")]
    for case, name, *cells in rows:
        expected = results["per_class"][name] if case == "mean" else results["per_case"][case][name]
        assert [float(cell) if cell else None for cell in cells] == [expected[metric] for metric in metrics.METRICS]
    assert rows[3][2:] == ["", "", ""]
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.csv", "metrics.json"}


def test_the_csv_has_only_the_metrics_that_were_scored(tmp_path):
    metrics.write_metrics(tmp_path, metrics.summarize({"a": {"dice": np.ones(3)}}, NAMES), write_whole)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[:2] == ["case,class,dice", "a,RV,1.0"]


def test_a_nan_among_the_results_is_an_error_and_no_file(tmp_path):
    results = metrics.summarize({"a": {"dice": np.ones(3)}}, NAMES) | {"loss": np.nan}
    with pytest.raises(ValueError, match="JSON"):
        metrics.write_metrics(tmp_path, results, write_whole)
    assert not list(tmp_path.iterdir())
