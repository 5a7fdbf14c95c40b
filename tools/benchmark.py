"""Measure the time, memory and arithmetic of a training step and a prediction, part by part (paper table 5).

The weights are random, which does not change the cost. Each part runs by itself: forward, then forward and
backward. On a CPU, compare CPU seconds and ratios, because other processes disturb the clock.

    python -m tools.benchmark                          # the ACDC preset: parts, training step, prediction
    python -m tools.benchmark --sam mobile_sam --encoder 512 512 --json cost.json
    python -m tools.benchmark --queries 32             # other sizes: --patch D H W, --encoder H W, --batch B
    python -m tools.benchmark --parameters             # table 5 for every backbone and every variant

    volume ── stem ── encoder ── prompt generator ── prompt encoder ── decoder ── costs of pairs ── matching
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: threads that wait sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but only after a short spin

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from data import label_map_to_segments
from matcher import SetCriterion, pairwise_terms
from model import VARIANTS, MaskSAM, MaskSAMConfig, count_parameters
from support import files
from support.presets import PRESETS, recipe
from support.processes import peak_memory
from support.sam import BACKBONES

PARTS = ("sam", "stem", "encoder_adapters", "decoder_adapters", "prompt_generator", "tokens", "total")
# Millions of trained and of frozen parameters, in table 5 and in the networks that the Release builds.
PUBLISHED = {"paper": (14, 91), "release, ACDC (ViT-B)": (21.4, 93.7), "release, AMOS (ViT-H)": (66, 641)}


def measure(run: Callable, device: torch.device, repeat: int) -> dict[str, float]:
    """Return gflop, the medians of seconds and cpu_seconds of `repeat` runs, and on a GPU the peak gib."""
    on_gpu, times = device.type == "cuda", []
    with FlopCounterMode(display=False) as counter:
        run()  # this warms up too
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeat):
        began, cpu_began = time.perf_counter(), time.process_time()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began, time.process_time() - cpu_began))
    seconds, cpu_seconds = map(statistics.median, zip(*times))
    cost = {"gflop": counter.get_total_flops() / 1e9, "seconds": seconds, "cpu_seconds": cpu_seconds}
    return cost | ({"gib": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {})


class Bench:
    """A model of a config with a batch of random patches, and its measurements as the command line says."""

    def __init__(self, config: MaskSAMConfig, args: argparse.Namespace):
        torch.manual_seed(0)
        self.device, (depth, *plane), batch = torch.device(args.device), config.patch_size, args.batch_size
        self.autocast = partial(files.autocast, self.device, args.amp)
        self.measure = partial(measure, device=self.device, repeat=args.repeat)
        self.model, self.criterion = MaskSAM(config).to(self.device), SetCriterion()
        self.model.gradient_checkpointing = args.checkpointing
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)  # the weights stay as they are
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

    def rows(self) -> dict[str, dict]:
        """Measure prediction and step, the parts of `MaskSAM.forward` in order, and SAM's own encoder."""
        rows = {"prediction, step": self.measure(self.predict) | {"training": self.measure(self.step)}}
        model = self.model

        def part(name: str, call: Callable, *inputs) -> object:
            def forward_and_backward() -> None:  # from gradients of ones
                leaves = tree_map(lambda x: x.detach().requires_grad_(x.is_floating_point()), inputs)
                with self.autocast():
                    roots = [x for x in tree_leaves(call(*leaves)) if x is not None and x.requires_grad]
                torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
                self.optimizer.zero_grad()

            with torch.no_grad(), self.autocast():
                rows[name] = self.measure(lambda: call(*inputs))
                outputs = call(*inputs)
            rows[name]["training"] = self.measure(forward_and_backward)
            return outputs

        image = part("stem", model.stem, self.volume.transpose(1, 2).flatten(0, 1))
        neck, taps = part("encoder", model.encode, image)
        aux = part("prompt generator", model.prompt_generator, neck, taps)
        *prompts, image_pe = part("prompt encoder", model.encode_prompts, aux)
        tokens = model.class_tokens + aux["class_tokens"]
        classes, masks = part("decoder", model.decode, neck, image_pe, *prompts, tokens)
        outputs = {"class_logits": classes, "mask_logits": masks, **aux}
        terms = part("costs of all pairs", partial(pairwise_terms, segments=self.segments), outputs)
        rows["matching"] = self.measure(lambda: self.criterion.matcher(terms, self.segments.present))
        part("plain SAM: encoder", model.sam.image_encoder, image)
        return rows


def count(config: MaskSAMConfig) -> dict[str, dict[str, int]]:
    """Count and print the parameters of every backbone, and of every variant of one backbone (table 5)."""
    rows = {}
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


def print_rows(rows: dict[str, dict], args: argparse.Namespace) -> None:
    """Print one line per part: the costs of forward, then those of forward and backward."""
    titles = [title for title in next(iter(rows.values())) if title != "training"]
    print(f"{'':24s}" + 2 * "".join(f"{title:>12s}" for title in titles) + "  (right half: with backward)")
    for name, row in rows.items():
        costs = [each[title] for each in (row, row.get("training", {})) for title in titles if each]
        print(f"{name:24s}" + "".join(f"{cost:12.3f}" for cost in costs))
    if "gib" in titles:  # the rates of a step, whose arithmetic includes that of checkpointing
        a, step = torch.randn(8192, 8192, device=args.device).bfloat16(), rows["prediction, step"]["training"]
        product = measure(lambda: a @ a, a.device, 10)
        peak, rate = (cost["gflop"] / cost["seconds"] / 1e3 for cost in (product, step))
        share = f"{rate:.1f} TFLOP/s, {rate / peak:.1%} of a bf16 product of 8192 x 8192"
        print(f"training step: {args.batch_size / step['seconds']:.2f} patches/s, {share}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; None stands for the value of the preset."""
    parser = files.make_parser(__doc__, "device", device=files.default_device())
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data", choices=PRESETS, default="acdc", help="preset (default: %(default)s)")
    add("--sam", choices=BACKBONES, help="backbone (default: that of the preset)")
    add("--variant", choices=VARIANTS, default="b9", help="row of table 4 (default: %(default)s)")
    add("--patch", type=int, nargs=3, metavar=("D", "H", "W"), dest="patch_size", help="patch in voxels")
    add("--encoder", type=int, nargs=2, metavar=("H", "W"), dest="encoder_size", help="input size of SAM")
    add("--queries", type=int, dest="num_queries", help="number of queries N")
    add("--batch", type=int, default=1, dest="batch_size", help="number of patches (default: %(default)s)")
    add("--amp", choices=files.AMP_TYPES, help="autocast type (default: as in train.py)")
    add("--checkpointing", action=switch, default=True, help="compute encoder blocks again in backward")
    add("--repeat", type=int, default=3, help="number of runs of each part (default: %(default)s)")
    add("--parameters", action="store_true", help="count parameters by component, instead of measuring")
    add("--json", help="file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Measure or count, and print, as the command line says. Return the content of `--json`."""
    args = parse_arguments(argv)
    with files.one_sentence("benchmark.py", args.debug):
        args.amp, args.sam = args.amp or files.default_amp(args.device), args.sam or PRESETS[args.data].sam
        preset, sizes = recipe(PRESETS[args.data], args.sam), ("patch_size", "encoder_size", "num_queries")
        vars(args).update(sizes := {name: getattr(args, name) or getattr(preset, name) for name in sizes})
        config = MaskSAMConfig(args.sam, args.variant, num_classes=len(preset.task.labels), **sizes)
        if args.parameters:
            rows = count(config)
        else:
            print(f"{args.device}, {args.amp}, {torch.get_num_threads()} threads: {config}")
            print_rows(rows := Bench(config, args).rows(), args)
            print(f"memory: {peak_memory(torch.device(args.device)) / 2**30:.2f} GiB at most")
        results = {"rows": rows, "arguments": vars(args), "torch": torch.__version__}
        if args.json:
            files.write_text(Path(args.json), json.dumps(results, indent=1))
        return results


if __name__ == "__main__":
    main()
