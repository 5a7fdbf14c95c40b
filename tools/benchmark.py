"""Measure the time, memory and arithmetic of a training step and a prediction, part by part (paper table 5).

    python -m tools.benchmark                          # the ACDC preset: parts, training step, prediction
    python -m tools.benchmark --sam mobile_sam --encoder 512 512 --amp bf16
    python -m tools.benchmark --curve depth            # step and prediction over the depth, or over queries
    python -m tools.benchmark --volume 150 512 512     # one case from file to file
    python -m tools.benchmark --parameters             # table 5 for every backbone and every variant
    python -m tools.benchmark --device cuda --json cost.json

    volume ── stem ── encoder ── prompt generator ── prompt encoder ── decoder ── costs of pairs ── matching
              each part runs by itself: forward, then forward and backward from gradients of ones

The weights are random, which does not change the cost. Plain SAM is segment_anything's own code with the same
weights and slices. On a CPU, compare CPU seconds and ratios, because other processes disturb the clock.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import argparse
import dataclasses
import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
from matcher import SetCriterion, pairwise_terms
from model import VARIANTS, MaskSAM, MaskSAMConfig, count_parameters
from support import layouts, metrics, nifti
from support.files import AMP_TYPES, autocast, default_amp, default_device, make_parser, write_text
from support.presets import PRESETS, Task, recipe
from support.sam import BACKBONES

SLOW = 10.0  # Ours: a first run of more seconds counts, because warming up would change little
CURVES = {"depth": (1, 2, 4, 8), "queries": (4, 8, 16, 32)}  # Ours: the values of D and of N
PARTS = ("sam", "stem", "encoder_adapters", "decoder_adapters", "prompt_generator", "tokens", "total")
# Millions of trained and of frozen parameters, in table 5 and in the networks that the Release builds.
PUBLISHED = {"paper": (14, 91), "release, ACDC (ViT-B)": (21.4, 93.7), "release, AMOS (ViT-H)": (66, 641)}

# -------------------------------------------------------------------------------------------------- measuring


def memory(device: torch.device, reset: bool = False) -> int:
    """Return the peak memory in bytes since the last reset: of torch on a GPU, else of this process."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what the process holds now
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure_once(run: Callable, device: torch.device) -> dict[str, float]:
    """Run something; return seconds, cpu_seconds and gib: the peak memory above what was held before."""
    held = memory(device, reset=True)
    began, cpu_began = time.perf_counter(), time.process_time()
    run()
    peak = memory(device)  # waits for the GPU
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "gib": (peak - held) / 2**30}


def measure(run: Callable, device: torch.device, repeat: int) -> dict[str, float]:
    """Run something once to warm up and to count its arithmetic, then `repeat` times.

    Returns:
        seconds (median), spread (largest minus smallest), cpu_seconds (median), gib (largest), gflop.
    """
    gc.collect()
    with FlopCounterMode(display=False) as counter:
        first = measure_once(run, device)
    runs = [first] if first["seconds"] > SLOW else []
    runs += [measure_once(run, device) for _ in range(repeat - len(runs))]
    seconds, cpu_seconds, gib = ([each[name] for each in runs] for name in first)
    cost = {"seconds": statistics.median(seconds), "spread": max(seconds) - min(seconds)}
    cost |= {"cpu_seconds": statistics.median(cpu_seconds), "gib": max(gib)}
    return cost | {"gflop": counter.get_total_flops() / 1e9}


# ------------------------------------------------------------------------------------------------------ parts


class Bench:
    """A model with a batch of random patches, and its measurements.

    Args:
        config: of the model.
        args: the parsed command line.
    """

    def __init__(self, config: MaskSAMConfig, args: argparse.Namespace):
        torch.manual_seed(0)
        self.args, self.device, self.criterion = args, torch.device(args.device), SetCriterion()
        self.model = MaskSAM(config).to(self.device)
        self.model.gradient_checkpointing = args.checkpointing
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=True)  # the weights stay as they are
        depth, *plane = config.patch_size
        self.volume = torch.randn(args.batch_size, config.num_channels, depth, *plane, device=self.device)
        labels = torch.randint(config.num_classes, (args.batch_size * depth, 8, 8), device=self.device)
        labels = nn.functional.interpolate(labels[None].float(), size=plane)[0].long()  # (S, H, W), blocks
        self.segments = data.label_map_to_segments(labels, config.num_classes)
        if args.compile:
            self.model.compile()

    def measure(self, run: Callable) -> dict[str, float]:
        """Measure as the command line says."""
        return measure(run, self.device, self.args.repeat)

    def step(self) -> None:
        """Make one training step, as train.py does."""
        with autocast(self.device, self.args.amp):
            outputs = self.model(self.volume)
        self.criterion(outputs, self.segments)[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def predict(self) -> Tensor:
        """Return the semantic maps of the batch."""
        with autocast(self.device, self.args.amp):
            return self.model.eval().predict(self.volume)

    def totals(self) -> tuple[dict, dict]:
        """Measure a whole prediction and a whole training step."""
        return self.measure(self.predict), self.measure(self.step)

    def part(self, call: Callable, *inputs) -> tuple[dict, object]:
        """Measure one part: forward without a graph, then forward and backward.

        Args:
            call: the part.
            inputs: its inputs: tensors, or lists and dicts of tensors.
        Returns:
            The costs, where "training" holds those of forward and backward; and the outputs of the part.
        """
        with torch.no_grad(), autocast(self.device, self.args.amp):
            outputs = call(*inputs)
            cost = self.measure(lambda: call(*inputs))

        def forward_and_backward() -> None:
            leaves = tree_map(lambda x: x.detach().requires_grad_(x.is_floating_point()), inputs)
            with autocast(self.device, self.args.amp):
                roots = [x for x in tree_leaves(call(*leaves)) if x is not None and x.requires_grad]
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
            self.optimizer.zero_grad()

        return cost | {"training": self.measure(forward_and_backward)}, outputs

    def parts(self) -> dict[str, dict]:
        """Measure every part of `MaskSAM.forward` in its order, the loss, the optimizer, and plain SAM."""
        model, sam, rows = self.model, self.model.sam, {}

        def add(name: str, call: Callable, *inputs):
            rows[name], outputs = self.part(call, *inputs)
            return outputs

        image = add("stem", model.stem, self.volume.transpose(1, 2).flatten(0, 1))
        neck, taps = add("encoder", model.encode, image)
        aux = add("prompt generator", model.prompt_generator, neck, taps)
        sparse, dense, image_pe = add("prompt encoder", model.encode_prompts, aux)
        tokens = model.class_tokens + aux["class_tokens"]
        class_logits, mask_logits = add("decoder", model.decode, neck, image_pe, sparse, dense, tokens)
        outputs = {"class_logits": class_logits, "mask_logits": mask_logits, **aux}
        terms = add("costs of all pairs", lambda outputs: pairwise_terms(outputs, self.segments), outputs)
        rows["matching"] = self.measure(lambda: self.criterion.matcher(terms, self.segments.present))
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        rows["optimizer"] = self.measure(self.optimizer.step)
        self.optimizer.zero_grad()
        add("plain SAM: encoder", sam.image_encoder, image)
        rows["plain SAM: decoder"] = self.measure(lambda: self.plain_decoder(neck))
        return rows

    @torch.no_grad()
    def plain_decoder(self, neck: Tensor) -> None:
        """Run SAM's own prompt encoder and mask decoder, image by image, with N boxes each."""
        sam, config = self.model.sam, self.model.config
        box = torch.tensor([[0.0, 0, *reversed(config.encoder_size)]], device=neck.device)
        boxes = box.expand(config.num_queries, -1)
        with autocast(self.device, self.args.amp):
            for embedding in neck:
                sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
                positions = sam.prompt_encoder.get_dense_pe()
                sam.mask_decoder(embedding[None], positions, sparse, dense, multimask_output=False)

    def case_rows(self, volume: Sequence[int]) -> dict[str, dict]:
        """Measure a volume (D, H, W): its preparing, loading and scoring, and its prediction file to file."""
        size, rows = self.model.config.patch_size, {}
        with tempfile.TemporaryDirectory() as folder:
            source = write_case(Path(folder), volume, self.model.config.num_classes)
            (case,), cache, num_classes = (
                source.splits["train"],
                Path(folder) / "cache",
                len(source.task.labels),
            )
            plan = data.prepare(source, cache)
            rows["prepare a case"] = measure(lambda: data.prepare_case(case, plan), self.device, 1)
            patches, indices = data.PatchDataset([case], plan, cache, size, 10**6, seed=0), iter(range(10**6))
            rows["a patch from the cache"] = measure(lambda: patches[next(indices)], self.device, 20)
            truth, geometry = nifti.read_label(case.label, num_classes)
            score = np.roll(truth, 2, axis=2), truth, geometry.spacing, num_classes
            rows["score a case"] = self.measure(lambda: metrics.score_maps(*score))

            def file_to_file() -> None:
                prepared = data.prepare_case(dataclasses.replace(case, label=None), plan)
                options = {"device": self.device, "amp": self.args.amp, "batch_size": self.args.batch_size}
                label = evaluate.predict_case([self.model.eval()], [prepared], **options)
                nifti.write_label_map(Path(folder) / "out.nii.gz", label, prepared.geometry)

            windows = np.prod([len(evaluate.window_starts(n, min(n, p), 0.5)) for n, p in zip(volume, size)])
            name = f"predict {' x '.join(map(str, volume))}, {windows} windows"
            return rows | {name: measure_once(file_to_file, self.device)}


def write_case(folder: Path, shape: Sequence[int], num_classes: int) -> layouts.DataSource:
    """Write a random volume (D, H, W) with blocks of labels as NIfTI; return a data set of this one case."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, num_classes, (4, 4, 4))
    label = coarse[np.ix_(*(np.arange(n) * 4 // n for n in shape))].astype(np.uint8)
    image = (label * 40 + rng.normal(0, 20, label.shape)).astype(np.int16)
    case = layouts.Case("case", (str(folder / "image.nii.gz"),), str(folder / "label.nii.gz"))
    for path, array in zip((*case.images, case.label), (image, label)):
        nib.save(nib.Nifti1Image(array.T, np.diag([0.8, 0.8, 2.0, 1.0])), path)
    task = Task(tuple(f"class {class_id}" for class_id in range(num_classes)), ("MR",), "MR", ())
    return layouts.DataSource("benchmark", str(folder), task, {"train": (case,)})


# ------------------------------------------------------------------------------------------------- parameters


def parameter_rows(config: MaskSAMConfig) -> dict[str, dict[str, int]]:
    """Count the parameters of every backbone with variant b9, and of every variant of one backbone (table 5).

    Args:
        config: gives the sizes, and the backbone of the variants.
    Returns:
        name -> {each of `PARTS`: trained parameters, "frozen": frozen parameters}. "tokens" are the depth
        embeddings, the class tokens and the classifier.
    """
    rows = {}
    for sam, variant in [(sam, "b9") for sam in BACKBONES] + [(config.sam, variant) for variant in VARIANTS]:
        with torch.device("meta"):  # nothing is allocated
            model = MaskSAM(dataclasses.replace(config, sam=sam, variant=variant))
        row = rows[f"{sam} {variant}"] = dict.fromkeys((*PARTS, "frozen"), 0)
        for component, (trained, frozen) in count_parameters(model).items():
            part = component.split(".")[0]
            row[part if part in PARTS else "tokens"] += trained
            row["total"] += trained
            row["frozen"] += frozen
    return rows


def print_parameters(rows: dict[str, dict[str, int]]) -> None:
    """Print `parameter_rows` in millions below the published numbers."""
    print(f"{'millions':24s}" + "".join(f"{title.replace('_', ' '):>18s}" for title in (*PARTS, "frozen")))
    for name, (trained, frozen) in PUBLISHED.items():
        print(f"{name:24s}{trained:{18 * len(PARTS)}.1f}{frozen:18.1f}")
    for name, row in rows.items():
        print(f"{name:24s}" + "".join(f"{count / 1e6:18.3f}" for count in row.values()))


# ----------------------------------------------------------------------------------------------- command line


def print_rows(rows: dict[str, dict]) -> None:
    """Print one line per part: the costs of forward, then those of forward and backward."""
    print(f"{'':38s}  seconds     +-    CPU-s    GiB    GFLOP  training s    CPU-s    GiB    GFLOP")
    for name, row in rows.items():
        line = f"{name:38s}{row['seconds']:9.3f}{row.get('spread', 0):7.3f}{_cells(row)}"
        if training := row.get("training"):
            line += f"{training['seconds']:12.3f}{_cells(training)}"
        print(line)


def _cells(cost: dict[str, float]) -> str:
    return f"{cost['cpu_seconds']:9.3f}{cost['gib']:7.2f}{cost.get('gflop', 0):9.1f}"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; None stands for the value of the preset."""
    parser = make_parser(__doc__, "data", "device", data="acdc", device=default_device())
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--sam", choices=BACKBONES, help="backbone (default: that of the preset)")
    add("--variant", choices=VARIANTS, default="b9", help="row of table 4 (default: %(default)s)")
    add("--patch", type=int, nargs=3, metavar=("D", "H", "W"), dest="patch_size", help="patch in voxels")
    add("--encoder", type=int, nargs=2, metavar=("H", "W"), dest="encoder_size", help="input size of SAM")
    add("--queries", type=int, dest="num_queries", help="number of queries N")
    add("--batch", type=int, default=1, dest="batch_size", help="number of patches (default: %(default)s)")
    add("--amp", choices=AMP_TYPES, help="autocast type (default: as in train.py)")
    add("--checkpointing", action=switch, default=True, help="compute encoder blocks again in backward")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--repeat", type=int, default=3, help="number of runs of each part (default: %(default)s)")
    add("--curve", choices=CURVES, help="measure step and prediction over it, instead of parts")
    add("--volume", type=int, nargs=3, metavar=("D", "H", "W"), help="measure a case of this size, not parts")
    add("--parameters", action="store_true", help="count parameters by component, instead of measuring")
    add("--json", help="file to write")
    args = parser.parse_args(argv)
    args.amp = args.amp or default_amp(args.device)
    if args.data not in PRESETS:
        parser.error(f"--data is {args.data}, expected one of {', '.join(PRESETS)}")
    return args


def run(args: argparse.Namespace) -> dict:
    """Measure and print as the command line says; return everything that was measured."""
    args.sam = args.sam or PRESETS[args.data].sam
    preset = recipe(PRESETS[args.data], args.sam)
    names = ("patch_size", "encoder_size", "num_queries")
    sizes = {name: getattr(args, name) or getattr(preset, name) for name in names}
    config = MaskSAMConfig(args.sam, args.variant, num_classes=len(preset.task.labels), **sizes)
    results = {"config": dataclasses.asdict(config), "rows": {}}
    if args.parameters:
        results["rows"] = parameter_rows(config)
        print_parameters(results["rows"])
        return results
    results |= {"arguments": vars(args), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{config}\n{args.device}, {args.amp}, {results['threads']} threads")
    rows = results["rows"]
    if args.volume:
        rows |= Bench(config, args).case_rows(args.volume)
    elif args.curve:
        for value in CURVES[args.curve]:
            depth = {"patch_size": (value, *config.patch_size[1:])}
            changes = depth if args.curve == "depth" else {"num_queries": value}
            prediction, step = Bench(dataclasses.replace(config, **changes), args).totals()
            rows[f"{args.curve} {value}"] = prediction | {"training": step}
    else:
        bench = Bench(config, args)
        rows["prediction"], rows["training step"] = bench.totals()
        rows |= bench.parts()
    print_rows(rows)
    return results


def main(argv: list[str] | None = None) -> dict:
    """Measure, print and write; a wrong size becomes one message. Return the content of `--json`."""
    args = parse_arguments(argv)
    try:
        results = run(args)
        if args.json:
            write_text(Path(args.json), json.dumps(results, indent=1))
        return results
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmark.py: {error}") from error


if __name__ == "__main__":
    main()
