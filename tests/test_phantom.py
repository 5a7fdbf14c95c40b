"""The phantom: seeded, readable as ACDC, a heart in its anatomy, and no task for a threshold."""

import os
import shutil

import numpy as np
import pytest
from scipy import ndimage

import data
from support import layouts, nifti, phantom


def best_interval_dice(image: np.ndarray, truth: np.ndarray) -> float:
    """Dice of the best `low <= intensity < high`, whose ends are chosen among 65 with the truth at hand."""
    edges = np.linspace(image.min(), image.max() + 1, 65)
    hits, taken = (np.append(0, np.histogram(values, edges)[0].cumsum()) for values in (image[truth], image))
    low, high = np.triu_indices(65, 1)
    return float((2 * (hits[high] - hits[low]) / (truth.sum() + taken[high] - taken[low])).max())


def test_a_contracting_heart_in_its_anatomy_that_thresholds_fitted_on_the_truth_do_not_find(tmp_path):
    phantom.write_phantom(tmp_path / "set", 5)
    source = layouts.find_data("phantom", str(tmp_path / "set"))
    data.survey(sum(source.splits.values(), ()), source.task)
    cases = sorted(sum(source.splits.values(), ()), key=lambda case: case.name)  # ED, ES of each patient
    frames = [(nifti.read_image(case.images[0])[0][0], nifti.read_label(case.label, 4)[0]) for case in cases]
    assert best_interval_dice(np.arange(9.0), np.arange(9) > 4) == 1.0  # the search itself works
    dice = [[best_interval_dice(image, label == k) for k in (1, 2, 3)] for image, label in frames]
    assert np.mean(dice, axis=0).max() < 0.5  # the header of phantom.py says 0.30
    in_plane = ndimage.generate_binary_structure(2, 1)[None]
    for _, label in frames:  # the muscle lies around the pool
        assert set(np.unique(label)) == {0, 1, 2, 3}
        assert set(np.unique(label[ndimage.binary_dilation(label == 3, in_plane)])) == {2, 3}
    pools = [(label == 3).sum() for _, label in frames]
    assert all(systole < 0.75 * diastole for diastole, systole in zip(pools[::2], pools[1::2]))
    for seed in (0, 1):
        phantom.write_phantom(tmp_path / str(seed), 1, seed)
        again = f"{tmp_path / str(seed)}/training/patient001/patient001_frame01.nii.gz"
        assert np.array_equal(nifti.read_volume(again)[0], frames[0][0]) == (seed == 0)


def test_the_folder_is_whole_or_not_there_and_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        phantom.write_phantom(tmp_path / "mine")
    with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):
        context.setattr(phantom.np, "diag", lambda _: 1 / 0)  # fails within the first patient
        phantom.write_phantom(tmp_path / "set", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    replace = os.replace  # a second process keeps the set that the first has written
    monkeypatch.setattr(os, "replace", lambda new, old: shutil.copytree(new, old) and replace(new, old))
    phantom.write_phantom(tmp_path / "set", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "set"]
