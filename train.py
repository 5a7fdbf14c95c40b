"""Train MaskSAM with one process or several, on GPUs or a CPU (paper 3).

    training cases ── PatchDataset ──> patches ── MaskSAM ── SetCriterion ── AdamW ──> last.pt
    validation cases ── evaluate.score_case ──> Dice, and with the best Dice so far ──> best.pt

    python train.py                                         the phantom, some minutes on two cores
    python train.py --data acdc --root DIR                  ACDC with SAM's ViT-B on one GPU
    torchrun --nproc_per_node=8 train.py --data acdc        on eight GPUs: eight times the batch, another run
    python train.py --data DIR --sam lite_medsam            any folder with a dataset.json, on a laptop
    python train.py --data acdc --resume                    continue runs/acdc-vit_b/last.pt

A preset of support/presets.py gives sizes and schedule; options replace single values. A run writes best.pt,
last.pt, config.json, log.jsonl, curves.png and overlay.png to runs/<data>-<name>/.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import contextlib
import dataclasses
import datetime
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import evaluate
import model
from matcher import SetCriterion
from support import files, layouts, metrics, nifti
from support.checkpoints import read_checkpoint, write_checkpoint
from support.presets import LIGHT_SCALES, PRESETS, Preset, folder_preset, recipe
from support.sam import BACKBONES

# Settings that must not change when a run is resumed, besides the model and the plan of the data.
SCHEDULE = ("epochs", "iterations", "batch_size", "accumulate", "lr", "weight_decay", "adam_eps", "clip")
SCHEDULE += ("mask_weight", "amp", "seed", "prompts")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. None stands for a value of the preset, which `resolve` fills in."""
    common = "data root fold cache sam-checkpoint prompts device".split()
    parser = files.make_parser(__doc__, *common, data="phantom")
    add = parser.add_argument
    add("--name", help="the run is written to runs/<data>-<name> (default: the backbone's name)")
    add("--sam", choices=BACKBONES, help="backbone (default: that of the preset)")
    add("--variant", choices=model.VARIANTS, default="b9", help="row of table 4 (default: b9, the model)")
    add("--mask-prompt", choices=("logits", "binary"), default="logits", help="form of SAM's mask prompt")
    add("--patch", type=int, nargs=3, metavar=("D", "H", "W"), dest="patch_size", help="patch in voxels")
    add("--encoder", type=int, nargs=2, metavar=("H", "W"), dest="encoder_size", help="SAM's input in pixels")
    add("--queries", type=int, dest="num_queries", help="number N of queries")
    add("--epochs", type=int, help="number of epochs")
    add("--iterations", type=int, help="optimizer steps per epoch")
    add("--batch", type=int, dest="batch_size", help="patches per process and batch")
    add("--accumulate", type=int, default=1, help="batches per optimizer step (default: %(default)s)")
    add("--lr", type=float, help="learning rate of the first step")
    add("--amp", choices=files.AMP_TYPES, help="autocast type (default: what the hardware has)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute blocks to save memory")
    add("--compile", action="store_true", help="compile the network: slow to start, faster steps on a GPU")
    add("--workers", type=int, help="processes that load patches (default: 4 with a GPU, else 0)")
    add("--val-every", type=int, help="epochs between validations (default: a tenth of all, at least 2)")
    add("--seed", type=int, default=0, help="seed of the weights and the patches (default: %(default)s)")
    add("--resume", action="store_true", help="continue from last.pt of this run")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace, preset: Preset) -> None:
    """Fill in, in place, all values that the command line left open. ValueError: one must be positive."""
    args.sam = args.sam or preset.sam
    for name, value in vars(recipe(preset, args.sam)).items():
        if name not in ("task", "home", "tree") and getattr(args, name, None) is None:
            setattr(args, name, value)
    args.name = args.name or (args.sam if args.fold is None else f"{args.sam}-fold{args.fold}")
    args.name += layouts.box_source_suffix(args.prompts)  # The name says that a run is not automatic.
    args.device = args.device or files.default_device()
    args.amp = args.amp or files.default_amp(args.device)
    if args.checkpointing is None:  # Ours: the light backbones keep their activations, which are small.
        args.checkpointing = args.sam not in LIGHT_SCALES
    args.workers = (4 if args.device.startswith("cuda") else 0) if args.workers is None else args.workers
    args.val_every = args.val_every or max(2, args.epochs // 10)  # Ours
    for name in ("epochs", "iterations", "batch_size", "accumulate", "lr"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.split('_')[0]}: found {getattr(args, name)}, expected more than 0")


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Return the learning rate of a step. Release: the poly schedule with the exponent 0.9."""
    return args.lr * (1 - step / (args.epochs * args.iterations)) ** 0.9


def patch_indices(step: int, args: argparse.Namespace, rank: int, world: int) -> list[int]:
    """Return the numbers of the patches of a process, from a step on. All processes share 0, 1, 2, ... ."""
    batches = range(step * args.accumulate, args.epochs * args.iterations * args.accumulate)
    return [(batch * world + rank) * args.batch_size + i for batch in batches for i in range(args.batch_size)]


@dataclasses.dataclass
class Run:
    """One process of a training, with the data, the network and the optimizer."""

    args: argparse.Namespace  # the command line; `resolve` fills in its open values
    rank: int  # number of this process among all
    local_rank: int  # number of this process, and of its GPU, on this machine
    world: int  # number of processes

    def __post_init__(self):
        args, world = self.args, self.world
        self.source, self.plan, self.cache = open_data(args, self.rank, world)
        cases = self.source.splits["train"]
        shapes = data.cached_shapes(cases, self.plan, self.cache)
        resolve(args, PRESETS.get(args.data) or folder_preset(self.plan.task, shapes))
        self.device = torch.device(f"cuda:{self.local_rank}" if args.device == "cuda" else args.device)
        self.folder = Path("runs") / f"{self.source.name}-{args.name}"
        self.build_network()
        schedule = {name: getattr(args, name) for name in SCHEDULE} | {"processes": world}
        self.settings = {"arguments": vars(args), "schedule": schedule, "commit": git_commit()}
        self.first_epoch, self.best, self.start = 0, -1.0, time.time()  # epochs done, best validation Dice
        if args.resume:
            resume(self)
        elif (self.folder / "last.pt").exists():
            raise ValueError(f"{self.folder}: found a run; use --resume, choose another --name, or delete it")
        length = args.epochs * args.iterations * args.accumulate * args.batch_size * world
        patches = data.PatchDataset(cases, self.plan, self.cache, args.patch_size, length, args.seed)
        indices = patch_indices(self.first_epoch * args.iterations, args, self.rank, world)
        options = {"num_workers": args.workers, "pin_memory": self.device.type == "cuda"}
        self.batches = iter(DataLoader(patches, args.batch_size, sampler=indices, **options))
        gpus = [self.local_rank] if self.device.type == "cuda" else None
        # DDP averages the gradients of the processes.
        self.wrapped = self.model if world == 1 else DDP(self.model, gpus, broadcast_buffers=False)

    def build_network(self) -> None:
        """Build the network from the seed, its loss and its optimizer."""
        args, task = self.args, self.plan.task
        torch.manual_seed(args.seed)
        if args.amp == "off":  # TF32 for all products; under autocast float32 parts stay exact
            torch.set_float32_matmul_precision("high")
        sizes = {"patch_size": tuple(args.patch_size), "encoder_size": tuple(args.encoder_size)}
        sizes |= {"num_channels": len(task.channels), "num_classes": len(task.labels)}
        prompts = {"mask_prompt": args.mask_prompt, "given_boxes": args.prompts != "auto"}
        config = model.MaskSAMConfig(args.sam, args.variant, num_queries=args.num_queries, **sizes, **prompts)
        self.model, self.sam = model.build_model(config, args.sam_checkpoint)
        self.model.to(self.device).gradient_checkpointing = args.checkpointing
        if args.compile:
            self.model.compile()
        self.criterion = SetCriterion({"mask_bce": args.mask_weight, "mask_dice": args.mask_weight})
        # Ours: AdamW. Release: SGD with Nesterov momentum 0.99 for ACDC and Synapse, AdamW for AMOS.
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        rates = {"lr": args.lr, "weight_decay": args.weight_decay, "eps": args.adam_eps}
        self.optimizer = torch.optim.AdamW(trained, **rates, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")


def open_data(args: argparse.Namespace, rank: int, world: int) -> tuple[layouts.DataSource, data.Plan, Path]:
    """Find the cases and prepare them, first in rank 0. Return the data set, its plan and their cache."""
    source, splits = layouts.find_data(args.data, args.root, args.fold), {}
    for name in ("train", "val"):
        if not source.splits.get(name):
            raise ValueError(f"{source.root}: found no {name} cases, only {', '.join(source.splits)}")
        splits[name] = layouts.with_box_source(source.splits[name], args.prompts)
    source = dataclasses.replace(source, splits=source.splits | splits)
    cache = Path(args.cache) / source.name
    if world > 1:  # Preparing a large set may take the others longer than the usual limit of ten minutes.
        patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
        if rank == 0:
            data.prepare(source, cache, files.default_workers())
        dist.barrier(patient)  # From here on everything is prepared.
    return source, data.prepare(source, cache, files.default_workers()), cache


def resume(run: Run) -> None:
    """Load last.pt into a run. Raises ValueError if a setting that must not change has changed."""
    content = read_checkpoint(path := run.folder / "last.pt")
    old = content["config"] | content["plan"] | content["schedule"]
    new = dataclasses.asdict(run.model.config) | run.plan.as_dict() | run.settings["schedule"]
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]
    if changed:
        raise ValueError(f"{path}: found another configuration ({'; '.join(changed)}); use another --name")
    model.load_trained_state(run.model, content["state"], path)
    run.optimizer.load_state_dict(content["optimizer"])
    run.scaler.load_state_dict(content["scaler"])
    run.first_epoch, run.best = content["epoch"], content["best"]


def train(args: argparse.Namespace, rank: int, local_rank: int, world: int) -> dict:
    """Run a whole training. Return `metrics.summarize` of the best checkpoint on the validation cases."""
    run = Run(args, rank, local_rank, world)
    if rank == 0:
        begin_log(run)
    for epoch in range(run.first_epoch, args.epochs):
        began = time.time()
        entry = train_epoch(run, epoch) | {"seconds": time.time() - began, "val_dice": None}
        if (epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs:
            results = validate(run)
            per_class = {label: values["dice"] for label, values in results["per_class"].items()}
            # Cases without any object have no Dice; with 0 there is a best checkpoint all the same.
            entry |= {"val_dice": results["mean"]["dice"] or 0.0, "val_dice_per_class": per_class}
        if rank == 0:
            save(run, entry | {"seconds_with_validation": time.time() - began})
    if world > 1:
        dist.barrier()
    best = run.folder / "best.pt"
    model.load_trained_state(run.model, read_checkpoint(best)["state"], best)
    # evaluate.py averages mirrored predictions by default; the validation during training has no time for it.
    results = validate(run, run.plan.task.flip_axes)
    if rank == 0:
        metrics.print_table(results | {"prompts": args.prompts})
        draw(run)
    return results


def train_epoch(run: Run, epoch: int) -> dict[str, float]:
    """Train for one epoch. Return the means of `train_step`, the number of epochs, and the last rate."""
    args, sums = run.args, {}
    run.wrapped.train()
    steps = range(epoch * args.iterations, (epoch + 1) * args.iterations)
    bar = tqdm(steps, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=run.rank > 0)
    for step in bar:
        run.optimizer.param_groups[0]["lr"] = rate = learning_rate(step, args)
        values = train_step(run)
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{rate:.1e}")
    return {name: value / args.iterations for name, value in sums.items()} | {"epoch": epoch + 1, "lr": rate}


def train_step(run: Run) -> dict[str, float]:
    """Take one optimizer step. Return loss, terms and gradient norm, averaged over the processes."""
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
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    values = torch.stack([value.float() for value in sums.values()])  # one copy from the device per step
    if run.world > 1:
        dist.all_reduce(values)
        values = values / run.world
    return dict(zip(sums, values.tolist()))


def validate(run: Run, flips: tuple[int, ...] = ()) -> dict:
    """Return `metrics.summarize` of the validation cases, predicted with flips along axes of (D, H, W)."""
    cases, scores = run.source.splits["val"], {}
    run.model.eval()
    for case in tqdm(cases[run.rank :: run.world], "validation", leave=False, disable=run.rank > 0):
        prepared = data.load_cached(case, run.plan, run.cache)
        scores[case.name] = evaluate.score_case(run.model, case, prepared, run.device, run.args.amp, flips)
    if run.world > 1:
        parts = [None] * run.world
        dist.all_gather_object(parts, scores)
        scores = {name: score for part in parts for name, score in part.items()}
    return metrics.summarize({case.name: scores[case.name] for case in cases}, run.plan.task.labels)


def begin_log(run: Run) -> None:
    """Print a run's settings in five lines, write all to config.json, and keep the log of the epochs done."""
    args, config, splits = run.args, run.model.config, run.source.splits
    counts = model.count_parameters(run.model)
    counts["total"] = trained, frozen = tuple(map(sum, zip(*counts.values())))  # table 5
    patch, encoder = (" x ".join(map(str, size)) for size in (config.patch_size, config.encoder_size))
    print(
        f"data      {run.source.name} in {run.source.root}, {config.num_classes} classes, "
        f"{len(splits['train'])} training and {len(splits['val'])} validation cases\n"
        f"model     {config.sam}, {config.variant}, {trained:,} trained and {frozen:,} frozen parameters\n"
        f"sizes     patch {patch}, encoder {encoder}, {config.num_queries} queries\n"
        f"schedule  {args.epochs} x {args.iterations} steps, {run.world} x {args.accumulate} x "
        f"{args.batch_size} patches per step, {run.device}, amp {args.amp}, rate {args.lr:g}\n"
        f"output    {run.folder}, where config.json has all settings"
    )
    content = {"model": dataclasses.asdict(config), "plan": run.plan.as_dict(), "sam": run.sam}
    content |= {"command": shlex.join([Path(sys.executable).name, *sys.argv]), "parameters": counts}
    run.folder.mkdir(parents=True, exist_ok=True)
    files.write_text(run.folder / "config.json", json.dumps(content | run.settings, indent=1))
    log = run.folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if run.first_epoch else []
    files.write_text(log, "".join(lines[: run.first_epoch]))


def save(run: Run, entry: dict) -> None:
    """Write last.pt, a line of log.jsonl, and best.pt if the validation Dice is the best so far (Ours)."""
    epoch, dice, on_gpu = entry["epoch"], entry["val_dice"], run.device.type == "cuda"
    # The largest memory so far is that of the GPU, or of this process on the CPU.
    peak = torch.cuda.max_memory_allocated(run.device) if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    entry["gib"] = peak / 2**30
    content = model.checkpoint_content(run.model, run.sam, run.plan.as_dict()) | run.settings
    content |= {"epoch": epoch, "metrics": {"val_dice": dice}}
    if dice is not None and dice > run.best:
        run.best = dice
        write_checkpoint(run.folder / "best.pt", content)
    with open(run.folder / "log.jsonl", "a") as log:
        log.write(json.dumps(entry) + "\n")
    state = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "best": run.best}
    write_checkpoint(run.folder / "last.pt", content | state)
    minutes = (time.time() - run.start) / (epoch - run.first_epoch) * (run.args.epochs - epoch) / 60
    line = f"epoch {epoch}/{run.args.epochs}  loss {entry['loss']:.4f}  rate {entry['lr']:.1e}"
    line += f"  {entry['seconds']:.0f} s  {entry['gib']:.1f} GiB  {minutes:.0f} min left"
    tqdm.write(line if dice is None else f"{line}  validation Dice {dice:.4f}")


def draw(run: Run) -> None:
    """Draw curves.png, and overlay.png with three validation cases from all over the list."""
    from support import pictures  # needs matplotlib, which training does not

    pictures.draw_curves(run.folder / "log.jsonl", run.folder / "curves.png")
    cases, task, shown = run.source.splits["val"], run.plan.task, []
    options = run.device, run.args.amp, task.flip_axes
    for case in cases[:: max(1, len(cases) // 3)][:3]:
        prepared = data.load_cached(case, run.plan, run.cache)
        prediction = evaluate.predict_case([run.model.eval()], [prepared], *options)
        image, truth = nifti.read_image(case.images[0])[0], nifti.read_label(case.label, len(task.labels))[0]
        title = case.name + ("" if run.args.prompts == "auto" else f", boxes of {run.args.prompts}")
        shown.append(pictures.Picture(title, image, truth, prediction, prepared.geometry.spacing))
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
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available() and args.device != "cpu":
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl")
    elif world > 1:
        dist.init_process_group("gloo")
    try:
        train(args, rank, local_rank, world)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from error
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
