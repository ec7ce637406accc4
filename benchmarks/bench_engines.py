"""Engines beside each other: time ratios of whole calls, uint8 pixels to scores, on ResNet-50 and ViT-T with random weights.

    python benchmarks/bench_engines.py [--models resnet50 vit-t] [--batches 1] [--full] [--device cpu|cuda] [--only NAME ...]
                                       [--processes 5] [--pairs 15] [--threads N] [--work FOLDER] [--out FILE]

A row is a contender and its rival. Each is opened in fresh processes, both in one; first they must agree on images, then they
are called in pairs, in random order within a pair. The ratio is the median over processes of the median log ratio; its 95 %
interval (two-sided, Student) comes from the variation between processes, because a test within one process is far too sure
of itself. A goal holds when the upper end of the interval keeps it. Beside each: percentiles over all calls, CPU time of all
threads, how much the peak of resident memory rose from opening to the third answer, and the precision that the runtime
really computes in. The INT8 file is the one that TensorRT would get; what ONNX Runtime makes of it is published even though
it loses. `--full` adds batches 8 and 32. On a GPU everything is FP16, and nothing of that has been run yet.

`--work` keeps bundles and exports for the next time. Exit code 1 when a goal does not hold or a row could not be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from imgcls_fast.core import env
from imgcls_fast.core.bundle import Bundle, read_bundle, write_bundle
from imgcls_fast.core.errors import ImgclsError
from imgcls_fast.core.manifest import LabelSpace
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.engines.base import Engine
from imgcls_fast.engines.onnx_runtimes import OnnxEngine
from imgcls_fast.engines.openvino_runtime import OpenVinoEngine
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.engines.timing import Latency, duel, peak_bytes, ratio_interval, reset_peak
from imgcls_fast.exporting.onnx_graph import write_graph
from imgcls_fast.exporting.programs import write_aoti
from imgcls_fast.exporting.quantize import quantize
from imgcls_fast.models.build import ModelSpec, build_model

ARCHITECTURES = {"resnet50": "torchvision/resnet50", "vit-t": "timm/vit_tiny_patch16_224"}
SIDE, CLASSES = 224, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION, CHECKED = 64, 8  # images
NO_SLOWER, TWICE = 1.05, 0.5


@dataclass(frozen=True)
class Row:
    """A contender and its rival.

    Args:
        exact: both compute in float32, so the scores must agree to 1e-4; else in relative L2 to 0.7 (unrelated scores: 1.4).
        goals: model -> largest upper end of the ratio's interval, at batch 1.
    """

    contender: str
    rival: str
    exact: bool
    goals: dict[str, float]


BOTH = dict.fromkeys(ARCHITECTURES, NO_SLOWER)
CPU_ROWS = (
    Row("compile", "eager", True, {}),
    Row("aoti", "eager", True, BOTH),
    Row("onnx fp32", "eager", True, BOTH),
    Row("openvino fp32", "eager", True, {}),
    Row("openvino int8", "openvino fp32", False, {"resnet50": TWICE}),
    Row("openvino bf16", "openvino fp32", False, {}),
    Row("onnx int8", "onnx fp32", False, {}),
)
GPU_ROWS = (Row("compile", "eager", False, {}), Row("aoti", "eager", False, {}))


# --- what is measured -------------------------------------------------------------------------------------------------


def images(n: int, seed: int) -> np.ndarray:
    """(n, S, S, 3) uint8: patches of random colour under noise; white noise alone would look the same to every filter."""
    draw = np.random.default_rng(seed)
    patches = draw.integers(0, 160, (n, 8, 8, 3), np.uint8).repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)
    return patches + draw.integers(0, 96, (n, SIDE, SIDE, 3), np.uint8)


def bundle_at(folder: Path, model: str) -> Bundle:
    """The bundle of a network with random weights that behaves like a trained one where rounding is concerned.

    Batch norms know the statistics of `images`, residual branches are damped (in random deep networks any rounding error
    grows from block to block), and the head is centred and scaled so that images get different scores of usual size.
    """
    if (folder / "bundle").exists():
        return read_bundle(folder / "bundle")
    torch.manual_seed(0)
    network = build_model(ModelSpec(ARCHITECTURES[model], num_outputs=CLASSES, mean=MEAN, std=STD, image_size=SIDE))
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            if name.endswith("bn3"):
                torch.nn.init.constant_(module.weight, 0.2)
    seen = torch.from_numpy(images(16, 1))
    with torch.no_grad():
        network.train()
        network(seen)
        network.eval()
        weight, bias = sorted(network.head_parameters(), key=lambda parameter: -parameter.ndim)
        weight.copy_(torch.randn_like(weight))
        bias.zero_()
        logits = network(seen)
        weight.mul_(1.5 / logits.std(0, keepdim=True).T)
        bias.copy_(-1.5 * logits.mean(0) / logits.std(0))
    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    return write_bundle(
        folder / "bundle",
        lambda file: file.write(save(state)) and None,
        arch=network.spec.to_dict(),
        labels=LabelSpace.single([f"class {k}" for k in range(CLASSES)]),
        pixels=Pixels(SIDE, 0.875, "bilinear", "rgb", "apply", MEAN, STD),
        temperature=1.0,
        provenance={},
    )


def prepare(folder: Path, bundle: Bundle, names: Iterable[str], device: str) -> None:
    """Write the files that the contenders open."""
    wanted = set(names)
    if (
        any("fp32" in name or "bf16" in name or "int8" in name for name in wanted)
        and not (folder / "fp32.onnx").exists()
    ):
        write_graph(bundle, folder / "fp32.onnx")
    if any("int8" in name for name in wanted) and not (folder / "int8.onnx").exists():
        quantize(folder / "fp32.onnx", folder / "int8.onnx", images(CALIBRATION, 2))
    if "aoti" in wanted:
        precision = "fp32" if device == "cpu" else "fp16"
        write_aoti(bundle, folder / "exports", [images(CHECKED, 3)], precision=precision, device=device)


def open_contender(name: str, folder: Path, bundle: Bundle, device: str, threads: int) -> Engine:
    """The engine behind a name."""
    runtime, _, precision = name.partition(" ")
    if runtime in ("eager", "compile", "aoti"):
        how = "torch" if runtime == "eager" else runtime
        asked = "fp32" if device == "cpu" else "fp16"
        return open_engine(bundle, how, device=device, exports=folder / "exports", precision=asked)
    path = folder / ("int8.onnx" if precision == "int8" else "fp32.onnx")
    if runtime == "onnx":
        return OnnxEngine(path, bundle.labels, bundle.pixels, threads=threads)
    compute = "bf16" if precision == "bf16" else "f32"
    return OpenVinoEngine(path, bundle.labels, bundle.pixels, compute=compute, threads=threads)


# --- one process ------------------------------------------------------------------------------------------------------


def child(task: dict[str, Any]) -> dict[str, Any]:
    """Open both, compare, and let them alternate."""
    torch.set_num_threads(task["threads"])
    folder, batch = Path(task["folder"]), task["batch"]
    bundle = read_bundle(folder / "bundle", verify=False)
    pixels = images(batch, 4)
    engines, rises = {}, {}
    for name in (task["contender"], task["rival"]):
        reset_peak()
        before = peak_bytes()
        engines[name] = open_contender(name, folder, bundle, task["device"], task["threads"])
        for _ in range(3):
            engines[name].scores(pixels)
        rises[name] = peak_bytes() - before
    agreement = agree(engines[task["contender"]], engines[task["rival"]], task["exact"])
    a, b = (engines[task[role]] for role in ("contender", "rival"))
    found = duel(lambda: a.scores(pixels), lambda: b.scores(pixels), task["pairs"])
    sides = {"contender": (a, found.a_s, found.a_cpu_s), "rival": (b, found.b_s, found.b_cpu_s)}
    return {
        "log_ratio": float(np.median(found.log_ratios)),
        "cpu_log_ratio": float(np.median(np.log(found.a_cpu_s / found.b_cpu_s))),
        "agreement": agreement,
        **{
            role: {
                "precision": engine.precision,
                "facts": engine.facts(),  # type: ignore[attr-defined]
                "seconds": seconds.tolist(),
                "cpu_s": cpu.tolist(),
                "peak_rise_bytes": rises[task[role]],
            }
            for role, (engine, seconds, cpu) in sides.items()
        },
    }


def agree(contender: Engine, rival: Engine, exact: bool) -> dict[str, float]:
    """How far the scores of images are apart.

    Raises:
        ValueError: too far for a comparison of times to mean anything.
    """
    x = images(CHECKED, 5)
    a, b = contender.scores(x).astype(np.float64), rival.scores(x).astype(np.float64)
    centred = b - b.mean(0)
    worst = float(np.abs(a - b).max())
    error = float(np.linalg.norm(a - a.mean(0) - centred) / np.linalg.norm(centred))
    if not (worst <= 1e-4 if exact else error <= 0.7):
        raise ValueError(
            f"{contender.runtime} and {rival.runtime} disagree: scores by {worst:.1e}, relative L2 {error:.2f}"
        )
    same = int((a.argmax(1) == b.argmax(1)).sum())
    return {"max_score_diff": worst, "relative_l2": error, "same_top1": same, "images": CHECKED}


# --- all of them ------------------------------------------------------------------------------------------------------


def in_fresh_process(task: dict[str, Any], work: Path) -> dict[str, Any]:
    """Run `child` elsewhere; compiled code is shared between processes through a cache in the work folder."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(task["threads"]),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
    }
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure_row(row: Row, model: str, batch: int, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All processes of one row, summed up."""
    task = {"folder": str(work / model), "contender": row.contender, "rival": row.rival, "exact": row.exact, "batch": batch,
            "pairs": args.pairs, "threads": args.threads, "device": args.device}  # fmt: skip
    runs = [in_fresh_process(task, work) for _ in range(args.processes)]
    ratio = ratio_interval([run["log_ratio"] for run in runs])
    goal = row.goals.get(model) if batch == 1 else None
    return {
        "model": model,
        "batch": batch,
        "names": [row.contender, row.rival],
        "ratio": round(ratio.ratio, 4),
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
        "cpu_ratio": round(float(np.exp(np.median([run["cpu_log_ratio"] for run in runs]))), 4),
        "per_process": [round(float(np.exp(run["log_ratio"])), 4) for run in runs],
        "processes": args.processes,
        "pairs": args.pairs,
        "goal": goal,
        "holds": None if goal is None else ratio.high <= goal,
        "agreement": runs[0]["agreement"],
        **{role: side([run[role] for run in runs]) for role in ("contender", "rival")},
    }


def side(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One engine over all processes."""
    calls = [s for run in runs for s in run["seconds"]]
    return {
        "precision": runs[0]["precision"],
        "facts": runs[0]["facts"],
        "latency": Latency.of(calls).to_dict(),
        "cpu_ms": round(1e3 * float(np.median([s for run in runs for s in run["cpu_s"]])), 3),
        "peak_rise_mb": round(float(np.median([run["peak_rise_bytes"] for run in runs])) / 1e6, 1),
    }


def show(row: dict[str, Any]) -> str:
    """A row for people."""
    mark = {True: "ok  ", False: "FAIL", None: "    "}[row["holds"]]
    mine, theirs = row["contender"], row["rival"]
    name, rival = row["names"]
    text = (
        f"{mark} {row['model']:<9} b{row['batch']:<3} {name:<14} ({mine['precision']}) {row['ratio']:6.3f}x {rival} "
        f"({theirs['precision']}) [{row['low']:.3f}, {row['high']:.3f}]"
    )
    goal = f"  goal {row['goal']:g}" if row["goal"] else ""
    latency = "/".join(f"{mine['latency'][p]:.1f}" for p in ("p50_ms", "p90_ms", "p99_ms"))
    return f"{text:<88}{goal}  p50/p90/p99 {latency} ms, CPU {mine['cpu_ms']:.1f} ms, +{mine['peak_rise_mb']:.0f} MB"


def run(args: argparse.Namespace, work: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every row that can be measured, and the reasons of the others."""
    table = [
        row for row in (CPU_ROWS if args.device == "cpu" else GPU_ROWS) if not args.only or row.contender in args.only
    ]
    rows, absent = [], []
    for model in args.models:
        bundle = bundle_at(work / model, model)
        prepare(work / model, bundle, {name for row in table for name in (row.contender, row.rival)}, args.device)
        for batch in args.batches:
            for row in table:
                try:
                    rows.append(measure_row(row, model, batch, args, work))
                    print(show(rows[-1]), flush=True)
                except (RuntimeError, ImgclsError, subprocess.TimeoutExpired) as error:
                    absent.append({"model": model, "batch": str(batch), "contender": row.contender, "why": str(error)})
                    print(f"FAIL {model:<9} b{batch:<3} {row.contender:<14} {error}", flush=True)
    return rows, absent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--full", action="store_true", help="batches 1, 8 and 32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", help="contenders, e.g. aoti 'openvino int8'")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=env.usable_cpus())
    parser.add_argument("--work", type=Path, help="folder that keeps bundles, exports and compiled code")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<machine>/engines.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return 0
    env.calm_threads()  # of the processes to come, as the command line does
    args.batches = [1, 8, 32] if args.full else args.batches
    facts = env.machine_facts() | {"threads": args.threads, "load_before": os.getloadavg()[0], "device": args.device}
    with tempfile.TemporaryDirectory(prefix="imgcls-bench-") as folder:
        rows, absent = run(args, args.work or Path(folder))
    slug = env.machine_slug(torch.cuda.get_device_name() if args.device != "cpu" else None)
    out = args.out or Path(__file__).parent / "results" / slug / "engines.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": facts, "load_after": os.getloadavg()[0], "rows": rows, "absent": absent}
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out}")
    return 1 if absent or any(row["holds"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
