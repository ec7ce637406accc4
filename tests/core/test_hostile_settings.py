"""Configuration files that ask for more than they are worth: refused in bounded time, with line and column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.settings import build_config


def read(path: Path) -> str:
    return build_config(file=path).train.device


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + k)}: &{chr(98 + k)} [{','.join('*' + chr(97 + k) for _ in range(10))}]\n" for k in range(12)
)
HOSTILE = {
    "aliases": (BOMB, "line 1, column 4", "anchors"),
    "a tag that makes an object": ("train: !!python/object/apply:os.system [id]\n", "line 1, column 8", "tags"),
    "a plain tag": ("train:\n  epochs: !!int '3'\n", "line 2, column 11", "tags"),
    "a directive": ("%TAG ! tag:x,2000:\n---\ntrain: {}\n", "line 1, column 1", "directives"),
    "60,000 brackets": ("train: " + "[" * 60_000, "line 1, column 23", "levels deep"),
    "deep blocks": ("".join("  " * k + "a:\n" for k in range(40)), "line 17, column 33", "levels deep"),
    "a key twice, deep inside": ("model:\n  args:\n    width: 8\n    width: 9\n", "line 4, column 5", "twice"),
    "merged mappings": ("train:\n  <<: {epochs: 3}\n", "line 2, column 3", "<<"),
    "2 MB of nothing": ("#" * 2_000_000, "run.yaml", "larger than"),
    "2 MB of list": ("train: [" + "1," * 1_000_000 + "]", "run.yaml", "larger than"),
    "a NUL": ("train:\n  epochs: 3\0\n", "run.yaml", "not valid YAML"),
    "two documents": ("train: {}\n---\ntrain: {}\n", "line 2, column 1", "not valid YAML"),
    "a lone quote": ("train:\n  device: 'cpu\n", "line 3, column 1", "not valid YAML"),
    "a number of 100,000 digits": ("train:\n  epochs: " + "1" * 100_000, "run.yaml", "not valid YAML"),
    "a name of 100,000 letters": ("train:\n  " + "e" * 100_000 + ": 1\n", "", ""),
    "a list of 10,000 letters": ("train:\n  epochs: [" + "e," * 10_000 + "]\n", "line 2", "train.epochs must be"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_refused_within_bounds(
    name: str, tmp_path: Path, in_bounds: Callable[..., Any]
) -> None:
    text, where, words = HOSTILE[name]
    (tmp_path / "run.yaml").write_text(text, "utf-8")
    found = in_bounds(read, tmp_path / "run.yaml", memory_mib=128)
    assert found.code in ("C001", "C002", "C003", "C005"), found
    assert where in found.text and words in found.text, found
    assert len(found.text) < 1000


def test_byte_order_marks_and_comments_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes("\ufefftrain:  # of this run\n  device: cpu\n".encode())
    assert read(tmp_path / "run.yaml") == "cpu"


@pytest.mark.parametrize("value", ["&a [1]", "!!python/name:os.system ''", "[" * 2000, "{<<: {a: 1}}", "{a: 1, a: 2}"])
def test_a_set_value_that_is_no_allowed_yaml_is_text(value: str) -> None:
    assert build_config(sets=[f"data.source={value}"]).data.source == value
