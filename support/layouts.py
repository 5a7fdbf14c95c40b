"""Which data sets there are, where their files lie, and which case belongs to which split (paper 3).

    PRESETS        name -> labels, where to get it, and the run that the paper made on it
    find_data      --data, --root, --fold -> the cases of each split    (ACDC, Synapse, AMOS, any dataset.json folder)
    find_images    a folder of unlabelled files -> cases
    find_predictions, give_prompts    another program's label maps of cases, to score or to make boxes of

Only names are read here; what is in the files is the business of nifti.py. A new data set needs a dataset.json beside
it; a new preset an entry in PRESETS and a `_find_` function in FINDERS.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.phantom import write_phantom
from support.presets import PRESETS

# -------------------------------------------------------------------------------------------------------------- presets


# Patients and cases of the published splits (nnFormer's for ACDC, TransUNet's for Synapse).
ACDC_TEST = {2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95}
ACDC_VAL = {89, 90, 91, 93, 94, 96, 97, 98, 99, 100}
SYNAPSE_TEST = {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}
# Ours: held out of the 18 to choose a checkpoint; what others call validation is the test set.
SYNAPSE_VAL = {27, 34, 40}


@dataclasses.dataclass(frozen=True)
class Case:
    """One volume: name, one file per channel, and the label file, or None where it is hidden.

    aliases: what else its prediction may be called; first the name that its challenge wants submitted. prompts: a label
    map whose segments' boxes the network is given, None where it makes its own.
    """

    name: str
    images: tuple[str, ...]
    label: str | None
    aliases: tuple[str, ...] = ()
    prompts: str | None = None


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A data set on disk. splits: "train", "val" and as far as they exist others, each a tuple of cases.

    "test" has labels and is never trained on; the labels of "testing" are hidden. scored: as in `Preset`.
    """

    name: str
    root: str
    modality: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    flip_axes: tuple[int, ...]
    splits: dict[str, tuple[Case, ...]]
    scored: tuple[int, ...] = ()


# -------------------------------------------------------------------------------------------------------------- layouts

NUM_FOLDS = 5
SPLIT_SEED = 0  # Ours: one for all runs, so that runs of different seeds have the same validation cases


def find_data(data: str, root: str | None = None, fold: int | None = None) -> DataSource:
    """Find the files of a data set and split them.

    Args:
        data: name of a preset, or the path of a folder with a `dataset.json`. root: where a preset's files lie, by
            default data/<preset>; the phantom is written there if it is not.
        fold: of five-fold cross-validation over all that is not "test". None: the published split where there is one,
            else fold 0.
    Raises:
        FileNotFoundError: with where to get the data and the expected tree. ValueError: an unusable dataset.json, or
            there is no such fold.
    """
    if data not in PRESETS:
        return _find_folder(Path(data), fold or 0)
    preset = PRESETS[data]
    path = Path(root or Path("data") / data)
    if data == "phantom" and not path.exists():
        write_phantom(path)
    splits = {name: tuple(cases) for name, cases in FINDERS[data](path).items() if cases} if path.is_dir() else {}
    if not splits:
        found = "found no cases" if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"{path}: {found}. Expected {data}, from {preset.home}:\n{preset.tree}\nSee --root.")
    if fold is not None or data == "amos":  # which publishes no split
        pool = [case for split in ("train", "val") for case in splits.pop(split, ())]
        train, val = split_cases(sorted(pool, key=lambda case: case.name), fold or 0)
        splits = {"train": train, "val": val} | splits
    about = (preset.modality, (preset.modality,), preset.labels, preset.flip_axes, splits, preset.scored)
    return DataSource(data, str(path), *about)


def split_cases(cases: list[Case], fold: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Shuffle the patients and hold one of five parts out: (train, val), each in the order given.

    The frames of a patient, CASE_frame01 and so on, stay together.
    """
    patient = [case.name.split("_frame")[0] for case in cases]
    patients = list(dict.fromkeys(patient))
    parts = np.array_split(np.random.default_rng(SPLIT_SEED).permutation(len(patients)), NUM_FOLDS)
    if not 0 <= fold < NUM_FOLDS or (fold and not len(parts[fold])):
        raise ValueError(f"--fold {fold}: expected 0 to {min(NUM_FOLDS, len(patients)) - 1}")
    held_out = {patients[i] for i in parts[fold]}
    train = tuple(case for case, name in zip(cases, patient) if name not in held_out)
    return train, tuple(case for case, name in zip(cases, patient) if name in held_out)


def _find_acdc(root: Path) -> dict[str, list[Case]]:
    return _find_cardiac(root, ACDC_VAL, ACDC_TEST)


def _find_phantom(root: Path) -> dict[str, list[Case]]:
    """Ours: of 34 patients the last 6 to test, 4 before them to validate."""
    numbers = sorted(int(patient.name[7:]) for patient in _patients(root, "training"))
    val, test = (max(1, round(share / 34 * len(numbers))) for share in (4, 6))
    return _find_cardiac(root, set(numbers[-val - test : -test]), set(numbers[-test:]))


def _patients(root: Path, folder: str) -> list[Path]:
    base = root / "database" if (root / "database").is_dir() else root
    return sorted((base / folder).glob("patient[0-9]*"))


def _find_cardiac(root: Path, val: set[int], test: set[int]) -> dict[str, list[Case]]:
    splits: dict[str, list[Case]] = {"train": [], "val": [], "test": [], "testing": []}
    problems = []
    for folder in ("training", "testing"):
        for patient in _patients(root, folder):
            number = int(patient.name[7:])
            split = "test" if number in test else "val" if number in val else "train"
            try:
                splits["testing" if folder == "testing" else split] += _acdc_frames(patient)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return splits


def _acdc_frames(patient: Path) -> list[Case]:
    """End-diastole and end-systole of one patient. Only Info.cfg says which frames: patient 90 has 04, 11."""
    file = patient / "Info.cfg"
    text = file.read_text() if file.is_file() else "no such file"
    info = dict(re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE))
    if len(info) < 2:
        raise ValueError(f"{file}: found {text[:60]!r}, expected the lines 'ED: frame' and 'ES: frame'")
    cases = []
    for phase in ("ED", "ES"):
        name = f"{patient.name}_frame{int(info[phase]):02d}"
        label = patient / f"{name}_gt.nii.gz"
        hidden = patient.parent.name == "testing" and not label.exists()
        image = (str(patient / f"{name}.nii.gz"),)
        cases.append(Case(name, image, None if hidden else str(label), (f"{patient.name}_{phase}",)))
    return cases


def _find_synapse(root: Path) -> dict[str, list[Case]]:
    levels = ("Abdomen/RawData/Training", "RawData/Training", "Training", ".")
    training = next(root / level for level in levels if (root / level).is_dir())
    splits: dict[str, list[Case]] = {"train": [], "val": [], "test": [], "testing": []}
    for folder in (training, training.parent / "Testing"):
        for image in sorted((folder / "img").glob("img[0-9]*.nii*")):
            number = int(re.search(r"\d+", image.name)[0])
            label = folder / "label" / image.name.replace("img", "label")
            hidden = folder.name == "Testing" and not label.exists()
            split = "test" if number in SYNAPSE_TEST else "val" if number in SYNAPSE_VAL else "train"
            names = (f"case{number:04d}", f"label{number:04d}", f"img{number:04d}")
            case = Case(names[0], (str(image),), None if hidden else str(label), names[1:])
            splits["testing" if folder.name == "Testing" else split].append(case)
    return splits


def _find_amos(root: Path) -> dict[str, list[Case]]:
    base = root / "amos22" if (root / "amos22").is_dir() else root

    def ct(part: str) -> list[Case]:
        files = sorted((base / f"images{part}").glob("amos_[0-9][0-9][0-9][0-9].nii.gz"))
        files = [file for file in files if int(file.name[5:9]) <= 500]  # above are MR
        labels = base / f"labels{part}"
        hidden = part == "Ts" and not labels.is_dir()
        return [Case(file.name[:9], (str(file),), None if hidden else str(labels / file.name)) for file in files]

    return {"train": ct("Tr"), "test": ct("Va"), "testing": ct("Ts")}


FINDERS = {"phantom": _find_phantom, "acdc": _find_acdc, "synapse": _find_synapse, "amos": _find_amos}


def _find_folder(root: Path, fold: int) -> DataSource:
    """A Decathlon or nnU-Net raw folder, from its dataset.json."""
    file = root / "dataset.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"--data {root}: neither a preset ({', '.join(PRESETS)}) nor a folder with a dataset.json. Expected\n"
            "DIR/dataset.json with labels and modality (Decathlon) or channel_names (nnU-Net raw)\n"
            "DIR/imagesTr/CASE[_0000].nii.gz\nDIR/labelsTr/CASE.nii.gz"
        )
    try:
        description = json.loads(file.read_text())
        table = description["labels"]  # id -> name in Decathlon, name -> id in nnU-Net
        names = {int(key): name for key, name in table.items()} if "0" in table else {i: k for k, i in table.items()}
        labels = tuple(names[index] for index in range(len(names)))
        table = description.get("channel_names") or description["modality"]
        channels = tuple(table[str(index)] for index in range(len(table)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: found {type(error).__name__} {error}, expected labels 0, 1, 2, ... with their names, and "
            "modality or channel_names"
        ) from error
    cases = _folder_cases(root, len(channels), description.get("file_ending", ".nii.gz"))
    if len(cases) < 2:
        raise FileNotFoundError(f"{root}: found {len(cases)} cases, expected two or more in imagesTr and labelsTr")
    modality = "CT" if "ct" in channels[0].lower().split() else "MR"
    sided = any(word in label.lower() for label in labels for word in ("left", "right"))
    flip_axes = () if sided else (2,)  # Ours: as patients are nearly symmetric; what has a side keeps it
    splits = _folder_splits(root / "splits_final.json", cases, fold)
    return DataSource(root.resolve().name, str(root), modality, channels, labels, flip_axes, splits)


def _folder_cases(root: Path, num_channels: int, ending: str) -> list[Case]:
    """A case for every label, and for every image that none claims: `check_source` will miss its label."""
    cases, claimed = [], set()
    for label in sorted((root / "labelsTr").glob(f"[!.]*{ending}")):
        name = label.name.removesuffix(ending)
        images = [root / "imagesTr" / f"{name}_{channel:04d}{ending}" for channel in range(num_channels)]
        if num_channels == 1 and not images[0].exists():  # Decathlon numbers no channels
            images = [root / "imagesTr" / f"{name}{ending}"]
        cases.append(Case(name, tuple(map(str, images)), str(label)))
        claimed.update(images)
    for image in sorted((root / "imagesTr").glob(f"[!.]*{ending}")):
        if image not in claimed:
            name = image.name.removesuffix(ending)
            cases.append(Case(name, (str(image),), str(root / "labelsTr" / image.name)))
    return cases


def find_images(folder: str | Path, num_channels: int) -> tuple[Case, ...]:
    """Unlabelled cases of a folder: CASE_0000.nii.gz and so on, one file a channel; of one channel CASE.nii.gz serves.

    Raises:
        FileNotFoundError: no such folder, no NIfTI file in it, or a channel is missing. ValueError: one is there twice.
    """
    endings = (".nii.gz", ".nii")
    files = sorted(file for file in Path(folder).glob("[!.]*") if file.name.endswith(endings))
    if not files:
        raise FileNotFoundError(f"{folder}: found no .nii or .nii.gz files, expected the images to predict")
    images: dict[str, dict[int, str]] = {}
    for file in files:
        stem = file.name.removesuffix(".gz").removesuffix(".nii")
        numbered = re.fullmatch(r"(.+)_(\d{4})", stem)
        name, channel = stem, 0
        if numbered and int(numbered[2]) < num_channels:
            name, channel = numbered[1], int(numbered[2])
        other = images.setdefault(name, {}).setdefault(channel, str(file))
        if other != str(file):
            raise ValueError(f"{file}: found {other} as channel {channel} of {name} too, expected one file a channel")
    for name, files in images.items():
        if len(files) != num_channels:
            wanted = " ".join(f"{name}_{channel:04d}.nii.gz" for channel in range(num_channels))
            raise FileNotFoundError(f"{folder}: found {' '.join(files.values())} of {name}, expected {wanted}")
    return tuple(Case(name, tuple(files[c] for c in range(num_channels)), None) for name, files in images.items())


def _folder_splits(file: Path, cases: list[Case], fold: int) -> dict[str, tuple[Case, ...]]:
    """A fold of nnU-Net's splits_final.json, or where there is none, one of five shuffled folds."""
    if not file.is_file():
        return dict(zip(("train", "val"), split_cases(cases, fold)))
    by_name = {case.name: case for case in cases}
    try:
        folds = json.loads(file.read_text())
        if not 0 <= fold < len(folds):
            raise ValueError(f"{file}: found {len(folds)} folds, expected one of the number {fold}; see --fold")
        splits = {split: tuple(by_name[name] for name in folds[fold][split]) for split in ("train", "val")}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: found {type(error).__name__} {error}, expected a list of folds with the keys train and val and "
            f"names such as {cases[0].name}"
        ) from error
    if not splits["train"] or not splits["val"]:
        raise ValueError(f"{file}: found an empty train or val in fold {fold}, expected one case or more in each")
    return splits


# ----------------------------------------------------------------------------------------- another program's label maps


def find_predictions(cases: Sequence[Case], folder: str | Path, spare: bool = False) -> list[Path]:
    """The file of each case in another program's folder, under its name or an alias (patient001_ED, label0001).

    Args:
        spare: whether there may be files of other cases.
    Raises:
        FileNotFoundError: no such folder, or a list of all cases without a file and all files without a case.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected the label maps of {len(cases)} cases")
    endings = (".nii.gz", ".nii")
    files = {path.name: path for path in Path(folder).glob("[!.]*") if path.name.endswith(endings)}
    found, problems = [], []
    for case in cases:
        names = [name + ending for name in (case.name, *case.aliases) for ending in endings]
        own = [files.pop(name) for name in names if name in files]
        found += own[:1]
        if len(own) != 1:
            what = " and ".join(map(str, own)) or "no file"
            problems.append(f"{folder}: found {what} of {case.name}, expected one, {names[0]}")
    if not spare:
        problems += [f"{path}: found a file of no case of this split, expected none" for path in files.values()]
    if problems:
        raise FileNotFoundError(f"{len(problems)} problems in {folder}:\n" + "\n".join(problems))
    return found


def give_prompts(cases: Sequence[Case], prompts: str) -> tuple[Case, ...]:
    """The cases with the label maps that their boxes are made of.

    Args:
        prompts: "gt", their own labels, or a folder of another program's label maps; "auto" gives none.
    Raises:
        ValueError: a case without truth. FileNotFoundError: as `find_predictions`.
    """
    if prompts == "auto":
        return tuple(cases)
    if prompts != "gt":
        files = map(str, find_predictions(cases, prompts, spare=True))
    elif hidden := [case.name for case in cases if case.label is None]:
        raise ValueError(f"--prompts gt: {len(hidden)} cases have no truth, such as {hidden[0]}")
    else:
        files = (case.label for case in cases)
    return tuple(dataclasses.replace(case, prompts=file) for case, file in zip(cases, files))


def prompts_name(prompts: str) -> str:
    """What --prompts adds to names of files and folders: "", "-boxes-gt" or the end of the folder's path."""
    if prompts == "auto":
        return ""
    return "-boxes-" + ("gt" if prompts == "gt" else "_".join(Path(prompts).resolve().parts[-2:]).replace(" ", "_"))
