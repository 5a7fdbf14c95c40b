"""Measure training steps and predictions of presets and backbones; count their parameters (paper table 5).

The patches and the weights are random, which does not change the cost.

    python -m tools.benchmark --device cuda            # a table of three presets with five backbones each
    python -m tools.benchmark --device cpu             # the phantom's preset, in CPU seconds
    python -m tools.benchmark --queries 32             # other sizes: --patch D H W, --encoder H W, --batch B
    python -m tools.benchmark --parameters             # table 5 for every backbone and every variant
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import label_map_to_segments
from evaluate import window_starts
from matcher import SetCriterion
from model import VARIANTS, MaskSAM, MaskSAMConfig, count_parameters
from support import files
from support.presets import PRESETS, SCALES, Preset, recipe
from support.processes import needs_checkpointing, peak_memory
from support.sam import BACKBONES, store_frozen
from train import OPTIMIZERS

PARTS = ("sam", "stem", "encoder_adapters", "decoder_adapters", "prompt_generator", "tokens", "total")
# Millions of trained and of frozen parameters, in table 5 and in the networks that the Release builds.
PUBLISHED = {"paper": (14, 91), "release, ACDC (ViT-B)": (21.4, 93.7), "release, AMOS (ViT-H)": (66, 641)}
# Ours: the size (D, H, W) in voxels of the case whose prediction is timed.
CASES = {"phantom": (9, 112, 112), "acdc": (10, 256, 216)}
CASES |= {"synapse": (150, 512, 512), "amos": (100, 512, 512)}
SIZES = ("patch_size", "encoder_size", "num_queries", "batch_size")
TITLES = ("batch", "ms/step", "TFLOP/step", "GiB", "patches/s", "hours", "s/case")


def measure(run: Callable, device: torch.device, repeat: int) -> tuple[float, float, float]:
    """Return the TFLOP of a run, the median seconds (on a CPU: CPU seconds), and the peak memory in GiB."""
    on_gpu, times = device.type == "cuda", []

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() if on_gpu else time.process_time()

    with FlopCounterMode(display=False) as counter:
        run()  # this warms up too
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeat):
        began = now()
        run()
        times.append(now() - began)
    return counter.get_total_flops() / 1e12, statistics.median(times), peak_memory(device) / 2**30


def choose(args: argparse.Namespace, data: str, sam: str) -> tuple[Preset, MaskSAMConfig]:
    """Return the preset of a data set and a backbone, with the sizes of the command line, and its network."""
    given = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    preset = dataclasses.replace(recipe(PRESETS[data], sam, args.device), **given)
    sizes = {name: getattr(preset, name) for name in (*SIZES[:3], "fine_masks", "volumetric")}
    return preset, MaskSAMConfig(sam, num_classes=len(preset.task.labels), **sizes)


class Bench:
    """A network with a batch of random patches."""

    def __init__(self, preset: Preset, config: MaskSAMConfig, args: argparse.Namespace):
        torch.manual_seed(0)
        self.preset, self.config, self.device = preset, config, torch.device(args.device)
        self.autocast = partial(files.autocast, self.device, args.amp)
        self.measure = partial(measure, device=self.device, repeat=args.repeat)
        self.model, self.criterion = MaskSAM(config).to(self.device), SetCriterion()
        torch.set_float32_matmul_precision("high" if args.amp == "off" else "highest")
        store_frozen(self.model.sam, files.AMP_TYPES[args.amp])
        how = preset.batch_size, args.amp, files.total_memory(self.device)
        self.model.gradient_checkpointing = needs_checkpointing(self.model, *how)
        trained = [(name, each) for name, each in self.model.named_parameters() if each.requires_grad]
        self.optimizer = OPTIMIZERS[preset.optimizer](trained, lr=0.0, fused=True)  # no weight changes
        batch, (depth, *plane) = preset.batch_size, config.patch_size
        self.volume = torch.randn(batch, config.num_channels, depth, *plane, device=self.device)
        labels = torch.randint(config.num_classes, (batch * depth, *plane), device=self.device)
        self.segments = label_map_to_segments(labels, config.num_classes)

    def step(self) -> None:
        """Make one training step, as train.py does."""
        with self.autocast():
            outputs = self.model(self.volume)
        self.criterion(outputs, self.segments)[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def predict(self) -> torch.Tensor:
        """Return the semantic maps of the batch."""
        with self.autocast():
            return self.model.eval().predict(self.volume)

    def row(self, case: tuple[int, ...]) -> dict[str, float]:
        """Return a number for each of `TITLES`. Hours are those of all training steps."""
        preset, batch = self.preset, len(self.volume)
        tflop, seconds, gib = self.measure(self.step)
        windows = math.prod(len(window_starts(max(n, p), p, 0.5)) for n, p in zip(case, preset.patch_size))
        windows *= 2 ** len(preset.task.flip_axes or ())
        prediction = windows * self.measure(self.predict)[1] / batch
        hours = preset.epochs * preset.iterations * seconds / 3600
        numbers = batch, 1000 * seconds, tflop, gib, batch / seconds, hours, prediction
        return dict(zip(TITLES, numbers, strict=True))


def table(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure and print a row for each preset and backbone."""
    rows, on_gpu = {}, args.device != "cpu"
    print(f"{args.device}, {args.amp}, {torch.get_num_threads()} threads")
    print(f"{'':20s}" + "".join(f"{title:>12s}" for title in TITLES))
    for name in args.data or (["acdc", "synapse", "amos"] if on_gpu else ["phantom"]):
        for sam in args.sam or [PRESETS[name].sam, *(SCALES if on_gpu else [])]:
            rows[f"{name} {sam}"] = row = Bench(*choose(args, name, sam), args).row(CASES[name])
            print(f"{name + ' ' + sam:20s}" + "".join(f"{n:12.4g}" for n in row.values()), flush=True)
    return rows


def count(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Count and print the parameters of every backbone, and of every variant of one backbone (table 5)."""
    rows, (_, config) = {}, choose(args, (args.data or ["acdc"])[0], (args.sam or ["vit_b"])[0])
    print(f"{'millions':24s}" + "".join(f"{title.replace('_', ' '):>18s}" for title in (*PARTS, "frozen")))
    for name, (trained, frozen) in PUBLISHED.items():
        print(f"{name:24s}{trained:{18 * len(PARTS)}.1f}{frozen:18.1f}")
    for sam, variant in [(sam, "b9") for sam in BACKBONES] + [(config.sam, variant) for variant in VARIANTS]:
        with torch.device("meta"):  # nothing is allocated
            model = MaskSAM(dataclasses.replace(config, sam=sam, variant=variant))
        row = rows[f"{sam} {variant}"] = dict.fromkeys((*PARTS, "frozen"), 0)
        for component, (trained, frozen) in count_parameters(model).items():
            part = component.split(".")[0]
            row[part if part in PARTS else "tokens"] += trained  # depth embeddings and classifier too
            row["total"] += trained
            row["frozen"] += frozen
        print(f"{sam + ' ' + variant:24s}" + "".join(f"{number / 1e6:18.3f}" for number in row.values()))
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; None stands for the value of the preset."""
    options, device = "device patch encoder queries batch amp", files.default_device()
    parser = files.make_parser(__doc__, options, device=device)
    add = parser.add_argument
    add("--data", nargs="+", choices=PRESETS, help="presets (default: phantom; on a GPU the others)")
    add("--sam", nargs="+", choices=BACKBONES, help="backbones (default: the preset's; GPU: light ones too)")
    add("--repeat", type=files.count, default=3, help="number of runs (default: %(default)s)")
    add("--parameters", action="store_true", help="count parameters by component, instead of measuring")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Measure or count, and print, as the command line says. Return the rows."""
    args = parse_arguments(argv)
    with files.one_sentence("benchmark.py", args.debug):
        args.amp = args.amp or files.default_amp(args.device)
        return count(args) if args.parameters else table(args)


if __name__ == "__main__":
    main()
