"""The loop: pure schedules, resume, processes, workers, what a run leaves behind, and what it says when it cannot."""

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
from tools import visualize

REPOSITORY = Path(__file__).parents[1]
SMALL = "--sam tiny --patch 4 64 64 --encoder 64 64 --queries 4 --amp off --val-every 2 --lr 1e-3".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A phantom of a few patients, cut to the middle so that whole cases take two windows; not the run's folder."""
    path = tmp_path_factory.mktemp("phantom")
    phantom.write_phantom(path, num_patients=5, seed=1)
    for file in path.rglob("*.nii.gz"):
        image = nib.load(file)
        x, y, z = (n // 2 for n in image.shape)
        nib.save(image.slicer[x - 32 : x + 32, y - 32 : y + 32, z - 3 : z + 2], file)
    return path


def run(root: Path, folder: Path, name: str, *more: str) -> tuple[list[dict], dict]:
    """Train in `folder`, which must be the working directory; returns the log and the content of last.pt."""
    train.main(["--data", "phantom", "--root", str(root), "--name", name, *SMALL, *more])
    path = folder / "runs" / f"phantom-{name}"
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return log, torch.load(path / "last.pt", weights_only=True)


def losses(log: list[dict]) -> list[dict]:
    kinds = ("loss", "grad", "lr", "val")
    return [{key: value for key, value in entry.items() if key.startswith(kinds)} for entry in log]


def same(state: dict, other: dict) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def test_a_run_leaves_what_the_readme_lists(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, last = run(root, tmp_path, "files", "--epochs", "2", "--iterations", "2")
    names = {path.name for path in (tmp_path / "runs/phantom-files").iterdir()}
    assert names == {"best.pt", "last.pt", "config.json", "log.jsonl", "curves.png", "overlay.png"}
    terms = ("class", "no_object", "mask_bce", "mask_dice", "aux_mask_bce", "aux_mask_dice", "box_l1", "box_giou")
    assert {f"loss_{term}" for term in terms} | {"grad_norm", "lr", "seconds", "gib", "val_dice"} <= log[0].keys()
    assert log[0]["val_dice"] is None and 0 <= log[1]["val_dice"] <= 1
    config = json.loads((tmp_path / "runs/phantom-files/config.json").read_text())
    assert config["model"]["encoder_size"] == [64, 64] and config["parameters"]["total"][0] > 0
    assert last["sam"] == {"name": "tiny", "sha256": None} and last["epoch"] == 2


def test_interrupted_and_resumed_equals_uninterrupted_bit_by_bit(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = ["--epochs", "3", "--iterations", "2"]
    log, whole = run(root, tmp_path, "whole", *schedule)

    original, calls = train.train_epoch, []

    def fail_at_the_third(*args):
        calls.append(args[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train, "train_epoch", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path, "parts", *schedule)
    monkeypatch.setattr(train, "train_epoch", original)
    resumed_log, resumed = run(root, tmp_path, "parts", *schedule, "--resume")
    assert calls == [0, 1, 2] and losses(resumed_log) == losses(log)
    assert same(whole["state"], resumed["state"])


def test_loading_processes_do_not_change_the_run(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = ["--epochs", "1", "--iterations", "3"]
    log, alone = run(root, tmp_path, "w0", *schedule, "--workers", "0")
    other_log, helped = run(root, tmp_path, "w2", *schedule, "--workers", "2")
    assert losses(log) == losses(other_log) and same(alone["state"], helped["state"])


def test_two_processes_equal_one_with_the_same_global_batch(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = ["--epochs", "1", "--iterations", "3"]
    log, _ = run(root, tmp_path, "one", *schedule, "--batch", "2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += [str(REPOSITORY / "train.py"), "--data", "phantom", "--root", str(root), "--name", "two"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [*SMALL, *schedule, "--batch", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    other = [json.loads(line) for line in (tmp_path / "runs/phantom-two/log.jsonl").read_text().splitlines()]
    for key, value in losses(log)[0].items():
        # Float32 sums in another order, grown over three steps of AdamW, whose first step is the sign of the gradient.
        if not key.startswith("val"):
            assert other[0][key] == pytest.approx(value, rel=2e-3), key


def test_accumulated_batches_equal_one_large_batch_of_equal_slices(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse_arguments(["--accumulate", "3", "--batch", "2", "--epochs", "2", "--iterations", "5"])
    everything = sorted(train.patch_indices(0, args, 0, 2) + train.patch_indices(0, args, 1, 2))
    assert everything == list(range(2 * 5 * 3 * 2 * 2))
    assert train.patch_indices(4, args, 1, 2) == train.patch_indices(0, args, 1, 2)[4 * 3 * 2 :]


def test_the_rate_is_a_pure_function_of_the_step():
    args = train.parse_arguments(["--lr", "0.001", "--epochs", "10", "--iterations", "10"])
    assert train.learning_rate(0, args) == 0.001
    assert train.learning_rate(50, args) == pytest.approx(0.001 * 0.5**0.9)
    assert train.learning_rate(99, args) > 0
    args.warmup = 9
    assert train.learning_rate(0, args) == pytest.approx(0.0001)


def test_fp16_goes_through_the_scaler_and_bf16_trains(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nothing = metrics.summarize({"case": {"dice": np.full(3, np.nan)}}, ("background", "RV", "Myo", "LV"))
    monkeypatch.setattr(train, "validate", lambda *_: nothing)  # fp16 takes a CPU minutes for whole cases
    monkeypatch.setattr(train, "draw", lambda *_: None)
    for amp in ("fp16", "bf16"):
        smaller = ["--patch", "2", "32", "32", "--encoder", "32", "32", "--epochs", "1", "--iterations", "2"]
        log, last = run(root, tmp_path, amp, *smaller, "--amp", amp)
        assert log[0]["loss"] > 0 and bool(last["scaler"]) == (amp == "fp16")


def test_resuming_another_configuration_is_refused_with_the_difference(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(root, tmp_path, "first", "--epochs", "1", "--iterations", "1")
    with pytest.raises(SystemExit, match=r"num_queries 4 -> 6"):
        run(root, tmp_path, "first", "--epochs", "1", "--iterations", "1", "--queries", "6", "--resume")
    with pytest.raises(SystemExit, match=r"epochs 1 -> 2"):
        run(root, tmp_path, "first", "--epochs", "2", "--iterations", "1", "--resume")


def test_a_run_is_not_overwritten(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(root, tmp_path, "first", "--epochs", "1", "--iterations", "1")
    before = (tmp_path / "runs/phantom-first/last.pt").read_bytes()
    with pytest.raises(SystemExit, match="runs/phantom-first holds a run already: go on with --resume"):
        run(root, tmp_path, "first", "--epochs", "1", "--iterations", "1")
    assert (tmp_path / "runs/phantom-first/last.pt").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "acdc", "--root", "/nonexistent"], "(?s)/nonexistent.*patient001"),
        (["--resume", "--name", "never-run"], "last.pt: no such file"),
        (["--lr", "-1"], "lr is -1"),
        (["--encoder", "100", "64"], "encoder_size is .100, 64., expected 2 positive multiples of 16"),
        (["--sam", "tiny", "--sam-checkpoint", "x.pth"], "no pre-trained weights"),
        (["--sam", "vit_b", "--sam-checkpoint", "x.pth"], "x.pth: no such file"),
        (["--queries", "2"], "4 segments but the model has 2 queries"),
    ],
)
def test_bad_arguments_end_in_one_message(root, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    defaults = [] if "--data" in arguments else ["--data", "phantom", "--root", str(root)]
    with pytest.raises(SystemExit, match=message):
        train.main([*defaults, *SMALL, "--epochs", "1", "--iterations", "1", *arguments])
    assert not list(tmp_path.rglob("*.partial"))


# ------------------------------------------------------------------------------------------------- given boxes, compare


def test_a_run_with_given_boxes_is_named_scored_and_drawn_as_such(root, tmp_path, monkeypatch, capsys):
    """Boxes of the truth in training and evaluation, then another program's with the same checkpoint."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--epochs", "1", "--iterations", "2"]
    train.main(["--data", "phantom", "--root", str(root), "--name", "a", *SMALL, *arguments, "--prompts", "gt"])
    assert "Not automatic: the model was given the boxes of the truth." in capsys.readouterr().out
    checkpoint = ["--ckpt", "runs/phantom-a-boxes-gt/best.pt", "--amp", "off", "--no-mirror"]
    with pytest.raises(SystemExit, match="--prompts auto: runs/.*best.pt was trained for --prompts gt or DIR"):
        evaluate.main(checkpoint)
    results = evaluate.main([*checkpoint, "--prompts", "gt"])
    folder = tmp_path / "runs/phantom-a-boxes-gt/predictions-boxes-gt-val"
    assert json.loads((folder / "metrics-boxes-gt.json").read_text()) == results and results["prompts"] == "gt"
    log = [json.loads(line) for line in (folder.parent / "log.jsonl").read_text().splitlines()]
    assert log[-1]["val_dice"] == pytest.approx(results["mean"]["dice"])  # it was not mirrored either
    for case in layouts.find_data("phantom", str(root)).splits["val"]:
        truth, found = (nifti.read_label(str(f), 4)[0] for f in (case.label, folder / f"{case.name}.nii.gz"))
        for class_id in (1, 2, 3):
            lacking = ~(truth == class_id).any((1, 2))
            assert not (found == class_id)[lacking].any()
    rescored = evaluate.main(["--predictions", str(folder), "--data", "phantom", "--root", str(root)])
    assert rescored["prompts"] == "gt" and rescored["mean"] == results["mean"]
    assert not (folder / "metrics.json").exists()
    other = evaluate.main([*checkpoint, "--prompts", str(folder)])
    name = f"boxes-{folder.parent.name}_{folder.name}"
    assert (folder.parent / f"predictions-{name}-val" / f"metrics-{name}.json").is_file()
    assert other["prompts"] == str(folder)
    visualize.main(["sheet", "--predictions", str(folder), "--output", "sheet.png"])
    with pytest.raises(SystemExit, match="found a model that is given its boxes"):
        visualize.main(["queries", "--ckpt", checkpoint[1], "--case", case.name])


def test_an_automatic_run_takes_no_boxes(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(root, tmp_path, "auto", "--epochs", "1", "--iterations", "1")
    with pytest.raises(SystemExit, match="--prompts gt: .*best.pt was trained for --prompts auto"):
        evaluate.main(["--ckpt", "runs/phantom-auto/best.pt", "--prompts", "gt"])


def test_segments_without_a_box_of_the_other_program_are_not_asked_for(root, tmp_path, monkeypatch):
    """The other program sees nothing at all: only the background is matched, and the loss stays that of one class."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "net"
    folder.mkdir()
    for cases in layouts.find_data("phantom", str(root)).splits.values():
        for case in cases:  # of the test split too: files of other cases do not matter
            label = nib.load(case.label)
            nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), folder / f"{case.name}.nii.gz")
    train.main(["--data", "phantom", "--root", str(root), *SMALL, "--epochs", "1", "--iterations", "2", "--name", "n",
                "--prompts", str(folder)])  # fmt: skip
    (log,) = (tmp_path / "runs").glob("phantom-n-boxes-*/log.jsonl")
    entry = json.loads(log.read_text().splitlines()[-1])
    assert entry["loss_class"] < 5 and entry["val_dice"] == 0


def test_runs_that_differ_in_their_seed_alone_are_one_row(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dice = {}
    for variant, seed in (("b1", 0), ("b1", 1), ("b9", 0)):
        schedule = ["--epochs", "2", "--iterations", "1", "--variant", variant, "--seed", str(seed)]
        log, _ = run(root, tmp_path, f"{variant}-{seed}", *schedule)
        dice[variant, seed] = max(entry["val_dice"] for entry in log if entry["val_dice"] is not None)
    capsys.readouterr()
    evaluate.main(["--compare", *map(str, sorted((tmp_path / "runs").iterdir()))])
    header, *lines, note = capsys.readouterr().out.splitlines()
    assert header.split()[:7] == ["variant", "trained", "M", "seeds", "Dice", "lowest", "highest"]
    b1, b9 = (line.split() for line in lines)
    assert b1[0] == "b1" and b1[2] == "2" and b9[0] == "b9" and b9[2] == "1"
    pair = sorted((dice["b1", 0], dice["b1", 1]))
    assert [float(cell) for cell in b1[3:6]] == pytest.approx([sum(pair) / 2, *pair], abs=1e-4)
    assert "without mirroring" in note
    log = tmp_path / "runs/phantom-b9-0/log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text(json.dumps(lines[-1] | {"epoch": 1}) + "\n")
    evaluate.main(["--compare", "runs/phantom-b1-0", "runs/phantom-b9-0"])
    assert "Not finished: runs/phantom-b9-0 (1 of 2 epochs).\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere: found FileNotFoundError.*expected a validated run"):
        evaluate.main(["--compare", "nowhere"])
