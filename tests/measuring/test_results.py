"""Results of benchmarks: what may be written, what may be compared, and when the alarm rings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from imgcls_fast.core.errors import UsageError
from imgcls_fast.measuring.results import (
    Area,
    Missing,
    Row,
    compare,
    holm,
    read_area,
    read_results,
    slower,
    table,
    write_area,
)

Make = Callable[..., Area]


def measured(area: Area, logs: Sequence[Sequence[float]]) -> Area:
    """The same area with these log ratios in its rows."""
    rows = [row.model_copy(update={"log_ratios": list(log)}) for row, log in zip(area.rows, logs, strict=True)]
    return area.model_copy(update={"rows": rows})


def rows_of(count: int) -> list[tuple[str, str, str, float]]:
    return [(f"case {k}", "kernel", "formula", 0.5) for k in range(count)]


def test_what_is_written_is_read_again(bench_area: Make, tmp_path: Path) -> None:
    area = bench_area(
        rows_of(2),
        goals={"kernel": 0.9},
        missing=[("case 0", "flex", "absent", "not installed"), ("case 1", "flex", "not run", "about 40 s")],
    )
    path = write_area(tmp_path / "deep" / "two-cores", area)
    assert path.name == "ops.json"
    assert read_area(path) == area
    assert read_results(path.parent) == {"ops": area}
    assert read_results(path) == {"ops": area}
    assert "NaN" not in path.read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{}", "area"), ("not json", "JSON"), ('{"schema_version": 2}', "schema_version")],
)
def test_another_file_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ops.json"
    path.write_text(text, "utf-8")
    with pytest.raises(UsageError) as refused:
        read_results(tmp_path)
    assert refused.value.code == "U004"
    assert str(path) in refused.value.message
    assert said in refused.value.why


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no benchmark results") as refused:
        read_results(tmp_path)
    assert refused.value.code == "U004"


def test_a_row_needs_two_processes(bench_area: Make) -> None:
    row = bench_area().rows[0].model_dump()
    with pytest.raises(ValueError, match="log_ratios"):
        Row.model_validate(row | {"log_ratios": [0.1]})
    with pytest.raises(ValueError, match="finite"):
        Row.model_validate(row | {"ratio": math.nan})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"machine": {"fingerprint": {"cpu": "another", "cpus": 2, "gpu": None}}},
            "machines: cpu AMD EPYC 9B14 and another",
        ),
        ({"machine": {"versions": {"torch": "2.15.0", "tensorrt": None}}}, "versions: torch 2.14.1 and 2.15.0"),
        ({"method": {"threads": 4}}, "methods: threads 2 and 4"),
    ],
)
def test_other_machines_versions_and_methods_are_not_compared(bench_area: Make, changes: dict, said: str) -> None:
    before = bench_area()
    after = before.model_copy(update={k: getattr(before, k).model_copy(update=v) for k, v in changes.items()})
    with pytest.raises(UsageError) as refused:
        compare({"ops": before}, {"ops": after})
    assert refused.value.code == "U004"
    assert said in refused.value.message


def test_results_without_a_common_row_are_not_compared(bench_area: Make) -> None:
    before, after = bench_area(rows_of(1)), bench_area([("another", "kernel", "formula", 0.5)])
    with pytest.raises(UsageError, match="share no row"):
        compare({"ops": before}, {"ops": after})
    with pytest.raises(UsageError, match="share no row"):
        compare({"ops": before}, {"loader": bench_area(area="loader")})


def test_rows_that_only_one_run_has_are_named(bench_area: Make) -> None:
    found = compare({"ops": bench_area(rows_of(3))}, {"ops": bench_area(rows_of(2))})
    assert found.only_before == (("ops", "case 2", "kernel", "formula"),)
    assert found.only_after == ()
    assert len(found.changes) == len(found.to_dict()["rows"]) == 2


def test_the_test_is_students() -> None:
    from scipy.stats import ttest_ind

    before, after = [0.0, 0.01, 0.03, -0.02, 0.01], [0.15, 0.19, 0.17, 0.16, 0.2]
    change, low, p = slower(before, after, tolerated=1.0)
    assert math.log(change) == pytest.approx(np.mean(after) - np.mean(before))
    assert p == pytest.approx(ttest_ind(after, before, alternative="greater").pvalue)
    assert low == pytest.approx(math.exp(ttest_ind(after, before).confidence_interval(0.9).low))
    assert slower(before, after)[2] > p  # 5 % are forgiven


def test_processes_that_agree_exactly_are_judged_by_the_change_alone() -> None:
    assert slower([0.1, 0.1], [0.1, 0.1]) == (1.0, 1.0, 1.0)
    change, low, p = slower([0.0, 0.0], [0.2, 0.2])
    assert (change, low, p) == (pytest.approx(math.exp(0.2)), pytest.approx(math.exp(0.2)), 0.0)


def test_holm_against_the_definition() -> None:
    """S. Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and never below its predecessor."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_run_against_itself_raises_no_alarm_and_a_fifth_slower_does(bench_area: Make) -> None:
    """40 rows, 2 % between processes: of 50 runs against themselves at most 4 raise an alarm; a delay of 20 % is found in 45."""
    draw = np.random.default_rng(0)
    area = bench_area(rows_of(40))

    def run(delayed: int | None = None) -> dict[str, Area]:
        logs = draw.normal(-0.5, 0.02, (40, 5))
        if delayed is not None:
            logs[delayed] += math.log(1.2)
        return {"ops": measured(area, logs.tolist())}

    alarms = sum(bool(compare(run(), run()).flagged) for _ in range(50))
    assert alarms <= 4
    found = [compare(run(), run(delayed=k % 40)).flagged for k in range(50)]
    assert sum(any(change.case == f"case {k % 40}" for change in flagged) for k, flagged in enumerate(found)) >= 45


def test_a_contender_that_became_faster_is_no_alarm(bench_area: Make) -> None:
    before = measured(bench_area(), [[0.0, 0.01, 0.02]])
    after = measured(bench_area(), [[-0.5, -0.51, -0.52]])
    (change,) = compare({"ops": before}, {"ops": after}).changes
    assert change.change < 0.7
    assert not change.flagged


def test_the_table_shows_every_row_and_everything_that_is_missing(bench_area: Make) -> None:
    area = bench_area(
        [("case", "kernel", "formula", 0.5), ("case", "slow", "formula", 1.5)],
        goals={"kernel": 0.9, "slow": 1.0},
        more={"kernel": {"precision": "int8", "accuracy": 0.9}},
    )
    missing = [
        Missing(case="case", contender="flex", kind="absent", why="not here"),
        Missing(case="case", contender="kernel", kind="not run", why="too long", seconds=40.4),
        Missing(case="case", contender="slow", kind="not run", why="too long", seconds=20),
    ]
    area = area.model_copy(update={"missing": missing})
    text = table(area)
    assert "ok   kernel   0.500x formula" in text
    assert "LOST slow     1.500x formula" in text
    assert "absent: flex: not here" in text
    assert "not run: kernel 40 s, slow 20 s: too long" in text
    assert "int8, accuracy 0.900" in text
    assert area.lost == [area.rows[1]]
    with pytest.raises(KeyError, match="nobody in case"):
        area.contender("case", "nobody")
