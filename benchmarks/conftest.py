"""`pytest benchmarks`: runs the contests of each area, prints one table an area, writes `results/<machine>/<area>.json`.

pytest benchmarks                            everything that fits into cells of ten seconds
pytest benchmarks -k ops --full              one area, with the cells that take long
pytest benchmarks --small --against BEFORE   what CI does: exit 1 when a row became slower, twice
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from duels import Contest  # noqa: E402

from imgcls_fast.core import env  # noqa: E402
from imgcls_fast.core.errors import UsageError  # noqa: E402
from imgcls_fast.engines.timing import Latency, Rounds, ratio_interval  # noqa: E402
from imgcls_fast.measuring import results as report  # noqa: E402
from imgcls_fast.measuring.results import Area, Missing, Row  # noqa: E402

CELL_S, NO_LIMIT_S = 10.0, 3600.0
TOO_SLOW = f"longer than the {CELL_S:.0f} s of a cell (--full)"
# Memory that was freed stays with the process. Otherwise it depends on what lies at the end of the heap, so on the process, whether
# large arrays are given back and their pages cleared again in every call: some rows were twice as fast in every third process.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 26)}
ABOUT = {
    "loader": "images from JPEG files to batches of 224x224 pixels, an epoch a call; and reading headers",
    "ops": "attention kernels, forward and backward",
    "train": "one training step: forward, loss, backward, optimizer",
    "engines": "a batch of uint8 images on the host to scores on the host",
    "startup": "from a command line to its end, cold process",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("imgcls-fast")
    group.addoption("--full", action="store_true", help="also cells that take longer than ten seconds")
    group.addoption("--small", action="store_true", help="the few rows that CI compares")
    group.addoption("--processes", type=int, default=5, help="fresh processes of each contest, at least 2 (default 5)")
    group.addoption("--pairs", type=int, default=15, help="rounds in each process (default 15)")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    group.addoption("--results", type=Path, help="folder for <machine>/<area>.json (default: benchmarks/results)")
    group.addoption(
        "--against", type=Path, help="folder of earlier results of this machine: fail if a row became slower"
    )
    group.addoption("--work", type=Path, help="folder that keeps exports and compiled code for the next time")
    group.addoption("--delay", type=float, default=0.0, help="slow every contender by this share, to try the alarm")


class Arena:
    """Runs contests, area by area, and keeps what they found."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.config = config
        self.device = option.device or ("cuda" if _has_gpu() else "cpu")
        self.processes, self.pairs = max(2, option.processes), option.pairs
        self.cell_s = NO_LIMIT_S if option.full else CELL_S
        self.earlier = _earlier(option.against, self.device) if option.against else None
        self._temporary = None if option.work else tempfile.TemporaryDirectory(prefix="imgcls-bench-")
        self.work = (option.work or Path(self._temporary.name)).resolve()  # type: ignore[union-attr]
        self.contests: dict[str, list[tuple[Contest, Path]]] = {}
        self.found: dict[str, list[dict[str, Any]]] = {}
        self.errors: dict[str, str] = {}
        self.solos: dict[str, list[report.Contender]] = {}
        self.areas: dict[str, Area] = {}
        self.partial = bool(option.small or option.delay)  # such results do not replace those of the whole suite
        self.seconds: dict[str, float] = {}
        self.ran: set[str] = set()
        self.changes: list[report.Change] = []

    def say(self, text: str) -> None:
        """A line for the person who waits."""
        manager = self.config.pluginmanager
        reporter, capture = manager.getplugin("terminalreporter"), manager.getplugin("capturemanager")
        if reporter and self.config.option.verbose >= 0:
            with capture.global_and_fixture_disabled() if capture else nullcontext():
                reporter.write_line(text)
                reporter.flush()

    def run(self, area: str) -> None:
        """All contests of an area, in passes."""
        if area in self.ran:
            return
        self.ran.add(area)
        began = time.monotonic()
        contests = self.contests[area]
        self.say("")
        self._prepare([entry for entry in contests if entry[0].prepare])
        for k in range(self.processes):
            fit = [entry for entry in random.sample(contests, len(contests)) if self._goes_on(entry[0])]
            spent = self._once(fit)
            seconds = "; ".join(
                f"{contest.name}: {seconds:.0f}" for (contest, _), seconds in zip(fit, spent, strict=True)
            )
            self.say(
                f"{area}: pass {k + 1} of {self.processes} done after {time.monotonic() - began:.0f} s ({seconds})"
            )
        self.seconds[area] = time.monotonic() - began

    def _goes_on(self, contest: Contest) -> bool:
        """Nothing is wrong with it, and something of it fits into the time of a cell."""
        before = self.found.get(contest.name)
        return contest.name not in self.errors and (not before or bool(before[0]["cases"]))

    def again(self, contest: Contest, file: Path) -> None:
        """The same contest in fresh processes, instead of what it found before."""
        self.found.pop(contest.name, None)
        for _ in range(self.processes):
            self._once([(contest, file)])

    def _prepare(self, contests: list[tuple[Contest, Path]]) -> None:
        results = self._children(contests, [{"prepare": contest.prepare} for contest, _ in contests])
        for (contest, _), result in zip(contests, results, strict=True):
            if "error" in result:
                self.errors[contest.name] = _last_lines(result["error"])
            self.say(f"{contest.area}: prepared {contest.name} in {result['seconds']:.0f} s")

    def _once(self, contests: list[tuple[Contest, Path]]) -> list[float]:
        """One process of each, and the seconds that each took."""
        tasks = []
        for contest, _ in contests:
            before = self.found.setdefault(contest.name, [])
            kept = {case: list(names) for case, names in before[0]["cases"].items()} if before else None
            tasks.append({"setup": contest.setup, "kept": kept})
        results = self._children(contests, tasks)
        for (contest, _), result in zip(contests, results, strict=True):
            if "error" in result:
                self.errors[contest.name] = _last_lines(result["error"])
            else:
                self.found[contest.name].append(result["found"])
        return [result["seconds"] for result in results]

    def threads(self, contest: Contest) -> int:
        return contest.threads or env.usable_cpus()

    def _children(self, contests: list[tuple[Contest, Path]], tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A fresh process of each task of an area, one after the other; compiled code is kept between them in the work folder."""
        if not tasks:
            return []
        threads = max(self.threads(contest) for contest, _ in contests)
        work = self.work / contests[0][0].area
        work.mkdir(parents=True, exist_ok=True)
        whole = [
            {
                "file": str(file), "params": contest.params | {"device": self.device, "full": self.config.option.full},
                "threads": self.threads(contest), "pairs": self.pairs,
                "processes": self.processes, "cell_s": self.cell_s, "delay": self.config.option.delay,
                "work": str(work), **task,
            }
            for (contest, file), task in zip(contests, tasks, strict=True)
        ]  # fmt: skip
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more are processes, which start while others are timed
            "HF_HOME": str(self.work / "hf"),
            "HF_HUB_OFFLINE": "1",
            **KEEP_MEMORY,
        }
        with tempfile.TemporaryDirectory(prefix="imgcls-duel-") as folder:
            given, out = Path(folder) / "tasks.json", Path(folder) / "results.json"
            given.write_text(json.dumps(whole), "utf-8")
            command = [sys.executable, "-W", "ignore", str(HERE / "duels.py"), str(given), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600 * len(tasks))
            if done.returncode:
                return [{"error": done.stderr or f"ended with {done.returncode}", "seconds": 0.0} for _ in tasks]
            results: list[dict[str, Any]] = json.loads(out.read_text("utf-8"))
            return results

    def finish(self) -> None:
        """Make an Area of each area that ran."""
        for name in report.AREAS:
            contests = [contest for contest, _ in self.contests.get(name, []) if name in self.ran]
            if contests or name in self.solos:
                self.areas[name] = self._area(name, contests)

    def _area(self, name: str, contests: Iterable[Contest]) -> Area:
        rows: list[Row] = []
        contenders = list(self.solos.get(name, []))
        missing: list[Missing] = []
        limits: dict[str, float] = {}
        threads = [env.usable_cpus()]
        for contest in contests:
            runs = self.found.get(contest.name, [])
            threads.append(self.threads(contest))
            if contest.name in self.errors or not runs:
                why = (self.errors.get(contest.name) or "too few processes").splitlines()[-1]
                missing.append(Missing(case=contest.name, contender="all", kind="absent", why=why))
                continue
            made = summed_up(contest, runs)
            rows += made[0]
            contenders += made[1]
            missing += made[2]
            limits |= made[3]
        option = self.config.option
        method = report.Method(
            processes=self.processes, pairs=self.pairs, cell_s=self.cell_s, threads=min(threads) if name == "ops" else max(threads),
            device=self.device, full=option.full, small=option.small,
        )  # fmt: skip
        return Area(
            area=name, about=ABOUT[name], created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(self.seconds.get(name, 0.0), 1), machine=machine(self.device), method=method,
            contenders=contenders, rows=rows, missing=missing, limits=limits,
        )  # fmt: skip

    def close(self) -> None:
        if self._temporary:
            self._temporary.cleanup()


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-25:])


def summed_up(
    contest: Contest, runs: list[dict[str, Any]]
) -> tuple[list[Row], list[report.Contender], list[Missing], dict[str, float]]:
    """What all processes of a contest found together."""
    first = runs[0]
    rows, contenders = [], []
    limits = {
        case: (name, float(np.median([run["limits"][case][1] for run in runs])))
        for case, (name, _) in first["limits"].items()
    }
    for case, found in first["cases"].items():
        kept = [name for name in found if all(name in run["cases"].get(case, {}) for run in runs)]
        contenders += [_contender(case, name, runs, limits.get(case)) for name in kept]
        for contender, rival, goals in first["pairs"]:
            if contender in kept and rival in kept:
                rows.append(_row(case, contender, rival, goals.get(case, goals.get("")), runs))
    cases = list(first["cases"]) or [contest.name]
    absent = {name: why for run in reversed(runs) for name, why in run["absent"].items()}
    missing = [Missing(case=cases[0], contender=name, kind="absent", why=why) for name, why in absent.items()]
    missing += [Missing(case=case, contender=name, kind="not run", why=why) for case, name, why in first["skipped"]]
    missing += [
        Missing(case=case, contender=name, kind="not run", why=TOO_SLOW, seconds=round(need, 1))
        for case, name, need in first["slow"]
    ]
    told = {f"{case}: {name} (s)": round(seconds, 9) for case, (name, seconds) in limits.items()}
    return rows, contenders, missing, told


def _row(case: str, contender: str, rival: str, goal: float | None, runs: list[dict[str, Any]]) -> Row:
    clock = runs[0]["clock"]
    both = [_rounds(run["cases"][case]) for run in runs]
    logs = [rounds.log_ratio(contender, rival, cpu=clock == "cpu") for rounds in both]
    ratio = ratio_interval(logs)
    cpu = float(np.exp(np.median([rounds.log_ratio(contender, rival, cpu=True) for rounds in both])))
    return Row(
        case=case, contender=contender, rival=rival, clock=clock, log_ratios=[round(log, 6) for log in logs],
        ratio=round(ratio.ratio, 4), low=round(ratio.low, 4), high=round(ratio.high, 4),
        cpu_ratio=round(cpu, 4) if np.isfinite(cpu) else None,
        agreement=runs[0]["agreement"].get(contender, {}), goal=goal, holds=None if goal is None else ratio.ratio <= goal,
    )  # fmt: skip


def _rounds(found: dict[str, dict[str, Any]]) -> Rounds:
    """One case of one process, as `interleave` gave it."""
    return Rounds(*({name: np.array(part[key]) for name, part in found.items()} for key in ("wall_s", "cpu_s")))


def _contender(case: str, name: str, runs: list[dict[str, Any]], limit: tuple[str, float] | None) -> report.Contender:
    parts = [run["cases"][case][name] for run in runs]
    latency = Latency.of([s for part in parts for s in part["wall_s"]])
    cpu_ms = 1e3 * float(np.median([s for part in parts for s in part["cpu_s"]]))
    opened = [run["opened"][name] for run in runs]
    images = runs[0]["images"].get(case)
    on_device = [part["device_s"] for part in parts if "device_s" in part]
    spent = cpu_ms if runs[0]["clock"] == "cpu" else latency.p50_ms
    return report.Contender(
        case=case, name=name, p50_ms=round(latency.p50_ms, 5), p90_ms=round(latency.p90_ms, 5),
        p99_ms=round(latency.p99_ms, 5), calls=latency.count, cpu_ms=round(cpu_ms, 4),
        images_per_s=round(1e3 * images / latency.p50_ms, 2) if images else None,
        open_s=round(float(np.median([facts["open_s"] for facts in opened])), 3),
        memory_mb=round(float(np.median([facts["memory"] for facts in opened])) / 1e6, 1),
        precision=opened[0]["precision"], facts=opened[0]["facts"],
        device_p50_ms=round(1e3 * float(np.median(on_device)), 5) if on_device else None,
        limit=limit[0] if limit else None, limit_share=round(1e3 * limit[1] / spent, 4) if limit and spent else None,
        **opened[0].get("worth", {}),
    )  # fmt: skip


def machine(device: str) -> report.Machine:
    """This machine: what must be equal for a comparison, and what a reader wants to know beside it."""
    facts = env.machine_facts()
    gpu = driver = None
    if device == "cuda":
        import torch

        gpu = torch.cuda.get_device_name()
        driver = _driver()
    build = env.build_info()
    versions = {**facts["libraries"], **env.versions(("datasets", "pytest-benchmark"))}
    return report.Machine(
        name=env.machine_slug(gpu),
        fingerprint={"cpu": facts["cpu"], "cpus": facts["cpus"], "gpu": gpu, "driver": driver},
        versions={"python": facts["python"], **versions},
        facts={
            "system": facts["system"],
            "imgcls_fast": facts["imgcls_fast"],
            "git": env.own_revision(),
            "load": round(os.getloadavg()[0], 2),
            "compiler": str(build.get("compiler", "")),
        },
    )


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text("utf-8").splitlines()[0].strip() if path.exists() else None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# --- pytest -----------------------------------------------------------------------------------------------------------


ARENA = pytest.StashKey[Arena]()


def pytest_configure(config: pytest.Config) -> None:
    env.calm_threads()
    if config.option.collectonly:
        return
    try:
        config.stash[ARENA] = Arena(config)
    except UsageError as error:  # of --against: said before anything is measured
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this device, `--small` or `--full` does not want; a benchmark takes as long as it takes."""
    arena, kept, left = config.stash.get(ARENA, None), [], []
    for item in items:
        contest = getattr(getattr(item, "callspec", None), "params", {}).get("contest")
        item.add_marker(pytest.mark.timeout(0))
        wanted = not config.option.small if contest is None else arena is None or _is_wanted(contest, arena)
        (kept if wanted else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def _is_wanted(contest: Contest, arena: Arena) -> bool:
    option = arena.config.option
    if arena.device not in contest.devices:
        return False
    return contest.small if option.small else not contest.small and (option.full or not contest.full)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Know the contests of an area before its first one runs; after -k and -m have had their say."""
    arena = session.config.stash.get(ARENA, None)
    if arena is None:
        return
    for item in session.items:
        contest = getattr(getattr(item, "callspec", None), "params", {}).get("contest")
        if isinstance(contest, Contest):
            arena.contests.setdefault(contest.area, []).append((contest, item.path))
    option = session.config.option
    arena.partial |= bool(option.keyword or option.markexpr or any("::" in word for word in session.config.args))


@pytest.fixture
def duel(request: pytest.FixtureRequest) -> Callable[[Contest], list[dict[str, Any]]]:
    """Runs the contest's area if that has not happened, and gives what each process found.

    Fails when a process fails: one of our contenders gives a wrong result, or cannot run.
    """
    arena = request.config.stash[ARENA]

    def run(contest: Contest) -> list[dict[str, Any]]:
        arena.run(contest.area)
        if contest.name in arena.errors:
            pytest.fail(arena.errors[contest.name], pytrace=False)
        return arena.found[contest.name]

    return run


@pytest.fixture
def solo(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Times one contender that has no rival, by pytest-benchmark, and files it under an area."""
    arena = request.config.stash[ARENA]

    def run(area: str, case: str, name: str, call: Callable[[], Any], *, rounds: int) -> None:
        began = time.monotonic()
        benchmark.pedantic(call, rounds=rounds, iterations=1)
        arena.seconds[area] = arena.seconds.get(area, 0.0) + time.monotonic() - began
        if benchmark.disabled:
            return
        latency = Latency.of(benchmark.stats.stats.data)
        arena.solos.setdefault(area, []).append(
            report.Contender(
                case=case,
                name=name,
                p50_ms=round(latency.p50_ms, 4),
                p90_ms=round(latency.p90_ms, 4),
                p99_ms=round(latency.p99_ms, 4),
                calls=latency.count,
            )
        )

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    arena = session.config.stash.get(ARENA, None)
    if arena is None:
        return
    arena.finish()
    if arena.earlier and arena.areas:
        _compare(arena, arena.earlier, session)
    arena.close()


def _earlier(against: Path, device: str) -> dict[str, Area]:
    """Earlier results of this machine, in a folder of machines or of its own."""
    folder = against / machine(device).name
    return report.read_results(folder if folder.is_dir() else against)


def _compare(arena: Arena, earlier: dict[str, Area], session: pytest.Session) -> None:
    """Flagged rows run once more in fresh processes; those that are flagged again, or fail then, fail the session."""
    flagged = report.compare(earlier, arena.areas).flagged
    suspects = {change.key for change in flagged}
    for name, entries in arena.contests.items():
        for contest, file in entries:
            cases = {case for run in arena.found.get(contest.name, []) for case in run["cases"]}
            if any(area == name and case in cases for area, case, _, _ in suspects):
                arena.say(f"again, in fresh processes: {contest.name}")
                arena.again(contest, file)
    if flagged:
        arena.finish()
        second = report.compare(earlier, arena.areas).flagged
        arena.changes = [change for change in second if change.key in suspects]
    if arena.changes or arena.errors:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    arena = config.stash.get(ARENA, None)
    if arena is None:
        return
    for area in arena.areas.values():
        terminalreporter.write_line("")
        terminalreporter.write_line(report.table(area))
        if arena.partial and not config.option.results:
            terminalreporter.write_line(
                "  not written: not all of the area ran as it is (--results FOLDER writes it anyway)"
            )
            continue
        folder = (config.option.results or HERE / "results") / area.machine.name
        terminalreporter.write_line(f"  written to {report.write_area(folder, area)}, {area.seconds:.0f} s")
    for change in arena.changes:
        terminalreporter.write_line(
            f"SLOWER: {change.area}, {change.case}, {change.contender} / {change.rival}: {change.before:.3f}x to {change.after:.3f}x",
            red=True,
        )
    if config.option.against and not arena.changes:
        terminalreporter.write_line(f"compared with {config.option.against}: no row became slower by more than 5 %")
