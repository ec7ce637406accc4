"""Everything that only a GPU can show, in one command and under nine minutes: a table on stdout, a JSON beside it.

    python benchmarks/gpu_check.py                    # needs an NVIDIA GPU; uses IMGCLS_SHARED_DATA if it is there
    python benchmarks/gpu_check.py --rehearse         # the same steps on the CPU, to see that the script itself works

Each row is a promise of the documentation with what was measured. Exit code 1 when a promise does not hold, 4 without a
GPU. Nothing here was run on a GPU yet unless `benchmarks/results/` holds its JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from imgcls_fast.core import env
from imgcls_fast.core.manifest import Manifest
from imgcls_fast.core.pixels import Pixels
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.data.augment import Augment
from imgcls_fast.data.loader import open_loader
from imgcls_fast.data.prepare import prepare
from imgcls_fast.data.sampler import Sampler
from imgcls_fast.evaluation.benchreport import Area, read_area
from imgcls_fast.training import fit as fitting
from imgcls_fast.training.plan import look_at_machine, make_plan

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 520
_EPOCHS = 6  # of the digits: enough for 0.9, not for the 0.99 of a whole run
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Check:
    """Collects rows (name, value, promise, holds) and runs parts until the time budget is spent."""

    def __init__(self, rehearse: bool) -> None:
        self.device = "cpu" if rehearse else "cuda"
        self.loader = "dali-cpu" if rehearse else "dali-gpu"
        self.small = rehearse
        self.rows: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {}
        self.begin = time.monotonic()

    def row(self, name: str, value: Any, promise: str, holds: bool | None) -> None:
        self.rows.append({"name": name, "value": value, "promise": promise, "holds": holds})
        mark = {True: "ok  ", False: "FAIL", None: "    "}[holds]
        print(f"{mark} {name:<48} {value!s:<44} {promise}", flush=True)

    def part(self, work: Callable[[Check], None]) -> None:
        if time.monotonic() - self.begin > BUDGET_S:
            self.row(work.__name__, "not run: the time budget was spent", "", None)
            return
        try:
            work(self)
        except (RuntimeError, ValueError, OSError, AssertionError, subprocess.TimeoutExpired) as error:
            self.row(work.__name__, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}", "runs", False)


def photos() -> Path:
    """Real JPEGs in class folders: the shared data, else pictures made here."""
    shared = Path(os.environ.get("IMGCLS_SHARED_DATA", "../shared/data")) / "photos"
    if shared.is_dir():
        return shared
    folder = Path(tempfile.mkdtemp(prefix="imgcls-gpu-check-"))
    rng = np.random.default_rng(0)
    for k in range(640):
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        small[..., k % 2] //= 3
        picture = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
        place = folder / ("red" if k % 2 else "green")
        place.mkdir(exist_ok=True)
        picture.save(place / f"{k:04}.jpg", quality=90, subsampling=k % 3)
    return folder


def manifest_of(folder: Path) -> Manifest:
    config = build_config({"data.source": str(folder)})
    return prepare(config.data, "apply", Path(tempfile.gettempdir()) / "imgcls-gpu-check").manifest


def batches(
    manifest: Manifest, loader: str, device: str, *, size: int = 224, augment: Augment | None = None, start: int = 0
) -> Iterator[Any]:
    pixels = Pixels(size, 0.875, "bilinear", "rgb", "apply", *IMAGENET)
    sampler = Sampler(manifest, manifest.rows("train"), pixels, 64, seed=3, augment=augment)
    source = open_loader(sampler, loader, workers=min(8, env.usable_cpus()), device=device, once=True)  # type: ignore[arg-type]
    try:
        yield from source.epoch(0, start)
    finally:
        source.close()


def pixels_agree(check: Check) -> None:
    """Evaluation pixels of the GPU decoder against Pillow's; training crops against the CPU decoder's."""
    manifest = manifest_of(photos())
    for name, augment, promise in (
        ("evaluation", None, (2, 0.25)),
        ("training crops", Augment((0.08, 1.0)), (None, 1.0)),
    ):
        worst, means, rows_equal = 0, [], True
        pairs = zip(
            batches(manifest, check.loader, check.device, augment=augment),
            batches(manifest, "torch", "cpu", augment=augment),
            strict=True,
        )
        for k, (ours, reference) in enumerate(pairs):
            difference = (ours.pixels.cpu().int() - reference.pixels.int()).abs()
            worst, rows_equal = max(worst, int(difference.max())), rows_equal and torch.equal(ours.rows, reference.rows)
            means.append(float(difference.float().mean()))
            if k == 4:
                break
        mean = statistics.mean(means)
        holds = rows_equal and mean <= promise[1] and (promise[0] is None or worst <= promise[0])
        check.row(
            f"{check.loader} against Pillow, {name}",
            f"max {worst}, mean {mean:.3f}, rows equal {rows_equal}",
            f"max {promise[0]}, mean {promise[1]}",
            holds,
        )


def restart_is_equal(check: Check) -> None:
    """A loader opened in the middle of an epoch delivers the same pixels."""
    manifest, augment = manifest_of(photos()), Augment((0.08, 1.0), brightness=0.2, contrast=0.2, saturation=0.2)
    whole = [b.pixels.cpu() for b in batches(manifest, check.loader, check.device, augment=augment)]
    rest = [b.pixels.cpu() for b in batches(manifest, check.loader, check.device, augment=augment, start=4)]
    equal = len(rest) == len(whole) - 4 and all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    check.row("loader restarted at batch 4", f"pixels equal: {equal}", "bitwise", equal)


def loader_speed(check: Check) -> None:
    """Images per second of each loader, interleaved."""
    manifest, augment = manifest_of(photos()), Augment((0.08, 1.0))
    rates: dict[str, list[float]] = {}
    for _ in range(2 if check.small else 5):
        for name in (check.loader, "dali-cpu", "torch"):
            begin = time.perf_counter()
            count = sum(
                len(b)
                for b in batches(manifest, name, check.device if name == check.loader else "cpu", augment=augment)
            )
            if check.device == "cuda":
                torch.cuda.synchronize()
            rates.setdefault(name, []).append(count / (time.perf_counter() - begin))
    for name, found in rates.items():
        check.row(
            f"loader {name}, 224 pixels, opening included",
            f"{statistics.median(found):,.0f} img/s [{min(found):,.0f}, {max(found):,.0f}]",
            "",
            None,
        )


def make_fit(check: Check, folder: Path, **settings: Any) -> fitting.Fit:
    overrides = {
        "train.epochs": _EPOCHS, "train.device": check.device, "train.baseline": False, "model.arch": "small-cnn", "train.log_every": 1e9,
        "optim.lr": 0.002, **settings,
    }  # fmt: skip
    config = build_config({**overrides})
    prepared = prepare(config.data, config.pixels.exif, env.cache_dir())
    plan = make_plan(config, prepared.manifest, look_at_machine())
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return fitting.Fit(plan, prepared.manifest, run, lambda event: None)


def training_works(check: Check) -> None:
    """Digits in every precision, with and without torch.compile."""
    plans = (
        [("fp32", False), ("bf16", False)]
        if check.small
        else [(p, c) for p in ("fp32", "bf16", "fp16") for c in (False, True)]
    )
    for precision, compiled in plans:
        with tempfile.TemporaryDirectory() as folder:
            fit = make_fit(
                check,
                Path(folder) / "run",
                **{"train.precision": precision, "train.compile": compiled, "train.loader": check.loader},
            )
            begin = time.monotonic()
            fit.run()
            last = fit.progress.history[-1]
            text = f"val accuracy {last['val_accuracy']:.3f}, {time.monotonic() - begin:.0f} s, {last['images_per_s']:,.0f} img/s"
            check.row(
                f"digits, {_EPOCHS} epochs, {precision}{', compiled' if compiled else ''}",
                text,
                "accuracy >= 0.9",
                last["val_accuracy"] >= 0.9,
            )


def no_host_sync(check: Check) -> None:
    """Optimizer steps between two looks at the loss never wait for the GPU."""
    if check.device == "cpu":
        check.row("host syncs between log points", "needs a GPU", "none", None)
        return
    with tempfile.TemporaryDirectory() as folder:
        fit = make_fit(
            check,
            Path(folder) / "run",
            **{"train.precision": "bf16", "train.compile": False, "train.loader": "dali-cpu"},
        )
        fit.model.train()
        source = fit.train_loader.epoch(0)
        for batch in (next(source) for _ in range(3)):
            fit._step(batch)
        ready = [next(source) for _ in range(4)]
        pinned = [
            replace(b, pixels=b.pixels.pin_memory(), targets=b.targets.pin_memory(), weight=b.weight.pin_memory())
            for b in ready
        ]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in pinned:
                fit._step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check.row("host syncs between log points", "none in 4 steps", "none", True)


def step_against_bare_loop(check: Check) -> None:
    """Our optimizer step against the shortest hand-written loop with the same model, precision and optimizer."""
    from torchvision.models import resnet18, resnet50

    size, count, rounds = (64, 8, 3) if check.small else (224, 256, 12)
    arch, build = ("torchvision/resnet18", resnet18) if check.small else ("torchvision/resnet50", resnet50)
    with tempfile.TemporaryDirectory() as folder:
        fit = make_fit(check, Path(folder) / "run", **{
            "model.arch": arch, "model.init": "scratch", "pixels.size": size, "train.batch_size": count, "optim.ema": 0.0,
            "optim.opt": "sgd", "optim.lr": 0.01, "train.precision": "bf16", "train.loader": "dali-cpu", "train.compile": not check.small,
        })  # fmt: skip
        pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=check.device)
        targets = torch.eye(10)[torch.arange(count) % 10].to(check.device)
        batch = type(
            "B",
            (),
            {
                "pixels": pixels,
                "targets": targets.cpu(),
                "weight": torch.ones(count),
                "rows": torch.arange(count),
                "__len__": lambda s: count,
            },
        )()
        bare = build(num_classes=10).to(check.device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(
            bare.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=check.device == "cuda"
        )
        run = bare if check.small else torch.compile(bare)

        def by_hand() -> None:
            x = pixels.permute(0, 3, 1, 2).float().div_(255)
            with torch.autocast(check.device, torch.bfloat16):
                logits = run(x)
            torch.nn.functional.cross_entropy(logits.float(), targets, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        contenders = {"ours": lambda: fit._step(batch), "by hand": by_hand}  # type: ignore[arg-type]
        fit.model.train()
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for k in range(rounds + 2):
            for name in sorted(contenders, reverse=bool(k % 2)):
                _sync(check)
                begin = time.perf_counter()
                for _ in range(1 if check.small else 10):
                    contenders[name]()
                _sync(check)
                if k >= 2:  # the first rounds compile and warm up
                    times[name].append((time.perf_counter() - begin) / (1 if check.small else 10))
        ratios = [a / b for a, b in zip(times["ours"], times["by hand"], strict=True)]
        rate = count / statistics.median(times["ours"])
        text = f"ratio {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}], ours {rate:,.0f} img/s"
        check.row(
            f"{arch.split('/')[1]} step, batch {count}, bf16",
            text,
            "time <= 1.05x by hand",
            None if check.small else statistics.median(ratios) <= 1.05,
        )


def kernels_are_right(check: Check) -> None:
    """The tests of the kernels that need a GPU (or, rehearsing, a few on the CPU)."""
    if importlib.util.find_spec("pytest") is None:
        check.row("kernel tests", "pytest is not installed", "pass", None)
        return
    chosen = ["-m", "gpu"] if check.device == "cuda" else ["-k", "opcheck"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "ops"), *chosen]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, cwd=ROOT)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-160:]])[-1]
    check.row("kernel tests", last.strip("= ")[:120], "pass", done.returncode == 0)
    if done.returncode:
        print(done.stdout[-3000:])


def sanitizer(check: Check) -> None:
    """compute-sanitizer over every kernel on small shapes."""
    tool = shutil.which("compute-sanitizer")
    if check.device == "cpu" or tool is None:
        check.row("compute-sanitizer", "needs a GPU" if tool else "compute-sanitizer is not on PATH", "no errors", None)
        return
    script = str(Path(__file__).parent / "gpu_kernels.py")
    for name in ("memcheck", "racecheck", "synccheck", "initcheck"):
        words = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, script]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        # initcheck also sees torch's own reads; only the others are promises
        holds = None if name == "initcheck" else done.returncode == 0
        check.row(
            f"compute-sanitizer {name}", (summary or [done.stdout[-120:]])[-1].strip("= ")[:120], "no errors", holds
        )


def kernel_speed(check: Check) -> None:
    """bench_ops.py: each kernel beside PyTorch's best, in two fresh processes; its results are kept whole."""
    with tempfile.TemporaryDirectory(prefix="imgcls-gpu-check-") as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / "bench_ops.py"),
                   "--device", check.device, "--processes", "2", "--results", folder, *(["--small"] if check.small else [])]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        found = list(Path(folder).glob("*/ops.json"))
        if not found:
            check.row("kernel speed", (done.stdout + done.stderr)[-200:], "bench_ops.py runs", False)
            return
        area = read_area(found[0])
    check.details["ops"] = area.model_dump(mode="json")
    for row in area.rows:
        text = f"{row.ratio:.3f}x {row.rival} [{row.low:.3f}, {row.high:.3f}]"
        check.row(row.case, text, f"at most {row.goal:.3f}" if row.goal else "", row.holds)
    if check.device == "cuda":
        window_goals(check, area)


def window_goals(check: Check, area: Area) -> None:
    """Geometric means over Swin-T's stages against the fastest rival of each, as the goals are stated."""
    slowest: dict[str, float] = {}
    for row in area.rows:
        if row.case.startswith("Swin-T"):
            slowest[row.case] = max(row.ratio, slowest.get(row.case, 0.0))
    for shifted, what, goal in ((False, "forward", 1 / 1.5), (True, "forward", 0.5), (None, "backward", 0.5)):
        chosen = [case for case in slowest if case.endswith(what) and shifted in (None, "shifted" in case)]
        if not chosen:
            continue
        mean = statistics.geometric_mean(slowest[case] for case in chosen)
        share = statistics.geometric_mean(area.contender(case, "kernel").limit_share or 1e-9 for case in chosen)
        kind = {None: "", True: " shifted", False: " unshifted"}[shifted]
        text = f"{mean:.3f}x the best rival, {share:.0%} of the floor"
        check.row(
            f"Swin-T stages{kind}, {what}", text, f"at most {goal:.3f}, at least 80%", mean <= goal and share >= 0.8
        )


def engines_in_half(check: Check) -> None:
    """One bundle in FP16 through eager PyTorch, torch.compile with CUDA graphs and AOTInductor, at batch 1 and the best batch.

    Rehearsing, it is ViT-T in FP32. TensorRT has its own rows where it is installed.
    """
    import bench_engines

    from imgcls_fast.engines.runtimes import open_engine
    from imgcls_fast.engines.timing import best_batch
    from imgcls_fast.exporting.programs import write_aoti

    precision, model = ("fp32", "vit-t") if check.small else ("fp16", "resnet50")
    with tempfile.TemporaryDirectory(prefix="imgcls-gpu-check-") as folder:
        bundle = bench_engines.write_model(Path(folder), model, 224)
        exports = bundle.directory.parent / "exports"
        x, _ = bench_engines.digits(0, 8 if check.small else 64, 224)
        write_aoti(bundle, exports, [x[:8]], precision=precision, device=check.device)
        truth = open_engine(bundle, "torch", device=check.device)
        expected, rates = truth.scores(x), {}
        found: dict[str, Any] = {}
        for runtime in ("torch", "compile", "aoti"):
            engine = open_engine(bundle, runtime, device=check.device, exports=exports, precision=precision)
            worst = float(np.abs(engine.scores(x) - expected).max())
            sweep = best_batch(
                engine, (1, 8) if check.small else None, budget_s=12, duration_s=0.5 if check.small else 1.0
            )
            one, best = sweep.timings[0], sweep.best
            rates[runtime], found[runtime] = one.end_to_end.p50_ms, [t.to_dict() for t in sweep.timings]
            text = f"b1 p50 {one.end_to_end.p50_ms:.3f} ms, best b{best.batch} {best.images_per_s:,.0f} img/s, {engine.precision}"
            check.row(f"{model} {precision}, {runtime}", text, "scores within 0.05", worst <= 0.05)
            engine.close()
        check.details["engines"] = found
        for runtime in ("compile", "aoti"):
            check.row(
                f"{model} {precision}, {runtime} against eager", f"{rates[runtime] / rates['torch']:.3f}x", "", None
            )


def tensorrt(check: Check) -> None:
    """The tests that build and run real engines, where TensorRT is installed."""
    from imgcls_fast.exporting.trt_engine import trt_missing

    if missing := trt_missing():
        check.row("TensorRT", missing, "tests pass", None)
        return
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        str(ROOT / "tests" / "exporting"),
    ]
    done = subprocess.run(
        [*words, str(ROOT / "tests" / "engines")], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-160:]])[-1]
    check.row("TensorRT", last.strip("= ")[:120], "tests pass", done.returncode == 0)


def _sync(check: Check) -> None:
    if check.device == "cuda":
        torch.cuda.synchronize()


PARTS = (
    kernels_are_right, sanitizer, kernel_speed, pixels_agree, restart_is_equal, training_works, no_host_sync, loader_speed,
    step_against_bare_loop, engines_in_half, tensorrt,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run the same steps on the CPU")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<gpu>/gpu_check.json)")
    parser.add_argument("--only", nargs="+", choices=[work.__name__ for work in PARTS], help="some of the parts")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("no usable GPU: nothing was checked (try --rehearse)", file=sys.stderr)
        return 4
    check = Check(options.rehearse)
    machine = "rehearsal" if options.rehearse else env.machine_slug(torch.cuda.get_device_name())
    for work in PARTS:
        if not options.only or work.__name__ in options.only:
            check.part(work)
    facts = {
        "machine": machine,
        **env.machine_facts(),
        "seconds": round(time.monotonic() - check.begin, 1),
        "rows": check.rows,
        **check.details,
    }
    out = options.out or (None if options.rehearse else Path(__file__).parent / "results" / machine / "gpu_check.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=2)
        print(f"written: {out}")
    failed = [row["name"] for row in check.rows if row["holds"] is False]
    print(f"{len(check.rows)} rows, {len(failed)} failed, {facts['seconds']} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
