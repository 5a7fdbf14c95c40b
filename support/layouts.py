"""Data sets on disk: where the files of each case are, and which split each case belongs to (paper 3).

    --data, --root, --fold, --group ── find_data ──> DataSource: train, val, test, testing ──> cases
    new images, a folder or one file ── find_images ──> cases without labels
    a folder of another program's label maps ── find_predictions, with_box_source ──> one file per case

A folder with a dataset.json needs no code. A new preset needs an entry in PRESETS and one in FINDERS.
"""

import dataclasses
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from support.files import refusal
from support.phantom import write_phantom
from support.presets import MODALITIES, PRESETS, Task

# The splits of the paper: nnFormer's patients for ACDC, TransUNet's cases for Synapse.
ACDC_TEST = {2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95}
ACDC_VAL = {89, 90, 91, 93, 94, 96, 97, 98, 99, 100}
SYNAPSE_TEST = {1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38}
# Ours: we choose the checkpoint on 3 of the 18 training cases; the paper's validation cases are its test set.
SYNAPSE_VAL = {27, 34, 40}
AMOS_MR = re.compile(r"amos_(?!0500)(0[5-9]|[1-9]\d)\d\d")  # ids above 500
NUM_FOLDS = 5  # as the paper's cross-validation on AMOS
SPLIT_SEED = 0  # Ours: one seed for all runs, so that they all validate on the same cases
# Ours: parts of names that tell scans of a patient apart: ED, ES, frame01, t0, tp1, v2, visit, ses-01, ...
SCAN = r"ED|ES|baseline|follow-?up|visit|[tv]\d{1,2}|(frame|time|timepoint|tp|visit|ses|session)[-_]?\d+"
SCAN = re.compile(rf"(?:^|[-_. ])(?:{SCAN})(?=[-_. ]|$)", re.IGNORECASE)
# Ours: a channel is CT if one of these is a whole word of its name, and MR if it is none of MODALITIES.
CT_WORDS = r"ct|cta|cbct|ncct|cect|hrct|ldct|mdct|msct|dect|qct|ctpa|ccta|computed[\W_]+tomography"
CT_WORDS = re.compile(rf"(?:^|[\W_])(?:{CT_WORDS})(?:[\W_]|$)", re.IGNORECASE)
MODALITY_NAMES = {name.lower(): name for name in MODALITIES}
# Keys of dataset.json that we read or that change nothing; we name all others as not read.
KNOWN_KEYS = """labels patient training numTraining numTest test file_ending tensorImageSize name dataset_name
    description author reference licence license release version converted_by""".split()


@dataclasses.dataclass(frozen=True)
class Case:
    """One volume and its files.

    Args:
        name, images: unique in its data set; one file per channel, or one (x, y, z, channel) for all.
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
    """Cases of "train", "val", "test" (never trained on), "testing" (labels hidden); notes on guesses."""

    name: str
    root: str
    task: Task
    splits: dict[str, tuple[Case, ...]]
    notes: tuple[str, ...] = ()

    @property
    def cases(self) -> tuple[Case, ...]:
        """All cases, each once."""
        return tuple(dict.fromkeys(sum(self.splits.values(), ())))


def find_data(data: str, root=None, fold=None, group=None, modality=None, flip=None) -> DataSource:
    """Find the files of a data set and split them.

    Args:
        data: name of a preset, or a folder with a `dataset.json`.
        root: folder with the files of a preset (default: data/<preset>). A missing phantom is written there.
        fold: fold of five of all cases outside "test" (default: the published split, else fold 0), or "all":
            they are all trained on, and "val" is that of the default.
        group: regular expression with one group, the patient in a case's name (default: all but `SCAN`).
        modality: list of `MODALITIES`, one for all channels or one for each (default: by the task).
        flip: list of letters of D H W, the axes that may be flipped (default: by the task).
    Raises: FileNotFoundError without data, ValueError for unusable files or options. Both say how to go on.
    """
    if fold == "all":
        source = find_data(data, root, None, None if data in PRESETS else group, modality, flip)
        train, val = (source.splits.get(split, ()) for split in ("train", "val"))
        note = f"The {len(val)} cases of val are trained on too: their Dice is that of seen cases."
        splits = source.splits | {"train": train + val}
        return dataclasses.replace(source, splits=splits, notes=(*source.notes, note))
    if data not in PRESETS:
        if root and Path(root).resolve() != Path(data).resolve():
            raise refusal(f"--root {root}", f"beside the folder {data}", "beside a preset")
        return _find_folder(Path(data), fold or 0, group, modality, flip)
    preset, path, notes = PRESETS[data], Path(root or Path("data") / data), []
    if data == "phantom" and not path.exists():
        write_phantom(path)
    cases = FINDERS[data](path) if path.is_dir() else {}
    splits = {split: tuple(cases[split]) for split in ("train", "val", "test", "testing") if cases.get(split)}
    if not splits:
        expected = f"a folder for --root with the files of {preset.home}:\n{preset.tree}"
        raise FileNotFoundError(f"{path}: found no cases of {data}, expected {expected}")
    if fold is not None or data == "amos":  # AMOS publishes no split
        pool = [case for split in ("train", "val") for case in splits.pop(split, ())]
        splits = split_cases(sorted(pool, key=lambda case: case.name), fold or 0, group) | splits
        notes = _patient_notes(splits, group)
    elif group:
        raise refusal(f"--group {group}", f"the published split of {data}", "--fold beside it")
    if cases.get("mr"):
        notes.append(f"{len(cases['mr'])} cases with ids above 500, which are MR, are left out.")
    return DataSource(data, str(path), _choose(preset.task, modality, flip), splits, tuple(notes))


def _choose(task: Task, modality: Sequence[str] | None, flip: Sequence[str] | None) -> Task:
    """Set the modality and the flips that the user asks for."""
    if flip is not None:
        task = dataclasses.replace(task, flip_axes=tuple(sorted({"DHW".index(axis) for axis in flip})))
    if modality is not None:
        chosen, count = tuple(MODALITY_NAMES.get(name.lower()) for name in modality), len(task.channels)
        if None in chosen or len(chosen) not in (1, count):
            expected = f"one for all channels, or one for each of {count}, of {', '.join(MODALITIES)}"
            raise refusal("--modality", " ".join(modality), expected)
        task = dataclasses.replace(task, modality=chosen * (count // len(chosen)))
    return task


def _patients_of(cases: Sequence[Case], group: str | None) -> dict[Case, str]:
    """Return the patient in the name of each case: what the pattern's group matches, or all but `SCAN`."""
    names = [case.name for case in cases]
    if group is None:
        patients = [SCAN.sub("", name).strip("-_. ") or name for name in names]
        return dict(zip(cases, patients if len(set(patients)) > 1 else names))  # one patient: a wrong guess
    try:
        matches = [re.search(group, name) for name in names]
    except (re.error, OverflowError):
        matches = [None]
    for name, match in zip(names, matches):
        if not match or match.re.groups != 1 or not match[1]:
            raise refusal(f"--group {group}", f"no patient in {name}", "a pattern such as (.+)_frame")
    return {case: match[1] for case, match in zip(cases, matches)}


def _patient_notes(splits: dict[str, tuple[Case, ...]], group: str | None) -> list[str]:
    """Say which cases are of one patient, and which patients are both trained on and held out."""
    patients, notes = _patients_of(sum(splits.values(), ()), group), []
    (often, count), *others = Counter(patients.values()).most_common()
    if group or count > 1:
        why = f"by the pattern {group}" if group else "by their names (--group overrides)"
        example = " and ".join([case.name for case in patients if patients[case] == often][:2])
        notes = [f"{len(patients)} cases are of {1 + len(others)} patients {why}; of one: {example}."]
    for split in sorted(splits.keys() - {"train"}):
        if both := {patients[case] for case in splits["train"]} & {patients[case] for case in splits[split]}:
            notes.append(f"{len(both)} patients, such as {min(both)}, are in train and in {split}.")
    return notes


def split_cases(cases: Sequence[Case], fold: int, group: str | None = None) -> dict[str, tuple[Case, ...]]:
    """Shuffle the patients and hold one of five parts out as "val". Cases of a patient stay together."""
    patient = _patients_of(cases, group)
    patients = list(dict.fromkeys(patient.values()))
    parts = np.array_split(np.random.default_rng(SPLIT_SEED).permutation(len(patients)), NUM_FOLDS)
    if len(patients) == 1 < len(cases):
        raise refusal(f"--group {group}", f"one patient, {patients[0]}", "two")
    if not 0 <= fold < NUM_FOLDS or (fold and not len(parts[fold])):
        raise refusal("--fold", str(fold), f"0 to {min(NUM_FOLDS, len(patients)) - 1}")
    held_out = {patients[i] for i in parts[fold]}
    val = tuple(case for case in cases if patient[case] in held_out)
    return {"train": tuple(case for case in cases if patient[case] not in held_out), "val": val}


def _files(path: Path) -> dict[str, str]:
    """Return the NIfTI files of a folder, or the one file, by their names without ending."""
    files = {}
    for file in [path] if path.is_file() else sorted(path.glob("[!.]*")):
        if (match := re.fullmatch(r"(.+)\.nii(\.gz)?", file.name)) and file.is_file():
            if (other := files.setdefault(match[1], str(file))) != str(file):
                raise refusal(file, f"{other} too", "one file of this name")
    return files


def _find_cases(images: Path, labels: Path | None, num_channels: int, whole: bool) -> Iterator[Case]:
    """Make a case of every label, and of every image without one: the check will name the missing files.

    An image has a file per channel, CASE_0000.nii.gz, CASE_0001.nii.gz, ..., or one for all, CASE.nii.gz.
    If its names are `whole`, numbers count cases. Labels are hidden if "labelsTs" is empty or `labels` None.
    """
    truths = _files(labels) if labels else {}
    hidden = labels is None or (labels.name == "labelsTs" and not truths)
    found = {name: {} for name in truths}  # case -> channel, or None for all channels -> file
    for stem, file in _files(images).items():
        name, number = re.fullmatch(r"(.+?)(?:_(\d{4}))?", stem).groups()
        one_file = number is None or stem in truths or (whole and name not in truths)
        found.setdefault(stem if one_file else name, {})[None if one_file else int(number)] = file
    folder = images.parent if images.is_file() else images
    for name, files in found.items():
        channels = [None] if None in files or (whole and not files) else range(num_channels)
        stems = {channel: name if channel is None else f"{name}_{channel:04d}" for channel in channels}
        if files.keys() - stems.keys():
            expected = f"{' '.join(stems.values())}; if numbers count cases, rename them, as {name}-0001"
            raise refusal(images, f"{' '.join(files.values())} of {name}", expected)
        own = tuple(files.get(channel, str(folder / f"{stem}.nii.gz")) for channel, stem in stems.items())
        yield Case(name, own, None if hidden else truths.get(name, str(labels / f"{name}.nii.gz")))


def find_images(path: str | Path, num_channels: int) -> tuple[Case, ...]:
    """Find the images of a folder, or one image, as cases without labels.

    A number at the end of a name is a channel where all names have one, or where one case has 0000 and 0001.
    Ours: numbers from 0010 on count cases, as AMOS's do, unless the model has as many channels.
    Raises: FileNotFoundError if there is no image, ValueError if a case has too many channels.
    """
    if not (stems := _files(Path(path))):
        found = "no .nii or .nii.gz files" if Path(path).exists() else "no such file or folder"
        raise FileNotFoundError(f"{path}: found {found}, expected the images to predict")
    numbers = [int(stem[-4:]) for stem in stems if re.search(r"._\d{4}$", stem)]
    two_channels = any(stem[:-1] + "0" in stems for stem in stems if stem.endswith("_0001"))
    whole = (len(numbers) < len(stems) and not two_channels) or max(numbers) >= max(10, num_channels)
    return tuple(_find_cases(Path(path), None, num_channels, whole))


def _find_cardiac(root: Path, val=ACDC_VAL, test=ACDC_TEST, preset="acdc") -> dict[str, list[Case]]:
    """Find both frames of each patient. Only Info.cfg says which they are: patient 90 has 04 and 11."""
    base, splits = root / "database" if (root / "database").is_dir() else root, defaultdict(list)
    problems = []
    for patient in sorted(base.glob("t*ing/patient[0-9]*")):  # training, testing
        number, file, testing = int(patient.name[7:]), patient / "Info.cfg", patient.parent.name == "testing"
        text = file.read_text(errors="replace") if file.is_file() else "no such file"
        frames = dict(re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE))
        if len(frames) < 2:
            problems.append(f"{file}: found {text[:60]!r}, expected the lines 'ED: frame' and 'ES: frame'")
            continue
        if (other := "phantom" if "Group: SYN" in text else "acdc") != preset:
            raise refusal(file, f"a patient of {other}", f"{preset}; use --data {other}")
        files = _files(patient)
        split = "testing" if testing else "test" if number in test else "val" if number in val else "train"
        for phase in ("ED", "ES"):  # end-diastole, end-systole
            name = f"{patient.name}_frame{int(frames[phase]):02d}"
            image = files.get(name, str(patient / f"{name}.nii.gz"))
            label = files.get(f"{name}_gt", None if testing else str(patient / f"{name}_gt.nii.gz"))
            splits[split].append(Case(name, (image,), label, (f"{patient.name}_{phase}",)))
    if problems:
        raise ValueError("\n".join(problems))
    return splits


def _find_phantom(root: Path) -> dict[str, list[Case]]:
    """Ours: of 34 patients, the last 6 are for testing and the 4 before them for validation."""
    numbers = sorted(int(patient.name[7:]) for patient in root.glob("**/training/patient[0-9]*"))
    val, test = (max(1, round(share / 34 * len(numbers))) for share in (4, 6))
    return _find_cardiac(root, numbers[-val - test : -test], numbers[-test:], "phantom")


def _find_synapse(root: Path) -> dict[str, list[Case]]:
    levels = ("Abdomen/RawData/Training", "RawData/Training", "Training", ".")
    training = next(root / level for level in levels if (root / level).is_dir())
    splits = defaultdict(list)
    for folder in (training, training.parent / "Testing"):
        labels, testing = _files(folder / "label"), folder.name == "Testing"
        for stem, image in _files(folder / "img").items():
            if match := re.match(r"img(\d+)", stem):
                number, label = int(match[1]), stem.replace("img", "label")
                file = labels.get(label, None if testing else str(folder / f"label/{label}.nii.gz"))
                split = "test" if number in SYNAPSE_TEST else "val" if number in SYNAPSE_VAL else "train"
                name, *aliases = (f"{word}{number:04d}" for word in ("case", "label", "img"))
                splits["testing" if testing else split].append(Case(name, (image,), file, tuple(aliases)))
    return splits


def _find_amos(root: Path) -> dict[str, list[Case]]:
    base = root / "amos22" if (root / "amos22").is_dir() else root
    splits = defaultdict(list)
    for split, part in (("train", "Tr"), ("test", "Va"), ("testing", "Ts")):
        for case in _find_cases(base / f"images{part}", base / f"labels{part}", 1, whole=True):
            splits["mr" if AMOS_MR.fullmatch(case.name) else split].append(case)
    return splits


FINDERS = {"phantom": _find_phantom, "acdc": _find_cardiac, "synapse": _find_synapse, "amos": _find_amos}


def _find_folder(root: Path, fold: int, group, modality, flip) -> DataSource:
    """Find the cases of a folder in Decathlon's or nnU-Net's raw layout."""
    task, content = _read_dataset_json(root)
    task = _choose(task, modality, flip)
    group = group or ("patient" in content and str(content["patient"])) or None  # a pattern as for --group
    whole = bool(_files(root / "imagesTr").keys() & _files(root / "labelsTr"))  # images without numbers
    parts = ((root / f"images{part}", root / f"labels{part}") for part in ("Tr", "Ts"))
    cases, tests = (list(_find_cases(*part, len(task.channels), whole)) for part in parts)
    if len(cases) < 2:
        raise refusal(root, f"{len(cases)} cases", "two, as .nii.gz or .nii files in imagesTr and labelsTr")
    if twice := {case.name for case in cases} & {case.name for case in tests}:
        raise refusal(root, f"{min(twice)} in imagesTr and imagesTs", "it in one of them")
    file = root / "splits_final.json"
    splits = _read_splits(file, cases, fold) if file.is_file() else split_cases(cases, fold, group)
    kinds = ", ".join(f"{name} as {kind}" for name, kind in zip(task.channels, task.modality))
    notes = [f"Channels are normalised by {'--modality' if modality else 'their names'}: {kinds}."]
    if left := len(cases) - sum(map(len, splits.values())):
        notes.append(f"{left} cases are not used: they are in no part of fold {fold} of {file.name}.")
    if tests:
        splits["testing" if tests[0].label is None else "test"] = tuple(tests)
    if unread := sorted(content.keys() - set(KNOWN_KEYS)):
        notes.append(f"dataset.json: not read: {', '.join(unread)}.")
    listed = content.get("training") or content.get("numTraining", len(cases))
    if (number := str(len(listed) if isinstance(listed, list) else listed)) != str(len(cases)):
        notes.append(f"dataset.json lists {number} training cases; the {len(cases)} of the folder are used.")
    return DataSource(root.resolve().name, str(root), task, splits, (*notes, *_patient_notes(splits, group)))


def _read_json(file: Path, expected: str):
    """Read JSON in UTF-8, with or without a byte-order mark; refuse equal keys (Python takes the last)."""

    def unique(pairs: list) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise refusal(file, f"a key twice among {', '.join(key for key, _ in pairs)}", expected)
        return dict(pairs)

    try:
        return json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise refusal(file, f"no JSON in UTF-8, line {getattr(error, 'lineno', 1)}", expected) from error


def _read_dataset_json(root: Path) -> tuple[Task, dict]:
    """Read the task of a folder. Return it with all of its dataset.json but the channels."""
    file = root / "dataset.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"--data {root}: found neither a preset nor a folder with a dataset.json, expected "
            f"{', '.join(PRESETS)}, or a folder DIR with\nDIR/dataset.json: labels, and modality (Decathlon) "
            "or channel_names (nnU-Net raw)\nDIR/imagesTr/CASE[_0000].nii.gz\nDIR/labelsTr/CASE.nii.gz"
        )
    expected = 'labels such as {"0": "background", "1": "tumour"} and modality such as {"0": "MRI"}'
    content = _read_json(file, expected)
    labels = _class_names(file, content.get("labels") if isinstance(content, dict) else None)
    table = content.pop("channel_names", None) or content.pop("modality", None)
    channels = [table.get(str(i)) for i in range(len(table))] if isinstance(table, dict) else []
    if not channels or not all(isinstance(name, str) for name in channels):
        raise refusal(file, f"the channels {json.dumps(table)[:60]}", expected)
    modality = [MODALITY_NAMES.get(x.strip().lower(), "CT" if CT_WORDS.search(x) else "MR") for x in channels]
    return Task(labels, tuple(channels), tuple(modality), None), content


def _class_names(file: Path, labels) -> tuple[str, ...]:
    """Return the names of the classes 0, 1, 2, ..."""
    expected = "ids 0 (background), 1, 2, ... 255 and names in quotes, each once; no regions and no ignore"
    labels = labels if isinstance(labels, dict) else {}
    by_id = all(key.isdecimal() for key in labels)  # Decathlon: id -> name; nnU-Net: name -> id
    names = {}
    for value, name in labels.items() if by_id else zip(labels.values(), labels):
        number, word = int(value) if str(value).isdecimal() else -1, str(name).strip().lower()
        bad_id = not 0 <= number <= 255 or number in names or (number and word == "background")
        if bad_id or not isinstance(name, str) or name in names.values() or word in ("", "ignore"):
            raise refusal(file, f"the label {json.dumps(name)} with the id {json.dumps(value)}", expected)
        names[number] = name
    if missing := [str(i) for i in range(max(2, len(names))) if i not in names]:
        raise refusal(file, f"no label with the id {', '.join(missing)}", expected)
    return tuple(names[i] for i in range(len(names)))


def _read_splits(file: Path, cases: list[Case], fold: int) -> dict[str, tuple[Case, ...]]:
    """Take a fold of nnU-Net's splits_final.json."""
    expected = 'a list of folds such as {"train": [names], "val": [names]}'
    folds, by_name = _read_json(file, expected), {case.name: case for case in cases}
    parts = folds[fold] if isinstance(folds, list) and 0 <= fold < len(folds) else None
    lists = [*parts.values()] if isinstance(parts, dict) and parts.keys() == {"train", "val"} else [None]
    if not all(isinstance(names, list) and names for names in lists):
        raise refusal(file, f"{json.dumps(parts)[:60]} as fold {fold}", expected)
    for name in (names := sum(lists, [])):
        if names.count(name) > 1 or name not in list(by_name):  # a name may be anything, even a list
            raise refusal(file, f"{json.dumps(name)} in fold {fold}", f"cases once, such as {cases[0].name}")
    return {split: tuple(by_name[name] for name in parts[split]) for split in ("train", "val")}


def find_predictions(cases: Sequence[Case], folder: str | Path, spare: bool = False) -> list[Path]:
    """Find the label map of each case in another program's folder.

    Each case needs one file under its name or an alias (patient001_ED, label0001). Files of no case are
    allowed only if `spare`. A FileNotFoundError names all cases without one file, or all files of no case.
    """
    files = _files(Path(folder))
    own = [[files.pop(name) for name in (case.name, *case.aliases) if name in files] for case in cases]
    if wrong := [case.name for case, found in zip(cases, own) if len(found) != 1]:
        found = f"no file of {len(wrong)} cases, or two, such as of {', '.join(wrong[:3])}"
        found = found if Path(folder).is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder}: found {found}; expected a label map of each of {len(cases)} cases"
        )
    if files and not spare:
        raise FileNotFoundError(f"{folder}: found files of no case, {', '.join(files)}, expected none")
    return [Path(found[0]) for found in own]


def with_box_source(cases: Sequence[Case], where: str) -> tuple[Case, ...]:
    """Set the maps whose boxes are given: "auto" none, "gt" the true ones, or another program's folder."""
    if where == "auto":
        return tuple(cases)
    files = [case.label for case in cases] if where == "gt" else find_predictions(cases, where, True)
    if None in files:
        raise refusal("--prompts gt", f"no label of {cases[files.index(None)].name}", "one of each case")
    return tuple(dataclasses.replace(case, box_source=str(file)) for case, file in zip(cases, files))


def box_source_suffix(where: str) -> str:
    """Return the ending for names of results: "", "-boxes-gt", or "-boxes-" and the folder's last names."""
    folder = "_".join(Path(where).resolve().parts[-2:]).replace(" ", "_")
    return {"auto": "", "gt": "-boxes-gt"}.get(where, f"-boxes-{folder}")
