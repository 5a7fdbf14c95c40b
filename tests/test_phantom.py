"""The phantom: seeded, readable as ACDC, a heart in its anatomy, and no task for a threshold."""

import os
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import data
from support import layouts, nifti, phantom

PATIENTS = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> layouts.DataSource:
    root = tmp_path_factory.mktemp("parent") / "phantom"
    phantom.write_phantom(root, PATIENTS, seed=0)
    return layouts.find_data("phantom", str(root))


@pytest.fixture(scope="module")
def frames(source) -> list[tuple[np.ndarray, np.ndarray]]:
    """Image and class ids of every frame, ED and ES of a patient next to each other."""
    cases = sorted((case for split in source.splits.values() for case in split), key=lambda case: case.name)
    assert len(cases) == 2 * PATIENTS
    return [(nifti.read_image(case.images[0])[0], nifti.read_label(case.label, 4)[0]) for case in cases]


def best_interval_dice(image: np.ndarray, truth: np.ndarray) -> float:
    """Dice of the best `low <= intensity < high`, whose ends are chosen among 65 with the truth at hand."""
    edges = np.linspace(image.min(), image.max() + 1, 65)
    hits, taken = (np.append(0, np.histogram(values, edges)[0].cumsum()) for values in (image[truth], image))
    low, high = np.triu_indices(65, 1)
    return float((2 * (hits[high] - hits[low]) / (truth.sum() + taken[high] - taken[low])).max())


def test_thresholds_fitted_on_the_truth_of_each_volume_fail(frames):
    truth = np.zeros((2, 8, 8), bool)
    truth[:, 2:5, 2:5] = True
    assert best_interval_dice(np.where(truth, 900.0, 100.0), truth) == 1.0  # the search itself works
    dice = [[best_interval_dice(image, label == k) for k in (1, 2, 3)] for image, label in frames]
    assert np.mean(dice, axis=0).max() < 0.5  # the header of phantom.py says 0.30


def test_the_muscle_lies_around_the_pool_and_the_ventricle_contracts(source, frames):
    data.check_source(source)
    assert any(not label[d].any() for _, label in frames for d in (0, -1))  # slices beyond base and apex
    in_plane = ndimage.generate_binary_structure(2, 1)[None]
    for (_, diastole), (_, systole) in zip(frames[::2], frames[1::2]):
        assert (systole == 3).sum() < 0.75 * (diastole == 3).sum()
        for label in (diastole, systole):
            assert set(np.unique(label)) == {0, 1, 2, 3}
            assert set(np.unique(label[ndimage.binary_dilation(label == 3, in_plane)])) == {2, 3}


def test_a_patient_is_a_function_of_seed_and_number(source, tmp_path):
    phantom.write_phantom(tmp_path / "same", 1, seed=0)
    phantom.write_phantom(tmp_path / "other", 1, seed=1)
    name = "training/patient001/patient001_frame01.nii.gz"
    roots = (source.root, tmp_path / "same", tmp_path / "other")
    first, same, other = (nib.load(f"{root}/{name}") for root in roots)
    assert np.array_equal(first.dataobj, same.dataobj)
    assert first.shape != other.shape or not np.array_equal(first.dataobj, other.dataobj)


def test_the_folder_is_whole_or_not_there_and_is_not_overwritten(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    with pytest.raises(SystemExit, match="expected a new or an empty folder"):
        phantom.main([str(tmp_path / "mine")])
    monkeypatch.setattr(phantom.np, "diag", lambda _: 1 / 0)  # fails within the first patient
    with pytest.raises(ZeroDivisionError):
        phantom.write_phantom(tmp_path / "set", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_second_process_keeps_the_set_that_the_first_has_written(tmp_path, monkeypatch):
    replace = os.replace

    def first_was_faster(partial, target):
        shutil.copytree(partial, target)
        replace(partial, target)

    monkeypatch.setattr(os, "replace", first_was_faster)
    phantom.write_phantom(tmp_path / "set", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_help_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        phantom.main(["--help"])
    assert "python -m support.phantom" in capsys.readouterr().out and not list(tmp_path.iterdir())
