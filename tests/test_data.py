"""Files to patches and back: alignment, plans, the cache, and patches as pure functions."""

import dataclasses
import shutil
import time

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.data import DataLoader

import data
from data import PatchDataset
from support import layouts, nifti
from support.layouts import Case
from support.metrics import dice_per_class
from volumes import REAL, decathlon, plan_for, planned, refuses, save, spaced, to_native, write_tree


def ramp(shape: tuple[int, int, int], axis: int) -> np.ndarray:
    """Return (D, H, W) whose values are the places of the voxels' centres along an axis, from 0 to 1."""
    return ((np.indices(shape)[axis] + 0.5) / shape[axis]).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [13, 41])
def test_resampling_keeps_places_there_and_back(axis, size):
    shape, inner = (20, 20, 20), [slice(None)] * 3
    target = shape[:axis] + (size,) + shape[axis + 1 :]
    inner[axis] = slice(4, -4)  # a mirrored ramp bends at the border
    there = data.resample(ramp(shape, axis), target, 3)
    assert np.allclose(there[tuple(inner)], ramp(target, axis)[tuple(inner)], atol=2e-3)
    # With a constant as the other class, the boundary is where the ramp crosses one half: the same place.
    semantic = torch.from_numpy(np.stack([np.full(target, 0.5001, np.float32), ramp(target, axis)]))
    back = to_native(semantic, nifti.Geometry.of(np.eye(4), shape[::-1]))
    assert np.array_equal(back, ramp(shape, axis) > 0.5)


@pytest.mark.parametrize("spacing, new", [((1.25,) * 3, (0.9,) * 3), ((10, 1.2, 1.2), (None, 0.9, 0.9))])
def test_labels_stay_with_the_image_and_survive_the_way_back(tmp_path, spacing, new):
    shape, affine = tuple(int(64 / s) for s in spacing), spaced(*spacing)
    places = [(np.arange(n) - 0.47 * n) * s for n, s in zip(shape, spacing)]  # in mm, off the centre
    distance = np.sqrt(sum(p**2 for p in np.meshgrid(*places, indexing="ij")))
    truth = (distance < 25).astype(np.uint8) + (distance < 15)  # 2 within 1
    image = save(tmp_path / "i.nii", (truth > 0).T.astype(np.float32), affine)
    case = Case("a", (image,), save(tmp_path / "l.nii", truth.T, affine))
    prepared = data.prepare_case(case, plan_for(spacing=new))
    assert prepared.label.shape == prepared.image.shape[1:] != shape
    middle = (prepared.image.min() + prepared.image.max()) / 2
    assert dice_per_class(prepared.image[0] > middle, prepared.label > 0, 2) > 0.99
    semantic = F.one_hot(torch.from_numpy(prepared.label).long(), 3).movedim(-1, 0).float()
    back = to_native(semantic, prepared.geometry)
    assert back.shape == shape and dice_per_class(back, truth, 3).min() >= 0.98


def test_thick_slices_are_kept_or_copied_never_mixed(tmp_path):
    array = np.random.default_rng(0).normal(size=(8, 8, 5)).astype(np.float32)  # (x, y, z)
    case = Case("a", (save(tmp_path / "i.nii", array, spaced(8, 1, 1)),), None)
    kept = data.prepare_case(case, plan_for(spacing=(None, 1.0, 1.0))).image[0]
    assert np.allclose(kept, (array.T - array.mean()) / array.std(), atol=1e-5)  # MR is normalised by itself
    copied = data.prepare_case(case, plan_for(spacing=(3.0, 1.0, 1.0))).image[0]
    assert len(copied) == 13 and all(any(np.array_equal(a, b) for b in kept) for a in copied)


def test_normalisation_is_per_channel_and_finite_for_huge_and_constant_values(tmp_path):
    rng, ct, flat = np.random.default_rng(0), (-500.0, 500.0, 10.0, 200.0), np.full((2, 2, 2), 7, np.float32)
    low, high = rng.uniform(-1e3, 1e3, (4, 4, 4)).astype(np.float32), rng.random((4, 4, 4), np.float32) * 1e38
    for channel, modality, expected in (
        (low, "CT", (low.clip(-500, 500) - 10) / 200),
        (high, "MR", (high - high.mean(dtype=float)) / high.std(dtype=float)),
        (low, "rescale_to_0_1", (low - low.min()) / (low.max() - low.min())),
        (high, "rescale_to_0_1", (high - high.min()) / (high.max() - high.min())),
        (low, "noNorm", low),
        (low, "rgb_to_0_1", low / 255),
        (flat, "MR", 0 * flat),  # no NaN
    ):
        assert np.allclose(data.normalise(channel, modality, ct), expected, atol=1e-4), modality
    files = tuple(save(tmp_path / f"{i}.nii", volume) for i, volume in enumerate((low, high)))
    plan = plan_for(modality=("CT", "MR"), intensity=(ct, None))
    image = data.prepare_case(Case("a", files, None), plan).image  # CT as CT, MR by itself
    assert image[0].max() == pytest.approx(490 / 200) and image[1].std() == pytest.approx(1, abs=1e-3)
    refuses("0.nii: found 1 channels, expected 2: CT", data.prepare_case, Case("a", files[:1], None), plan)


def test_a_spacing_that_needs_more_than_the_memory_is_refused_by_name(tmp_path):
    image = save(tmp_path / "thick.nii", np.zeros((50, 50, 50), np.int16), spaced(99, 99, 99))
    found = r"thick.nii: found \(.*\) voxels after resampling .* which need .* GiB"
    refuses(found, data.prepare_case, Case("a", (image,), None), plan_for(spacing=(0.1, 0.1, 0.1)))


@pytest.mark.parametrize("depth, native", [(6, 40), (41, 9), (1, 17), (30, 1)])
@pytest.mark.parametrize("slab", [1, 3, 50])
def test_scores_in_slabs_are_those_of_the_whole(depth, native, slab):
    semantic = torch.from_numpy(np.random.default_rng(0).normal(size=(5, depth, 7, 8)).astype(np.float32))
    whole = F.interpolate(semantic[None], size=(native, 13, 6), mode="trilinear", align_corners=False)[0]
    parts = list(data.resample_scores(semantic.split(slab, dim=1), depth, (native, 13, 6)))
    assert all(part.shape[1] <= data.SLAB for part in parts)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def cached(tmp_path):
    source = layouts.find_data(str(decathlon(tmp_path / "set")))
    return source, data.prepare(source, tmp_path / "cache"), tmp_path / "cache"


@pytest.mark.parametrize("part", range(len(data.PARTS)))
def test_an_interrupted_cache_goes_on_and_only_what_changed_is_prepared_again(tmp_path, monkeypatch, part):
    source, cache, calls = layouts.find_data(str(decathlon(tmp_path / "set", 3))), tmp_path / "cache", []
    (case,), np_save, prepare_case, names = source.splits["val"], np.save, data.prepare_case, []

    def fail_in_the_second_case(file, array):
        calls.append(file.name)
        if len(calls) == len(data.PARTS) + part + 1:
            file.write(b"half of it")
            raise KeyboardInterrupt
        np_save(file, array)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(np, "save", fail_in_the_second_case)
        data.prepare(source, cache)
    assert not list(cache.glob("*.partial"))
    monkeypatch.setattr(data, "prepare_case", lambda c, plan: names.append(c.name) or prepare_case(c, plan))
    plan = data.prepare(source, cache, workers=2)
    assert len(names) == 2 and data.cached_shapes(source.splits["train"], plan, cache) == [(8, 10, 12)] * 2
    for each in (*source.splits["train"], case):
        stored, now = data.load_cached(each, plan, cache), prepare_case(each, plan)
        for one, other in ((stored.image, now.image), (stored.label, now.label)):
            assert np.array_equal(one, other) and isinstance(one, np.memmap)
        assert np.array_equal(stored.geometry.affine, now.geometry.affine)
    with monkeypatch.context() as context:
        context.setattr(data, "survey", None)  # a finished cache is not even checked
        assert data.prepare(source, cache) == plan and len(names) == 2
    damaged = next(cache.glob(f"{case.name}-*.{[*data.PARTS][part]}.npy"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a single bit
    next(cache.glob("plan-*.json")).write_text("{")  # half a plan
    assert data.prepare(source, cache) == plan and names[2:] == [case.name]
    assert np.array_equal(data.load_cached(case, plan, cache).label, prepare_case(case, plan).label)
    save(case.images[0], np.asarray(nib.load(case.images[0]).dataobj) * 2 + 1)
    assert data.prepare(source, cache) == plan and names[3:] == [case.name]
    where = source.splits["train"], plan, cache / "elsewhere"
    refuses("found no such file; run `data.py prepare`", PatchDataset, *where, (2, 8, 8), 4, seed=0)


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_results_in_order_and_an_error_stops_the_rest(workers):
    begun = []

    def fail(i):
        begun.append(time.sleep(0.005))
        raise ValueError(i)

    assert [*data.parallel(lambda i: -i, range(50), workers, "signs")] == [-i for i in range(50)]
    refuses("0", list, data.parallel(fail, range(500), workers, "failing"))
    assert len(begun) < 250


def test_a_patch_is_a_function_of_seed_and_index(tmp_path):
    source, plan, cache = cached(tmp_path)
    sets = [PatchDataset(source.splits["train"], plan, cache, (4, 8, 8), 24, seed) for seed in (0, 0, 1)]
    batches = [[sets[0][i] for i in range(24)], [sets[1][i] for i in reversed(range(24))][::-1], sets[2]]
    batches += [zip(*map(torch.cat, zip(*DataLoader(sets[0], 2, num_workers=workers)))) for workers in (0, 2)]
    items, again, other, alone, two = (torch.stack([torch.cat([x[0], y]) for x, y in b]) for b in batches)
    assert all(torch.equal(items, same) for same in (again, alone, two)) and not torch.equal(items, other)
    assert len(items) == 24 and len(items.sum((1, 2, 3)).unique()) > 20


@pytest.mark.parametrize("size", [(4, 8, 8), (11, 14, 5)])
def test_plain_patches_are_crops_and_a_smaller_volume_is_centred_in_its_minimum(tmp_path, size):
    (source, plan, cache), volumes = cached(tmp_path), []
    for case in (data.load_cached(case, plan, cache) for case in source.splits["train"]):
        pads = [((max(0, p - n) + 1) // 2, max(0, p - n) // 2) for n, p in zip(case.label.shape, size)]
        image = np.pad(case.image[0], pads, constant_values=case.image.min())
        windows = np.lib.stride_tricks.sliding_window_view
        volumes.append((windows(image, size), windows(np.pad(case.label, pads), size)))
    for image, label in PatchDataset(source.splits["train"], plan, cache, size, 12, seed=0, augment=False):
        assert image.dtype == torch.float32 and label.dtype == torch.uint8
        hits = [labels[np.abs(images - image[0].numpy()).max((3, 4, 5)) < 1e-4] for images, labels in volumes]
        assert sum(np.array_equal(each, label) for labels in hits for each in labels) == 1


@pytest.mark.parametrize("angle, scale", [(0.0, 1.0), (-0.5, 1.25), (0.2, 0.8), (np.pi / 2, 1.0)])
@pytest.mark.parametrize("low", [(1, 6, 9), (-1, -4, 20), (3, 14, -5)])
def test_rotation_and_scaling_are_those_of_brute_force(angle, scale, low):
    rng, size = np.random.default_rng(0), (5, 16, 20)
    image = ndimage.gaussian_filter(rng.normal(size=(6, 30, 34)), 2).astype(np.float32) * 20
    label, minimum = (image > 0).astype(np.uint8), image.min()
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


@pytest.mark.parametrize("flip_axes", [(), (2,), (0, 1)])
def test_labels_follow_the_image_and_only_given_axes_are_flipped(tmp_path, monkeypatch, flip_axes):
    monkeypatch.setattr(data, "change_intensities", lambda image, rng, n, kinds: image * (kinds == ("MR",)))
    monkeypatch.setattr(data, "ROTATION", (0.0, (0, 0)))
    image = sum(ramp((4, 16, 16), axis) * 4**axis for axis in range(3))
    label = save(tmp_path / "l.nii", (image > np.median(image)).T.astype(np.uint8))
    case, plan = Case("a", (save(tmp_path / "i.nii", image.T),), label), plan_for(flip_axes=flip_axes)
    plan = data.prepare(layouts.DataSource("x", str(tmp_path), plan.task, {"train": (case,)}), tmp_path)
    patches = [*PatchDataset((case,), plan, tmp_path, (4, 16, 16), 40, seed=0)]
    for axis in range(3):
        falls = {bool(patch[0].diff(dim=axis)[1:3, 4:12, 4:12].sum() < 0) for patch, _ in patches}
        assert falls == ({False, True} if axis in flip_axes else {False})
    # Bilinear and nearest interpolation differ by less than a voxel, of 0.2 deviations.
    inner = [(patch[0, :, 4:12, 4:12], label[:, 4:12, 4:12]) for patch, label in patches]
    assert all(image[label == 1].min() > image[label == 0].max() - 0.4 for image, label in inner)


def test_a_third_of_the_patches_is_centred_on_foreground_by_class(tmp_path):
    label, rng = np.zeros((10, 100, 100), np.uint8), np.random.default_rng(0)
    label[2:8, 20:40, 20:40], label[5, 70, 70] = 1, 2  # 2,400 voxels, and one
    dataset, voxels = PatchDataset((), plan_for(), tmp_path, (3, 9, 9), 1, 0), data._foreground_voxels(label)
    corners = np.array([dataset._corner(label.shape, voxels, rng) for _ in range(1200)])
    centres = label[tuple((corners + (1, 4, 4)).T)]
    # Three deviations are 0.032; by voxel, class 2 would be 1 / 7,200. Random centres are class 1 in 3.6 %.
    assert np.allclose([(centres == k).mean() for k in (2, 1)], [1 / 6, 1 / 6 + 2 / 3 * 0.036], atol=0.04)
    assert dataset._corner((3, 9, 9), data._foreground_voxels(0 * label), rng) == [0, 0, 0]  # no foreground


KINDS = ("NOISE", "BLUR", "BRIGHTNESS", "CONTRAST", "LOW_RESOLUTION", "GAMMA")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_augmentation_changes_intensities_and_no_place(monkeypatch, kind):
    for name in KINDS:
        monkeypatch.setattr(data, name, (float(name == kind), getattr(data, name)[1]))
    image = torch.full((2, 3, 24, 24), -1.0)
    # One bright block, whose place must not change, and values inside the range, whose ends gamma keeps.
    image[:, :, 6:14, 8:20], image[:, :, 9:11, 12:16] = 1.5, 1.0
    changed = data.change_intensities(image.clone(), np.random.default_rng(1))
    assert changed.shape == image.shape and changed.dtype == torch.float32 and changed.isfinite().all()
    small, large = (data.change_intensities(n * image, np.random.default_rng(1), 1, "no") for n in (1, 50))
    assert torch.allclose(50 * small, large, atol=1e-2)  # in units of the image, if it has no deviation of 1
    assert not torch.allclose(changed, image, atol=1e-3) and (changed[..., 8:12, 10:18] > 0).all()
    centres = [(x > x.mean()).nonzero().float().mean(0) for x in (changed, image)]
    assert torch.allclose(*centres, atol=0.6)
    monkeypatch.setattr(data, kind, (0.0, getattr(data, kind)[1]))
    assert torch.equal(data.change_intensities(image.clone(), np.random.default_rng(1)), image)


def test_label_maps_become_one_segment_per_class_present():
    labels = torch.zeros(3, 6, 8, dtype=torch.int64)
    labels[0, 1:3, 2:7], labels[0, 4, 5], labels[2] = 1, 3, 2  # a block, one pixel; no background in slice 2
    segments = data.label_map_to_segments(labels, 4)
    assert segments.present.int().tolist() == [[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert torch.equal(segments.masks.float().argmax(1), labels) and (segments.masks.sum(1) == 1).all()
    assert segments.boxes[0, 1].tolist() == pytest.approx([2 / 8, 1 / 6, 7 / 8, 3 / 6])
    assert segments.boxes[0, 3].tolist() == pytest.approx([5 / 8, 4 / 6, 6 / 8, 5 / 6])  # one pixel
    assert segments.boxes[1, 0].tolist() == [0, 0, 1, 1] and segments.boxes[1, 1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("other", [False, True])
def test_given_boxes_follow_the_labels_and_nothing_else_of_a_patch_changes(tmp_path, other):
    source, cache, cases = layouts.find_data(str(decathlon(tmp_path / "set"))), tmp_path / "cache", []
    for case in source.splits["train"]:  # another program's map is 1 where the label is 2, else 0
        array = np.uint8(np.asarray(nib.load(case.label).dataobj) == 2)
        file = save(tmp_path / f"{case.name}.nii.gz", array)
        cases.append(dataclasses.replace(case, box_source=file if other else case.label))
    plan = data.prepare(dataclasses.replace(source, splits={"train": tuple(cases)}), cache)
    assert len(list(cache.glob("*.boxes-*.npy"))) == len(cases) * other
    sets = [PatchDataset(each, plan, cache, (4, 8, 8), 30, 0) for each in (cases, source.splits["train"])]
    for (patch, labels), (image, same_labels) in zip(*sets):
        assert torch.equal(patch[-1].byte(), (labels == 2).byte() if other else labels)
        assert torch.equal(patch[:-1], image) and torch.equal(labels, same_labels)
    for case in (data.load_cached(case, plan, cache) for case in cases):
        assert np.array_equal(case.box_labels, (case.label == 2) if other else case.label)
        assert np.array_equal(case.network_input()[-1], case.box_labels)
    wrong = save(tmp_path / "wrong.nii.gz", np.full((12, 10, 8), 9, np.uint8))
    moved = save(tmp_path / "moved.nii.gz", np.zeros((12, 10, 8), np.uint8), np.eye(4) + np.eye(4, k=3) * 5)
    for file in (wrong, moved):  # the check finds maps of another label or place
        boxed = dataclasses.replace(source.splits["train"][0], box_source=file)
        for arguments in (([boxed], source.task), (cases[:1], source.task, 1, [file])):
            refuses(f"^1 problem:\n{file}: found", data.survey, *arguments)


def test_the_command_checks_describes_and_prepares_and_lists_all_problems(tmp_path, capsys):
    root = decathlon(tmp_path / "set", affine=spaced(3.0, 1.5, 1.25))
    where = ["--data", str(root), "--cache", str(tmp_path / "cache")]
    data.main(["info", *where, "--workers", "2"])
    first, *lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("remark")]
    rows = {line[:32].strip(): line[32:].split() for line in lines}
    assert first == f"{root}: no problems in 5 cases (train 4, val 1)"
    assert rows["columns W"] == ["12", "12", "12"] and rows["spacing D, mm"] == ["3", "3", "3"]
    # `decathlon` gives the tail 2 x 3 x 4 voxels, of 960
    assert rows["tail"] == ["5", f"{24 * 3 * 1.5 * 1.25 / 1000:.4g}", "2.5"]
    (root / "labelsTr/case_1.nii.gz").unlink()
    (root / "imagesTr/case_2.nii.gz").write_text("")
    for action in ("check", "prepare"):
        refuses("data.py: 2 problems:\n.*case_.*\n.*case_.*", data.main, [action, *where])


def test_a_set_of_testing_cases_alone_is_checked_and_described_but_not_prepared(tmp_path, capsys):
    write_tree(tmp_path, "acdc")
    shutil.rmtree(tmp_path / "database/training")
    where = ["--data", "acdc", "--root", str(tmp_path), "--cache", str(tmp_path / "cache")]
    data.main(["info", *where])
    printed = capsys.readouterr().out
    assert "no problems in 2 cases (testing 2)\n" in printed and "slices D" in printed
    refuses("found no object in 0 training labels", data.main, ["prepare", *where])


@pytest.mark.skipif(not REAL.is_dir(), reason="MASKSAM_TEST_DATA is not set")
def test_real_data_on_disk():
    acdc = layouts.find_data("acdc", str(REAL / "data/acdc")).splits
    assert {name: len(cases) for name, cases in acdc.items()} == {"train": 140, "val": 20}
    assert len(data.survey(acdc["val"], layouts.PRESETS["acdc"].task)) == 20
    hippocampus = layouts.find_data(str(REAL / "data/Task04_Hippocampus"), flip=[])
    prepared = data.prepare_case(hippocampus.splits["val"][0], planned(hippocampus))
    assert prepared.image.shape[1:] == prepared.geometry.shape and set(np.unique(prepared.label)) == {0, 1, 2}
