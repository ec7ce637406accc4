"""Everything that only a GPU can show, in the order of its value: rows on stdout, and in a folder as they come.

    python benchmarks/gpu_check.py                            # needs an NVIDIA GPU
    python benchmarks/gpu_check.py --call 1 --budget 430      # right or wrong, kernels' speed, ResNet-50's step
    python benchmarks/gpu_check.py --call 2 --budget 190      # Swin's step, CBAM, half precision, digits, host syncs
    python benchmarks/gpu_check.py --rehearse                 # the same steps on the CPU, small, to see that the script works

Each row is a promise of the documentation with what was measured, one JSON object a line of `rows.jsonl` in `--out`,
written before the next begins. Every part is a process of its own with a time limit: one that hangs or crashes costs its
own rows. What needs no quiet machine runs beside others: compute-sanitizer, and parts that only fill the cache of
torch.compile. Needs neither DALI nor TensorRT; what it does need without network, `scripts/offline_gpu.py` packs.

Exit code 1 when a promise does not hold or a part did not end, 3 when the kernels are wrong and the rest was left out
(`--go-on` runs it), 4 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WRONG = 3  # exit code of a part whose failure makes the rest worthless
LEAST_S = 8.0  # with less than this left no part is begun


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        name: also of the function; `compile_X` runs X without measuring.
        module: of this folder, that has it.
        limit_s: it is killed then.
        call: 1 and 2 are what fits a machine that one has for fifteen minutes; 3 is the rest.
        background: runs beside the next parts.
        after: background parts that must have ended, or are killed after a while, before this one begins.
    """

    name: str
    module: str
    limit_s: float
    call: int
    background: bool = False
    after: tuple[str, ...] = ()


COMPILED = ("compile_resnet50_step", "compile_attention_times", "compile_swin_step", "compile_half_inference")
PARTS = (
    Part("attention_is_right", "gpu_attention", 70, 1),
    *(Part(name, "gpu_training" if "attention" not in name else "gpu_attention", 240, 1, background=True) for name in COMPILED),
    Part("sanitizers", "gpu_tools", 110, 1, background=True),
    Part("kernel_tests", "gpu_tools", 100, 1),
    Part("attention_times", "gpu_attention", 110, 1, after=("sanitizers", *COMPILED)),
    Part("kernel_counters", "gpu_tools", 60, 1),
    Part("resnet50_step", "gpu_training", 130, 1),
    Part("swin_step", "gpu_training", 90, 2),
    Part("cbam_times", "gpu_cbam", 60, 2),
    Part("host_syncs", "gpu_training", 45, 2),
    Part("half_inference", "gpu_training", 90, 2),
    Part("digits", "gpu_training", 110, 2),
    Part("pixels_agree", "gpu_loading", 90, 3),
    Part("restart_is_equal", "gpu_loading", 60, 3),
    Part("loader_speed", "gpu_loading", 90, 3),
    Part("tensorrt", "gpu_loading", 240, 3),
)  # fmt: skip
NAMES = [part.name for part in PARTS]


class Driver:
    """Runs parts one after the other until the budget is spent."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.began = time.monotonic()
        self.running: dict[str, tuple[subprocess.Popen[bytes], Part, float]] = {}
        self.unfinished: list[str] = []

    def left(self) -> float:
        return float(self.options.budget - (time.monotonic() - self.began))

    def run(self, parts: list[Part]) -> int:
        """The exit code."""
        chosen = {part.name for part in parts}
        for part in parts:
            self.reap()
            if part.background:
                self.running[part.name] = (self.start(part), part, time.monotonic())
                continue
            self.wait_for([name for name in part.after if name in chosen])
            limit = min(part.limit_s * (3 if self.options.rehearse else 1), self.left())
            if limit < LEAST_S:
                self.note(part.name, "not run: the time budget was spent")
                continue
            code = self.wait(self.start(part, limit), limit)
            if code == WRONG and not self.options.go_on:
                self.note(part.name, "wrong: the parts behind it are left out")
                self.stop()
                return WRONG
            if code != 0:
                self.note(part.name, f"killed after {limit:.0f} s" if code is None else f"ended with {code}")
        self.stop()
        return 0

    def start(self, part: Part, limit: float | None = None) -> subprocess.Popen[bytes]:
        limit = limit or min(part.limit_s, self.left())
        words = [
            sys.executable, str(Path(__file__).resolve()), "--part", part.name, "--out", str(self.out), "--limit", f"{limit:.0f}",
            *(["--rehearse"] if self.options.rehearse else []),
        ]  # fmt: skip
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "imgcls-gpu-check-inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
            "IMGCLS_CACHE": str(Path(tempfile.gettempdir()) / "imgcls-gpu-check-cache"),
            "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg", **os.environ,
        }  # fmt: skip
        words = ["nice", "-n", "5", *words] if part.background else words
        with open(self.out / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"--- {part.name}, {self.options.budget - self.left():.0f} s\n")
            log.flush()
            return subprocess.Popen(words, stderr=log, cwd=ROOT, env=environment, start_new_session=True)

    def wait(self, child: subprocess.Popen[bytes], limit: float) -> int | None:
        """Its exit code; None when it had to be killed."""
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            kill(child)
            return None

    def wait_for(self, names: list[str]) -> None:
        """Until background parts have ended; what takes too long for the parts to come is killed."""
        patience = time.monotonic() + max(0.0, self.left() - 190.0)
        for name in names:
            if name in self.running:
                child, part, _ = self.running.pop(name)
                if self.wait(child, max(0.0, patience - time.monotonic())) is None:
                    self.note(part.name, "killed: others need the time")

    def reap(self) -> None:
        for name, (child, part, since) in list(self.running.items()):
            if child.poll() is not None:
                del self.running[name]
                text = (
                    f"over after {time.monotonic() - since:.0f} s"
                    if child.returncode == 0
                    else f"ended with {child.returncode}"
                )
                self.note(part.name, text, failed=child.returncode != 0)
            elif time.monotonic() - since > part.limit_s:
                kill(child)

    def stop(self) -> None:
        for child, _, _ in self.running.values():
            kill(child)

    def note(self, name: str, text: str, failed: bool = True) -> None:
        """A row of the driver's own."""
        if failed:
            self.unfinished.append(name)
        record = {"part": name, "name": name, "value": text, "promise": "runs", "holds": not failed, "data": {}}
        write(self.out, record | {"at": round(time.monotonic() - self.began, 1)})
        print(f"{'FAIL' if failed else '    '} {name}: {text}", flush=True)


def kill(child: subprocess.Popen[bytes]) -> None:
    """End a part and every process that it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def write(folder: Path, record: dict[str, Any]) -> None:
    with open(folder / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_part(options: argparse.Namespace) -> int:
    """What a child does."""
    sys.path.insert(0, str(HERE))
    part = next(part for part in PARTS if part.name == options.part)
    from gpu_rows import Journal, short

    journal = Journal(
        options.out, part.name, rehearse=options.rehearse, limit_s=options.limit, warm=part.name.startswith("compile_")
    )
    try:
        work = getattr(importlib.import_module(part.module), part.name.removeprefix("compile_"))
        return int(work(journal) or 0)
    except (RuntimeError, ValueError, OSError, AssertionError, ImportError, AttributeError, TypeError, KeyError,
            subprocess.SubprocessError) as error:  # fmt: skip
        import traceback

        traceback.print_exc()
        journal.row(part.name, short(error, 200), "runs", False)
        return 2


def revision() -> str | None:
    """The commit of the working tree, where there is a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def facts(rehearse: bool) -> dict[str, Any]:
    """Of machine, card and libraries: the first row of every results file."""
    sys.path.insert(0, str(HERE))
    import torch
    from gpu_rows import card

    from imgcls_fast.core import env

    found: dict[str, Any] = {**env.machine_facts(), "build": env.build_info()}
    found |= {"git": revision(), "torch": torch.__version__, "cuda": torch.version.cuda, "card": card()}
    if torch.cuda.is_available() and not rehearse:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count, "cudnn": torch.backends.cudnn.version(),
                  "capability": torch.cuda.get_device_capability(), "memory": properties.total_memory}  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run the same steps on the CPU, small")
    parser.add_argument(
        "--out", type=Path, help="folder (default: benchmarks/results/<gpu>/gpu_check; rehearsing: a temporary one)"
    )
    parser.add_argument(
        "--call", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="which parts (default: all)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, metavar="PART", help=f"some of the parts: {', '.join(NAMES)}"
    )
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds for everything (default 1200)")
    parser.add_argument("--go-on", action="store_true", help="even when the kernels are wrong")
    parser.add_argument("--part", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=600.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_part(options)
    known = facts(options.rehearse)
    if not options.rehearse and "gpu" not in known:
        print("no usable GPU: nothing was checked (try --rehearse)", file=sys.stderr)
        return 4
    if options.out is None:
        from imgcls_fast.core import env

        name = env.machine_slug(known.get("gpu"))
        options.out = (
            Path(tempfile.mkdtemp(prefix="gpu-check-")) if options.rehearse else HERE / "results" / name / "gpu_check"
        )
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out, {"part": "facts", "name": "facts", "value": known, "promise": "", "holds": None, "data": {}})
    print(
        f"{known.get('gpu', 'CPU')}, torch {known['torch']}, {known['build'].get('cuda_archs')}, {known['card']}",
        flush=True,
    )
    driver = Driver(options)
    code = driver.run(
        [part for part in PARTS if (part.name in options.only if options.only else part.call in options.call)]
    )
    rows = [json.loads(line) for line in (options.out / "rows.jsonl").read_text("utf-8").splitlines()]
    failed = [row["name"] for row in rows if row["holds"] is False]
    print(f"{len(rows)} rows, {len(failed)} failed, {time.monotonic() - driver.began:.0f} s: {options.out}")
    return code or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
