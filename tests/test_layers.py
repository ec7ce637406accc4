"""The import rules of the package as one table, and the house rules that a reader cannot check by eye."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import imgcls_fast
from imgcls_fast.core.verbs import VERBS

PACKAGE = Path(imgcls_fast.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT: dict[str, set[str]] = {  # room -> rooms it may import; bottom to top, so there can be no cycle
    "core": set(),
    "tracking": {"core"},
    "ops": {"core"},
    "models": {"core", "ops"},
    "data": {"core"},
    "loading": {"core", "data"},
    "engines": {"core", "models", "data", "loading"},
    "evaluation": {"core"},
    "graphs": {"core", "models", "engines"},
    "training": {"core", "tracking", "data", "loading", "models", "engines", "evaluation"},
    "exporting": {"core", "data", "loading", "models", "engines", "evaluation", "graphs"},
    "measuring": {"core", "models", "loading", "engines", "evaluation"},
    "serving": {"core", "tracking", "engines", "evaluation"},
    "studies": {"core", "tracking", "data", "loading", "models", "engines", "evaluation", "training"},
}
MAY_IMPORT["api"] = {*MAY_IMPORT, "ops"} - {"api"}
MAY_IMPORT["cli"] = {"api", "core", "tracking"}  # tracking: the console sink
ONLY_FILES = {  # (room, room it imports) -> the files that may
    ("engines", "data"): {"engines/predictor.py", "engines/scoring.py"},
    ("engines", "loading"): {"engines/predictor.py", "engines/scoring.py"},
}
MAY_LOAD_EXTENSION = {"data/proof.py", "core/env.py"}
MAY_CATCH_EVERYTHING = {"cli/app.py", "tracking/sinks.py", "data/quarantine.py"}
PICKLE_MODULES = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}


@cache
def nodes(text: str) -> list[ast.AST]:
    """The nodes of a source: each file is looked at by several tests, and parsed once."""
    return list(ast.walk(ast.parse(text)))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules_imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module that the file imports anywhere, also inside functions; ours without the package's name and with a leading ''."""
    return imports_in(path.read_text("utf-8"), path.relative_to(PACKAGE).parts[:-1])


def imports_in(text: str, here: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for node in nodes(text):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _ours(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                parts = ("", *here[: len(here) - node.level + 1], *parts)
            elif parts[0] == PACKAGE.name:
                parts = ("", *parts[1:])
            for alias in node.names:
                yield (*parts, alias.name)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
        ):
            name = node.args[0]
            yield from [_ours(name.value)] if isinstance(name, ast.Constant) and isinstance(name.value, str) else []


def _ours(name: str) -> tuple[str, ...]:
    parts = tuple(name.split("."))
    return ("", *parts[1:]) if parts[0] == PACKAGE.name else parts


def imports_between(files: Mapping[str, str]) -> dict[str, set[str]]:
    """file -> files of ours that it imports anywhere, also inside functions and for the type checker only; not the package's own door."""
    arrows: dict[str, set[str]] = {}
    for name, text in files.items():
        arrows[name] = set()
        for parts in imports_in(text, tuple(name.split("/")[:-1])):
            ways = ["/".join(parts[1:end]) for end in (len(parts), len(parts) - 1)] if parts[0] == "" else []
            known = [path for way in ways if way for path in (f"{way}.py", f"{way}/__init__.py") if path in files]
            arrows[name] |= set(known[:1]) - {name}
    return arrows


def circles(arrows: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of files each of which imports, by whatever way, every other one of its group."""
    reach: dict[str, set[str]] = {}
    for name in arrows:
        reach[name], found = set(), [name]
        while found:
            new = arrows[found.pop()] - reach[name]
            reach[name] |= new
            found += new
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in arrows if name in reach[name]}
    return sorted(map(set, groups), key=sorted)


def large_classes(text: str) -> list[str]:
    """Names of classes of more than 200 lines."""
    classes = [node for node in nodes(text) if isinstance(node, ast.ClassDef)]
    return [node.name for node in classes if (node.end_lineno or node.lineno) - node.lineno >= 200]


def long_skips(text: str) -> list[int]:
    """Lines where the formatter is kept from a statement of more than three lines; `fmt: off` always is one."""
    if not re.search(r"#\s*(fmt|yapf):", text):
        return []
    statements = []
    for node in nodes(text):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            body = getattr(node, "body", None)  # of what has one the head counts
            statements.append((node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno))
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or not re.match(r"#\s*(fmt|yapf):", token.string):
            continue
        line = token.start[0]
        if "off" in token.string or any(end - start >= 3 for start, end in statements if start <= line <= end):
            found.append(line)
    return found


def wide_handlers(text: str) -> list[int]:
    """Lines of handlers that catch everything and do not raise it again."""
    found = []
    for handler in nodes(text):
        if not isinstance(handler, ast.ExceptHandler):
            continue
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        names = {"BaseException" if kind is None else ast.unparse(kind).split(".")[-1] for kind in kinds}
        raises = isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None
        if "Exception" in names or ("BaseException" in names and not raises):
            found.append(handler.lineno)
    return found


def unsafe_loads(text: str) -> list[str]:
    """Imports of modules that unpickle, and loads of torch and NumPy that might."""
    used = {
        node.attr for node in nodes(text) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    }
    refusal = {
        ("pickle", "UnpicklingError")
    }  # the name of torch's refusal to unpickle; whoever catches it unpickles nothing
    refusal |= {("pickle",)} if used == {"UnpicklingError"} and "import pickle as" not in text else set()
    found = [".".join(parts) for parts in imports_in(text, ()) if parts[0] in PICKLE_MODULES and parts not in refusal]
    for node in nodes(text):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = ("weights_only", "True") if ast.unparse(node.func) == "torch.load" else ("allow_pickle", "False")
            if given.get(safe[0]) != safe[1]:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def commands_by_hand(text: str) -> list[str]:
    """Command lines of ours into which a value is written as it is: a path with a space in it cannot be pasted."""
    verbs = "|".join(sorted({verb.name.split()[0] for verb in VERBS}))
    found = []
    for node in nodes(text):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for k, part in enumerate(parts):
            begins = isinstance(part, ast.Constant) and re.search(rf"imgcls-fast ({verbs})\b[^\n]*$", str(part.value))
            if begins and k + 1 < len(parts):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    if room.startswith("__"):
        return
    found = {parts[1] for parts in modules_imported(path) if parts[0] == "" and len(parts) > 1} & MAY_IMPORT.keys()
    extra = found - MAY_IMPORT[room] - {room}
    assert not extra, f"{room} may import {sorted(MAY_IMPORT[room])}, but {name_of(path)} imports {sorted(extra)}"
    for other in found:
        only = ONLY_FILES.get((room, other))
        assert only is None or name_of(path) in only, f"only {only} may import {other}"


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
    assert unsafe_loads(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_and_the_console_sink_print(path: Path) -> None:
    calls = [
        n
        for n in nodes(path.read_text("utf-8"))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"
    ]
    assert not calls or room_of(path) in ("cli", "tracking")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_is_caught_in_the_named_places_only(path: Path) -> None:
    wide = wide_handlers(path.read_text("utf-8"))
    assert not wide or name_of(path) in MAY_CATCH_EVERYTHING, f"{name_of(path)}, lines {wide}"
    assert len(wide) <= 1, f"{name_of(path)} has one place, not {len(wide)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_stay_under_80_lines_and_files_under_500(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") < 500
    for node in nodes(text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or node.lineno) - node.lineno < 80, f"{node.name} in {name_of(path)}"


def test_no_two_files_import_each_other_by_any_way() -> None:
    found = circles(imports_between({name_of(path): path.read_text("utf-8") for path in FILES}))
    assert not found, "a circle between two files is a third file asking to be written"


def test_classes_stay_under_200_lines() -> None:
    found = {name_of(path): large_classes(path.read_text("utf-8")) for path in FILES}
    large = {name: classes for name, classes in found.items() if classes}
    assert not large, "methods that share ten attributes are one long function"


def test_the_formatter_is_kept_from_three_lines_at_most() -> None:
    found = {name_of(path): long_skips(path.read_text("utf-8")) for path in FILES}
    longer = {name: lines for name, lines in found.items() if lines}
    assert not longer, "a file that needs `# fmt: skip` to stay under 500 lines is over 500"


def test_a_printed_command_is_quoted_for_a_shell() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        found = commands_by_hand(text) if "imgcls-fast " in text else []
        assert not found or name_of(path) == "core/trust.py", f"{name_of(path)}: {found}"  # there it is signed, not printed


def test_only_env_reads_the_environment() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        reads = "os.environ" in text or "os.getenv" in text
        assert not reads or name_of(path) == "core/env.py", name_of(path)


# ---- the rules themselves: each must find what it forbids ----


@pytest.mark.parametrize(
    ("text", "here", "module"),
    [
        ("def f():\n    from ..training import fit", ("data",), ("", "training", "fit")),
        ("from imgcls_fast.cli.app import main", ("core",), ("", "cli", "app", "main")),
        ("import imgcls_fast.api as a", ("core",), ("", "api")),
        ("from .. import _C", ("data",), ("", "_C")),
        ("from imgcls_fast import _C", ("data",), ("", "_C")),
        ("from importlib import import_module\nimport_module('imgcls_fast._C')", (), ("", "_C")),
        ("from .core import env", (), ("", "core", "env")),
    ],
)
def test_every_way_to_import_is_seen(text: str, here: tuple[str, ...], module: tuple[str, ...]) -> None:
    assert module in list(imports_in(text, here))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle as p", "from pickle import loads", "def f():\n    import joblib", "from dill.source import x",
        "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "np.load(f, allow_pickle=True)",
    ],
)  # fmt: skip
def test_every_way_to_unpickle_is_seen(text: str) -> None:
    assert unsafe_loads(text)
    assert not unsafe_loads("import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass")
    assert unsafe_loads("import pickle\ntry:\n    pickle.load(f)\nexcept pickle.UnpicklingError:\n    pass")
    assert not unsafe_loads("torch.load(f, weights_only=True); np.load(f, allow_pickle=False); json.load(f)")


def test_every_circle_is_seen() -> None:
    files = {
        "a/x.py": "def f():\n    from . import y",
        "a/y.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..b.z import Z",
        "b/z.py": "import imgcls_fast.a.x",
        "b/w.py": "from .z import Z",
    }
    assert circles(imports_between(files)) == [{"a/x.py", "a/y.py", "b/z.py"}]
    assert circles(imports_between({**files, "b/z.py": "from . import w2", "b/w.py": "from ..a import y"})) == []


def test_a_large_class_and_a_long_skip_are_seen() -> None:
    assert large_classes("class A:\n" + "    x = 1\n" * 199) == []
    assert large_classes("def f():\n    class A:\n" + "        x = 1\n" * 200) == ["A"]
    assert long_skips("x = [\n    1,\n]  # fmt: skip\n'# fmt: off'") == []
    assert long_skips("x = [\n    1,\n    2,\n]  # fmt: skip") == [4]
    assert long_skips("if x:\n    f(\n        1,\n        2\n    )  # fmt: skip") == [5]
    assert long_skips("# fmt: off\nx = 1") == [1]


def test_a_command_that_is_put_together_by_hand_is_seen() -> None:
    assert commands_by_hand('f"try: imgcls-fast train {place} --resume"')
    assert not commands_by_hand('f"try: {command(place)} or imgcls-fast doctor"; f"a newer imgcls-fast (schema {x})"')


@pytest.mark.parametrize(
    "kind", ["", " Exception", " (ValueError, Exception)", " builtins.Exception", " BaseException"]
)
def test_every_way_to_catch_everything_is_seen(kind: str) -> None:
    assert wide_handlers(f"try:\n    f()\nexcept{kind}:\n    pass") == [3]
    assert not wide_handlers("try:\n    f()\nexcept (OSError, ValueError):\n    pass")
    assert not wide_handlers("try:\n    f()\nexcept BaseException:\n    clean()\n    raise")
