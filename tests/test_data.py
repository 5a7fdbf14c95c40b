"""Files to patches and back: alignment, plans, the cache, and patches as pure functions."""

import copy
import dataclasses
import itertools
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.data import DataLoader

import data
from data import PatchDataset, Plan
from support import layouts, nifti
from support.layouts import Case
from support.nifti import Geometry
from volumes import ACDC, decathlon, one_hot, plan_for, save, spaced, to_native


def dice(found: np.ndarray, truth: np.ndarray, class_id: int) -> float:
    a, b = found == class_id, truth == class_id
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def ramp(shape: tuple[int, int, int], axis: int) -> np.ndarray:
    """Return (D, H, W) whose values are the places of the voxels' centres along an axis, from 0 to 1."""
    return ((np.indices(shape)[axis] + 0.5) / shape[axis]).astype(np.float32)


def ball(shape, spacing, radius: float) -> np.ndarray:
    """Return two nested ellipsoids of a radius in mm, labels 1 outside and 2 inside, off the centre."""
    places = [(np.arange(n) - 0.47 * n) * s for n, s in zip(shape, spacing)]
    distance = np.sqrt(sum(p**2 for p in np.meshgrid(*places, indexing="ij")))
    return ((distance < radius).astype(np.uint8) + (distance < 0.6 * radius)).astype(np.uint8)


# --------------------------------------------------------------------------------- preparing and the way back


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [13, 41])
def test_resampling_keeps_places_there_and_back(axis, size):
    shape = (20, 20, 20)
    target = shape[:axis] + (size,) + shape[axis + 1 :]
    there = data.resample(ramp(shape, axis), target, 3, 3)
    inner = [slice(None)] * 3
    inner[axis] = slice(4, -4)  # a mirrored ramp bends at the border
    assert np.allclose(there[tuple(inner)], ramp(target, axis)[tuple(inner)], atol=2e-3)
    # With a constant as the other class, the boundary is where the ramp crosses one half: the same place.
    semantic = np.stack([np.full(target, 0.5001, np.float32), ramp(target, axis)])
    back = to_native(semantic, Geometry(np.eye(4), shape, (1.0,) * 3))
    assert np.array_equal(back, ramp(shape, axis) > 0.5)


SMOOTH = [((1.25, 1.25, 1.25), (0.9, 0.9, 0.9), 30), ((10.0, 1.2, 1.2), (None, 0.9, 0.9), 32)]


@pytest.mark.parametrize("spacing, plan_spacing, radius", SMOOTH)
def test_labels_stay_with_the_image_and_survive_the_way_back(tmp_path, spacing, plan_spacing, radius):
    shape = tuple(int(80 / s) for s in spacing)
    truth, affine = ball(shape, spacing, radius), spaced(*spacing)
    image = save(tmp_path / "i.nii", (truth > 0).T.astype(np.float32), affine)
    case = Case("a", (image,), save(tmp_path / "l.nii", truth.T, affine))
    prepared = data.prepare_case(case, plan_for(spacing=plan_spacing))
    assert prepared.label.shape == prepared.image.shape[1:] != shape
    middle = (prepared.image.min() + prepared.image.max()) / 2
    assert dice(prepared.image[0] > middle, prepared.label > 0, 1) > 0.99
    back = to_native(one_hot(prepared.label, 3), prepared.geometry)
    assert back.shape == shape and min(dice(back, truth, 1), dice(back, truth, 2)) >= 0.99


def test_thick_slices_are_kept_or_copied_never_mixed(tmp_path):
    array = np.random.default_rng(0).normal(size=(8, 8, 5)).astype(np.float32)  # (x, y, z)
    case = Case("a", (save(tmp_path / "i.nii", array, spaced(8, 1, 1)),), None)
    kept = data.prepare_case(case, plan_for(spacing=(None, 1.0, 1.0))).image[0]
    assert kept.shape == (5, 8, 8) and np.allclose(kept, (array.T - array.mean()) / array.std(), atol=1e-5)
    copied = data.prepare_case(case, plan_for(spacing=(3.0, 1.0, 1.0))).image[0]
    assert len(copied) == 13
    assert all(any(np.array_equal(slice_, original) for original in kept) for slice_ in copied)


def test_the_plan_is_made_of_training_cases_alone(tmp_path):
    source = layouts.find_data(str(decathlon(tmp_path / "set", affine=spaced(2.0, 1.0, 1.0))))
    before = data.make_plan(source)
    assert before.spacing == (2.0, 1.0, 1.0) and before.intensity is None
    held_out = source.splits["val"][0]
    for path in (*held_out.images, held_out.label):
        save(Path(path), np.asarray(nib.load(path).dataobj), spaced(9.0, 9.0, 9.0))
    assert data.make_plan(source) == before
    thick = layouts.find_data(str(decathlon(tmp_path / "thick", affine=spaced(3.5, 1.0, 1.0))))
    assert data.make_plan(thick).spacing == (None, 1.0, 1.0)


def test_ct_is_clipped_and_scaled_by_the_foreground_of_training(tmp_path):
    source = layouts.find_data(str(decathlon(tmp_path / "set", modality="CT")))
    plan, values = data.make_plan(source), []
    for case in source.splits["train"]:
        image, label = (np.asarray(nib.load(path).dataobj) for path in (case.images[0], case.label))
        values.append(image[label > 0])
    low, high = np.percentile(np.concatenate(values), [0.5, 99.5])
    clipped = np.concatenate(values).clip(low, high)
    assert np.allclose(plan.intensity, [(low, high, clipped.mean(), clipped.std())])
    case = source.splits["val"][0]
    image = nifti.read_image(case.images[0])[0].clip(low, high)
    expected = (image - clipped.mean()) / clipped.std()
    assert np.allclose(data.prepare_case(case, plan).image[0], expected, atol=1e-4)


def test_mr_is_normalised_by_itself_and_a_constant_image_is_no_nan(tmp_path):
    noise = np.random.default_rng(0).normal(300, 40, (9, 8, 7)).astype(np.float32)
    prepared = data.prepare_case(Case("a", (save(tmp_path / "i.nii", noise),), None), plan_for())
    assert prepared.label is None
    assert abs(prepared.image.mean()) < 1e-3 and abs(prepared.image.std() - 1) < 1e-3
    constant = Case("b", (save(tmp_path / "c.nii", np.full((4, 4, 4), 7, np.int16)),), None)
    assert (data.prepare_case(constant, plan_for()).image == 0).all()


@pytest.mark.parametrize("modality", ["MRI", "CT"])
def test_a_plan_travels_in_a_checkpoint_and_another_form_is_refused(tmp_path, modality):
    plan = data.make_plan(layouts.find_data(str(decathlon(tmp_path / "set", modality=modality))))
    torch.save(plan.as_dict(), tmp_path / "plan.pt")
    assert Plan.from_dict(torch.load(tmp_path / "plan.pt", weights_only=True)) == plan
    with pytest.raises(ValueError, match=r"plan: found \['data', 'labels'\], expected \['data', 'task'"):
        Plan.from_dict({"data": "x", "labels": ["a"]})


@pytest.mark.parametrize("depth, native", [(6, 40), (41, 9), (1, 17), (30, 1)])
@pytest.mark.parametrize("slab", [1, 3, 50])
def test_scores_in_slabs_are_those_of_the_whole(depth, native, slab):
    semantic = torch.from_numpy(np.random.default_rng(0).normal(size=(5, depth, 7, 8)).astype(np.float32))
    whole = F.interpolate(semantic[None], size=(native, 13, 6), mode="trilinear", align_corners=False)[0]
    parts = list(data.resample_scores(semantic.split(slab, dim=1), depth, (native, 13, 6)))
    assert all(part.shape[1] <= data.SLAB for part in parts)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ cache


@pytest.fixture
def cached(tmp_path):
    source = layouts.find_data(str(decathlon(tmp_path / "set")))
    return source, data.prepare(source, tmp_path / "cache"), tmp_path / "cache"


def prepared_now(monkeypatch) -> list[str]:
    """Return a list that collects the names of the cases that are prepared from here on."""
    names, prepare = [], data.prepare_case
    monkeypatch.setattr(
        data, "prepare_case", lambda case, plan: names.append(case.name) or prepare(case, plan)
    )
    return names


def test_the_cache_holds_what_prepare_case_makes(cached):
    source, plan, cache = cached
    for case in (*source.splits["train"], *source.splits["val"]):
        now, stored = data.prepare_case(case, plan), data.load_cached(case, plan, cache)
        assert np.array_equal(stored.image, now.image) and np.array_equal(stored.label, now.label)
        assert isinstance(stored.image, np.memmap) and isinstance(stored.label, np.memmap)
        assert stored.geometry.shape == now.geometry.shape
        assert (stored.geometry.affine == now.geometry.affine).all()
    assert data.cached_shapes(source.splits["train"], plan, cache) == [(8, 10, 12)] * 4
    assert not [path for path in Path(source.root).rglob("*") if path.suffix in (".npy", ".partial")]
    with pytest.raises(FileNotFoundError, match="found no such file; run `data.py prepare`"):
        PatchDataset(source.splits["train"], plan, cache / "elsewhere", (2, 8, 8), 4, seed=0)


def test_a_changed_file_is_checked_and_its_case_alone_prepared_again(cached, monkeypatch):
    source, plan, cache = cached
    names = prepared_now(monkeypatch)
    with monkeypatch.context() as context:
        context.setattr(data, "check_case", None)  # a finished cache is not even checked
        assert data.prepare(source, cache) == plan and names == []
    path = source.splits["val"][0].images[0]
    save(Path(path), np.asarray(nib.load(path).dataobj) + ramp((12, 10, 8), 0) * 1000)
    assert data.prepare(source, cache) == plan and names == [source.splits["val"][0].name]
    save(Path(path), np.full((12, 10, 8), np.nan, np.float32))
    with pytest.raises(ValueError, match="NaN"):
        data.prepare(source, cache)


@pytest.mark.parametrize("part", range(len(data.PARTS)))
def test_an_interrupted_case_is_not_taken_for_whole(tmp_path, monkeypatch, part):
    source, cache = layouts.find_data(str(decathlon(tmp_path / "set"))), tmp_path / "cache"
    np_save, calls = np.save, []

    def fail_in_the_second_case(file, array):
        calls.append(file.name)
        if len(calls) == len(data.PARTS) + part + 1:
            file.write(b"half of it")
            raise KeyboardInterrupt
        np_save(file, array)

    monkeypatch.setattr(np, "save", fail_in_the_second_case)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(source, cache)
    assert not list(cache.glob("*.partial"))
    monkeypatch.setattr(np, "save", np_save)
    names = prepared_now(monkeypatch)
    plan = data.prepare(source, cache)
    assert len(names) == 4  # all but the first
    for case in (*source.splits["train"], *source.splits["val"]):
        assert np.array_equal(data.load_cached(case, plan, cache).image, data.prepare_case(case, plan).image)


def test_threads_prepare_in_order_what_one_alone_prepares_and_an_error_stops_the_rest(tmp_path):
    source = layouts.find_data(str(decathlon(tmp_path / "set", modality="CT")))
    plans = [data.prepare(source, tmp_path / f"cache{workers}", workers) for workers in (1, 3)]
    files = sorted((tmp_path / "cache1").glob("*.npy"))
    assert plans[0] == plans[1] and len(files) == 20
    assert all(file.read_bytes() == (tmp_path / "cache3" / file.name).read_bytes() for file in files)
    begun = []

    def fail(i):
        begun.append(i)
        time.sleep(0.005)
        raise ValueError(i)

    for workers in (1, 3):
        assert [*data.parallel(lambda i: -i, range(50), workers, "signs")] == [-i for i in range(50)]
        with pytest.raises(ValueError, match="0"):
            list(data.parallel(fail, range(500), workers, "failing"))
    assert len(begun) < 250


def test_a_full_disk_is_a_message_and_leaves_no_half_case(tmp_path, monkeypatch):
    def full(file, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    root = decathlon(tmp_path / "set", 2)
    with pytest.raises(SystemExit, match=r"npy could not be written \(.*No space left on device\)"):
        data.main(["prepare", "--data", str(root), "--cache", str(tmp_path / "cache")])
    assert [file.suffix for file in (tmp_path / "cache/set").iterdir()] == [".json"]


# ---------------------------------------------------------------------------------------------------- patches


def same(items, others) -> bool:
    chained = (itertools.chain.from_iterable(each) for each in (items, others))
    return all(torch.equal(a, b) for a, b in zip(*chained, strict=True))


def one_case(tmp_path, image: np.ndarray, label: np.ndarray, **plan):
    """Return (cases, plan, cache) of one case with these (D, H, W) arrays."""
    case = Case("a", (save(tmp_path / "i.nii.gz", image.T),), save(tmp_path / "l.nii.gz", label.T))
    source = layouts.DataSource("x", str(tmp_path), plan_for(**plan).task, {"train": (case,)})
    return (case,), data.prepare(source, tmp_path / "cache"), tmp_path / "cache"


def test_a_patch_is_a_function_of_seed_and_index(cached):
    source, plan, cache = cached
    sets = [PatchDataset(source.splits["train"], plan, cache, (4, 8, 8), 24, seed) for seed in (0, 0, 1)]
    items = [sets[0][i] for i in range(24)]
    assert same(items, [sets[1][i] for i in reversed(range(24))][::-1])  # a resumed run starts anywhere
    assert not same(items, [sets[2][i] for i in range(24)])
    assert len({float(image.sum()) for image, _ in items}) > 20
    alone, two = (list(DataLoader(sets[0], 2, num_workers=workers)) for workers in (0, 2))
    assert len(alone) == 12 and same(alone, two)


def test_plain_patches_are_crops_of_the_cache(cached):
    source, plan, cache = cached
    dataset = PatchDataset(source.splits["train"], plan, cache, (3, 6, 5), 15, seed=0, augment=False)
    volumes = [data.load_cached(case, plan, cache) for case in source.splits["train"]]
    for image, label in dataset:
        assert image.dtype == torch.float32 and label.dtype == torch.int64
        matches = 0
        for volume in volumes:
            windows = np.lib.stride_tricks.sliding_window_view(volume.image[0], (3, 6, 5))
            # Bilinear weights in float32 are 0 and 1 only to about 1e-6.
            for d, h, w in np.argwhere(np.abs(windows - image[0].numpy()).max((3, 4, 5)) < 1e-4):
                matches += np.array_equal(volume.label[d : d + 3, h : h + 6, w : w + 5], label.numpy())
        assert matches == 1


class Recorder:
    """An array that remembers how many voxels were read of it."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.read = array, array.shape, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


def test_only_the_crop_is_read():
    for angle, scale, side in ((0, 1, 67), (np.pi / 4, 1.25, 64 * 1.25 * 2**0.5 + 4)):
        image, label = Recorder(np.zeros((1, 20, 300, 300), np.float32)), Recorder(np.zeros((20, 300, 300)))
        data.cut(image, label, np.zeros(1, np.float32), (5, 90, 80), (4, 64, 64), angle, scale)
        assert max(image.read, label.read) <= 4 * side**2


@pytest.mark.parametrize("angle, scale", [(0.0, 1.0), (-0.5, 1.25), (0.2, 0.8), (np.pi / 2, 1.0)])
@pytest.mark.parametrize("low", [(1, 6, 9), (-1, -4, 20), (3, 14, -5)])
def test_rotation_and_scaling_are_those_of_brute_force(angle, scale, low):
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=(6, 30, 34)), 2).astype(np.float32) * 20
    label = (image > 0).astype(np.uint8)
    minimum, size = image.min(), (5, 16, 20)
    patch, patch_label = data.cut(image[None], label, np.array([minimum]), low, size, angle, scale)
    expected, expected_label = np.full(size, minimum, np.float32), np.zeros(size, np.int64)
    h, w = (np.indices(size[1:]).T - (np.array(size[1:]) - 1) / 2).T  # from the patch's centre
    rows = low[1] + (size[1] - 1) / 2 + scale * (np.cos(angle) * h - np.sin(angle) * w)
    places = [rows, low[2] + (size[2] - 1) / 2 + scale * (np.sin(angle) * h + np.cos(angle) * w)]
    for d in range(max(0, -low[0]), min(size[0], 6 - low[0])):
        slice_, edge = low[0] + d, {"mode": "grid-constant"}
        expected[d] = ndimage.map_coordinates(image[slice_], places, order=1, cval=minimum, **edge)
        expected_label[d] = ndimage.map_coordinates(label[slice_], places, order=0, **edge)
    assert np.allclose(patch[0].numpy(), expected, atol=1e-3)
    # A place half-way between two voxels may go to either.
    assert (patch_label.numpy() != expected_label).mean() < (0.005 if angle else 1e-9)


def test_a_volume_smaller_than_the_patch_is_centred_in_its_minimum(cached):
    source, plan, cache = cached
    dataset = PatchDataset(source.splits["train"], plan, cache, (10, 14, 16), 6, seed=0, augment=False)
    volumes = [data.load_cached(case, plan, cache) for case in source.splits["train"]]
    for image, label in dataset:
        image = image.numpy()
        (volume,) = (v for v in volumes if np.allclose(image[:, 1:9, 2:12, 2:14], v.image, atol=1e-4))
        assert np.array_equal(label[1:9, 2:12, 2:14], volume.label) and label.sum() == volume.label.sum()
        image[:, 1:9, 2:12, 2:14] = volume.image.min()
        assert np.allclose(image, volume.image.min(), atol=1e-4)


@pytest.mark.parametrize("flip_axes", [(), (2,), (0, 1)])
def test_labels_follow_the_image_and_only_given_axes_are_flipped(tmp_path, monkeypatch, flip_axes):
    monkeypatch.setattr(data, "change_intensities", lambda image, rng: image)
    label = ball((12, 60, 60), (4, 1, 1), 20)
    case, scores = one_case(tmp_path / "ball", (label > 0).astype(np.float32), label, flip_axes=flip_axes), []
    for image, patch_label in PatchDataset(*case, (6, 40, 48), 25, seed=0):
        if (patch_label > 0).sum() > 200:
            middle = (image.min() + image.max()) / 2
            scores.append(dice((image[0] > middle).numpy(), (patch_label > 0).numpy(), 1))
    assert len(scores) > 12 and min(scores) > 0.97  # bilinear and nearest differ along the rim
    monkeypatch.setattr(data, "ROTATION", (0.0, (0, 0)))
    image = sum(ramp((4, 8, 8), axis) * 10**axis for axis in range(3))
    case = one_case(tmp_path / "ramp", image, np.ones((4, 8, 8), np.uint8), flip_axes=flip_axes)
    seen = [set(), set(), set()]  # per axis, whether the ramp falls
    for patch, _ in PatchDataset(*case, (4, 8, 8), 40, seed=0):
        for axis in range(3):
            seen[axis].add(bool(patch[0].diff(dim=axis)[1:3, 2:6, 2:6].sum() < 0))
    assert seen == [{False, True} if axis in flip_axes else {False} for axis in range(3)]


def test_a_third_of_the_patches_is_centred_on_foreground_by_class(tmp_path):
    label = np.zeros((10, 100, 100), np.uint8)
    label[2:8, 20:40, 20:40] = 1  # 2,400 voxels
    label[5, 70, 70] = 2  # one
    dataset = PatchDataset(*one_case(tmp_path, label.astype(np.float32), label), (3, 9, 9), 1, seed=0)
    voxels, rng = data._foreground_voxels(label), np.random.default_rng(0)
    corners = np.array([dataset._corner(label.shape, voxels, rng) for _ in range(1200)])
    centres = label[tuple((corners + (1, 4, 4)).T)]
    rare, common = (centres == 2).mean(), (centres == 1).mean()
    assert abs(rare - 1 / 6) < 0.04  # three deviations are 0.032; by voxel it would be 1 / 7,200
    assert abs(common - (1 / 6 + 2 / 3 * 0.036)) < 0.04  # a random centre is class 1 in about 3.6 per cent


def test_cases_without_foreground_and_foreground_at_the_border_give_patches(tmp_path):
    label = np.zeros((3, 10, 10), np.uint8)
    image = np.random.default_rng(0).normal(size=label.shape).astype(np.float32)
    empty = PatchDataset(*one_case(tmp_path / "none", image, label), (2, 8, 8), 20, seed=0)
    assert all(not patch_label.any() for _, patch_label in empty)
    label[0, 0, 0] = label[2, 9, 9] = 1
    patches = PatchDataset(*one_case(tmp_path / "corner", image, label), (2, 8, 8), 40, seed=0, augment=False)
    corners = {(int(patch_label[0, 0, 0]), int(patch_label[1, 7, 7])) for _, patch_label in patches}
    assert {(1, 0), (0, 1)} <= corners


KINDS = ("NOISE", "BLUR", "BRIGHTNESS", "CONTRAST", "LOW_RESOLUTION", "GAMMA")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_augmentation_changes_intensities_and_no_place(monkeypatch, kind):
    for name in KINDS:
        monkeypatch.setattr(data, name, (float(name == kind), getattr(data, name)[1]))
    image = torch.full((2, 3, 24, 24), -1.0)
    image[:, :, 6:14, 8:20] = 1.5  # one bright block: its place must not change
    image[:, :, 9:11, 12:16] = 1.0  # inside the range: gamma and contrast keep its ends
    changed = data.change_intensities(image.clone(), np.random.default_rng(1))
    assert changed.shape == image.shape and changed.dtype == torch.float32 and changed.isfinite().all()
    assert not torch.allclose(changed, image, atol=1e-3)
    assert torch.equal(changed[..., 8:12, 10:18] > 0, image[..., 8:12, 10:18] > 0)
    centres = [(x > x.mean()).nonzero().float().mean(0) for x in (changed, image)]
    assert torch.allclose(*centres, atol=0.6)
    monkeypatch.setattr(data, kind, (0.0, getattr(data, kind)[1]))
    assert torch.equal(data.change_intensities(image.clone(), np.random.default_rng(1)), image)


def test_gamma_and_contrast_keep_the_range_and_a_third_of_the_patches_is_unchanged():
    image = torch.linspace(-1, 2, 24)[None, None, None].repeat(1, 2, 24, 1)
    rng = np.random.default_rng(0)
    results = [data.change_intensities(image.clone(), rng) for _ in range(200)]
    assert all(result.isfinite().all() for result in results)
    assert 40 < sum(torch.equal(result, image) for result in results) < 85  # 0.85^5 * 0.7 = 0.31 of 200


# ----------------------------------------------------------------------------------- segments and given boxes


def test_label_maps_become_one_segment_per_class_present():
    labels = torch.zeros(3, 6, 8, dtype=torch.int64)
    labels[0, 1:3, 2:7], labels[0, 4, 5] = 1, 3  # a block and one pixel
    labels[2] = 2  # nothing else, no background; slice 1 is empty
    segments = data.label_map_to_segments(labels, 4)
    assert segments.present.int().tolist() == [[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert torch.equal(segments.masks.float().argmax(1), labels) and (segments.masks.sum(1) == 1).all()
    assert segments.boxes[0, 1].tolist() == pytest.approx([2 / 8, 1 / 6, 7 / 8, 3 / 6])
    assert segments.boxes[0, 3].tolist() == pytest.approx([5 / 8, 4 / 6, 6 / 8, 5 / 6])  # one pixel
    assert segments.boxes[1, 0].tolist() == [0, 0, 1, 1] and segments.boxes[1, 1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("other", [False, True])
def test_given_boxes_follow_the_labels_and_change_nothing_else_of_a_patch(tmp_path, other):
    source, cases = layouts.find_data(str(decathlon(tmp_path / "set"))), []
    for case in source.splits["train"]:  # another program's map is 1 where the label is 2, else 0
        label = nib.load(case.label)
        array = (np.asarray(label.dataobj) == 2).astype(np.uint8)
        file = save(tmp_path / f"{case.name}.nii.gz", array, label.affine)
        cases.append(dataclasses.replace(case, box_source=file if other else case.label))
    source, cache = dataclasses.replace(source, splits={"train": tuple(cases)}), tmp_path / "cache"
    plan = data.prepare(source, cache)
    assert len(list(cache.glob("*.boxes-*.npy"))) == len(cases) * other
    dataset = PatchDataset(cases, plan, cache, (4, 8, 8), 30, seed=0)
    alone = copy.copy(dataset)
    alone.files = [(stem, None) for stem, _ in dataset.files]
    seen = set()
    for (patch, labels), (image, same_labels) in zip(dataset, alone):
        assert torch.equal(patch[-1].long(), (labels == 2).long() if other else labels)
        assert torch.equal(patch[:-1], image) and torch.equal(labels, same_labels)
        seen |= set(labels.unique().tolist())
    assert {0, 2} <= seen
    for case in (data.load_cached(case, plan, cache) for case in cases):
        assert np.array_equal(case.box_labels, (case.label == 2) if other else case.label)
        assert np.array_equal(case.network_input()[-1], case.box_labels)


def test_a_box_source_of_another_place_or_label_is_found_by_the_check(tmp_path):
    case = layouts.find_data(str(decathlon(tmp_path / "set", 2))).splits["train"][0]
    label = nib.load(case.label)
    wrong = save(tmp_path / "wrong.nii.gz", np.full(label.shape, 9, np.uint8), label.affine)
    shifted = label.affine + np.eye(4, k=3) * 5
    moved = save(tmp_path / "moved.nii.gz", np.zeros(label.shape, np.uint8), shifted)
    for file in (wrong, moved):
        cases = ([dataclasses.replace(case, box_source=file)], [case])
        for problems in (data.check_cases(cases[0], 3), data.check_cases(cases[1], 3, 1, [file])):
            assert len(problems) == 1 and file in problems[0]


# --------------------------------------------------------------------------------- the command, and real data


def test_the_command_checks_describes_and_prepares(tmp_path, capsys):
    root = decathlon(tmp_path / "set", affine=spaced(3.0, 1.5, 1.25))
    where = ["--data", str(root), "--cache", str(tmp_path / "cache")]
    data.main(["check", *where])
    assert f"{root}: no problems in 5 cases (train 4, val 1)" in capsys.readouterr().out
    data.main(["info", *where, "--workers", "2"])
    rows = {line[:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["slices D"] == ["8", "8", "8"] and rows["columns W"] == ["12", "12", "12"]
    assert rows["spacing D, mm"] == ["3"] * 3 and rows["spacing W, mm"] == ["1.25"] * 3
    # `decathlon` gives the head 4 x 3 x 4 voxels and the tail 2 x 3 x 4, of 960
    assert rows["head"] == ["5", f"{48 * 3 * 1.5 * 1.25 / 1000:.4g}", "5"]
    assert rows["tail"] == ["5", f"{24 * 3 * 1.5 * 1.25 / 1000:.4g}", "2.5"]
    data.main(["prepare", *where])
    assert len(list((tmp_path / "cache/set").glob("*.label.npy"))) == 5
    (root / "labelsTr/case_1.nii.gz").unlink()
    (root / "imagesTr/case_2.nii.gz").write_text("")
    for action in ("check", "info", "prepare"):
        with pytest.raises(SystemExit) as raised:
            data.main([action, *where])
        lines = str(raised.value).splitlines()
        assert lines[0] == f"data.py: 2 problems in {root}:" and len(lines) == 3
    with pytest.raises(SystemExit, match="--fold 9: expected 0 to 4"):
        data.main(["check", *where, "--fold", "9"])


@pytest.mark.skipif(not ACDC.is_dir(), reason="MASKSAM_TEST_DATA has no ACDC")
def test_acdc_on_disk():
    source = layouts.find_data("acdc", str(ACDC))
    assert {name: len(cases) for name, cases in source.splits.items()} == {"train": 140, "val": 20}
    assert "patient090_frame04" in {case.name for case in source.splits["val"]}
    data.check_source(source, workers=2)
    plan = data.make_plan(source)
    assert plan.spacing[0] is None and 1.3 < plan.spacing[1] < 1.7
    kept = []
    for case in source.splits["val"]:
        prepared, (truth, _) = data.prepare_case(case, plan), nifti.read_label(case.label, 4)
        back = to_native(one_hot(prepared.label, 4), prepared.geometry)
        assert prepared.image.shape[1] == truth.shape[0]  # slices are kept
        kept.append([dice(back, truth, k) for k in (1, 2, 3)])
    assert (np.mean(kept, axis=0) >= 0.99).all() and np.min(kept) >= 0.97
