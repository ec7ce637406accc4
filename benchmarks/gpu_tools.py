"""The parts of `gpu_check.py` that let tools look at our kernels: pytest, compute-sanitizer, Nsight Compute."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_rows import Journal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ERROR = re.compile(r"Invalid|Error:|hazard|Race reported|Misaligned|Internal")
COUNTERS = {
    "time us": r"^gpu__time_duration\.sum$",
    "DRAM %": r"^(gpu__)?dram__?throughput\.avg\.pct_of_peak_sustained_elapsed$",
    "issue active %": r"^(smsp?__issue_active|sm__instruction_throughput)\.avg\.pct_of_peak_sustained_active$",
    "issued per cycle": r"^smsp__issue_active\.avg\.per_cycle_active$",
    "shared wavefronts": r"^l1tex__data_pipe_lsu_wavefronts_mem_shared\.sum$",
    "shared bank conflicts": r"^l1tex__data_bank_conflicts_pipe_lsu(_mem_shared)?\.sum$",
    "warps active %": r"^sm__warps_active\.avg\.pct_of_peak_sustained_active$",
    "registers": r"^launch__registers_per_thread$",
    "DRAM bytes read": r"^dram__bytes_read\.sum$",
    "DRAM bytes written": r"^dram__bytes_write\.sum$",
}
STALL = re.compile(r"^smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio$")


def find_tool(name: str) -> str | None:
    """On PATH, or where NVIDIA's installers put it."""
    places = ("usr/local/cuda*/bin", "usr/local/cuda*/compute-sanitizer", "opt/nvidia/nsight-compute/*")
    return shutil.which(name) or next((str(path) for p in places for path in Path("/").glob(f"{p}/{name}")), None)


def kernel_tests(journal: Journal) -> None:
    """The tests of the kernels that need a GPU (rehearsing: two on the CPU); what pytest wrote is in tests.txt."""
    chosen = ["-k", "test_opcheck"] if journal.small else ["-m", "gpu", "-k", "not offsets"]
    if importlib.util.find_spec("xdist") and not journal.small:
        chosen += ["-n", "4"]
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "ops"),
        *chosen,
    ]
    path = journal.folder / "tests.txt"
    code: int | None = None
    with open(path, "w", encoding="utf-8") as file, contextlib.suppress(subprocess.TimeoutExpired):
        code = subprocess.run(
            words,
            stdout=file,
            stderr=file,
            cwd=ROOT,
            timeout=max(5.0, journal.left() - 4),
            env={**os.environ, "OMP_NUM_THREADS": "3"},
        ).returncode
    lines = path.read_text("utf-8", errors="replace").splitlines()
    text = (lines or ["nothing"])[-1].strip("= ")[:120]
    if code is None:
        text = (
            f"not over in time: {sum('PASSED' in x for x in lines)} passed, {sum('FAILED' in x for x in lines)} failed"
        )
    journal.row("kernel tests", text, "pass", code == 0)
    for line in [line for line in lines if re.match(r"(FAILED|ERROR) ", line)][:12]:
        journal.row("failed", line[:200], holds=False)


def sanitizers(journal: Journal) -> None:
    """memcheck and racecheck side by side, our kernels only; torch's caching is off, so that every tensor has its own borders."""
    tool, script = find_tool("compute-sanitizer"), str(HERE / "gpu_kernels.py")
    if journal.small or tool is None:
        journal.row("compute-sanitizer", "needs a GPU" if tool else "not on PATH", "no errors", None)
        return
    running = {}
    for name in ("memcheck", "racecheck"):
        path = journal.folder / f"{name}.txt"
        words = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", name, "--kernel-name", "kns=imgcls", "--print-limit", "20",
                 "--error-exitcode", "9", sys.executable, "-u", script]  # fmt: skip
        with open(path, "w", encoding="utf-8") as file:
            running[name] = (subprocess.Popen(words, stdout=file, stderr=file, cwd=ROOT), path)
    for name, (process, path) in running.items():
        try:
            code: int | None = process.wait(max(3.0, journal.left() - 4))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        lines = path.read_text("utf-8", errors="replace").splitlines()
        cases = sum(line.startswith("case") for line in lines)
        errors = [line for line in lines if ERROR.search(line) and "SUMMARY" not in line]
        summary = next(
            (line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), (lines or ["nothing"])[-1][:120]
        )
        text = f"{summary}; {cases} cases{'' if code is not None else ', not over in time'}"
        holds = False if errors or code not in (0, None) else (True if code == 0 else None)
        journal.row(f"compute-sanitizer {name}", text, "no errors", holds)
        for line in errors[:4]:
            journal.row(name, line.strip("= ")[:160])


def kernel_counters(journal: Journal) -> None:
    """What Nsight Compute counts in both small kernels at Swin-T's first stage; clocks are left as they are."""
    tool = find_tool("ncu")
    if journal.small or tool is None:
        journal.row("Nsight Compute", "needs a GPU" if tool else "ncu is not on PATH")
        return
    path = journal.folder / "counters.csv"
    words = [tool, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base",
             "--kernel-name", "regex:small_(forward|backward)", "--launch-count", "4", "--log-file", str(path),
             sys.executable, str(HERE / "gpu_kernels.py"), "--profile"]  # fmt: skip
    for choice in (["--set", "full"], ["--set", "basic"]):
        try:
            done = subprocess.run([words[0], *choice, *words[1:]], capture_output=True, text=True, cwd=ROOT,
                                  timeout=max(5.0, journal.left() - 3))  # fmt: skip
        except subprocess.TimeoutExpired:
            journal.row("Nsight Compute", f"{' '.join(choice)}: not over in time")
            return
        rows = counters_of(path.read_text("utf-8", errors="replace") if path.exists() else "")
        if rows:
            break
        journal.row(
            "Nsight Compute", f"{' '.join(choice)}: ended with {done.returncode}: {(done.stderr or done.stdout)[-200:]}"
        )
    for row in rows:
        stalls = sorted(row["stalls"].items(), key=lambda item: -item[1])[:5]
        text = ", ".join(f"{name} {value:.4g}" for name, value in row["values"].items())
        text += "; stalls: " + ", ".join(f"{name} {value:.2f}" for name, value in stalls)
        journal.row(f"counters, {row['kernel']}", text, **row)


def counters_of(text: str) -> list[dict[str, Any]]:
    """The rows of ncu's raw CSV: kernel, our choice of counters, stalls a cycle of issue."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found = []
    for record in csv.DictReader(lines):
        if not (record.get("ID") or "").strip():  # the row of units
            continue
        numbers = {}
        for name, value in record.items():
            try:
                numbers[name] = float((value or "").replace(",", ""))
            except (ValueError, AttributeError):
                continue
        values = {}
        for name, pattern in COUNTERS.items():
            match = next((key for key in numbers if re.search(pattern, key)), None)
            if match:
                values[name] = numbers[match] / 1e3 if name == "time us" else numbers[match]  # the base unit is ns
        stalls = {m[1]: value for key, value in numbers.items() if (m := STALL.match(key)) and "not_issued" not in key}
        found.append(
            {"kernel": (record.get("Kernel Name") or "?").split("(")[0][-48:], "values": values, "stalls": stalls}
        )
    return found
