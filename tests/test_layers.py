"""The import rules of the package as one table, and the house rules that a reader cannot check by eye."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import imgcls_fast

PACKAGE = Path(imgcls_fast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT: dict[str, set[str]] = {  # room -> rooms it may import; bottom to top, so there can be no cycle
    "core": set(),
    "track": {"core"},
    "ops": {"core"},
    "models": {"core", "ops"},
    "data": {"core"},
    "engines": {"core", "models", "data"},
    "evaluation": {"core", "models"},
    "training": {"core", "track", "data", "models", "engines", "evaluation"},
    "exporting": {"core", "data", "models", "engines", "evaluation"},
    "studies": {"core", "track", "data", "engines", "evaluation", "training"},
    "serving": {"core", "track", "data", "engines", "evaluation"},
    "api": {
        "core",
        "track",
        "ops",
        "models",
        "data",
        "engines",
        "evaluation",
        "training",
        "exporting",
        "studies",
        "serving",
    },
    "cli": {"api", "core", "track"},  # track: the console sink
}
ONLY_FILE = {("engines", "data"): "engines/predictor.py", ("evaluation", "models"): "evaluation/explain.py"}
MAY_LOAD_EXTENSION = {"data/scan.py", "core/env.py"}
MAY_CATCH_EVERYTHING = {"cli/app.py", "track.py", "data/quarantine.py"}
PICKLE_MODULES = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules_imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module that the file imports anywhere, also inside functions; ours without the package's name and with a leading ''."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = tuple(alias.name.split("."))
                yield ("", *parts[1:]) if parts[0] == PACKAGE.name else parts
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                parts = ("", *here[: len(here) - node.level + 1], *parts)
            elif parts[0] == PACKAGE.name:
                parts = ("", *parts[1:])
            for alias in node.names:
                yield (*parts, alias.name)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    if room.startswith("__"):
        return
    found = {parts[1] for parts in modules_imported(path) if parts[0] == "" and len(parts) > 1} & MAY_IMPORT.keys()
    extra = found - MAY_IMPORT[room] - {room}
    assert not extra, f"{room} may import {sorted(MAY_IMPORT[room])}, but {name_of(path)} imports {sorted(extra)}"
    for other in found:
        assert ONLY_FILE.get((room, other), name_of(path)) == name_of(path), (
            f"only {ONLY_FILE[room, other]} may import {other}"
        )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_named_files_load_the_compiled_extension(path: Path) -> None:
    loads = any(parts[:2] == ("", "_C") for parts in modules_imported(path))
    assert not loads or name_of(path) in MAY_LOAD_EXTENSION or room_of(path) == "ops"


def test_core_never_imports_torch() -> None:
    for path in FILES:
        if room_of(path) == "core":
            assert not [parts for parts in modules_imported(path) if parts[0] in ("torch", "torchvision", "timm")], (
                name_of(path)
            )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_ever_unpickled(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("loads", "load", "Unpickler", "dumps", "dump"):
            assert not (isinstance(node.value, ast.Name) and node.value.id in PICKLE_MODULES), name_of(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = {"torch.load": ("weights_only", "True")}.get(ast.unparse(node.func), ("allow_pickle", "False"))
            assert given.get(safe[0]) == safe[1], f"{name_of(path)}, line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_and_the_console_sink_print(path: Path) -> None:
    calls = [
        n
        for n in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"
    ]
    assert not calls or room_of(path) in ("cli", "track")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_is_caught_in_the_named_places_only(path: Path) -> None:
    wide = [
        handler.lineno
        for handler in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(handler, ast.ExceptHandler) and (handler.type is None or ast.unparse(handler.type) == "Exception")
    ]
    assert not wide or name_of(path) in MAY_CATCH_EVERYTHING, f"{name_of(path)}, lines {wide}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_stay_under_80_lines_and_files_under_500(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") < 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno < 80, f"{node.name} in {name_of(path)}"


def test_only_env_reads_the_environment() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        reads = "os.environ" in text or "os.getenv" in text
        assert not reads or name_of(path) == "core/env.py", name_of(path)
