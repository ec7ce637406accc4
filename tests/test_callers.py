"""Benchmarks and scripts call the package's functions as they are: most of them run on machines that the tests have not."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """What a file takes from the package by `from ... import`: (its name there, the thing); an AttributeError where it is not there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "imgcls_fast":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                yield alias.asname or alias.name, getattr(module, alias.name)


def called(call: ast.Call, names: dict[str, Any]) -> Any:
    """The function of the package that a call names, or None."""
    if isinstance(call.func, ast.Name):
        return names.get(call.func.id)
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        owner = names.get(call.func.value.id)
        if inspect.ismodule(owner) or inspect.isclass(owner):
            return getattr(owner, call.func.attr)
    return None


def wrong_calls(text: str) -> list[str]:
    """Calls with arguments that the function does not take; those with * or ** are passed over."""
    tree, wrong = ast.parse(text), []
    names = dict(imported(tree))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = called(call, names)
        spread = any(isinstance(value, ast.Starred) for value in call.args) or any(key.arg is None for key in call.keywords)
        if not callable(function) or spread:
            continue
        try:
            inspect.signature(function).bind(*call.args, **{str(key.arg): key.value for key in call.keywords})
        except ValueError:  # a built-in without a signature
            continue
        except TypeError as error:
            wrong.append(f"line {call.lineno}: {ast.unparse(call.func)}: {error}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_call_of_a_benchmark_or_script_fits_the_function(path: Path) -> None:
    try:
        assert wrong_calls(path.read_text("utf-8")) == []
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("imgcls_fast"):
            raise
        pytest.skip(f"needs {error.name}")


def test_a_call_that_does_not_fit_is_seen() -> None:
    begin = "from imgcls_fast.data.prepare import prepare as p\nfrom imgcls_fast.core import env\n"
    assert len(wrong_calls(begin + "p(1, 2, 3)\nenv.cache_dir(of=1)\np(1, 2)\np(*x)\nenv.cache_dir()")) == 2
