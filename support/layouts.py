"""Data sets on disk: where the files of each case are, and which split each case belongs to (paper 3).

    --data, --root, --fold ── find_data ──> DataSource: train, val, test, testing ──> cases
    a folder of new images ── find_images ──> cases without labels
    a folder of another program's label maps ── find_predictions, with_box_source ──> one file per case

A folder with a dataset.json needs no code. A new preset needs an entry in PRESETS and one in FINDERS.
"""

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.phantom import write_phantom
from support.presets import PRESETS, Task

# The splits of the paper: nnFormer's patients for ACDC, TransUNet's cases for Synapse.
ACDC_TEST = {2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95}
ACDC_VAL = {89, 90, 91, 93, 94, 96, 97, 98, 99, 100}
SYNAPSE_TEST = {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}
# Ours: we choose the checkpoint on 3 of the 18 training cases; the paper's validation cases are its test set.
SYNAPSE_VAL = {27, 34, 40}
NUM_FOLDS = 5  # as the paper's cross-validation on AMOS
SPLIT_SEED = 0  # Ours: one seed for all runs, so that they all validate on the same cases
ENDINGS = (".nii.gz", ".nii")


@dataclasses.dataclass(frozen=True)
class Case:
    """One volume and its files.

    Args:
        name, images: name of the case, unique in its data set; one file per channel.
        label: file of the true label map; None if it is hidden.
        aliases: other names for its prediction; the first is the name that its challenge asks for.
        box_source: file of the label map whose boxes the network is given; None if it makes its own.
    """

    name: str
    images: tuple[str, ...]
    label: str | None
    aliases: tuple[str, ...] = ()
    box_source: str | None = None


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A data set on disk: cases of "train", "val", "test" (never trained on), "testing" (labels hidden)."""

    name: str
    root: str
    task: Task
    splits: dict[str, tuple[Case, ...]]


def find_data(data: str, root: str | None = None, fold: int | None = None) -> DataSource:
    """Find the files of a data set and split them.

    Args:
        data: name of a preset, or a folder with a `dataset.json`.
        root: folder with the files of a preset (default: data/<preset>). A missing phantom is written there.
        fold: fold of five of all cases outside "test" (default: the published split, else fold 0).
    Raises: FileNotFoundError without data, ValueError for unusable files or folds; both say what is expected.
    """
    if data not in PRESETS:
        return _find_folder(Path(data), fold or 0)
    preset, path = PRESETS[data], Path(root or Path("data") / data)
    if data == "phantom" and not path.exists():
        write_phantom(path)
    cases = FINDERS[data](path) if path.is_dir() else {}
    splits = {split: tuple(cases[split]) for split in ("train", "val", "test", "testing") if cases.get(split)}
    if not splits:
        found = "no cases" if path.is_dir() else "no such folder"
        way_out = f"Get {data} from {preset.home} and name its folder by --root."
        raise FileNotFoundError(f"{path}: found {found}, expected\n{preset.tree}\n{way_out}")
    if fold is not None or data == "amos":  # AMOS publishes no split
        pool = [case for split in ("train", "val") for case in splits.pop(split, ())]
        splits = split_cases(sorted(pool, key=lambda case: case.name), fold or 0) | splits
    return DataSource(data, str(path), preset.task, splits)


def split_cases(cases: Sequence[Case], fold: int) -> dict[str, tuple[Case, ...]]:
    """Shuffle the patients and hold one of five parts out as "val". Frames of a patient stay together."""
    patient = {case: case.name.split("_frame")[0] for case in cases}
    patients = list(dict.fromkeys(patient.values()))
    parts = np.array_split(np.random.default_rng(SPLIT_SEED).permutation(len(patients)), NUM_FOLDS)
    if not 0 <= fold < NUM_FOLDS or (fold and not len(parts[fold])):
        raise ValueError(f"--fold {fold}: expected 0 to {min(NUM_FOLDS, len(patients)) - 1}")
    held_out = {patients[i] for i in parts[fold]}
    val = tuple(case for case in cases if patient[case] in held_out)
    return {"train": tuple(case for case in cases if case not in val), "val": val}


def _find_phantom(root: Path) -> dict[str, list[Case]]:
    """Ours: of 34 patients, the last 6 are for testing and the 4 before them for validation."""
    numbers = sorted(int(patient.name[7:]) for patient in _patients(root, "training"))
    val, test = (max(1, round(share / 34 * len(numbers))) for share in (4, 6))
    return _find_cardiac(root, set(numbers[-val - test : -test]), set(numbers[-test:]))


def _patients(root: Path, folder: str) -> list[Path]:
    base = root / "database" if (root / "database").is_dir() else root
    return sorted((base / folder).glob("patient[0-9]*"))


def _find_cardiac(root: Path, val: set[int], test: set[int]) -> dict[str, list[Case]]:
    """Find both frames of each patient. Only Info.cfg says which they are: patient 90 has 04 and 11."""
    splits, problems = defaultdict(list), []
    for patient in _patients(root, "training") + _patients(root, "testing"):
        number, file, testing = int(patient.name[7:]), patient / "Info.cfg", patient.parent.name == "testing"
        text = file.read_text() if file.is_file() else "no such file"
        frames = dict(re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE))
        if len(frames) < 2:
            problems.append(f"{file}: found {text[:60]!r}, expected the lines 'ED: frame' and 'ES: frame'")
            continue
        split = "testing" if testing else "test" if number in test else "val" if number in val else "train"
        for phase in ("ED", "ES"):  # end-diastole, end-systole
            name = f"{patient.name}_frame{int(frames[phase]):02d}"
            image, label = (str(patient / f"{name}{end}.nii.gz") for end in ("", "_gt"))
            label = None if testing and not Path(label).exists() else label
            splits[split].append(Case(name, (image,), label, (f"{patient.name}_{phase}",)))
    if problems:
        raise ValueError("\n".join(problems))
    return splits


def _find_synapse(root: Path) -> dict[str, list[Case]]:
    levels = ("Abdomen/RawData/Training", "RawData/Training", "Training", ".")
    training = next(root / level for level in levels if (root / level).is_dir())
    splits = defaultdict(list)
    for folder in (training, training.parent / "Testing"):
        for image in sorted((folder / "img").glob("img[0-9]*.nii*")):
            number, testing = int(re.search(r"\d+", image.name)[0]), folder.name == "Testing"
            label = folder / "label" / image.name.replace("img", "label")
            file = None if testing and not label.exists() else str(label)
            split = "test" if number in SYNAPSE_TEST else "val" if number in SYNAPSE_VAL else "train"
            name, *aliases = (f"{word}{number:04d}" for word in ("case", "label", "img"))
            splits["testing" if testing else split].append(Case(name, (str(image),), file, tuple(aliases)))
    return splits


def _find_amos(root: Path) -> dict[str, list[Case]]:
    base = root / "amos22" if (root / "amos22").is_dir() else root

    def ct(part: str) -> list[Case]:
        labels, cases = base / f"labels{part}", []
        for file in sorted((base / f"images{part}").glob("amos_[0-9][0-9][0-9][0-9].nii.gz")):
            if int(file.name[5:9]) <= 500:  # higher numbers are MR
                known = part != "Ts" or labels.is_dir()
                cases.append(Case(file.name[:9], (str(file),), str(labels / file.name) if known else None))
        return cases

    return {"train": ct("Tr"), "test": ct("Va"), "testing": ct("Ts")}


FINDERS = {
    "phantom": _find_phantom,
    "acdc": lambda root: _find_cardiac(root, ACDC_VAL, ACDC_TEST),
    "synapse": _find_synapse,
    "amos": _find_amos,
}


def _find_folder(root: Path, fold: int) -> DataSource:
    """Find the cases of a folder in Decathlon's or nnU-Net's raw layout."""
    task, ending = _read_dataset_json(root)
    cases = _folder_cases(root, len(task.channels), ending)
    if len(cases) < 2:
        raise FileNotFoundError(f"{root}: found {len(cases)} cases, expected two in imagesTr and labelsTr")
    return DataSource(root.resolve().name, str(root), task, _folder_splits(root, cases, fold))


def _read_dataset_json(root: Path) -> tuple[Task, str]:
    """Read the task of a folder and the ending of its files. Modality and flips are decided here alone."""
    file = root / "dataset.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"--data {root}: found neither a preset nor a folder with a dataset.json, expected "
            f"{', '.join(PRESETS)}, or a folder DIR with\n"
            "DIR/dataset.json: labels, and modality (Decathlon) or channel_names (nnU-Net raw)\n"
            "DIR/imagesTr/CASE[_0000].nii.gz\nDIR/labelsTr/CASE.nii.gz"
        )
    try:
        content = json.loads(file.read_text())
        pairs = content["labels"].items()  # Decathlon: id -> name; nnU-Net: name -> id
        names = {int(i): name for i, name in pairs} if "0" in content["labels"] else {i: n for n, i in pairs}
        labels = tuple(names[i] for i in range(len(names)))
        table = content.get("channel_names") or content["modality"]
        channels = tuple(table[str(i)] for i in range(len(table)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "labels 0, 1, 2, ... with their names, and modality or channel_names"
        raise ValueError(f"{file}: found {type(error).__name__} {error}, expected {expected}") from error
    modality = "CT" if "ct" in channels[0].lower().split() else "MR"  # Ours: the first channel decides
    # Ours: left and right are exchanged, since patients are nearly symmetric, unless a class has a side.
    sided = any(word in label.lower() for label in labels for word in ("left", "right"))
    return Task(labels, channels, modality, () if sided else (2,)), content.get("file_ending", ".nii.gz")


def _folder_cases(root: Path, num_channels: int, ending: str) -> list[Case]:
    """Make a case of every label, and of every image without one: the check will name its missing label."""
    cases, claimed = [], set()
    for label in sorted((root / "labelsTr").glob(f"[!.]*{ending}")):
        name = label.name.removesuffix(ending)
        images = [root / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(num_channels)]
        if num_channels == 1 and not images[0].exists():  # Decathlon does not number the channel
            images = [root / "imagesTr" / label.name]
        cases.append(Case(name, tuple(map(str, images)), str(label)))
        claimed.update(images)
    for image in sorted(set((root / "imagesTr").glob(f"[!.]*{ending}")) - claimed):
        label = root / "labelsTr" / image.name
        cases.append(Case(image.name.removesuffix(ending), (str(image),), str(label)))
    return cases


def _folder_splits(root: Path, cases: list[Case], fold: int) -> dict[str, tuple[Case, ...]]:
    """Take a fold of nnU-Net's splits_final.json, or without such a file one of our five."""
    file, by_name = root / "splits_final.json", {case.name: case for case in cases}
    if not file.is_file():
        return split_cases(cases, fold)
    try:
        folds = json.loads(file.read_text())
        if not 0 <= fold < len(folds):
            raise ValueError(f"{file}: found {len(folds)} folds, expected more for --fold {fold}")
        splits = {split: tuple(by_name[name] for name in folds[fold][split]) for split in ("train", "val")}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        expected = f"a list of folds with the keys train and val and names such as {cases[0].name}"
        raise ValueError(f"{file}: found {type(error).__name__} {error}, expected {expected}") from error
    if not splits["train"] or not splits["val"]:
        raise ValueError(f"{file}: found an empty train or val in fold {fold}, expected a case in each")
    return splits


def find_images(folder: str | Path, num_channels: int) -> tuple[Case, ...]:
    """Find the images of a folder, as cases without labels.

    Each case has a file per channel: CASE_0000.nii.gz, CASE_0001.nii.gz, ..., or for one also CASE.nii.gz.
    """
    files = sorted(file for file in Path(folder).glob("[!.]*") if file.name.endswith(ENDINGS))
    if not files:
        raise FileNotFoundError(f"{folder}: found no .nii or .nii.gz files, expected the images to predict")
    images: dict[str, dict[int, str]] = {}
    for file in files:
        name, channel = file.name.removesuffix(".gz").removesuffix(".nii"), 0
        if (numbered := re.fullmatch(r"(.+)_(\d{4})", name)) and int(numbered[2]) < num_channels:
            name, channel = numbered[1], int(numbered[2])
        other = images.setdefault(name, {}).setdefault(channel, str(file))
        if other != str(file):
            raise ValueError(f"{file}: found {other} as channel {channel} of {name} too, expected one file")
    for name, own in images.items():
        if len(own) != num_channels:
            wanted = " ".join(f"{name}_{channel:04d}.nii.gz" for channel in range(num_channels))
            raise FileNotFoundError(f"{folder}: found {' '.join(own.values())} of {name}, expected {wanted}")
    return tuple(Case(name, tuple(own[c] for c in range(num_channels)), None) for name, own in images.items())


def find_predictions(cases: Sequence[Case], folder: str | Path, spare: bool = False) -> list[Path]:
    """Find the label map of each case in another program's folder.

    Each case needs one file under its name or an alias (patient001_ED, label0001). Files of no case are
    allowed only if `spare`. A FileNotFoundError lists all problems.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: found no such folder, expected label maps of {len(cases)} cases")
    files = {path.name: path for path in Path(folder).glob("[!.]*") if path.name.endswith(ENDINGS)}
    found, problems = [], []
    for case in cases:
        names = [name + ending for name in (case.name, *case.aliases) for ending in ENDINGS]
        own = [files.pop(name) for name in names if name in files]
        found += own[:1]
        if len(own) != 1:
            listed = " and ".join(map(str, own)) or "no file"
            problems.append(f"{folder}: found {listed} of {case.name}, expected one, {names[0]}")
    if not spare:
        problems += [f"{path}: found a file of no case, expected none" for path in files.values()]
    if problems:
        raise FileNotFoundError(f"{len(problems)} problems in {folder}:\n" + "\n".join(problems))
    return found


def with_box_source(cases: Sequence[Case], where: str) -> tuple[Case, ...]:
    """Set the maps whose boxes are given: "auto" none, "gt" the true ones, or another program's folder."""
    if where == "auto":
        return tuple(cases)
    files = [case.label for case in cases] if where == "gt" else find_predictions(cases, where, True)
    if None in files:
        name = cases[files.index(None)].name
        raise ValueError(f"--prompts gt: found no label of {name}, expected one of each case")
    return tuple(dataclasses.replace(case, box_source=str(file)) for case, file in zip(cases, files))


def box_source_suffix(where: str) -> str:
    """Return the ending for names of results: "", "-boxes-gt", or "-boxes-" and the folder's last names."""
    folder = "_".join(Path(where).resolve().parts[-2:]).replace(" ", "_")
    return {"auto": "", "gt": "-boxes-gt"}.get(where, f"-boxes-{folder}")
