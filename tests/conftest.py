"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from imgcls_fast.core import env


def pytest_configure(config: pytest.Config) -> None:
    """Before any test imports torch: its threads must not spin while loaders and child processes need the cores."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell starts what it puts into the background that way
        signal.signal(signal.SIGINT, signal.default_int_handler)
    env.calm_threads()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared test images; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("IMGCLS_SHARED_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"shared data not found at {folder} (set IMGCLS_SHARED_DATA)")
    return folder


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[..., Any]:
    """Makes the bundle of an untrained network: `bundle_of("small-cnn", size=32, args={"width": 8})`.

    `seen` is what its batch norms have the statistics of: (N, S, S, C) uint8 images, noise, or nothing (mean 0, variance 1).
    """
    made: list[int] = []

    def make(
        arch: str = "small-cnn", *, size: int = 32, color: str = "rgb", temperature: float = 1.7, classes: int = 3,
        args: dict[str, Any] | None = None, crop_pct: float = 0.875, seen: np.ndarray | Literal["noise", "nothing"] = "noise",
    ) -> Any:  # fmt: skip
        import torch
        from safetensors.torch import save

        from imgcls_fast.core.bundle import write_bundle
        from imgcls_fast.core.manifest import LabelSpace
        from imgcls_fast.core.pixels import CHANNELS, Pixels
        from imgcls_fast.models.build import ModelSpec, build_model

        made.append(1)
        channels = CHANNELS[color]  # type: ignore[index]
        mean, std = (0.5,) * channels, (0.25,) * channels
        torch.manual_seed(len(made))
        own = args if args is not None else {"width": 8} if arch == "small-cnn" else {}
        spec = ModelSpec(
            arch, num_outputs=classes, channels=channels, mean=mean, std=std, image_size=size, arch_args=own
        )
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
            tmp_path / f"model{len(made)}" / "bundle",
            lambda file: file.write(save(state)) and None,
            arch=model.spec.to_dict(),
            labels=LabelSpace.single([f"class {k}" for k in range(classes)]),
            pixels=Pixels(size, crop_pct, "bilinear", color, "apply", mean, std),  # type: ignore[arg-type]
            temperature=temperature,
            provenance={},
        )

    return make


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
