"""Numbers for people: amounts with separators, names and settings without, times as dates."""

from __future__ import annotations

import io
from typing import Any

import pytest

from imgcls_fast.cli import show
from imgcls_fast.core.config import RunConfig, setting_names


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("images", 1998, "1,998"), ("bytes", 4_989_579, "4,989,579"), ("", 1998, "1,998"), ("bytes", 12345.678, "12345.678"),
        ("data.split_seed", 1998, "1998"), ("split_seed", 1998, "1998"), ("seed", 2**63, "9223372036854775808"),
        ("train.seed", 20250101, "20250101"), ("epoch", 1200, "1200"), ("row", 31337, "31337"), ("line", 2048, "2048"),
        ("evaluate.bootstrap", 1000, "1000"), ("evaluate.top_k", [1, 1000], "1, 1000"), ("optim.lr", 0.00012345, "0.00012345"),
        ("data.split", (0.8, 0.1, 0.1), "0.8, 0.1, 0.1"), ("train.compile", True, "yes"), ("out", None, "-"),
        ("cats.and.dogs", 1998, "1,998"),  # a class, and how many images it has
        ("lr", 0.00012345, "0.0001234"), ("accuracy", 0.98765, "0.9877"), ("accuracy", float("nan"), "-"),
    ],
)  # fmt: skip
def test_amounts_get_separators_and_numbers_that_are_names_do_not(name: str, value: Any, shown: str) -> None:
    assert show.text(value, name) == shown


def test_times_are_dates_and_not_exponents() -> None:
    assert show.text(1.796e9, "began").startswith("2026-11-") and show.text(None, "ended") == "-"


def test_every_section_of_the_settings_is_known() -> None:
    assert {name.partition(".")[0] for name in setting_names() if "." in name} == set(show._SECTIONS)
    assert RunConfig().data.split_seed == 1998  # what `runs show` printed as 1,998


def test_lists_and_tables_of_a_run_show_its_seeds_as_they_are() -> None:
    class Console:
        is_terminal = False

        def __init__(self) -> None:
            self.file = io.StringIO()

        def print(self, line: str, **options: Any) -> None:
            self.file.write(line + "\n")

    console = Console()
    show.facts(console, {"settings": {"data.split_seed": 1998, "train.seed": 4000}, "counts": {"seed coats": 4000},
                         "history": [{"epoch": 1000, "images": 5000}]})  # fmt: skip
    lines = console.file.getvalue().splitlines()
    assert [line.split()[-1] for line in lines if "seed" in line] == ["1998", "4000", "4,000"]
    assert lines[-1] == "1000\t5,000"
