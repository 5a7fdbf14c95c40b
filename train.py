"""Train MaskSAM: one loop for one process or many, CPU or GPU (paper 3).

    python train.py                                             the phantom, `tiny`, some minutes on two cores
    python train.py --data acdc --root DIR                      the paper's ACDC run on one GPU
    torchrun --nproc_per_node=8 train.py --data acdc            the same on eight
    python train.py --data acdc --sam lite_medsam               on a laptop, with a light pre-trained backbone
    python train.py --data DIR --sam tiny                       any folder with a dataset.json
    python train.py --data acdc --resume                        go on where runs/acdc-vit_b/last.pt stands

`--data` brings patch, queries, epochs and rates (the presets of data.py); every one of them can be given here. A run
writes runs/<data>-<name>/: best.pt and last.pt (what trains, without a frozen SAM), config.json, log.jsonl, curves.png,
overlay.png.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
from matcher import SetCriterion
from model import VARIANTS, MaskSAMConfig, build_model, checkpoint_content, count_parameters, load_trained_state
from support import layouts, metrics, nifti, pictures
from support.checkpoints import read_checkpoint, write_checkpoint
from support.files import AMP_TYPES, default_amp, default_device, default_workers, write_text
from support.presets import LIGHT_SCALES, PRESETS, Preset, recipe
from support.sam import BACKBONES

# ------------------------------------------------------------------------------------------------------------ arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; None stands for the preset's or the recipe's value and is filled in by `resolve`."""
    presets = "Presets: " + ", ".join(PRESETS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=presets)
    add = parser.add_argument
    add("--data", default="phantom", help="preset name, or a folder with a dataset.json (default: %(default)s)")
    add("--root", help="where a preset's files lie (default: data/<preset>)")
    add("--fold", type=int, help="0 to 4 of five-fold cross-validation (default: the published split, else 0)")
    add("--cache", default="cache", help="where prepared cases are kept (default: %(default)s)")
    add("--name", help="the run is written to runs/<data>-<name> (default: the backbone's name)")
    add("--sam", choices=BACKBONES, help="backbone (default: the preset's)")
    add("--sam-checkpoint", help="SAM's own weights, if not to be downloaded")
    add("--variant", choices=VARIANTS, default="b9", help="row of table 4 (default: %(default)s, the whole model)")
    add("--prompts", default="auto", metavar="auto|gt|DIR", help="boxes of the model's making, or given ones: of "
        "the truth, or of another program's label maps of all cases (default: %(default)s)")  # fmt: skip
    add("--mask-prompt", choices=("logits", "binary"), default="logits", help="form of SAM's mask prompt")
    add("--patch", type=int, nargs=3, metavar=("D", "H", "W"), dest="patch_size", help="patch in voxels")
    add("--encoder", type=int, nargs=2, metavar=("H", "W"), dest="encoder_size", help="size that SAM sees")
    add("--queries", type=int, dest="num_queries", help="N")
    add("--epochs", type=int)
    add("--iterations", type=int, help="optimizer steps an epoch")
    add("--batch", type=int, dest="batch_size", help="patches per process and step")
    add("--accumulate", type=int, default=1, help="batches per optimizer step (default: %(default)s)")
    add("--lr", type=float, help="first rate of the poly schedule")
    add("--warmup", type=int, default=0, help="steps of linear warm-up before it (default: %(default)s)")
    add("--weight-decay", type=float)
    add("--adam-eps", type=float)
    add("--clip", type=float, help="largest gradient norm")
    add("--mask-weight", type=float, help="of the final masks' BCE and Dice, in cost and loss")
    add("--amp", choices=AMP_TYPES, help="autocast type (default: bf16 where the device has it, else fp16 or off)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute encoder blocks in backward")
    add("--compile", action="store_true", help="torch.compile the network: one graph; slow to start, for GPUs")
    add("--workers", type=int, help="loading processes (default: 4 beside a GPU, else 0)")
    add("--val-every", type=int, help="epochs between validations (default: a tenth of all, 2 or more)")
    add("--seed", type=int, default=0)
    add("--device", help="default: cuda if there is one")
    add("--resume", action="store_true", help="go on from last.pt of this run")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace, preset: Preset) -> None:
    """Fill in what the user left open, in place."""
    args.sam = args.sam or preset.sam
    defaults = dataclasses.asdict(recipe(preset, args.sam))
    for name, value in vars(args).items():
        if value is None and name in defaults:
            setattr(args, name, defaults[name])
    args.name = args.name or (args.sam if args.fold is None else f"{args.sam}-fold{args.fold}")
    args.name += layouts.prompts_name(args.prompts)  # no run with given boxes may pass for an automatic one
    args.device = args.device or default_device()
    on_gpu = args.device.startswith("cuda")
    if args.amp is None:
        args.amp = default_amp(args.device)
    if args.checkpointing is None:  # Ours: the light ones are small enough to keep their activations
        args.checkpointing = args.sam not in LIGHT_SCALES
    args.workers = (4 if on_gpu else 0) if args.workers is None else args.workers
    args.val_every = args.val_every or max(2, args.epochs // 10)
    for name in ("epochs", "iterations", "batch_size", "accumulate", "lr", "clip"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.split('_')[0]} is {getattr(args, name)}, expected more than 0")


# ------------------------------------------------------------------------------------------------------ pieces of a run


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Poly schedule (1 - t)^0.9 of the authors, behind an optional linear warm-up: a pure function of the step."""
    total = args.epochs * args.iterations
    warm = min(1.0, (step + 1) / (args.warmup + 1))
    return args.lr * warm * (1 - step / total) ** 0.9


def patch_indices(step: int, args: argparse.Namespace, rank: int, world: int) -> list[int]:
    """Which patches a rank sees from `step` on. All ranks together see 0, 1, 2, ... in order, in any number."""
    steps = range(step * args.accumulate, args.epochs * args.iterations * args.accumulate)
    return [(batch * world + rank) * args.batch_size + i for batch in steps for i in range(args.batch_size)]


def git_commit() -> str | None:
    """Commit of this code, with a plus where files have changed since; None outside a repository."""
    run = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        return commit + ("+" if subprocess.run(["git", "diff", "--quiet", "HEAD"], **run).returncode else "") or None
    return None


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in GiB: of the GPU's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def print_parameters(model: nn.Module) -> dict:
    """Table 5 for this model: what trains and what is frozen, by component."""
    counts = count_parameters(model)
    counts["total"] = tuple(map(sum, zip(*counts.values())))
    print(f"{'parameters':24s}{'trainable':>14s}{'frozen':>14s}")
    for component, (trainable, frozen) in counts.items():
        print(f"{component:24s}{trainable:14,d}{frozen:14,d}")
    return counts


def validate(model: nn.Module, cases, plan, cache, args, device, rank: int, world: int, mirror_axes=()) -> dict:
    """Score whole cases on their native grid, shared out over the ranks. Every rank returns the same results."""
    model.eval()
    options = {"device": device, "amp": args.amp, "mirror_axes": mirror_axes}
    scores = {
        case.name: evaluate.score_case(model, case, data.load_cached(case, plan, cache), **options)
        for case in tqdm(cases[rank::world], desc="validation", leave=False, disable=rank > 0)
    }
    model.train()
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, scores)
        scores = {name: score for part in parts for name, score in part.items()}
    return metrics.summarize({case.name: scores[case.name] for case in cases}, plan.labels)


# ------------------------------------------------------------------------------------------------------------- the loop


def resume(path: Path, model, optimizer, scaler, args, plan, world: int) -> tuple[int, float]:
    """Load last.pt into the run's objects; raises ValueError where it belongs to another configuration.

    Returns:
        The first epoch still to train and the best validation Dice so far.
    """
    content = read_checkpoint(path)
    before = content["config"] | content["plan"] | content["schedule"]
    now = dataclasses.asdict(model.config) | plan.as_dict() | schedule(args, world)
    differing = [f"{k} {before.get(k)} -> {now.get(k)}" for k in before | now if before.get(k) != now.get(k)]
    if differing:
        raise ValueError(f"{path} belongs to another configuration ({'; '.join(differing)}): choose another --name")
    load_trained_state(model, content["state"], path)
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    return content["epoch"], content["best"]


def schedule(args: argparse.Namespace, world: int) -> dict:
    """What a resumed run must share with the first one, beside model and data, to be the same run."""
    names = ("epochs", "iterations", "batch_size", "accumulate", "lr", "warmup", "weight_decay", "clip", "amp", "seed",
             "prompts")  # fmt: skip
    return {name: getattr(args, name) for name in names} | {"processes": world}


def train_epoch(epoch: int, batches, model, criterion, optimizer, scaler, args, device, rank: int) -> dict:
    """One epoch of `--iterations` optimizer steps; returns the means of what is logged."""
    sums: dict[str, float] = {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = range(epoch * args.iterations, (epoch + 1) * args.iterations)
    bar = tqdm(steps, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=rank > 0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        step_values: dict[str, torch.Tensor] = {}
        for micro in range(args.accumulate):
            volume, labels = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            last = micro == args.accumulate - 1
            with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                with torch.autocast(device.type, AMP_TYPES[args.amp], enabled=args.amp != "off"):
                    outputs = model(volume)
                segments = data.label_map_to_segments(labels.flatten(0, 1), args.num_classes)
                if args.prompts != "auto":  # a segment that no box points at is not asked for
                    prompts = volume[:, -1].flatten(0, 1)
                    asked = data.label_map_to_segments(prompts, args.num_classes).present
                    asked[:, 0] = True
                    segments = segments._replace(present=segments.present & asked)
                loss, terms = criterion(outputs, segments)
                scaler.scale(loss / args.accumulate).backward()
            for name, value in ({"loss": loss.detach()} | {f"loss_{key}": term for key, term in terms.items()}).items():
                step_values[name] = step_values.get(name, 0) + value / args.accumulate
        scaler.unscale_(optimizer)
        step_values["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        values = torch.stack([value.float() for value in step_values.values()])
        if dist.is_initialized():
            dist.all_reduce(values)
            values = values / dist.get_world_size()
        values = dict(zip(step_values, values.tolist()))
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{learning_rate(step, args):.1e}")
    return {name: value / args.iterations for name, value in sums.items()} | {"lr": learning_rate(steps[-1], args)}


def open_data(args: argparse.Namespace, rank: int, world: int) -> tuple[layouts.DataSource, data.Plan, Path]:
    """Find the cases and prepare them, rank 0 first; returns them with their plan and the folder of their cache."""
    source = layouts.find_data(args.data, args.root, args.fold)
    for split in ("train", "val"):
        if not source.splits.get(split):
            found = ", ".join(source.splits)
            raise ValueError(f"{source.root}: found no case of the {split} split, only of {found}")
    splits = {name: layouts.give_prompts(source.splits[name], args.prompts) for name in ("train", "val")}
    source = dataclasses.replace(source, splits=source.splits | splits)
    cache = Path(args.cache) / source.name
    if world > 1:  # preparing a large set takes longer than the usual ten minutes that processes wait for each other
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    if rank == 0:
        plan = data.prepare(source, cache, default_workers())
    if world > 1:
        dist.barrier(patient)
        plan = plan if rank == 0 else data.prepare(source, cache)  # finds everything done
    return source, plan, cache


def begin_log(run: Path, start: int, model: nn.Module, plan: data.Plan, sam: dict, facts: dict) -> None:
    """Print and store the resolved configuration with the parameters of table 5; keep the log of `start` epochs."""
    run.mkdir(parents=True, exist_ok=True)
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    resolved = {"model": dataclasses.asdict(model.config), "plan": plan.as_dict(), "sam": sam, "command": command}
    print(json.dumps(resolved | facts, indent=1))
    write_text(run / "config.json", json.dumps(resolved | facts | {"parameters": print_parameters(model)}, indent=1))
    log_lines = (run / "log.jsonl").read_text().splitlines()[:start] if start else []
    write_text(run / "log.jsonl", "".join(line + "\n" for line in log_lines))


def train(args: argparse.Namespace, rank: int, local_rank: int, world: int) -> dict:
    """Run the whole training; returns the results of the best checkpoint on the validation cases."""
    source, plan, cache = open_data(args, rank, world)
    resolve(args, PRESETS.get(args.data) or data.default_preset(source, plan, cache))
    args.num_classes = len(plan.labels)
    device = torch.device(args.device if ":" in args.device or args.device == "cpu" else f"{args.device}:{local_rank}")

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config = MaskSAMConfig(
        args.sam, args.variant, len(plan.channels), args.num_classes, args.num_queries,
        tuple(args.patch_size), tuple(args.encoder_size), args.mask_prompt,
        "auto" if args.prompts == "auto" else "boxes",
    )  # fmt: skip
    model, sam = build_model(config, args.sam_checkpoint)
    model.to(device).gradient_checkpointing = args.checkpointing
    if args.compile:
        model.compile()
    criterion = SetCriterion({"mask_bce": args.mask_weight, "mask_dice": args.mask_weight})
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.lr, weight_decay=args.weight_decay, eps=args.adam_eps, fused=True,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    run = Path("runs") / f"{source.name}-{args.name}"
    start, best = 0, -1.0
    if args.resume:
        start, best = resume(run / "last.pt", model, optimizer, scaler, args, plan, world)
    elif (run / "last.pt").exists():
        raise ValueError(f"{run} holds a run already: go on with --resume, choose another --name, or delete it")
    facts = {"arguments": vars(args), "schedule": schedule(args, world), "commit": git_commit()}
    if rank == 0:
        begin_log(run, start, model, plan, sam, facts)

    dataset = data.PatchDataset(
        source.splits["train"], plan, cache, config.patch_size,
        length=args.epochs * args.iterations * args.accumulate * args.batch_size * world, seed=args.seed,
    )  # fmt: skip
    batches = iter(
        DataLoader(
            dataset,
            args.batch_size,
            sampler=patch_indices(start * args.iterations, args, rank, world),
            num_workers=args.workers,
            pin_memory=device.type == "cuda",
            drop_last=False,
        )  # fmt: skip
    )
    wrapped = DistributedDataParallel(model, [local_rank] if device.type == "cuda" else None) if world > 1 else model
    validation_cases = source.splits["val"]
    began = time.time()
    for epoch in range(start, args.epochs):
        epoch_began = time.time()
        entry = train_epoch(epoch, batches, wrapped.train(), criterion, optimizer, scaler, args, device, rank)
        entry = {"epoch": epoch + 1} | entry | {"seconds": time.time() - epoch_began, "val_dice": None}
        if (epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs:
            results = validate(model, validation_cases, plan, cache, args, device, rank, world)
            # Validation cases without any object have no Dice; 0 lets the run keep a checkpoint all the same.
            per_class = {label: values["dice"] for label, values in results["per_class"].items()}
            entry |= {"val_dice": results["mean"]["dice"] or 0.0, "val_dice_per_class": per_class}
        if rank == 0:
            entry |= {"gib": peak_memory(device), "seconds_with_validation": time.time() - epoch_began}
            state = {"epoch": epoch + 1, "metrics": {"val_dice": entry["val_dice"]}} | facts
            if entry["val_dice"] is not None and entry["val_dice"] > best:
                best = entry["val_dice"]
                write_checkpoint(run / "best.pt", checkpoint_content(model, sam, plan.as_dict()) | state)
            with open(run / "log.jsonl", "a") as log:
                log.write(json.dumps(entry) + "\n")
            resumable = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "best": best}
            write_checkpoint(run / "last.pt", checkpoint_content(model, sam, plan.as_dict()) | state | resumable)
            dice = "" if entry["val_dice"] is None else f"  validation Dice {entry['val_dice']:.4f}"
            left = (time.time() - began) / (epoch + 1 - start) * (args.epochs - epoch - 1) / 60
            tqdm.write(
                f"epoch {epoch + 1}/{args.epochs}  loss {entry['loss']:.4f}  rate {entry['lr']:.1e}  "
                f"{entry['seconds']:.0f} s  {entry['gib']:.1f} GiB  {left:.0f} min left{dice}"
            )
    if world > 1:
        dist.barrier()
    load_trained_state(model, read_checkpoint(run / "best.pt")["state"], run / "best.pt")
    # As evaluate.py does by default: mirrored, which validation while training has no time for.
    results = validate(model, validation_cases, plan, cache, args, device, rank, world, plan.flip_axes)
    if rank == 0:
        metrics.print_table(results | {"prompts": args.prompts})
        draw(run, model, validation_cases, plan, cache, args, device)
    return results


def draw(run: Path, model, cases, plan, cache, args, device) -> None:
    """curves.png, and overlay.png with three validation cases from all over the list."""
    pictures.draw_curves(run / "log.jsonl", run / "curves.png")
    shown = []
    for case in cases[:: max(1, len(cases) // 3)][:3]:
        prepared = data.load_cached(case, plan, cache)
        options = {"device": device, "amp": args.amp, "mirror_axes": plan.flip_axes}
        prediction = evaluate.predict_case([model.eval()], [prepared], **options)
        image, truth = nifti.read_image(case.images[0])[0], nifti.read_label(case.label, len(plan.labels))[0]
        title = case.name + ("" if args.prompts == "auto" else f", boxes of {args.prompts}")
        shown.append((title, image, truth, prediction, prepared.geometry.spacing))
    pictures.draw_overlay(shown, plan.labels, run / "overlay.png")
    print(f"wrote {run}/best.pt, last.pt, config.json, log.jsonl, curves.png, overlay.png")


def main(argv: list[str] | None = None) -> None:
    """Set up the processes that torchrun started, or the one there is, and train."""
    args = parse_arguments(argv)
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        on_gpu = torch.cuda.is_available() and args.device != "cpu"
        if on_gpu:
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        train(args, rank, local_rank, world)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from error
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
