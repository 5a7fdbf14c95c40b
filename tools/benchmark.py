"""What a training step, a prediction and a whole case cost, part by part, beside plain SAM (paper table 5).

    python benchmark.py                                      the ACDC preset with `vit_b`: parts, step, prediction
    python benchmark.py --sam mobile_sam --encoder 512 512 --amp bf16
    python benchmark.py --curve depth                        the same totals over D (or queries, side, batch)
    python benchmark.py --volume 150 512 512                 one case from file to file
    python benchmark.py --parameters                         table 5: of every backbone and every variant
    python benchmark.py --json cost.json                     everything printed, as JSON

Every part of `MaskSAM.forward` runs by itself on inputs of its own, forward, then backward from gradients of ones. The
weights are random, which does not change the cost. Plain SAM is `segment-anything`'s own code with the same weights and
slices. The limit of a row is its arithmetic over the rate of a large matrix product, or its bytes (weights, inputs,
outputs, once each) over the rate of a large copy, whichever is longer. On a CPU, compare CPU seconds and ratios: other
processes disturb the clock.
"""

import argparse
import dataclasses
import gc
import json
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import data
import evaluate
from matcher import SetCriterion, pairwise_terms
from model import VARIANTS, MaskSAM, MaskSAMConfig, count_parameters
from support import layouts, metrics, nifti
from support.files import AMP_TYPES, default_amp, write_whole
from support.presets import PRESETS, recipe
from support.sam import BACKBONES

aten = torch.ops.aten
# torch counts the attention kernels of GPUs; these are the CPU's.
ATTENTION_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
SLOW = 10.0  # seconds from which a first run counts: warming up would change little

# ------------------------------------------------------------------------------------------------------------ measuring


class Meter:
    """Clock, CPU time and peak memory of what runs inside: of the GPU's allocator, or of the process on a CPU.

    seconds, cpu_seconds; gib: the peak above what was held at the start.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"

    def _resident(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, self._resident())

    def __enter__(self) -> "Meter":
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            self.held = self.peak = self._resident()
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds, self.cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.cpu_began
        if self.on_gpu:
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.stop.set()
            self.thread.join()
        self.gib = (self.peak - self.held) / 2**30


def measure(run: Callable, device: torch.device, repeat: int) -> dict:
    """Run something once to warm up and count its arithmetic, then `repeat` times.

    Returns:
        seconds (median), spread (largest less smallest), cpu_seconds (median), gib (largest), gflop.
    """
    gc.collect()
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    with Meter(device) as first, counter:
        run()
    runs = [first] if first.seconds > SLOW else []
    while len(runs) < repeat:
        with Meter(device) as meter:
            run()
        runs.append(meter)
    seconds = [meter.seconds for meter in runs]
    return {
        "seconds": statistics.median(seconds),
        "spread": max(seconds) - min(seconds),
        "cpu_seconds": statistics.median(meter.cpu_seconds for meter in runs),
        "gib": max(meter.gib for meter in runs),
        "gflop": counter.get_total_flops() / 1e9,
    }


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What the machine reaches: GFLOP per second in a large matrix product, GB per second of reading and writing."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, 5)
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, 5)
    return 2 * side**3 / 1e9 / product["seconds"], 2 * source.nbytes / 1e9 / copy["seconds"]


def tensors(tree) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple | list) else ()
    return [tensor for child in children for tensor in tensors(child)]


def leaves(tree):
    """The same structure with tensors of their own, that floating ones get a gradient for."""
    if isinstance(tree, Tensor):
        return tree.detach().requires_grad_(tree.is_floating_point())
    if isinstance(tree, dict):
        return {name: leaves(child) for name, child in tree.items()}
    return type(tree)(leaves(child) for child in tree) if isinstance(tree, tuple | list) else tree


# ---------------------------------------------------------------------------------------------------------------- parts


class Bench:
    """A model with a batch of random patches, and everything that is measured of them.

    Args:
        config: of the model. args: of the command line.
    """

    def __init__(self, config: MaskSAMConfig, args: argparse.Namespace):
        torch.manual_seed(0)
        self.args, self.device = args, torch.device(args.device)
        self.model = MaskSAM(config).to(self.device)
        self.criterion = SetCriterion()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, fused=True)
        self.model.gradient_checkpointing = args.checkpointing
        self.volume = torch.randn(args.batch_size, config.num_channels, *config.patch_size, device=self.device)
        labels = torch.randint(config.num_classes, (args.batch_size * config.patch_size[0], 8, 8), device=self.device)
        labels = nn.functional.interpolate(labels[None].float(), size=config.patch_size[1:])[0].long()
        self.segments = data.label_map_to_segments(labels, config.num_classes)
        if args.compile:
            self.model.compile()

    def autocast(self) -> torch.autocast:
        """As train.py and evaluate.py run the network."""
        dtype = AMP_TYPES[self.args.amp]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def measure(self, run: Callable) -> dict:
        """`measure` on this device."""
        return measure(run, self.device, self.args.repeat)

    def step(self) -> None:
        """One training step, as train.py makes it."""
        with self.autocast():
            outputs = self.model(self.volume)
        self.criterion(outputs, self.segments)[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def predict(self) -> Tensor:
        """The semantic maps of the batch."""
        with self.autocast():
            return self.model.eval().predict(self.volume)

    def part(self, call: Callable, inputs: tuple, weights: Iterable[Tensor] = ()) -> tuple[dict, object]:
        """Forward without a graph, then forward and backward, of one part.

        Args:
            call: of `inputs`. weights: that it reads, for the count of bytes.
        Returns:
            The costs, "training" of forward with backward; and the part's outputs.
        """
        with torch.no_grad(), self.autocast():
            outputs = call(*inputs)
            cost = self.measure(lambda: call(*inputs))
        moved = [*tensors(inputs), *tensors(outputs), *weights]
        cost["gigabytes"] = sum(tensor.nbytes for tensor in moved) / 1e9

        def forward_and_backward() -> None:
            with self.autocast():
                roots = [tensor for tensor in tensors(call(*leaves(inputs))) if tensor.requires_grad]
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
            self.optimizer.zero_grad()

        return cost | {"training": self.measure(forward_and_backward)}, outputs

    def parts(self) -> dict[str, dict]:
        """Every part of `MaskSAM.forward` in its order, the loss, the optimizer, and plain SAM."""
        model, sam = self.model, self.model.sam
        slices = self.volume.transpose(1, 2).flatten(0, 1)
        rows: dict[str, dict] = {}

        def add(name: str, call: Callable, *inputs, of: Iterable[nn.Module] = ()):
            weights = [parameter for module in of for parameter in module.parameters()]
            rows[name], outputs = self.part(call, inputs, weights)
            return outputs

        image = add("stem", model.stem, slices, of=[model.stem])
        encoder = [sam.image_encoder, model.encoder_adapters]
        neck, taps = add("encoder", model.encode, image, of=encoder)
        aux = add("prompt generator", model.prompt_generator, neck, taps, of=[model.prompt_generator])
        prompts = add("prompt encoder", model.encode_prompts, aux, of=[sam.prompt_encoder])
        sparse, dense, image_pe = prompts
        tokens = model.class_tokens + aux["class_tokens"]
        decoder = [sam.mask_decoder, model.decoder_adapters, model.classifier]
        class_logits, masks = add("decoder", model.decode, neck, image_pe, sparse, dense, tokens, of=decoder)
        outputs = {"class_logits": class_logits, "mask_logits": masks, **aux}
        terms = add("costs of all pairs", lambda outputs: pairwise_terms(outputs, self.segments), outputs)
        rows["matching"] = self.measure(lambda: self.criterion.matcher(terms, self.segments.present))
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        rows["optimizer"] = self.measure(self.optimizer.step)
        self.optimizer.zero_grad()
        add("plain SAM: encoder", sam.image_encoder, image, of=[sam.image_encoder])
        rows["plain SAM: decoder"] = self.measure(lambda: self.plain_decoder(neck))
        return rows

    @torch.no_grad()
    def plain_decoder(self, neck: Tensor) -> None:
        """SAM's own prompt encoder and mask decoder, image by image, with N boxes each."""
        sam, config = self.model.sam, self.model.config
        box = torch.tensor([0.0, 0, *reversed(config.encoder_size)], device=neck.device)
        with self.autocast():
            for embedding in neck:
                sparse, dense = sam.prompt_encoder(points=None, boxes=box.expand(config.num_queries, -1), masks=None)
                positions = sam.prompt_encoder.get_dense_pe()
                sam.mask_decoder(embedding[None], positions, sparse, dense, multimask_output=False)


# --------------------------------------------------------------------------------------------- loading, scoring, a case


def write_volume(folder: Path, shape: Iterable[int], num_classes: int) -> layouts.Case:
    """A random volume (D, H, W) with blocks of labels, as NIfTI."""
    rng, shape = np.random.default_rng(0), tuple(shape)
    coarse = rng.integers(0, num_classes, (4, 4, 4))
    label = coarse[np.ix_(*(np.arange(n) * 4 // n for n in shape))].astype(np.uint8)
    image = (label * 40 + rng.normal(0, 20, shape)).astype(np.int16)
    paths = [str(folder / f"{name}.nii.gz") for name in ("image", "label")]
    for path, array in zip(paths, (image, label)):
        nib.save(nib.Nifti1Image(array.T, np.diag([0.8, 0.8, 2.0, 1.0])), path)
    return layouts.Case("case", (paths[0],), paths[1])


def data_rows(bench: Bench, shape: Iterable[int] | None) -> dict[str, dict]:
    """A training patch from the cache, the scores of a case, and with a shape also a case of it from file to file."""
    config, args, rows = bench.model.config, bench.args, {}
    names = tuple(f"class {class_id}" for class_id in range(config.num_classes))
    with tempfile.TemporaryDirectory() as folder:
        volume = shape or [side * 3 // 2 for side in config.patch_size]
        case = write_volume(Path(folder), volume, config.num_classes)
        source = layouts.DataSource("bench", folder, "MR", ("MR",), names, (), {"train": (case,)})
        rows["prepare a case"] = measure(lambda: data.prepare_case(case, data.make_plan(source)), bench.device, 1)
        plan = data.prepare(source, Path(folder) / "cache")
        patches = data.PatchDataset([case], plan, Path(folder) / "cache", config.patch_size, 10**6, seed=0)
        indices = iter(range(10**6))
        rows["a patch from the cache"] = measure(lambda: patches[next(indices)], bench.device, 20)
        truth, geometry = nifti.read_label(case.label, config.num_classes)
        shifted = np.roll(truth, 2, axis=2)
        score = [shifted, truth, geometry.spacing, config.num_classes]
        rows["score a case"] = measure(lambda: metrics.score_maps(*score), bench.device, args.repeat)
        if shape:
            hidden = dataclasses.replace(case, label=None)
            options = {"device": bench.device, "amp": args.amp, "batch_size": args.batch_size, "desc": "windows"}

            def file_to_file() -> None:
                prepared = data.prepare_case(hidden, plan)
                label = evaluate.predict_case([bench.model.eval()], [prepared], **options)
                nifti.write_label_map(Path(folder) / "out.nii.gz", label, prepared.geometry)

            with Meter(bench.device) as meter:
                file_to_file()
            starts = (evaluate.window_starts(n, min(n, p), 0.5) for n, p in zip(volume, config.patch_size))
            windows = np.prod([len(axis) for axis in starts])
            cost = {"seconds": meter.seconds, "cpu_seconds": meter.cpu_seconds, "gib": meter.gib}
            rows[f"predict {' x '.join(map(str, volume))}, {windows} windows"] = cost
    return rows


# ----------------------------------------------------------------------------------------------------------- parameters

PARTS = ("sam", "stem", "encoder_adapters", "decoder_adapters", "prompt_generator", "tokens", "total")
# Table 5 of the paper, and the released network as built for ACDC and for AMOS: millions that train, and are frozen.
PUBLISHED = {"paper": (14, 91), "release, ACDC (ViT-B)": (21.4, 93.7), "release, AMOS (ViT-H)": (66, 641)}


def parameter_rows(config: MaskSAMConfig) -> dict[str, dict]:
    """Table 5: parameters by component of every backbone as the whole model, and of every variant of one backbone.

    Nothing is allocated: the networks are built on torch's "meta" device.

    Args:
        config: whose sizes and backbone are taken.
    Returns:
        name -> {part of `PARTS`: trained parameters, "frozen": parameters}; "tokens" are the depth embeddings, class
        tokens and the classifier.
    """
    rows = {}
    for sam, variant in [(sam, "b9") for sam in BACKBONES] + [(config.sam, variant) for variant in VARIANTS]:
        with torch.device("meta"):
            model = MaskSAM(dataclasses.replace(config, sam=sam, variant=variant))
        row = dict.fromkeys(PARTS, 0) | {"frozen": 0}
        for component, (trained, frozen) in count_parameters(model).items():
            part = component.split(".")[0]
            row[part if part in PARTS else "tokens"] += trained
            row["total"] += trained
            row["frozen"] += frozen
        rows[f"{sam} {variant}"] = row
    return rows


def print_parameters(rows: dict[str, dict]) -> None:
    """`parameter_rows` in millions, with what is published above."""
    print(f"{'millions':24s}" + "".join(f"{title.replace('_', ' '):>18s}" for title in (*PARTS, "frozen")))
    for name, (trained, frozen) in PUBLISHED.items():
        print(f"{name:24s}{trained:{18 * len(PARTS)}.1f}{frozen:18.1f}")
    for name, row in rows.items():
        print(f"{name:24s}" + "".join(f"{count / 1e6:18.3f}" for count in row.values()))


# --------------------------------------------------------------------------------------------------------- command line


def print_rows(rows: dict[str, dict], rates: tuple[float, float]) -> None:
    """One line a part: forward, forward with backward, arithmetic, limit of the forward."""
    print(f"{'':38s}{'seconds':>9s}{'+-':>7s}{'CPU-s':>9s}{'GiB':>7s}{'GFLOP':>9s}{'limit s':>9s}{'training s':>12s}"
          f"{'CPU-s':>9s}{'GiB':>7s}")  # fmt: skip
    for name, row in rows.items():
        line = f"{name:38s}{row['seconds']:9.3f}{row.get('spread', 0):7.3f}{row['cpu_seconds']:9.3f}{row['gib']:7.2f}"
        if row.get("gflop"):
            row["limit"] = max(row["gflop"] / rates[0], row.get("gigabytes", 0) / rates[1])
            line += f"{row['gflop']:9.1f}{row['limit']:9.3f}"
        if training := row.get("training"):
            line = f"{line:88s}{training['seconds']:12.3f}{training['cpu_seconds']:9.3f}{training['gib']:7.2f}"
        print(line, flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; None stands for the preset's or the recipe's value."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default="acdc", choices=PRESETS, help="preset (default: %(default)s)")
    add("--sam", choices=BACKBONES, help="backbone (default: the preset's)")
    add("--variant", choices=VARIANTS, default="b9")
    add("--patch", type=int, nargs=3, metavar=("D", "H", "W"), dest="patch_size")
    add("--encoder", type=int, nargs=2, metavar=("H", "W"), dest="encoder_size")
    add("--queries", type=int, dest="num_queries")
    add("--batch", type=int, default=1, dest="batch_size", help="patches (default: %(default)s)")
    add("--amp", choices=AMP_TYPES, help="autocast type (default: as train.py)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="of the encoder, in training")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--repeat", type=int, default=3, help="runs of each part (default: %(default)s)")
    add("--curve", choices=("depth", "queries", "side", "batch"), help="step and prediction over it, instead of parts")
    add("--volume", type=int, nargs=3, metavar=("D", "H", "W"), help="a case of this size, instead of parts")
    add("--parameters", action="store_true", help="count them by component, instead of measuring")
    add("--json", help="file to write")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.amp = args.amp or default_amp(args.device)
    return args


def vary(config: MaskSAMConfig, args: argparse.Namespace) -> Iterable[tuple[int, MaskSAMConfig, int]]:
    """The values of `--curve`: (value, configuration, batch size)."""
    depth, *patch = config.patch_size
    for factor in (1, 2, 4, 8):
        if args.curve == "depth":
            yield factor, dataclasses.replace(config, patch_size=(factor, *patch)), args.batch_size
        elif args.curve == "queries":
            yield 4 * factor, dataclasses.replace(config, num_queries=4 * factor), args.batch_size
        elif args.curve == "batch":
            yield factor, config, factor
        elif factor < 8:
            yield 256 * factor, dataclasses.replace(config, encoder_size=(256 * factor,) * 2), args.batch_size


def main(argv: list[str] | None = None) -> dict:
    """Measure, print, and write; returns what `--json` writes."""
    args = parse_arguments(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmark.py: {error}") from error


def run(args: argparse.Namespace) -> dict:
    """What `main` does with the arguments."""
    preset = PRESETS[args.data]
    preset = recipe(preset, args.sam or preset.sam)
    names = ("patch_size", "encoder_size", "num_queries")
    chosen = {name: getattr(args, name) or getattr(preset, name) for name in names}
    config = MaskSAMConfig(args.sam or preset.sam, args.variant, num_classes=len(preset.labels), **chosen)
    if args.parameters:
        rows = parameter_rows(config)
        print_parameters(rows)
        return write_json(args, {"config": dataclasses.asdict(config), "rows": rows})
    device = torch.device(args.device)
    rates = machine_rates(device, AMP_TYPES[args.amp] or torch.float32)
    facts = {"config": dataclasses.asdict(config), "arguments": vars(args), "threads": torch.get_num_threads()}
    facts |= {"torch": torch.__version__, "gflop_per_second": rates[0], "gigabyte_per_second": rates[1]}
    print(f"{config}\n{args.device}, {args.amp}, {torch.get_num_threads()} threads: a matrix product reaches "
          f"{rates[0]:.0f} GFLOP/s, a copy {rates[1]:.1f} GB/s")  # fmt: skip
    rows: dict[str, dict] = {}
    if args.curve:
        for value, varied, batch_size in vary(config, args):
            bench = Bench(varied, argparse.Namespace(**vars(args) | {"batch_size": batch_size}))
            rows[f"{args.curve} {value}"] = bench.measure(bench.predict) | {"training": bench.measure(bench.step)}
    else:
        bench = Bench(config, args)
        if not args.volume:
            rows = {"prediction": bench.measure(bench.predict), "training step": bench.measure(bench.step)}
            rows |= bench.parts()
        rows |= data_rows(bench, args.volume)
    print_rows(rows, rates)
    return write_json(args, facts | {"rows": rows})


def write_json(args: argparse.Namespace, results: dict) -> dict:
    """Write the results where `--json` says, if it does; returns them."""
    if args.json:
        content = json.dumps(results, indent=1)
        write_whole(Path(args.json), lambda file: file.write(content.encode()))
    return results


if __name__ == "__main__":
    main()
