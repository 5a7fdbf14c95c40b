"""The README against the code: reading map, list of ours, files, commands."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import data
import evaluate
import train
from tools import benchmark, visualize

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))
PLACE = re.compile(r"`([\w/]+\.py)::([\w.]+)`")


def section(title: str) -> str:
    """The text below a heading, up to the next of its rank."""
    return re.search(rf"^## {re.escape(title)}$\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def symbols(file: str) -> set[str]:
    """Names that a file defines at its top, and `Class.method`."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{child.name}" for child in ast.walk(node) if isinstance(child, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def places_of_ours() -> set[tuple[str, str]]:
    """(file, top-level symbol) around every remark that says a decision is ours; for file headers the file's stem."""
    places = set()
    for script in SCRIPTS:
        text = script.read_text()
        nodes = ast.parse(text).body
        for number, line in enumerate(text.splitlines(), 1):
            if not re.search(r"\bOurs\b", line):
                continue
            # A comment above a definition belongs to it, so the first node that ends at or after the line counts.
            node = next(node for node in nodes if node.end_lineno >= number)
            if isinstance(node, ast.Assign):
                places.add((script.name, node.targets[0].id))
            else:
                places.add((script.name, getattr(node, "name", script.stem)))
    return places


def test_every_place_in_the_reading_map_exists():
    places = PLACE.findall(section("Reading map"))
    assert len(places) > 30
    missing = [f"{file}::{symbol}" for file, symbol in places if symbol not in symbols(file)]
    assert not missing


def test_every_row_of_the_reading_map_has_code_and_a_test():
    rows = [line for line in section("Reading map").splitlines() if line.startswith("| 2") or line.startswith("| 3")]
    assert len(rows) >= 12
    for row in rows:
        files = [file for file, _ in PLACE.findall(row)]
        assert any(file.startswith("tests/") for file in files), row
        assert any(not file.startswith("tests/") for file in files), row


def test_the_list_of_ours_is_that_of_the_code():
    listed = {(file, symbol) for file, symbol in PLACE.findall(section("Ours: what the paper leaves open"))}
    assert listed == places_of_ours()


def test_the_tree_names_every_file_and_no_other():
    tree = re.search(r"```\n(.*?)```", section("Files"), re.DOTALL)[1]
    listed = {line.split()[0] for line in tree.splitlines() if line}
    assert {name for name in listed if name.endswith(".py")} == {script.name for script in SCRIPTS}
    assert all((ROOT / name).exists() for name in listed)


def test_every_picture_and_link_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    parts = [part for line in lines for part in line.split("#")[0].split("&&")]
    return [shlex.split(part) for part in parts if part.strip()]


PARSERS = {f"{module.__name__}.py": module.parse_arguments for module in (benchmark, data, evaluate, train, visualize)}


@pytest.mark.parametrize("command", [c for c in commands() if PARSERS.keys() & set(c)], ids=" ".join)
def test_commands_are_understood(command):
    script = next(word for word in command if word in PARSERS)
    PARSERS[script](command[command.index(script) + 1 :])


def test_the_two_commands_install_what_is_pinned():
    first, second = (c for c in re.findall(r"```bash\n(.*?)```", section("Two commands"), re.DOTALL))
    assert first.strip().endswith("&& python train.py") and second.strip().endswith("&& python -m pytest -q")
    assert all("pip install -r requirements.txt" in command for command in (first, second))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ +# .+", line) for line in lines)  # a version and a reason
