"""Train MaskSAM with one process or several, on GPUs or a CPU (paper 3).

    training cases ── PatchDataset ──> patches ── MaskSAM ── SetCriterion ── optimizer ──> last.pt
    validation cases ── evaluate.predict_case ──> Dice, and with the best Dice so far ──> best.pt

    python train.py                                         the phantom, some minutes on two cores
    python train.py --data acdc --root DIR                  ACDC with SAM's ViT-B on one GPU
    torchrun --nproc_per_node=8 train.py --data acdc        on eight GPUs, which share each batch
    python train.py --data DIR --sam mobile_sam             any folder with a dataset.json; a light SAM
    torchrun --max-restarts=3 train.py --resume             go on from last.pt, also after crashes
    python train.py --data DIR --init FILE                  start from a checkpoint of another data set

A preset of support/presets.py gives sizes and schedule; options replace single values. A run writes best.pt,
last.pt, config.json, log.jsonl, lock, curves.png and overlay.png to runs/<data>-<name>/. On SIGTERM, SIGINT
or SIGUSR1 it finishes the step, writes last.pt, and ends with the status 128 + number of the signal.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import model
from matcher import SetCriterion
from support import files, layouts, metrics, nifti, processes
from support.checkpoints import OTHER_TYPES, read_checkpoint, write_checkpoint
from support.muon import Muon
from support.presets import PRESETS, Preset, folder_preset, recipe
from support.sam import BACKBONES, find_sam_file, load_sam, resample_position_embedding, store_frozen

MAX_SKIPPED = 10  # Ours: steps in a row whose numbers are not finite, before the run stops
# Settings that must not change when a run is resumed, besides the model and the plan of the data. Only the
# number of epochs may grow: the rate of the next step is then that of the longer schedule.
SCHEDULE = ("epochs", "iterations", "batch_size", "accumulate", "lr", "weight_decay", "adam_eps", "clip")
SCHEDULE += ("mask_weight", "amp", "seed", "prompts", "optimizer", "augment")
# Ours: both. Release: SGD with Nesterov momentum 0.99 for ACDC and Synapse, AdamW for AMOS.
OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. None stands for a value of the preset, which `resolve` fills in."""
    options = "data root fold group modality flip cache sam-checkpoint prompts device"
    parser = files.make_parser(__doc__, f"{options} patch encoder queries batch amp", data="phantom")
    add, count, index = parser.add_argument, files.count, files.index
    add("--name", help="the run is written to runs/<data>-<name> (default: the backbone's name)")
    add("--sam", choices=BACKBONES, help="backbone (default: that of the preset)")
    add("--variant", choices=model.VARIANTS, default="b9", help="row of table 4 (default: b9, the model)")
    add("--mask-prompt", choices=("logits", "binary"), default="logits", help="form of SAM's mask prompt")
    add("--epochs", type=count, help="number of epochs")
    add("--iterations", type=count, help="optimizer steps per epoch")
    add("--accumulate", type=count, default=1, help="batches per optimizer step (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, help="muon learns faster from random weights")
    add("--lr", type=files.number(float), help="learning rate of the first step")
    add("--augment", type=files.number(float, zero=True), help="factor of the probabilities of augmentations")
    add("--fine-masks", action=argparse.BooleanOptionalAction, help="masks of the patch's size")
    add("--volumetric", action=argparse.BooleanOptionalAction, help="more convolutions in 3-D")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute blocks to save memory")
    add("--workers", type=index, help="processes that load patches (default: 4 with a GPU, else 0)")
    add("--val-every", type=count, help="epochs between validations (default: a tenth of all, at least 2)")
    add("--val-cases", type=count, help="validation cases while training (default: for a tenth of its time)")
    add("--val-overlap", type=files.share, help="overlap of their windows (default: for a tenth of its time)")
    add("--seed", type=index, default=0, help="seed of the weights and the patches (default: %(default)s)")
    add("--resume", action="store_true", help="continue from last.pt of this run, if there is one")
    add("--init", metavar="FILE", help="checkpoint whose tensors are loaded first, if they fit")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace, preset: Preset, group: processes.Processes) -> None:
    """Fill in, in place, the values that the command line left open. ValueError: --batch cannot be shared.

    Ours: processes share a batch, so that their number changes nothing. A preset's batch grows if it must.
    """
    args.sam, given = args.sam or preset.sam, args.batch_size
    args.device = args.device or files.default_device()
    for name, value in vars(recipe(preset, args.sam, args.device)).items():
        if name not in ("task", "home", "tree") and getattr(args, name, None) is None:
            setattr(args, name, value)
    args.name = args.name or (args.sam if args.fold is None else f"{args.sam}-fold{args.fold}")
    args.name += layouts.box_source_suffix(args.prompts)  # The name says that a run is not automatic.
    args.amp = args.amp or files.default_amp(args.device)
    args.workers = (4 if args.device.startswith("cuda") else 0) if args.workers is None else args.workers
    if args.val_every is None:
        args.val_every = max(2, args.epochs // 10)  # Ours
    if missing := -args.batch_size % group.world:
        if given:
            raise ValueError(f"--batch: found {given}, expected a multiple of the {group.world} processes")
        args.batch_size += missing
        if group.rank == 0:
            print(f"batch     raised to {args.batch_size} patches, an equal share for each process")


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate of a step. Release: the poly schedule with the exponent 0.9."""
    return args.lr * (1 - step / (args.epochs * args.iterations)) ** 0.9


def patch_indices(step: int, args: argparse.Namespace, rank: int, world: int) -> list[int]:
    """Return the numbers of the patches of a process, from a step on. All processes share 0, 1, 2, ... ."""
    batches = range(step * args.accumulate, args.epochs * args.iterations * args.accumulate)
    share = args.batch_size // world
    return [batch * args.batch_size + rank * share + i for batch in batches for i in range(share)]


class Run:
    """One process of a training, with the data, the network and the optimizer."""

    def __init__(self, args: argparse.Namespace, group: processes.Processes):
        self.args, self.group, self.rank, self.world = args, group, group.rank, group.world
        self.source, self.plan, self.cache = open_data(args, group)
        cases = self.source.splits["train"]
        self.cases = {split: [case.name for case in self.source.splits[split]] for split in ("train", "val")}
        shapes = data.cached_shapes(cases, self.plan, self.cache)
        resolve(args, PRESETS.get(args.data) or folder_preset(self.plan.task, shapes, args.sam), group)
        self.share = args.batch_size // self.world  # patches of this process in a batch
        self.device = torch.device(f"cuda:{group.local_rank}" if args.device == "cuda" else args.device)
        self.folder = Path("runs") / f"{self.source.name}-{args.name}"
        if not args.resume and (self.folder / "last.pt").exists():
            raise ValueError(f"{self.folder}: found a run; use --resume, choose another --name, or delete it")
        self.lock = processes.lock(self.folder) if self.rank == 0 else None
        self.build_network()
        patches = args.iterations * args.accumulate * args.batch_size  # of an epoch
        self.validation = plan_validation(self, patches * args.val_every, args.val_cases, args.val_overlap)
        everything = len(self.source.splits["val"]), None, self.plan.task.flip_axes
        self.last_validation = plan_validation(self, patches * args.epochs, *everything)
        schedule = {name: getattr(args, name) for name in SCHEDULE}
        self.settings = {"arguments": vars(args), "schedule": schedule, "commit": git_commit()}
        self.epoch = self.step = self.skipped = 0  # epochs and steps done, steps skipped in a row
        self.best, self.sums, self.elapsed = -1.0, {}, 0.0  # best Dice; sums and seconds of the epoch so far
        self.shown: dict[str, np.ndarray] = {}  # label maps of the last validation, for the pictures
        if not resume(self) and args.init:
            start_from(self)
        how = args.patch_size, args.epochs * patches, args.seed, args.augment
        patches = data.PatchDataset(cases, self.plan, self.cache, *how)
        options = {"num_workers": args.workers, "pin_memory": self.device.type == "cuda"}
        options |= {"worker_init_fn": processes.ignore_signals}
        indices = patch_indices(self.step, args, self.rank, self.world)
        self.batches = iter(DataLoader(patches, self.share, sampler=indices, **options))
        self.wrapped = self.model if self.world == 1 else DDP(self.model, broadcast_buffers=False)
        self.first_step, self.start = self.step, time.time()

    def build_network(self) -> None:
        """Build the network from the seed, its loss and its optimizer."""
        args, task = self.args, self.plan.task
        torch.manual_seed(args.seed)
        if args.amp == "off":  # TF32 for all products; under autocast float32 parts stay exact
            torch.set_float32_matmul_precision("high")
        sizes = {"patch_size": tuple(args.patch_size), "encoder_size": tuple(args.encoder_size)}
        sizes |= {"num_channels": len(task.channels), "num_classes": len(task.labels)}
        sizes |= {name: getattr(args, name) for name in ("num_queries", "fine_masks", "volumetric")}
        prompts = {"mask_prompt": args.mask_prompt, "given_boxes": args.prompts != "auto"}
        config = model.MaskSAMConfig(args.sam, args.variant, **sizes, **prompts)
        self.model, self.sam = model.build_model(config, args.sam_checkpoint)
        self.model.to(self.device)
        store_frozen(self.model.sam, files.AMP_TYPES[args.amp])
        if args.checkpointing is None:
            memory = files.total_memory(self.device)
            args.checkpointing = processes.needs_checkpointing(self.model, self.share, args.amp, memory)
        self.model.gradient_checkpointing = args.checkpointing
        self.criterion = SetCriterion({"mask_bce": args.mask_weight, "mask_dice": args.mask_weight})
        trained = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        rates = {"lr": args.lr, "weight_decay": args.weight_decay, "eps": args.adam_eps}
        self.optimizer = OPTIMIZERS[args.optimizer](trained, **rates, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")


def plan_validation(run: Run, patches: int, number=None, overlap=None, flips=()) -> tuple:
    """Choose a validation that costs at most a tenth of the training on this many patches.

    Ours: a patch costs about three predictions, a forward pass and a backward pass of two. If the whole costs
    more, mirroring is left out first, then windows overlap less, and then cases are left out, evenly.
    Returns: the cases, the overlap of windows, the axes of mirrored predictions.
    """
    cases, patch, budget = run.source.splits["val"], run.args.patch_size, 0.1 * 3 * patches
    shapes = data.cached_shapes(cases, run.plan, run.cache)
    choices = [(0.5, flips), (0.5, ()), (0.25, ()), (0.0, ())] if overlap is None else [(overlap, flips)]
    for overlap, flips in choices:
        starts = ([evaluate.window_starts(max(n, p), p, overlap) for n, p in zip(s, patch)] for s in shapes)
        windows = 2 ** len(flips) * sum(math.prod(map(len, each)) for each in starts)
        if windows * min(number or len(cases), len(cases)) / len(cases) <= budget:
            break
    number = min(number or max(1, int(len(cases) * min(1, budget / windows))), len(cases))
    return tuple(cases[i * len(cases) // number] for i in range(number)), overlap, flips


def open_data(args: argparse.Namespace, group: processes.Processes) -> tuple:
    """Find the cases and prepare them, first in process 0. Return the data set, its plan and their cache."""
    where = args.data, args.root, args.fold, args.group, args.modality, args.flip
    source, names = layouts.find_data(*where), ("train", "val")
    if absent := [name for name in names if not source.splits.get(name)]:
        raise ValueError(f"{source.root}: found no {absent[0]} cases, only {', '.join(source.splits)}")
    splits = {name: layouts.with_box_source(source.splits[name], args.prompts) for name in names}
    source = dataclasses.replace(source, splits=source.splits | splits)
    cache = Path(args.cache) / source.name

    def prepare() -> data.Plan:
        # Missing files and impossible sizes are found before hours of preparing.
        sam, classes = args.sam or getattr(PRESETS.get(args.data), "sam", Preset.sam), len(source.task.labels)
        if (path := find_sam_file(sam, args.sam_checkpoint)) and args.sam_checkpoint:
            load_sam(BACKBONES[sam].build(), sam, path, (64, 64))
        given = {n: vars(args)[n] for n in ("patch_size", "encoder_size", "num_queries") if vars(args)[n]}
        model.MaskSAMConfig(sam, num_classes=classes, **({"num_queries": classes} | given))
        if args.init and (found := read_checkpoint(args.init)["config"]["sam"]) != sam:
            raise ValueError(f"--init {args.init}: found the backbone {found}, expected {sam} as in --sam")
        return data.prepare(source, cache, files.default_workers())

    plan = group.from_first(prepare)
    return source, plan if group.rank == 0 else prepare(), cache  # Another machine may have its own cache.


def resume(run: Run) -> bool:
    """Load last.pt into a run, if there is one, and say whether. ValueError: a fixed setting has changed."""
    path, keys = run.folder / "last.pt", OTHER_TYPES.keys()
    content = run.group.from_first(lambda: read_checkpoint(path, keys) if path.exists() else None)
    if content is None:
        return False
    old = {"optimizer": "adamw", "augment": 1.0, "fine_masks": False, "volumetric": False}  # of older code
    old |= content["config"] | content["plan"] | content["schedule"]
    new = dataclasses.asdict(run.model.config) | run.plan.as_dict() | run.settings["schedule"]
    if (epochs := new["epochs"]) > old.get("epochs", epochs):
        if run.group.rank == 0:
            print(f"extends   {path} to {epochs} epochs; from here on the rate is that of {epochs} epochs")
        old["epochs"] = epochs
    keys = sorted((old | new).keys() - {"decisions"})  # The plan's sentences may be worded anew.
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    changed += [f"other {split} cases" for split in run.cases if run.cases[split] != content["cases"][split]]
    if changed:
        raise ValueError(f"{path}: found another configuration ({'; '.join(changed)}); use another --name")
    model.load_trained_state(run.model, content["state"], path)
    try:
        run.optimizer.load_state_dict(content["optimizer"])
        run.scaler.load_state_dict(content["scaler"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: found a state of another optimizer") from error
    run.best, run.sums, run.elapsed = content["best"], content["sums"], content["elapsed"]
    run.epoch, run.step = content["epoch"], content["step"]
    return True


def start_from(run: Run) -> None:
    """Load the tensors of --init that fit by name and shape, and count the others by component."""
    path = run.args.init
    content, own = run.group.from_first(lambda: read_checkpoint(path)), model.trained_state(run.model)
    state, positions = content["state"], "sam.image_encoder.pos_embed"
    if positions in own.keys() & state.keys():  # of another size of the encoder's input
        state[positions] = resample_position_embedding(state[positions], own[positions].shape[1:3])
    fits = {key for key in own.keys() & state.keys() if own[key].shape == state[key].shape}
    run.model.load_state_dict({key: state[key] for key in fits}, strict=False)
    text = f"init      {path}: {len(fits)} of {len(own)} tensors fit"
    for kind, names in {"new": own.keys() - fits, "not used": state.keys() - fits}.items():
        parts = collections.Counter(name.split(".")[0] for name in sorted(names))
        text += f"\n          {kind}: {', '.join(f'{part} ({n})' for part, n in parts.items()) or 'none'}"
    if run.rank == 0:
        print(text)


def train(args: argparse.Namespace, group: processes.Processes) -> dict:
    """Run a whole training. Return `metrics.summarize` of the best checkpoint on the validation cases."""
    run = Run(args, group)
    if run.rank == 0:
        begin_log(run)
    with processes.catch_signals() as run.signals:
        while run.epoch < args.epochs:
            began = time.time() - run.elapsed
            entry = train_epoch(run, began)
            run.elapsed = time.time() - began
            entry |= {"seconds": run.elapsed, "val_dice": None}
            if (run.epoch + 1) % args.val_every == 0 or run.epoch + 1 == args.epochs:
                save(run)  # After a signal only the validation is repeated.
                results = validate(run, *run.validation)
                per_class = {label: values["dice"] for label, values in results["per_class"].items()}
                # Cases without any object have no Dice; with 0 there is a best checkpoint all the same.
                entry |= {"val_dice": results["mean"]["dice"] or 0.0, "val_dice_per_class": per_class}
            run.epoch, run.sums, run.elapsed = run.epoch + 1, {}, 0.0
            end_epoch(run, entry | {"seconds_with_validation": time.time() - began})
        best = run.folder / "best.pt"  # It may lie on another machine.
        content = group.from_first(lambda: read_checkpoint(best))
        model.load_trained_state(run.model, content["state"], best)
        if not run.shown or content["epoch"] < args.epochs or run.validation != run.last_validation:
            results = validate(run, *run.last_validation)
    if run.rank == 0:
        metrics.print_table(results | {"prompts": args.prompts})
        draw(run)
    return results


def train_epoch(run: Run, began: float) -> dict:
    """Train to the end of the epoch, from `run.step` on, and add the values of `train_step` to `run.sums`.

    Returns: their means over the steps that were not skipped, the epoch, and the last rate.
    """
    args, first = run.args, run.epoch * run.args.iterations
    run.wrapped.train()
    bar = {"desc": f"epoch {run.epoch + 1}/{args.epochs}", "leave": False, "disable": run.rank > 0}
    bar |= {"initial": run.step - first, "total": args.iterations}
    for step in (bar := tqdm(range(run.step, first + args.iterations), **bar)):
        run.optimizer.param_groups[0]["lr"] = rate = learning_rate(step, args)
        values, stopped = train_step(run)
        run.step = step + 1
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        run.skipped = run.skipped + 1 if wrong else 0
        if run.skipped == MAX_SKIPPED:
            found = f"found numbers that are not finite in {', '.join(wrong)} for {run.skipped} steps"
            raise ValueError(f"step {run.step}: {found} in a row; lower --lr, or use --amp bf16 or off")
        for name, value in ({"skipped": 1.0} if wrong else values).items():
            run.sums[name] = run.sums.get(name, 0.0) + value
        bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{rate:.1e}")
        if stopped:
            run.elapsed = time.time() - began
            stop(run)
    skipped = int(run.sums.get("skipped", 0))
    means = {name: value / max(1, args.iterations - skipped) for name, value in run.sums.items()}
    rest = {"skipped": skipped, "epoch": run.epoch + 1, "lr": learning_rate(run.step - 1, args)}
    return {"loss": math.nan} | means | rest


def train_step(run: Run) -> tuple[dict[str, float], bool]:
    """Take one optimizer step, unless a number is not finite in one of the processes.

    Returns: loss, terms and gradient norm, averaged over the processes; whether one of them got a signal.
    """
    args, sums = run.args, {}
    for micro in range(args.accumulate):
        # volume (B, C, D, H, W), labels (B, D, H, W)
        volume, labels = (tensor.to(run.device, non_blocking=True) for tensor in next(run.batches))
        # The processes exchange their gradients only after the last batch of a step.
        waits = run.world > 1 and micro < args.accumulate - 1
        with run.wrapped.no_sync() if waits else contextlib.nullcontext():
            with files.autocast(run.device, args.amp):
                outputs = run.wrapped(volume)
            # (B, D, H, W) -> (S, H, W) -> per slice a mask, a class and a box for each segment
            segments = data.label_map_to_segments(labels.flatten(0, 1), len(run.plan.task.labels))
            loss, terms = run.criterion(outputs, segments)  # in float32
            run.scaler.scale(loss / args.accumulate).backward()
        terms = {"loss": loss.detach()} | {f"loss_{name}": term for name, term in terms.items()}
        sums = {name: sums.get(name, 0) + term / args.accumulate for name, term in terms.items()}
    run.scaler.unscale_(run.optimizer)
    # Release: the norm of the gradient is at most 12.
    sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.optimizer.param_groups[0]["params"], args.clip)
    sums["stop"] = torch.full((), bool(run.signals.number), device=run.device)
    values = torch.stack([value.float() for value in sums.values()])  # one copy from the device per step
    if run.world > 1:
        dist.all_reduce(values)
        values = values / run.world
    values = dict(zip(sums, values.tolist()))
    stopped = values.pop("stop") > 0
    if all(map(math.isfinite, values.values())):  # All processes see the same values.
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return values, stopped


def stop(run: Run) -> None:
    """Write last.pt and end all processes, with the status that shells give to a signal."""
    numbers = [number for number in run.group.gather(run.signals.number) if number]
    if run.epoch < run.args.epochs:  # At the end the model is the best one, and last.pt is written.
        save(run)
    run.batches = None  # ends the processes that load patches
    if run.rank == 0:
        name, path = signal.Signals(numbers[0]).name, run.folder / "last.pt"
        tqdm.write(f"{name}: stopped after step {run.step}, {path} is written; --resume goes on from there")
    if run.world > 1:
        dist.barrier(run.group.gloo)  # Nobody ends before the file is whole.
        dist.destroy_process_group()
    raise SystemExit(128 + numbers[0])


def validate(run: Run, cases: Sequence[layouts.Case], overlap: float, flips: Sequence[int]) -> dict:
    """Return `metrics.summarize` of validation cases, and keep three label maps from all over the list."""
    scores, task, shown = {}, run.plan.task, cases[:: max(1, len(cases) // 3)][:3]
    options = {"mirror_axes": flips, "overlap": overlap, "batch_size": run.share}
    run.model.eval()
    run.shown = {}
    for case in tqdm(cases[run.rank :: run.world], "validation", leave=False, disable=run.rank > 0):
        prepared = data.load_cached(case, run.plan, run.cache)
        label_map = evaluate.predict_case([run.model], [prepared], run.device, run.args.amp, **options)
        truth, _ = nifti.read_label(case.label, len(task.labels), prepared.geometry)
        scores[case.name] = {"dice": metrics.dice_per_class(label_map, truth, len(task.labels))}
        run.shown |= {case.name: label_map} if case in shown else {}
        if run.signals.number:
            break
    parts = run.group.gather((scores, run.shown, run.signals.number))
    if any(number for *_, number in parts):
        stop(run)
    scores, run.shown = ({k: v for part in parts for k, v in part[i].items()} for i in (0, 1))
    return metrics.summarize({case.name: scores[case.name] for case in cases}, task.labels, task.scored)


def begin_log(run: Run) -> None:
    """Print a run's settings in five lines, write all to config.json, and keep the log of the epochs done."""
    args, config, splits, (cases, overlap, _) = run.args, run.model.config, run.source.splits, run.validation
    counts = model.count_parameters(run.model)
    counts["total"] = trained, frozen = tuple(map(sum, zip(*counts.values())))  # table 5
    patch, encoder = (" x ".join(map(str, size)) for size in (config.patch_size, config.encoder_size))
    more = (", fine masks" if config.fine_masks else "") + (", volumetric" if config.volumetric else "")
    print(
        f"data      {run.source.name} in {run.source.root}, {config.num_classes} classes, "
        f"{len(splits['train'])} training cases, {len(cases)} of {len(splits['val'])} "
        f"validation cases (overlap {overlap:g}) every {args.val_every} epochs\n"
        f"model     {config.sam}, {config.variant}, {trained:,} trained and {frozen:,} frozen parameters\n"
        f"sizes     patch {patch}, encoder {encoder}, {config.num_queries} queries{more}\n"
        f"schedule  {args.epochs} x {args.iterations} steps of {args.accumulate} x {args.batch_size} patches "
        f"on {run.world} x {run.device}, amp {args.amp}, {args.optimizer} at {args.lr:g}\n"
        f"output    {run.folder}, where config.json has all settings"
    )
    content = {"model": dataclasses.asdict(config), "plan": run.plan.as_dict(), "sam": run.sam}
    content |= {"command": shlex.join([Path(sys.executable).name, *sys.argv]), "parameters": counts}
    files.write_text(run.folder / "config.json", json.dumps(content | run.settings, indent=1))
    log = run.folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if run.epoch else []
    files.write_text(log, "".join(lines[: run.epoch]))


def save(run: Run, dice: float | None = None) -> None:
    """Write last.pt in process 0, and best.pt if the validation Dice is the best so far (Ours)."""
    if run.rank > 0:
        return
    content = model.checkpoint_content(run.model, run.sam, run.plan.as_dict()) | run.settings
    content |= {"cases": run.cases, "epoch": run.epoch, "metrics": {"val_dice": dice}}
    if dice is not None and dice > run.best:
        run.best = dice
        write_checkpoint(run.folder / "best.pt", content)
    content |= {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "best": run.best}
    content |= {"step": run.step, "sums": run.sums, "elapsed": run.elapsed}
    write_checkpoint(run.folder / "last.pt", content)


def end_epoch(run: Run, entry: dict) -> None:
    """Write a line of log.jsonl and the checkpoints, and print some of the values."""
    if run.rank > 0:
        return
    dice, total = entry["val_dice"], run.args.epochs * run.args.iterations
    entry["gib"] = processes.peak_memory(run.device) / 2**30
    with open(run.folder / "log.jsonl", "a") as log:
        log.write(json.dumps(entry) + "\n")
    save(run, dice)
    minutes = (time.time() - run.start) / max(1, run.step - run.first_step) * (total - run.step) / 60
    line = f"epoch {run.epoch}/{run.args.epochs}  loss {entry['loss']:.4f}  rate {entry['lr']:.1e}"
    line += f"  {entry['seconds']:.0f} s  {entry['gib']:.1f} GiB  {minutes:.0f} min left"
    line += f"  {skipped} steps skipped" if (skipped := entry["skipped"]) else ""
    tqdm.write(line if dice is None else f"{line}  validation Dice {dice:.4f}")
    if dice is not None:
        draw(run)


def draw(run: Run) -> None:
    """Draw curves.png, and overlay.png with three cases from all over the list of the last validation."""
    from support import pictures  # takes seconds to import

    pictures.draw_curves(run.folder / "log.jsonl", run.folder / "curves.png")
    task, shown = run.plan.task, []
    for case in (case for case in run.source.splits["val"] if case.name in run.shown):
        image, place = nifti.read_image(case.images[0])
        truth, _ = nifti.read_label(case.label, len(task.labels), place)
        title = case.name + ("" if run.args.prompts == "auto" else f", boxes of {run.args.prompts}")
        maps = image[0], truth, run.shown[case.name]
        shown.append(pictures.Picture(title, *maps, place.spacing, pictures.sides_of(place.frame)))
    pictures.draw_overlay(shown, task.labels, run.folder / "overlay.png")


def git_commit() -> str | None:
    """Return the commit of this code, with a "+" if files have changed since; None outside a repository."""
    command = "git describe --always --abbrev=40 --exclude=* --dirty=+".split()
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() or None


def main(argv: list[str] | None = None) -> None:
    """Train in this process, or in all the processes that torchrun started."""
    args = parse_arguments(argv)
    rank = os.environ.get("RANK")
    with files.one_sentence("train.py" if rank is None else f"train.py, process {rank}", args.debug):
        group = processes.join(args.device)
        (record(train) if group.world > 1 else train)(args, group)  # torchrun prints what was recorded
    if group.world > 1:  # After an error NCCL would wait here for the other processes.
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
