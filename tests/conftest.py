"""Fixtures that several rooms share."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import settings

from imgcls_fast.core import env


def pytest_configure(config: pytest.Config) -> None:
    """Before any test imports torch: its threads must not spin while loaders and child processes need the cores."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell starts what it puts into the background that way
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("IMGCLS_CONFIG", tempfile.mkdtemp(prefix="imgcls-config-"))  # no test makes a key of the user's
    env.calm_threads()
    settings.register_profile("no time limit", deadline=None)  # by itself an example that takes 200 ms fails: on a busy machine
    settings.load_profile("no time limit")
    for path in sorted((Path(__file__).parent / "shared").glob("*.py")):  # fixtures that the rooms share
        name = f"shared_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        config.pluginmanager.register(sys.modules[name], name)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared test images; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("IMGCLS_SHARED_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"shared data not found at {folder} (set IMGCLS_SHARED_DATA)")
    return folder


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Ends a test that waits for ever, as for the other end of a pipe."""

    def fail(*_: Any) -> None:
        raise AssertionError("waits for what never comes")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Lets a folder be one that this user may not enter (mode 700 of another user), also for root."""
    shut: list[str] = []

    def is_shut(path: Any, entering: bool) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        absolute = os.path.abspath(os.fsdecode(path))
        return any(absolute.startswith(f"{folder}/") or (entering and absolute == folder) for folder in shut)

    def refusing(original: Callable[..., Any], entering: bool) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **more: Any) -> Any:
            if is_shut(path, entering):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return original(path, *arguments, **more)

        return call

    for name in ("stat", "lstat", "mkdir", "readlink"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name), False))
    for name in ("open", "scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name), True))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not is_shut(path, True) and access(path, mode))

    def closed(folder: Path) -> Path:
        shut.append(str(folder))
        return folder

    return closed


def _make_bundle(
    folder: Path, seed: int, arch: str = "small-cnn", *, size: int = 32, color: str = "rgb", temperature: Any = 1.7,
    classes: int = 3, args: dict[str, Any] | None = None, crop_pct: float = 0.875,
    seen: np.ndarray | Literal["noise", "nothing"] = "noise", labels: Any = None, thresholds: Any = None,
) -> Any:  # fmt: skip
    import torch
    from safetensors.torch import save

    from imgcls_fast.core.bundle import write_bundle
    from imgcls_fast.core.labels import LabelSpace
    from imgcls_fast.core.pixels import CHANNELS, Pixels
    from imgcls_fast.models.build import ModelSpec, build_model

    channels = CHANNELS[color]  # type: ignore[index]
    mean, std = (0.5,) * channels, (0.25,) * channels
    torch.manual_seed(seed)
    own = args if args is not None else {"width": 8} if arch == "small-cnn" else {}
    labels = labels or LabelSpace.single([f"class {k}" for k in range(classes)])
    spec = ModelSpec(arch, num_outputs=labels.size, channels=channels, mean=mean, std=std, image_size=size, arch_args=own)
    model = build_model(spec)
    with torch.no_grad():  # untrained heads answer 1/K to everything, which would agree with anything
        for parameter in model.head_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.1))
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:  # and untrained statistics let every image fade into the same features
            norm.momentum = None
        model.train()
        if isinstance(seen, np.ndarray):
            model(torch.from_numpy(seen))
        elif seen == "noise":
            model((torch.rand(16, 1, 1, channels) * torch.rand(16, size, size, channels) * 255).to(torch.uint8))
        model.eval()
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    return write_bundle(
        folder / "bundle",
        lambda file: file.write(save(state)) and None,
        arch=model.spec.to_dict(),
        labels=labels,
        pixels=Pixels(size, crop_pct, "bilinear", color, "apply", mean, std),  # type: ignore[arg-type]
        temperature=temperature,
        provenance={},
        thresholds=thresholds,
    )


def _bundle_maker(folder: Path) -> Callable[..., Any]:
    seeds = itertools.count(1)

    def make(*arguments: Any, **options: Any) -> Any:
        seed = next(seeds)
        return _make_bundle(folder / f"model{seed}", seed, *arguments, **options)

    return make


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[..., Any]:
    """Makes the bundle of an untrained network: `bundle_of("small-cnn", size=32, args={"width": 8})`.

    `seen` is what its batch norms have the statistics of: (N, S, S, C) uint8 images, noise, or nothing (mean 0, variance 1).
    """
    return _bundle_maker(tmp_path)


@pytest.fixture(scope="session")
def shared_bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`bundle_of` for fixtures that several tests share; what it makes lasts and is not to be changed."""
    return _bundle_maker(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def pictures() -> list[np.ndarray]:
    """40 pictures, (H, W, 3) uint8 of several sizes: real handwritten digits, coloured, on soft gradients."""
    from PIL import Image
    from sklearn.datasets import load_digits

    draw = np.random.default_rng(0)
    out = []
    for k, digit in enumerate(load_digits().images[:40]):
        side = 48 + 4 * (k % 5)
        shape = (
            np.asarray(
                Image.fromarray((digit * 15).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC),
                np.float32,
            )
            / 255
        )
        ramp = np.linspace(0, 100, side)[:, None, None] * draw.random(3)
        picture = ramp + shape[:, :, None] * draw.integers(60, 155, 3) + draw.normal(0, 6, (side, side, 3))
        out.append(np.pad(picture, ((0, 8), (0, 0), (0, 0)), "edge").clip(0, 255).astype(np.uint8))
    return out


@pytest.fixture(scope="session")
def _exported_model(shared_bundle_of: Callable[..., Any], pictures: list[np.ndarray]) -> Path:
    """A folder with a bundle and its float32 ONNX file; a test gets a copy, by `exported`."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from imgcls_fast.engines.predictor import Predictor
    from imgcls_fast.engines.runtimes import open_engine
    from imgcls_fast.graphs.onnx_graph import export_onnx

    bundle = shared_bundle_of(temperature=3.0)
    folder: Path = bundle.directory.parent
    predictor = Predictor(open_engine(bundle))
    export_onnx(bundle, folder / "exports", [np.stack([predictor.preprocess(picture) for picture in pictures[:4]])])
    return folder


@pytest.fixture
def exported(_exported_model: Path, tmp_path: Path) -> tuple[Any, Path, Any]:
    """(bundle, folder of its exports, its float32 ONNX export), in a folder of the test's own."""
    from imgcls_fast.core.bundle import read_bundle
    from imgcls_fast.core.exports import find_export

    folder = Path(shutil.copytree(_exported_model, tmp_path / "exported"))
    bundle = read_bundle(folder / "bundle")
    return bundle, folder / "exports", find_export(folder / "exports", bundle, "onnx", "fp32")


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on the embedded digits, small-cnn of width 8. Not to be changed: whoever exports copies it."""
    import imgcls_fast

    folder = tmp_path_factory.mktemp("digits")
    settings = {
        "pixels.size": 32, "model.arch": "small-cnn", "model.args": {"width": 8}, "train.epochs": 1, "train.batch_size": 64,
        "train.threads": 1, "train.workers": 1, "train.baseline": False, "evaluate.bootstrap": 50, "export.verify_images": 16,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMGCLS_CACHE", str(folder / "cache"))
        patch.setenv("IMGCLS_RUNS", str(folder / "runs"))
        return imgcls_fast.train(out=str(folder / "runs" / "digits"), overrides=settings).directory


@dataclass(frozen=True)
class Outcome:
    """What became of a function in `in_bounds`: the error's code, its text, or how the process ended."""

    code: str
    text: str


@pytest.fixture
def in_bounds() -> Callable[..., Outcome]:
    """Calls a function in a child that may use so much CPU time and so much more memory; work without bound dies there.

    `in_bounds(read, path, cpu_s=20, memory_mib=512)`: code is that of an ImgclsError, "ok", the type of another exception, or "signal".
    """
    import resource

    def run(function: Callable[..., Any], *args: Any, cpu_s: int = 20, memory_mib: int = 512) -> Outcome:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            found = ("unknown", "")
            try:
                os.close(reading)
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                signal.alarm(10 * cpu_s)  # for what waits, and uses no CPU time
                resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (memory_mib << 20),) * 2)
                found = ("ok", str(function(*args)))
            except BaseException as error:  # noqa: BLE001 - it is reported to the parent
                found = (getattr(error, "code", type(error).__name__), str(error))
            finally:
                os.write(writing, json.dumps(found).encode()[:60_000])
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        return Outcome(*json.loads(answer)) if answer else Outcome("signal", "")

    return run
