"""The suite of benchmarks: what a contest refuses, leaves out and writes. No test looks at how long anything took."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from imgcls_fast.core.env import install_hint
from imgcls_fast.measuring.results import read_results

ROOT = Path(__file__).resolve().parents[1]
TASK = {"pairs": 3, "processes": 2, "cell_s": 10.0, "delay": 0.0, "kept": None}


@pytest.fixture(scope="module")
def duels() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import duels
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return duels


def setup_of(duels: Any, calls: Mapping[str, Callable[[], Any]], wrong: str = "", clock: str = "wall") -> Any:
    def check(name: str, outputs: Mapping[str, Any]) -> dict[str, Any]:
        if name == wrong:
            raise duels.Disagree(f"{name} gives another result")
        return {"same": 1}

    def opened(call: Callable[[], Any]) -> Any:
        call()
        return duels.Contender({"case": call}, 0)

    openers = {name: (lambda call=call: opened(call)) for name, call in calls.items()}
    return duels.Setup(openers, [duels.Pair("ours", name) for name in calls if name != "ours"], check, clock)


def nothing() -> None:
    """A contender that is at once done."""


def missing_library() -> None:
    raise ModuleNotFoundError("no", name="some_rival")


def broken() -> None:
    raise RuntimeError("this kernel is broken")


def test_each_contender_is_called_in_every_round(duels: Any) -> None:
    counts = {"ours": 0, "a": 0, "b": 0}

    def counting(name: str) -> Callable[[], None]:
        def call() -> None:
            counts[name] += 1

        return call

    found = duels.measure(setup_of(duels, {name: counting(name) for name in counts}), TASK)
    assert len(set(counts.values())) == 1
    assert {name: len(part["wall_s"]) for name, part in found["cases"]["case"].items()} == dict.fromkeys(counts, 3)
    assert found["agreement"] == {name: {"same": 1} for name in counts}
    assert found["slow"] == []


def test_a_rival_that_is_not_installed_is_absent_with_its_command(duels: Any) -> None:
    found = duels.measure(setup_of(duels, {"ours": nothing, "rival": missing_library, "other": nothing}), TASK)
    assert found["absent"] == {"rival": f"some_rival is not installed: {install_hint('bench')}"}
    assert set(found["cases"]["case"]) == {"ours", "other"}


def test_a_rival_with_another_result_is_not_timed_and_ours_fails(duels: Any) -> None:
    calls = {"ours": nothing, "rival": nothing, "other": nothing}
    found = duels.measure(setup_of(duels, calls, wrong="rival"), TASK)
    assert found["absent"] == {"rival": "not timed: rival gives another result"}
    assert set(found["cases"]["case"]) == {"ours", "other"}
    with pytest.raises(duels.Disagree, match="ours gives another result"):
        duels.measure(setup_of(duels, calls, wrong="ours"), TASK)


def test_a_broken_contender_of_ours_is_no_absence(duels: Any) -> None:
    with pytest.raises(RuntimeError, match="kernel is broken"):
        duels.measure(setup_of(duels, {"ours": broken, "rival": nothing}), TASK)
    found = duels.measure(setup_of(duels, {"ours": nothing, "rival": broken, "other": nothing}), TASK)
    assert found["absent"] == {"rival": "RuntimeError: this kernel is broken"}


def test_what_does_not_fit_into_a_cell_says_so_and_stays_out_of_later_processes(duels: Any) -> None:
    setup = setup_of(duels, {"ours": nothing, "rival": nothing})
    first = duels.measure(setup, TASK | {"cell_s": 1e-12})
    assert first["cases"] == {}
    assert {tuple(entry[:2]) for entry in first["slow"]} == {("case", "ours"), ("case", "rival")}
    assert all(entry[2] > 1e-12 for entry in first["slow"])
    later = duels.measure(setup, TASK | {"cell_s": 1e-12, "kept": {"case": ["ours", "rival"]}})
    assert set(later["cases"]["case"]) == {"ours", "rival"}
    assert duels.measure(setup, TASK | {"kept": {}})["cases"] == {}


def test_ours_is_timed_alone_where_its_rival_takes_too_long_but_no_rival_is(duels: Any) -> None:
    slow = lambda: time.sleep(0.1)  # noqa: E731
    found = duels.measure(setup_of(duels, {"ours": nothing, "rival": slow}), TASK | {"cell_s": 0.4})
    assert set(found["cases"]["case"]) == {"ours"}
    assert [entry[:2] for entry in found["slow"]] == [["case", "rival"]]
    found = duels.measure(setup_of(duels, {"ours": slow, "rival": nothing}), TASK | {"cell_s": 0.4})
    assert found["cases"] == {}


def test_a_larger_case_of_one_that_takes_too_long_is_not_tried(duels: Any) -> None:
    asked: list[int] = []

    def opened() -> Any:
        return duels.Contender({str(n): (lambda n=n: (asked.append(n), time.sleep(0.01))) for n in (1, 8)})

    setup = duels.Setup({"a": opened}, [duels.Pair("a", "b")], lambda *_: {}, images={"1": 1, "8": 8})
    found = duels.measure(setup, TASK | {"cell_s": 1e-3})
    (one, large) = found["slow"]
    assert (one[:2], large[:2]) == (["1", "a"], ["8", "a"])
    assert large[2] == pytest.approx(8 * one[2])
    assert 8 not in asked


def test_one_that_crashes_is_told_and_the_others_go_on(duels: Any, tmp_path: Path) -> None:
    (tmp_path / "contests.py").write_text(
        "import os\nfrom duels import Contender, Pair, Setup\n"
        "def good(work):\n"
        "    return Setup({n: lambda: Contender({'c': lambda: 0}, 0) for n in 'ab'}, [Pair('a', 'b')], lambda *_: {})\n"
        "def wrong(work):\n    raise ValueError('a sentence')\n"
        "def crash(work):\n    os.kill(os.getpid(), 11)\n"
    )
    tasks = [
        TASK
        | {"file": str(tmp_path / "contests.py"), "setup": setup, "params": {}, "threads": 1, "work": str(tmp_path)}
        for setup in ("crash", "wrong", "good")
    ]
    given, out = tmp_path / "tasks.json", tmp_path / "results.json"
    given.write_text(json.dumps(tasks))
    command = [sys.executable, str(ROOT / "benchmarks" / "duels.py"), str(given), str(out)]
    subprocess.run(command, check=True)
    crash, wrong, good = json.loads(out.read_text())
    assert crash["error"] == "the process ended with SIGSEGV"
    assert "ValueError: a sentence" in wrong["error"]
    assert set(good["found"]["cases"]["c"]) == {"a", "b"}


def test_a_delay_slows_contenders_and_not_rivals(duels: Any) -> None:
    """The delay is a share of the call's own time, so the ratio must be above that of the calls themselves."""
    plain = lambda: sum(range(20000))  # noqa: E731
    delayed = duels.delayed(plain, 4.0, "wall")
    found = duels.interleave({"delayed": delayed, "plain": plain}, 15)
    assert found.log_ratio("delayed", "plain") > 0


def test_cpu_time_counts_children_that_live_and_that_ended(duels: Any) -> None:
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint('x', flush=True)"
    before = duels.family_cpu_s()
    subprocess.run([sys.executable, "-c", burn], check=True, stdout=subprocess.DEVNULL)
    ended = duels.family_cpu_s() - before
    assert ended > 0.25
    with subprocess.Popen(
        [sys.executable, "-c", burn + "\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout and child.stdin
        child.stdout.readline()
        assert duels.family_cpu_s() - before > ended + 0.25
        assert duels.family_bytes() > 1e6
        child.stdin.write(b"\n")


def run_suite(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550)


@pytest.mark.slow
def test_the_small_set_runs_compares_and_reports(tmp_path: Path) -> None:
    """Real processes: measured, written, compared with itself, drawn. Two processes of two rounds: no figure is believed."""
    few = ("--small", "--processes", "2", "--pairs", "2", "--work", str(tmp_path / "work"))
    done = run_suite(*few, "--results", str(tmp_path / "before"))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "before").iterdir()
    areas = read_results(folder)
    assert list(areas) == ["loader", "ops", "train", "engines"]
    for name, area in areas.items():
        assert area.rows, name
        assert f"{name}: {area.about}" in done.stdout
        assert all(len(row.log_ratios) == 2 and row.low <= row.ratio <= row.high for row in area.rows)
    again = run_suite(*few, "--results", str(tmp_path / "after"), "-k", "ops", "--against", str(tmp_path / "before"))
    assert "compared with" in again.stdout or "SLOWER" in again.stdout, again.stdout + again.stderr
    words = [sys.executable, "-m", "imgcls_fast", "bench", "report", str(folder), "-o", str(tmp_path / "out"), "--json"]
    drawn = subprocess.run(words, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert Path(json.loads(drawn.stdout)["page"]).stat().st_size > 10_000


def test_comparing_with_nothing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = run_suite("--small", "--against", str(tmp_path))
    assert done.returncode == 4
    assert "no benchmark results" in done.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py")))
def test_every_contest_names_functions_that_take_its_arguments(duels: Any, name: str) -> None:
    import inspect

    module = duels.load_file(ROOT / "benchmarks" / name)
    names = [contest.name for contest in module.CONTESTS]
    assert len(names) == len(set(names))
    for contest in module.CONTESTS:
        json.dumps(contest.params)
        for function in filter(None, (contest.setup, contest.prepare)):
            given = {"device": "cpu", "full": False, **contest.params}
            inspect.signature(getattr(module, function)).bind(Path(), **given)
