"""The phantom: seeded, readable as ACDC, a heart in its anatomy, and no task for a threshold on intensities."""

import os

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import data
from support import layouts, nifti, phantom

PATIENTS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("parent") / "phantom"
    phantom.write_phantom(path, PATIENTS, seed=0)
    return path


@pytest.fixture(scope="module")
def frames(root) -> list[tuple[np.ndarray, np.ndarray, tuple]]:
    """Image, label and spacing of every frame, ED and ES of a patient next to each other."""
    source = layouts.find_data("phantom", str(root))
    cases = sorted((case for split in source.splits.values() for case in split), key=lambda case: case.name)
    assert len(cases) == 2 * PATIENTS
    volumes = [(nifti.read_volume(case.images[0]), nifti.read_label(case.label, 4)[0]) for case in cases]
    return [(image, label, geometry.spacing) for (image, geometry), label in volumes]


def best_interval_dice(image: np.ndarray, truth: np.ndarray) -> float:
    """Dice of the best `low <= intensity < high`, its ends chosen among 65 with the truth at hand."""
    edges = np.linspace(image.min(), image.max() + 1, 65)
    hits = np.append(0, np.histogram(image[truth], edges)[0].cumsum())
    taken = np.append(0, np.histogram(image, edges)[0].cumsum())
    low, high = np.triu_indices(65, 1)
    return float((2 * (hits[high] - hits[low]) / (truth.sum() + taken[high] - taken[low])).max())


def test_the_interval_search_finds_a_class_that_is_one_of_intensity():
    truth = np.zeros((2, 8, 8), bool)
    truth[:, 2:5, 2:5] = True
    assert best_interval_dice(np.where(truth, 900.0, 100.0), truth) == 1.0


def test_thresholds_fitted_on_the_truth_of_each_volume_fail(frames):
    dice = [[best_interval_dice(image, label == k) for k in (1, 2, 3)] for image, label, _ in frames]
    assert np.mean(dice) < 0.5  # the docstring says 0.30
    assert np.mean(dice, axis=0).max() < 0.5


def test_reader_finds_nothing_wrong(root):
    assert data.check_source(layouts.find_data("phantom", str(root))) == []


def test_muscle_lies_between_pool_and_everything_else(frames):
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    for _, label, _ in frames:
        around = ndimage.binary_dilation(label == 3, in_plane)
        assert set(np.unique(label[around])) == {2, 3}


def test_every_frame_has_every_class_and_the_ventricle_contracts(frames):
    for (_, diastole, _), (_, systole, _) in zip(frames[::2], frames[1::2]):
        assert set(np.unique(diastole)) == set(np.unique(systole)) == {0, 1, 2, 3}
        assert (systole == 3).sum() < 0.75 * (diastole == 3).sum()


def test_patients_vary_within_the_stated_ranges(frames):
    shapes = np.array([label.shape for _, label, _ in frames[::2]])
    spacings = np.array([spacing for _, _, spacing in frames[::2]])
    assert shapes[:, 0].min() >= 6 and shapes[:, 0].max() <= 12 and len(set(shapes[:, 0])) >= 4
    assert shapes[:, 1:].min() >= 96 and shapes[:, 1:].max() <= 128
    assert spacings[:, 0].min() >= 5 and spacings[:, 0].max() <= 10 and np.ptp(spacings[:, 0]) > 2
    assert spacings[:, 1:].min() >= 1.4 and spacings[:, 1:].max() <= 1.8 and np.ptp(spacings[:, 1]) > 0.2
    # Where the right ventricle lies from the left one: all around.
    sides = [np.subtract(*(np.argwhere(label == k)[:, 1:].mean(0) for k in (1, 3))) for _, label, _ in frames[::2]]
    assert {(y > 0, x > 0) for y, x in sides} == {(a, b) for a in (False, True) for b in (False, True)}


def test_some_slices_are_empty(frames):
    assert any(not label[d].any() for _, label, _ in frames for d in (0, -1))


def test_a_patient_is_a_function_of_seed_and_number(root, tmp_path):
    phantom.write_phantom(tmp_path / "same", 2, seed=0)
    phantom.write_phantom(tmp_path / "other", 2, seed=1)
    paths = sorted((tmp_path / "same").rglob("*.nii.gz"))
    assert len(paths) == 8
    for path in paths:
        again = root / path.relative_to(tmp_path / "same")
        assert np.array_equal(np.asarray(nib.load(path).dataobj), np.asarray(nib.load(again).dataobj))
    images = [nib.load(next((tmp_path / name).rglob("*001_frame01.nii.gz"))) for name in ("same", "other")]
    assert images[0].shape != images[1].shape or not np.array_equal(images[0].dataobj, images[1].dataobj)


def test_the_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    write, calls = phantom._write_patient, []

    def fail_at_third(folder, rng):
        calls.append(folder)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(folder, rng)

    monkeypatch.setattr(phantom, "_write_patient", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        phantom.write_phantom(tmp_path / "set", 4)
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_keeps_what_the_first_has_written(root, tmp_path, monkeypatch):
    replace = os.replace

    def first_was_faster(partial, target):
        phantom_of_first = tmp_path / "first"
        phantom.write_phantom.__globals__["os"].replace = replace
        phantom.write_phantom(phantom_of_first, 1)
        replace(phantom_of_first, target)
        replace(partial, target)

    monkeypatch.setattr(os, "replace", first_was_faster)
    phantom.write_phantom(tmp_path / "set", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_with_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"):
        phantom.write_phantom(tmp_path, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_command_line_writes_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "write_phantom", lambda root: (tmp_path / "said").write_text(str(root)))
    phantom.main(["elsewhere"])
    assert (tmp_path / "said").read_text() == "elsewhere"
