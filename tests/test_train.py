"""The loop: pure schedules, resuming, processes, the files of a run, and its messages."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import evaluate
import train
from support import layouts, metrics, nifti, phantom

REPOSITORY = Path(__file__).parents[1]
SMALL = "--sam tiny --patch 2 32 32 --encoder 32 32 --queries 4 --amp off --val-every 2 --lr 1e-3".split()
SCHEDULE = ["--epochs", "3", "--iterations", "2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A phantom of a few patients, its middle with every second voxel; a whole case takes two windows."""
    path = tmp_path_factory.mktemp("phantom")
    phantom.write_phantom(path, num_patients=5, seed=1)
    for file in path.rglob("*.nii.gz"):
        image = nib.load(file)
        x, y, z = (n // 2 for n in image.shape)
        nib.save(image.slicer[x - 32 : x + 32 : 2, y - 32 : y + 32 : 2, z - 2 : z + 1], file)
    return path


def run(root: Path, name: str, *more: str) -> tuple[list[dict], dict]:
    """Train in the working directory; return the log and the content of last.pt."""
    train.main(["--root", str(root), "--name", name, *SMALL, *more])
    (folder,) = Path("runs").glob(f"phantom-{name}*")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> tuple[Path, list[dict], dict]:
    """An uninterrupted run in one process: its folder, log and last checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, *run(root, "whole", *SCHEDULE)


def losses(log: list[dict]) -> list[dict]:
    kinds = ("loss", "grad", "lr", "val")
    return [{key: value for key, value in entry.items() if key.startswith(kinds)} for entry in log]


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def test_a_run_leaves_what_the_header_lists(whole):
    folder, log, last = whole
    names = {path.name for path in (folder / "runs/phantom-whole").iterdir()}
    assert names == {"best.pt", "last.pt", "config.json", "log.jsonl", "curves.png", "overlay.png"}
    assert all(name in train.__doc__ for name in names)
    terms = (
        "class",
        "no_object",
        "mask_bce",
        "mask_dice",
        "aux_mask_bce",
        "aux_mask_dice",
        "box_l1",
        "box_giou",
    )
    assert {f"loss_{term}" for term in terms} | {"grad_norm", "lr", "seconds", "gib", "val_dice"} <= log[
        0
    ].keys()
    assert log[0]["val_dice"] is None and all(0 <= log[i]["val_dice"] <= 1 for i in (1, 2))
    config = json.loads((folder / "runs/phantom-whole/config.json").read_text())
    assert config["model"]["encoder_size"] == [32, 32] and config["parameters"]["total"][0] > 0
    assert config["schedule"]["clip"] == 12 and last["arguments"]["mask_weight"] == 1.5  # from the preset
    assert last["sam"] == {"name": "tiny", "sha256": None} and last["epoch"] == 3
    best = torch.load(folder / "runs/phantom-whole/best.pt", weights_only=True)
    assert best["metrics"]["val_dice"] == max(entry["val_dice"] for entry in (log[1], log[2]))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_by_bit(
    root, whole, workers, tmp_path, monkeypatch, capsys
):
    """Loading processes change nothing either."""
    monkeypatch.chdir(tmp_path)
    original, calls = train.train_epoch, []

    def fail_at_the_third(run, epoch):
        calls.append(epoch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(run, epoch)

    monkeypatch.setattr(train, "train_epoch", fail_at_the_third)
    monkeypatch.setattr(train, "draw", lambda run: None)
    with pytest.raises(KeyboardInterrupt):
        run(root, "parts", *SCHEDULE, "--workers", workers)
    start = capsys.readouterr().out.splitlines()[:6]
    assert [line.split()[0] for line in start] == ["data", "model", "sizes", "schedule", "output", "epoch"]
    log, last = run(root, "parts", *SCHEDULE, "--workers", workers, "--resume")
    assert calls == [0, 1, 2, 2] and losses(log) == losses(whole[1])
    assert same(last["state"], whole[2]["state"])


def test_another_configuration_and_another_run_of_the_same_name_are_refused(root, whole, monkeypatch):
    monkeypatch.chdir(whole[0])
    before = Path("runs/phantom-whole/last.pt").read_bytes()
    for change, message in (
        (["--queries", "6", "--resume"], "last.pt: found another configuration .*num_queries 4 -> 6"),
        (["--epochs", "4", "--resume"], "epochs 3 -> 4"),
        ([], "runs/phantom-whole: found a run; use --resume, choose another --name"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(root, "whole", *SCHEDULE, *change)
    assert Path("runs/phantom-whole/last.pt").read_bytes() == before


def test_two_processes_equal_one_with_the_same_global_batch(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = ["--epochs", "1", "--iterations", "3"]
    log, _ = run(root, "one", *schedule, "--batch", "2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += [
        str(REPOSITORY / "train.py"),
        "--root",
        str(root),
        "--name",
        "two",
        *SMALL,
        *schedule,
        "--batch",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    other = json.loads(Path("runs/phantom-two/log.jsonl").read_text())
    for key, value in losses(log)[0].items():
        # Float32 sums in another order, and three steps of AdamW, whose first is the sign of the gradient.
        if not key.startswith("val"):
            assert other[key] == pytest.approx(value, rel=2e-3), key


def test_patches_and_rate_are_pure_functions_of_the_step():
    args = train.parse_arguments("--accumulate 3 --batch 2 --epochs 2 --iterations 5 --lr 0.001".split())
    ranks = [train.patch_indices(0, args, rank, 2) for rank in (0, 1)]
    assert sorted(sum(ranks, [])) == list(range(2 * 5 * 3 * 2 * 2))
    assert ranks[0][:4] == [
        0,
        1,
        4,
        5,
    ]  # batch by batch: the order does not depend on the number of processes
    assert train.patch_indices(4, args, 1, 2) == ranks[1][4 * 3 * 2 :]
    assert train.learning_rate(0, args) == 0.001
    assert train.learning_rate(5, args) == pytest.approx(0.001 * 0.5**0.9)
    assert 0 < train.learning_rate(9, args) < 0.001 * 0.2


def test_accumulated_batches_add_up_to_a_large_batch(root, tmp_path, monkeypatch):
    """The first step sees the same patches. The loss is a mean per batch, so it is near and not equal."""
    monkeypatch.chdir(tmp_path)
    nothing = metrics.summarize({"case": {"dice": np.full(3, np.nan)}}, ("background", "RV", "Myo", "LV"))
    monkeypatch.setattr(train, "validate", lambda *_: nothing)
    monkeypatch.setattr(train, "draw", lambda run: None)
    short = ["--epochs", "1", "--iterations", "1"]
    (large,), _ = run(root, "large", *short, "--batch", "2")
    (added,), _ = run(root, "added", *short, "--batch", "1", "--accumulate", "2")
    assert added["loss"] == pytest.approx(large["loss"], rel=0.1)
    for amp in ("fp16", "bf16"):
        (entry,), last = run(root, amp, *short, "--amp", amp)
        assert entry["loss"] > 0 and bool(last["scaler"]) == (amp == "fp16")
        assert entry["val_dice"] == 0 and Path(f"runs/phantom-{amp}/best.pt").is_file()  # no object, no Dice


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "acdc", "--root", "/nonexistent"], "(?s)/nonexistent.*patient001"),
        (["--resume", "--name", "never-run"], "last.pt: found no such file"),
        (["--lr", "-1"], "--lr: found -1.0, expected more than 0"),
        (["--encoder", "100", "64"], "(?s)encoder_size.*100, 64.*multiples of 16"),
        (["--sam", "tiny", "--sam-checkpoint", "x.pth"], "no pre-trained weights"),
        (["--queries", "2"], "4 segments.* 2 queries"),
    ],
)
def test_bad_arguments_end_in_one_message(root, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        train.main(["--root", str(root), *SMALL, "--epochs", "1", "--iterations", "1", *arguments])
    assert not list(tmp_path.rglob("*.partial"))


# ------------------------------------------------------------------------------------------------ given boxes


def test_a_run_with_given_boxes_is_named_scored_and_written_as_such(
    root, whole, tmp_path, monkeypatch, capsys
):
    """Boxes of the truth in training and evaluation, then those of another program for the checkpoint."""
    with pytest.raises(SystemExit, match="--prompts: found gt, expected auto, as .*best.pt was trained"):
        evaluate.main(["--ckpt", str(whole[0] / "runs/phantom-whole/best.pt"), "--prompts", "gt"])
    monkeypatch.chdir(tmp_path)
    run(root, "a", "--epochs", "1", "--iterations", "2", "--prompts", "gt")
    assert "Not automatic: the model was given the boxes of the truth." in capsys.readouterr().out
    checkpoint = ["--ckpt", "runs/phantom-a-boxes-gt/best.pt", "--amp", "off", "--no-mirror"]
    with pytest.raises(SystemExit, match="--prompts: found auto, expected gt or a folder, as runs/.*best.pt"):
        evaluate.main(checkpoint)
    results = evaluate.main([*checkpoint, "--prompts", "gt"])
    folder = tmp_path / "runs/phantom-a-boxes-gt/predictions-boxes-gt-val"
    assert (
        json.loads((folder / "metrics-boxes-gt.json").read_text()) == results and results["prompts"] == "gt"
    )
    (entry,) = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert entry["val_dice"] == pytest.approx(results["mean"]["dice"])  # It was not mirrored either.
    for case in layouts.find_data("phantom", str(root)).splits["val"]:
        truth, found = (nifti.read_label(str(f), 4)[0] for f in (case.label, folder / f"{case.name}.nii.gz"))
        for class_id in (1, 2, 3):
            assert not (found == class_id)[~(truth == class_id).any((1, 2))].any()
    rescored = evaluate.main(["--predictions", str(folder), "--data", "phantom", "--root", str(root)])
    assert rescored["prompts"] == "gt" and rescored["mean"] == results["mean"]
    assert not (folder / "metrics.json").exists()
    other = evaluate.main([*checkpoint, "--prompts", str(folder)])
    name = f"boxes-{folder.parent.name}_{folder.name}"
    assert (folder.parent / f"predictions-{name}-val" / f"metrics-{name}.json").is_file()
    assert other["prompts"] == str(folder)


def test_segments_without_a_box_of_the_other_program_are_not_asked_for(root, tmp_path, monkeypatch):
    """The other program sees nothing: only the background is matched, and the loss is that of one class."""
    monkeypatch.chdir(tmp_path)
    Path("net").mkdir()
    for cases in layouts.find_data("phantom", str(root)).splits.values():
        for case in cases:  # Files of the test split, which is not used, do not matter.
            label = nib.load(case.label)
            nib.save(
                nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), f"net/{case.name}.nii.gz"
            )
    monkeypatch.setattr(train, "draw", lambda run: None)
    (entry,), _ = run(root, "n", "--epochs", "1", "--iterations", "2", "--prompts", "net")
    assert entry["loss_class"] < 5 and entry["val_dice"] == 0
