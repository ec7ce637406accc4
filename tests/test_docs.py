"""The documentation says what the code does: pages for codes, links, commands and generated tables."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

import imgcls_fast
from imgcls_fast.cli import old
from imgcls_fast.cli.app import parse
from imgcls_fast.core.errors import CODES, DataError
from imgcls_fast.core.verbs import VERBS

from .test_layers import MAY_IMPORT, ONLY_FILES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        *(ROOT / room / "README.md" for room in ("python", "tests", "csrc", "benchmarks")),
    ]
)
PAGES = [page for page in PAGES if page.exists()]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def script() -> ModuleType:
    """scripts/make_docs.py as a module."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# ---------------------------------------------------------------- errors


def test_every_code_has_a_page_and_every_page_a_code():
    pages = {page.stem for page in (DOCS / "errors").glob("*.md")} - {"README"}
    assert pages == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_the_page_of_a_code_says_what_it_means_and_what_to_do(code: str):
    text = (DOCS / "errors" / f"{code}.md").read_text("utf-8")
    assert text.startswith(f"# {code}: {CODES[code]}\n")
    for heading in ("## Usual causes", "## What to do", "## Example"):
        assert heading in text
    assert f"error[{code}]: " in text
    exit_code = 5 if code.startswith("E9") else {"X130": 130}.get(code, DataError(code, "").exit_code)
    assert f"\nExit code {exit_code}.\n" in text


def test_the_index_of_errors_lists_every_code_with_its_meaning():
    text = (DOCS / "errors" / "README.md").read_text("utf-8")
    assert re.findall(r"^- \[(\w+)\]\(\1\.md\): (.*)$", text, re.MULTILINE) == list(CODES.items())


# ---------------------------------------------------------------- generated pages


def test_generated_pages_are_current():
    stale = [path for path, make in script().WRITTEN.items() if path.read_text("utf-8") != make()]
    assert not stale, "run python scripts/make_docs.py"


def test_every_old_option_name_is_listed_with_what_it_became():
    made = script()
    assert set(made.OLD_EXAMPLES) == set(old.OLD_NAMES)
    text = (DOCS / "cli.md").read_text("utf-8")
    for name in old.OLD_NAMES:
        assert f"| `{name}` |" in text


def test_no_generated_cell_depends_on_where_runs_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IMGCLS_RUNS", "/elsewhere/runs")
    assert "/elsewhere" not in script().cli_page()


# ---------------------------------------------------------------- links and commands


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    assert not broken


def commands(page: Path) -> list[str]:
    """Every `imgcls-fast ...` of the shell blocks, without comments and what follows a pipe."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|\||;|\s#", line)]
    return [part.removeprefix("time ") for part in parts if part.removeprefix("time ").startswith("imgcls-fast ")]


COMMANDS = [(name, command) for page, name in zip(PAGES, NAMES, strict=True) for command in commands(page)]


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[f"{n}: {c}" for n, c in COMMANDS])
def test_commands_of_the_documentation_parse(name: str, command: str):
    request, notes = parse(shlex.split(command)[1:])
    assert request.verb in {verb.name for verb in VERBS}
    assert not notes, "the documentation must not use old names"


def test_the_readme_begins_with_the_two_commands():
    first = "\n".join(blocks(ROOT / "README.md", "sh")[:1])
    assert "pip install . && imgcls-fast train" in first
    assert "pip install '.[test]' && pytest" in first


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_of_the_documentation_uses_what_exists(page: Path):
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ic":
                assert node.attr in imgcls_fast.__all__, f"ic.{node.attr} does not exist"


# ---------------------------------------------------------------- the map


PACKAGE = ROOT / "python" / "imgcls_fast"
ROOMS = sorted({path.parent.name for path in PACKAGE.glob("*/*.py")})


def rows_of_the_map() -> dict[str, tuple[str, str]]:
    """room -> (its modules, what it may import), as python/README.md has them."""
    text = (ROOT / "python" / "README.md").read_text("utf-8")
    return {room: (modules, imports) for room, modules, imports in re.findall(r"^\| `(\w+)/` \| (.*) \| (.*) \|$", text, re.MULTILINE)}


def test_the_map_has_a_row_for_each_room():
    assert sorted(rows_of_the_map()) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_the_map_of_rooms_names_every_module(room: str):
    named = re.findall(r"`(\w+)(?:\.py)?`", rows_of_the_map()[room][0])
    assert not {path.stem for path in (PACKAGE / room).glob("*.py") if not path.name.startswith("__")} - set(named)


@pytest.mark.parametrize("room", ROOMS)
def test_the_map_has_the_imports_of_the_table(room: str):
    allowed, _, some = rows_of_the_map()[room][1].partition("; ")
    words = set(re.findall(r"\w+", allowed))
    most, some_rooms = set(MAY_IMPORT) & words, {other: only for (here, other), only in ONLY_FILES.items() if here == room}
    if words <= {"all", "but", "cli"}:
        most = set(MAY_IMPORT) - {"cli", room}
    assert most == {other for other in MAY_IMPORT[room] if other not in some_rooms}
    for other, only in some_rooms.items():
        assert other in re.findall(r"\w+", some)
        assert {f"{room}/{name}.py" for name in re.findall(r"`(\w+)`", some)} == {name for name in only if (PACKAGE / name).exists()}


def test_every_verb_is_in_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    assert not [verb.name for verb in VERBS if f"`{verb.name}`" not in text]


# ---------------------------------------------------------------- the list of promises


def listed_tests() -> list[tuple[str, str]]:
    """(file, function) of every test that tests/README.md names."""
    text = (ROOT / "tests" / "README.md").read_text("utf-8")
    return sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", text)))


@pytest.mark.parametrize(("file", "function"), listed_tests(), ids=[f"{f}::{t}" for f, t in listed_tests()])
def test_every_test_of_the_list_exists(file: str, function: str):
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_list_has_a_line_for_each_of_the_23_regressions():
    text = (ROOT / "tests" / "README.md").read_text("utf-8")
    lines = text.partition("## Regressions")[2]
    assert re.findall(r"^\| (\d+) \|", lines, re.MULTILINE) == [str(k) for k in range(1, 24)]


def test_every_fault_that_was_mended_is_held_by_a_test():
    text = (ROOT / "tests" / "README.md").read_text("utf-8")
    section = text.partition("## Faults mended")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!point|---)(.*?) \|.*\| (.*) \|$", section, re.MULTILINE)
    points = {int(number) for point, _ in rows for number in re.findall(r"^\d+", point)}
    assert points == set(range(1, 20))
    assert not [row for row in rows if "::test_" not in row[1]]
