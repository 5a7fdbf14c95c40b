"""The presets: labels, scored organs, and sizes that a backbone or a folder's cases bring."""

import dataclasses

import pytest

from model import MaskSAMConfig
from support.presets import MODALITIES, PRESETS, folder_preset, recipe
from support.sam import BACKBONES


def test_labels_scored_organs_and_flips_belong_together():
    synapse = PRESETS["synapse"].task
    organs = {"spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas"}
    assert {synapse.labels[i] for i in synapse.scored} == organs
    sizes = {name: len(preset.task.labels) for name, preset in PRESETS.items()}
    assert sizes.items() >= {"phantom": 4, "acdc": 4, "synapse": 14, "amos": 16}.items()
    assert PRESETS["acdc"].task.labels[1:] == ("RV", "Myo", "LV")
    assert {name for name, preset in PRESETS.items() if preset.task.keep_slices} >= {"phantom", "acdc"}
    for preset in PRESETS.values():  # a flipped left kidney would be a right one
        assert len(preset.task.modality) == len(preset.task.channels)
        assert set(preset.task.modality) <= set(MODALITIES)
        assert not preset.task.flip_axes or not any("left" in name for name in preset.task.labels)


def test_a_light_encoder_brings_its_sizes_and_keeps_the_task():
    acdc, phantom = PRESETS["acdc"], PRESETS["phantom"]
    tiny = recipe(acdc, "tiny")
    assert tiny.patch_size == (4, 160, 160) and tiny.encoder_size == (320, 320) and tiny.epochs == 36
    assert tiny.task is acdc.task and tiny.num_queries == acdc.num_queries
    assert [recipe(acdc, "mobile_sam", device).batch_size for device in ("cpu", "cuda:1")] == [1, 4]
    small = folder_preset(acdc.task, [(36, 50, 35)])
    on_gpu = dataclasses.replace(recipe(small, "tiny"), batch_size=32, optimizer="adamw")
    assert recipe(small, "tiny", "cuda") == on_gpu and recipe(small, "tiny").optimizer == "muon"
    pyramid = recipe(folder_preset(acdc.task, [(36, 50, 35)], "tiny_pyramid"), "tiny_pyramid")
    assert pyramid.patch_size == (16, 52, 36) and pyramid.encoder_size == (56, 40)
    assert (pyramid.epochs, pyramid.batch_size, pyramid.lr, pyramid.optimizer) == (8, 2, 2e-3, "muon")
    assert pyramid.volumetric and pyramid.fine_masks and pyramid.num_queries == 5
    assert not recipe(acdc, "tiny_pyramid").volumetric and not recipe(phantom, "tiny").fine_masks
    assert recipe(acdc, "tiny_pyramid").lr == recipe(small, "tiny_pyramid", "cuda").lr == 1e-3
    assert recipe(phantom, "vit_b").encoder_size == (320, 320)  # made for another backbone
    assert recipe(acdc, "vit_h", "cuda") == acdc and recipe(phantom, "tiny_pyramid") is phantom


def test_the_preset_of_a_folder_fits_its_median_case():
    preset = folder_preset(PRESETS["acdc"].task, [(8, 10, 12), (9, 11, 11), (2, 300, 9)])
    assert preset.patch_size == (8, 12, 12) and preset.encoder_size == (48, 48) and preset.num_queries == 8
    large = folder_preset(preset.task, [(20, 300, 100)])
    assert large.patch_size == (8, 256, 100) and large.encoder_size == (1024, 400)


@pytest.mark.parametrize("sam", BACKBONES)
def test_a_network_can_be_built_of_every_recipe(sam):
    for preset in (*PRESETS.values(), folder_preset(PRESETS["acdc"].task, [(8, 10, 13)])):
        made, classes = recipe(preset, sam), len(preset.task.labels)
        MaskSAMConfig(sam, "b9", 1, classes, made.num_queries, made.patch_size, made.encoder_size)
