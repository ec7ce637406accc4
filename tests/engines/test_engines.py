"""Engines: pixels in, calibrated probabilities out, the same from every runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from imgcls_fast.core.batch import Batch
from imgcls_fast.core.errors import ConfigError, ExportError, ModelError
from imgcls_fast.engines.base import Engine
from imgcls_fast.engines.runtimes import open_engine
from imgcls_fast.engines.scoring import predict
from imgcls_fast.engines.torch_runtime import TorchEngine, load_model


def pixels_of(pictures: list[np.ndarray], bundle: Any) -> np.ndarray:
    from imgcls_fast.engines.predictor import Predictor

    predictor = Predictor(TorchEngine(torch.nn.Identity(), bundle.labels, bundle.pixels))
    return np.stack([predictor.preprocess(picture) for picture in pictures])


def test_scores_are_the_softmax_of_logits_over_temperature(
    bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    bundle = bundle_of(temperature=2.5)
    engine = open_engine(bundle)
    x = pixels_of(pictures[:6], bundle)
    with torch.no_grad():
        logits = load_model(bundle)(torch.from_numpy(x))
    expected = torch.softmax(logits.double() / 2.5, 1).numpy()
    np.testing.assert_allclose(engine.scores(x), expected, atol=1e-6)
    np.testing.assert_allclose(engine.scores(torch.from_numpy(x)), expected, atol=1e-6)
    assert isinstance(engine, Engine)
    assert engine.scores(x).dtype == np.float32


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_an_answer_does_not_depend_on_its_neighbours(
    n: int, bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    bundle = bundle_of()
    engine = open_engine(bundle)
    x = pixels_of(pictures, bundle)
    whole = engine.scores(x)
    np.testing.assert_allclose(np.concatenate([engine.scores(x[k : k + n]) for k in range(0, 40, n)]), whole, atol=1e-6)


def test_scoring_leaves_no_gradient_and_no_change_of_mode(bundle_of: Callable[..., Any]) -> None:
    model = load_model(bundle_of()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = TorchEngine(model, bundle_of().labels, bundle_of().pixels)
    engine.warmup(3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_predict_drops_padding_sorts_rows_and_counts_each_once(
    bundle_of: Callable[..., Any], pictures: list[np.ndarray]
) -> None:
    bundle = bundle_of()
    engine = open_engine(bundle)
    x = pixels_of(pictures[:6], bundle)
    target = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1, 2]]
    batches = [
        Batch(x[[4, 2]], target[[4, 2]], np.ones(2, np.float32), np.array([4, 2])),
        Batch(x[[0, 0]], target[[0, 0]], np.array([1, 0], np.float32), np.array([0, -1])),
        Batch(x[[2, 0]], target[[2, 0]], np.ones(2, np.float32), np.array([2, 0])),
    ]
    seen: list[int] = []
    found = predict(engine, batches, paths=[f"{k}.jpg" for k in range(6)], fingerprint="f", progress=seen.append)
    assert found.rows.tolist() == [0, 2, 4]
    assert found.paths == ("0.jpg", "2.jpg", "4.jpg")
    assert found.truth.tolist() == [0, 2, 1]
    np.testing.assert_allclose(found.scores, engine.scores(x)[[0, 2, 4]], atol=1e-6)
    assert seen == [2, 3, 5]


def test_an_unknown_runtime_is_c003_and_a_missing_export_names_its_command(bundle_of: Callable[..., Any]) -> None:
    bundle = bundle_of()
    with pytest.raises(ConfigError) as refused:
        open_engine(bundle, "tensorflow")
    assert refused.value.code == "C003"
    with pytest.raises(ExportError) as missing:
        open_engine(bundle, "onnx")
    assert missing.value.code == "E001"
    assert "--onnx" in missing.value.try_


def test_weights_that_lack_a_tensor_are_refused(bundle_of: Callable[..., Any]) -> None:
    from safetensors.torch import load_file, save_file

    bundle = bundle_of()
    state = load_file(bundle.weights)
    state.pop(next(name for name in state if "conv" in name or "stem" in name))
    save_file(state, bundle.weights)
    with pytest.raises(ModelError) as refused:
        load_model(bundle)
    assert refused.value.code in ("M002", "M004")
