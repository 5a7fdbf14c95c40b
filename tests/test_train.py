"""The loop: pure schedules, resuming, processes, the files of a run, and its messages."""

import dataclasses
import json
import os
import signal
import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import evaluate
import train
from support import layouts, metrics, nifti, phantom
from support.presets import PRESETS
from support.sam import resample_position_embedding
from volumes import refuses, save

SMALL = "--sam tiny --patch 2 32 32 --encoder 32 32 --queries 4 --amp off --lr 1e-3".split()
SMALL += "--val-every 2 --val-cases 2 --optimizer muon".split()
SCHEDULE = ["--epochs", "3", "--iterations", "2"]
SHIPPED = Path(__file__).parents[1] / "checkpoints/hippocampus-tiny.pt"
SHORT = ["--epochs", "1", "--iterations", "2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A phantom of five patients, in its middle two slices with every second voxel: one window per case."""
    path = tmp_path_factory.mktemp("phantom")
    phantom.write_phantom(path, num_patients=5, seed=1)
    for file in path.rglob("*.nii.gz"):
        volume = np.asarray(nib.load(file).dataobj)
        x, y, z = (n // 2 for n in volume.shape)
        part = volume[x - 32 : x + 32 : 2, y - 32 : y + 32 : 2, z - 1 : z + 1]
        save(file, part, np.diag([3, 3, 8, 1]))
    return path


def run(root: Path, name: str, *more: str) -> tuple[list[dict], dict]:
    """Train in the working directory; return the log and the content of last.pt."""
    train.main(["--root", str(root), "--name", name, *SMALL, *more])
    (folder,) = Path("runs").glob(f"phantom-{name}*")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return log, torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> tuple[Path, list[dict], dict]:
    """An uninterrupted run: its working directory, log and last checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, *run(root, "whole", *SCHEDULE)


@pytest.fixture
def quick(monkeypatch) -> None:
    """Runs without pictures."""
    monkeypatch.setattr(train, "draw", lambda run: None)


def losses(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key.startswith(("loss", "grad", "lr", "val"))}


def test_a_run_leaves_what_the_header_lists(whole):
    folder, log, last = whole[0] / "runs/phantom-whole", *whole[1:]
    names = {path.name for path in folder.iterdir()}
    assert names == {"best.pt", "last.pt", "config.json", "log.jsonl", "lock", "curves.png", "overlay.png"}
    assert all(name in train.__doc__ for name in names)
    terms = "class no_object mask_bce mask_dice aux_mask_bce aux_mask_dice box_l1 box_giou".split()
    assert {*(f"loss_{term}" for term in terms), "grad_norm", "lr", "seconds", "gib"} <= log[0].keys()
    assert log[0]["val_dice"] is None and log[0]["skipped"] == 0
    assert all(0 <= log[i]["val_dice"] <= 1 for i in (1, 2))
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["encoder_size"] == [32, 32] and config["schedule"]["clip"] == 12  # of the preset
    assert last["sam"] == {"name": "tiny", "sha256": None} and last["epoch"] == 3
    assert {len(last["cases"]["train"]), len(last["cases"]["val"])} == {6, 2}
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["metrics"]["val_dice"] == max(entry["val_dice"] for entry in log[1:])


# Where a run is stopped, and by which signal, or by an error -> the steps in last.pt
STOPS = {("train_step", 0): 2, ("train_step", 15): 3, ("predict_case", 2): 4, ("write_checkpoint", 0): 4}


@pytest.mark.parametrize("where, number", STOPS)
def test_stopped_and_resumed_equals_uninterrupted_bit_by_bit(root, whole, quick, monkeypatch, where, number):
    """Inside the second epoch, in its validation, and with its best.pt and its line of the log written."""
    module = evaluate if where == "predict_case" else train
    original, calls = getattr(module, where), []

    def fail_once(*args, **options):
        calls.append(1)
        if len(calls) == {"train_step": 3, "predict_case": 1, "write_checkpoint": 4}[where]:
            if not number:
                raise RuntimeError("a power cut")
            os.kill(os.getpid(), number)
        return original(*args, **options)

    monkeypatch.setattr(module, where, fail_once)
    more = [] if number else ["--workers", "2"]  # They change nothing either.
    with pytest.raises(SystemExit) as end:
        run(root, "parts", *SCHEDULE, *more, "--resume")  # There is nothing yet.
    assert end.value.code == 128 + number if number else "a power cut" in end.value.code
    steps = torch.load("runs/phantom-parts/last.pt", weights_only=True)["step"]
    assert steps == STOPS[where, number]
    log, last = run(root, "parts", *SCHEDULE, *more, "--resume")
    again = 2 * (log[1]["val_dice"] >= log[2]["val_dice"])  # The best is not the last: it is predicted again.
    often = {"train_step": 7 - bool(number), "predict_case": 5 + again, "write_checkpoint": 10 - again // 2}
    assert len(calls) == often[where]
    assert [*map(losses, log)] == [*map(losses, whole[1])]
    assert all(torch.equal(value, last["state"][key]) for key, value in whole[2]["state"].items())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_resumed_run_may_get_more_epochs(root, quick, capsys):
    short, content = run(root, "longer", *SHORT)
    content["plan"]["decisions"] = ["The same in other words."]
    del content["config"]["volumetric"], content["schedule"]["augment"]  # Runs of older code have neither.
    torch.save(content, "runs/phantom-longer/last.pt")
    log, last = run(root, "longer", *SHORT, "--epochs", "2", "--resume")
    assert log[:1] == short and last["step"] == 4
    assert log[1]["lr"] == pytest.approx(1e-3 * (1 - 3 / 4) ** 0.9)
    assert "to 2 epochs; from here on the rate is that of 2 epochs" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    ("--queries 6 --resume", "last.pt: found another configuration .*num_queries 4 -> 6"),
    ("--epochs 2 --resume", "epochs 3 -> 2"),
    ("--fine-masks --volumetric --resume", "fine_masks False -> True; volumetric False -> True"),
    ("", "runs/phantom-whole: found a run; use --resume, choose another --name"),
])  # fmt: skip
def test_wrong_arguments_end_in_one_message_and_change_no_file(root, whole, monkeypatch, change, message):
    monkeypatch.chdir(whole[0])
    before = Path("runs/phantom-whole/last.pt").read_bytes()
    refuses(message, run, root, "whole", *SCHEDULE, *change.split())
    assert Path("runs/phantom-whole/last.pt").read_bytes() == before


@pytest.mark.parametrize("change, message", [
    ("--queries 3", "num_queries is 3, expected 4 to 1024"),
    ("--encoder 50 48", "encoder_size is .50, 48., expected 2 positive multiples of 16"),
    ("--init gone.pt", "gone.pt: found no such file"),
    (f"--init {SHIPPED}", f"--init {SHIPPED}: found the backbone tiny_pyramid, expected tiny as in --sam"),
    ("--sam vit_b --sam-checkpoint gone.pth", "gone.pth: no such file"),
    (f"--sam mobile_sam --sam-checkpoint {SHIPPED}", f"{SHIPPED} does not hold SAM mobile_sam"),
])  # fmt: skip
def test_wrong_sizes_and_files_are_found_before_cases_are_prepared(root, monkeypatch, change, message):
    monkeypatch.setattr(train.data, "prepare", None)
    refuses(message, run, root, "none", *SCHEDULE, *change.split())


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_many_end_the_run(root, quick, monkeypatch):
    original, poisoned = torch.nn.utils.clip_grad_norm_, {2}

    def clip(parameters, norm):
        calls.append(1)
        if len(calls) in poisoned:
            parameters[0].grad[:] = torch.inf
        return original(parameters, norm)

    calls = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    (entry,), last = run(root, "one", *SHORT)
    (alone,), other = run(root, "alone", *SHORT)
    assert (entry["skipped"], alone["skipped"]) == (1, 0) and np.isfinite(entry["loss"])
    assert entry["loss"] != alone["loss"] and all(v.isfinite().all() for v in last["state"].values())
    poisoned, calls[:] = range(20), []
    with pytest.raises(SystemExit, match="step 10: found numbers .* not finite in grad_norm for 10 steps"):
        run(root, "many", "--epochs", "2", "--iterations", "9")
    log = [json.loads(line) for line in Path("runs/phantom-many/log.jsonl").read_text().splitlines()]
    assert [entry["skipped"] for entry in log] == [9] and np.isnan(log[0]["loss"])


def test_init_loads_what_fits_and_names_the_rest(root, whole, quick, capsys):
    content = torch.load(whole[0] / "runs/phantom-whole/best.pt", weights_only=True)
    content["state"]["spare.weight"] = torch.zeros(2)
    torch.save(content, "more.pt")
    sizes = "--patch 1 16 16 --encoder 48 48".split()
    more = [*SHORT, *sizes, "--queries", "6", "--init", "more.pt", "--lr", "1e-30"]  # so that nothing moves
    _, last = run(root, "init", *more)
    old, new = content["state"], last["state"]
    positions = "sam.image_encoder.pos_embed"
    old[positions] = resample_position_embedding(old[positions], new[positions].shape[1:3])
    fits = {key for key in new if key in old and new[key].shape == old[key].shape}
    assert positions in fits and len(fits) < len(new)
    assert all(torch.allclose(old[key], new[key], 0, 1e-20) for key in fits)
    printed = capsys.readouterr().out
    assert f"{len(fits)} of {len(new)} tensors fit\n          new: " in printed
    for kind, rest in (("new", new.keys() - fits), ("not used", old.keys() - fits)):
        line, parts = printed.split(f"{kind}: ")[1].splitlines()[0], [key.split(".")[0] for key in rest]
        assert parts and all(f"{part} ({parts.count(part)})" in line for part in parts)
    assert json.loads(Path("runs/phantom-init/config.json").read_text())["arguments"]["init"] == "more.pt"


def test_a_validation_costs_at_most_a_tenth_of_the_training(root, quick):
    """Mirroring goes first, then overlap, then cases. A volume of 2 x 32 x 32 has 9 windows of 16 x 16."""
    args = train.parse_arguments(["--root", str(root), *SMALL, *SHORT, "--patch", "2", "16", "16"])
    planned = train.Run(args, train.processes.Processes())
    names = [case.name for case in planned.source.splits["val"]]
    table = {240: (2, 0.5, (1, 2)), 239: (2, 0.5, ()), 59: (2, 0.0, ()), 20: (1, 0.0, ())}
    for patches, expected in table.items():
        found = train.plan_validation(planned, patches, None, None, (1, 2))
        assert (len(found[0]), *found[1:]) == expected, patches
    cases, overlap, _ = train.plan_validation(planned, 1, 2, 0.5)
    assert [case.name for case in cases] == names and overlap == 0.5  # as the user says
    assert train.plan_validation(planned, 30, 1)[1] == 0.5  # one case costs half


def test_the_validation_dice_is_the_mean_over_the_scored_classes(root, quick, monkeypatch):
    task = dataclasses.replace(PRESETS["phantom"].task, scored=(2,))
    monkeypatch.setitem(PRESETS, "phantom", dataclasses.replace(PRESETS["phantom"], task=task))
    monkeypatch.setattr(metrics, "dice_per_class", lambda *_: np.array([0.1, 0.5, 0.6]))
    (entry,), _ = run(root, "scored", *SHORT)
    assert entry["val_dice"] == 0.5 and entry["val_dice_per_class"] == {"RV": 0.1, "Myo": 0.5, "LV": 0.6}


def test_two_processes_equal_one_with_the_default_settings(root, quick, monkeypatch):
    preset = dataclasses.replace(PRESETS["phantom"], sam="tiny")  # two patches in a batch, as in the paper
    monkeypatch.setitem(PRESETS, "phantom", preset)
    (one,), _ = run(root, "one", *SHORT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    original = train.train_step

    def train_one_half(rank: int, *more: str) -> None:
        os.environ |= world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
        if rank == 1 and not more:  # A signal for one of them stops both in the same step.
            train.train_step = lambda run: (os.kill(os.getpid(), signal.SIGUSR1), original(run))[1]
        train.main(["--root", str(root), "--name", "two", *SMALL, *SHORT, *more])

    context = torch.multiprocessing.start_processes(train_one_half, (), 2, False, start_method="fork")
    for process in context.processes:
        process.join()
    assert [process.exitcode for process in context.processes] == [128 + signal.SIGUSR1] * 2
    torch.multiprocessing.start_processes(train_one_half, ("--resume",), 2, start_method="fork")
    other = json.loads(Path("runs/phantom-two/log.jsonl").read_text())
    for key in losses(one).keys() - {"val_dice", "val_dice_per_class"}:
        # Float32 sums in another order, and AdamW, whose first step is the sign of the gradient.
        assert other[key] == pytest.approx(one[key], rel=2e-3), key


@pytest.mark.parametrize("world, batch, expected", [(2, 0, 2), (3, 0, 3), (8, 0, 8), (4, 8, 8), (1, 3, 3)])
def test_processes_share_a_batch_and_that_of_a_preset_grows_to_a_patch_each(world, batch, expected, capsys):
    args, group = train.parse_arguments(["--batch", str(batch)] * (batch > 0)), train.processes.Processes
    train.resolve(args, PRESETS["acdc"], group(world=world))
    assert args.batch_size == expected
    assert ("raised to" in capsys.readouterr().out) == (not batch and expected > 2)
    with pytest.raises(ValueError, match="--batch: found .*, expected a multiple of the 7 processes"):
        train.resolve(args, PRESETS["acdc"], group(world=7))


def test_patches_and_rate_are_pure_functions_of_the_step():
    args = train.parse_arguments("--accumulate 3 --batch 4 --epochs 2 --iterations 5 --lr 0.001".split())
    ranks = [train.patch_indices(0, args, rank, 2) for rank in (0, 1)]
    assert sorted(sum(ranks, [])) == list(range(2 * 5 * 3 * 2 * 2))
    assert ranks[0][:4] == [0, 1, 4, 5]  # batch by batch: as many processes as you like, in the same order
    assert train.patch_indices(4, args, 1, 2) == ranks[1][4 * 3 * 2 :]
    assert [train.learning_rate(n, args) for n in (0, 5)] == pytest.approx([0.001, 0.001 * 0.5**0.9])


def test_accumulated_batches_add_up_to_a_large_batch(root, quick, monkeypatch):
    """The first step sees the same patches. The loss is a mean per batch, so it is near and not equal."""
    nothing = metrics.summarize({"case": {"dice": np.full(3, np.nan)}}, ("background", "RV", "Myo", "LV"))
    monkeypatch.setattr(train, "validate", lambda *_: nothing)
    (large,), _ = run(root, "large", *SHORT, "--iterations", "1", "--batch", "2")
    (added,), _ = run(root, "added", *SHORT, "--iterations", "1", "--accumulate", "2", "--batch", "1")
    assert added["loss"] == pytest.approx(large["loss"], rel=0.1)
    assert added["grad_norm"] == pytest.approx(large["grad_norm"], rel=0.3)
    assert added["val_dice"] == 0 and Path("runs/phantom-added/best.pt").is_file()  # no object, no Dice


def test_a_run_with_given_boxes_is_named_scored_and_written_as_such(root, whole, quick, capsys):
    """Boxes of the truth in training and evaluation, then those of another program for the checkpoint."""
    with pytest.raises(SystemExit, match="--prompts: found gt, expected auto, as .*best.pt was trained"):
        evaluate.main(["--ckpt", str(whole[0] / "runs/phantom-whole/best.pt"), "--prompts", "gt"])
    (entry,), _ = run(root, "a", *SHORT, "--prompts", "gt")
    assert "Not automatic: the model was given the boxes of the truth." in capsys.readouterr().out
    folder = Path("runs/phantom-a-boxes-gt/predictions-boxes-gt-val")
    checkpoint = ["--ckpt", str(folder.parent / "best.pt"), "--amp", "off", "--no-mirror"]
    refuses("--prompts: found auto, expected gt or a folder, as runs/.*best.pt", evaluate.main, checkpoint)
    results = evaluate.main([*checkpoint, "--prompts", "gt"])
    assert json.loads((folder / "metrics-boxes-gt.json").read_text()) == results | {"prompts": "gt"}
    assert entry["val_dice"] == pytest.approx(results["mean"]["dice"])  # It was not mirrored either.
    for case in layouts.find_data("phantom", str(root)).splits["val"]:
        truth, found = (nifti.read_label(str(f), 4)[0] for f in (case.label, folder / f"{case.name}.nii.gz"))
        for class_id in (1, 2, 3):
            assert not (found == class_id)[~(truth == class_id).any((1, 2))].any()
    other = evaluate.main([*checkpoint, "--prompts", str(folder)])
    assert other["prompts"] == str(folder)
    assert len([*folder.parent.glob("predictions-boxes-phantom*-val/metrics-boxes-phantom*.json")]) == 1


def test_segments_without_a_box_of_the_other_program_are_not_asked_for(root, quick):
    """The other program sees nothing: only the background is matched, and the loss is that of one class."""
    for case in sum(layouts.find_data("phantom", str(root)).splits.values(), ()):
        save(f"net/{case.name}.nii.gz", np.zeros((32, 32, 2), np.uint8), nib.load(case.label).affine)
    (entry,), _ = run(root, "n", *SHORT, "--prompts", "net")
    assert entry["loss_class"] < 5 and entry["val_dice"] == 0
