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
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
ENDINGS, ENDING = (".nii.gz", ".nii"), r"\.nii(\.gz)?$"
# Ours: parts of names that tell scans of a patient apart: ED, ES, frame01, t0, tp1, v2, visit, ses-01, ...
SCAN = r"ED|ES|baseline|follow-?up|visit|[tv]\d{1,2}|(frame|time|timepoint|tp|visit|ses|session)[-_]?\d+"
SCAN = re.compile(rf"(?:^|[-_. ])(?:{SCAN})(?=[-_. ]|$)", re.IGNORECASE)
# Ours: a channel is CT if one of these is a whole word of its name.
CT_WORDS = set("ct cta cbct ncct cect hrct ldct mdct msct dect qct ctpa ccta".split())
# Keys of dataset.json that we read or that change nothing; we name all others as not read.
KNOWN_KEYS = """labels file_ending patient training numTraining name dataset_name description author reference
    licence license release version converted_by tensorImageSize numTest test""".split()


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


def find_data(data: str, root=None, fold=None, group=None, modality=None, flip=None) -> DataSource:
    """Find the files of a data set and split them.

    Args:
        data: name of a preset, or a folder with a `dataset.json`.
        root: folder with the files of a preset (default: data/<preset>). A missing phantom is written there.
        fold: fold of five of all cases outside "test" (default: the published split, else fold 0).
        group: regular expression with one group, the patient in a case's name (default: see `patient_of`).
        modality: list of `MODALITIES`, one for all channels or one for each (default: by the task).
        flip: list of letters of D H W, the axes that may be flipped (default: by the task).
    Raises: FileNotFoundError without data, ValueError for unusable files or options, with what is expected.
    """
    if data not in PRESETS:
        if root and Path(root).resolve() != Path(data).resolve():
            raise ValueError(f"--root {root}: found beside the folder {data}, expected beside a preset")
        return _find_folder(Path(data), fold or 0, group, modality, flip)
    preset, path, notes = PRESETS[data], Path(root or Path("data") / data), []
    if data == "phantom" and not path.exists():
        write_phantom(path)
    cases = FINDERS[data](path) if path.is_dir() else {}
    splits = {split: tuple(cases[split]) for split in ("train", "val", "test", "testing") if cases.get(split)}
    if not splits:
        found = f"no cases of {data}" if path.is_dir() else "no such folder"
        way_out = f"Get {data} from {preset.home} and name its folder by --root."
        raise FileNotFoundError(f"{path}: found {found}, expected\n{preset.tree}\n{way_out}")
    if fold is not None or data == "amos":  # AMOS publishes no split
        pool = [case for split in ("train", "val") for case in splits.pop(split, ())]
        splits = split_cases(sorted(pool, key=lambda case: case.name), fold or 0, group) | splits
        notes = _patient_notes(splits, group)
    elif group:
        raise ValueError(f"--group {group}: found the published split of {data}, expected --fold beside it")
    if cases.get("mr"):
        notes.append(f"{len(cases['mr'])} cases with ids above 500, which are MR, are left out.")
    return DataSource(data, str(path), _choose(preset.task, modality, flip), splits, tuple(notes))


def _choose(task: Task, modality: Sequence[str] | None, flip: Sequence[str] | None) -> Task:
    """Set the modality and the flips that the user asks for."""
    if flip is not None:
        if set(letters := "".join(flip).upper()) - set("DHW"):
            raise ValueError(f"--flip {' '.join(flip)}: expected letters of D H W, or none of them")
        task = dataclasses.replace(task, flip_axes=tuple(i for i in range(3) if "DHW"[i] in letters))
    if modality is not None:
        known, count = {choice.lower(): choice for choice in MODALITIES}, len(task.channels)
        chosen = tuple(known.get(choice.lower(), "") for choice in modality)
        if "" in chosen or len(chosen) not in (1, count):
            expected = f"{', '.join(MODALITIES)}: one for all channels, or one for each of {count}"
            raise ValueError(f"--modality: found {' '.join(modality) or 'none'}, expected {expected}")
        task = dataclasses.replace(task, modality=chosen * (count // len(chosen)))
    return task


def patient_of(name: str, group: str | None = None) -> str:
    """Return the patient in a case's name: the group of a pattern, or else the name without `SCAN`'s parts.

    Raises: ValueError if the pattern is none, has not exactly one group, or does not match.
    """
    if group is None:
        return SCAN.sub("", name).strip("-_. ") or name
    try:
        match, count = re.search(group, name), re.compile(group).groups
        if count == 1 and match and match[1]:
            return match[1]
        found = f"{count} groups" if count != 1 else f"no match in {name}"
    except (re.error, OverflowError):
        found = "no regular expression"
    expected = "one group, the patient in every name, such as (.+)_frame"
    raise ValueError(f"the pattern {group} (--group): found {found}, expected {expected}")


def _patients_of(cases: Sequence[Case], group: str | None) -> dict[Case, str]:
    patients = {case: patient_of(case.name, group) for case in cases}
    if group is None and len(set(patients.values())) == 1:  # a guess that leaves nothing to split is wrong
        return {case: case.name for case in cases}
    return patients


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
        raise ValueError(f"the pattern {group} (--group): found one patient, {patients[0]}, expected two")
    if not 0 <= fold < NUM_FOLDS or (fold and not len(parts[fold])):
        raise ValueError(f"--fold {fold}: expected 0 to {min(NUM_FOLDS, len(patients)) - 1}")
    held_out = {patients[i] for i in parts[fold]}
    val = tuple(case for case in cases if patient[case] in held_out)
    return {"train": tuple(case for case in cases if patient[case] not in held_out), "val": val}


def _files(path: Path) -> dict[str, str]:
    """Return the NIfTI files of a folder, or the one file, by their names without ending."""
    files = {}
    for file in [path] if path.is_file() else sorted(path.glob("[!.]*")):
        if file.name.endswith(ENDINGS) and file.is_file():
            other = files.setdefault(re.sub(ENDING, "", file.name), str(file))
            if other != str(file):
                raise ValueError(f"{file}: found {other} too, expected one file of this name")
    return files


def _find_phantom(root: Path) -> dict[str, list[Case]]:
    """Ours: of 34 patients, the last 6 are for testing and the 4 before them for validation."""
    numbers = sorted(int(patient.name[7:]) for patient in _patients(root, "training"))
    val, test = (max(1, round(share / 34 * len(numbers))) for share in (4, 6))
    return _find_cardiac(root, set(numbers[-val - test : -test]), set(numbers[-test:]), "phantom")


def _patients(root: Path, folder: str) -> list[Path]:
    base = root / "database" if (root / "database").is_dir() else root
    return sorted((base / folder).glob("patient[0-9]*"))


def _find_cardiac(root: Path, val: set[int], test: set[int], preset: str) -> dict[str, list[Case]]:
    """Find both frames of each patient. Only Info.cfg says which they are: patient 90 has 04 and 11."""
    splits, problems = defaultdict(list), []
    for patient in _patients(root, "training") + _patients(root, "testing"):
        number, file, testing = int(patient.name[7:]), patient / "Info.cfg", patient.parent.name == "testing"
        text = file.read_text(errors="replace") if file.is_file() else "no such file"
        frames = dict(re.findall(r"^(ED|ES):\s*(\d+)", text, re.MULTILINE))
        if len(frames) < 2:
            problems.append(f"{file}: found {text[:60]!r}, expected the lines 'ED: frame' and 'ES: frame'")
            continue
        if (other := "phantom" if "Group: SYN" in text else "acdc") != preset:
            raise ValueError(f"{file}: found a patient of {other}, expected {preset}; use --data {other}")
        files = _files(patient)
        split = "testing" if testing else "test" if number in test else "val" if number in val else "train"
        for phase in ("ED", "ES"):  # end-diastole, end-systole
            name = f"{patient.name}_frame{int(frames[phase]):02d}"
            image, label = (files.get(f, str(patient / f"{f}.nii.gz")) for f in (name, f"{name}_gt"))
            label = None if testing and f"{name}_gt" not in files else label
            splits[split].append(Case(name, (image,), label, (f"{patient.name}_{phase}",)))
    if problems:
        raise ValueError("\n".join(problems))
    return splits


def _find_synapse(root: Path) -> dict[str, list[Case]]:
    levels = ("Abdomen/RawData/Training", "RawData/Training", "Training", ".")
    training = next(root / level for level in levels if (root / level).is_dir())
    splits = defaultdict(list)
    for folder in (training, training.parent / "Testing"):
        labels, testing = _files(folder / "label"), folder.name == "Testing"
        images = {stem: file for stem, file in _files(folder / "img").items() if re.match(r"img\d", stem)}
        for stem, image in images.items():
            number, label = int(re.search(r"\d+", stem)[0]), stem.replace("img", "label")
            file = labels.get(label, None if testing else str(folder / f"label/{label}.nii.gz"))
            split = "test" if number in SYNAPSE_TEST else "val" if number in SYNAPSE_VAL else "train"
            name, *aliases = (f"{word}{number:04d}" for word in ("case", "label", "img"))
            splits["testing" if testing else split].append(Case(name, (image,), file, tuple(aliases)))
    return splits


def _find_amos(root: Path) -> dict[str, list[Case]]:
    base = root / "amos22" if (root / "amos22").is_dir() else root
    splits = defaultdict(list)
    for split, part in (("train", "Tr"), ("test", "Va"), ("testing", "Ts")):
        for case in _folder_cases(base, part, 1, whole=True):
            if re.fullmatch(r"amos_\d{4}", case.name):
                splits["mr" if AMOS_MR.fullmatch(case.name) else split].append(case)
    return splits


FINDERS = {
    "phantom": _find_phantom,
    "acdc": lambda root: _find_cardiac(root, ACDC_VAL, ACDC_TEST, "acdc"),
    "synapse": _find_synapse,
    "amos": _find_amos,
}


def _find_folder(root: Path, fold: int, group, modality, flip) -> DataSource:
    """Find the cases of a folder in Decathlon's or nnU-Net's raw layout."""
    task, content = _read_dataset_json(root)
    task = _choose(task, modality, flip)
    if group is None and "patient" in content:
        group = str(content["patient"])
    whole = bool(_files(root / "imagesTr").keys() & _files(root / "labelsTr"))  # images without numbers
    cases, tests = (_folder_cases(root, part, len(task.channels), whole) for part in ("Tr", "Ts"))
    if len(cases) < 2:
        raise FileNotFoundError(f"{root}: found {len(cases)} cases, expected two in imagesTr and labelsTr")
    if twice := {case.name for case in cases} & {case.name for case in tests}:
        raise ValueError(f"{root}: found {min(twice)} in imagesTr and imagesTs, expected it in one of them")
    file = root / "splits_final.json"
    splits = _read_splits(file, cases, fold) if file.is_file() else split_cases(cases, fold, group)
    kinds = ", ".join(f"{name} as {kind}" for name, kind in zip(task.channels, task.modality))
    notes = [f"Channels are normalised by {'--modality' if modality else 'their names'}: {kinds}."]
    if left := len(cases) - sum(map(len, splits.values())):
        notes.append(f"{left} cases are not used: they are in no part of fold {fold} of {file.name}.")
    if tests:
        splits["testing" if tests[0].label is None else "test"] = tuple(tests)
    if mr := sum(bool(AMOS_MR.fullmatch(case.name)) for case in cases + tests):
        notes.append(f"{mr} of {len(cases + tests)} cases have ids above 500, which are MR in AMOS.")
    notes += _unread_notes(content, cases) + _patient_notes(splits, group)
    return DataSource(root.resolve().name, str(root), task, splits, tuple(notes))


def _read_json(file: Path, expected: str):
    """Read JSON in UTF-8, with or without a byte-order mark; refuse a key that stands twice."""

    def unique(pairs: list) -> dict:
        if len(content := dict(pairs)) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"{file}: found {key} twice in one list, expected {expected}")
        return content

    try:
        return json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{file}: found no JSON in UTF-8, line {line}, expected {expected}") from error


def _read_dataset_json(root: Path) -> tuple[Task, dict]:
    """Read the task of a folder and all of its dataset.json."""
    file, expected = root / "dataset.json", "labels 0, 1, 2, ... with names, and modality or channel_names"
    if not file.is_file():
        raise FileNotFoundError(
            f"--data {root}: found neither a preset nor a folder with a dataset.json, expected "
            f"{', '.join(PRESETS)}, or a folder DIR with\n"
            "DIR/dataset.json: labels, and modality (Decathlon) or channel_names (nnU-Net raw)\n"
            "DIR/imagesTr/CASE[_0000].nii.gz\nDIR/labelsTr/CASE.nii.gz"
        )
    content = _read_json(file, expected)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: found no keys, expected {expected}")
    if content.get("file_ending", ".nii") not in ENDINGS:
        found = json.dumps(content["file_ending"])
        raise ValueError(f"{file}: found the file_ending {found}, expected .nii.gz: convert the files")
    labels, table = content.get("labels"), content.get("channel_names") or content.get("modality")
    numbers = [str(i) for i in range(len(table))] if isinstance(table, dict) else []
    if not numbers or set(table) != set(numbers) or not all(isinstance(x, str) for x in table.values()):
        expected = 'modality or channel_names such as {"0": "MRI"}'
        raise ValueError(f"{file}: found the channels {json.dumps(table)[:60]}, expected {expected}")
    channels = tuple(table[number] for number in numbers)
    return Task(_class_names(file, labels), channels, tuple(map(modality_of, channels)), None), content


def modality_of(channel: str) -> str:
    """Ours: one of nnU-Net's names, CT by a whole word of the channel's name, and MR for all others."""
    known = {choice.lower(): choice for choice in MODALITIES}
    words = re.split(r"[\W_]+", channel.lower())
    is_ct = CT_WORDS.intersection(words) or "computed tomography" in " ".join(words)
    return known.get(channel.strip().lower(), "CT" if is_ct else "MR")


def _class_names(file: Path, labels) -> tuple[str, ...]:
    """Return the names of the classes 0, 1, 2, ...; each reason to refuse them has its own sentence."""
    if not isinstance(labels, dict) or len(labels) < 2:
        raise ValueError(f"{file}: found no two labels, expected labels 0, 1, 2, ... with their names")
    by_id = all(key.isdecimal() for key in labels)  # Decathlon: id -> name; nnU-Net: name -> id
    names = {}
    for pair in labels.items():
        value, name = pair if by_id else pair[::-1]
        number = int(value) if str(value).isdecimal() else -1
        checks = {
            "one id for each label, since a voxel has one class": isinstance(value, list),
            "no voxels to ignore; give them another label": str(name).lower() == "ignore",
            "a whole number in one byte, 0 to 255, for each name": not 0 <= number <= 255,
            "a name in quotes for each id": not isinstance(name, str) or not name.strip(),
            f"one name for each id, not {names.get(number)} too": number in names,
            "one id for each name": name in names.values(),
            "the background as id 0": number > 0 and str(name).lower() == "background",
        }
        if wrong := [expected for expected, found in checks.items() if found]:
            found = f"the label {json.dumps(name)} with the id {json.dumps(value)}"
            raise ValueError(f"{file}: found {found}, expected {wrong[0]}")
        names[number] = name
    if missing := [str(i) for i in range(len(names)) if i not in names]:
        expected = "ids 0, 1, 2, ... without gaps; name or renumber them"
        raise ValueError(f"{file}: found no label with the id {', '.join(missing)}, expected {expected}")
    return tuple(names[i] for i in range(len(names)))


def _unread_notes(content: dict, cases: list[Case]) -> list[str]:
    """Name what stands in dataset.json and is not read, or differs from the folder."""
    notes, known, listed = [], {case.name for case in cases}, content.get("training")
    channels = "channel_names" if content.get("channel_names") else "modality"
    if unread := sorted(content.keys() - {channels, *KNOWN_KEYS}):
        notes.append(f"dataset.json: not read: {', '.join(unread)}.")
    listed = listed if isinstance(listed, list) else []
    entries = [str(x.get("image") if isinstance(x, dict) else x) for x in listed]
    differing = sorted({re.sub(ENDING, "", Path(x).name) for x in entries} ^ known) if entries else []
    if differing or str(content.get("numTraining", len(cases))) != str(len(cases)):
        used = f"the {len(cases)} cases of the folder are used"
        example = f" (for example in {differing[0]})" if differing else ""
        notes.append(f"dataset.json: training or numTraining differs from the folder{example}; {used}.")
    return notes


def _folder_cases(root: Path, part: str, num_channels: int, whole: bool) -> list[Case]:
    """Make a case of every label, and of every image without one: the check will name its missing label.

    Labels of the test set ("Ts") are hidden if there is none at all.
    """
    images, labels = (_files(root / f"{kind}{part}") for kind in ("images", "labels"))
    cases, hidden = [], part == "Ts" and not labels
    for name, label in labels.items():
        stems = [f"{name}_{channel:04d}" for channel in range(num_channels)]
        if name in images or (whole and not images.keys() & set(stems)):
            stems = [name]
        files = [images.pop(stem, str(root / f"images{part}/{stem}.nii.gz")) for stem in stems]
        cases.append(Case(name, tuple(files), label))
    for stem, file in images.items():
        if re.fullmatch(r"_\d{4}", stem[-5:]) and stem[:-5] in labels:
            raise ValueError(f"{file}: found a further channel of {stem[:-5]}, expected {num_channels}")
    for name, files in _by_case(images, num_channels, whole).items():
        cases.append(Case(name, files, None if hidden else str(root / f"labels{part}/{name}.nii.gz")))
    return cases


def _read_splits(file: Path, cases: list[Case], fold: int) -> dict[str, tuple[Case, ...]]:
    """Take a fold of nnU-Net's splits_final.json."""
    expected = 'a list of folds such as {"train": [names], "val": [names]}'
    folds, by_name = _read_json(file, expected), {case.name: case for case in cases}
    parts = folds[fold] if isinstance(folds, list) and 0 <= fold < len(folds) else {}
    lists = list(parts.values()) if isinstance(parts, dict) and parts.keys() == {"train", "val"} else [0]
    if not all(isinstance(part, list) and part for part in lists):
        found = f"{json.dumps(parts)[:60]} as" if parts else "no"
        raise ValueError(f"{file}: found {found} fold {fold}, expected {expected}")
    names = parts["train"] + parts["val"]
    wrong = [json.dumps(x) for x in names if not isinstance(x, str) or x not in by_name]
    if wrong or len(set(names)) < len(names):
        found = f"{', '.join(wrong[:5])}" if wrong else f"{Counter(names).most_common(1)[0][0]} twice"
        expected = f"each name once, of a case in imagesTr such as {cases[0].name}"
        raise ValueError(f"{file}: found {found} in fold {fold}, expected {expected}")
    return {split: tuple(by_name[name] for name in parts[split]) for split in ("train", "val")}


def find_images(path: str | Path, num_channels: int) -> tuple[Case, ...]:
    """Find the images of a folder, or one image, as cases without labels.

    Each case has a file per channel, CASE_0000.nii.gz, CASE_0001.nii.gz, ..., or one for all, CASE.nii.gz.
    A FileNotFoundError says that there is none, a ValueError that channels are missing or too many.
    """
    if not (files := _files(Path(path))):
        raise FileNotFoundError(f"{path}: found no .nii or .nii.gz files, expected the images to predict")
    return tuple(Case(name, own, None) for name, own in _by_case(files, num_channels).items())


def _by_case(files: dict[str, str], num_channels: int, whole: bool = False) -> dict[str, tuple[str, ...]]:
    """Return the files of each case in the order of their channels; `whole`: no number is a channel.

    A number is a channel where all names have one, or where one case has 0000 and 0001. Ours: numbers from
    0010 on count cases, as AMOS's do, unless the model has as many channels.
    """
    cases = defaultdict(dict)
    for stem, file in files.items():
        numbered = re.fullmatch(r"(.+)_(\d{4})", stem)
        cases[numbered[1] if numbered else stem][int(numbered[2]) if numbered else -1] = file
    numbers = {number for own in cases.values() for number in own}
    unclear = -1 in numbers and not any({0, 1} <= own.keys() for own in cases.values())
    if whole or unclear or max(numbers, default=0) >= max(10, num_channels):
        return {stem: (file,) for stem, file in files.items()}
    for name, own in cases.items():
        if own.keys() not in ({-1}, set(range(num_channels))):
            wanted = " ".join(f"{name}_{channel:04d}.nii.gz" for channel in range(num_channels))
            way_out = f"if the numbers count cases, rename the files, for example to {name}-0001.nii.gz"
            raise ValueError(f"found {' '.join(own.values())} of {name}, expected {wanted}; {way_out}")
    return {name: tuple(own.values()) for name, own in cases.items()}


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
