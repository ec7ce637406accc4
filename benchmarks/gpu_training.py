"""The parts of `gpu_check.py` about whole networks: training steps beside a bare loop, half precision, digits, host syncs."""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_rows import Journal, card, short, sync

from imgcls_fast.core import env
from imgcls_fast.core.batch import Batch
from imgcls_fast.core.run import Run
from imgcls_fast.core.settings import build_config
from imgcls_fast.data.prepare import prepare
from imgcls_fast.training.fit import Fit
from imgcls_fast.training.plan import look_at_machine, make_plan

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_fit(journal: Journal, folder: Path, **settings: Any) -> Fit:
    """A run as `train` begins it, up to its first step; of the digits, from scratch, without DALI."""
    config = build_config({
        "train.epochs": 1, "train.device": journal.device, "train.baseline": False, "train.log_every": 1e9, "train.loader": "torch",
        "train.workers": 0, "model.init": "scratch", "optim.ema": 0.0, **settings,
    })  # fmt: skip
    prepared = prepare(config, env.cache_dir())
    plan = make_plan(config, prepared.manifest, look_at_machine())
    folder.mkdir(parents=True, exist_ok=True)
    fit = Fit(plan, prepared.manifest, Run(folder), lambda event: None)
    fit.step.model.train()
    return fit


def synthetic(size: int, count: int, device: str) -> Batch:
    """Random pixels on the device; targets and weights in pinned memory of the host, where a loader leaves them."""
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=device)
    arrays = torch.eye(CLASSES)[torch.arange(count) % CLASSES], torch.ones(count), torch.arange(count)
    return Batch(pixels, *(array.pin_memory() if device == "cuda" else array for array in arrays))


def timed(
    journal: Journal, contenders: dict[str, Callable[[], Any]], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of a step, in rounds that begin with another contender every time."""
    names, found = list(contenders), {name: [] for name in contenders}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            sync(journal.device)
            began = time.perf_counter()
            for _ in range(steps):
                contenders[name]()
            sync(journal.device)
            found[name].append((time.perf_counter() - began) / steps)
    return found


def told(seconds: list[float], count: int) -> str:
    middle = statistics.median(seconds)
    return f"{1e3 * middle:.2f} ms [{1e3 * min(seconds):.2f}, {1e3 * max(seconds):.2f}], {count / middle:,.0f} img/s"


def resnet50_step(journal: Journal) -> None:
    """Our optimizer step against the shortest loop by hand, both compiled, with cudnn.benchmark off and on."""
    from torchvision.models import resnet18, resnet50

    size, count = (64, 8) if journal.small else (224, 256)
    arch, build = ("torchvision/resnet18", resnet18) if journal.small else ("torchvision/resnet50", resnet50)
    device = journal.device
    with tempfile.TemporaryDirectory() as folder:
        fit = make_fit(journal, Path(folder) / "run", **{
            "model.arch": arch, "pixels.size": size, "train.batch_size": count, "train.micro_batch": count, "optim.opt": "sgd",
            "optim.lr": 0.01, "train.precision": "bf16", "train.compile": not journal.small,
        })  # fmt: skip
        batch = synthetic(size, count, device)
        targets = batch.targets.to(device)
        bare = build(num_classes=CLASSES).to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(bare.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=device == "cuda")
        run = bare if journal.small else torch.compile(bare)

        def by_hand() -> None:
            x = batch.pixels.permute(0, 3, 1, 2).float().div_(255)
            with torch.autocast(device, torch.bfloat16):
                logits = run(x)
            torch.nn.functional.cross_entropy(logits.float(), targets, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        contenders = {"by hand": by_hand, "ours": lambda: fit.step.take(batch, 0)}
        for benchmark in (False, True):
            torch.backends.cudnn.benchmark = benchmark
            for name, call in contenders.items():
                began = time.perf_counter()
                for _ in range(1 if journal.small or journal.warm else 5):
                    call()
                sync(device)
                journal.write(f"resnet50, first steps {name}", round(time.perf_counter() - began, 1))
            if journal.warm:
                return
            found = timed(journal, contenders, 3 if journal.small else 4, 1 if journal.small else 5)
            ratio = statistics.median(a / b for a, b in zip(found["ours"], found["by hand"], strict=True))
            holds = None if journal.small else ratio <= 1.05
            title = f"{arch.split('/')[1]} step, batch {count}, bf16, cudnn.benchmark {'on' if benchmark else 'off'}"
            for name, seconds in found.items():
                journal.row(f"{title}, {name}", told(seconds, count), seconds=seconds, card=card())
            journal.row(f"{title}, ratio", f"{ratio:.3f}", "time <= 1.05x by hand", holds)
        if not journal.small:
            journal.row("memory of both", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def swin_step(journal: Journal) -> None:
    """A training step of Swin-T with our kernels on and off, compiled and eager."""
    size, count = (224, 1) if journal.small else (224, 128)
    for compiled in (True, False) if not journal.small else (False,):
        with tempfile.TemporaryDirectory() as folder:
            contenders: dict[str, Callable[[], Any]] = {}
            batch = synthetic(size, count, journal.device)
            for kernels in ("on", "off"):
                torch.manual_seed(0)
                fit = make_fit(journal, Path(folder) / kernels, **{
                    "model.arch": "timm/swin_tiny_patch4_window7_224", "model.kernels": kernels, "pixels.size": size,
                    "train.batch_size": count, "train.micro_batch": count, "optim.opt": "adamw", "optim.lr": 1e-4,
                    "train.precision": "fp32" if journal.small else "bf16", "train.compile": compiled,
                })  # fmt: skip
                try:
                    for _ in range(1 if journal.small or journal.warm else 4):
                        fit.step.take(batch, 0)
                    loss = fit.step.loss
                    contenders[kernels] = partial(fit.step.take, batch, 0)
                    journal.write(f"swin_t, kernels {kernels}", f"mean loss of the first steps {loss:.4f}", loss=loss)
                except (RuntimeError, ValueError) as error:
                    journal.row(f"swin_t, kernels {kernels}", short(error), "runs", False)
            if journal.warm:
                return
            title = f"swin_t step, batch {count}, bf16, {'compiled' if compiled else 'eager'}"
            found = timed(journal, contenders, 1 if journal.small else 4, 1 if journal.small else 5)
            for kernels, seconds in found.items():
                journal.row(f"{title}, kernels {kernels}", told(seconds, count), seconds=seconds, card=card())
            if len(found) == 2:
                ratio = statistics.median(a / b for a, b in zip(found["on"], found["off"], strict=True))
                journal.row(f"{title}, on against off", f"{ratio:.3f}x")
        if journal.device == "cuda":
            torch.cuda.empty_cache()


def half_inference(journal: Journal) -> None:
    """One bundle in FP16 through eager PyTorch and torch.compile with CUDA graphs; rehearsing, a small one in FP32."""
    from imgcls_fast.engines.runtimes import open_engine

    precision, arch, size = ("fp32", "small-cnn", 32) if journal.small else ("fp16", "torchvision/resnet50", 224)
    with tempfile.TemporaryDirectory(prefix="imgcls-gpu-check-") as folder:
        bundle = write_bundle_of(Path(folder), arch, size)
        x = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
        truth = open_engine(bundle, "torch", device=journal.device, precision="fp32")
        expected = truth.scores(x)
        truth.close()
        rates: dict[tuple[str, int], float] = {}
        for runtime in ("compile",) if journal.warm else ("torch", "compile"):
            engine = open_engine(bundle, runtime, device=journal.device, precision=precision)
            for batch in (1, 8, 64):
                part = x[:batch]
                for _ in range(3):
                    found = engine.scores(part)
                if journal.warm:
                    continue
                worst = float(np.abs(found - expected[:batch]).max())
                spent = []
                until = time.perf_counter() + (0.2 if journal.small else 1.5)
                while time.perf_counter() < until and len(spent) < 300:
                    began = time.perf_counter()
                    engine.scores(part)
                    spent.append(time.perf_counter() - began)
                rates[runtime, batch] = statistics.median(spent)
                text = f"p50 {told(spent, batch)}, {engine.precision}"
                journal.row(
                    f"{arch} {precision}, {runtime}, batch {batch}",
                    text,
                    "scores within 0.05",
                    worst <= 0.05,
                    worst=worst,
                )
            engine.close()
        for batch in (1, 8, 64):
            if ("compile", batch) in rates and ("torch", batch) in rates:
                ratio = rates["compile", batch] / rates["torch", batch]
                journal.row(f"{arch} {precision}, compile against torch, batch {batch}", f"{ratio:.3f}x")


def write_bundle_of(folder: Path, arch: str, size: int) -> Any:
    """The bundle of an untrained network whose batch norms have seen noise."""
    from safetensors.torch import save

    from imgcls_fast.core.bundle import write_bundle
    from imgcls_fast.core.labels import LabelSpace
    from imgcls_fast.core.pixels import Pixels
    from imgcls_fast.models.build import ModelSpec, build_model

    torch.manual_seed(0)
    network = build_model(ModelSpec(arch, num_outputs=CLASSES, mean=MEAN, std=STD, image_size=size))
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            if name.endswith("bn3"):  # in random deep networks any rounding error grows from block to block
                torch.nn.init.constant_(module.weight, 0.2)
    with torch.no_grad():
        network.train()
        network(torch.randint(0, 256, (16, size, size, 3), dtype=torch.uint8))
    state = {name: value.contiguous() for name, value in network.eval().state_dict().items()}
    return write_bundle(
        folder / "bundle", lambda file: file.write(save(state)) and None, arch=network.spec.to_dict(),
        labels=LabelSpace.single([str(k) for k in range(CLASSES)]), pixels=Pixels(size, 0.875, "bilinear", "rgb", "apply", MEAN, STD),
        temperature=1.0, provenance={},
    )  # fmt: skip


def digits(journal: Journal) -> None:
    """The command line on the digits, in bf16 and fp16 at the same time, compiled, with the torch loader."""
    running = {}
    for precision in ("fp32",) if journal.small else ("bf16", "fp16"):
        folder = tempfile.mkdtemp(prefix=f"imgcls-gpu-check-{precision}-")
        words = [
            sys.executable, "-m", "imgcls_fast", "train", "-m", "small-cnn", "-e", "1" if journal.small else "6", "--loader", "torch",
            "--workers", "2", "--device", journal.device, "--precision", precision, "--no-compile" if journal.small else "--compile",
            "--set", "train.baseline=false", "-o", f"{folder}/run", "--json",
        ]  # fmt: skip
        out = Path(folder) / "out.json"
        with open(out, "w", encoding="utf-8") as file:
            running[precision] = (subprocess.Popen(words, stdout=file, cwd=folder), out, time.monotonic())
    for precision, (process, out, began) in running.items():
        try:
            code: int | None = process.wait(max(3.0, journal.left() - 3))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        history = epochs_of(out.parent / "run")
        best = max((float(row["val_accuracy"]) for row in history), default=0.0)
        rate = f", {float(history[-1]['images_per_s']):,.0f} img/s" if history else ""
        text = f"val accuracy {best:.3f} after {len(history)} epochs, {time.monotonic() - began:.0f} s, ended with {code}{rate}"
        holds = None if journal.small or code is None else best >= 0.9 and code == 0
        journal.row(f"digits, {precision}, torch loader", text, "accuracy >= 0.9", holds, history=history)


def epochs_of(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.csv."""
    path = run / "metrics.csv"
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def host_syncs(journal: Journal) -> None:
    """Steps with a real loader between two looks at the loss never wait for the GPU."""
    source = next((p for p in (ROOT / ".carry" / "photos",) if p.is_dir()), None)
    settings: dict[str, Any] = {"data.source": str(source)} if source else {}
    with tempfile.TemporaryDirectory() as folder:
        for compiled in (False,) if journal.small else (False, True):
            name = (
                f"host syncs, {'photos' if source else 'digits'}, torch loader, {'compiled' if compiled else 'eager'}"
            )
            fit = make_fit(journal, Path(folder) / f"run{compiled}", **settings, **{
                "model.arch": "small-cnn", "pixels.size": 64, "train.batch_size": 16,
                "train.precision": "fp32" if journal.small else "bf16", "train.compile": compiled, "train.workers": 2, "optim.ema": 0.999,
            })  # fmt: skip
            batches: Iterator[Batch] = fit.loaders.train.epoch(0)
            try:
                for _ in range(3):
                    fit.step.take(next(batches), 0)
                if journal.small:
                    journal.row(name, "needs a GPU", "none", None)
                    continue
                torch.cuda.set_sync_debug_mode("error")
                try:
                    for _ in range(4):
                        batch = next(batches)
                        pinned = [t.is_pinned() for t in (batch.pixels, batch.targets, batch.weight)]
                        fit.step.take(batch, 0)
                    journal.row(name, f"none in 4 steps, pinned {all(pinned)}", "none", all(pinned))
                except RuntimeError as error:
                    import traceback

                    where = traceback.extract_tb(error.__traceback__)
                    ours = [
                        f"{Path(frame.filename).name}:{frame.lineno}"
                        for frame in where
                        if "imgcls_fast" in frame.filename
                    ]
                    journal.row(name, f"{short(error, 60)} at {', '.join(ours[-2:])}", "none", False)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            finally:
                fit.loaders.close()
