"""The house: where files lie, what may import what, marks of decisions, and the pages against the code.

python tests/test_house.py      prints the drawing of imports that stands in docs/reading-map.md
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from support import sam

ROOT = Path(__file__).parents[1]
TOP = ("adapters", "prompt_generator", "matcher", "model", "data", "train", "evaluate")
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tools/*.py")])
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
PAGES["checkpoints/README.md"] = (ROOT / "checkpoints/README.md").read_text()
TEXT = "\n".join(PAGES.values())
PLACE = re.compile(r"`([\w/]+\.py)::([\w.]+)`")
# Arrows point down only: a file imports from its own floor's files to the right of it, or from a floor below.
FLOORS = "tools/visualize tools/benchmark tools/baselines tools/compare, train, evaluate, data model, "
FLOORS = [floor.split() for floor in f"{FLOORS} prompt_generator adapters, matcher".split(",")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def imports(path: Path) -> set[str]:
    """Files of the project that a file imports, anywhere in it."""
    known, found = {name_of(script) for script in SCRIPTS}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.replace(".", "/") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.replace(".", "/"))
            found |= {f"{node.module}/{alias.name}".replace(".", "/") for alias in node.names}
    return found & known


def drawing() -> str:
    """One line per file, top floor first: the files of the project that it imports."""
    order = [name for floor in FLOORS for name in floor]
    order += sorted(name_of(script) for script in SCRIPTS if script.parent.name == "support")
    lines = [f"{name:24s}-> {', '.join(sorted(imports(ROOT / f'{name}.py'))) or '-'}" for name in order]
    return "\n".join(line.replace("support/", "") if line[0] != "s" else line for line in lines)


def symbols(file: str) -> set[str]:
    """Names that a file defines at its top, and `Class.method`; the file's own stem stands for its header."""
    names = {Path(file).stem}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = (child.name for child in ast.walk(node) if isinstance(child, ast.FunctionDef))
            names |= {node.name, *(f"{node.name}.{name}" for name in inner)}
        else:
            stored = (n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store))
            names |= {n.id for n in stored if isinstance(n, ast.Name)}
    return names


def places_of(mark: str) -> set[tuple[str, str]]:
    """(file, top-level symbol) around every remark with a mark; the file's own header counts as its stem."""
    places = set()
    for script in SCRIPTS:
        nodes = ast.parse(script.read_text()).body
        for number, line in enumerate(script.read_text().splitlines(), 1):
            if re.search(rf"\b{mark}\b", line) and "MaskSAM (Ours)" not in line:
                # A comment above a definition belongs to it: the first node that ends at or after the line.
                node = next(node for node in nodes if node.end_lineno >= number)
                target = ast.walk(node.targets[0]) if isinstance(node, ast.Assign) else ()
                names = [child.id for child in target if isinstance(child, ast.Name)]
                places.add((f"{name_of(script)}.py", [*names, getattr(node, "name", script.stem)][0]))
    return places


# ------------------------------------------------------------------------------------------------ the layout


def test_the_top_level_is_the_card_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)


def test_imports_point_down_only_and_in_no_circle():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    graph, done = {name_of(script): imports(script) for script in SCRIPTS}, set()
    for name, used in graph.items():
        above = {other for other in used if not other.startswith("support/")}
        assert not (name.startswith("support/") and above), (name, above)
        wrong = {other for other in above if floor[other] <= floor[name]}
        assert all(other.startswith("tools/") and name.startswith("tools/") for other in wrong), (name, wrong)
    while len(done) < len(graph):
        ready = {name for name, used in graph.items() if name not in done and used <= done}
        assert ready, f"a circle among {sorted(graph.keys() - done)}"
        done |= ready


def test_training_needs_matplotlib_only_when_it_draws_and_the_model_is_met_at_once():
    for name in ("train", "evaluate", "data", "model"):
        top = ast.parse((ROOT / f"{name}.py").read_text()).body
        text = "\n".join(ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom))
        assert "pictures" not in text and "matplotlib" not in text, name
    classes = [node for node in top if isinstance(node, ast.ClassDef)]  # of model.py
    mask_sam = next(node for node in classes if node.name == "MaskSAM")
    assert classes[0].lineno < 60 and mask_sam.end_lineno <= 250


def test_sizes_stay_within_the_budget():
    lines = {name_of(script): script.read_text().count("\n") for script in SCRIPTS}
    assert sum(lines[name] for name in TOP[:4]) <= 1050
    # The aims are 5,000 and 3,500. These limits are what was reached, so that neither grows unnoticed.
    assert sum(lines.values()) <= 6000
    assert sum(path.read_text().count("\n") for path in ROOT.glob("tests/*.py")) <= 4420
    functions = [(s.stem, n) for s in SCRIPTS for n in ast.walk(ast.parse(s.read_text()))
                 if isinstance(n, ast.FunctionDef) and n.name != "parse_arguments"]  # fmt: skip
    assert not [(stem, n.name) for stem, n in functions if n.end_lineno - n.lineno > 45]


# ------------------------------------------------------------------------------------- pages against the code


def test_the_drawing_of_imports_is_that_of_the_code():
    assert drawing() in PAGES["reading-map.md"]


@pytest.mark.parametrize("mark", ["Ours", "Release"])
def test_every_decision_with_a_mark_is_on_the_page_of_decisions(mark):
    part = re.search(rf"^## {mark}$\n(.*?)(?=^## |\Z)", PAGES["decisions.md"], re.MULTILINE | re.DOTALL)[1]
    assert set(PLACE.findall(part)) == places_of(mark)


def test_every_place_that_the_pages_name_exists():
    places = PLACE.findall(TEXT)
    assert len(places) > 60
    assert not [f"{file}::{symbol}" for file, symbol in places if symbol not in symbols(file)]


def test_every_row_of_the_reading_map_has_code_and_a_test():
    rows = [line for line in PAGES["reading-map.md"].splitlines() if re.match(r"\| (2|3|table|fig)", line)]
    assert len(rows) >= 25
    for row in rows:
        files = [file.startswith("tests/") for file, _ in PLACE.findall(row)]
        assert True in files and False in files, row


def test_the_list_of_files_says_every_file_with_its_lines():
    listed = dict(re.findall(r"^(?:\| )?`?([\w/]+\.py)`?[ |]+(\d+)\b", PAGES["README.md"], re.MULTILINE))
    for name in TOP:
        lines = (ROOT / f"{name}.py").read_text().count("\n")
        assert abs(int(listed[f"{name}.py"]) - lines) <= 10, (name, lines)
    assert not [name_of(script) for script in SCRIPTS if script.stem not in PAGES["README.md"]]


def test_one_table_of_letters():
    letters = re.search(r"^## Letters$\n(.*?)(?=^## |\Z)", PAGES["README.md"], re.MULTILINE | re.DOTALL)[1]
    letters = re.findall(r"^\| ([\w ]+) \|", letters, re.MULTILINE)
    assert {"B", "D", "S", "H W", "h w", "C", "N", "K"} <= set(letters)


def test_every_picture_and_link_exists():
    for name, page in PAGES.items():
        folder = ROOT / ("docs" if "/" not in name and name != "README.md" else Path(name).parent)
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page):
            assert (folder / target).exists(), (name, target)


def parser_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_arguments


def test_commands_of_pages_and_headers_are_understood(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    blocks += [ast.get_docstring(ast.parse(script.read_text())) or "" for script in SCRIPTS]
    command = r"\b(?:python3?|torchrun(?: --\S+)*) (?:-m )?(tools\.\w+|data\.py|train\.py|evaluate\.py)(.*)"
    seen = re.findall(command, "\n".join(blocks))
    assert len(seen) >= 25
    for script, rest in seen:
        arguments = shlex.split(re.split(r"\s{3,}|#|&&", rest.replace("\\", ""))[0].replace("|", " "))
        if "--help" not in arguments:
            parser_of(script)(arguments)


@pytest.mark.parametrize("script", ["data", "train", "evaluate", *FLOORS[0]])
def test_help_ends_with_the_examples_of_the_header(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser_of(script)(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].strip().startswith(("python", "torchrun"))


def test_the_two_commands_install_what_is_pinned():
    blocks = re.findall(r"```bash\n(.*?)```", PAGES["README.md"], re.DOTALL)
    assert any("pip install -r requirements.txt && python train.py" in block for block in blocks)
    assert any("pip install -r requirements.txt && python -m pytest -q" in block for block in blocks)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ +# .+", line) for line in lines)  # a version and a reason


def test_shipped_weights_are_those_of_their_table():
    files = sorted((ROOT / "checkpoints").glob("*.pt"))
    assert files and all(sam.file_sha256(file) in PAGES["checkpoints/README.md"] for file in files)


if __name__ == "__main__":
    print(drawing())
