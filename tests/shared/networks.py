"""Networks and graphs that several tests of INT8 share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Trained:
    """A network of ten convolutions that reads handwritten digits, as float32 ONNX files.

    Args:
        plain: as trained.
        planted: one channel x1000 before its ReLU and /1000 behind it: float32 answers alike, INT8 cannot.
        overflowing: the same with 1e6, which FP16 cannot hold either.
        layer: name of the layer behind the planted channel.
        calibration: (128, 32, 32, 3) uint8 training images.
        images, labels: (450, 32, 32, 3) uint8 images that training did not see, and their classes.
    """

    plain: Path
    planted: Path
    overflowing: Path
    layer: str
    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray

    def accuracy(self, path: Path) -> float:
        """Share of the unseen images that a file gets right."""
        return float((self.scores(path).argmax(1) == self.labels).mean())

    def scores(self, path: Path) -> np.ndarray:
        """(450, 10) scores of the unseen images."""
        from imgcls_fast.graphs.half import run_in_steps, session

        return np.concatenate([found[0] for found in run_in_steps(session(path), self.images)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """See `Trained`; five seconds of training."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    widths, strides, place = [3, 16, 16, 32, 32, 32, 32, 32, 32, 32, 32], [1, 1, 2, 1, 1, 2, 1, 1, 1, 1], 4
    digits = load_digits()
    x = np.repeat(np.kron(digits.images * 15, np.ones((4, 4))).astype(np.uint8)[..., None], 3, 3)
    unseen = np.arange(len(x)) % 4 == 0
    rows = np.flatnonzero(~unseen)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            m
            for i, o, s in zip(widths, widths[1:], strides, strict=False)
            for m in (nn.Conv2d(i, o, 3, s, 1), nn.ReLU())
        ]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]
    images, classes = torch.from_numpy(x), torch.from_numpy(digits.target)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # too small for two, which take three times as long where another process has a core
    for epoch in range(6):
        for batch in np.array_split(np.random.default_rng(epoch).permutation(rows), len(rows) // 32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                net(images[batch].float().permute(0, 3, 1, 2) / 64 - 2), classes[batch]
            ).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("trained")
    plain = write_onnx(net, folder / "plain.onnx")
    planted = []
    for factor in (1e3, 1e6):
        before, behind = net[2 * place], net[2 * place + 2]
        with torch.no_grad():
            channel = int(before.weight.abs().sum((1, 2, 3)).argmax())
            for tensor, by in (
                (before.weight[channel], factor),
                (before.bias[channel], factor),
                (behind.weight[:, channel], 1 / factor),
            ):
                tensor *= by
            planted.append(write_onnx(net, folder / f"planted{factor:.0e}.onnx"))
            for tensor, by in (
                (before.weight[channel], 1 / factor),
                (before.bias[channel], 1 / factor),
                (behind.weight[:, channel], factor),
            ):
                tensor *= by
    name = f"node_conv2d_{place + 1}"
    return Trained(plain, *planted, name, x[rows[:128]], x[unseen], digits.target[unseen])  # type: ignore[arg-type]


def write_onnx(net: Any, path: Path, *, opset: int = 20, batch: int | None = None, size: int = 32) -> Path:
    """A network on normalised pixels as `export` would write it: uint8 NHWC in, probabilities out."""
    import onnx
    import torch
    from torch import nn

    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, pixels: Any) -> Any:
            return self.net(pixels.float().permute(0, 3, 1, 2) / 64 - 2).softmax(1)

    example = torch.zeros(batch or 2, size, size, 3, dtype=torch.uint8)
    dynamic = None if batch else {"pixels": {0: torch.export.Dim("batch", min=1, max=65536)}}
    torch.onnx.export(
        Scorer().eval(), (example,), str(path), dynamo=True, opset_version=opset, input_names=["pixels"], output_names=["scores"],
        dynamic_shapes=dynamic, external_data=False, verbose=False,
    )  # fmt: skip
    model = onnx.load(str(path))
    cast = next(node for node in model.graph.node if node.op_type == "Cast" and "pixels" in node.input)
    for node in model.graph.node:  # the exporter asks the bytes for their shape
        if node.op_type == "Shape" and "pixels" in node.input:
            node.input[0] = cast.output[0]
            model.graph.node.remove(cast)
            model.graph.node.insert(0, cast)
            break
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="session")
def onnx_of() -> Callable[..., Path]:
    """`write_onnx`, for tests."""
    return write_onnx
