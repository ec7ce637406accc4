#!/usr/bin/env python3
"""Makes the sample output and the pictures of README.md anew: trains on the embedded digits, exports, times, draws.

    python scripts/make_readme.py            do it all (some minutes; chromium for the pictures of the report)
    python scripts/make_readme.py DIR        the same in DIR, which is kept; what it holds already is not done again
    python scripts/make_readme.py --check    exit 1 when a block or a picture is missing, or is not of today's form

The output goes between the markers `<!-- OUTPUT -->` and `<!-- /OUTPUT -->`, the figures of the engines between `<!-- PARETO -->`
and `<!-- /PARETO -->`. A test runs the check.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
README, IMAGES = HOME / "README.md", HOME / "docs" / "images"
RESULTS = HOME / "benchmarks" / "results" / "amd-epyc-2core"
COLUMNS = 110
SHOWN = (4, 2)  # epochs at the beginning and at the end
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")  # fmt: skip
WAITING = r"  (ep +\d+.*: [\d,]+ of [\d,]+|ep \d+ .*of \d+$|[a-z][^:]*, \d+:\d\d$)"  # signs of life of what takes long, on a busy machine
# what the sample shows, in this order
PARTS = (r"^[\d,]+ images, \d+ classes", r"^plan: ", r"^  train\.device ", r"^  optim\.lr ", r"baseline|probe", r"^training for ",
         r"^ep +1/\d+ ", r"^\.\.\.$", r"^ep (\d+)/\1 ", r"^╭─ .*test: \d+ images", r"^│ accuracy ", r"^│ baseline ", r"^│ time ",
         r"^predict +imgcls-fast predict ", r"^export +imgcls-fast export ")  # fmt: skip


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        faults = check(README.read_text("utf-8"))
        print("\n".join(faults) or "README.md has its samples and pictures")
        return 1 if faults else 0
    with tempfile.TemporaryDirectory(prefix="imgcls-readme-") as folder:
        work = Path(sys.argv[1] if sys.argv[1:] else folder).resolve()
        work.mkdir(exist_ok=True)
        output = train(work)
        run = next((work / "runs").glob("digits-*"))
        efficiency = bench(run, work)
        text = put(README.read_text("utf-8"), "OUTPUT", sample(output))
        README.write_text(put(text, "PARETO", engines(efficiency)), "utf-8")
        draw(run, efficiency, work)
    return 0


def block(text: str, name: str) -> str | None:
    """What stands between two markers; None where one of them is missing."""
    found = re.search(rf"<!-- {name}\b.*?-->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
    return found[1] if found else None


def put(text: str, name: str, content: str) -> str:
    """The text with other content between two markers."""
    if block(text, name) is None:
        sys.exit(f"README.md has no markers <!-- {name} --> and <!-- /{name} -->")
    return re.sub(
        rf"(<!-- {name}\b.*?-->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{content}{m[2]}", text, flags=re.DOTALL
    )


def check(text: str) -> list[str]:
    """What is missing in a README, in words."""
    faults = [f"README.md has no block {name}" for name in ("OUTPUT", "PARETO") if block(text, name) is None]
    place, lines = 0, (block(text, "OUTPUT") or "").splitlines()
    for part in PARTS:
        found = next((k for k in range(place, len(lines)) if re.search(part, lines[k])), None)
        if found is None:
            faults.append(f"the sample output of README.md has no line {part} where it belongs")
        else:
            place = found + 1
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+\.png)\)", text)
    return faults + [f"{name} is missing" for name in pictures if not (HOME / name).is_file()]


def train(work: Path) -> str:
    """Train as a newcomer would, and return what the terminal shows."""
    kept = work / "console.txt"
    if not kept.exists():
        kept.write_text(_imgcls(work, "train"), "utf-8")
    return kept.read_text("utf-8")


def bench(run: Path, work: Path) -> dict[str, Any]:
    """Export for ONNX Runtime in FP32 and INT8, time every engine, and return what was found."""
    name = run.relative_to(work)
    if not (run / "bench" / "efficiency.json").exists():
        _imgcls(work, "export", str(name), "--onnx")
        _imgcls(work, "export", str(name), "--onnx", "--int8", fails=True)  # refused by the gate, it is not timed
        _imgcls(work, "bench", str(name), "--duration", "2")
        _imgcls(work, "report", str(name))
    found: dict[str, Any] = json.loads((run / "bench" / "efficiency.json").read_text("utf-8"))
    return found


def _imgcls(work: Path, *words: str, fails: bool = False) -> str:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("IMGCLS_") and key != "OMP_NUM_THREADS"
    }
    environment = kept | {"IMGCLS_CACHE": str(work / "cache"), "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "imgcls_fast", *words]
    print("imgcls-fast", *words, flush=True)
    done = subprocess.run(
        command, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode and not fails:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def sample(output: str) -> str:
    """The output as README shows it: some epochs left out."""
    lines = [line.rstrip() for line in output.strip("\n").splitlines() if not re.match(WAITING, line)]
    epochs = [k for k, line in enumerate(lines) if line.startswith("ep ")]
    first, last = SHOWN
    if len(epochs) > first + last:
        lines[epochs[first - 1] + 1 : epochs[-last]] = ["..."]
    cores = len(os.sched_getaffinity(0))
    machine = f"The machine: {cores} CPU core{'s' * (cores != 1)}, busy with other work at the same time, so its times are no benchmark."
    return "\n".join(["", "```text", *lines, "```", "", machine, "", ""])


def engines(found: dict[str, Any]) -> str:
    """The engines of the run in a sentence and a table, beneath their picture."""
    machine = found["machine"]
    rows = [
        f"| {row['name']} | {row['latency']['end_to_end']['p50_ms']:.3g} | {row['accuracy']['accuracy']:.3f} "
        f"[{row['accuracy']['low']:.3f}, {row['accuracy']['high']:.3f}] |"
        for row in found["engines"]
        if row["accuracy"]
    ]
    count = found["engines"][0]["accuracy"]["rows"]
    where = f"{machine['threads']} of {machine['cpus']} cores ({machine['cpu']})"
    text = f"Of the run above, by `imgcls-fast bench` on {where}: {count} test images."
    table = ["| engine | one image, median ms | accuracy, 95 % interval |", "| --- | --- | --- |", *rows]
    return "\n".join(
        ["", "![Accuracy and latency of the engines](docs/images/pareto.png)", "", text, "", *table, "", ""]
    )


def draw(run: Path, found: dict[str, Any], work: Path) -> None:
    """The pictures of README.md."""
    from imgcls_fast.core.env import install_hint
    from imgcls_fast.evaluation.scatter import engines_picture
    from imgcls_fast.measuring.charts import write_bench_report

    picture = engines_picture(found["engines"])
    if picture is None:
        sys.exit(f"fewer than two engines could be judged: {install_hint('openvino')}")
    (IMAGES / "pareto.png").write_bytes(picture)
    shutil.copy(run / "plots" / "confusion_test.png", IMAGES / "confusion.png")
    write_bench_report([RESULTS], IMAGES / "bench", force=True)
    (IMAGES / "bench" / "bench.html").unlink()
    page = (run / "report.html").read_text("utf-8").replace(str(work) + "/", "")
    _screenshot(page, IMAGES / "report.png", (985, 1466), work)
    gallery = "main > * { display: none } main #mistakes { display: block; border: 0; padding: 0; margin: 0 } main { padding: 12px }"
    gallery += " #mistakes h2, #mistakes p { display: none } body { background: #fff }"
    _screenshot(page.replace("</style>", f"{gallery}</style>"), IMAGES / "mistakes.png", (300, 236), work)


def _screenshot(page: str, path: Path, size: tuple[int, int], work: Path) -> None:
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if browser is None:
        print(f"{path.name} stays as it is: chromium is not installed (apt-get install chromium)")
        return
    source = work / "page.html"
    source.write_text(page, "utf-8")
    command = [browser, *QUIET, f"--user-data-dir={work / 'profile'}", f"--window-size={size[0]},{size[1]}"]
    done = subprocess.run(
        [*command, f"--screenshot={path}", source.as_uri()], capture_output=True, text=True, timeout=240
    )
    if done.returncode:
        sys.exit(f"chromium ended with {done.returncode}:\n{done.stderr[-1000:]}")


if __name__ == "__main__":
    sys.exit(main())
