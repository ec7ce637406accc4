"""Twelve architectures leave through ONNX with the logits that torch gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imgcls_fast.engines.torch_runtime import scorer_of
from imgcls_fast.graphs.onnx_graph import write_graph

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

#     name, side, further arguments
ARCHITECTURES = [
    ("torchvision/resnet18", 64, {}),
    ("torchvision/resnet50", 64, {}),
    ("timm/convnext_tiny", 64, {}),
    ("timm/efficientnet_b0", 128, {}),
    ("torchvision/mobilenet_v3_small", 64, {}),
    ("torchvision/regnet_y_400mf", 64, {}),
    ("torchvision/densenet121", 64, {}),
    ("timm/vit_small_patch16_224", 64, {}),
    ("timm/deit_tiny_patch16_224", 64, {}),
    ("timm/swin_tiny_patch4_window7_224", 112, {}),
    ("timm/swinv2_tiny_window8_256", 128, {}),
    ("timm/maxvit_tiny_tf_224", 224, {"depths": (1, 1, 1, 1)}),
]
IMAGES = 64
GATES = {"fp32": 1e-5, "fp16": 5e-3}  # relative L2 of logits, without what all images share
# Untrained, these two send every image to the same logits unless their batch norms have seen the images; with such
# norms each of their fifty layers adds its rounding in full, and PyTorch itself is 6e-3 off in float16.
FADING = ("timm/efficientnet_b0", "torchvision/mobilenet_v3_small")
FEW = 16  # images for which these two are also computed by PyTorch in float16, which takes a CPU three seconds an image


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> list[Image.Image]:
    files = sorted((shared_data / "photos" / "val").glob("*/*.jpg"))[:IMAGES]
    assert len(files) == IMAGES
    return [Image.open(file).convert("RGB") for file in files]


def logits_of(scorer: torch.nn.Module, parts: list[np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([scorer(torch.from_numpy(part)).numpy() for part in parts]).astype(np.float64)


def error_of(found: np.ndarray, expected: np.ndarray) -> float:
    centred = expected - expected.mean(0)
    return float(np.linalg.norm(found - found.mean(0) - centred) / np.linalg.norm(centred))


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "side", "args"), ARCHITECTURES, ids=[a[0] for a in ARCHITECTURES])
def test_logits_in_onnx_runtime_are_those_of_torch(
    arch: str, side: int, args: dict[str, Any], bundle_of: Callable[..., Any], photos: list[Image.Image], tmp_path: Path
) -> None:
    pixels = np.stack([np.asarray(photo.resize((side, side))) for photo in photos])
    bundle = bundle_of(arch, size=side, args=args, classes=7, seen=pixels[::2] if arch in FADING else "nothing")
    parts = np.array_split(pixels, 8)
    expected = logits_of(scorer_of(bundle, logits=True), parts)
    assert np.ptp(expected, axis=0).min() > 1e-2 * np.abs(expected).mean(), "the images all get the same logits"
    ordered = np.sort(expected, 1)
    clear = ordered[:, -1] - ordered[:, -2] > 1e-3
    for precision, gate in GATES.items():
        path = tmp_path / f"{precision}.onnx"
        write_graph(bundle, path, precision=precision, logits=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        fading = precision == "fp16" and arch in FADING
        images = pixels[:FEW] if fading else pixels
        sizes = parts if precision == "fp32" else [images]  # another batch size: the dimension is dynamic
        found = np.concatenate([session.run(["scores"], {"pixels": part})[0] for part in sizes]).astype(np.float64)
        exact = expected[: len(images)]
        if fading:
            gate = max(gate, 2 * error_of(logits_of(scorer_of(bundle, "fp16", logits=True), [images]), exact))
        assert error_of(found, exact) <= gate, f"{precision}: {error_of(found, exact):.1e} > {gate:.1e}"
        if precision == "fp32":
            assert (found.argmax(1) == expected.argmax(1))[clear].all()
